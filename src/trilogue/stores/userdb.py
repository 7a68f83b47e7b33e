"""The user's SQL, in the store's file but without what would harm the store.

handler(e, db)  ──▶ UserDb       inside the settlement's savepoint: no transactions, no PRAGMA, not trilogue's tables
app.db(sql)     ──▶ read_only    one statement that only reads
"""

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import apsw

from trilogue.errors import BadOption
from trilogue.ports import Rows
from trilogue.stores.dialect import Sql

_FORBIDDEN = {
    "begin",
    "commit",
    "end",
    "rollback",
    "savepoint",
    "release",
    "attach",
    "detach",
    "pragma",
    "vacuum",
    "reindex",
    # of PostgreSQL
    "abort",
    "call",
    "copy",
    "deallocate",
    "discard",
    "do",
    "listen",
    "notify",
    "prepare",
    "reset",
    "set",
    "start",
    "unlisten",
}
_WRITES = {"insert", "update", "delete", "replace"}
_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)""", re.DOTALL)
_WORD = re.compile(r"\w+")
_VETTED = 1_000
ONLY_READS = "app.db() only reads: write in a handler with a `db` parameter, and make tables in a function under @app.setup"


class UserDb:
    """ports.Db over a connection: the user's SQL, without what would break the transaction it runs in."""

    def __init__(self, sql: Sql) -> None:
        self._user = sql
        self._vetted: set[str] = set()

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        if sql not in self._vetted:
            self._vet(sql)
        return self._user.rows(sql, values)

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]], /) -> None:
        """Run one statement once per row of values."""
        if sql not in self._vetted:
            self._vet(sql)
        self._user.many(sql, rows)

    def _vet(self, sql: str) -> None:
        check_statements(sql)
        if len(self._vetted) >= _VETTED:
            self._vetted.clear()
        self._vetted.add(sql)


def check_statements(sql: str) -> None:
    """Raise BadOption for SQL that would break the transaction it runs in, or write trilogue's own tables."""
    in_trigger = False
    for statement in _QUOTED.sub(_without, sql).lower().split(";"):
        words = _WORD.findall(statement)
        first = words[0] if words else ""
        if in_trigger and first == "end":
            in_trigger = False
            continue
        if first in _FORBIDDEN:
            raise BadOption(f"{first.upper()} is not allowed here: trilogue owns the transaction your SQL runs in")
        reads = first in ("select", "explain") or (first == "with" and not _WRITES.intersection(words))
        if "trilogue_" in statement and not reads:
            raise BadOption("tables named trilogue_… are written by trilogue alone: choose another name")
        in_trigger = in_trigger or (first == "create" and "trigger" in words[:3])


def _without(match: "re.Match[str]") -> str:
    """Comments and texts go, quoted names stay, without what could look like the end of a statement."""
    found = match[0]
    return " " if found[0] in "'-/" else found.replace(";", " ")


def read_only(connection: apsw.Connection, sql: str, values: Sequence[Any]) -> Rows:
    """The rows of one statement; raises BadOption if it does anything but read."""
    check_statements(sql)
    cursor = connection.cursor()
    cursor.exec_trace = lambda cursor, _sql, _values: cursor.is_readonly
    try:
        cursor.execute(sql, values)
        with contextlib.suppress(apsw.ExecutionCompleteError):  # without a row, apsw tells no names
            columns = tuple(name for name, _ in cursor.getdescription())
        rows = Rows(cursor.fetchall())
        rows.columns = columns if rows else ()
        return rows
    except apsw.ExecTraceAbort:
        raise BadOption(ONLY_READS) from None
