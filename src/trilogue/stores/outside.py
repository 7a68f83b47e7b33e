"""Publishing inside the user's own transaction: an envelope is put down as a timer due at once, by the user's connection.

the user's transaction   insert …; insert into trilogue_timers …; commit      rolled back: nothing was published
a worker                 fires it: position, the log                          only now the counter row is locked

So a transaction of the user's that takes long holds up nobody. Understood are a Session, AsyncSession or connection of
SQLAlchemy, a connection of psycopg, sync or async, and one of asyncpg; none of them is imported unless the user has done so.
"""

import inspect
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from trilogue.errors import BadOption, Conflict
from trilogue.events import Envelope
from trilogue.urls import redacted

_ACCEPTED = (
    "expected a Session, AsyncSession, Connection or AsyncConnection of SQLAlchemy, a Connection or AsyncConnection of psycopg, "
    "or a Connection of asyncpg"
)
_PUT = """
insert into {schema}.trilogue_timers (id, due_us, envelope)
select cast(:id as text), cast(:due as bigint), cast(:envelope as bytea)
where not exists (select 1 from {schema}.trilogue_records where id = cast(:id as text))
on conflict (id) do nothing returning id"""
_THERE = """
select t.name, r.key, r.data, null from {schema}.trilogue_records r join {schema}.trilogue_types t on t.id = r.type
where r.id = cast(:id as text) and r.stream is null
union all select null, null, null, envelope from {schema}.trilogue_timers where id = cast(:id as text)"""
_NAMES = re.compile(r":(\w+)")
Execute = Callable[[str, dict[str, Any]], Awaitable[Sequence[Any]]]


async def put(tx: object, url: str, schema: str, envelopes: Sequence[Envelope], due_us: int) -> None:
    """Put envelopes down in the user's transaction, in this order. schema: quoted, where our tables are. due_us: 0: at once.

    Raises BadOption for what is no such connection, has no transaction or is one to another database; Conflict for an id that is
    there with other content.
    """
    execute = _executing(tx)
    for envelope in envelopes:
        values = {"id": envelope.id, "due": due_us, "envelope": msgspec.json.encode(envelope)}
        try:
            rows = await execute(_PUT.format(schema=schema), values)
            there = [] if rows else await execute(_THERE.format(schema=schema), {"id": envelope.id})
        except Exception as error:
            if _sqlstate(error) not in ("42P01", "3F000"):
                raise
            raise BadOption(
                f"tx= is a connection to another database than {redacted(url)}: there are no tables of trilogue"
            ) from error
        if not rows and not any(_is_same(row, envelope) for row in there):
            raise Conflict(f"id {envelope.id!r} is stored with other content: give a different event an id of its own")


def _is_same(row: Any, envelope: Envelope) -> bool:
    name, key, data, waiting = row
    if waiting is not None:
        other = msgspec.json.decode(bytes(waiting), type=Envelope)
        name, key, data = other.type, other.key, other.data
    return (name, key, bytes(data)) == (envelope.type, envelope.key, envelope.data)


def _sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE of whatever driver's error."""
    error = getattr(error, "orig", None) or error
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


def _executing(tx: object) -> Execute:
    """How a statement with :names is run on whatever the user gave us."""
    for kind in type(tx).__mro__:
        match kind.__module__.partition(".")[0]:
            case "sqlalchemy" if hasattr(tx, "execute"):
                return _on_sqlalchemy(tx)
            case "psycopg" if hasattr(tx, "pgconn"):
                return _on_psycopg(tx)
            case "asyncpg" if hasattr(tx, "is_in_transaction"):
                return _on_asyncpg(tx)
    raise BadOption(f"tx={tx!r} is no transaction to publish in: {_ACCEPTED}")


def _on_sqlalchemy(tx: Any) -> Execute:
    from sqlalchemy import text

    dialect = (tx.get_bind() if hasattr(tx, "get_bind") else tx).dialect.name
    if dialect != "postgresql":
        raise BadOption(f"tx= is a connection to {dialect}: expected one to the PostgreSQL database of this log")

    async def execute(sql: str, values: dict[str, Any]) -> Sequence[Any]:
        found = tx.execute(text(sql), values)
        result = await found if inspect.isawaitable(found) else found
        rows: Sequence[Any] = result.all()
        return rows

    return execute


def _on_psycopg(tx: Any) -> Execute:
    if tx.autocommit and tx.info.transaction_status == 0:
        raise BadOption("tx= has no transaction: open one with `with tx.transaction():`")

    async def execute(sql: str, values: dict[str, Any]) -> Sequence[Any]:
        found = tx.execute(_NAMES.sub(r"%(\1)s", sql), values)
        cursor = await found if inspect.isawaitable(found) else found
        rows = cursor.fetchall()
        every: Sequence[Any] = await rows if inspect.isawaitable(rows) else rows
        return [tuple(row.values()) if isinstance(row, dict) else row for row in every]

    return execute


def _on_asyncpg(tx: Any) -> Execute:
    if not tx.is_in_transaction():
        raise BadOption(
            "tx= has no transaction, what is written is committed at once: open one with `async with tx.transaction():`"
        )

    async def execute(sql: str, values: dict[str, Any]) -> Sequence[Any]:
        names = [name for name in values if f":{name}" in sql]
        numbered = _NAMES.sub(lambda found: f"${names.index(found[1]) + 1}", sql)
        rows: Sequence[Any] = await tx.fetch(numbered, *(values[name] for name in names))
        return [tuple(row) for row in rows]

    return execute
