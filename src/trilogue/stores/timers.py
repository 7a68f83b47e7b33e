"""Delayed events: envelopes that enter the log when due. Several processes may fire; the write lock lets one at a time."""

from collections.abc import Sequence

import msgspec

from trilogue.errors import Conflict
from trilogue.events import Envelope
from trilogue.ports import Scheduled
from trilogue.stores.append import emit, same_or_conflict
from trilogue.stores.dialect import Sql
from trilogue.stores.log import COLUMNS, Types

FIRE_TIMERS = 1_000


def schedule(sql: Sql, types: Types, envelopes: Sequence[Envelope], due_us: int, *, name: str | None = None) -> None:
    """Keep envelopes until due; what is scheduled or on the log already is left alone, with other content it is a Conflict."""
    for envelope in envelopes:
        there = sql.rows(f"select {COLUMNS} from trilogue_records where id = ?", (envelope.id,))
        if there:
            same_or_conflict(sql, types, there[0], envelope, None)
            continue
        encoded = msgspec.json.encode(envelope)
        insert = "insert into trilogue_timers (id, due_us, envelope, name) values (?, ?, ?, ?) on conflict do nothing"
        if not sql.many(insert, [(envelope.id, due_us, encoded, name)]):
            timer = sql.rows("select envelope from trilogue_timers where id = ?", (envelope.id,))[0][0]
            scheduled = msgspec.json.decode(timer, type=Envelope)
            if (scheduled.type, scheduled.key, scheduled.data) != (envelope.type, envelope.key, envelope.data):
                raise Conflict(f"id {envelope.id!r} is scheduled with other content: give a different event an id of its own")


def cancel_named(sql: Sql, name: str) -> bool:
    """Remove a timer by its name; False if it has fired or never was."""
    return bool(sql.many("delete from trilogue_timers where name = ?", [(name,)]))


def listed(sql: Sql, *, after: str, limit: int) -> list[Scheduled]:
    """Timers by the id of their envelope."""
    rows = sql.rows("select envelope, due_us, name from trilogue_timers where id > ? order by id limit ?", (after, limit))
    return [Scheduled(msgspec.json.decode(envelope, type=Envelope), due_us, name) for envelope, due_us, name in rows]


def fire(sql: Sql, types: Types, now_us: int) -> int:
    """Move due timers onto the log; returns how many."""
    types.end(sql)  # before the look: what one process has fired another one must not fire after what follows
    due = f"select id, envelope from trilogue_timers where due_us <= ? order by {sql.dialect.timers} limit ?"
    rows = sql.rows(due + sql.dialect.for_update, (now_us, FIRE_TIMERS))
    if rows:
        emit(sql, types, [msgspec.json.decode(envelope, type=Envelope) for _, envelope in rows], now_us)
        sql.many("delete from trilogue_timers where id = ?", [(id_,) for id_, _ in rows])
    return len(rows)


def next_us(sql: Sql) -> int | None:
    """When the next timer is due."""
    due: int | None = sql.rows("select min(due_us) from trilogue_timers")[0][0]
    return due
