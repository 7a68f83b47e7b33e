"""One writer for one SQLite file: everything that changes it passes here, many changes to one fsync.

    submit ─┐
    submit ─┼─▶ queue ─▶ thread: lock file, BEGIN IMMEDIATE, SAVEPOINT each, COMMIT ─▶ all futures in one call
    submit ─┘
    submit ─▶ little waits, the thread is idle and the disk is fast: the same on the spot, without the thread

A commit takes an fsync however much it holds, so what waits is committed together; and two thread hops cost as much as a
small commit, so little does not take them. Where an fsync takes long, only the thread waits for it.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from trilogue.errors import TrilogueError, Unavailable
from trilogue.stores.dialect import Sql

T = TypeVar("T")
BATCH_ROWS = 1_000
BATCH_S = 0.020
QUEUE_ROWS = 100_000
INLINE_ROWS = 128
INLINE_S = 0.002

log = logging.getLogger("trilogue")


class Connection(Protocol):
    """What the writer needs of a write connection."""

    appends_last: bool  # whether appending locks others out until the commit, and effects do not

    @property
    def sql(self) -> Sql:
        """The cursor."""
        ...

    def begin(self, *, wait: bool) -> bool:
        """Take the write lock and begin; False if it is taken and `wait` is False."""
        ...

    def at_once(self, change: Callable[[Sql], T | None]) -> T | None:
        """Run a change of one statement, which commits itself; None if that is not possible now."""
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
    """A change: `run` inside a savepoint; then `finish` on the loop. broke: called where it failed, maybe in the thread.

    at_once: the same as one statement outside of any transaction, if that is possible; None if nothing was changed.
    """

    __slots__ = ("at_once", "broke", "error", "finish", "is_append", "result", "rows", "run")

    def __init__(
        self,
        run: "Change",
        finish: "Finish",
        rows: int,
        broke: Callable[[], None],
        *,
        is_append: bool = False,
        at_once: "Change | None" = None,
    ) -> None:
        self.run, self.finish, self.rows, self.broke, self.is_append = run, finish, rows, broke, is_append
        self.at_once = at_once
        self.result: Any = None
        self.error: Exception | None = None


Change = Callable[[Sql], Any]
Finish = Callable[[Any, Exception | None], None]


class Again(Exception):
    """Raised by a change that lost the whole transaction and will not do so twice: everything in it is run once more."""


def _nothing() -> None:
    pass


class Writer:
    """The writer of one file; made and used on one event loop.

    undone: called, maybe in the thread, when a whole transaction was undone: what was remembered of the file may not be true.
    """

    def __init__(self, connection: Connection, *, name: str, undone: Callable[[], None] = _nothing) -> None:
        self._connection = connection
        self._undone = undone
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[list[Job] | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._merges: list[Callable[[], None]] = []
        self._flushing = False
        self._queued = 0
        self._commit_s = 0.0
        self._tick: tuple[float, Callable[[Sql], None]] | None = None
        self._thread = threading.Thread(target=self._work, name=f"trilogue-writer {name}", daemon=True)
        self._thread.start()
        self._closed = False

    def submit(self, run: Callable[[Sql], Any], *, rows: int = 1, broke: Callable[[], None] = _nothing) -> "asyncio.Future[Any]":
        """Run a change and commit it; the future resolves when it is durable, or has failed alone.

        rows: about how many rows it writes; more than INLINE_ROWS always goes through the thread.
        Raises Unavailable when too much waits or the writer is closed.
        """
        future = self.future()

        def finish(result: Any, error: Exception | None) -> None:
            if future.done():  # the caller was cancelled; the change stands
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.post(run, finish, rows=rows, broke=broke)
        return future

    def future(self) -> "asyncio.Future[Any]":
        """A future of the writer's loop, for resolve()."""
        return self._loop.create_future()

    def post(
        self,
        run: Callable[[Sql], Any],
        finish: Finish,
        *,
        rows: int,
        broke: Callable[[], None] = _nothing,
        is_append: bool = False,
        at_once: Change | None = None,
    ) -> None:
        """submit() with a call of one's own at the end, finish(result, error), instead of a future.

        is_append: independent of all other changes, and may be committed before those that were submitted earlier.
        at_once: as of Job.
        """
        if self._closed:
            raise Unavailable("the store is closed: open it before use, and finish before leaving its `async with`")
        if is_append and self._queued > QUEUE_ROWS:
            raise Unavailable(f"more than {QUEUE_ROWS} changes wait to be written: publish slower, or await each publish")
        self._waiting.append(Job(run, finish, rows, broke, is_append=is_append, at_once=at_once))
        self._queued += rows
        self._soon()

    def merge(self, post_all: Callable[[], None]) -> None:
        """Call `post_all` at the end of this turn of the loop: it posts everything the turn has collected as one change."""
        self._merges.append(post_all)
        self._soon()

    def _soon(self) -> None:
        # At the end of this turn of the loop, so that everything the turn submits goes together.
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def every(self, seconds: float, run: Callable[[Sql], None]) -> None:
        """Run a change every so many seconds in the thread, even while the event loop is blocked."""
        self._tick = (seconds, run)
        self._queue.put([])

    async def close(self) -> None:
        """Finish what was submitted, then end the thread."""
        self._flush()
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _flush(self) -> None:
        merges, self._merges = self._merges, []
        for post_all in merges:
            post_all()
        self._flushing = False
        jobs, self._waiting = self._waiting, []
        if not jobs:
            return
        rows = sum(job.rows for job in jobs)
        done = 0
        if rows <= INLINE_ROWS and self._queued == rows and self._commit_s < INLINE_S:
            done = self._transact(jobs, wait=False)
            self._resolve(jobs[:done])
        if done < len(jobs):
            self._queue.put(jobs[done:])

    def _resolve(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._queued -= job.rows
            job.finish(job.result, job.error)

    # ── in the thread ────────────────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        waiting: list[Job] = []
        next_tick = time.monotonic()
        ends, appends_first = False, True
        while waiting or not ends:
            ends = self._take(waiting, next_tick) or ends
            if waiting:
                # In turns: a publish does not wait for all the effects that are queued, nor do they for a busy publisher.
                waiting.sort(key=lambda job: job.is_append != appends_first)
                appends_first = not appends_first
                first = _first(waiting)
                if self._connection.appends_last:
                    waiting[: len(first)] = first = sorted(first, key=lambda job: job.is_append)
                done = self._transact(first, wait=True)
                self._loop.call_soon_threadsafe(self._resolve, waiting[:done])
                del waiting[:done]
            if self._tick and time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self._tick[0]
                self._run_tick(self._tick[1])

    def _take(self, waiting: list[Job], next_tick: float) -> bool:
        """Add all that was queued, waiting for some if there is none until the tick is due; True to end."""
        timeout = max(0.0, next_tick - time.monotonic()) if self._tick else None
        try:
            jobs = self._queue.get(block=not waiting, timeout=timeout)
            while jobs is not None:
                waiting += jobs
                jobs = self._queue.get_nowait()
        except queue.Empty:
            return False
        return True

    def _run_tick(self, run: Callable[[Sql], None]) -> None:
        job = Job(run, lambda _result, _error: None, 0, _nothing)
        self._transact([job], wait=True)
        if job.error is not None:
            log.warning("renewing leases failed: %s", job.error)

    def _transact(self, jobs: list[Job], *, wait: bool) -> int:
        """Run and commit the first jobs, as many as fit in BATCH_S; returns how many now have a result or an error.

        0: none, call again: the lock was taken and we did not wait, or a change asked for it.
        """
        connection = self._connection
        if wait and len(jobs) == 1 and jobs[0].at_once is not None and self._at_once(jobs[0], jobs[0].at_once):
            return 1
        try:
            if not connection.begin(wait=wait):
                return 0
        except Exception as error:  # the driver's, whatever it is: it becomes the answer of every job
            return self._fail(jobs, connection.translate(error))
        began = time.monotonic()
        done = 0
        try:
            if len(jobs) == 1:
                jobs[0].error = None  # of a run that was undone
                jobs[0].result = jobs[0].run(connection.sql)
                done = 1
            else:
                done = self._run_all(jobs, began + BATCH_S)
            ready = time.monotonic()
            connection.commit()
            self._commit_s += (time.monotonic() - ready - self._commit_s) / 8
        except Again:
            connection.rollback()
            self._undone()
            return 0
        except BaseException as error:
            connection.rollback()
            self._undone()
            told = connection.translate(answerable(error), at_commit=done > 0)
            return 0 if isinstance(told, Again) else self._fail(jobs[:done] or jobs, told)
        return done

    def _at_once(self, job: Job, change: Change) -> bool:
        """Whether a job that is alone has its answer already, without a transaction around it."""
        job.error = None
        try:
            job.result = self._connection.at_once(change)
        except Exception as error:
            self._undone()
            told = self._connection.translate(error, at_commit=True)  # its statement is its commit
            return not isinstance(told, Again) and bool(self._fail([job], told))
        return job.result is not None

    def _run_all(self, jobs: list[Job], until: float) -> int:
        """Run several jobs, each in a savepoint; how many, the rest having no time left in this transaction."""
        for n, job in enumerate(jobs, 1):
            self._run(job)
            if time.monotonic() > until:
                return n
        return len(jobs)

    def _run(self, job: Job) -> None:
        sql = self._connection.sql
        job.error = None
        sql.rows("savepoint job")
        try:
            job.result = job.run(sql)
            sql.rows("release job")
        except Again:
            raise
        except BaseException as error:
            job.error = self._connection.translate(answerable(error))
            if isinstance(job.error, Again):  # it lost against another transaction
                raise job.error from error
            job.broke()
            if not isinstance(error, TrilogueError):
                log.debug("a change failed", exc_info=True)
            try:
                sql.rows("rollback to job")
                sql.rows("release job")
            except Exception:  # SQLite has undone the whole transaction: a full disk, an I/O error
                raise error from None

    def _fail(self, jobs: list[Job], error: Exception) -> int:
        for job in jobs:
            job.error = error
            job.broke()
        return len(jobs)


def resolve(future: "asyncio.Future[Any]", outcome: Any) -> None:
    """Give a future its result, or the error; nothing happens if whoever waited was cancelled."""
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def answerable(error: BaseException) -> Exception:
    """An error that a future can hold: a SystemExit or StopIteration of the user's code must not end the writer."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"{type(error).__qualname__}: {error}")


def _first(jobs: list[Job]) -> list[Job]:
    """The first jobs that together stay within BATCH_ROWS, at least one."""
    rows = 0
    for n, job in enumerate(jobs):
        rows += job.rows
        if rows > BATCH_ROWS and n:
            return jobs[:n]
    return jobs
