"""A log of its own for every promise, beside the one a URL names, and gone afterwards.

memory://                       each store is a log of its own anyway
sqlite:///video.db              folder/trilogue-certify-…/<promise>.db
postgresql://host/db            ?schema=certify_…        dropped
amqp://host, kafka://host:9092  ?prefix=certify-…-       queues and topics of that prefix are deleted
"""

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from trilogue.brokers import DEFAULT_STORE, is_broker, open_log
from trilogue.errors import Unavailable
from trilogue.events import Group
from trilogue.ports import Store
from trilogue.urls import split

REMOVE_S = 30.0
SHORT_LEASE_S = "0.5"
POSTGRESQL = ("postgresql", "postgres")


@contextlib.contextmanager
def folder_beside(url: str | None) -> Iterator[str]:
    """A temporary folder beside the file of an SQLite URL; "" for any other. Raises Unavailable where there is no room for it."""
    if url is None or split(url).scheme != "sqlite":
        yield ""
        return
    beside = Path(unquote(split(url).path[1:])).expanduser().absolute().parent
    if not beside.is_dir():
        raise Unavailable(f"folder {beside} does not exist: create it, or use another path in the URL")
    with tempfile.TemporaryDirectory(prefix="trilogue-certify-", dir=beside) as folder:
        yield folder


class Place:
    """The log of one promise. open(): one more store on it. groups: those that were bound on it."""

    def __init__(self, url: str, store: str | None) -> None:
        self.url, self.store = url, store
        self.groups: set[str] = set()

    def open(self) -> Store:
        """A store on this log, not opened yet."""
        return cast("Store", _Noting(open_log(self.url, store=self.store), self.groups))

    async def remove(self) -> None:
        """Remove what is left of it; nothing for SQLite and memory, because the folder goes as a whole.

        Each side even if the other one fails. Raises what went wrong first.
        """
        sides = [self._remove(url) for url in (self.url, self.store) if url is not None]
        for failed in await asyncio.gather(*sides, return_exceptions=True):
            if failed is not None:
                raise failed

    async def remove_schema(self) -> None:
        """Remove what opening a store has made, where the broker then was not there."""
        for url in (self.url, self.store):
            if url is not None and split(url).scheme in POSTGRESQL:
                await self._remove(url)

    async def _remove(self, url: str) -> None:
        match split(url).scheme:
            case "amqp" | "amqps":
                await asyncio.to_thread(_delete_queues, url, self.groups)
            case "kafka" | "kafka+ssl":
                await _delete_topics(url)
            case scheme if scheme in POSTGRESQL:
                await asyncio.to_thread(_drop_schema, url)


def place_of(url: str, store: str | None, folder: str, name: str) -> Place:
    """An empty log like that of a URL. folder: as folder_beside() gave it. name: of the promise."""
    if not is_broker(url):
        return Place(_store_like(url, folder, name), DEFAULT_STORE)
    return Place(
        _with_options(url, prefix=f"certify-{secrets.token_hex(6)}-"), None if store is None else _store_like(store, folder, name)
    )


def _store_like(url: str, folder: str, name: str) -> str:
    match split(url).scheme:
        case "sqlite":
            parts = urlsplit(_with_options(url, lease_s=SHORT_LEASE_S))
            return f"sqlite:///{quote(folder)}/{name}.db?{parts.query}"
        case "postgresql" | "postgres":
            return _with_options(url, schema=f"certify_{secrets.token_hex(6)}", lease_s=SHORT_LEASE_S)
    return url


def _with_options(url: str, **given: str) -> str:
    """The URL with some options set, whatever they were."""
    parts = split(url)
    kept = [(name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if name not in given]
    return urlunsplit(parts._replace(query=urlencode([*kept, *given.items()])))


class _Noting:
    """A store that says which groups were bound: a broker may not tell of them."""

    def __init__(self, store: Store, groups: set[str]) -> None:
        self._noted, self._groups = store, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._noted, name)

    async def bind(self, groups: Sequence[Group], *, work: bool = True) -> None:
        self._groups.update(group.name for group in groups)
        await self._noted.bind(groups, work=work)


def _delete_queues(url: str, groups: Iterable[str]) -> None:
    import pika

    from trilogue.brokers.rabbitmq.options import read

    o = read(url)
    parameters = pika.ConnectionParameters(
        o.host,
        o.port,
        o.vhost,
        pika.PlainCredentials(o.user, o.password),
        ssl_options=None if o.tls is None else pika.SSLOptions(o.tls, o.host),
        blocked_connection_timeout=REMOVE_S,
    )
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        for queue in (o.unrouted, *(name(group) for group in groups for name in (o.queue, o.dead_queue))):
            channel.queue_delete(queue)
        for exchange in (o.events, o.unrouted, o.dead):
            channel.exchange_delete(exchange)


async def _delete_topics(url: str) -> None:
    from trilogue.brokers.kafka.admin import Admin
    from trilogue.brokers.kafka.settings import read

    admin = Admin(read(url))
    await admin.delete(await admin.topics())
    for group in await admin.groups():
        await admin.delete_group(group)


def _drop_schema(url: str) -> None:
    from trilogue.stores.postgresql import connect, translated
    from trilogue.stores.postgresql_sql import quoted
    from trilogue.stores.postgresql_store import open_postgresql

    server = open_postgresql(split(url), url).server
    with translated(server.url), connect(server, "certify", limit_s=REMOVE_S) as connection:
        # A promise that was broken, or cut short, may have left a transaction open; the schema is nobody else's.
        connection.execute(
            "select pg_terminate_backend(l.pid) from pg_locks l join pg_class c on c.oid = l.relation "
            "join pg_namespace n on n.oid = c.relnamespace where n.nspname = %s and l.pid <> pg_backend_pid()",
            (server.schema,),
        )
        connection.execute(f"drop schema if exists {quoted(server.schema or '')} cascade".encode())
