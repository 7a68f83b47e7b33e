"""Prove every promise against a URL, each on a log of its own.

sqlite:///video.db ──▶ folder/trilogue-check-…/<promise>.db, removed afterwards; the file of the URL is not touched
"""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from trilogue.conformance.tools import PROMISES, Promise, Skipped
from trilogue.errors import Unavailable
from trilogue.stores import open_store

LEASE_S = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one promise. reason: the fact that did not hold, or the Features that are missing."""

    promise: Promise
    verdict: Literal["kept", "broken", "skipped"]
    reason: str = ""


async def check(url: str, promises: Sequence[Promise] = PROMISES) -> AsyncIterator[Outcome]:
    """Prove promises against the kind of store behind a URL, one after the other; yields each Outcome as it is known.

    url: memory:// or sqlite:///file.db; proofs run on files of their own beside that file, with a lease of half a second.
    Raises a WiringError for a URL that is none, Unavailable for a place that cannot be written.
    """
    open_store(url)
    with _logs(url) as log_of:
        for promise in promises:
            yield await _outcome(promise, log_of(promise))


@contextlib.contextmanager
def _logs(url: str) -> Iterator[Callable[[Promise], str]]:
    """For each promise the URL of an empty log of its own."""
    parts = urlsplit(url.strip())
    if parts.scheme != "sqlite":
        yield lambda _: url
        return
    beside = Path(unquote(parts.path[1:])).expanduser().absolute().parent
    options = "&".join(option for option in parts.query.split("&") if option and not option.startswith("lease_s="))
    if not beside.is_dir():
        raise Unavailable(f"folder {beside} does not exist: create it, or use another path in the URL")
    with tempfile.TemporaryDirectory(prefix="trilogue-check-", dir=beside) as folder:
        yield lambda promise: f"sqlite:///{quote(folder)}/{promise.name}.db?lease_s={LEASE_S}&{options}"


async def _outcome(promise: Promise, url: str) -> Outcome:
    try:
        await promise.keep(lambda: open_store(url))
    except Skipped as missing:
        return Outcome(promise, "skipped", str(missing))
    except Exception as error:  # whatever goes wrong, the promise is not kept
        return Outcome(promise, "broken", f"{type(error).__name__}: {error}")
    return Outcome(promise, "kept")
