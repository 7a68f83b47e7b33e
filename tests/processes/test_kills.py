"""Real processes, really killed: publishers and two workers on one file, and the checker of their histories."""

import asyncio
import fcntl
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from checker import Verdict, check, load
from crew import Crew, until
from history import History
from service import KEYS, make_app

SERVICE = Path(__file__).with_name("service.py")
EVENTS_PER_PUBLISHER = 50_000
KILL_EVERY_S = 1.0
pytestmark = [pytest.mark.processes, pytest.mark.timeout(280)]


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    crew = Crew(tmp_path, SERVICE, f"sqlite:///{tmp_path}/chaos.db?lease_s=2")
    yield crew
    crew.end()


def rows(crew: Crew, sql: str) -> list[tuple[str, int]]:
    # Another library's connection would be refused here, and harmful: this is the store's own.
    try:
        connection = apsw.Connection(str(crew.folder / "chaos.db"), flags=apsw.SQLITE_OPEN_READWRITE)
    except apsw.CantOpenError:
        return []
    connection.set_busy_timeout(10_000)
    try:
        return list(connection.execute(sql))
    except apsw.SQLError:  # its tables are not there yet
        return []
    finally:
        connection.close()


def stopped_between_transactions(crew: Crew, process: subprocess.Popen[bytes]) -> bool:
    """A process stopped inside a transaction stops everybody who writes: that is how SQLite is, and not looked at here."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    with (crew.folder / "chaos.db-lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process.send_signal(signal.SIGCONT)
            return False
    return True


def handled(crew: Crew) -> int:
    return sum(path.read_bytes().count(b'"key"') for path in crew.folder.glob("handle-*.jsonl"))


def finish(crew: Crew) -> None:
    """Let everything come to an end in this process, with fresh workers."""

    async def drain() -> None:
        app = make_app(crew.given[0], History(crew.folder, "handle"))
        async with app.running():
            await app.wait_idle(timeout="100s")
            assert list(await app.store.dead(None)) == []

    asyncio.run(drain())


def judge(crew: Crew) -> Verdict:
    history = load(crew.folder)
    history.effects = {name: rows(crew, f"select key, n from {name}") for name in ("effects", "echoes")}
    verdict = check(history)
    print(f"{len(history.stored)} stored, {len(history.handlings)} handled, {verdict.repeated} repeated", verdict.summary())
    assert verdict.is_clean, verdict.summary()
    return verdict


def test_killed_every_second(crew: Crew) -> None:
    """Publishers and two workers die every second over 100,000 events: nothing lost, nothing invented, every effect once."""
    chance = random.Random(7)
    publishers = [("publish", str(n), str(EVENTS_PER_PUBLISHER)) for n in range(2)]
    workers = [("work", "0"), ("work", "0.0")]
    for args in (*publishers, *workers):
        crew.start(*args)
    kills = 0
    wanted = len(publishers) * (EVENTS_PER_PUBLISHER // KEYS) * KEYS
    end = time.monotonic() + 90
    while time.monotonic() < end and (handled(crew) < wanted or len(list(crew.folder.glob("published-*"))) < 2):
        time.sleep(KILL_EVERY_S)
        alive = [args for args in crew.running if crew.running[args].poll() is None]
        left = [args for args in publishers if not (crew.folder / f"published-{args[1]}").exists()]
        for args in chance.sample(alive, min(2, len(alive))):
            if args[0] == "work" or args in left:
                crew.kill(args)
                kills += 1
                crew.start(*args)
    until(lambda: len(list(crew.folder.glob("published-*"))) == 2, "both publishers end by themselves")
    for args in workers:
        assert crew.kill(args, signal.SIGTERM) in (0, -signal.SIGTERM), crew.log("work")
    finish(crew)
    assert kills >= 5
    assert len(load(crew.folder).stored) == wanted >= 99_000
    judge(crew)


def test_a_stopped_worker_comes_back_as_a_zombie(crew: Crew) -> None:
    """A worker sleeps past its lease while another takes over; when it goes on, nothing of its own counts."""
    crew.start("publish", "0", "6400")
    zombie = crew.start("work", "0.002")
    until(lambda: handled(crew) > 200, "the first worker works")
    asleep = time.monotonic_ns()
    until(lambda: stopped_between_transactions(crew, zombie), "the first worker is stopped while it holds no lock")
    crew.start("work", "0.0")
    until(lambda: len(rows(crew, "select key, n from effects")) == 6400, "the second worker takes over")
    zombie.send_signal(signal.SIGCONT)
    crew.interrupted(asleep, zombie.pid)
    finish(crew)
    for args in list(crew.running):
        if args[0] == "work":
            assert crew.kill(args, signal.SIGTERM) == 0, crew.log("work")
    # A handler that was asleep in the middle ends when it wakes: beside its successor, which no lease can prevent.
    judge(crew)


def test_sigterm_is_graceful(crew: Crew) -> None:
    """SIGTERM: what has begun is finished and settled, exit 0, nothing is repeated and no attempt charged."""
    crew.start("publish", "0", "3200")
    crew.start("work", "0.005")
    until(lambda: handled(crew) > 100, "the worker works")
    assert crew.kill(("work", "0.005"), signal.SIGTERM) == 0, crew.log("work")
    assert rows(crew, "select key, attempt from trilogue_held where attempt > 1") == []
    until(lambda: (crew.folder / "published-0").exists(), "the publisher ends")
    finish(crew)
    assert judge(crew).repeated == {"plain": 0}


def test_a_second_signal_ends_at_once(crew: Crew) -> None:
    crew.start("publish", "0", "160")
    worker = crew.start("work", "30")
    until(lambda: len(rows(crew, "select key, n from echoes")) == 160, "the worker works")
    worker.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(1)
    assert crew.kill(("work", "30"), signal.SIGTERM) == 128 + signal.SIGTERM


# ── one process, in trouble ──────────────────────────────────────────────────────────────────────────────────────────


def run_child(script: str, folder: Path, *, expected: int = 0) -> str:
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1])\n" + script, str(SERVICE.parent)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == expected, ended.stderr
    return ended.stdout


FULL_DISK = """
import asyncio
from trilogue import App, Db, StorageFull
from service import Step
app = App("sqlite:///full.db")
@app.setup
def table(db: Db) -> None:
    db.execute("create table if not exists seen (n integer)")
@app.on(group="readers", start="beginning")
def see(e: Step, db: Db) -> None:
    db.execute("insert into seen values (?)", (e.n,))
async def main():
    stored, refused, n = set(), 0, 0
    async with app.running():
        limit = app.store._db.connection.apsw
        limit.pragma("max_page_count", limit.pragma("page_count") + 40)
        for n in range(0, 4_000, 20):
            results = await asyncio.gather(*(app.publish(Step("k" * 100, m)) for m in range(n, n + 20)), return_exceptions=True)
            for m, result in zip(range(n, n + 20), results):
                assert not isinstance(result, BaseException) or isinstance(result, StorageFull), result
                refused += isinstance(result, StorageFull)
                if not isinstance(result, BaseException):
                    stored.add(m)
        assert refused > 100, refused
        limit.pragma("max_page_count", 1_000_000_000)
        await app.publish(Step("k", n := 4_000))
        stored.add(4_000)
        await app.wait_idle(timeout="30s")
        seen = sorted(n for (n,) in await app.db("select n from seen"))
        assert seen == sorted(stored), (len(seen), len(stored))
    print("recovered")
asyncio.run(main())
"""


def test_a_full_disk_rejects_and_recovers(tmp_path: Path) -> None:
    """What is refused is certainly not stored, what was accepted is handled once there is room: without a restart."""
    assert "recovered" in run_child(FULL_DISK, tmp_path)


FILE_SIZE = """
import asyncio, resource, signal
from trilogue import App, LogError
from service import Step
async def main():
    app = App("sqlite:///limited.db")
    known, unknown = set(), set()
    async with app:
        await app.publish(Step("k", -1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
        for n in range(600):
            try:
                await app.publish(Step("k" * 400, n))
                known.add(n)
            except LogError as error:
                if error.stored is None:
                    unknown.add(n)
        assert len(known) < 600
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await app.publish(Step("k", 999))
        there = {app_n async for app_n in numbers(app)}
        assert known <= there, known - there
        assert there - known - unknown <= {-1, 999}, there - known - unknown
    print("recovered")
async def numbers(app):
    import json
    async for record in app.history():
        yield json.loads(record.data)["n"]
asyncio.run(main())
"""


def test_a_file_size_limit_is_survived(tmp_path: Path) -> None:
    """Writes that fail in the middle leave what was promised: stored is there, refused is not, unknown is one of both."""
    assert "recovered" in run_child(FILE_SIZE, tmp_path)


FORK = """
import asyncio, os
from trilogue import App, Unavailable
from service import Step
async def main():
    app = App("sqlite:///fork.db")
    async with app:
        await app.publish(Step("k", 1))
        pid = os.fork()
        if pid == 0:
            try:
                await app.publish(Step("k", 2))
            except Unavailable as error:
                os._exit(7 if "fork" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        await app.publish(Step("k", 3))
    print("recovered")
asyncio.run(main())
"""


def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    assert "recovered" in run_child(FORK, tmp_path)


SECOND_LIBRARY = """
import asyncio, os, sqlite3
from trilogue import App, BadOption
from service import Step
async def main():
    app = App("sqlite:///guarded.db")
    sqlite3.connect("other.db").close()
    async with app:
        await app.publish(Step("k", 1))
        os.link("guarded.db", "linked.db")
        for name in ("guarded.db", os.path.abspath("guarded.db"), "linked.db"):
            try:
                sqlite3.connect(name)
            except BadOption as error:
                assert "app.db(" in str(error)
            else:
                raise AssertionError(name)
        sqlite3.connect("other.db").close()
    sqlite3.connect("guarded.db").close()
    print("recovered")
asyncio.run(main())
"""


def test_a_second_sqlite_library_is_refused(tmp_path: Path) -> None:
    assert "recovered" in run_child(SECOND_LIBRARY, tmp_path)
