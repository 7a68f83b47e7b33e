"""Raw apsw doing the same durable work, without anything of trilogue: same columns, same indexes, same pragmas."""

import time
from importlib import resources
from typing import Any

import apsw
import msgspec

from trilogue.bench.events import Counted, Watched, sample
from trilogue.bench.measured import Measured
from trilogue.bench.place import Place
from trilogue.events import new_id, now_us
from trilogue.stores.log import COLUMNS, slot_of

SIDE = "raw apsw"
_INSERT = f"insert into trilogue_records ({COLUMNS}) values (?,?,?,?,?,?,?,?,?,?,?,?,?)"
_SELECT = "select position, key, data from trilogue_records where position > ? order by position limit 1000"
BATCH = 1_000
_ENCODE = msgspec.json.Encoder().encode


def _connect(at: Place) -> apsw.Connection:
    connection = apsw.Connection(f"{at.folder}/raw-{time.monotonic_ns()}.db")
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", 2)
    connection.wal_autocheckpoint(4_000)
    for _ in connection.execute(resources.files("trilogue.stores").joinpath("schema/1.sql").read_text()):
        pass
    connection.execute("create table progress (position integer)")
    connection.execute("insert into progress values (0)")
    return connection


def _row(position: int, e: Watched | Counted) -> tuple[object, ...]:
    """What any program has to do for a durable event: an id, a slot, the time, the encoding."""
    at_us = now_us()
    return (position, slot_of(e.user), 1, new_id(), e.user, at_us, at_us, None, None, None, None, None, _ENCODE(e))


def publish_one(at: Place, events: int) -> Measured:
    """One transaction per event."""
    connection = _connect(at)
    batch = [sample(n) for n in range(events)]
    began = time.perf_counter()
    for n, e in enumerate(batch, 1):
        connection.execute("begin immediate")
        connection.execute(_INSERT, _row(n, e))
        connection.execute("commit")
    return Measured(events / (time.perf_counter() - began))


def publish_many(at: Place, events: int) -> Measured:
    """One transaction per 1,000 events."""
    connection = _connect(at)
    batch = [sample(n) for n in range(events)]
    began = time.perf_counter()
    _insert_all(connection, batch)
    return Measured(events / (time.perf_counter() - began))


def _insert_all(connection: apsw.Connection, events: list[Watched]) -> None:
    for start in range(0, len(events), BATCH):
        rows = [_row(n, e) for n, e in enumerate(events[start : start + BATCH], start + 1)]
        connection.execute("begin immediate")
        connection.executemany(_INSERT, rows)
        connection.execute("commit")


def consume_ordered(at: Place, events: int) -> Measured:
    """Read by 1,000, decode, remember the position."""
    return _consume(at, events, emit=False)


def consume_emit(at: Place, events: int) -> Measured:
    """Read by 1,000, decode, insert a row for each and remember the position in one transaction."""
    return _consume(at, events, emit=True)


def _consume(at: Place, events: int, *, emit: bool) -> Measured:
    connection = _connect(at)
    _insert_all(connection, [sample(n) for n in range(events)])
    decoder = msgspec.json.Decoder(Watched)
    position = 0
    began = time.perf_counter()
    while position < events:
        rows: list[Any] = connection.execute(_SELECT, (position,)).fetchall()
        decoded = [decoder.decode(data) for _, _, data in rows]
        connection.execute("begin immediate")
        if emit:
            emitted = [_row(events + position + n, Counted(e.user, e.position_s)) for n, e in enumerate(decoded, 1)]
            connection.executemany(_INSERT, emitted)
        position = rows[-1][0]
        connection.execute("update progress set position = ?", (position,))
        connection.execute("commit")
    return Measured(events / (time.perf_counter() - began))


def latency(at: Place, events: int) -> list[float]:
    """Seconds for a commit and for reading it on a second connection; a second commit, as a settlement, in between."""
    connection = _connect(at)
    reader = apsw.Connection(connection.filename)
    took = []
    for n in range(events):
        e = sample(n)
        began = time.perf_counter()
        connection.execute("begin immediate")
        connection.execute(_INSERT, _row(n + 1, e))
        connection.execute("commit")
        reader.execute(_SELECT, (n,)).fetchall()
        took.append(time.perf_counter() - began)
        connection.execute("update progress set position = ?", (n,))
    return sorted(took)
