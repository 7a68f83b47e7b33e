"""The store on a file against the plain model, under crashes, lease expiry, a second worker, redrive, seek and timers.

Wall and machine clock are the machine's own: time passes only by its steps, so that nothing here waits.
"""

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import Awaitable
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from log_model import Model

from trilogue.conformance.tools import Bench, envelope, group
from trilogue.events import Delivery, InTransaction, Settlement
from trilogue.ports import Db, Query, SeekTo, Store
from trilogue.stores import open_store
from trilogue.stores import store as store_module
from trilogue.stores import worker as worker_module

T = TypeVar("T")
LEASE_US = 3_600_000_000
KEYS = (None, "a", "b", "c")
G = "readers"
VERDICTS = ("done", "done", "done", "effect", "retry", "dead", "park", "release")


class StoreMachine(RuleBasedStateMachine):
    """One group, up to two workers; deliveries are kept with the worker they were lent to."""

    ordered = True

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="trilogue-machine-")
        self.clock_us = 1_800_000_000_000_000
        self.machine_us = 1_000_000_000
        self.patches = [
            mock.patch.object(store_module, "now_us", self.now),
            mock.patch.object(worker_module, "now_us", self.now),
            mock.patch.object(worker_module, "machine_us", self.machine_now),
            mock.patch.object(worker_module, "clock_us", self.server_now),
        ]
        for patch in self.patches:
            patch.start()
        self.loop = asyncio.new_event_loop()
        self.model = Model()
        self.count = 0
        self.bench = Bench(partial(open_store, self.url()))
        self.workers: list[Store] = []
        self.zombies: list[tuple[Store, list[Delivery]]] = []
        self.out: dict[int, tuple[Store, Delivery]] = {}
        self.do(self.join())
        self.do(self.workers[0].transact(lambda db: db.execute("create table effects (n integer)")))

    def url(self) -> str:
        return f"sqlite:///{self.folder}/log.db?lease_s=3600"

    def now(self) -> int:
        return self.clock_us

    def machine_now(self) -> int:
        return self.machine_us

    def server_now(self, _sql: object) -> int:
        return self.machine_us

    def do(self, doing: Awaitable[T]) -> T:
        return self.loop.run_until_complete(doing)

    async def join(self) -> None:
        self.workers.append(await self.bench.open(group(G, ordered=self.ordered)))

    async def settled_in(self) -> None:
        """Let every worker report, as it would by itself within a third of its lease."""
        for _ in range(3):
            for worker in self.workers:
                await worker._worker.attend()  # type: ignore[attr-defined]

    # ── publishing ───────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=5))
    def publish(self, keys: list[str | None]) -> None:
        envelopes = [envelope(self.count + n, key, id=f"id-{self.count + n}") for n, key in enumerate(keys)]
        positions = self.do(self.workers[-1].append(envelopes))
        for sent, position in zip(envelopes, positions, strict=True):
            self.model.publish(sent.id, sent.key, position)
        self.count += len(keys)

    @precondition(lambda self: self.model.ids)
    @rule(data=st.data())
    def publish_again(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.model.ids) - 1))
        number = int(self.model.ids[n].removeprefix("id-"))
        again = envelope(number, self.model.keys[n], id=self.model.ids[n])
        assert self.do(self.workers[0].append([again])) == [self.model.position[n]]

    @rule(key=st.sampled_from(KEYS), after_us=st.sampled_from([10, 1_000]))
    def schedule(self, key: str | None, after_us: int) -> None:
        sent = envelope(self.count, key, id=f"id-{self.count}")
        self.count += 1
        self.do(self.workers[-1].schedule([sent], self.clock_us + after_us))
        self.model.timers[sent.id] = (self.clock_us + after_us, key)

    @precondition(lambda self: self.model.timers)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.model.timers)))
        assert self.do(self.workers[0].cancel(id_))
        del self.model.timers[id_]
        assert not self.do(self.workers[0].cancel(id_))

    @rule(us=st.sampled_from([100, 5_000]))
    def wait(self, us: int) -> None:
        self.clock_us += us
        self.do(self.workers[0]._fire())  # type: ignore[attr-defined]
        due = {id_ for id_, (due_us, _) in self.model.timers.items() if due_us <= self.clock_us}
        for record in self.do(self.workers[0].read(Query(after=self.model.position[-1] if self.model.position else 0))):
            assert record.id in due, f"{record.id} entered the log and was not due"
            self.model.publish(record.id, record.key, record.position)
            due.discard(record.id)
            del self.model.timers[record.id]
        assert not due, f"{due} were due and did not enter the log"

    # ── handling ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(data=st.data(), limit=st.integers(1, 6))
    def claim(self, data: st.DataObject, limit: int) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        lent = self.do(worker.claim(G, limit=limit, wait_s=0))
        together = {self.number(d) for d in lent}
        assert len(lent) == len(together) <= limit
        for delivery in lent:
            n = self.number(delivery)
            assert n not in self.out, f"{n} is out twice"
            assert self.may_be_lent(n, together), f"{n} (key {self.model.keys[n]}) must not be lent now"
            assert delivery.attempt == self.model.attempt.get(n, 1)
        self.out.update({self.number(d): (worker, d) for d in lent})

    def may_be_lent(self, n: int, together: set[int]) -> bool:
        if self.ordered:
            return self.model.may_be_lent(n, self.clock_us, set(self.out), together)
        return not self.model.paused and n in self.model.open() and n not in self.model.parked

    def number(self, delivery: Delivery) -> int:
        return self.model.ids.index(delivery.record.id)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), after_us=st.sampled_from([0, 500, 10_000]))
    def settle(self, data: st.DataObject, after_us: int) -> None:
        first = data.draw(st.sampled_from(sorted(self.out)))
        worker = self.out[first][0]
        key = self.model.keys[first]
        same_key = self.ordered and key is not None
        chosen = [n for n in sorted(self.out) if n == first or (same_key and self.model.keys[n] == key)]
        answers: list[Settlement | InTransaction] = []
        verdicts: dict[int, str] = {}
        for n in chosen:
            blocked = any(v in ("retry", "park", "release") for v in verdicts.values())
            verdict = "release" if blocked else data.draw(st.sampled_from(VERDICTS))
            verdicts[n] = verdict
            answers.append(self.answer(self.out.pop(n)[1], verdict, after_us))
        assert self.do(worker.settle(G, answers)) == []
        for n, verdict in verdicts.items():
            if verdict == "effect":
                self.model.effects.append(n)
            self.model.settle(n, "done" if verdict == "effect" else verdict, self.clock_us, after_us)

    def answer(self, delivery: Delivery, verdict: str, after_us: int) -> Settlement | InTransaction:
        if verdict == "effect":
            return InTransaction([delivery], partial(self.write, delivery), lambda error: [Settlement(delivery, "dead")])
        park = verdict == "park"
        return Settlement(delivery, "dead" if park else verdict, after_us, park=park)  # type: ignore[arg-type]

    def write(self, delivery: Delivery, db: Db) -> list[Settlement]:
        db.execute("insert into effects values (?)", (self.number(delivery),))
        return [Settlement(delivery)]

    @rule(some=st.booleans(), data=st.data())
    def redrive(self, some: bool, data: st.DataObject) -> None:
        self.decide(self.model.redrive, "redrive", some, data)

    @rule(some=st.booleans(), data=st.data())
    def drop(self, some: bool, data: st.DataObject) -> None:
        self.decide(self.model.drop, "drop_dead", some, data)

    def decide(self, change: Any, doing: str, some: bool, data: st.DataObject) -> None:
        given_up = sorted(self.model.dead | self.model.parked)
        chosen = set(data.draw(st.lists(st.sampled_from(given_up)))) if some and given_up else set(given_up)
        positions = [self.model.position[n] for n in chosen] if some else None
        assert self.do(getattr(self.workers[0], doing)(G, positions)) == len(chosen)
        change(chosen)
        self.do(self.settled_in())

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.do(self.workers[0].pause(G) if paused else self.workers[0].resume(G))
        self.model.paused = paused
        self.do(self.settled_in())

    @precondition(lambda self: self.model.position)
    @rule(data=st.data())
    def seek(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(self.model.position)))
        to = SeekTo(end="now") if start == len(self.model.position) else SeekTo(position=self.model.position[start])
        self.do(self.workers[0].seek(G, to))
        late = [self.out.pop(n) for n in sorted(self.out)]
        for worker, delivery in late:
            assert self.do(worker.settle(G, [Settlement(delivery)])) == [delivery], "settled although taken back"
        self.model.seek(start)
        self.do(self.settled_in())

    # ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: len(self.workers) < 2)
    @rule()
    def a_second_worker(self) -> None:
        self.do(self.join())
        self.do(self.settled_in())

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """A worker dies; the others, or its successor, go on when its lease has passed. It stays as a zombie."""
        worker = data.draw(st.sampled_from(self.workers))
        self.do(self.bench.crash(worker))
        self.workers.remove(worker)
        self.zombies.append((worker, [self.out.pop(n)[1] for n, (w, _) in sorted(self.out.items()) if w is worker]))
        self.do(self.survive())

    async def survive(self) -> None:
        for living in self.workers:
            await living._worker.attend()  # type: ignore[attr-defined]
        self.machine_us += LEASE_US // 2
        for living in self.workers:
            await living._worker.attend()  # type: ignore[attr-defined]
        self.machine_us += LEASE_US // 2 + 1
        if not self.workers:
            await self.join()
        await self.settled_in()

    @precondition(lambda self: any(late for _, late in self.zombies))
    @rule(verdict=st.sampled_from(["done", "effect", "retry", "dead"]))
    def a_zombie_settles(self, verdict: str) -> None:
        zombie, late = self.zombies.pop()
        answers = [self.answer(delivery, verdict, 0) for delivery in late]
        lost = self.do(zombie.settle(G, answers))
        assert sorted(map(self.number, lost)) == sorted(map(self.number, late))

    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        """An orderly close hands back what is out, and another worker has it at once."""
        worker = data.draw(st.sampled_from(self.workers))
        self.workers.remove(worker)
        self.do(self.bench.close(worker))
        self.out = {n: (w, d) for n, (w, d) in self.out.items() if w is not worker}
        if not self.workers:
            self.do(self.join())
        self.do(self.settled_in())

    # ── what always holds ────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def the_store_agrees(self) -> None:
        letters = self.do(self.workers[0].dead(G, limit=1_000))
        at = {position: n for n, position in enumerate(self.model.position)}
        assert {at[letter.record.position] for letter in letters} == self.model.dead | self.model.parked
        assert {at[letter.record.position] for letter in letters if letter.parked} == self.model.parked
        written = [n for (n,) in self.do(self.workers[0].query("select n from effects"))]
        assert sorted(written) == sorted(self.model.effects)
        is_idle = self.do(self.workers[0].idle([G]))
        assert is_idle == (not self.waiting()), f"idle is {is_idle}, waiting are {self.waiting()}"

    def waiting(self) -> list[int]:
        """What is left to do, without what waits behind a parked record."""
        parked = {(self.model.keys[n], n) for n in self.model.parked}
        return [
            n
            for n in self.model.open()
            if n not in self.model.parked
            and not (self.ordered and any(key is not None and key == self.model.keys[n] and m < n for key, m in parked))
        ]

    def teardown(self) -> None:
        """At the end everything that is not given up gets done, in order per key."""
        try:
            self.finish()
        finally:
            self.do(self.bench.__aexit__(None, None, None))
            self.loop.close()
            for patch in self.patches:
                patch.stop()
            shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self) -> None:
        self.pause(False)
        for n in sorted(self.out):
            worker, delivery = self.out.pop(n)
            assert self.do(worker.settle(G, [Settlement(delivery, "release")])) == []
        self.wait(100_000)
        for _ in range(5 + len(self.model.keys)):
            if not self.waiting():
                break
            self.do(self.settled_in())
            for worker in self.workers:
                lent = self.do(worker.claim(G, limit=50, wait_s=0))
                together = {self.number(d) for d in lent}
                assert all(self.may_be_lent(n, together) for n in together)
                assert self.do(worker.settle(G, [Settlement(d) for d in lent])) == []
                self.model.done |= together
        note(f"left: {self.waiting()}")
        assert not self.waiting(), f"{self.waiting()} are never handed out"


class UnorderedStoreMachine(StoreMachine):
    ordered = False


class OnPostgresql(StoreMachine):
    """The same on a server; a schema of its own for every run."""

    database = ""

    def url(self) -> str:
        return f"{self.database}?schema=t{secrets.token_hex(6)}&lease_s=3600"


class UnorderedOnPostgresql(OnPostgresql):
    ordered = False


_SETTINGS = settings(max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
TestOrdered = StoreMachine.TestCase
TestOrdered.settings = _SETTINGS
TestUnordered = UnorderedStoreMachine.TestCase
TestUnordered.settings = _SETTINGS
_FEWER = settings(max_examples=6, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("machine", [OnPostgresql, UnorderedOnPostgresql])
def test_on_postgresql(machine: type[OnPostgresql], postgresql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnPostgresql, "database", postgresql)
    run_state_machine_as_test(machine, settings=_FEWER)
