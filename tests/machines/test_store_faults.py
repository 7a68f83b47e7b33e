"""Faults of the SQLite store that a black box cannot bring about: looked at from inside."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

from trilogue.conformance.tools import Bench, answer, drain, envelope, group, number, numbers, take, until
from trilogue.errors import OutcomeUnknown
from trilogue.events import InTransaction, Record, Settlement
from trilogue.handlers import subscription
from trilogue.ports import Query
from trilogue.runner import SETTLES_OPEN, Runner
from trilogue.stores import open_store
from trilogue.stores import worker as worker_module

READERS = group()


def on_a_file(tmp_path: Path, proof: Callable[[Bench], Awaitable[None]], *, options: str = "lease_s=0.5") -> None:
    async def run() -> None:
        async with Bench(lambda: open_store(f"sqlite:///{tmp_path}/log.db?{options}")) as bench:
            await proof(bench)

    asyncio.run(run())


def test_a_batch_that_is_lost_in_part_hands_back_the_rest(tmp_path: Path) -> None:
    """Otherwise the keys that are still ours would count as being out for ever."""

    async def proof(bench: Bench) -> None:
        store: Any = await bench.open(READERS)
        await store.append([envelope(n, f"k{n}") for n in range(6)])
        out = await take(store, "readers", 6)
        slot = out[0].lease.slot
        await store.transact(lambda _: None)
        steal = "update trilogue_slots set epoch = epoch + 1, owner = 'other' where slot = ?"
        await store._write(lambda sql: (sql.rows(steal, (slot,)), sql.rows("update trilogue_groups set epoch = epoch + 1")))
        done = InTransaction(out, lambda db: [Settlement(d) for d in out], lambda error: [])
        lost = await store.settle("readers", [done])
        assert {d.lease.slot for d in lost} == {slot}
        await store._worker.attend()
        again = await drain(store, "readers", 6)
        # Nobody is behind the name that took the slot: it may have come back to us by now, and what was lost with it.
        assert {number(d) for d in out if d.lease.slot != slot} <= set(numbers(again))

    on_a_file(tmp_path, proof, options="lease_s=3600")


def test_nothing_is_remembered_over_a_failed_commit(tmp_path: Path) -> None:
    """Whosever commit it was: the connection is a new one, and what others committed meanwhile is not known by it."""

    async def proof(bench: Bench) -> None:
        ours: Any = await bench.open()
        other: Any = await bench.open()
        await ours.append([envelope(0)], expected=("s", 0))
        await ours.append([envelope(1, id="one")])
        cursor = ours._db.connection.sql
        rows = cursor.rows

        def failing(sql: str, values: Any = ()) -> Any:
            if sql == "commit":
                cursor.rows = rows
                raise apsw.IOError("disk I/O error")
            return rows(sql, values)

        cursor.rows = failing
        await asyncio.to_thread(ours._db.writer._run_tick, lambda sql: None)  # a renewal of leases
        for n in range(5):
            await other.append([envelope(n)], expected=("s", n + 1))
        assert await ours.append([envelope(1, id="one")]) == [2]  # a repetition
        assert [record.position for record in await other.read(Query())] == [1, 2, 3, 4, 5, 6, 7]
        assert await ours.append([envelope(9)], expected=("s", 6)) == [8]

    on_a_file(tmp_path, proof)


def test_a_paused_group_does_not_spin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    lend = worker_module.Worker._lend

    async def counting(self: Any, bound: Any, limit: int) -> Any:
        nonlocal looks
        looks += 1
        return await lend(self, bound, limit)

    monkeypatch.setattr(worker_module.Worker, "_lend", counting)

    async def proof(bench: Bench) -> None:
        nonlocal looks
        store: Any = await bench.open(READERS)
        await store.append([envelope(1, "a")])
        await answer(store, await take(store, "readers", 1), "retry")
        await store.pause("readers")
        await until(lambda: _silent(store), "paused")
        looks = 0
        assert await store.claim("readers", limit=1, wait_s=0.3) == []
        assert looks < 30, f"looked {looks} times in 0.3 s although paused"

    on_a_file(tmp_path, proof, options="lease_s=3600")


def test_what_is_trimmed_leaves_no_rows_behind(tmp_path: Path) -> None:
    """Reads would not show them: they only make the file grow."""

    async def proof(bench: Bench) -> None:
        store: Any = await bench.open()
        tags = ("t:1", "ä:\u2028", 'q:"\\', "nul:\x00x")
        sent = [msgspec.structs.replace(envelope(n, "k"), tags=tags, correlation_id="root") for n in range(10)]
        await store.append(sent, expected=("s", 0))
        await store.append([envelope(10)])
        await store.trim(keep=1, streams=True, force=True)
        left = [await store.query(f"select count(*) from trilogue_{name}") for name in ("records", "tags", "traces", "places")]
        assert left == [[(2,)], [(len(tags),)], [(1,)], [(1,)]]
        assert [len(await store.read(Query(tags=(tag,)))) for tag in tags] == [1] * len(tags)

    on_a_file(tmp_path, proof)


async def _silent(store: Any) -> bool:
    deliveries = await store.claim("readers", limit=1, wait_s=0)
    await answer(store, deliveries, "release")
    return not deliveries


def test_a_worker_that_was_buried_does_not_prolong_its_leases(tmp_path: Path) -> None:
    async def proof(bench: Bench) -> None:
        store: Any = await bench.open(READERS)
        await store.append([envelope(1, "a")])
        delivery = (await take(store, "readers", 1))[0]
        await bench.crash(store)
        await store._write(lambda sql: sql.rows("delete from trilogue_members"))
        before = delivery.lease.until_us
        await store._write(store._worker._renew)
        assert delivery.lease.until_us == before

    on_a_file(tmp_path, proof)


def test_a_failed_commit_is_unknown_and_repeating_it_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def proof(bench: Bench) -> None:
        store: Any = await bench.open(READERS)
        commit = store._db.connection.commit
        sent = [envelope(n, f"k{n}", id=f"id-{n}") for n in range(20)]

        def fail_after_the_commit() -> None:
            commit()
            store._db.connection.begin(wait=True)
            raise apsw.IOError("disk I/O error")

        monkeypatch.setattr(store._db.connection, "commit", fail_after_the_commit)
        results: list[Any] = await asyncio.gather(*(store.append([each]) for each in sent), return_exceptions=True)
        assert {type(each) for each in results} == {OutcomeUnknown}
        assert {each.stored for each in results} == {None}
        monkeypatch.undo()
        positions = [await store.append([each]) for each in sent]
        assert len({position for (position,) in positions}) == 20
        assert len(await store.read(Query())) == 20
        assert sorted(numbers(await drain(store, "readers", 20))) == list(range(20))

    on_a_file(tmp_path, proof)


def test_a_settlement_whose_commit_failed_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing planned on top of it happens either, and the group goes on."""

    async def proof(bench: Bench) -> None:
        store: Any = await bench.open(READERS)
        await store.append([envelope(n, "a") for n in range(6)])
        out = await take(store, "readers", 2)

        def fail() -> None:
            raise apsw.IOError("disk I/O error")

        monkeypatch.setattr(store._db.connection, "commit", fail)
        first = store.settle("readers", [Settlement(out[0])])
        second = store.settle("readers", [Settlement(out[1])])
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(results[0], OutcomeUnknown), results
        monkeypatch.undo()
        assert numbers(await drain(store, "readers", 6)) == list(range(6))

    on_a_file(tmp_path, proof)


def test_settlements_that_end_together_make_room() -> None:
    """A group commit resolves many at once; whoever waits for room must be told when the last of them is gone."""

    class Settling:
        def __init__(self) -> None:
            self.open: list[asyncio.Future[list[Any]]] = []

        def check(self, envelope: Any) -> None: ...

        def settle(self, group: str, answers: Any) -> Awaitable[list[Any]]:
            self.open.append(asyncio.get_running_loop().create_future())
            return self.open[-1]

    async def handle(r: Record) -> None: ...

    async def proof() -> None:
        store: Any = Settling()
        runner: Any = Runner(store, subscription(handle, "#"), ThreadPoolExecutor(1), "test")
        for _ in range(SETTLES_OPEN):
            runner.in_flight += 1
            runner._answers = [None]
            runner._send()
        await asyncio.sleep(0)
        waiting = asyncio.create_task(runner._wait_for_room())
        await asyncio.sleep(0)
        for future in store.open:
            future.set_result([])
        await asyncio.wait_for(waiting, 10)

    asyncio.run(proof())
