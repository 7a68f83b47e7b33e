"""The one writer: what waits is committed together, a change fails alone, a failing commit fails all of it and nothing else."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import apsw
import pytest

from trilogue import Conflict, OutcomeUnknown, StorageFull, Unavailable
from trilogue.stores import writer as module
from trilogue.stores.dialect import SQLITE
from trilogue.stores.sqlite import SqliteConnection, translate
from trilogue.stores.writer import Again, Sql, Writer


class Recorder:
    """A connection that writes down what is done to it, and fails where it is told."""

    appends_last = False
    dialect = SQLITE

    def __init__(self) -> None:
        self.sql = self
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.fail: dict[str, list[Exception]] = {}
        self.taken = False
        self.free = threading.Event()
        self.free.set()

    def rows(self, sql: str, values: Any = ()) -> list[Any]:
        self._do(sql)
        return []

    def many(self, sql: str, values: Any) -> int:
        self._do(sql)
        return 0

    def begin(self, *, wait: bool) -> bool:
        if not wait and self.taken:
            return False
        if wait:
            assert self.free.wait(30)
        self._do("begin")
        return True

    def commit(self) -> None:
        self._do("commit")

    def rollback(self) -> None:
        self._do("rollback")

    def translate(self, error: Exception, *, at_commit: bool = False) -> Exception:
        return translate(error, "f.db", at_commit=at_commit)

    def _do(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)
        if self.fail.get(call):
            raise self.fail[call].pop(0)

    def count(self, call: str) -> int:
        return self.calls.count(call)


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, no transaction ends for want of time."""
    monkeypatch.setattr(module, "BATCH_S", 3600.0)


def run(main: Callable[[Writer, Recorder], Coroutine[Any, Any, None]]) -> Recorder:
    connection = Recorder()

    async def with_writer() -> None:
        writer = Writer(connection, name="test")
        try:
            await asyncio.wait_for(main(writer, connection), 30)
        finally:
            connection.free.set()
            await writer.close()

    asyncio.run(with_writer())
    return connection


def step(name: str) -> Callable[[Sql], str]:
    def work(sql: Sql) -> str:
        sql.rows(name)
        return name

    return work


def failing(error: Exception) -> Callable[[Sql], None]:
    def work(sql: Sql) -> None:
        raise error

    return work


async def outcomes(*futures: Awaitable[Any]) -> list[Any]:
    return list(await asyncio.gather(*futures, return_exceptions=True))


# ── what goes together ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lone_change_is_written_on_the_spot() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        assert await writer.submit(step("a")) == "a"

    connection = run(main)
    assert connection.calls == ["begin", "a", "commit"]
    assert connection.threads == {"MainThread"}


def test_what_one_turn_submits_is_one_commit_in_order() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        done = await outcomes(*(writer.submit(step(str(n))) for n in range(300)))
        assert done == [str(n) for n in range(300)]

    connection = run(main)
    assert connection.count("commit") == 1
    assert [call for call in connection.calls if call.isdigit()] == [str(n) for n in range(300)]


def test_much_goes_through_the_thread() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        await writer.submit(step("a"), rows=module.INLINE_ROWS + 1)

    assert run(main).threads == {"trilogue-writer test"}


def test_a_transaction_has_a_thousand_rows_at_most() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        await outcomes(*(writer.submit(step("a"), rows=400) for _ in range(6)))

    connection = run(main)
    assert connection.count("commit") == 3
    assert connection.count("a") == 6


def test_one_change_may_have_more() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        assert await writer.submit(step("a"), rows=5_000) == "a"

    run(main)


def test_a_transaction_does_not_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_S", -1.0)  # any time is too long

    async def main(writer: Writer, connection: Recorder) -> None:
        assert await outcomes(*(writer.submit(step(str(n))) for n in range(10))) == [str(n) for n in range(10)]

    assert run(main).count("commit") == 10


def test_what_comes_while_the_thread_writes_waits_for_it_and_goes_together() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        connection.free.clear()
        first = writer.submit(step("slow"), rows=1_000)
        await asyncio.sleep(0)
        rest = [writer.submit(step(str(n))) for n in range(20)]
        await asyncio.sleep(0)
        connection.free.set()
        assert await outcomes(first, *rest) == ["slow", *map(str, range(20))]

    connection = run(main)
    assert connection.count("commit") == 2
    assert [call for call in connection.calls if call.isdigit()] == [str(n) for n in range(20)]


def test_a_taken_lock_does_not_hold_up_the_loop() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        connection.taken = True
        connection.free.clear()
        future = writer.submit(step("a"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not future.done()
        connection.free.set()
        assert await future == "a"

    assert run(main).threads == {"trilogue-writer test"}


def test_merged_changes_are_collected_to_the_end_of_the_turn() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        collected: list[str] = []
        done = asyncio.Event()

        def post_all() -> None:
            writer.post(step("+".join(collected)), lambda result, error: done.set(), rows=1, broke=lambda: None)

        writer.merge(post_all)
        collected += ["a", "b"]
        await done.wait()

    assert run(main).calls == ["begin", "a+b", "commit"]


# ── what fails ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_change_fails_alone() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        broke: list[int] = []
        good, bad, other = await outcomes(
            writer.submit(step("a")),
            writer.submit(failing(Conflict("no")), broke=lambda: broke.append(1)),
            writer.submit(step("b")),
        )
        assert (good, other) == ("a", "b")
        assert isinstance(bad, Conflict)
        assert broke == [1]

    connection = run(main)
    assert connection.count("rollback to job") == 1
    assert connection.count("commit") == 1


def test_a_lone_change_that_fails_is_undone() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        broke: list[int] = []
        with pytest.raises(ValueError, match="no"):
            await writer.submit(failing(ValueError("no")), broke=lambda: broke.append(1))
        assert broke == [1]
        assert await writer.submit(step("next")) == "next"

    assert run(main).calls == ["begin", "rollback", "begin", "next", "commit"]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("error", "becomes"), [(apsw.IOError(), OutcomeUnknown), (apsw.FullError(), StorageFull)])
def test_a_failing_commit_fails_all_of_it_and_nothing_after(count: int, error: Exception, becomes: type) -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        connection.fail["commit"] = [error]
        broke: list[int] = []
        failed = await outcomes(*(writer.submit(step("a"), broke=lambda: broke.append(1)) for _ in range(count)))
        assert {type(o) for o in failed} == {becomes}
        assert len(broke) == count
        assert await writer.submit(step("next")) == "next"

    assert run(main).count("rollback") == 1


def test_a_begin_that_fails_fails_what_waited() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        connection.fail["begin"] = [apsw.BusyError()]
        assert {type(o) for o in await outcomes(*(writer.submit(step("a")) for _ in range(3)))} == {Unavailable}
        assert await writer.submit(step("next")) == "next"

    assert run(main).calls == ["begin", "begin", "next", "commit"]


def test_a_lost_transaction_is_told_by_its_cause_and_not_by_the_lost_savepoint() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        connection.fail["rollback to job"] = [apsw.SQLError("no such savepoint: job")]
        failed = await outcomes(writer.submit(step("a")), writer.submit(failing(apsw.FullError())), writer.submit(step("b")))
        assert {type(o) for o in failed} == {StorageFull}
        assert await writer.submit(step("next")) == "next"

    run(main)


def test_a_change_may_ask_for_another_run_of_all() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        asked: list[int] = []

        def once(sql: Sql) -> str:
            if not asked:
                asked.append(1)
                raise Again
            return "second"

        assert await outcomes(writer.submit(step("a")), writer.submit(once), writer.submit(step("b"))) == ["a", "second", "b"]

    connection = run(main)
    assert connection.count("rollback") == 1
    assert connection.count("commit") == 1


def test_an_error_of_a_run_that_was_undone_is_not_told() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        runs: list[str] = []

        def fails_at_first(sql: Sql) -> str:
            runs.append("fails")
            if len(runs) == 1:
                raise ValueError("no")
            return "second"

        def finish(result: Any, error: Exception | None) -> None:
            done.append((result, error))

        def much() -> None:
            writer.post(step("much"), finish, rows=900, broke=lambda: None)
            loop.call_soon(is_queued.set)

        def once(sql: Sql) -> None:
            if "again" not in runs:
                runs.append("again")
                loop.call_soon_threadsafe(much)  # so that the first one is alone next time
                assert is_queued.wait(30)
                raise Again

        done: list[Any] = []
        loop, is_queued = asyncio.get_running_loop(), threading.Event()
        writer.post(fails_at_first, finish, rows=500, broke=lambda: None, is_append=True)
        writer.post(once, finish, rows=100, broke=lambda: None)
        while len(done) < 3:
            await asyncio.sleep(0.001)
        assert (runs, done) == (["fails", "again", "fails"], [(None, None), ("much", None), ("second", None)])

    run(main)


def test_a_caller_who_went_away_harms_nobody() -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        gone = writer.submit(step("gone"))
        stays = writer.submit(step("stays"))
        gone.cancel()
        assert await stays == "stays"

    assert {"gone", "stays"} <= set(run(main).calls)


def test_too_much_waiting_is_refused_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_ROWS", 1_500)

    async def main(writer: Writer, connection: Recorder) -> None:
        connection.free.clear()
        waiting = [writer.submit(step("a"), rows=1_000) for _ in range(2)]
        with pytest.raises(Unavailable, match="more than 1500 changes wait to be written: publish slower, or await each publish"):
            writer.post(step("b"), lambda _result, _error: None, rows=1, broke=lambda: None, is_append=True)
        settling = writer.submit(step("c"))  # what has been handled is always taken
        connection.free.set()
        await outcomes(*waiting, settling)
        assert await writer.submit(step("b")) == "b"

    run(main)


@pytest.mark.parametrize("error", [SystemExit("out"), StopIteration(), KeyboardInterrupt()], ids=repr)
def test_what_the_users_code_raises_never_ends_the_writer(error: BaseException) -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        def fail(_: Sql) -> None:
            raise error

        for rows in (1, 1_000):  # on the spot, and in the thread
            with pytest.raises(RuntimeError, match=type(error).__name__):
                await writer.submit(fail, rows=rows)
            assert await writer.submit(step("b"), rows=rows) == "b"

    run(main)


# ── regular changes, the end ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_regular_change_goes_on_while_the_loop_is_blocked_and_after_it_failed(caplog: pytest.LogCaptureFixture) -> None:
    async def main(writer: Writer, connection: Recorder) -> None:
        twice = threading.Semaphore(0)
        errors: list[Exception] = [ValueError("once")]

        def renew(sql: Sql) -> None:
            twice.release()
            if errors:
                raise errors.pop()

        writer.every(0.001, renew)
        for _ in range(3):
            assert twice.acquire(timeout=30)  # this blocks the loop

    run(main)
    assert [record.getMessage() for record in caplog.records] == ["renewing leases failed: once"]


def test_closing_finishes_what_was_submitted() -> None:
    connection = Recorder()

    async def main() -> None:
        writer = Writer(connection, name="test")
        futures = [writer.submit(step(str(n)), rows=600) for n in range(10)]
        await writer.close()
        await asyncio.sleep(0)
        assert [future.result() for future in futures] == [str(n) for n in range(10)]
        with pytest.raises(Unavailable, match="the store is closed: open it before use"):
            writer.submit(step("late"))

    before = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() == before


# ── on a real file ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_after_a_failing_rollback_the_connection_is_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        connection = SqliteConnection(f"{tmp_path}/a.db")
        writer = Writer(connection, name="test")
        await writer.submit(lambda sql: sql.rows("create table t (a)"))
        old = connection.apsw

        def broken(sql: Sql) -> None:
            sql.rows("insert into t values (1)")
            old.close(True)  # whatever happened to it

        with pytest.raises(apsw.Error):
            await writer.submit(broken)
        assert await writer.submit(lambda sql: sql.rows("select count(*) from t")) == [(0,)]
        assert connection.apsw is not old
        await writer.close()
        connection.close()

    asyncio.run(main())


def test_a_file_that_cannot_be_opened_again_is_tried_again_later(tmp_path: Path) -> None:
    async def main() -> None:
        connection = SqliteConnection(f"{tmp_path}/a.db")
        writer = Writer(connection, name="test")
        await writer.submit(lambda sql: sql.rows("create table t (a)"))
        folder, away = tmp_path, tmp_path.with_name(tmp_path.name + "-away")
        with pytest.raises(apsw.Error):
            await writer.submit(lambda sql: connection.apsw.close(True))
        folder.rename(away)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await writer.submit(lambda sql: sql.rows("select 1"))
        away.rename(folder)
        assert await writer.submit(lambda sql: sql.rows("select count(*) from t")) == [(0,)]
        await writer.close()
        connection.close()

    asyncio.run(main())
