"""How often the PostgreSQL store asks the server, and that asking less changes nothing of what it promises."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from common import run
from test_postgresql import backends, beside, waits_for_a_lock

from trilogue.conformance.tools import Bench, answer, drain, effect, envelope, group, take
from trilogue.errors import Conflict, OutcomeUnknown
from trilogue.stores import open_store, postgresql

READERS = group()
WRITER = "trilogue-writer"


def slowly(url: str) -> str:
    """With a lease so long that nothing of it is renewed meanwhile."""
    return url.replace("lease_s=1", "lease_s=600")


@contextmanager
def trips(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The threads that have waited for an answer of the server, one entry each time."""
    waited: list[str] = []
    original = postgresql.Connection.wait

    def wait(self: Any, *values: Any, **options: Any) -> Any:
        waited.append(threading.current_thread().name)
        return original(self, *values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(postgresql.Connection, "wait", wait)
        yield waited


def of_writer(waited: list[str]) -> int:
    return sum(name.startswith(WRITER) for name in waited)


def test_one_publish_is_one_trip(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Bench(lambda: open_store(slowly(postgresql_url))) as bench:
            store = await bench.open()
            await store.append([envelope(0, "k")])
            await store.append([envelope(1)], expected=("s", 0))
            for _ in range(8):  # what the driver prepares is prepared
                await store.append([envelope(0, "k")])
            with trips(monkeypatch) as waited:
                await store.append([envelope(1, "k")])
                await store.append([envelope(2)], expected=("s", 1))
                assert of_writer(waited) == 2
            with pytest.raises(Conflict):
                await store.append([envelope(3)], expected=("s", 1))
            [position] = await store.append([envelope(4, id="one")])
            assert await store.append([envelope(4, id="one")]) == [position]

    run(main())


def test_a_plain_settlement_is_one_trip(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Bench(lambda: open_store(slowly(postgresql_url))) as bench:
            store = await bench.open(READERS)
            for _ in range(8):
                await store.append([envelope(n, f"k{n}") for n in range(50)])
                await drain(store, "readers", 50)
            await store.append([envelope(n, f"k{n}") for n in range(50)])
            out = await take(store, "readers", 50)
            with trips(monkeypatch) as waited:
                assert await answer(store, out) == []
                assert of_writer(waited) == 1
            assert (await store.status()).groups[0].done == 450

    run(main())


def test_effects_share_the_trips_of_their_savepoints(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Bench(lambda: open_store(slowly(postgresql_url))) as bench:
            store = await bench.open(group(has_effects=True))
            await store.transact(lambda tx: tx.execute("create table seen (n integer)"))
            counts = []
            for count in (1, 21):
                for _ in range(2):
                    await store.append([envelope(n, f"k{n}") for n in range(count)])
                    out = await take(store, "readers", count)
                    with trips(monkeypatch) as waited:
                        answers = [effect(each, lambda db: db.execute("insert into seen values (1)")) for each in out]
                        assert await store.settle("readers", answers) == []
                    counts.append(of_writer(waited))
            assert counts[3] - counts[1] == 20 * 2  # of each: the savepoint, the insert
            assert await store.query("select count(*) from seen") == [(44,)]

    run(main())


def test_slots_that_went_are_not_moved_by_a_plain_settlement(postgresql_url: str) -> None:
    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open(READERS)
            await store.append([envelope(n, f"k{n}") for n in range(40)])
            out = await take(store, "readers", 40)
            gone = out[0].lease.slot
            with beside(postgresql_url) as other:
                other.execute("update trilogue_slots set epoch = epoch + 1 where slot = %s", (gone,))
            lost = await answer(store, out)
            assert {delivery.record.id for delivery in lost} == {d.record.id for d in out if d.lease.slot == gone}
            counted = "select slot from trilogue_slots where done > 0 or slot = ? and cursor > 0"
            with beside(postgresql_url) as other:
                moved = {slot for (slot,) in other.execute(counted.replace("?", "%s"), (gone,))}
            assert moved == {d.lease.slot for d in out} - {gone}

    run(main())


def test_a_lone_publish_whose_answer_is_lost_is_unknown(postgresql_url: str) -> None:
    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open()
            for n in range(2):
                await store.append([envelope(n)])
            with beside(postgresql_url) as slow, beside(postgresql_url, autocommit=True) as killer:
                slow.execute("select head from trilogue_head for update")
                append = asyncio.create_task(store.append([envelope(2, id="one")]))
                await waits_for_a_lock(killer, append)
                for pid in backends(killer, "write"):
                    killer.execute("select pg_terminate_backend(%s, 10000)", (pid,))
                with pytest.raises(OutcomeUnknown, match="repeating it with the same id is harmless"):
                    await append
            assert await store.append([envelope(2, id="one")]) == [3]

    run(main())


def test_a_connection_that_was_lost_while_nothing_happened_costs_nobody_an_error(postgresql_url: str) -> None:
    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open()
            for n in range(3):
                await store.append([envelope(n)])
            with beside(postgresql_url, autocommit=True) as killer:
                for pid in backends(killer, "write"):
                    killer.execute("select pg_terminate_backend(%s, 10000)", (pid,))
            assert await store.append([envelope(3)]) == [4]

    run(main())


def test_an_effect_after_one_that_took_too_long_is_limited_too(postgresql_url: str) -> None:
    """The server forgets a limit that it was told inside a savepoint that is undone."""

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open(group(has_effects=True))
            await store.append([envelope(n, f"k{n}") for n in range(2)])
            out = await take(store, "readers", 2)
            answers = [effect(each, lambda db: db.execute("select pg_sleep(20)"), limit_us=100_000) for each in out]
            await store.settle("readers", answers)
            assert ["longer than the db limit" in each.settlements[0].error for each in answers] == [True, True]

    run(main())


def test_what_the_server_was_told_for_an_effect_does_not_limit_ours(postgresql_url: str) -> None:
    """One effect that is kept and one that is undone: our own statements after them have their own limit again."""

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open(group(has_effects=True))
            await store.append([envelope(n, f"k{n}") for n in range(2)])
            out = await take(store, "readers", 2)
            limits: list[str] = []

            def look(db: Any) -> None:
                limits.extend(db.execute("show statement_timeout")[0])

            def fail(db: Any) -> None:
                db.execute("select 1")
                raise ZeroDivisionError

            with beside(postgresql_url, autocommit=True) as other:
                other.execute("create table told (is_ours text)")
                other.execute(
                    "create function tell() returns trigger language plpgsql as $$ begin "
                    "insert into told values (current_setting('statement_timeout')); return null; end $$"
                )
                other.execute("create trigger t after update on trilogue_slots for each statement execute function tell()")
            await store.settle("readers", [effect(out[0], look, limit_us=5_000_000), effect(out[1], fail, limit_us=5_000_000)])
            assert limits == ["5s"]
            assert await store.query("select distinct is_ours from told") == [("30s",)]

    run(main())


def test_savepoints_that_wait_are_not_lost_with_an_error(postgresql_url: str) -> None:
    """Many changes in one transaction, some of which fail at once, some later: each fails alone."""

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open()
            await store.transact(lambda tx: tx.execute("create table kept (n integer primary key)"))

            def change(n: int) -> Any:
                def work(tx: Any) -> None:
                    if n % 4 == 1:
                        raise ZeroDivisionError
                    tx.execute("insert into kept values (?)", (n,))
                    if n % 4 == 2:
                        tx.execute("insert into kept values (?)", (n,))
                    if n % 4 == 3:
                        raise ZeroDivisionError

                return work

            outcomes = await asyncio.gather(*(store.transact(change(n), rows=1) for n in range(40)), return_exceptions=True)
            assert [n for n, outcome in enumerate(outcomes) if outcome is None] == list(range(0, 40, 4))
            assert [n for (n,) in await store.query("select n from kept order by n")] == list(range(0, 40, 4))
            assert isinstance(outcomes[2], psycopg.errors.UniqueViolation)

    run(main())
