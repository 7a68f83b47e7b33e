"""One writer for one SQLite file: everything that changes it passes here, many changes to one fsync.

    submit ─┐
    submit ─┼─▶ queue ─▶ thread: lock file, BEGIN IMMEDIATE, SAVEPOINT each, COMMIT ─▶ all futures in one call
    submit ─┘
    submit ─▶ nothing else waits: the same on the spot, without the thread

A commit takes an fsync however much it holds, so what waits is committed together; and a thread hop costs as much as a
small commit, so a lone small change does not take one.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from trilogue.errors import TrilogueError, Unavailable

BATCH_ROWS = 1_000
BATCH_S = 0.020
QUEUE_ROWS = 100_000
INLINE_ROWS = 16

log = logging.getLogger("trilogue")


class Sql(Protocol):
    """The narrow cursor the algorithm is written over."""

    def rows(self, sql: str, values: Any = ()) -> list[Any]:
        """Run one statement; all its rows."""
        ...

    def many(self, sql: str, values: Any) -> int:
        """Run one statement once per row of values; how many rows it changed."""
        ...


class Connection(Protocol):
    """What the writer needs of a write connection."""

    @property
    def sql(self) -> Sql:
        """The cursor."""
        ...

    def begin(self, *, wait: bool) -> bool:
        """Take the write lock and begin; False if it is taken and `wait` is False."""
        ...

    def commit(self) -> None:
        """Make it durable."""
        ...

    def rollback(self) -> None:
        """Undo everything since begin()."""
        ...

    def translate(self, error: Exception, *, at_commit: bool = False) -> Exception:
        """The driver's error as one of ours."""
        ...


class Job:
    """A change: `run` inside a savepoint; its result or error resolves `future`. broke: called in the thread if it fails."""

    __slots__ = ("broke", "error", "future", "result", "rows", "run")

    def __init__(
        self, run: Callable[[Sql], Any], future: "asyncio.Future[Any]", rows: int, broke: Callable[[], None]
    ) -> None:
        self.run, self.future, self.rows, self.broke = run, future, rows, broke
        self.result: Any = None
        self.error: Exception | None = None


def _nothing() -> None:
    pass


class Writer:
    """The writer of one file; made and used on one event loop."""

    def __init__(self, connection: Connection, *, name: str) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[list[Job] | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._flushing = False
        self._queued = 0
        self._tick: tuple[float, Callable[[Sql], None]] | None = None
        self._thread = threading.Thread(target=self._work, name=f"trilogue-writer {name}", daemon=True)
        self._thread.start()
        self._closed = False

    def submit(
        self, run: Callable[[Sql], Any], *, rows: int = 1, broke: Callable[[], None] = _nothing
    ) -> "asyncio.Future[Any]":
        """Run a change and commit it; the future resolves when it is durable, or has failed alone.

        rows: about how many rows it writes; more than INLINE_ROWS always goes through the thread.
        Raises Unavailable when too much waits or the writer is closed.
        """
        if self._closed:
            raise Unavailable("the store is closed: open it before use, and finish before leaving its `async with`")
        if self._queued > QUEUE_ROWS:
            raise Unavailable(
                f"more than {QUEUE_ROWS} changes wait to be written: publish slower, or await each publish"
            )
        job = Job(run, self._loop.create_future(), rows, broke)
        self._waiting.append(job)
        self._queued += rows
        if not self._flushing:
            # At the end of this turn of the loop, so that everything the turn submits goes together.
            self._flushing = True
            self._loop.call_soon(self._flush)
        return job.future

    def every(self, seconds: float, run: Callable[[Sql], None]) -> None:
        """Run a change every so many seconds in the thread, even while the event loop is blocked."""
        self._tick = (seconds, run)
        self._queue.put([])

    def close(self) -> None:
        """Finish what was submitted, then end the thread. Blocks."""
        self._closed = True
        self._flush()
        self._queue.put(None)
        self._thread.join()

    def _flush(self) -> None:
        self._flushing = False
        jobs, self._waiting = self._waiting, []
        if not jobs:
            return
        lone = len(jobs) == 1 and jobs[0].rows <= INLINE_ROWS and self._queued == jobs[0].rows
        if lone and self._transact(jobs, wait=False):
            self._resolve(jobs)
        else:
            self._queue.put(jobs)

    def _resolve(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._queued -= job.rows
            if job.future.done():  # the caller was cancelled; the change stands
                continue
            if job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)

    # ── in the thread ────────────────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        next_tick = time.monotonic()
        while True:
            jobs = self._take(next_tick)
            if jobs is None:
                return
            while jobs:
                done = self._transact(_first(jobs), wait=True)
                self._loop.call_soon_threadsafe(self._resolve, jobs[:done])
                jobs = jobs[done:]
            if self._tick and time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self._tick[0]
                self._run_tick(self._tick[1])

    def _take(self, next_tick: float) -> list[Job] | None:
        """Everything that waits; an empty list when the tick is due; None to end."""
        try:
            jobs = self._queue.get(timeout=max(0.0, next_tick - time.monotonic()) if self._tick else None)
        except queue.Empty:
            return []
        while jobs is not None:
            try:
                more = self._queue.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self._queue.put(None)
                break
            jobs += more
        return jobs

    def _run_tick(self, run: Callable[[Sql], None]) -> None:
        job = Job(run, self._loop.create_future(), 0, _nothing)
        self._transact([job], wait=True)
        if job.error is not None:
            log.warning("renewing leases failed: %s", job.error)

    def _transact(self, jobs: list[Job], *, wait: bool) -> int:
        """Run and commit the first jobs, as many as fit in BATCH_S; returns how many now have a result or an error.

        0: the lock was taken and we did not wait.
        """
        connection = self._connection
        try:
            if not connection.begin(wait=wait):
                return 0
        except Exception as error:  # the driver's, whatever it is: it becomes the answer of every job
            return self._fail(jobs, connection.translate(error))
        began = time.monotonic()
        done = 0
        try:
            for job in jobs:
                self._run(job)
                done += 1
                if time.monotonic() - began > BATCH_S:
                    break
            connection.commit()
        except BaseException as error:
            connection.rollback()
            if not isinstance(error, Exception):
                raise
            return self._fail(jobs[:done] or jobs, connection.translate(error, at_commit=True))
        return done

    def _run(self, job: Job) -> None:
        sql = self._connection.sql
        sql.rows("savepoint job")
        try:
            job.result = job.run(sql)
            sql.rows("release job")
        except Exception as error:
            job.error = self._connection.translate(error)
            job.broke()
            if not isinstance(error, TrilogueError):
                log.debug("a change failed", exc_info=True)
            sql.rows("rollback to job")
            sql.rows("release job")

    def _fail(self, jobs: list[Job], error: Exception) -> int:
        for job in jobs:
            job.error = error
            job.broke()
        return len(jobs)


def _first(jobs: list[Job]) -> list[Job]:
    """The first jobs that together stay within BATCH_ROWS, at least one."""
    rows = 0
    for n, job in enumerate(jobs):
        rows += job.rows
        if rows > BATCH_ROWS and n:
            return jobs[:n]
    return jobs
