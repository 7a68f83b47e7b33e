"""SQLite as a store: the file, its connections, and everything that can be wrong with them.

    video.db         the log and all that belongs to it; WAL mode, synchronous=FULL: a commit survives power loss
    video.db-wal     commits not yet moved into the file
    video.db-lock    held (flock) by whoever writes: processes queue here instead of sleeping in SQLite's busy loop

One connection writes (behind stores/writer.py), one reads. `memory://` is the same with one private database for both.
The SQLite library is the one bundled with apsw, because releases 3.7.0 to 3.51.2 can corrupt a WAL file when a checkpoint
meets a commit (https://sqlite.org/wal.html#walresetbug), and distributions ship those.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import apsw

from trilogue.errors import BadOption, OutcomeUnknown, Rejected, StorageFull, TimedOut, TrilogueError, Unavailable
from trilogue.stores.dialect import SQLITE

try:
    import fcntl
except ImportError:  # Windows: no flock, SQLite's own locks must do
    fcntl = None  # type: ignore[assignment]

APPLICATION_ID = 0x7472696C  # "tril"
SCHEMA_VERSION = 3
BUSY_MS = 10_000
BUSY_AGAIN_S = 0.01
WAL_PAGES = 4_000
WAL_BYTES = 4 << 30
STEPS_PER_CHECK = 20_000
BEGINS_PER_WAL_CHECK = 16
NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb",
    "smb2",
    "smb3",
    "9p",
    "afs",
    "ceph",
    "glusterfs",
    "lustre",
    "fuse.sshfs",
}


class _Forks:
    """How often this process was forked off another: asked at every look, and a system call would cost more than the look."""

    count = 0

    @classmethod
    def note(cls) -> None:
        cls.count += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Forks.note)


class ApswSql:
    """stores.dialect.Sql over apsw."""

    dialect = SQLITE

    @property
    def user(self) -> "ApswSql":
        """The same for the user's own SQL."""
        return self

    def __init__(self, connection: apsw.Connection) -> None:
        self.attach(connection)

    def attach(self, connection: apsw.Connection) -> None:
        """Go on with a new connection."""
        self._connection = connection
        # One cursor for all: every statement is finished, its rows fetched, before the next begins.
        self._cursor = connection.cursor()

    def rows(self, sql: str, values: Any = ()) -> list[Any]:
        """Run one statement; all its rows."""
        return self._cursor.execute(sql, values).fetchall()

    def many(self, sql: str, values: Any) -> int:
        """Run one statement once per row of values; how many rows it changed."""
        before = self._connection.total_changes()
        self._cursor.executemany(sql, values)
        return self._connection.total_changes() - before

    def in_transaction(self) -> bool:
        """Whether there is a transaction, begun and not undone."""
        return self._connection.in_transaction

    def check(self) -> None:
        """Nothing: a statement that fails undoes itself, or everything."""


class SqliteConnection:
    """The write connection: stores.writer.Connection over apsw and the lock file."""

    appends_last = False  # nobody else writes meanwhile anyway

    def __init__(self, path: str, *, wal_bytes: int = WAL_BYTES) -> None:
        self.path = path
        self.deadline_s: float | None = None
        self._wal_bytes = wal_bytes
        self._begun = -1
        self._is_broken = False
        self._forks = _Forks.count
        self._turn = threading.Lock()
        self._lock_file = None if path == ":memory:" else _open_lock(path)
        self._open()
        self.sql = ApswSql(self.apsw)

    def _open(self) -> None:
        self.apsw = connect(self.path)
        self.apsw.set_progress_handler(self._past_deadline, STEPS_PER_CHECK)

    def _past_deadline(self) -> bool:
        return self.deadline_s is not None and time.monotonic() > self.deadline_s

    def begin(self, *, wait: bool) -> bool:
        """Take this process's turn, then the file's lock, then SQLite's."""
        self.check_fork()
        if not self._turn.acquire(blocking=wait):
            return False
        try:
            if not self._flock(wait):
                self._turn.release()
                return False
            if self._is_broken:
                self._reopen()
            self._begun += 1
            if self._begun % BEGINS_PER_WAL_CHECK == 0:
                self._check_wal()
            self.sql.rows("begin immediate")
        except BaseException:
            self._funlock()
            self._turn.release()
            raise
        return True

    def at_once(self, _change: object) -> None:
        """None: a transaction costs nothing here but its commit."""

    def commit(self) -> None:
        """Make it durable and let the next one write."""
        try:
            self.sql.rows("commit")
        except apsw.IOError:
            self._is_broken = self.path != ":memory:"  # a failed fsync must never be tried again on the same handle
            raise
        self._funlock()
        self._turn.release()

    def rollback(self) -> None:
        """Undo everything since begin(); if that fails, the next begin() is on a new connection."""
        try:
            # A full disk may have rolled back already; a failed fsync must never be retried on the same handle.
            if self.apsw.in_transaction:
                self.sql.rows("rollback")
        except apsw.Error:
            self._is_broken = self.path != ":memory:"
        finally:
            self._funlock()
            self._turn.release()

    def _reopen(self) -> None:
        with contextlib.suppress(apsw.Error):
            self.apsw.close(True)
        self._open()
        self.sql.attach(self.apsw)
        self._is_broken = False

    def check_fork(self) -> None:
        """Raise Unavailable in a forked child: SQLite's locks do not survive a fork."""
        if _Forks.count != self._forks:
            raise Unavailable(f"{self.path} was opened before a fork: open the store in the child process, after forking")

    def _check_wal(self) -> None:
        if self.path == ":memory:":
            return
        if wal_bytes(self.path) <= self._wal_bytes:
            return
        with contextlib.suppress(apsw.Error):  # nobody commits any more, so nobody else moves it into the file
            self.apsw.set_busy_timeout(0)
            self.sql.rows("pragma wal_checkpoint(truncate)")
        self.apsw.set_busy_timeout(BUSY_MS)
        size = wal_bytes(self.path)
        if size > self._wal_bytes:
            self._begun = -1  # the next one looks again
            raise StorageFull(
                f"the write-ahead log of {self.path} has {size >> 20} MiB (limit {self._wal_bytes >> 20} MiB), because some "
                "reader keeps an old snapshot open: end that reader (a sqlite3 shell, a backup), then this goes on by itself"
            )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While the block runs nobody else begins to write, in no process."""
        with self._turn:
            self._flock(True)
            try:
                yield
            finally:
                self._funlock()

    def _flock(self, wait: bool) -> bool:
        if self._lock_file is None or fcntl is None:
            return True
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def _funlock(self) -> None:
        if self._lock_file is not None and fcntl is not None:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def translate(self, error: Exception, *, at_commit: bool = False) -> Exception:
        """apsw's error as one of ours, naming the file."""
        return translate(error, self.path, at_commit=at_commit)

    def exclusively(self) -> threading.Lock:
        """The lock that keeps reader and writer of a shared in-memory connection apart."""
        return self._turn

    def close(self) -> None:
        """Close connection and lock file."""
        self.apsw.close(True)
        if self._lock_file is not None:
            os.close(self._lock_file)


def translate(error: Exception, path: str, *, at_commit: bool = False) -> Exception:
    """apsw's error as one of ours; anything else comes back as it is."""
    match error:
        case TrilogueError():
            return error
        case apsw.FullError():
            return StorageFull(f"no room to write {path}: free some disk space and try again; nothing of this was stored")
        case apsw.ReadOnlyError():
            return Rejected(f"{path} cannot be written: check the permissions of the file and of its folder")
        case apsw.BusyError() | apsw.LockedError():
            return Unavailable(f"{path} is locked by another program for over {BUSY_MS // 1000} s: end its transaction")
        case apsw.InterruptError():
            return TimedOut("its SQL took longer than the db limit: make it cheaper, or raise db_limit= of the handler")
        case apsw.IOError() if at_commit:
            return OutcomeUnknown(f"{path}: {error}; it may or may not be stored, repeating it with the same id is harmless")
        case apsw.NotADBError():
            return Unavailable(f"{path} is no SQLite database: use another file for trilogue")
        case apsw.IOError() | apsw.CantOpenError() | apsw.CorruptError():
            return Unavailable(f"{path}: {error}; check the disk, then run `trilogue status --url` on it")
    return error


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def connect(path: str, *, read_only: bool = False) -> apsw.Connection:
    """A connection with the pragmas set and read back. Raises apsw errors."""
    connection = apsw.Connection(path)
    connection.set_busy_timeout(BUSY_MS)
    for pragma, value in _PRAGMAS.items():
        connection.pragma(pragma, value)
    if path != ":memory:":
        mode = _write_ahead(connection)
        if mode != "wal":
            raise Unavailable(
                f"{path}: this file system cannot do write-ahead logging (SQLite answered {mode!r}); use another folder"
            )
        connection.wal_autocheckpoint(WAL_PAGES)
    if read_only:
        connection.pragma("query_only", 1)
    return connection


def _write_ahead(connection: apsw.Connection) -> object:
    """Switch to write-ahead logging. Of several processes that make a file at once SQLite tells some "busy" without waiting."""
    until = time.monotonic() + BUSY_MS / 1_000
    while True:
        try:
            return connection.pragma("journal_mode", "wal")
        except apsw.BusyError:
            if time.monotonic() >= until:
                raise
            time.sleep(BUSY_AGAIN_S)


# synchronous is not stored in the file, and a mapped file is read without locks once several processes write it.
_PRAGMAS: dict[str, str | int] = {
    "synchronous": 2,
    "mmap_size": 0,
    "trusted_schema": 0,
    "temp_store": 2,
    "cache_size": -16_000,
    "journal_size_limit": 64 << 20,
    "foreign_keys": 1,
}


def check_place(path: str) -> str:
    """The absolute path; raises Unavailable with the mend if no database can live there."""
    file = Path(path).absolute()
    folder = file.parent
    if not folder.is_dir():
        raise Unavailable(f"folder {folder} does not exist: create it, or use another path in the URL")
    if file.is_dir():
        raise Unavailable(f"{file} is a folder: add a file name to the URL, as sqlite:///{file}/trilogue.db")
    if file.exists() and not os.access(file, os.R_OK | os.W_OK):
        raise Unavailable(f"{file} may not be read and written by this user: mend its permissions")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Unavailable(f"folder {folder} may not be written: SQLite keeps files beside the database; mend its permissions")
    if (kind := file_system(folder)) in NETWORK_FILE_SYSTEMS:
        raise Unavailable(f"{folder} is on a network file system ({kind}), where SQLite loses data: use a local disk")
    return str(file)


_ESCAPED = re.compile(r"\\([0-7]{3})")  # blanks and the like in the names of /proc/self/mountinfo


def file_system(folder: Path) -> str:
    """The kind of file system a folder is on; "" where the machine does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    real = str(folder.resolve())
    best = ("", "")
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), left.split()[4])
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best[0]):
            best = (mount, right.split()[0])
    return best[1]


def prepare(connection: SqliteConnection) -> None:
    """Create the schema in a new file, bring an older one up to it, or refuse a file that is not ours or newer."""
    sql = connection.sql
    connection.begin(wait=True)
    try:
        version = _check_owner(sql, connection.path)
        for step in range(version + 1, SCHEMA_VERSION + 1):
            script = resources.files("trilogue.stores").joinpath(f"schema/{step}.sql").read_text()
            for _ in connection.apsw.execute(script):
                pass
        if version < SCHEMA_VERSION:
            sql.rows(f"pragma application_id = {APPLICATION_ID}")
            sql.rows(f"pragma user_version = {SCHEMA_VERSION}")
        connection.commit()
    except BaseException:
        connection.rollback()
        raise


def _check_owner(sql: ApswSql, path: str) -> int:
    application = sql.rows("pragma application_id")[0][0]
    version: int = sql.rows("pragma user_version")[0][0]
    tables = sql.rows("select count(*) from sqlite_master where name not like 'trilogue_%'")[0][0]
    if application == APPLICATION_ID and version > SCHEMA_VERSION:
        raise Unavailable(
            f"{path} has schema {version}, newer than this trilogue, which knows {SCHEMA_VERSION}: upgrade trilogue"
        )
    if application not in (0, APPLICATION_ID):
        raise Unavailable(f"{path} belongs to another application (id {application:#x}): use another file")
    if application == 0 and (version or tables):
        raise Unavailable(f"{path} is a database of another program: use a file of its own for trilogue")
    return version if application else 0


def wal_bytes(path: str) -> int:
    """Size of the write-ahead log."""
    try:
        return os.stat(path + "-wal").st_size
    except OSError:
        return 0


def _open_lock(path: str) -> int:
    try:
        return os.open(path + "-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(f"{path}-lock cannot be opened: {error.strerror}; mend the permissions of the folder") from error


# ── a second SQLite library on the same file ─────────────────────────────────────────────────────────────────────────


class OpenFiles:
    """The files open here. Python's own sqlite3 must not open them: two SQLite libraries in one process cancel each
    other's POSIX locks when one closes the file, and committed data is lost (https://sqlite.org/howtocorrupt.html#_posix_advisory_locks)."""

    _counts: ClassVar[dict[tuple[int, int], int]] = {}
    _identities: ClassVar[dict[str, tuple[int, int]]] = {}
    _hooked: ClassVar[bool] = False

    @classmethod
    def add(cls, path: str) -> None:
        """Guard a file from now on."""
        if not cls._hooked:
            sys.addaudithook(cls._refuse)
            cls._hooked = True
        identity = cls._identities[path] = _identity(path)
        cls._counts[identity] = cls._counts.get(identity, 0) + 1

    @classmethod
    def remove(cls, path: str) -> None:
        """The opposite of add(), also when the file has been deleted or replaced meanwhile."""
        identity = cls._identities.get(path, (0, 0))
        left = cls._counts.get(identity, 0) - 1
        if left > 0:
            cls._counts[identity] = left
        else:
            cls._counts.pop(identity, None)

    @classmethod
    def _refuse(cls, event: str, args: tuple[Any, ...]) -> None:
        if event != "sqlite3.connect" or not cls._counts:
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        if path.startswith("file:"):
            path = unquote(path.removeprefix("file:").removeprefix("//localhost").partition("?")[0].partition("#")[0])
        if os.path.exists(path) and _identity(path) in cls._counts:
            raise BadOption(
                f"{path} is open as a trilogue store in this process: opening it with the sqlite3 module too would lose "
                "committed data; read tables with `await app.db(sql)`, write them in a handler with a `db` parameter"
            )


def _identity(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return (0, 0)
    return (stat.st_dev, stat.st_ino)
