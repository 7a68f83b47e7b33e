"""URLs to stores.

    memory://                         gone with the process
    sqlite:///video.db                relative to the current folder
    sqlite:////var/lib/app/video.db   absolute

    postgresql://user@host:5432/db    a server; several machines share it

Options: `?lease_s=10` how long a dead worker's keys wait at most; `?payload_bytes=1048576` the largest event;
`?wal_bytes=…` how large the write-ahead log of SQLite may grow while a reader keeps it; those of PostgreSQL: postgresql_store.py.
"""

import difflib
from pathlib import Path
from urllib.parse import SplitResult, unquote

from trilogue.errors import BadOption, UnknownScheme, Unsupported
from trilogue.ports import InboxStore
from trilogue.stores.sqlite_store import SqliteStore
from trilogue.urls import number, options, redacted, split, whole

__all__ = ["SCHEMES", "open_store", "redacted"]

SCHEMES = ("memory", "sqlite", "postgresql", "postgres")
BROKERS = ("amqp", "amqps", "kafka", "kafka+ssl")
_OPTIONS = {"lease_s": number(0.1, 3600), "payload_bytes": whole(1, 1 << 30), "wal_bytes": whole(1 << 20, 1 << 45)}


def open_store(url: str) -> InboxStore:
    """The store behind a URL, not opened yet.

    Raises UnknownScheme, Unsupported, BadOption; each names what would be right.
    """
    parts = split(url)
    if parts.scheme in BROKERS:
        raise Unsupported(
            f"{redacted(url)!r} is a broker and no store: expected memory://, sqlite:///file.db or postgresql://host/db"
        )
    if parts.scheme not in SCHEMES:
        near = difflib.get_close_matches(parts.scheme, (*SCHEMES, *BROKERS), 1)
        hint = f"did you mean {near[0]}://?" if near else "expected memory://, sqlite:///file.db or postgresql://host/db"
        raise UnknownScheme(f"{redacted(url)!r}: there is no log behind {parts.scheme or 'no scheme'!r}; {hint}")
    if parts.scheme.startswith("postgres"):
        return _postgresql(parts, url)
    given = options(parts.query, url, _OPTIONS)
    if parts.scheme == "memory":
        if parts.netloc or parts.path.strip("/"):
            raise BadOption(f"{redacted(url)!r}: a memory:// log has no name, each App has its own; write memory:// alone")
        return SqliteStore(":memory:", "memory://", **given)
    return SqliteStore(str(_path(parts.netloc, parts.path, url)), redacted(url), **given)


def _postgresql(parts: SplitResult, url: str) -> InboxStore:
    try:
        from trilogue.stores.postgresql_store import open_postgresql
    except ImportError as error:
        if error.name not in ("psycopg", "psycopg_binary", None):
            raise
        raise Unsupported(f"{redacted(url)!r} needs the extra: pip install 'trilogue[postgresql]'") from None
    return open_postgresql(parts, url)


def _path(host: str, path: str, url: str) -> Path:
    if host or not path.startswith("/") or path.endswith("/"):
        raise BadOption(f"{redacted(url)!r} names no file: write sqlite:///relative.db or sqlite:////absolute/path.db")
    if path == "/:memory:":
        raise BadOption(f"{redacted(url)!r} is no file: write memory://")
    try:
        file = Path(unquote(path[1:], errors="strict")).expanduser()
    except (UnicodeDecodeError, RuntimeError) as error:
        raise BadOption(f"{redacted(url)!r}: its path cannot be read: {error}") from error
    if not str(file).isprintable():
        raise BadOption(f"{redacted(url)!r} has a control character in its path: remove it")
    return file
