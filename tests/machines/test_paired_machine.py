"""Two processes on a broker that moves lanes and breaks connections, and a store beside it, against what was published.

Whatever is answered, in whatever order, by whomever: nothing is lost, a key is handled in order, and by one claim at a time.
"""

import asyncio
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

sys.path.append(str(Path(__file__).resolve().parents[1]))

from fake_broker import FakeBroker, FakeServer

from trilogue.brokers.paired import Paired
from trilogue.events import Delivery, Envelope, Group, Settlement
from trilogue.stores import open_store

KEYS = ("a", "b", "c", None)
GROUP = Group("g", ("#",), start="beginning")
WAIT_S = 0.02


class PairedMachine(RuleBasedStateMachine):
    """done: finished, by key, in the order of their answers. out: claims that are not answered."""

    positions = True

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.loop = asyncio.new_event_loop()
        self.published: list[tuple[int, str | None]] = []
        self.done: defaultdict[str | None, list[int]] = defaultdict(list)
        self.out: list[tuple[Paired, list[Delivery]]] = []
        self.emitted: list[int] = []
        self.run(self._open())

    async def _open(self) -> None:
        self.server = FakeServer(positions=self.positions)
        self.brokers = [FakeBroker(self.server) for _ in range(2)]
        url = f"sqlite:///{self.folder}/x.db"
        self.logs = [Paired(broker, open_store(url)) for broker in self.brokers]
        for log in self.logs:
            await log.open()
            await log.bind([GROUP])

    def run(self, doing: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(doing, 60))

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4), which=st.integers(0, 1))
    def publish(self, keys: list[str | None], which: int) -> None:
        first = len(self.published)
        new = list(enumerate(keys, first))
        self.published += new
        self.run(self.logs[which].publish([Envelope(f"id-{n}", "thing.made", b"%d" % n, key) for n, key in new]))

    @rule(which=st.integers(0, 1), limit=st.integers(1, 4))
    def claim(self, which: int, limit: int) -> None:
        log = self.logs[which]
        taken = self.run(log.claim("g", limit=limit, wait_s=WAIT_S))
        assert len(taken) <= limit
        if not taken:
            return
        busy = {d.record.key for _, claim in self.out for d in claim if not d.lease.lost} - {None}
        assert not busy & {d.record.key for d in taken if not d.lease.lost}, "a key is out in one claim"
        self.out.append((log, taken))

    @rule(which=st.integers(0, 1), turns=st.integers(0, 3))
    def cancel_a_claim(self, which: int, turns: int) -> None:
        async def cancelled() -> list[Delivery]:
            claim = asyncio.ensure_future(self.logs[which].claim("g", limit=2, wait_s=1))
            for _ in range(turns):
                await asyncio.sleep(0)
            claim.cancel()
            try:
                return await claim
            except asyncio.CancelledError:
                return []

        if taken := self.run(cancelled()):
            self.out.append((self.logs[which], taken))

    @precondition(lambda self: self.out)
    @rule(data=st.data(), verdict=st.sampled_from(["done", "done", "retry", "park", "release"]), emits=st.booleans())
    def answer(self, data: st.DataObject, verdict: str, emits: bool) -> None:
        """The first of a claim has an outcome; if it failed, what follows of its key is given back."""
        log, claim = self.out[data.draw(st.integers(0, len(self.out) - 1))]
        first = claim.pop(0)
        answers = [_settlement(first, verdict, emits=emits)]
        if verdict != "done" and first.record.key is not None:
            behind = [d for d in claim if d.record.key == first.record.key]
            for delivery in behind:
                claim.remove(delivery)
            answers += [Settlement(delivery, "release") for delivery in behind]
        self.out = [(owner, left) for owner, left in self.out if left]
        lost = self.run(log.settle("g", answers))
        if verdict == "done" and first not in lost:
            self.done[first.record.key].append(_number(first))

    @rule(which=st.integers(0, 1))
    def lose_the_connection(self, which: int) -> None:
        self.run(self.brokers[which].reconnect())

    @rule(which=st.integers(0, 1))
    def leave_and_come_back(self, which: int) -> None:
        log = self.logs[which]
        self.out = [(owner, claim) for owner, claim in self.out if owner is not log]
        self.run(log.leave())
        self.run(log.bind([GROUP]))

    @rule(which=st.integers(0, 1))
    def redrive(self, which: int) -> None:
        self.run(self.logs[which].redrive("g"))

    @rule(troubles=st.lists(st.sampled_from(["", "unknown", "unavailable"]), max_size=3))
    def trouble(self, troubles: list[str]) -> None:
        self.server.trouble = ["" for _ in range(0)]
        self.pending = troubles

    # ── what holds ───────────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def keys_are_in_order(self) -> None:
        for key, numbers in self.done.items():
            assert key is None or numbers == sorted(set(numbers)), f"order of {key}: {numbers}"

    def teardown(self) -> None:
        """In the end everything is handled, once."""
        try:
            self.run(self._finish())
            handled = sorted(n for numbers in self.done.values() for n in numbers)
            assert handled == [n for n, _ in self.published]
            self.keys_are_in_order()
        finally:
            for log in self.logs:
                self.run(log.close())
            self.loop.close()
            shutil.rmtree(self.folder)

    async def _finish(self) -> None:
        for log, claim in self.out:
            await log.settle("g", [Settlement(delivery, "release") for delivery in claim])
        self.out.clear()
        await self.logs[0].redrive("g")
        await self.logs[1].leave()
        async with asyncio.timeout(30):
            while not await self.logs[0].idle(["g"]):
                deliveries = await self.logs[0].claim("g", limit=10, wait_s=0.1)
                lost = await self.logs[0].settle("g", [Settlement(delivery) for delivery in deliveries])
                for delivery in deliveries:
                    if delivery not in lost and delivery.record.type == "thing.made":
                        self.done[delivery.record.key].append(_number(delivery))


def _number(delivery: Delivery) -> int:
    return int(delivery.record.data)


def _settlement(delivery: Delivery, verdict: str, *, emits: bool) -> Settlement:
    if verdict == "park":
        return Settlement(delivery, "dead", park=True, error="no")
    if verdict == "retry":
        return Settlement(delivery, "retry", 1_000, error="no")
    if verdict == "release":
        return Settlement(delivery, "release")
    return Settlement(delivery)


class QueueMachine(PairedMachine):
    """The same on a broker without positions."""

    positions = False


_SETTINGS = settings(max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
TestPairedMachine = PairedMachine.TestCase
TestPairedMachine.settings = _SETTINGS
TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = _SETTINGS
