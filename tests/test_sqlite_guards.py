"""What can be wrong with a file, and the sentence that says how to mend it."""

import asyncio
import contextlib
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import pytest

from trilogue import App, BadOption, Db, Rejected, StorageFull, Unavailable, event
from trilogue.errors import OutcomeUnknown, TimedOut
from trilogue.stores import sqlite
from trilogue.stores.sqlite import NETWORK_FILE_SYSTEMS, SCHEMA_VERSION, check_place, file_system, translate


@event("video.watched", key="user")
@dataclass(frozen=True)
class Watched:
    user: str
    video: str = "v"


def run(main: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


def make(path: Path) -> None:
    """A store with one record."""

    async def main() -> None:
        async with App(f"sqlite:///{path}") as app:
            await app.publish(Watched("u"))

    run(main)


def refused(path: Path, error: type[Exception] = Unavailable) -> str:
    async def main() -> None:
        async with App(f"sqlite:///{path}"):
            pytest.fail("opened")

    with pytest.raises(error) as caught:
        run(main)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def raw(path: Path) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(path))
    try:
        yield connection
    finally:
        connection.close()


# ── whose file is it ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_file_of_another_application_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with raw(path) as other:
        other.execute("create table t (a); pragma application_id = 0x1234").fetchall()
    before = path.read_bytes()
    assert "belongs to another application (id 0x1234): use another file" in refused(path)
    with raw(path) as other:
        assert other.execute("select name from sqlite_master").fetchall() == [("t",)]
        assert other.execute("pragma application_id").fetchall() == [(0x1234,)]
    assert len(path.read_bytes()) == len(before)


def test_a_database_without_an_owner_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with raw(path) as other:
        other.execute("create table t (a)").fetchall()
    assert "is a database of another program: use a file of its own for trilogue" in refused(path)


def test_a_version_without_tables_is_somebodys(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with raw(path) as other:
        other.execute("pragma user_version = 7").fetchall()
    assert "is a database of another program" in refused(path)


def test_an_empty_file_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.touch()
    make(path)
    with raw(path) as store:
        assert store.execute("select count(*) from trilogue_records").fetchall() == [(1,)]


def test_a_newer_schema_asks_for_a_newer_program(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    make(path)
    with raw(path) as store:
        store.execute(f"pragma user_version = {SCHEMA_VERSION + 1}").fetchall()
    assert f"has schema {SCHEMA_VERSION + 1}, newer than this trilogue, which knows {SCHEMA_VERSION}: upgrade" in refused(path)


def test_a_refused_file_can_be_opened_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with raw(path) as other:
        other.execute("create table t (a)").fetchall()
    refused(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:  # not guarded: it never was ours
        assert connection.execute("select count(*) from t").fetchall() == [(0,)]


def test_a_broken_file_is_not_silently_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    make(path)
    data = bytearray(path.read_bytes())
    data[:16] = b"x" * 16
    path.write_bytes(data)
    assert "is no SQLite database" in refused(path)
    assert path.read_bytes() == bytes(data)


# ── where it lies ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_read_only_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.db"
    make(path)
    real = os.access
    for closed, sentence in (
        (path, "may not be read and written by this user"),
        (tmp_path, "may not be written: SQLite keeps files"),
    ):

        def access(asked: Any, mode: int, closed: Path = closed) -> bool:  # root may do anything, so it is acted
            return Path(asked) != closed and real(asked, mode)

        monkeypatch.setattr(os, "access", access)
        assert sentence in refused(path)
        assert "mend its permissions" in refused(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_folder_for_real(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    assert "may not be written" in refused(folder / "a.db")


def test_the_lock_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "a.db-lock").mkdir()
    assert "a.db-lock cannot be opened: Is a directory; mend the permissions of the folder" in refused(tmp_path / "a.db")


@pytest.mark.parametrize("kind", sorted(NETWORK_FILE_SYSTEMS))
def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(sqlite, "file_system", lambda folder: kind)
    assert f"is on a network file system ({kind}), where SQLite loses data: use a local disk" in refused(tmp_path / "a.db")
    assert os.listdir(tmp_path) == []


def test_the_file_system_is_read_from_the_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my disk").mkdir()
    escaped = str(tmp_path).replace(" ", "\\040")
    mounts = "\n".join(
        [
            "1 0 8:1 / / rw - ext4 /dev/sda1 rw",
            f"2 1 0:1 / {escaped} rw,relatime shared:1 - tmpfs tmpfs rw",
            f"3 1 0:2 / {escaped}/my\\040disk rw - nfs4 server:/x rw",
        ]
    )
    monkeypatch.setattr(Path, "read_text", lambda path: mounts)
    assert file_system(Path("/etc")) == "ext4"
    assert file_system(tmp_path) == "tmpfs"
    assert file_system(tmp_path / "my disk") == "nfs4"
    assert file_system(tmp_path / "my diskette") == "tmpfs"


def test_a_machine_that_does_not_tell_its_mounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_such_file(path: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", no_such_file)
    assert file_system(tmp_path) == ""
    assert check_place(f"{tmp_path}/a.db") == f"{tmp_path}/a.db"


def test_the_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    make(tmp_path / "a.db")
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}


# ── a second SQLite library ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_sqlite3_module_may_not_open_our_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a b.db"
    (tmp_path / "link.db").symlink_to(path)
    sentence = r"is open as a trilogue store in this process: .* lose committed data; .* `await app.db\(sql\)`"

    async def main() -> None:
        async with App(f"sqlite:///{tmp_path}/a%20b.db"):
            for name in (str(path), path, bytes(path), "a b.db", "./a b.db", "link.db"):
                with pytest.raises(BadOption, match=sentence):
                    sqlite3.connect(name)
            for uri in (f"file:{path}", "file:a%20b.db?mode=ro", f"file://{path}?immutable=1", f"file://localhost{path}"):
                with pytest.raises(BadOption, match=sentence):
                    sqlite3.connect(uri, uri=True)
            with contextlib.closing(sqlite3.connect(tmp_path / "other.db")), contextlib.closing(sqlite3.connect(":memory:")):
                pass

    run(main)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("select count(*) from trilogue_records").fetchall() == [(0,)]


def test_the_guard_ends_with_the_last_store_even_if_the_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    async def main() -> None:
        async with App(f"sqlite:///{path}"), App(f"sqlite:///{path}"):
            path.unlink()

    counts = dict(sqlite.OpenFiles._counts)
    run(main)
    assert sqlite.OpenFiles._counts == counts


# ── a slow reader ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_slow_reader_is_named_before_the_disk_is_full_and_then_it_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "a.db"
        app = App(f"sqlite:///{path}?wal_bytes=1048576")
        async with app:
            await app.publish(Watched("u"))
            reader = apsw.Connection(str(path))
            reader.execute("begin; select count(*) from trilogue_records").fetchall()
            stored = 1
            full: StorageFull | None = None
            while full is None:
                try:
                    stored = (await app.publish(Watched("u", "x" * 20_000))).position or 0
                except StorageFull as error:
                    full = error
            assert re.search(r"log of .*a.db has \d+ MiB \(limit 1 MiB\).*reader keeps an old snapshot open: end", str(full))
            for _ in range(40):  # not now and then, but every time
                with pytest.raises(StorageFull):
                    await app.publish(Watched("u"))
            size = os.stat(f"{path}-wal").st_size
            assert size < 4 << 20
            assert len([r async for r in app.history()]) == stored  # reading goes on
            reader.close()
            receipt = await app.publish(Watched("after"))
            assert receipt.position == stored + 1
            assert os.stat(f"{path}-wal").st_size < size

    run(main)


# ── errors of the driver ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "at_commit", "becomes", "sentence"),
    [
        (
            apsw.FullError(),
            False,
            StorageFull,
            "no room to write f.db: free some disk space and try again; nothing of this was stored",
        ),
        (apsw.FullError(), True, StorageFull, "free some disk space"),
        (apsw.ReadOnlyError(), False, Rejected, "check the permissions of the file and of its folder"),
        (apsw.BusyError(), False, Unavailable, "locked by another program for over 10 s: end its transaction"),
        (apsw.InterruptError(), False, TimedOut, "raise db_limit= of the handler"),
        (apsw.IOError(), False, Unavailable, "check the disk"),
        (apsw.IOError(), True, OutcomeUnknown, "may or may not be stored, repeating it with the same id is harmless"),
        (apsw.CantOpenError(), False, Unavailable, "check the disk"),
        (apsw.CorruptError(), False, Unavailable, "check the disk"),
        (apsw.NotADBError(), False, Unavailable, "f.db is no SQLite database: use another file"),
    ],
)
def test_errors_of_the_driver_become_ours(error: Exception, at_commit: bool, becomes: type, sentence: str) -> None:
    made = translate(error, "f.db", at_commit=at_commit)
    assert type(made) is becomes
    assert sentence in str(made)


def test_other_errors_stay_what_they_are() -> None:
    for error in (ValueError("x"), Unavailable("x"), apsw.SQLError("no such table: x")):
        assert translate(error, "f.db") is error


def test_a_transaction_of_another_program_is_waited_for_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_MS", 20)

    async def main() -> None:
        path = tmp_path / "a.db"
        async with App(f"sqlite:///{path}") as app:
            other = apsw.Connection(str(path))
            other.set_busy_timeout(10_000)  # the app's own housekeeping may be writing
            other.execute("begin immediate").fetchall()
            with pytest.raises(Unavailable, match="is locked by another program"):
                await app.publish(Watched("u"))
            other.execute("rollback").fetchall()
            assert (await app.publish(Watched("u"))).position == 1
            other.close()

    run(main)


def test_many_may_make_a_file_at_once(tmp_path: Path) -> None:
    """SQLite tells some of them "busy" at once when they all switch to write-ahead logging."""
    together = threading.Barrier(8)

    def make_it(path: str) -> None:
        together.wait()
        sqlite.connect(path).close()

    with ThreadPoolExecutor(8) as threads:
        for n in range(100):
            assert list(threads.map(make_it, [f"{tmp_path}/{n}.db"] * 8)) == [None] * 8


def test_a_full_file_is_refused_and_recovers(tmp_path: Path) -> None:
    async def main() -> None:
        app = App(f"sqlite:///{tmp_path}/a.db")

        @app.setup
        def tables(db: Db) -> None:
            db.execute("create table t (a)")

        async with app:
            store: Any = app.store
            connection = store._db.connection.apsw
            await app.publish(Watched("u"))
            connection.pragma("max_page_count", connection.pragma("page_count") + 4)
            outcomes = await asyncio.gather(*(app.publish(Watched("u", "x" * 5_000)) for _ in range(50)), return_exceptions=True)
            assert {type(o) for o in outcomes if isinstance(o, BaseException)} == {StorageFull}
            connection.pragma("max_page_count", 1_000_000)
            stored = sum(1 for o in outcomes if not isinstance(o, BaseException))
            assert (await app.publish(Watched("u"))).position == 2 + stored

    run(main)
