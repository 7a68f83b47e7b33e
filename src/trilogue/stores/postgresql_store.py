"""The Store port on PostgreSQL: the same algorithm, other connections.

postgresql://user:secret@host:5432/db?schema=app&lease_s=10
└ what libpq connects with           └ our options; sslmode and the like go to libpq
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urlencode, urlunsplit

from trilogue.errors import BadOption
from trilogue.events import Envelope
from trilogue.ports import Feature
from trilogue.stores import outside, postgresql_schema
from trilogue.stores.append import check_envelope
from trilogue.stores.database import Database
from trilogue.stores.postgresql import Server, translated
from trilogue.stores.postgresql_database import PostgresqlDatabase
from trilogue.stores.store import SqlStore
from trilogue.urls import Reader, number, one_of, options, redacted, whole

IDLE_S = 10.0
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")


def _schema(text: str) -> str:
    if not _SCHEMA.fullmatch(text):
        raise ValueError("a name of lower-case letters, digits and _")
    return text


def _text(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("a printable text")
    return text


def _file(text: str) -> str:
    if "://" in text:
        raise ValueError("a file, the same for every process that works with this log; keys are kept in no database")
    return _text(text)


_OURS: Mapping[str, Reader] = {
    "lease_s": number(0.1, 3600),
    "payload_bytes": whole(1, 1 << 30),
    "schema": _schema,
    "prepare": one_of("on", "off"),
    "connect_timeout_s": number(1, 300),
    "keys": _file,
}
_LIBPQS: Mapping[str, Reader] = {
    "sslmode": one_of("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslrootcert": _text,
    "sslcert": _text,
    "sslkey": _text,
    "target_session_attrs": one_of("any", "read-write", "primary"),
    "application_name": _text,
    "host": _text,
}


class PostgresqlStore(SqlStore):
    """A Store on a PostgreSQL server."""

    takes_nul = False

    def __init__(self, server: Server, *, keys: str | None = None, **given: Any) -> None:
        super().__init__(server.url, frozenset(Feature), **given)
        self.durability = "os-crash"  # as the server says, once it is open
        self._has_put = False
        self.server = server
        self.keys_path = keys  # of personal data: apart from it, in a file

    async def absent(self) -> list[str]:
        """The URL if our tables are not there yet; nothing is made. Raises Unavailable."""
        with translated(self.url):
            return [] if await asyncio.to_thread(postgresql_schema.is_there, self.server) else [self.url]

    async def migrate(self) -> tuple[int, int]:
        """Create the schema or bring it up, as opening does; returns its version before and now. Raises Unavailable."""
        with translated(self.url):
            return await asyncio.to_thread(postgresql_schema.prepare, self.server)

    async def publish_in(self, tx: object, envelopes: Sequence[Envelope], due_us: int | None = None) -> None:
        """Publish with the commit of the user's own transaction; fires from here too, whether or not a worker runs."""
        self._opened()
        for envelope in envelopes:
            check_envelope(envelope, self.payload_bytes, takes_nul=self.takes_nul)
        await outside.put(tx, self.url, self._database.schema, envelopes, due_us or 0)
        self._has_put = True
        self._database.hurry()

    @property
    def _fires(self) -> bool:
        return self._has_put or super()._fires

    async def _connect(self) -> Database:
        idle_s = max(IDLE_S, self.lease_us / 1_000_000)
        db = PostgresqlDatabase(self.server, payload_bytes=self.payload_bytes, idle_s=idle_s, scheduled=self._scheduled)
        await db.open()
        self._database = db
        return db


def open_postgresql(parts: SplitResult, url: str) -> PostgresqlStore:
    """The store behind a URL, not connected yet. Raises BadOption."""
    given = options(parts.query, url, {**_OURS, **_LIBPQS})
    libpqs = {"target_session_attrs": "read-write", **{name: given.pop(name) for name in _LIBPQS if name in given}}
    libpqs.pop("application_name", None)
    if not parts.path.strip("/"):
        raise BadOption(f"{redacted(url)!r} names no database: write postgresql://host/database")
    server = Server(
        urlunsplit(("postgresql", parts.netloc, parts.path, urlencode(libpqs), "")),
        redacted(url),
        given.pop("schema", None),
        given.pop("prepare", "on") == "on",
        given.pop("connect_timeout_s", 10.0),
    )
    return PostgresqlStore(server, **given)
