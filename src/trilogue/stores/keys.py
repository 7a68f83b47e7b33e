"""The keys of people whose data is sealed, in a file of their own beside the log; who is erased loses theirs.

    video.db         "sealed:1:dTc:W3qx…"                      subject u7, nonce and ciphertext, each in base64
    video.db-keys    u7 | key (null: erased) | made_us | erased_us, reason        mode 0600, made with the first sealed value

A key is durable before the first value sealed with it leaves here. A key that another process destroyed is noticed by the
change counter in the file's header, which is looked at before each use.
"""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apsw

from trilogue.errors import DecodeError, Rejected, Unavailable
from trilogue.events import now_us
from trilogue.stores.cipher import KEY_BYTES, Key, cryptography, joined, parted
from trilogue.stores.sqlite import BUSY_MS, OpenFiles, translate

APPLICATION_ID = 0x7472696B  # "trik"
KEYS_CACHED = 10_000
COUNTER_AT, COUNTER_BYTES = 24, 4  # the change counter in the header of an SQLite file
READ_BYTES = 1 << 20
STATES = "\x00states"  # no subject begins so
STATE_PREFIX = b"sealed:1:"
MEMORY = ":memory:"
NOWHERE = "(no file is named)"
_SCHEMA = """
create table keys (
  subject   text primary key,
  key       blob,              -- 32 bytes to seal with, 32 to make nonces with; null: erased
  made_us   integer not null,
  erased_us integer,
  reason    text
) without rowid;
create table erasures (n integer not null);
insert into erasures values (0);
"""
_PRAGMAS: dict[str, Any] = {
    "journal_mode": "delete",  # in a write-ahead log a destroyed key would live on
    "synchronous": 3,  # a commit that returned stays: also the removal of its journal is durable
    "secure_delete": 1,
    "temp_store": 2,
    "mmap_size": 0,
    "trusted_schema": 0,
}

# One for all of a process: closing a file's descriptor ends every lock the process has on it (POSIX), also those that
# another Keyring has for the commit it is in.
_TURN = threading.RLock()


@dataclass(frozen=True, slots=True)
class Destroyed:
    """A key that is no more: since when and why, and whether that was known already."""

    subject: str
    erased_us: int
    reason: str
    is_repeated: bool


class Keyring:
    """sealing.Keys in a file, callable from any thread; the file is opened, or made, when it is needed first."""

    def __init__(self) -> None:
        self.path = ""
        self._connection: apsw.Connection | None = None
        self._file = -1
        self._pid = 0
        self._seen = b""
        self._erasures = 0
        self._cache: OrderedDict[str, Key | None] = OrderedDict()
        self._is_together = False

    def open(self, path: str) -> None:
        """Let it be used from now on. path: of the file, `:memory:`, or NOWHERE if nobody said where they are."""
        self.path = path

    def close(self) -> None:
        """Let go of the file."""
        with _TURN:
            self._let_go()
            self.path = ""

    def _let_go(self) -> None:
        self._cache.clear()
        self._erasures, self._seen = 0, b""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close(True)
        if self._file >= 0:
            OpenFiles.remove(self.path)
            os.close(self._file)
            self._file = -1

    # ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def seal(self, subject: str, plain: bytes, about: bytes) -> str:
        """Seal a value of somebody, whose key is made if it is the first one; raises Rejected for the erased."""
        key = self._find(subject, make=True)
        if key is None:
            raise Rejected(f"{subject!r} has been erased: nothing personal of theirs can be stored any more")
        return joined(subject, key.seal(plain, about))

    def unseal(self, sealed: str, about: bytes) -> bytes | None:
        """The value again, None if the person was erased; raises DecodeError for what was not sealed like this."""
        subject, value = parted(sealed)
        key = self._find(subject)
        if key is None:
            return None
        plain = key.unseal(value, about)
        if plain is None:
            raise DecodeError(f"a value sealed for {subject!r} was changed, or belongs to another event or field")
        return plain

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make the keys that are needed inside the block durable at its end, all at once. Nothing may be awaited inside."""
        with self._at_work():
            self._is_together = True
            try:
                yield
            finally:
                self._is_together = False
                self._commit()

    # ── states ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def erasures(self) -> int:
        """How many people have been erased so far."""
        with self._at_work():
            if self._opened(make=False) is not None:
                self._notice()
            return self._erasures

    def seal_state(self, body: bytes, *, since: int | None = None) -> bytes | None:
        """Seal a state made of many people's data; None if somebody was erased after `since`, who may be part of it."""
        with self._at_work():
            key = self._key(STATES, make=True)
            if since is not None and since != self._erasures:
                return None
        return None if key is None else STATE_PREFIX + key.seal(body, b"")

    def unseal_state(self, sealed: bytes) -> bytes | None:
        """The state again; None if somebody was erased since, or it is no sealed state."""
        if not sealed.startswith(STATE_PREFIX):
            return None
        with self._at_work():
            try:
                key = self._key(STATES)
            except DecodeError:
                return None
        return None if key is None else key.unseal(sealed[len(STATE_PREFIX) :], b"")

    # ── erasing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def destroy(self, subject: str, reason: str) -> Destroyed:
        """Destroy somebody's key, and with it all that was sealed of theirs and every sealed state.

        Repeating it ends what was interrupted and gives the answer of the first time. Raises Rejected if nothing was ever
        sealed for them.
        """
        with self._at_work():
            row = None if self._opened(make=False) is None else self._row(subject)
            if row is None or subject == STATES:
                raise Rejected(f"nothing was ever sealed for {subject!r}, says {self.path}: check how it is written")
            key, erased_us, first_reason = row
            if key is None:
                self._leave_no_bytes(None)
                return Destroyed(subject, erased_us, first_reason, is_repeated=True)
            erased_us = now_us()
            self._destroy(subject, erased_us, reason)
            self._leave_no_bytes(key)
        return Destroyed(subject, erased_us, reason, is_repeated=False)

    def _destroy(self, subject: str, erased_us: int, reason: str) -> None:
        self._begin()
        try:
            self._rows("update keys set key = null, erased_us = ?, reason = ? where subject = ?", (erased_us, reason, subject))
            self._rows("update keys set key = ? where subject = ?", (os.urandom(KEY_BYTES), STATES))
            self._rows("update erasures set n = n + 1")
            self._commit()
        except BaseException:
            self._rollback()
            raise
        self._look()

    def _leave_no_bytes(self, key: bytes | None) -> None:
        """Write the file anew if the key still is in it, or may be (None): pages that were split keep copies of their rows."""
        if self._file >= 0 and (key is None or self._is_in_file(key)):
            self._rows("vacuum")

    def _is_in_file(self, key: bytes) -> bool:
        quarters = [key[n : n + 16] for n in range(0, len(key), 16)]
        tail, at = b"", 0
        while read := os.pread(self._file, READ_BYTES, at):
            if any(quarter in tail + read for quarter in quarters):
                return True
            tail, at = read[-16:], at + len(read)
        return False

    # ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        with _TURN:
            try:
                yield
            except apsw.Error as error:
                self._rollback()
                raise translate(error, self.path) from error

    def _find(self, subject: str, *, make: bool = False) -> Key | None:
        with _TURN:
            if subject in self._cache and self._counter() == self._seen and os.getpid() == self._pid:  # nearly always
                self._cache.move_to_end(subject)
                return self._cache[subject]
            with self._at_work():
                return self._key(subject, make=make)

    def _key(self, subject: str, *, make: bool = False) -> Key | None:
        """Somebody's key, None if it was destroyed; raises DecodeError if there never was one and none is to be made."""
        if self._opened(make=make) is not None:
            self._notice()
            if subject in self._cache:
                self._cache.move_to_end(subject)
                return self._cache[subject]
            row = self._row(subject) or (self._make(subject) if make else None)
            if row is not None:
                return self._remember(subject, row[0])
        raise DecodeError(
            f"there is no key for {subject!r} in {self.path}: the value was sealed with another keys file, put that one there"
        )

    def _remember(self, subject: str, key: bytes | None) -> Key | None:
        if len(self._cache) >= KEYS_CACHED:
            self._cache.popitem(last=False)
        found = self._cache[subject] = None if key is None else Key(key)
        return found

    def _row(self, subject: str) -> Any:
        rows = self._rows("select key, erased_us, reason from keys where subject = ?", (subject,))
        return rows[0] if rows else None

    def _make(self, subject: str) -> Any:
        cryptography()
        self._begin()
        try:
            # Another process may have been faster: then its key is the one.
            put = "insert into keys (subject, key, made_us) values (?, ?, ?) on conflict do nothing"
            self._rows(put, (subject, os.urandom(KEY_BYTES), now_us()))
            row = self._row(subject)
            if not self._is_together:
                self._commit()
        except BaseException:
            self._rollback()
            raise
        return row

    def _notice(self) -> None:
        """Forget all keys if somebody's was destroyed since."""
        if self._counter() != self._seen and not self._is_changing():
            self._look()

    def _look(self) -> None:
        self._rows("begin")
        try:
            self._refresh()
        finally:
            self._rows("commit")

    def _refresh(self) -> None:
        erasures = self._rows("select n from erasures")[0][0]  # first: from here on the file does not change under us
        self._seen = self._counter()
        if erasures != self._erasures:
            self._cache.clear()
            self._erasures = erasures

    def _counter(self) -> bytes:
        return b"" if self._file < 0 else os.pread(self._file, COUNTER_BYTES, COUNTER_AT)

    def _is_changing(self) -> bool:
        return self._connection is not None and self._connection.in_transaction

    def _begin(self) -> None:
        if not self._is_changing():
            self._rows("begin immediate")
            self._refresh()

    def _commit(self) -> None:
        if self._is_changing():
            try:
                self._rows("commit")
            except BaseException:
                self._cache.clear()  # keys that are not durable
                raise
            if self._seen:  # what we did ourselves is nothing to look at again
                self._seen = ((int.from_bytes(self._seen, "big") + 1) % (1 << 32)).to_bytes(COUNTER_BYTES, "big")

    def _rollback(self) -> None:
        if self._is_changing():
            self._cache.clear()
            self._rows("rollback")

    def _rows(self, sql: str, values: Any = ()) -> list[Any]:
        assert self._connection is not None
        return self._connection.execute(sql, values).fetchall()

    def _opened(self, *, make: bool) -> apsw.Connection | None:
        """The connection; None if there is no file and none is to be made."""
        if self._connection is not None:
            if self._pid != os.getpid():
                raise Unavailable(f"{self.path} was opened before a fork: open the App in the child process, after forking")
            return self._connection
        if not self.path:
            raise Unavailable("the keys of personal data are not open: use the App inside `async with app:`")
        if make and self.path == NOWHERE:
            raise Rejected(
                "personal data is sealed with keys that are kept apart from it, and nobody said in which file: name one by "
                "?keys=FILE in the URL of the store, or by TRILOGUE_KEYS; the same file for every process that works with this "
                "log, on other machines too: what is sealed with keys from another one cannot be read there"
            )
        if not make and (self.path in (MEMORY, NOWHERE) or not os.path.exists(self.path)):
            return None
        try:
            self._connect()
        except BaseException:
            self._let_go()
            raise
        return self._connection

    def _connect(self) -> None:
        if self.path != MEMORY:
            try:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                os.fchmod(self._file, 0o600)
            except OSError as error:
                raise Unavailable(f"{self.path} cannot be opened: {error.strerror}; mend its permissions") from error
            OpenFiles.add(self.path)
        self._connection, self._pid = apsw.Connection(self.path), os.getpid()
        self._connection.set_busy_timeout(BUSY_MS)
        for pragma, value in _PRAGMAS.items():
            self._connection.pragma(pragma, value)
        self._rows("begin immediate")
        self._prepare()
        self._rows("commit")
        self._look()

    def _prepare(self) -> None:
        owner = self._rows("pragma application_id")[0][0]
        if owner == 0 and not self._rows("select 1 from sqlite_master limit 1"):
            for _ in self._connection.execute(_SCHEMA):  # type: ignore[union-attr]
                pass
            self._rows(f"pragma application_id = {APPLICATION_ID}")
        elif owner != APPLICATION_ID:
            raise Unavailable(f"{self.path} is no keys file of trilogue: move it away, or use another name for the log")
