"""A log of its own for every promise, beside the one a URL names, and gone afterwards.

memory://                       each store is a log of its own anyway
sqlite:///video.db              folder/trilogue-certify-…/<promise>.db
postgresql://host/db            ?schema=certify_…        dropped
amqp://host, kafka://host:9092  ?prefix=certify-…-       queues and topics of that prefix are deleted
"""

import contextlib
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from trilogue.errors import Unavailable
from trilogue.urls import split

SHORT_LEASE = {"sqlite": "0.5", "postgresql": "1", "postgres": "1"}


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


def store_place(url: str, folder: str, name: str) -> str:
    """The URL of an empty store of the same kind, with a short lease. folder: as folder_beside() gave it."""
    match split(url).scheme:
        case "sqlite":
            parts = urlsplit(with_options(url, lease_s=SHORT_LEASE["sqlite"]))
            return f"sqlite:///{quote(folder)}/{name}.db?{parts.query}"
        case "postgresql" | "postgres" as scheme:
            return with_options(url, schema=f"certify_{secrets.token_hex(6)}", lease_s=SHORT_LEASE[scheme])
    return url


def broker_place(url: str) -> str:
    """The URL of the same broker, with names nobody else has."""
    return with_options(url, prefix=f"certify-{secrets.token_hex(6)}-")


def with_options(url: str, **given: str) -> str:
    """The URL with some options set, whatever they were."""
    parts = split(url)
    kept = [(name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if name not in given]
    return urlunsplit(parts._replace(query=urlencode([*kept, *given.items()])))


@contextlib.asynccontextmanager
async def removed(url: str, store: str | None) -> AsyncIterator[None]:
    """Whatever the block made at these places is removed at its end."""
    try:
        yield
    finally:
        for place in (url, store):
            if place is not None:
                await _remove(place)


async def _remove(place: str) -> None:
    """Nothing for SQLite and memory: the folder goes as a whole."""
