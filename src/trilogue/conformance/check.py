"""Prove every promise against a URL, each on a log of its own.

sqlite:///video.db ──▶ folder/trilogue-certify-…/<promise>.db, removed afterwards; what the URL names is not touched
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trilogue.brokers import DEFAULT_STORE, is_broker, open_log
from trilogue.conformance.places import Place, folder_beside, place_of
from trilogue.conformance.tools import PROMISES, Promise, Skipped

PROMISE_S = 120.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one promise. reason: the fact that did not hold, or the Features that are missing."""

    promise: Promise
    verdict: Literal["kept", "broken", "skipped"]
    reason: str = ""


async def check(url: str, promises: Sequence[Promise] = PROMISES, *, store: str | None = DEFAULT_STORE) -> AsyncIterator[Outcome]:
    """Prove promises against the kind of log behind a URL, one after the other; yields each Outcome as it is known.

    url, store: as App() takes them. Proofs run beside what they name: in files of their own, in a schema of their own, with
    queues and topics of their own, with leases of about a second.
    Raises a WiringError for a URL that is none, Unavailable for a place that cannot be written.
    """
    open_log(url, store=store)  # or what is wrong with its options would be hidden by those of a place
    behind = store if is_broker(url) else url
    with folder_beside(behind) as folder:
        await _reach(place_of(url, store, folder, "reach"))
        for promise in promises:
            yield await _outcome(promise, place_of(url, store, folder, promise.name))


async def _reach(place: Place) -> None:
    """Say what is wrong with a URL once, and not for every promise."""
    log = place.open()
    try:
        await log.open()
    except BaseException:
        with contextlib.suppress(Exception):
            await place.remove_schema()
        raise
    try:
        await log.close()
    finally:
        await place.remove()


async def _outcome(promise: Promise, place: Place) -> Outcome:
    keeping = asyncio.ensure_future(promise.keep(place.open))
    try:
        try:
            done, _ = await asyncio.wait([keeping], timeout=PROMISE_S)
            where = "" if done else _waits_in(keeping)
        finally:
            if not keeping.done():
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
            await place.remove()
        if where:
            return Outcome(promise, "broken", f"it came to no end within {PROMISE_S:.0f} s: it waits in {where}")
        keeping.result()
    except Skipped as missing:
        return Outcome(promise, "skipped", str(missing))
    except Exception as error:  # whatever goes wrong, the promise is not kept
        return Outcome(promise, "broken", f"{type(error).__name__}: {error}")
    return Outcome(promise, "kept")


def _waits_in(task: "asyncio.Future[None]") -> str:
    """The coroutines a task waits in, from its own to the innermost."""
    awaited: Any = task.get_coro() if isinstance(task, asyncio.Task) else None
    names: list[str] = []
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        names.append(f"{awaited.__qualname__}:{frame.f_lineno}")
        awaited = awaited.cr_await
    return " > ".join(names) or "an unknown place"
