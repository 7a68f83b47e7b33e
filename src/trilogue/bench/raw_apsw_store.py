"""Raw apsw doing the same durable work with the least that an event store needs.

events      position | stream, version (unique) | type | time_us | data
balances    account | cents                                               the read model, with how far it has got
"""

import time
from collections.abc import Iterable
from typing import Any

import apsw
import msgspec

from trilogue.bench.measured import CHECKPOINT_PAGES, Measured, check_stored, pragmas_of
from trilogue.bench.place import Place
from trilogue.bench.store_figures import FILL, LOADS, PER_SAVE, TEXT, Deposited, spread, warm_up
from trilogue.events import now_us

SIDE = "raw apsw"
_TABLES = """
create table events (
  position integer primary key, stream text not null, version integer not null, type text not null,
  time_us integer not null, data blob not null, unique (stream, version)
);
create table balances (account text primary key, cents integer not null);
create table progress (position integer not null);
insert into progress values (0);
"""
_INSERT = "insert into events (stream, version, type, time_us, data) values (?, ?, 'bench.deposited', ?, ?)"
_UPSERT = "insert into balances values (?, ?) on conflict (account) do update set cents = cents + excluded.cents"
_ENCODE = msgspec.json.Encoder().encode
_DECODE = msgspec.json.Decoder(Deposited).decode
PAGE = 1_000


def _connect(path: str) -> apsw.Connection:
    connection = apsw.Connection(path)
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", 2)
    connection.wal_autocheckpoint(CHECKPOINT_PAGES)
    return connection


def _created(at: Place) -> apsw.Connection:
    connection = _connect(f"{at.folder}/raw-{time.monotonic_ns()}.db")
    for _ in connection.execute(_TABLES):
        pass
    return connection


def _row(account: str, version: int, cents: int) -> tuple[object, ...]:
    """What any program has to do for a durable event: the time, the encoding."""
    return ("account-" + account, version, now_us(), _ENCODE(Deposited(account, cents, TEXT)))


def _save(connection: apsw.Connection, rows: Iterable[tuple[object, ...]]) -> None:
    connection.execute("begin immediate")
    connection.executemany(_INSERT, rows)
    connection.execute("commit")


def save_one(at: Place, events: int) -> Measured:
    """One event per transaction."""
    return _saves(at, events, 1)


def save_100(at: Place, events: int) -> Measured:
    """100 events per transaction."""
    return _saves(at, events, PER_SAVE)


def _saves(at: Place, events: int, per_save: int) -> Measured:
    connection = _created(at)
    saves, warm = events // per_save, warm_up(events, per_save)
    began = time.perf_counter()
    for save in range(warm + saves):
        if save == warm:
            began = time.perf_counter()
        _save(connection, [_row("1", save * per_save + n + 1, n) for n in range(per_save)])
    rate = saves * per_save / (time.perf_counter() - began)
    return _measured(connection, rate, (warm + saves) * per_save)


def rehydrate(at: Place, events: int) -> Measured:
    """Read one stream, decode, add up."""
    connection = _created(at)
    _save(connection, [_row("1", n + 1, n % PAGE) for n in range(events)])
    connection = _connect(connection.filename)
    began = time.perf_counter()
    for _ in range(LOADS):
        rows = connection.execute("select version, data from events where stream = ? order by version", ("account-1",))
        balance = sum(_DECODE(data).cents for _, data in rows)
    rate = LOADS * events / (time.perf_counter() - began)
    check_stored(SIDE, balance, sum(n % PAGE for n in range(events)))
    return _measured(connection, rate, events)


def project(at: Place, events: int) -> Measured:
    """Read all events by 1,000, decode, upsert the balances and remember the position in one transaction."""
    connection = _created(at)
    accounts, each = spread(events)
    _fill(connection, accounts, each)
    connection = _connect(connection.filename)
    began = time.perf_counter()
    position = 0
    while rows := _page(connection, position):
        events_read = [_DECODE(data) for _, data in rows]
        position = rows[-1][0]
        connection.execute("begin immediate")
        connection.executemany(_UPSERT, [(e.account, e.cents) for e in events_read])
        connection.execute("update progress set position = ?", (position,))
        connection.execute("commit")
    rate = accounts * each / (time.perf_counter() - began)
    check_stored(SIDE, int(_one(connection, "select sum(cents) from balances")), accounts * each)
    return _measured(connection, rate, accounts * each)


def _page(connection: apsw.Connection, position: int) -> list[Any]:
    query = "select position, data from events where position > ? and type = 'bench.deposited' order by position limit ?"
    return connection.execute(query, (position, PAGE)).fetchall()


def _fill(connection: apsw.Connection, accounts: int, each: int) -> None:
    for start in range(0, each, FILL):
        versions = range(start + 1, min(start + FILL, each) + 1)
        _save(connection, [_row(str(n), version, 1) for n in range(accounts) for version in versions])


def _one(connection: apsw.Connection, query: str) -> Any:
    return connection.execute(query).fetchall()[0][0]


def _measured(connection: apsw.Connection, rate: float, stored: int) -> Measured:
    check_stored(SIDE, int(_one(connection, "select count(*) from events")), stored)
    return Measured(rate, pragmas_of(connection.pragma, apsw.sqlite_lib_version()))
