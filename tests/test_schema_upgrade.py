"""A file that an earlier release has written is opened: everything in it is there, and what is new works on it.

schema/1.sql and rows as 0.1.0 wrote them  ──open──▶  records, history, dead letters, timers, traces; streams, tags, states
"""

import asyncio
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path

import apsw
import msgspec
import pytest

from trilogue.conformance.tools import Bench, answer, drain, envelope, group, numbers
from trilogue.errors import Conflict, Unavailable
from trilogue.ports import Query, Store
from trilogue.stores import open_store
from trilogue.stores.log import slot_of
from trilogue.stores.sqlite import APPLICATION_ID, SCHEMA_VERSION

RECORDS = 20
NOTED = 12
AT_US = 1_700_000_000_000_000
READERS = group()


def _file_of_version_1(path: Path) -> None:
    """What 0.1.0 left: records 1 to 20, of which places are noted to 12; one group that has finished 15, one of them dead."""
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "wal")
    connection.execute(resources.files("trilogue.stores").joinpath("schema/1.sql").read_text())
    connection.pragma("application_id", APPLICATION_ID)
    connection.pragma("user_version", 1)
    connection.execute("insert into trilogue_types values (1, 'thing.made', 'shop', 1, ?)", (NOTED,))
    rows = [_row(n) for n in range(1, RECORDS + 1)]
    connection.executemany("insert into trilogue_records values (?,?,?,?,?,?,?,?,?,?,?,?,?)", rows)
    connection.executemany("insert into trilogue_places values (?, ?)", [(row[1], row[0]) for row in rows[:NOTED]])
    connection.execute("update trilogue_progress set placed = ?", (NOTED,))
    connection.execute("insert into trilogue_groups values (1, 'readers', '', '[\"#\"]', 1, 0, 0, 0, 0, ?)", (AT_US,))
    slots = [(1, slot, 15, 0, None, 0, 0, 0) for slot in range(64)]
    connection.executemany("insert into trilogue_slots values (?,?,?,?,?,?,?,?)", slots)
    connection.execute("insert into trilogue_held values (1, 7, ?, 'k1', 2, 0, 5, ?, 'boom', '')", (slot_of("k1"), AT_US))
    timer = b'{"id":"timer","type":"thing.made","data":"OTk=","key":null,"source":"shop","time_us":1}'
    connection.execute("insert into trilogue_timers values ('timer', ?, ?)", (AT_US * 2, timer))
    connection.close()


def _row(n: int) -> tuple[object, ...]:
    """Every fifth is of a stream, every third was caused by id-1, every fourth says more."""
    stream, version = ("orders-7", n // 5) if n % 5 == 0 else (None, None)
    more = msgspec.json.encode((f"subject {n}", None, {"who": "alice"})) if n % 4 == 0 else None
    root = "id-1" if n % 3 == 0 else None
    key = f"k{n % 2}"
    return n, slot_of(key), 1, f"id-{n}", key, AT_US, AT_US + n, stream, version, root, root, more, str(n).encode()


def on_the_old_file(tmp_path: Path, proof: Callable[[Bench], Awaitable[None]]) -> None:
    _file_of_version_1(tmp_path / "old.db")

    async def run() -> None:
        async with Bench(lambda: open_store(f"sqlite:///{tmp_path}/old.db?lease_s=0.5")) as bench:
            await proof(bench)

    asyncio.run(run())


async def data(store: Store, query: Query) -> list[int]:
    return [int(record.data) for record in await store.read(query)]


def test_everything_is_there(tmp_path: Path) -> None:
    async def proof(bench: Bench) -> None:
        store = await bench.open(READERS)
        everything = list(range(1, RECORDS + 1))
        assert await data(store, Query()) == everything
        assert await data(store, Query(key="k0")) == everything[1::2]
        assert await data(store, Query(stream="orders-7")) == [5, 10, 15, 20]
        assert await data(store, Query(correlation="id-1")) == [3, 6, 9, 12, 15, 18]
        assert await data(store, Query(correlation="id-1", reverse=True, limit=3)) == [18, 15, 12]
        eighth = (await store.read(Query(id="id-8")))[0]
        assert (eighth.subject, eighth.extensions, eighth.tags, eighth.source) == ("subject 8", {"who": "alice"}, (), "shop")
        assert [(letter.record.position, letter.error) for letter in await store.dead("readers")] == [(7, "boom")]
        assert [(timer.envelope.id, timer.due_us, timer.name) for timer in await store.timers()] == [("timer", AT_US * 2, None)]
        assert dict((await store.status()).types) == {"thing.made": RECORDS}
        assert numbers(await drain(store, "readers", 5)) == [16, 17, 18, 19, 20]

    on_the_old_file(tmp_path, proof)


def test_what_is_new_works_on_it(tmp_path: Path) -> None:
    async def proof(bench: Bench) -> None:
        store = await bench.open(READERS)
        with pytest.raises(Conflict) as told:
            await store.append([envelope(99)], expected=("orders-7", 3))
        assert (told.value.actual, told.value.by) == (4, "alice")
        tagged = msgspec.structs.replace(envelope(21), tags=("t:1",), correlation_id="id-1")
        await store.append([tagged], expected=("orders-7", 4))
        assert await data(store, Query(tags=("t:1",))) == [21]
        assert await data(store, Query(correlation="id-1")) == [3, 6, 9, 12, 15, 18, 21]
        await store.transact(lambda tx: tx.set_state("mine", "a", b"b"))
        await store.transact(lambda tx: tx.schedule(envelope(1), AT_US * 2, name="n"))
        assert await store.state("mine", "a") == b"b"
        assert {timer.name for timer in await store.timers()} == {None, "n"}
        await store.truncate_stream("orders-7", 3)
        assert await data(store, Query(stream="orders-7")) == [15, 20, 21]
        await answer(store, await store.claim("readers", limit=100, wait_s=1))
        await store.trim(keep=1)
        assert await data(store, Query()) == [7, 15, 20, 21]
        assert await data(store, Query(correlation="id-1")) == [15, 21]

    on_the_old_file(tmp_path, proof)


def test_it_is_upgraded_once(tmp_path: Path) -> None:
    async def proof(bench: Bench) -> None:
        for _ in range(2):
            store = await bench.open()
            assert await store.query("select user_version from pragma_user_version()") == [(SCHEMA_VERSION,)]
            assert await store.query("select count(*) from trilogue_traces") == [(4,)]  # of the noted ones; later ones follow
            await bench.close(store)

    on_the_old_file(tmp_path, proof)


def test_an_upgrade_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """It is one transaction: whoever then goes back to the old release finds what it knows."""
    _file_of_version_1(tmp_path / "old.db")
    connection = apsw.Connection(str(tmp_path / "old.db"))
    connection.execute("create table trilogue_traces (mine)")  # in the way of the second half
    connection.close()

    async def run() -> None:
        with pytest.raises((Unavailable, apsw.Error)):
            await open_store(f"sqlite:///{tmp_path}/old.db").open()

    asyncio.run(run())
    connection = apsw.Connection(str(tmp_path / "old.db"))
    tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    assert "trilogue_state" not in tables
    assert connection.pragma("user_version") == 1
    assert connection.execute("select count(*) from trilogue_records").get == RECORDS
    connection.close()
