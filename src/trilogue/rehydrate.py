"""Records of a stream to a state, from the last kept state on if there is one.

    snapshot {version 200, state}  +  records 201 … 213  ──fold──▶  state, version 213
                                   13 ≥ every? slow?     ──▶  kept anew, later and beside the request

Snapshots are kept under the fingerprint of the fold: with another fold they are not found, and everything is read again.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from trilogue.aggregate import Reducer
from trilogue.codec import Keys
from trilogue.errors import BadOption, DecodeError, TrilogueError
from trilogue.events import Record
from trilogue.ports import Query, Store

FIRST_RECORDS = 100
PAGE_RECORDS = 2_000
WAITING = 1_000
OWNER = "snapshot"
SEPARATOR = "\x1f"

log = logging.getLogger("trilogue")


@dataclass(frozen=True, slots=True)
class Until:
    """Where to stop: at a version, a position, or a recorded time, each inclusive; nothing of it: at the end."""

    version: int | None = None
    position: int | None = None
    time_us: int | None = None

    def reaches(self, version: int, position: int) -> bool:
        """Whether the place is not before this version and position."""
        return version <= (self.version or version) and position <= (self.position or position)

    @property
    def is_now(self) -> bool:
        """Whether everything is read."""
        return self == NOW


NOW = Until()


@dataclass(frozen=True, slots=True)
class Rehydrated:
    """A state, the version and position it has reached, and how many events were read for it in how many seconds."""

    state: Any
    version: int
    position: int
    events: int
    took_s: float


class _Kept(msgspec.Struct):
    version: int
    position: int
    state: msgspec.Raw


async def rehydrate(store: Store, reducer: Reducer, id: str, keys: Keys | None = None, until: Until = NOW) -> Rehydrated:
    """The state of a stream; raises DecodeError for an event that cannot be read."""
    began = time.perf_counter()
    stream = reducer.stream_of(id)
    state, version, position = await _kept(store, reducer, id, keys, until)
    events, fold, plain = 0, reducer.fold, reducer.plain
    async for page in pages(store, _query(stream, position, until)):
        for record in page:
            if until.version is not None and (record.version or 0) > until.version:
                return Rehydrated(state, version, position, events, time.perf_counter() - began)
            decode = plain.get((record.type, record.schema_version))
            try:
                if decode is not None:
                    state = fold(state, decode(record.data))
                elif record.type in reducer.coders:
                    state = fold(state, reducer.coders[record.type].read(record, keys))
            except DecodeError as error:
                raise DecodeError(f"stream {stream!r}, version {record.version}, {record.type!r}: {error}") from error
            version, position = record.version or version, record.position
            events += 1
    return Rehydrated(state, version, position, events, time.perf_counter() - began)


def _query(stream: str, position: int, until: Until) -> Query:
    return Query(
        stream=stream,
        after=position,
        before=None if until.position is None else until.position + 1,
        until_us=None if until.time_us is None else until.time_us + 1,
    )


async def pages(store: Store, query: Query) -> AsyncIterator[list[Record]]:
    """All that matches, a page at a time, the first one small: most streams are short."""
    limit = FIRST_RECORDS
    while True:
        page = await store.read(replace(query, limit=limit))
        if page:
            yield page
        if len(page) < limit:
            return
        query, limit = replace(query, after=page[-1].position), PAGE_RECORDS


# ── snapshots ────────────────────────────────────────────────────────────────────────────────────────────────────────


def snapshot_id(stream: str, reducer: Reducer) -> str:
    """Under which a state is kept: another fold finds nothing."""
    return f"{stream}{SEPARATOR}{reducer.name}{SEPARATOR}{reducer.fingerprint}"


async def _kept(store: Store, reducer: Reducer, id: str, keys: Keys | None, until: Until) -> tuple[Any, int, int]:
    """The kept state, its version and position; a new state where there is none, or none that helps."""
    if reducer.snapshot is not None and until.time_us is None:
        body = await store.state(OWNER, snapshot_id(reducer.stream_of(id), reducer))
        kept = None if body is None else _opened(reducer, body, keys)
        if kept is not None and until.reaches(kept[1], kept[2]):
            return kept
    return reducer.new(id), 0, 0


def _opened(reducer: Reducer, body: bytes, keys: Keys | None) -> tuple[Any, int, int] | None:
    try:
        plain = body if not reducer.is_personal else keys.unseal_state(body) if keys is not None else None
        if plain is None:
            return None
        kept = msgspec.json.decode(plain, type=_Kept)
        return msgspec.json.decode(kept.state, type=reducer.state), kept.version, kept.position
    except (msgspec.MsgspecError, TrilogueError, ValueError, TypeError) as error:
        log.warning("a snapshot of %s cannot be read, so its stream is: %s", reducer.name, _said(reducer, error))
        return None


def _said(reducer: Reducer, error: Exception) -> str:
    return type(error).__qualname__ if reducer.is_personal else str(error)  # it may quote personal data


class Snapshots:
    """Keeps states of streams, later and beside the requests that found them worth it. store: opened by the App."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[str, tuple[Reducer, str, Keys | None]] = {}
        self._task: asyncio.Task[None] | None = None

    def consider(self, reducer: Reducer, id: str, keys: Keys | None, events: int, took_s: float) -> None:
        """Keep the state of a stream soon, if its policy says so. events: read or appended since the last kept one."""
        policy = reducer.snapshot
        if policy is None or not policy.is_due(events, took_s) or len(self._waiting) >= WAITING:
            return
        self._waiting[snapshot_id(reducer.stream_of(id), reducer)] = (reducer, id, keys)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._take_all(), name="trilogue snapshots")

    async def _take_all(self) -> None:
        while self._waiting:
            reducer, id, keys = self._waiting.pop(next(iter(self._waiting)))
            try:
                await self.take(reducer, id, keys)
            except Exception as error:  # whatever it is: nothing depends on a snapshot
                log.warning("no snapshot of %s %r: %s", reducer.name, id, _said(reducer, error))

    async def take(self, reducer: Reducer, id: str, keys: Keys | None) -> int:
        """Keep the state of a stream now; returns its version."""
        since = keys.erasures() if reducer.is_personal and keys is not None else None
        stream = reducer.stream_of(id)
        begins = await self._store.state("stream", stream)
        found = await rehydrate(self._store, reducer, id, keys)
        state = msgspec.json.encode(found.state)
        if msgspec.json.decode(state, type=reducer.state) != found.state:
            raise BadOption(
                "its state comes back from JSON as another one: annotate its fields, and what evolve() returns, by what they hold"
            )
        body: bytes | None = msgspec.json.encode(_Kept(found.version, found.position, msgspec.Raw(state)))
        if reducer.is_personal:
            body = None if keys is None else keys.seal_state(body or b"", since=since)

        def keep(tx: Any) -> None:
            if tx.state("stream", stream) != begins:  # truncated meanwhile: this was folded from what is hidden now
                return
            tx.clear_states(OWNER, prefix=f"{stream}{SEPARATOR}{reducer.name}{SEPARATOR}")  # those of its earlier code
            tx.set_state(OWNER, snapshot_id(stream, reducer), body)

        if found.version and body is not None:
            await self._store.transact(keep, rows=2)
        return found.version

    async def stop(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
