"""psycopg by itself doing the same durable work: the same columns and indexes as ours, COPY for a thousand rows, one connection.

The server's own settings on every side; what the very connection says of them is printed.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psycopg
from psycopg import sql

from trilogue.bench.events import Counted, Watched, sample
from trilogue.bench.measured import Durability, Measured, check_stored
from trilogue.bench.place import Place
from trilogue.bench.store_figures import LOADS, PER_SAVE, TEXT, Deposited, spread
from trilogue.events import new_id, now_us
from trilogue.stores.log import slot_of

SIDE = "raw psycopg"
PAGE = 1_000
READ_BACK = ("fsync", "synchronous_commit", "full_page_writes", "server_version")
_COLUMNS = "slot, type, id, key, time_us, recorded_us, data"
_TABLES = """
create table records (
  position bigint generated always as identity primary key, slot smallint not null, type integer not null, id text not null,
  key text, time_us bigint not null, recorded_us bigint not null, stream text, version bigint, correlation text, causation text,
  more bytea, data bytea not null
);
create unique index on records (id);
create unique index on records (stream, version) where stream is not null;
create table events (
  position bigint generated always as identity primary key, stream text not null, version bigint not null, type text not null,
  time_us bigint not null, data bytea not null, unique (stream, version)
);
create table balances (account text primary key, cents bigint not null);
create table progress (position bigint not null);
insert into progress values (0);
"""
_INSERT = f"insert into records ({_COLUMNS}) values (%s, %s, %s, %s, %s, %s, %s)"
_COPY = f"copy records ({_COLUMNS}) from stdin (format binary)"
_TYPES = ("int2", "int4", "text", "text", "int8", "int8", "bytea")
_SELECT = "select position, key, data from records where position > %s order by position limit 1000"
_SAVE = "insert into events (stream, version, type, time_us, data) values (%s, %s, 'bench.deposited', %s, %s)"
_UPSERT = "insert into balances values (%s, %s) on conflict (account) do update set cents = balances.cents + excluded.cents"
_ENCODE = msgspec.json.Encoder().encode
_DECODE = msgspec.json.Decoder(Watched).decode
_DECODE_DEPOSITED = msgspec.json.Decoder(Deposited).decode


@contextmanager
def _connected(at: Place) -> Iterator[psycopg.Connection]:
    """A connection whose tables are in this place's schema; a statement by itself is a transaction."""
    with psycopg.connect(at.server, autocommit=True, options=f"-c search_path={at.name}") as connection:
        yield connection


@contextmanager
def _created(at: Place) -> Iterator[psycopg.Connection]:
    create_schema(at)
    with _connected(at) as connection:
        connection.execute(_TABLES)
        yield connection


def create_schema(at: Place) -> None:
    """The place itself, empty."""
    with psycopg.connect(at.server, autocommit=True) as connection:
        connection.execute(sql.SQL("create schema if not exists {}").format(sql.Identifier(at.name)))


def drop(server: str, schema: str) -> None:
    """Remove a place and everything in it."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("set client_min_messages = warning")
        connection.execute(sql.SQL("drop schema if exists {} cascade").format(sql.Identifier(schema)))


def durability_of(connection: psycopg.Connection) -> Durability:
    """What decides whether a commit waits for the disk, as this connection sees it."""
    return {name: _one(connection, f"show {name}") for name in READ_BACK}


def _one(connection: psycopg.Connection, query: str) -> Any:
    row = connection.execute(query.encode()).fetchone()
    return row and row[0]


def _row(e: Watched | Counted) -> tuple[object, ...]:
    """What any program has to do for a durable event: an id, a slot, the time, the encoding."""
    at_us = now_us()
    return (slot_of(e.user), 1, new_id(), e.user, at_us, at_us, _ENCODE(e))


def publish_one(at: Place, events: int) -> Measured:
    """One transaction per event."""
    batch = [sample(n) for n in range(events)]
    with _created(at) as connection:
        began = time.perf_counter()
        for e in batch:
            connection.execute(_INSERT, _row(e))
        return _measured(connection, events / (time.perf_counter() - began), "records", events)


def publish_many(at: Place, events: int) -> Measured:
    """One COPY and one transaction per 1,000 events."""
    batch = [sample(n) for n in range(events)]
    with _created(at) as connection:
        began = time.perf_counter()
        _copy_all(connection, batch)
        return _measured(connection, events / (time.perf_counter() - began), "records", events)


def _copy_all(connection: psycopg.Connection, events: Sequence[Watched | Counted]) -> None:
    for start in range(0, len(events), PAGE):
        with connection.transaction():
            _copy(connection, (_row(e) for e in events[start : start + PAGE]))


def _copy(connection: psycopg.Connection, rows: Iterable[tuple[object, ...]]) -> None:
    with connection.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.set_types(_TYPES)
        for row in rows:
            copy.write_row(row)


def consume_ordered(at: Place, events: int) -> Measured:
    """Read by 1,000, decode, remember the position."""
    return _consume(at, events, emit=False)


def consume_emit(at: Place, events: int) -> Measured:
    """Read by 1,000, decode, copy in a row for each and remember the position in one transaction."""
    return _consume(at, events, emit=True)


def _consume(at: Place, events: int, *, emit: bool) -> Measured:
    with _created(at) as connection:
        _copy_all(connection, [sample(n) for n in range(events)])
        position = handled = 0
        began = time.perf_counter()
        while handled < events:
            rows = connection.execute(_SELECT, (position,)).fetchall()
            decoded = [_DECODE(data) for _, _, data in rows]
            with connection.transaction():
                if emit:
                    _copy(connection, (_row(Counted(e.user, e.position_s)) for e in decoded))
                position, handled = rows[-1][0], handled + len(rows)
                connection.execute("update progress set position = %s", (position,))
        return _measured(connection, events / (time.perf_counter() - began), "records", events * 2 if emit else events)


def latency(at: Place, events: int) -> list[float]:
    """Seconds for a commit and for reading it on a second connection; a second commit, as a settlement, in between."""
    took = []
    with _created(at) as connection, _connected(at) as reader:
        for n in range(events):
            began = time.perf_counter()
            connection.execute(_INSERT, _row(sample(n)))
            [row] = reader.execute(_SELECT, (n,)).fetchall()
            _DECODE(row[2])
            took.append(time.perf_counter() - began)
            connection.execute("update progress set position = %s", (n + 1,))
    return sorted(took)


def save_one(at: Place, events: int) -> Measured:
    """One event per transaction."""
    return _saves(at, events, 1)


def save_100(at: Place, events: int) -> Measured:
    """100 events per transaction."""
    return _saves(at, events, PER_SAVE)


def _saves(at: Place, events: int, per_save: int) -> Measured:
    saves = events // per_save
    with _created(at) as connection:
        began = time.perf_counter()
        for save in range(saves):
            _save(connection, [_deposit("1", save * per_save + n + 1, n) for n in range(per_save)])
        return _measured(connection, saves * per_save / (time.perf_counter() - began), "events", saves * per_save)


def _deposit(account: str, version: int, cents: int) -> tuple[object, ...]:
    return ("account-" + account, version, now_us(), _ENCODE(Deposited(account, cents, TEXT)))


def _save(connection: psycopg.Connection, rows: Sequence[tuple[object, ...]]) -> None:
    if len(rows) == 1:
        connection.execute(_SAVE, rows[0])
        return
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(_SAVE, rows)


def rehydrate(at: Place, events: int) -> Measured:
    """Read one stream, decode, add up."""
    with _created(at) as connection:
        _save(connection, [_deposit("1", n + 1, n % PAGE) for n in range(events)])
        began = time.perf_counter()
        for _ in range(LOADS):
            rows = connection.execute("select data from events where stream = %s order by version", ("account-1",)).fetchall()
            balance = sum(_DECODE_DEPOSITED(data).cents for (data,) in rows)
        rate = LOADS * events / (time.perf_counter() - began)
        check_stored(SIDE, balance, sum(n % PAGE for n in range(events)))
        return _measured(connection, rate, "events", events)


def project(at: Place, events: int) -> Measured:
    """Read all events by 1,000, decode, upsert the balances and remember the position in one transaction."""
    accounts, each = spread(events)
    with _created(at) as connection:
        for version in range(1, each + 1):
            _save(connection, [_deposit(str(n), version, 1) for n in range(accounts)])
        began, position = time.perf_counter(), 0
        while rows := connection.execute(
            "select position, data from events where position > %s order by 1 limit 1000", (position,)
        ).fetchall():
            decoded, position = [_DECODE_DEPOSITED(data) for _, data in rows], rows[-1][0]
            with connection.transaction(), connection.cursor() as cursor:
                cursor.executemany(_UPSERT, [(e.account, e.cents) for e in decoded])
                cursor.execute("update progress set position = %s", (position,))
        rate = accounts * each / (time.perf_counter() - began)
        check_stored(SIDE, int(_one(connection, "select sum(cents) from balances")), accounts * each)
        return _measured(connection, rate, "events", accounts * each)


def _measured(connection: psycopg.Connection, rate: float, table: str, stored: int) -> Measured:
    check_stored(SIDE, _one(connection, f"select count(*) from {table}"), stored)
    return Measured(rate, durability_of(connection))


def database_of(at: Place) -> dict[str, str]:
    """The server's address as separate words, for a library that takes no URL."""
    parts = urlsplit(at.server)
    words = {"HOST": parts.hostname, "PORT": parts.port, "USER": parts.username, "PASSWORD": parts.password}
    return {name: str(word) for name, word in words.items() if word is not None} | {"DBNAME": parts.path.strip("/")}


def versions(at: Place) -> dict[str, str]:
    """Of the server."""
    with psycopg.connect(at.server) as connection:
        return {"postgresql": str(_one(connection, "show server_version"))}
