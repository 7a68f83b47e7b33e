"""How PostgreSQL is spoken to: our SQL in the driver's words, and what goes to the server together.

`?`           becomes the driver's `%s`, and trilogue_x becomes "schema".trilogue_x where ?schema= is given, once per statement
savepoint …   waits for the statement that comes next and goes with it: a trip to the server less
the user's    has a limit, which the server is told when it is used first
"""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg import errors, pq
from psycopg.types.numeric import Int8BinaryDumper

from trilogue.errors import Rejected, TimedOut
from trilogue.stores import postgresql_append
from trilogue.stores.dialect import Dialect
from trilogue.stores.transaction import GONE, SWALLOWED

STATEMENT_S = 30.0
TOO_LONG = "its SQL took longer than the db limit: make it cheaper, or raise db_limit= of the handler"
UNKNOWN_US = -1
_SAVEPOINTS = ("savepoint ", "release ", "rollback to ")
_CONCERNS_OTHERS = re.compile(r"trilogue_append|insert into trilogue_timers|(?:update|insert into) trilogue_groups")
_PARTS = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]* | /\*.*?\*/ | \$(\w*)\$.*?\$\1\$ | \?\?? | % | \btrilogue_\w+""",
    re.DOTALL | re.VERBOSE,
)
_TRANSLATED = 2_000

_CLOCK = "select (extract(epoch from clock_timestamp()) * 1000000)::bigint"
POSTGRESQL = Dialect(
    "PostgreSQL",
    for_update=" for update",
    takes_nul=False,
    timers="due_us, seq",
    end="select head, recorded_us from trilogue_head for update",
    alone="select pg_advisory_xact_lock(hashtextextended('trilogue_head', 'trilogue_head'::regclass::oid::bigint))",
    state="select pg_advisory_xact_lock(hashtextextended(?, 'trilogue_state'::regclass::oid::bigint))",
    clock=_CLOCK,
    kind_of=(
        "select case table_type when 'VIEW' then 'view' else 'table' end from information_schema.tables "
        "where table_name = lower(?) and table_schema = any(current_schemas(false))"
    ),
    view=(
        "select 1 from information_schema.view_table_usage where view_name = lower(?) and table_name = lower(?) "
        "and view_schema = any(current_schemas(false))"
    ),
    columns=(
        "select column_name from information_schema.columns where table_name = lower(?) "
        "and table_schema = any(current_schemas(false)) order by ordinal_position"
    ),
    bytes=(
        "select cast(coalesce(sum(pg_total_relation_size(c.oid)), 0) as bigint) from pg_class c "
        "where c.relkind = 'r' and c.relname like 'trilogue\\_%' and c.relnamespace = "
        "(select relnamespace from pg_class where oid = 'trilogue_head'::regclass)"
    ),
    move=(
        "update trilogue_slots s set cursor = greatest(s.cursor, u.cursor), done = s.done + u.done, failed = s.failed + u.failed "
        "from unnest(cast(? as integer[]), cast(? as bigint[]), cast(? as bigint[]), cast(? as bigint[]), cast(? as bigint[])) "
        "as u (slot, epoch, cursor, done, failed) "
        "where s.group_id = ? and s.owner = ? and s.slot = u.slot and s.epoch = u.epoch returning s.slot"
    ),
    append_all=postgresql_append.append_all,
    append_at_once=postgresql_append.append_at_once,
    emit=postgresql_append.emit,
)


class Translator:
    """Statements of ours, or of the user, in the words of the driver; remembered."""

    def __init__(self, schema: str | None) -> None:
        self._schema = "" if schema is None else f"{quoted(schema)}."
        self._known: dict[tuple[str, bool], str] = {}
        self.concern_others: set[str] = set()

    def __call__(self, sql: str, *, has_values: bool = True) -> str:
        known = self._known.get((sql, has_values))
        if known is None:
            if len(self._known) >= _TRANSLATED:
                self._known.clear()
                self.concern_others.clear()
            known = self._known[sql, has_values] = _PARTS.sub(lambda found: self._part(found[0], has_values), sql)
            if _CONCERNS_OTHERS.search(sql):
                self.concern_others.add(known)
        return known

    def _part(self, part: str, has_values: bool) -> str:
        if part == "?":
            return "%s" if has_values else part
        if part == "??":  # the operators of jsonb
            return "?"
        if part.startswith("trilogue_"):
            return self._schema + part
        if part.startswith("'trilogue_") and part.endswith("'") and self._schema:
            return f"'{self._schema}{part[1:]}"  # of ::regclass
        return part.replace("%", "%%") if has_values else part


def quoted(name: str) -> str:
    """A name as it stands in SQL."""
    return '"' + name.replace('"', '""') + '"'


class PgSql:
    """stores.dialect.Sql over a connection; `user`: the same for the user's own SQL."""

    dialect = POSTGRESQL

    def __init__(self, translator: Translator) -> None:
        self._translate = translator
        self._ahead: list[str] = []
        self.user = UserSql(translator, self)
        self.concerns_others = False  # whether something was written since the last commit that other processes wait for

    def attach(self, connection: psycopg.Connection[Any]) -> None:
        """Go on with a new connection."""
        # All numbers are bigint: of their sizes the server would plan the same statement anew.
        self._cursor = connection.cursor(binary=True)
        self._cursor.adapters.register_dumper(int, Int8BinaryDumper)
        self.user.attach(connection)

    def rows(self, sql: str, values: Any = ()) -> list[Any]:
        """Run one statement; all its rows."""
        if sql.startswith(_SAVEPOINTS):
            self._say(sql)
            return []
        cursor = self._cursor.execute(self._prepared(sql), values)
        return cursor.fetchall() if cursor.description is not None else []

    def many(self, sql: str, values: Any) -> int:
        """Run one statement once per row of values; how many rows it changed."""
        rows = list(values)
        if not rows:
            return 0
        if len(rows) == 1:
            return self._cursor.execute(self._prepared(sql), rows[0]).rowcount
        self._cursor.executemany(self._prepared(sql), rows)
        return self._cursor.rowcount

    def ahead(self, words: str) -> None:
        """Savepoints and settings go with the statement that comes next: a trip to the server less each."""
        self._ahead.append(words)

    def send_ahead(self) -> None:
        """Let the server know what it has not been told yet."""
        if self._ahead:
            words = "; ".join(self._ahead)
            self._ahead.clear()
            self._cursor.connection.execute(words.encode(), prepare=False)

    def _say(self, words: str) -> None:
        self.ahead(words)
        undoes = words.startswith("rollback ")
        if undoes:
            self.user.undone()
        if undoes or self._cursor.connection.info.transaction_status == pq.TransactionStatus.INERROR:
            self.send_ahead()

    def ended(self) -> None:
        """The transaction ends, and its savepoints with it."""
        self._ahead.clear()
        self.user.forget_limit()

    def _prepared(self, sql: str) -> str:
        self.user.unlimit()
        self.send_ahead()
        translated = self._translate(sql)
        self.concerns_others = self.concerns_others or translated in self._translate.concern_others
        return translated

    def in_transaction(self) -> bool:
        """Whether there is a transaction, begun and not undone."""
        return self._cursor.connection.info.transaction_status in (
            pq.TransactionStatus.INTRANS,
            pq.TransactionStatus.INERROR,
        )

    def check(self) -> None:
        """Raise TimedOut or Rejected if an error in the transaction, which was caught, lets nothing more happen in it."""
        if self.user.timed_out:
            raise TimedOut(GONE)
        if self._cursor.connection.info.transaction_status == pq.TransactionStatus.INERROR:
            raise Rejected(SWALLOWED)


class UserSql:
    """The user's SQL on the write connection, within a limit that the server is told of when it is used first."""

    dialect = POSTGRESQL

    def __init__(self, translator: Translator, own: PgSql) -> None:
        self._translate, self._own = translator, own
        self.timed_out = False  # since what it did was undone
        self._limit_us: int | None = None
        self._deadline_s = 0.0
        self._told_us: int | None = None

    def attach(self, connection: psycopg.Connection[Any]) -> None:
        """Go on with a new connection."""
        self._cursor = connection.cursor()
        self._told_us = None

    def limit(self, limit_us: int | None) -> None:
        """What all SQL may take from now on; None: what our own statements may."""
        self._limit_us = limit_us
        self._deadline_s = time.monotonic() + (limit_us or 0) / 1_000_000

    def rows(self, sql: str, values: Any = ()) -> list[Any]:
        """Run one statement; all its rows."""
        with self._limited():
            cursor = self._cursor.execute(self._translate(sql, has_values=bool(values)), values or None)
            return cursor.fetchall() if cursor.description is not None else []

    def many(self, sql: str, values: Any) -> int:
        """Run one statement once per row of values; how many rows it changed."""
        rows = list(values)
        with self._limited():
            if rows:
                self._cursor.executemany(self._translate(sql), rows)
        return self._cursor.rowcount if rows else 0

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        try:
            self._tell_limit()
            self._own.send_ahead()
            yield
        except (errors.QueryCanceled, TimedOut):
            self.timed_out = True
            raise

    def _tell_limit(self) -> None:
        if self._limit_us is None:
            self.unlimit()
            return
        if time.monotonic() > self._deadline_s:
            raise TimedOut(TOO_LONG)
        if self._told_us != self._limit_us:
            self._own.ahead(f"set local statement_timeout = {max(1, self._limit_us // 1_000)}")
            self._told_us = self._limit_us

    def unlimit(self) -> None:
        """Back to the limit of our own statements."""
        if self._told_us is not None and self._cursor.connection.info.transaction_status == pq.TransactionStatus.INTRANS:
            self._own.ahead(f"set local statement_timeout = {round(STATEMENT_S * 1_000)}")
            self._told_us = None

    def undone(self) -> None:
        """What it did up to a savepoint was undone, and maybe what the server was told of the limit."""
        self.timed_out = False
        if self._told_us is not None:
            self._told_us = UNKNOWN_US

    def forget_limit(self) -> None:
        """The transaction has ended, and what it was told with it."""
        self._told_us = None
        self.timed_out = False
