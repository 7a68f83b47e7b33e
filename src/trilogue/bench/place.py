"""Where one side of one round runs: a log nobody else uses, gone afterwards.

sqlite        sqlite:///FOLDER/trilogue.db                            the folder is removed
postgresql    postgresql://…?schema=bench_3f9c1a                      the schema is dropped
amqp          amqp://…?prefix=bench-3f9c1a-    beside it a store      queues and exchanges of that prefix are deleted
kafka         kafka://…?prefix=bench-3f9c1a-   beside it a store      topics of that prefix are deleted
"""

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from trilogue.app import App
from trilogue.errors import BadOption
from trilogue.urls import redacted, split

BROKERS = ("amqp", "kafka")
SCHEMES = ("sqlite", "postgresql", *BROKERS)


@dataclass(frozen=True, slots=True)
class Place:
    """url, store: as an App takes them; server: the URL without what is ours, for a driver. name: what begins or is the name of
    everything made here. folder: for files."""

    url: str
    server: str
    store: str | None
    name: str
    folder: Path

    def app(self, url: str | None = None) -> App:
        """An App on this log, not opened."""
        if self.store is None:
            return App(url or self.url, name="bench")
        return App(url or self.url, store=self.store, name="bench")

    def option(self, name: str, default: str) -> str:
        """An option of the URL, so that every side runs with the same one."""
        return _option(self.url, name, default)


def at_server(url: str) -> Place:
    """The server itself, for looking at it."""
    return Place(url, _without_options(url), None, "", Path())


def scheme_of(url: str) -> str:
    """Which kind of log it is; raises BadOption for one that has no figures."""
    scheme = split(url).scheme.partition("+")[0].removesuffix("s")
    if scheme not in SCHEMES:
        raise BadOption(f"{redacted(url)!r}: there are figures for {', '.join(f'{name}://' for name in SCHEMES)}")
    return scheme


@contextmanager
def place(url: str, store: str | None, folder: Path | None) -> Iterator[Place]:
    """A new place on the server of this URL, or in a new file in the folder. store: beside a broker; None: a new file, too."""
    scheme, name = scheme_of(url), f"bench_{secrets.token_hex(4)}"
    files = Path(tempfile.mkdtemp(prefix="trilogue-bench-", dir=folder))
    try:
        if scheme not in BROKERS:
            with _log(url, name, files) as own:
                yield Place(own, _without_options(url), None, name, files)
            return
        with _log(store or "sqlite:///bench.db", name, files) as beside:
            prefix = f"{_option(url, 'prefix', '')}{name.replace('_', '-')}-"
            at = Place(_with(url, prefix=prefix), _without_options(url), beside, prefix, files)
            with _removed(lambda: _delete(scheme, at)):
                yield at
    finally:
        shutil.rmtree(files, ignore_errors=True)


@contextmanager
def _log(url: str, name: str, files: Path) -> Iterator[str]:
    """The URL of a store that is new."""
    if scheme_of(url) == "sqlite":
        options = urlsplit(url).query
        yield f"sqlite:///{files}/trilogue.db" + (f"?{options}" if options else "")
        return
    from trilogue.bench import raw_psycopg  # here: the driver comes with an extra

    with _removed(lambda: raw_psycopg.drop(_without_options(url), name)):
        yield _with(url, schema=name)


@contextmanager
def _removed(remove: Callable[[], None]) -> Iterator[None]:
    """Remove it afterwards; where something failed, that is what is said, and not that removing fails, too."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            remove()
        raise
    remove()


def _delete(scheme: str, at: Place) -> None:
    if scheme == "kafka":
        from trilogue.bench import raw_kafka

        raw_kafka.delete(at)
    else:
        from trilogue.bench import raw_pika

        raw_pika.delete(at)


def _option(url: str, name: str, default: str) -> str:
    return dict(parse_qsl(urlsplit(url).query)).get(name, default)


def _with(url: str, **options: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query=urlencode(dict(parse_qsl(parts.query)) | options)))


def _without_options(url: str) -> str:
    return urlunsplit(urlsplit(url)._replace(query=""))
