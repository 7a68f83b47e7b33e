"""PostgreSQL as a store: its connections, how it is spoken to, and everything that can be wrong with it.

write     one transaction at a time, in the writer's thread      begin; savepoint job; …; commit
read      short looks, in a thread of their own
look      one snapshot for what may take long
listen    waits for hints that somebody has committed; without it the log is looked at every few milliseconds

`?` in our SQL becomes the driver's `%s`, and trilogue_x becomes "schema".trilogue_x where ?schema= is given, once per statement.
"""

import contextlib
import os
import random
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg import errors, pq
from psycopg.types.numeric import Int8BinaryDumper

from trilogue.errors import BadOption, OutcomeUnknown, Rejected, StorageFull, TimedOut, TrilogueError, Unavailable
from trilogue.stores import postgresql_append
from trilogue.stores.dialect import Dialect, Sql
from trilogue.stores.transaction import GONE, SWALLOWED
from trilogue.stores.writer import Again

T = TypeVar("T")
STATEMENT_S = 30.0
ANSWER_S = 10.0  # how much longer than the server's own limit an answer may take before the connection is given up
REPEATS = 8
REPEAT_S = 0.01
KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}

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


@dataclass(frozen=True, slots=True)
class Server:
    """Where a store is. conninfo: for libpq. url: as it may be shown. prepare: whether a connection may keep anything between
    two transactions, which it may not behind a pooler."""

    conninfo: str
    url: str
    schema: str | None = None
    prepare: bool = True
    connect_timeout_s: float = 10.0


# ── statements ───────────────────────────────────────────────────────────────────────────────────────────────────────

TOO_LONG = "its SQL took longer than the db limit: make it cheaper, or raise db_limit= of the handler"
UNKNOWN_US = -1
_SAVEPOINTS = ("savepoint ", "release ", "rollback to ")
_CONCERNS_OTHERS = re.compile(r"trilogue_append|insert into trilogue_timers|(?:update|insert into) trilogue_groups")
_PARTS = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]* | /\*.*?\*/ | \$(\w*)\$.*?\$\1\$ | \?\?? | % | \btrilogue_\w+""",
    re.DOTALL | re.VERBOSE,
)
_TRANSLATED = 2_000


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

    def attach(self, connection: "Connection") -> None:
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

    def attach(self, connection: "Connection") -> None:
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


# ── connections ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection on which nothing is waited for without end: a server that is frozen answers nothing, and closes nothing."""

    answer_s: float | None = STATEMENT_S + ANSWER_S

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """psycopg's wait(), with a limit."""
        try:
            return super().wait(gen, interval, self.answer_s if timeout is None else timeout)
        except errors._WaitTimeout:
            if timeout is not None:
                raise
            self.close()
            raise psycopg.OperationalError(f"the server has not answered for {self.answer_s:.0f} s") from None


def connect(server: Server, purpose: str, *, limit_s: float | None = STATEMENT_S, idle_s: float = 0) -> Connection:
    """A connection, on which each statement by itself is a transaction. Raises psycopg errors.

    limit_s: of one statement. idle_s: how long the server lets a transaction lie idle: of a process that is frozen, and holds
    what others wait for; 0 for ever.
    """
    connection = Connection.connect(
        server.conninfo,
        autocommit=True,
        prepare_threshold=5 if server.prepare else None,
        connect_timeout=max(2, round(server.connect_timeout_s)),
        application_name=f"trilogue {purpose}",
        **KEEPALIVE,
    )
    connection.answer_s = None if limit_s is None else limit_s + ANSWER_S
    try:
        if server.prepare:
            connection.execute(settings(server, limit_s, idle_s), prepare=False)
    except BaseException:
        connection.close()
        raise
    return connection


def settings(server: Server, limit_s: float | None, idle_s: float = 0) -> bytes:
    """What a session is told once; behind a pooler, where there is none, each transaction."""
    words = "set" if server.prepare else "set local"
    told = [
        f"{words} statement_timeout = {round((limit_s or 0) * 1_000)}",
        f"{words} idle_in_transaction_session_timeout = {round(idle_s * 1_000)}",
    ]
    if server.schema is not None:
        # Tables that the user makes without naming a schema belong beside ours.
        told.append(f"{words} search_path = {quoted(server.schema)}, public")
    return "; ".join(told).encode()


def begin(server: Server, how: str, limit_s: float | None, idle_s: float = 0) -> bytes:
    """The statement that begins a transaction. how: as `isolation level …`."""
    return f"begin {how}".encode() + (b"" if server.prepare else b"; " + settings(server, limit_s, idle_s))


def cut(connection: psycopg.Connection[Any]) -> None:
    """End a connection somebody else waits on: they get an error at once."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.shutdown(socket.SHUT_RDWR)


class PgConnection:
    """The write connection: stores.writer.Connection over psycopg, connected again when it was lost.

    idle_s: as connect(). concerned: told, in the writer's thread, after a commit that other processes wait for.
    """

    appends_last = True

    def __init__(self, server: Server, *, idle_s: float, concerned: Callable[[], None]) -> None:
        self._server, self._idle_s, self._concerned = server, idle_s, concerned
        self._pid = os.getpid()
        self._repeats = 0
        self._begin = begin(server, "isolation level read committed", STATEMENT_S, idle_s)
        self.sql = PgSql(Translator(server.schema))
        self._connect()

    def _connect(self) -> None:
        self.psycopg = connect(self._server, "write", idle_s=self._idle_s)
        self.sql.attach(self.psycopg)

    def begin(self, *, wait: bool) -> bool:
        """Begin, on a new connection if the last one was lost. Not on the event loop: every statement waits for the server."""
        self.check_fork()
        if not wait:
            return False
        if self._repeats:
            time.sleep(random.random() * REPEAT_S * 2**self._repeats)
        self.sql.concerns_others = False
        if self.psycopg.closed or self.psycopg.info.transaction_status != pq.TransactionStatus.IDLE:
            self.psycopg.close()
            self._connect()
        try:
            self.psycopg.execute(self._begin, prepare=False)
        except psycopg.OperationalError:  # it was lost while nobody looked: nothing has happened yet
            self.psycopg.close()
            self._connect()
            self.psycopg.execute(self._begin, prepare=False)
        return True

    def at_once(self, change: Callable[[Sql], T | None]) -> T | None:
        """Run a change of one statement, which commits itself; None if that is not possible now.

        Not on a connection that was lost: what fails on one that seems to be there may or may not have happened.
        """
        self.check_fork()
        if not self._server.prepare or self._repeats or not _is_at_rest(self.psycopg):
            return None
        self.sql.concerns_others = False
        result = change(self.sql)
        if self.sql.concerns_others:
            self._concerned()
        return result

    def commit(self) -> None:
        """Make it durable."""
        self.sql.ended()
        answer = self.psycopg.execute(b"commit", prepare=False).statusmessage
        if answer != "COMMIT":
            raise Rejected(SWALLOWED)
        self._repeats = 0
        if self.sql.concerns_others:
            self._concerned()

    def rollback(self) -> None:
        """Undo everything since begin(); if that fails, the next begin() is on a new connection."""
        self.sql.ended()
        try:
            if self.psycopg.info.transaction_status != pq.TransactionStatus.IDLE:
                self.psycopg.execute(b"rollback", prepare=False)
        except psycopg.Error:
            self.psycopg.close()

    def check_fork(self) -> None:
        """Raise Unavailable in a forked child: both would speak on one connection."""
        if os.getpid() != self._pid:
            raise Unavailable(f"{self._server.url} was opened before a fork: open the store in the child process, after forking")

    def translate(self, error: Exception, *, at_commit: bool = False) -> Exception:
        """psycopg's error as one of ours; Again for a transaction that lost against another one, a bounded number of times."""
        if isinstance(error, (errors.SerializationFailure, errors.DeadlockDetected)) and self._repeats < REPEATS:
            self._repeats += 1
            return Again()
        if isinstance(error, errors.ReadOnlySqlTransaction):
            self.psycopg.close()  # a server that has become a standby: look for the one that writes
        return translate(error, self._server.url, at_commit=at_commit)

    def close(self) -> None:
        """Let go of the connection."""
        self.psycopg.close()


def _is_at_rest(connection: Connection) -> bool:
    """Whether nothing is under way, and the server has not said anything unasked, as a goodbye."""
    if connection.closed or connection.info.transaction_status != pq.TransactionStatus.IDLE:
        return False
    said = select.poll()
    said.register(connection.fileno(), select.POLLIN)
    return not said.poll(0)


def translate(error: Exception, url: str, *, at_commit: bool = False) -> Exception:
    """psycopg's error as one of ours; anything else comes back as it is."""
    if isinstance(error, TrilogueError | Again) or not isinstance(error, psycopg.Error):
        return error
    said = _said(error)
    match error:
        case errors.QueryCanceled():
            return TimedOut(TOO_LONG)
        case errors.InFailedSqlTransaction():
            return Rejected(SWALLOWED)
        case errors.DiskFull():
            return StorageFull(f"{url} has no room to write: {said}; nothing of this was stored")
        case errors.ReadOnlySqlTransaction():
            return Unavailable(f"{url} can only be read: it is a standby; name the primary, or several hosts")
        case errors.InsufficientPrivilege():
            return Rejected(f"{url}: {said}; grant it to this user")
        case errors.LockNotAvailable() | errors.SerializationFailure() | errors.DeadlockDetected():
            return Unavailable(f"{url}: {said}; another transaction was in the way too often: try again")
        case errors.UntranslatableCharacter() | errors.CharacterNotInRepertoire():
            return Rejected(f"{url} cannot store this text: {said}")
        case psycopg.DataError() if "NUL" in said:
            return Rejected("PostgreSQL stores no text with a NUL character: take it out, or put it into bytes")
        case psycopg.OperationalError() if at_commit and not _is_certain(error):
            return OutcomeUnknown(f"{url}: {said}; it may or may not be stored, repeating it with the same id is harmless")
        case psycopg.OperationalError():
            return Unavailable(f"{url}: {said}")
    return error


def _is_certain(error: psycopg.Error) -> bool:
    """Whether the server itself said that it refused the commit, rather than going away in the middle of it."""
    return error.sqlstate is not None and not error.sqlstate.startswith(("57P", "08"))


def _said(error: psycopg.Error) -> str:
    """What the server or libpq said, in one line."""
    return " ".join((error.diag.message_primary or str(error)).split()) or type(error).__name__


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """psycopg's errors become ours."""
    try:
        yield
    except TrilogueError:
        raise
    except psycopg.Error as error:
        raise translate(error, url) from error


def told(error: Exception, sql: str) -> Exception:
    """A mistake in the user's SQL as one of our errors."""
    if isinstance(error, psycopg.ProgrammingError | psycopg.DataError):
        return BadOption(f"the SQL {sql[:200]!r} cannot be run: {_said(error)}")
    return error
