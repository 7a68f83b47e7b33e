"""The schema on a PostgreSQL server: made, brought up while others work, described.

trilogue_meta    version          schema/postgresql/1.sql …   each script adds, none takes away: programs that know less go on
"""

from importlib import resources
from typing import Any

import psycopg
from psycopg import errors

from trilogue.errors import Unavailable, Unsupported
from trilogue.events import Durability
from trilogue.stores.dialect import Sql
from trilogue.stores.postgresql import Connection, Server, connect
from trilogue.stores.postgresql_sql import quoted

SCHEMA_VERSION = 1
LOCK_S = 5
OLDEST_SERVER = 130_000
_LOCK = 0x7472696C6F67  # "trilog"


def prepare(server: Server) -> tuple[int, int]:
    """Create the schema, or bring an older one up; returns its version before and now. Raises Unavailable, psycopg errors.

    Two that do so at once do it once. While it waits for a lock longer than some seconds, it gives up rather than let everybody
    wait behind it.
    """
    with connect(server, "migrate", limit_s=None) as connection:
        if connection.info.server_version < OLDEST_SERVER:
            raise Unsupported(f"{server.url} is PostgreSQL {connection.info.server_version // 10_000}: expected 13 or newer")
        if connection.execute("select pg_is_in_recovery()").fetchall() == [(True,)]:
            raise Unavailable(f"{server.url} can only be read: it is a standby; name the primary, or several hosts")
        version = _version(connection, server)
        if version == SCHEMA_VERSION:
            return version, version
        try:
            return _bring_up(connection, server)
        except errors.InsufficientPrivilege as error:
            raise Unavailable(
                f"{server.url} has schema {version} and this user may not bring it to {SCHEMA_VERSION} "
                f"({error.diag.message_primary}): run `trilogue migrate --url …` as one who may create tables there"
            ) from error
        except errors.LockNotAvailable as error:
            raise Unavailable(
                f"{server.url} could not be brought to schema {SCHEMA_VERSION}: another transaction has kept its tables for over "
                f"{LOCK_S} s; try again when it has ended"
            ) from error


def is_there(server: Server) -> bool:
    """Whether our tables are there, of whichever version; nothing is made. Raises Unavailable, psycopg errors."""
    with connect(server, "look") as connection:
        return _version(connection, server) > 0


def place(server: Server) -> str:
    """The schema in which our tables are, quoted."""
    if server.schema is not None:
        return quoted(server.schema)
    with connect(server, "open") as connection:
        found = "select relnamespace::regnamespace::text from pg_class where oid = 'trilogue_head'::regclass"
        return str(connection.execute(found.encode()).fetchall()[0][0])


def _bring_up(connection: Connection, server: Server) -> tuple[int, int]:
    with connection.transaction():
        connection.execute(f"set local lock_timeout = '{LOCK_S}s'".encode())
        connection.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
        if server.schema is not None:
            connection.execute(f"create schema if not exists {quoted(server.schema)}".encode())
            connection.execute(f"set local search_path = {quoted(server.schema)}".encode())
        version = _version(connection, server)  # another process may have done it
        for step in range(version + 1, SCHEMA_VERSION + 1):
            script = resources.files("trilogue.stores").joinpath(f"schema/postgresql/{step}.sql").read_text()
            connection.execute(script.encode(), prepare=False)
        connection.execute("update trilogue_meta set version = %s", (SCHEMA_VERSION,))
    return version, SCHEMA_VERSION


def _version(connection: Connection, server: Server) -> int:
    """The version of the schema, 0 if there is none; raises Unavailable if it is newer than what is known here."""
    table = "trilogue_meta" if server.schema is None else f"{quoted(server.schema)}.trilogue_meta"
    if connection.execute("select to_regclass(%s)", (table,)).fetchall() == [(None,)]:
        return 0
    version: int = connection.execute(f"select version from {table}".encode()).fetchall()[0][0]
    if version > SCHEMA_VERSION:
        raise Unavailable(
            f"{server.url} has schema {version}, newer than this trilogue, which knows {SCHEMA_VERSION}: upgrade trilogue"
        )
    return version


# ── what a commit survives ───────────────────────────────────────────────────────────────────────────────────────────


def durability(connection: psycopg.Connection[Any], url: str) -> Durability:
    """What a commit survives, as the server is set."""
    said = {name: str(connection.execute(f"show {name}".encode()).fetchall()[0][0]) for name in _SETTINGS}
    return _survives(said)


_SETTINGS = ("fsync", "full_page_writes", "synchronous_commit", "synchronous_standby_names")


def _survives(said: dict[str, str]) -> Durability:
    if said["synchronous_commit"] == "off" or said["fsync"] == "off":
        return "process-crash"
    has_standby = said["synchronous_standby_names"] != "" and said["synchronous_commit"] != "local"
    return "replicated" if has_standby else "os-crash"


def described(sql: Sql, survives: Durability) -> dict[str, str]:
    """What kind of database this is, and what its durability rests on."""
    said = {name: str(sql.rows(f"show {name}")[0][0]) for name in (*_SETTINGS, "wal_level", "server_version")}
    size = sql.rows(sql.dialect.bytes)[0][0]
    return {
        "database": f"PostgreSQL {said['server_version']}",
        "schema": f"{sql.rows('select version from trilogue_meta')[0][0]}",
        "durability": f"{survives}: " + ", ".join(f"{name} {said[name] or '(none)'}" for name in (*_SETTINGS, "wal_level")),
        "size": f"{size >> 10} KiB",
    }


def vacuum(connection: Connection, server: Server) -> bool:
    """Give free what was deleted from our tables; rows that a running transaction may still see stay until the next time."""
    tables = connection.execute(
        "select c.oid::regclass::text from pg_class c where c.relkind = 'r' and starts_with(c.relname, 'trilogue_') "
        "and c.relnamespace = (select relnamespace from pg_class where oid = to_regclass(%s))",
        ("trilogue_head" if server.schema is None else f"{quoted(server.schema)}.trilogue_head",),
    ).fetchall()
    for (table,) in tables:
        connection.execute(f"vacuum {table}".encode(), prepare=False)
    return True
