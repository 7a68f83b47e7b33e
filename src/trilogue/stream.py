"""The event store side of an App: load, save and decide on streams.

    load    records of account-7 ──fold──▶ Account, version 12                                    (rehydrate.py)
    save    what it emitted ──append, expected version 12──▶ versions 13, 14      or Conflict: somebody was faster
    decide  load ─▶ rules ─▶ append; on Conflict the same again from the newer state, a bounded number of times

An event store is `append` with the version the writer expects. There is nothing beside the log: what is here reads it and
appends to it.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar, overload

from trilogue.aggregate import Aggregate, Decider, Decision, reducer_of
from trilogue.codec import Keys
from trilogue.deciding import Decided, Deciding, DecidingAcross, loaded, prepared, receipt_of, ruled, saved
from trilogue.errors import BadOption, Conflict, StreamClosed
from trilogue.events import Envelope, Receipt, us_of
from trilogue.ports import Db, Store, Transaction
from trilogue.rehydrate import Snapshots, Until

A = TypeVar("A", bound=Aggregate)
D = TypeVar("D", bound=Decision)
S = TypeVar("S")
ATTEMPTS = 10
MOST_ATTEMPTS = 1_000
BACKOFF_S, LONGEST_BACKOFF_S = 0.001, 0.1
ONCE_CHARS = 255
EFFECT_US, APPEND_US = 250_000, 100


@dataclass(frozen=True, slots=True)
class Loaded(Generic[S]):
    """The state of a Decider's stream, and the version it has."""

    state: S
    version: int


class Streams:
    """What App inherits: streams that are loaded, decided on and appended to."""

    store: Store
    keys: Keys | None
    snapshots: Snapshots

    def envelope(
        self, event: object, *, id: str | None = None, time_us: int | None = None, stream: str | None = None
    ) -> Envelope:
        """The event as it would travel; App says how."""
        raise NotImplementedError

    # ── load and save ────────────────────────────────────────────────────────────────────────────────────────────────

    @overload
    async def load(
        self, model: type[A], id: str, *, version: int | None = None, position: int | None = None, at: datetime | None = None
    ) -> A: ...

    @overload
    async def load(
        self, model: Decider[S], id: str, *, version: int | None = None, position: int | None = None, at: datetime | None = None
    ) -> Loaded[S]: ...

    async def load(
        self,
        model: Any,
        id: str,
        *,
        version: int | None = None,
        position: int | None = None,
        at: datetime | None = None,
    ) -> Any:
        """The aggregate as it is, or as it was at a version, a position of the log, or a time by the log's clock.

        A stream without events is a new aggregate, version 0. Raises BadOption, DecodeError.
        """
        state, reached = await loaded(self, reducer_of(model), id, until_of(version, position, at))
        if isinstance(model, Decider):
            return Loaded(state, reached)
        return state

    async def save(self, aggregate: A) -> Decided[A]:
        """Append what an aggregate has emitted, at the version it was loaded with.

        Raises Conflict if its stream has another one: load it again. After OutcomeUnknown, saving it again is harmless.
        """
        cls: Any = type(aggregate)
        reducer, events, before = reducer_of(cls), aggregate.uncommitted, aggregate.version
        if not events:
            return Decided(aggregate, (), before, None)
        stream = reducer.stream_of(aggregate.id)
        envelopes = prepared(self, aggregate, stream, events)
        positions = await self.store.append(envelopes, expected=(stream, before))
        return saved(self, aggregate, before, events, receipt_of(self, envelopes[-1], positions[-1]))

    @contextlib.asynccontextmanager
    async def edit(self, model: type[A], id: str) -> AsyncIterator[A]:
        """Load an aggregate, and save what the block emits; nothing is saved if the block raises.

        Raises Conflict if somebody was faster: the block cannot run again by itself, decide() can.
        """
        aggregate = await self.load(model, id)
        yield aggregate
        await self.save(aggregate)

    # ── decide ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @overload
    async def decide(
        self, model: type[A], id: str, rule: Callable[[A], Any], *, once: str | None = None, attempts: int = ATTEMPTS
    ) -> Decided[A]: ...

    @overload
    async def decide(
        self, model: Decider[S], id: str, rule: Callable[[S], Any], *, once: str | None = None, attempts: int = ATTEMPTS
    ) -> Decided[S]: ...

    @overload
    async def decide(self, model: D, /, *, once: str | None = None, attempts: int = ATTEMPTS) -> Decided[D]: ...

    async def decide(
        self, model: Any, id: str = "", rule: Any = None, *, once: str | None = None, attempts: int = ATTEMPTS
    ) -> Any:
        """Load, let the rule decide, append; when somebody was faster, the same again with the newer state.

        rule: a plain function of the state; for an Aggregate what it emits counts and what it returns is the answer, for a
        Decider it returns the events. A Decision brings its own. once: the id of the request: when it was decided before, within
        seven days, nothing happens and the stored answer is returned, as plain JSON data (what must never happen twice, however
        late, is a fact of the aggregate itself). attempts: 1 to 1,000.
        Raises Conflict after the last attempt, and what the rule raises.
        """
        if not isinstance(attempts, int) or not 1 <= attempts <= MOST_ATTEMPTS:
            raise BadOption(f"attempts is {attempts!r}: expected 1 to {MOST_ATTEMPTS}")
        deciding = self._deciding(model, id, rule, once)
        if once is not None and (repeated := await deciding.repeated()) is not None:
            return repeated
        for attempt in range(1, attempts + 1):
            try:
                return await deciding.attempt()
            except Exception as error:
                # Refused perhaps because this very request was decided meanwhile, by somebody who also got it.
                if once is not None and (repeated := await deciding.repeated()) is not None:
                    return repeated
                if not isinstance(error, Conflict) or isinstance(error, StreamClosed) or attempt == attempts:
                    raise
                await asyncio.sleep(random.uniform(0, min(LONGEST_BACKOFF_S, BACKOFF_S * 2**attempt)))
        raise AssertionError("a loop over at least one attempt has returned or raised")

    def _deciding(self, model: Any, id: str, rule: Any, once: str | None) -> Deciding:
        if once is not None and not 0 < len(once) <= ONCE_CHARS:
            raise BadOption(f"once={once!r}: expected a text of 1 to {ONCE_CHARS} characters")
        if isinstance(model, Decision):
            return DecidingAcross(self, model, once)
        if not callable(rule):
            raise BadOption(
                f"decide({model!r}, {id!r}, {rule!r}): expected a rule, as decide(Account, id, lambda a: a.withdraw(5))"
            )
        return Deciding(self, model, id, rule, once)

    # ── transactions, streams ────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator["Together"]:
        """Several aggregates, published events and `db` effects as one: everything happens when the block ends, or nothing.

        Raises Conflict if somebody was faster with one of the streams.
        """
        together = Together(self)
        yield together
        await together.commit()

    async def close_stream(self, stream: str, *, reason: str) -> int:
        """Let nothing be appended to a stream any more; returns its version."""
        return await self.store.close_stream(stream, reason)

    async def truncate_stream(self, stream: str, *, before: int) -> None:
        """Hide the events of a stream below a version; `trim` may remove them. What is folded from then on starts there."""
        await self.store.truncate_stream(stream, before)

    async def take_snapshot(self, model: Any, id: str) -> int:
        """Keep the state of a stream now, whatever the policy says; returns its version. Raises BadOption without a policy."""
        reducer = reducer_of(model)
        if reducer.snapshot is None:
            raise BadOption(f"{reducer.name} has no snapshot policy, so none would be read: declare snapshot=Snapshot(every=200)")
        return await self.snapshots.take(reducer, id, self.keys)


def until_of(version: int | None, position: int | None, at: datetime | None) -> Until:
    """The place in the past that was asked for; raises BadOption for more than one."""
    if [version, position, at].count(None) < 2:
        raise BadOption("version=, position= and at= each name a place in the past: give one of them")
    return Until(version, position, None if at is None else us_of(at, "at"))


@dataclass(slots=True)
class _Part:
    """A stream in a transaction. state: an Aggregate, or the state of a Decider after its `events`."""

    model: Any
    stream: str
    state: Any
    version: int
    events: tuple[Any, ...] = ()


class Together:
    """What a transaction() block collects. What it loads is saved, all with one commit, when the block ends."""

    def __init__(self, app: Streams) -> None:
        self._app = app
        self._parts: dict[str, _Part] = {}
        self._published: list[object] = []
        self._effects: list[Callable[[Db], object]] = []
        self.receipt: Receipt | None = None

    async def load(self, model: type[A], id: str) -> A:
        """The aggregate, to be saved with the transaction; the same object if it was loaded before."""
        aggregate: A = (await self._part(model, id)).state
        return aggregate

    async def decide(self, model: Decider[S], id: str, rule: Callable[[S], Any]) -> S:
        """Let a Decider's rule decide, to be appended with the transaction; the state after it."""
        part = await self._part(model, id)
        part.state, events, _ = ruled(reducer_of(model), part.state, rule)
        part.events += events
        state: S = part.state
        return state

    async def _part(self, model: Any, id: str) -> _Part:
        reducer = reducer_of(model)
        stream = reducer.stream_of(id)
        if stream not in self._parts:
            state, version = await loaded(self._app, reducer, id)
            self._parts[stream] = _Part(model, stream, state, version)
        part = self._parts[stream]
        if part.model is not model:
            raise BadOption(f"stream {stream!r} is in this transaction already, as another model: use one of them for it")
        return part

    def publish(self, *events: object) -> None:
        """Publish with the transaction."""
        self._published.extend(events)

    def effect(self, write: Callable[[Db], object]) -> None:
        """Write tables of your own with the transaction; write: called with the database when the block has ended."""
        self._effects.append(write)

    async def commit(self) -> None:
        """Do all of it; transaction() calls this at the end of the block."""
        app = self._app
        changed = [(part, self._envelopes(part)) for part in self._parts.values() if _events(part)]
        published = [app.envelope(event) for event in self._published]

        def write(tx: Transaction) -> list[list[int]]:
            positions = [tx.append(own, stream=part.stream, expected=part.version) for part, own in changed]
            positions.append(tx.append(published) if published else [])
            for effect in self._effects:
                effect(tx)
            return positions

        events = len(published) + sum(len(own) for _, own in changed)
        limit_us = len(self._effects) * EFFECT_US + events * APPEND_US
        positions = await app.store.transact(write, limit_us=limit_us if self._effects else None)
        envelopes = [envelope for _, own in changed for envelope in own] + published
        at = [position for own in positions for position in own]
        if at:
            self.receipt = receipt_of(app, envelopes[-1], at[-1])
        for part, own in changed:
            if isinstance(part.state, Aggregate):
                saved(app, part.state, part.version, part.state.uncommitted[: len(own)], self.receipt)

    def _envelopes(self, part: _Part) -> list[Envelope]:
        if isinstance(part.state, Aggregate):
            return prepared(self._app, part.state, part.stream, part.state.uncommitted)
        return [self._app.envelope(event, stream=part.stream) for event in part.events]


def _events(part: _Part) -> tuple[Any, ...]:
    return part.state.uncommitted if isinstance(part.state, Aggregate) else part.events
