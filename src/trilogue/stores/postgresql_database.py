"""The connections to one PostgreSQL database, and what runs where.

write   through the Writer, in its thread            many changes to one commit
read    in a thread of its own                       looks; a connection that was lost is made anew, and asked again
look    in a thread, one snapshot                    what may take long
query   the user's SQL, in a thread                  up to 4 connections are kept
listen  in a thread, for ever                        somebody has committed something: look now and not at the next poll
"""

import asyncio
import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import psycopg

from trilogue.errors import BadOption, Unavailable
from trilogue.events import Durability
from trilogue.ports import Rows
from trilogue.stores import postgresql_schema
from trilogue.stores.database import Version
from trilogue.stores.dialect import Sql, TransactionSql
from trilogue.stores.log import Types
from trilogue.stores.postgresql import (
    Connection,
    PgConnection,
    Server,
    begin,
    connect,
    cut,
    told,
    translate,
    translated,
)
from trilogue.stores.postgresql_sql import PgSql, Translator
from trilogue.stores.transaction import SqlTransaction
from trilogue.stores.userdb import ONLY_READS, check_statements
from trilogue.stores.writer import Writer

T = TypeVar("T")
QUERY_S = 30.0
GLANCE_S = 5.0
QUERIES = 8
QUERIES_KEPT = 4
CLOSE_S = 5.0
HINT_S = 0.005
POLL_S = 0.005  # where nobody tells us: as soon as on SQLite while something happens
POLL_IDLE_S = 0.25
POLL_TOLD_S = 0.05
POLL_TOLD_IDLE_S = 0.25  # what others publish in transactions of their own, nobody tells
RECONNECT_S = 1.0
SNAPSHOT = "isolation level repeatable read read only"
_VERSION = """
select (select head from trilogue_head), cast(coalesce(sum(inbox), 0) as bigint),
  count(*), cast(coalesce(sum(revision), 0) as bigint), (select min(due_us) from trilogue_timers) from trilogue_groups"""

logger = logging.getLogger("trilogue")


class Reader:
    """A connection for reading, used by one thread at a time; made anew when it was lost."""

    def __init__(self, server: Server, purpose: str, limit_s: float) -> None:
        self._server, self._purpose, self._limit_s = server, purpose, limit_s
        self._lock = threading.Lock()
        self.types = Types()
        self.sql = PgSql(Translator(server.schema))
        self.connection: Connection | None = None

    def run(self, look: Callable[[Sql, Types], T], how: str | None = None) -> T:
        """Run a look; once more if the connection was lost, for looking twice harms nobody. how: inside such a transaction."""
        with self._lock, translated(self._server.url):
            if self.connection is not None and not self.connection.closed:
                with contextlib.suppress(psycopg.OperationalError):
                    return self._look(self.connection, look, how)
                if not self.connection.broken:  # the statement failed, and not the connection
                    return self._look(self.connection, look, how)
                self.connection.close()
            return self._look(self._connected(), look, how)

    def _connected(self) -> Connection:
        self.connection = connect(self._server, self._purpose, limit_s=self._limit_s)
        self.sql.attach(self.connection)
        return self.connection

    def _look(self, connection: Connection, look: Callable[[Sql, Types], T], how: str | None) -> T:
        # Behind a pooler each transaction has to say what a session would remember.
        if how is None and self._server.prepare:
            return look(self.sql, self.types)
        with transaction(self._server, connection, how or "read only", self._limit_s):
            return look(self.sql, self.types)

    def is_behind(self, pid: int) -> bool:
        """Whether this is the connection of that process of the server's."""
        connection = self.connection
        return connection is not None and not connection.closed and connection.info.backend_pid == pid

    def cut(self) -> None:
        """Let whoever waits for an answer have an error at once."""
        if self.connection is not None:
            cut(self.connection)

    def close(self) -> None:
        """Let go of the connection."""
        with self._lock:
            if self.connection is not None:
                self.connection.close()


@contextlib.contextmanager
def transaction(server: Server, connection: Connection, how: str, limit_s: float) -> Iterator[None]:
    """A transaction of looks, which leaves nothing behind."""
    connection.execute(begin(server, how, limit_s), prepare=False)
    try:
        yield
    finally:
        if not connection.closed:
            with contextlib.suppress(psycopg.Error):
                connection.execute(b"rollback", prepare=False)


class PostgresqlDatabase:
    """database.Database on a PostgreSQL server. Raises Unavailable, BadOption where it cannot be opened.

    scheduled: told the due time of a timer that a transaction has set. idle_s: how long a transaction of ours may lie idle.
    """

    def __init__(self, server: Server, *, payload_bytes: int, idle_s: float, scheduled: Callable[[int], None]) -> None:
        self.url = server.url
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._idle_s, self._scheduled, self._payload_bytes = idle_s, scheduled, payload_bytes
        self._reader = Reader(server, "read", GLANCE_S)
        self._slow = Reader(server, "look", QUERY_S)
        self._queries: list[Connection] = []
        self._running_queries: set[Connection] = set()
        self._query_room = asyncio.Semaphore(QUERIES)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="trilogue reader")
        self._seen = Version(None, None)
        self._look_at = 0.0
        self._interval_s = POLL_S
        self._hint_due = False
        self.writer_types = Types()
        self.is_open = False

    async def open(self) -> None:
        """Connect, create the schema or bring it up, and begin to listen."""
        self.durability: Durability = await asyncio.to_thread(self._open)
        self.transaction = SqlTransaction(self.connection.sql, self.writer_types, self._payload_bytes, self._scheduled)
        self.writer = Writer(self.connection, name=self.url, undone=self.writer_types.forget)
        self._listener = Listener(self._server, self._loop, self._reader.is_behind, self._hinted)
        self.is_open = True

    def _open(self) -> Durability:
        with translated(self.url):
            postgresql_schema.prepare(self._server)
            self.schema = postgresql_schema.place(self._server)
            self.connection = PgConnection(self._server, idle_s=self._idle_s, concerned=self._concerned)
            return postgresql_schema.durability(self.connection.psycopg, self.url)

    async def close(self) -> None:
        """Write what waits, then let go; a server that answers nothing is not waited for without end."""
        self.is_open = False
        self._listener.stop()
        unfrozen = self._loop.call_later(CLOSE_S, self._cut_all)
        try:
            await self.writer.close()
            await asyncio.to_thread(self._close)
        finally:
            unfrozen.cancel()

    def _cut_all(self) -> None:
        cut(self.connection.psycopg)
        self._reader.cut()
        self._slow.cut()
        for connection in self._running_queries:
            cut(connection)

    def _close(self) -> None:
        self._threads.shutdown()
        self._listener.join()
        self._reader.close()
        self._slow.close()
        for connection in self._queries:
            connection.close()
        self.connection.close()

    def check_open(self) -> None:
        """Raise Unavailable if it is closed, or this is a fork of the process that opened it."""
        if not self.is_open:
            raise Unavailable(f"{self.url} is not open: use it inside `async with app:`")
        self.connection.check_fork()

    @property
    def sql(self) -> TransactionSql:
        """The cursor of the write connection."""
        return self.connection.sql

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def write(self, run: Callable[[Sql], T], *, rows: int = 1) -> T:
        """Run a change and commit it. rows: about how many it writes."""
        self.check_open()
        result: T = await self.writer.submit(run, rows=rows, broke=self.writer_types.forget)
        return result

    async def glance(self, run: Callable[[Sql, Types], T]) -> T:
        """Read what takes microseconds there, and some more on the way."""
        self.connection.check_fork()
        return await self._loop.run_in_executor(self._threads, self._reader.run, run)

    async def look(self, run: Callable[[Sql, Types], T]) -> T:
        """Read what may take long, all of it as it was at one moment."""
        self.check_open()
        return await asyncio.to_thread(self._slow.run, run, SNAPSHOT)

    async def query(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        """Read the user's tables, in a thread."""
        self.check_open()
        check_statements(sql)
        async with self._query_room:
            return await asyncio.to_thread(self._query, sql, values)

    def _query(self, sql: str, values: Sequence[Any]) -> Rows:
        with translated(self.url):
            try:
                return self._queried(sql, values)
            except psycopg.OperationalError as error:
                if error.sqlstate is not None and not error.sqlstate.startswith(("57P", "08")):
                    raise
                return self._queried(sql, values, fresh=True)

    def _queried(self, sql: str, values: Sequence[Any], *, fresh: bool = False) -> Rows:
        if fresh:
            while self._queries:
                self._queries.pop().close()
        connection = self._queries.pop() if self._queries else connect(self._server, "query", limit_s=QUERY_S)
        self._running_queries.add(connection)
        try:
            with transaction(self._server, connection, "read only", QUERY_S):
                cursor = connection.execute(Translator(self._server.schema)(sql, has_values=bool(values)), values or None)
                rows = Rows(cursor.fetchall() if cursor.description else [])
                rows.columns = tuple(column.name for column in cursor.description or ())
            return rows
        except psycopg.errors.ReadOnlySqlTransaction:
            raise BadOption(ONLY_READS) from None
        except (psycopg.ProgrammingError, psycopg.DataError) as error:
            raise told(error, sql) from error
        finally:
            self._running_queries.discard(connection)
            if connection.closed or len(self._queries) >= QUERIES_KEPT:
                connection.close()
            else:
                self._queries.append(connection)

    async def rewrite(self) -> bool:
        """Give the room of what was deleted free, as far as the server does it for us."""
        self.check_open()
        return await asyncio.to_thread(self._rewrite)

    def _rewrite(self) -> bool:
        with translated(self.url), connect(self._server, "rewrite", limit_s=None) as connection:
            return postgresql_schema.vacuum(connection, self._server)

    async def describe(self) -> dict[str, str]:
        """What kind of database this is, and what its durability rests on."""
        return await self.look(lambda sql, _: postgresql_schema.described(sql, self.durability))

    # ── noticing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def version(self) -> Version:
        """The newest positions; the groups and the next timer; asked less often while nothing happens."""
        now = time.monotonic()
        if now < self._look_at:
            return self._seen
        head, inbox, *rest = await self.glance(lambda sql, _: sql.rows(_VERSION)[0])
        found = Version((head, inbox), rest)
        least, most = (POLL_TOLD_S, POLL_TOLD_IDLE_S) if self._listener.works else (POLL_S, POLL_IDLE_S)
        self._interval_s = least if found != self._seen else min(self._interval_s * 1.5, most)
        self._seen, self._look_at = found, now + self._interval_s
        return found

    def hurry(self) -> None:
        """Look often for a while: something is about to be committed by somebody else."""
        self._look_at, self._interval_s = 0.0, POLL_S

    def _hinted(self) -> None:
        self._look_at = 0.0

    def _concerned(self) -> None:
        """In the writer's thread, after a commit others wait for."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._hint_soon)

    def _hint_soon(self) -> None:
        # One for everything of some milliseconds: a commit with a notification waits for every other one that has one.
        if not self._hint_due and self.is_open and self._server.prepare:
            self._hint_due = True
            self._loop.call_later(HINT_S, self._hint)

    def _hint(self) -> None:
        self._hint_due = False
        if self.is_open:
            self._threads.submit(self._notify)

    def _notify(self) -> None:
        with contextlib.suppress(Exception):  # others poll
            self._reader.run(lambda sql, _: sql.rows("select pg_notify(?, '')", (channel(self._server),)))

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def beside_bytes(self) -> int:
        """Nothing that belongs to this log alone."""
        return 0

    def in_transaction(self) -> bool:
        """Whether the write connection still has its transaction."""
        return self.connection.sql.in_transaction()

    def set_deadline(self, limit_us: int | None) -> None:
        """What the user's SQL may take from now on, in microseconds; None: no limit of its own."""
        self.connection.sql.user.limit(limit_us)

    def translate(self, error: Exception) -> Exception:
        """psycopg's error, on the write connection, as one of ours."""
        return self.connection.translate(error)


class Listener:
    """Waits for hints in a thread. works: whether one has come since it was connected; a pooler lets none through.

    is_own: whether a hint is from this process, which knows already. hinted: told of the others, on the event loop.
    """

    def __init__(
        self, server: Server, loop: asyncio.AbstractEventLoop, is_own: Callable[[int], bool], hinted: Callable[[], None]
    ) -> None:
        self._server, self._loop, self._is_own, self._hinted = server, loop, is_own, hinted
        self._stopped = threading.Event()
        self._connection: Connection | None = None
        self.works = False
        self._thread = threading.Thread(target=self._run, name="trilogue listener", daemon=True)
        if server.prepare:
            self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._listen()
            except Exception as error:  # whatever it is: polling goes on
                logger.debug("%s: listening failed, polling: %s", self._server.url, translate(error, self._server.url))
            self.works = False
            self._stopped.wait(RECONNECT_S)

    def _listen(self) -> None:
        name = channel(self._server)
        with connect(self._server, "listen", limit_s=GLANCE_S) as connection:
            self._connection = connection
            connection.execute(f"listen {name}".encode())
            connection.execute("select pg_notify(%s, '')", (name,))
            while not self._stopped.is_set():
                for hint in connection.notifies(timeout=RECONNECT_S, stop_after=1):
                    self.works = True
                    if not self._is_own(hint.pid):
                        self._loop.call_soon_threadsafe(self._hinted)

    def stop(self) -> None:
        """Listen no more."""
        self._stopped.set()
        if self._connection is not None and not self._connection.closed:
            cut(self._connection)

    def join(self) -> None:
        """Wait for the end of the thread."""
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)


def channel(server: Server) -> str:
    """Where hints about one log are told: a database may hold several."""
    return "trilogue_" + hashlib.sha256((server.schema or "").encode()).hexdigest()[:16]
