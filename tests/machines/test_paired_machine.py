"""Two processes on a broker that moves lanes and breaks connections, and a store beside it, against what was published.

Whatever is answered, in whatever order, by whomever: nothing is lost, a key is handled in order, and by one claim at a time.
Random steps from a seed and not a Hypothesis machine: what a claim finds depends on time, which Hypothesis takes for flaky.
"""

import asyncio
import random
import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from fake_broker import FakeBroker, FakeServer

from trilogue.brokers.paired import Paired
from trilogue.events import Delivery, Envelope, Group, Settlement
from trilogue.stores import open_store

KEYS = ("a", "b", "c", None)
GROUP = Group("g", ("#",), start="beginning")
STEPS = 60


class Walk:
    """done: finished, by key, in order. out: claims that are not answered. told: the steps, for a failure."""

    def __init__(self, seed: int, server: FakeServer, url: str) -> None:
        self.random = random.Random(seed)
        self.server = server
        self.brokers = [FakeBroker(server) for _ in range(2)]
        self.logs = [Paired(broker, open_store(url)) for broker in self.brokers]
        self.published = 0
        self.done: defaultdict[str | None, list[int]] = defaultdict(list)
        self.out: list[tuple[Paired, list[Delivery]]] = []
        self.told: list[str] = []

    async def run(self) -> None:
        steps = [self.publish, self.claim, self.claim, self.answer, self.answer, self.answer]
        seldom = [self.lose_the_connection, self.leave_and_come_back, self.redrive, self.cancel_a_claim]
        for log in self.logs:
            await log.open()
            await log.bind([GROUP])
        try:
            for _ in range(STEPS):
                step = self.random.choice(seldom if self.random.random() < 0.15 else steps)
                self.told.append(step.__name__)
                await step()
            await self.finish()
        finally:
            for log in self.logs:
                await log.close()

    async def publish(self) -> None:
        new = [(self.published + n, self.random.choice(KEYS)) for n in range(self.random.randint(1, 4))]
        self.published += len(new)
        self.told.append(str(new))
        await self.random.choice(self.logs).publish([Envelope(f"id-{n}", "thing.made", b"%d" % n, key) for n, key in new])

    async def claim(self) -> None:
        log = self.random.choice(self.logs)
        taken = await log.claim("g", limit=self.random.randint(1, 4), wait_s=0.02)
        busy = {d.record.key for _, claim in self.out for d in claim if not d.lease.lost} - {None}
        twice = busy & {d.record.key for d in taken if not d.lease.lost}
        assert not twice, f"a key is out in one claim: {twice}"
        self.keep(log, taken)

    async def cancel_a_claim(self) -> None:
        log = self.random.choice(self.logs)
        claim = asyncio.ensure_future(log.claim("g", limit=2, wait_s=1))
        for _ in range(self.random.randint(0, 3)):
            await asyncio.sleep(0)
        claim.cancel()
        (taken,) = await asyncio.gather(claim, return_exceptions=True)
        self.keep(log, taken if isinstance(taken, list) else [])

    def keep(self, log: Paired, taken: list[Delivery]) -> None:
        self.told.append(f"{self.logs.index(log)}: {[(number(d), d.is_held) for d in taken]}")
        if taken:
            self.out.append((log, taken))

    async def answer(self) -> None:
        """The first of a claim has an outcome; if it failed, what follows of its key is given back."""
        if not self.out:
            return
        log, claim = self.random.choice(self.out)
        first = claim.pop(0)
        verdict = self.random.choice(["done", "done", "retry", "park", "release"])
        answers = [settlement(first, verdict)]
        if verdict != "done" and first.record.key is not None:
            behind = [d for d in claim if d.record.key == first.record.key]
            for delivery in behind:
                claim.remove(delivery)
            answers += [Settlement(delivery, "release") for delivery in behind]
        self.out = [(owner, left) for owner, left in self.out if left]
        lost = await log.settle("g", answers)
        self.told.append(f"{number(first)} {verdict}{' lost' if first in lost else ''}")
        if verdict == "done" and first not in lost:
            self.finished(first)

    def finished(self, delivery: Delivery) -> None:
        done, n = self.done[delivery.record.key], number(delivery)
        assert delivery.record.key is None or not done or done[-1] < n, f"{n} after {done[-1]}"
        done.append(n)

    async def lose_the_connection(self) -> None:
        await self.random.choice(self.brokers).reconnect()

    async def leave_and_come_back(self) -> None:
        log = self.random.choice(self.logs)
        self.out = [(owner, claim) for owner, claim in self.out if owner is not log]
        await log.leave()
        await log.bind([GROUP])

    async def redrive(self) -> None:
        await self.random.choice(self.logs).redrive("g")

    async def finish(self) -> None:
        """In the end everything is handled, once."""
        for log, claim in self.out:
            await log.settle("g", [Settlement(delivery, "release") for delivery in claim])
        await self.logs[1].leave()
        await self.logs[0].redrive("g")
        async with asyncio.timeout(20):
            while not await self.logs[0].idle(["g"]):
                deliveries = await self.logs[0].claim("g", limit=10, wait_s=0.1)
                lost = await self.logs[0].settle("g", [Settlement(delivery) for delivery in deliveries])
                for delivery in deliveries:
                    if delivery not in lost:
                        self.finished(delivery)
        assert sorted(n for numbers in self.done.values() for n in numbers) == list(range(self.published))


def number(delivery: Delivery) -> int:
    return int(delivery.record.data)


def settlement(delivery: Delivery, verdict: str) -> Settlement:
    if verdict == "park":
        return Settlement(delivery, "dead", park=True, error="no")
    if verdict == "retry":
        return Settlement(delivery, "retry", 1_000, error="no")
    return Settlement(delivery, "release") if verdict == "release" else Settlement(delivery)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("positions", [True, False], ids=["kafka-like", "rabbitmq-like"])
def test_whatever_happens(seed: int, positions: bool, tmp_path: Path) -> None:
    async def walk() -> None:
        going = Walk(seed, FakeServer(positions=positions), f"sqlite:///{tmp_path}/x.db?lease_s=2")
        try:
            await going.run()
        except BaseException:
            print(*going.told, sep="\n")
            raise

    asyncio.run(asyncio.wait_for(walk(), 60))
