"""The connections to one SQLite database, and what runs where.

    write   through the Writer: many changes to one fsync            (writer.py)
    read    on the event loop, on a connection of its own: looks that take microseconds
    look    in a thread, on another: what may take long
    query   the user's SQL, in a thread, on a connection made for it

In memory there is one connection for all of it, and a lock.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import apsw

from trilogue.errors import BadOption, TrilogueError, Unavailable
from trilogue.events import Durability
from trilogue.ports import Rows
from trilogue.stores import log
from trilogue.stores.database import Version
from trilogue.stores.dialect import Sql, TransactionSql
from trilogue.stores.rewrite import rewrite
from trilogue.stores.sqlite import (
    ApswSql,
    OpenFiles,
    SqliteConnection,
    check_place,
    connect,
    prepare,
    translate,
    wal_bytes,
)
from trilogue.stores.transaction import SqlTransaction
from trilogue.stores.userdb import read_only
from trilogue.stores.writer import Writer

T = TypeVar("T")
QUERY_S = 30.0
STEPS_PER_CHECK = 100_000


class SqliteDatabase:
    """One open database; made and used on one event loop. Raises Unavailable where it cannot be opened.

    scheduled: told the due time of a timer that a transaction has set.
    """

    def __init__(
        self, path: str, url: str, *, wal_limit: int | None, payload_bytes: int, scheduled: Callable[[int], None]
    ) -> None:
        self.url = url
        self.durability: Durability = "memory" if path == ":memory:" else "os-crash"
        self.in_memory = path == ":memory:"
        self.path = path if self.in_memory else check_place(path)  # absolute: the current folder may become another one
        self.connection = self._connect(wal_limit)
        self._reader = self.connection.apsw if self.in_memory else connect(self.path, read_only=True)
        self._reader_sql: Sql = self.connection.sql if self.in_memory else ApswSql(self._reader)
        self.writer_types, self.types, self._slow_types = log.Types(), log.Types(), log.Types()
        self.types.load(self._reader_sql)
        if not self.in_memory:
            self._slow_lock = threading.Lock()
            self._slow = connect(self.path, read_only=True)
            self._slow_sql = ApswSql(self._slow)
        self.transaction = SqlTransaction(self.connection.sql, self.writer_types, payload_bytes, scheduled)
        self.writer = Writer(self.connection, name=self.url, undone=self.writer_types.forget)
        self.is_open = True

    def _connect(self, wal_limit: int | None) -> SqliteConnection:
        try:
            connection = SqliteConnection(self.path) if wal_limit is None else SqliteConnection(self.path, wal_bytes=wal_limit)
            prepare(connection)
        except TrilogueError:
            raise
        except Exception as error:
            raise translate(error, self.path) from error
        if not self.in_memory:
            OpenFiles.add(self.path)
            with contextlib.suppress(OSError):
                os.chmod(self.path, 0o600)
        return connection

    async def close(self) -> None:
        """Write what waits, then let go."""
        self.is_open = False
        await self.writer.close()
        if not self.in_memory:
            self._reader.close(True)
            with self._slow_lock:  # somebody who waited for it may have been cancelled, the thread goes on
                self._slow.close(True)
            OpenFiles.remove(self.path)
        self.connection.close()

    def check_open(self) -> None:
        """Raise Unavailable if it is closed, or this is a fork of the process that opened it."""
        if not self.is_open:
            raise Unavailable(f"{self.url} is not open: use it inside `async with app:`")
        self.connection.check_fork()  # the writer's thread did not come along: waiting for it would never end

    async def write(self, run: Callable[[Sql], Any], *, rows: int = 1) -> Any:
        """Run a change and commit it. rows: about how many it writes."""
        self.check_open()
        return await self.writer.submit(run, rows=rows, broke=self.writer_types.forget)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While the event loop reads: errors become ours, and in memory the writer waits."""
        self.connection.check_fork()
        lock = self.connection.exclusively() if self.in_memory else contextlib.nullcontext()
        with lock:
            try:
                yield
            except TrilogueError:
                raise
            except Exception as error:
                raise translate(error, self.path) from error

    async def glance(self, run: Callable[[Sql, log.Types], T]) -> T:
        """Read what takes microseconds, on the event loop itself: a thread would cost more than the look."""
        with self.reading():
            return run(self._reader_sql, self.types)

    async def look(self, run: Callable[[Sql, log.Types], T]) -> T:
        """Read what may take long, in a thread and on a connection of its own."""
        self.check_open()
        if self.in_memory:
            with self.reading():
                return run(self._reader_sql, self.types)
        return await asyncio.to_thread(self._look_in_thread, run)

    def _look_in_thread(self, run: Callable[[Sql, log.Types], T]) -> T:
        with self._slow_lock:
            try:
                # One snapshot for all of it: what one statement found must still be true when the next one runs.
                self._slow_sql.rows("begin")
                try:
                    return run(self._slow_sql, self._slow_types)
                finally:
                    self._slow_sql.rows("commit")
            except TrilogueError:
                raise
            except Exception as error:
                raise translate(error, self.path) from error

    async def rewrite(self) -> bool:
        """Write the file anew, so that nothing of what was deleted is left in it; False if the log could not be emptied."""
        self.check_open()
        return self.in_memory or await asyncio.to_thread(self._rewrite)

    def _rewrite(self) -> bool:
        try:
            return rewrite(self.connection)
        except Exception as error:
            raise translate(error, self.path) from error

    async def query(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        """Read the user's tables on a connection of its own, in a thread."""
        self.check_open()
        if self.in_memory:
            with self.reading():
                try:
                    return read_only(self._reader, sql, values)
                except Exception as error:
                    raise _told(error, sql) from error
        return await asyncio.to_thread(self._query, sql, values)

    def _query(self, sql: str, values: Sequence[Any]) -> Rows:
        connection = connect(self.path, read_only=True)
        deadline = time.monotonic() + QUERY_S
        connection.set_progress_handler(lambda: time.monotonic() > deadline, STEPS_PER_CHECK)
        try:
            return read_only(connection, sql, values)
        except Exception as error:
            raise _told(translate(error, self.path), sql) from error
        finally:
            connection.close()

    async def version(self) -> Version:
        """A number that is another one after every commit on another connection, our writer's included."""
        with self.reading():
            number = self._reader.pragma("data_version")
            return Version(number, number)

    async def describe(self) -> dict[str, str]:
        """What kind of database this is, and what its durability rests on."""
        return await self.look(lambda sql, _: self._described(sql))

    def _described(self, sql: Sql) -> dict[str, str]:
        def pragma(name: str) -> str:
            return str(sql.rows(f"pragma {name}")[0][0])

        kept = f"file {self.path}" if not self.in_memory else "the memory of this process"
        return {
            "database": f"SQLite {apsw.sqlite_lib_version()}, {kept}",
            "schema": pragma("user_version"),
            "durability": f"{self.durability}: journal_mode {pragma('journal_mode')}, synchronous {pragma('synchronous')}",
            "integrity": pragma("quick_check"),
        }

    @property
    def sql(self) -> TransactionSql:
        """The cursor of the write connection."""
        return self.connection.sql

    def beside_bytes(self) -> int:
        """Size of the write-ahead log."""
        return 0 if self.in_memory else wal_bytes(self.path)

    def in_transaction(self) -> bool:
        """Whether the write connection still has its transaction."""
        return self.connection.apsw.in_transaction

    def set_deadline(self, limit_us: int | None) -> None:
        """Interrupt the SQL of the write connection after so many microseconds; None: never."""
        self.connection.deadline_s = None if limit_us is None else time.monotonic() + limit_us / 1_000_000

    def translate(self, error: Exception) -> Exception:
        """apsw's error as one of ours."""
        return self.connection.translate(error)


def _told(error: Exception, sql: str) -> Exception:
    """A mistake in the user's SQL as one of our errors."""
    if isinstance(error, (apsw.SQLError, apsw.BindingsError)):
        return BadOption(f"the SQL {sql[:200]!r} cannot be run: {error}")
    return error
