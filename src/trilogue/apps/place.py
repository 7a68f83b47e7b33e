"""Where a demonstration keeps its log: a throw-away file, a file of one's own, or whatever a URL names.

nothing                              sqlite:///…            a file that is gone afterwards
--db bank.db                         sqlite:///bank.db      running again goes on where it ended
--url postgresql://…                 that store             the same
--url kafka://… [--store sqlite:…]   kafka://…?prefix=demo-3f9c1a2b-, unless the URL names a prefix

Queues and topics belong to the store beside them: their prefix is kept in it, so that running again with this store goes on
where it ended, and a new store begins with empty ones. Without --store it is a throw-away file, and they are removed afterwards.
"""

import logging
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from trilogue import App, BadOption, Store, open_store

BROKERS = ("amqp", "amqps", "kafka", "kafka+ssl")
KAFKA = {"linger": "10ms", "batch_bytes": "16384", "retries": "3"}  # for place(): few large requests, as for a stream of events
OWNER, PREFIX = "trilogue.demo", "prefix"

log = logging.getLogger("trilogue")


@dataclass(frozen=True, slots=True)
class Place:
    """A log. store: what stands beside a broker. kept: whether it is still there afterwards."""

    url: str
    store: str | None = None
    kept: bool = True


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for. url, store: a log, and what stands beside a broker. db: a file instead. Nothing: a throw-away file."""

    url: str | None = None
    store: str | None = None
    db: str | None = None


def app_on(url: str, store: str | None, name: str) -> App:
    """An App on this log. store: what stands beside a broker."""
    return App(url, name=name) if store is None else App(url, store=store, name=name)


def check_wanted(wanted: Wanted) -> None:
    """Raises BadOption if it makes no sense."""
    if wanted.url is not None and wanted.db is not None:
        raise BadOption("--url and --db both name a log: give one of them")
    if wanted.store is not None and not is_broker(wanted.url):
        raise BadOption("--store belongs beside amqp:// and kafka:// only, and --url names neither")
    if wanted.store == "none":
        raise BadOption("a demonstration keeps tables and timers in a store: leave --store out for a throw-away file")
    if wanted.db is not None:
        file_of(wanted.db)


def file_of(db: str) -> Path:
    """The file to keep the log in; raises BadOption if there cannot be one."""
    path = Path(db).expanduser().absolute()
    if path.is_dir():
        raise BadOption(f"db {db!r} is a folder: expected the file to keep the log in")
    if not path.parent.is_dir():
        raise BadOption(f"db {db!r} cannot be made: there is no folder '{path.parent}'")
    return path


def is_broker(url: str | None) -> bool:
    """Whether a store stands beside it."""
    return url is not None and url.partition(":")[0].strip() in BROKERS


def shown(url: str) -> str:
    """The URL without its password.

    >>> shown("postgresql://me:sesame@host/db")
    'postgresql://me:***@host/db'
    """
    before, at, host = url.rpartition("@")
    scheme, _, user = before.partition("://")
    return f"{scheme}://{user.partition(':')[0]}:***@{host}" if at else url


@asynccontextmanager
async def place(wanted: Wanted, **options: str) -> AsyncIterator[Place]:
    """The log that was asked for. options: of a kafka:// URL that does not name them itself.

    Raises BadOption, Unavailable.
    """
    check_wanted(wanted)
    if wanted.db is not None:
        yield Place(f"sqlite:///{quote(str(file_of(wanted.db)))}")
    elif wanted.url is None:
        with _throw_away() as url:
            yield Place(url, kept=False)
    elif not is_broker(wanted.url):
        yield Place(wanted.url, kept=not wanted.url.startswith("memory:"))
    elif wanted.store is not None:
        yield Place(await _own(wanted.url, wanted.store, options), wanted.store)
    else:
        with _throw_away() as store:
            url = await _own(wanted.url, store, options)
            try:
                yield Place(url, store, kept=False)
            finally:
                if PREFIX not in _options(wanted.url):
                    await _remove(url, store)


@contextmanager
def _throw_away() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="trilogue-") as folder:
        yield f"sqlite:///{quote(folder)}/demo.db"


async def _own(url: str, store: str, options: dict[str, str]) -> str:
    """The broker's URL with the names this store uses on it."""
    given = _options(url)
    ours = options if url.startswith("kafka") else {}
    if PREFIX not in given:
        ours = {**ours, PREFIX: await _kept_prefix(open_store(store))}
    return f"{url.partition('?')[0]}?{urlencode({**ours, **given})}"


def _options(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


async def _kept_prefix(store: Store) -> str:
    """The prefix this store has used before; a new one, used from now on, if there is none."""
    await store.open()
    try:
        new = f"demo-{secrets.token_hex(4)}-"
        kept = await store.state(OWNER, PREFIX)
        if kept is None:
            await store.transact(lambda tx: tx.set_state(OWNER, PREFIX, new.encode()))
        return new if kept is None else kept.decode()
    finally:
        await store.close()


async def _remove(url: str, store: str) -> None:
    """Delete the queues or topics of a throw-away store."""
    from trilogue.conformance.places import Place as Left  # here: nobody else needs it

    left, beside = Left(url, store), open_store(store)
    await beside.open()
    try:
        left.groups.update(group.name for group in (await beside.status()).groups)
    finally:
        await beside.close()
    try:
        await left.remove()
    except Exception as error:  # of whatever driver; what has been shown must not be hidden by it
        log.warning("%s: what was made there for the demonstration stays: %s", shown(url), error)
