"""Looks that take their time, as on a server: whatever happens between the question and the answer, nothing is lost or overtaken.

Every look on the database waits some turns of the loop before and after; meanwhile others settle, redrive, join, leave, are
cancelled.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trilogue.conformance import PROMISES, Promise
from trilogue.conformance.tools import Bench, envelope, group
from trilogue.events import Delivery, Settlement
from trilogue.gate import Gate, HeldRow
from trilogue.ports import Store
from trilogue.stores import dead, open_store
from trilogue.stores.sqlite_database import SqliteDatabase

G = "readers"
KEYS = ("a", "b", "c", "d", None)


@pytest.fixture
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[random.Random]:
    """Looks of SQLite are slow from now on."""
    chance = random.Random(getattr(request, "param", 0))

    async def glance(self: SqliteDatabase, run: Callable[[Any, Any], Any]) -> Any:
        for _ in range(chance.choice((0, 1, 3, 9))):
            await asyncio.sleep(0)
        with self.reading():
            found = run(self._reader_sql, self.types)
        for _ in range(chance.choice((0, 1, 3, 9))):
            await asyncio.sleep(0)
        return found

    monkeypatch.setattr(SqliteDatabase, "glance", glance)
    return chance


@pytest.mark.parametrize("kept", PROMISES, ids=lambda each: each.name)
def test_every_promise(kept: Promise, slow: random.Random, tmp_path: Path) -> None:
    if kept.needs - open_store("sqlite:///a.db").features:
        pytest.skip("not of SQLite")
    asyncio.run(kept.keep(lambda: open_store(f"sqlite:///{tmp_path}/log.db?lease_s=0.5")))


@pytest.mark.parametrize("slow", range(8), indirect=True)
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "unordered"])
def test_everything_at_once(ordered: bool, slow: random.Random, tmp_path: Path) -> None:
    mess = Mess(slow, f"sqlite:///{tmp_path}/log.db", ordered)
    asyncio.run(asyncio.wait_for(mess.run(), 100))


class Mess:
    """Two workers, one of which comes and goes, and everything a group can meet, all at once."""

    def __init__(self, chance: random.Random, url: str, ordered: bool) -> None:
        self.chance, self.ordered = chance, ordered
        self.bench = Bench(lambda: open_store(url))
        self.noted: list[tuple[str | None, int]] = []
        self.done: list[tuple[str | None, int]] = []
        self.published = 0
        self.quiet = False

    async def run(self) -> None:
        async with self.bench:
            store = await self.bench.open(group(G, ordered=self.ordered))
            troubles = [self.publish(store), self.redrive(store), self.come_and_go(), self.pause(store)]
            over = asyncio.Event()
            working = asyncio.create_task(self.work(store, over.is_set))
            await asyncio.gather(*troubles)
            self.quiet = True
            while len(self.done) < self.published:
                await store.redrive(G)
                await asyncio.sleep(0.01)
            over.set()
            await working
            assert await store.idle([G])
        assert len(set(self.done)) == len(self.done) == self.published
        for key in KEYS[:-1] if self.ordered else ():
            mine = [position for k, position in self.noted if k == key]
            assert mine == sorted(mine), f"the order of {key}"

    async def publish(self, store: Store) -> None:
        for _ in range(40):
            sent = [envelope(n, self.chance.choice(KEYS)) for n in range(self.chance.randint(1, 8))]
            await store.append(sent)
            self.published += len(sent)
            await self.some_turns()

    async def work(self, store: Store, ends: Callable[[], bool]) -> None:
        while not ends():
            claim = asyncio.create_task(store.claim(G, limit=self.chance.randint(1, 9), wait_s=0.01))
            if self.chance.random() < 0.3:
                await self.some_turns()
                claim.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.answer(store, await claim)

    async def answer(self, store: Store, deliveries: list[Delivery]) -> None:
        chosen = self.chance.sample(deliveries, len(deliveries)) if not self.ordered else deliveries
        await self.some_turns()
        settlements = []
        blocked: set[str | None] = set()
        for delivery in chosen:
            key = delivery.record.key
            verdict = "release" if key in blocked else self.verdict()
            if verdict != "done" and self.ordered and key is not None:
                blocked.add(key)
            settlements.append(Settlement(delivery, "dead" if verdict == "park" else verdict, park=verdict == "park"))  # type: ignore[arg-type]
        # Noted when it is told, not when that returns: the next of a key may be out, and done, before it does.
        done = [(s.delivery.record.key, s.delivery.record.position) for s in settlements if s.verdict == "done"]
        self.noted += done
        lost = await store.settle(G, settlements)
        assert not lost, "no lease has ended"
        self.done += done

    def verdict(self) -> str:
        if self.quiet:
            return "done"
        return self.chance.choices(("done", "retry", "release", "park"), (70, 15, 10, 5))[0]

    async def redrive(self, store: Store) -> None:
        for _ in range(30):
            await self.some_turns()
            await store.redrive(G)

    async def pause(self, store: Store) -> None:
        for _ in range(5):
            await self.some_turns()
            await store.pause(G)
            await self.some_turns()
            await store.resume(G)

    async def come_and_go(self) -> None:
        for _ in range(3):
            other = await self.bench.open(group(G, ordered=self.ordered))
            ends = asyncio.Event()
            working = asyncio.create_task(self.work(other, ends.is_set))
            for _ in range(5):
                await self.some_turns()
            ends.set()
            await working
            await self.bench.close(other)

    async def some_turns(self) -> None:
        await asyncio.sleep(self.chance.choice((0, 0, 0.001, 0.005)))


def test_a_slot_that_comes_while_the_log_is_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records were not asked for: going on from where that look ended would leave them out for ever."""
    original = SqliteDatabase.glance

    async def main() -> None:
        async with Bench(lambda: open_store(f"sqlite:///{tmp_path}/log.db")) as bench:
            first: Any = await bench.open(group(G))
            second: Any = await bench.open(group(G))
            for _ in range(3):
                await first._worker.attend()
                await second._worker.attend()
            gate: Gate = first._worker._bound[G].gate
            assert len(gate.leases) == 32
            await first.append([envelope(n, f"k{n}") for n in range(100)])

            async def glance(self: SqliteDatabase, run: Callable[[Any, Any], Any]) -> Any:
                found = await original(self, run)
                if second in bench._open and isinstance(found, tuple) and len(found) == 3:  # of a scan
                    await bench.close(second)
                    await first._worker.attend()
                    assert len(gate.leases) == 64
                return found

            monkeypatch.setattr(SqliteDatabase, "glance", glance)
            lent: list[Delivery] = []
            while found := await first.claim(G, limit=1_000, wait_s=0.05):
                lent += found
            assert len(lent) == 100

    asyncio.run(main())


def test_what_was_read_before_a_slot_was_lost_is_not_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new owner has finished the record, and is gone again, before the answer is here."""
    original = SqliteDatabase.glance

    async def main() -> None:
        async with Bench(lambda: open_store(f"sqlite:///{tmp_path}/log.db")) as bench:
            store: Any = await bench.open(group(G, ordered=False))
            await store.append([envelope(1)])
            [delivery] = await store.claim(G, limit=1, wait_s=1)
            await store.settle(G, [Settlement(delivery, "retry")])

            def finished_elsewhere(sql: Any) -> None:
                sql.rows("update trilogue_slots set owner = null, epoch = epoch + 1")
                sql.rows("update trilogue_groups set epoch = epoch + 1, revision = revision + 1")
                sql.rows("delete from trilogue_held")

            async def glance(self: SqliteDatabase, run: Callable[[Any, Any], Any]) -> Any:
                found = await original(self, run)
                if isinstance(found, list) and len(found) == 1 and isinstance(found[0], HeldRow):
                    monkeypatch.setattr(SqliteDatabase, "glance", original)
                    await self.write(finished_elsewhere)
                    await store._worker.attend()
                return found

            monkeypatch.setattr(SqliteDatabase, "glance", glance)
            assert await store.claim(G, limit=1, wait_s=0.05) == []
            assert SqliteDatabase.glance is original

    asyncio.run(main())


def _is_of_a_key(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 1 and isinstance(found[0], list)


async def _with_a_retry(bench: Bench) -> Any:
    """A store that holds one record of key a, due now."""
    store: Any = await bench.open(group(G))
    await store.append([envelope(1, "a")])
    [delivery] = await store.claim(G, limit=1, wait_s=1)
    await store.settle(G, [Settlement(delivery, "retry")])
    return store


def test_a_row_that_comes_back_while_its_key_is_read_is_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look found none; what was learnt since is newer."""
    original = SqliteDatabase.glance

    async def main() -> None:
        async with Bench(lambda: open_store(f"sqlite:///{tmp_path}/log.db")) as bench:
            store = await _with_a_retry(bench)
            await store._write(lambda sql: sql.rows("update trilogue_held set state = 2"))

            async def glance(self: SqliteDatabase, run: Callable[[Any, Any], Any]) -> Any:
                found = await original(self, run)
                if found == [[]]:
                    monkeypatch.setattr(SqliteDatabase, "glance", original)
                    await self.write(lambda sql: dead.redrive(sql, G, None))
                    await store._worker.attend()
                return found

            monkeypatch.setattr(SqliteDatabase, "glance", glance)
            lent = await store.claim(G, limit=1, wait_s=1)
            assert SqliteDatabase.glance is original
            assert len(lent) == 1

    asyncio.run(main())


@pytest.mark.parametrize("key", ["a", None])
def test_a_claim_cancelled_while_it_reads_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    original = SqliteDatabase.glance

    async def main() -> None:
        async with Bench(lambda: open_store(f"sqlite:///{tmp_path}/log.db")) as bench:
            store: Any = await bench.open(group(G))
            await store.append([envelope(1, key)])
            [delivery] = await store.claim(G, limit=1, wait_s=1)
            await store.settle(G, [Settlement(delivery, "retry")])
            reached = asyncio.Event()

            async def glance(self: SqliteDatabase, run: Callable[[Any, Any], Any]) -> Any:
                found = await original(self, run)
                if _is_of_a_key(found) or (isinstance(found, list) and found and isinstance(found[0], HeldRow)):
                    reached.set()
                    await asyncio.sleep(60)
                return found

            monkeypatch.setattr(SqliteDatabase, "glance", glance)
            claim = asyncio.create_task(store.claim(G, limit=9, wait_s=1))
            await reached.wait()
            claim.cancel()
            await asyncio.gather(claim, return_exceptions=True)
            monkeypatch.setattr(SqliteDatabase, "glance", original)
            assert len(await store.claim(G, limit=1, wait_s=1)) == 1

    asyncio.run(main())
