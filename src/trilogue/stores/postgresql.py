"""PostgreSQL as a store: its connections, and everything that can be wrong with them.

write     one transaction at a time, in the writer's thread      begin; savepoint job; …; commit
read      short looks, in a thread of their own
look      one snapshot for what may take long
listen    waits for hints that somebody has committed; without it the log is looked at every few milliseconds
"""

import contextlib
import os
import random
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg import errors, pq

from trilogue.errors import BadOption, OutcomeUnknown, Rejected, StorageFull, TimedOut, TrilogueError, Unavailable
from trilogue.stores.dialect import Sql
from trilogue.stores.postgresql_sql import STATEMENT_S, TOO_LONG, PgSql, Translator, quoted
from trilogue.stores.transaction import SWALLOWED
from trilogue.stores.writer import Again

T = TypeVar("T")
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


@dataclass(frozen=True, slots=True)
class Server:
    """Where a store is. conninfo: for libpq. url: as it may be shown. prepare: whether a connection may keep anything between
    two transactions, which it may not behind a pooler."""

    conninfo: str
    url: str
    schema: str | None = None
    prepare: bool = True
    connect_timeout_s: float = 10.0


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
