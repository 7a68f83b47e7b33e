"""One decision: load, let the rule decide, append at the version that was read.

    rule on Account v12 ──▶ [MoneyWithdrawn] ──append, expected 12──▶ Decided(version 13)         or Conflict: once more
    Enrol, records of course:c1 and student:s1 up to 940 ──▶ [Enrolled] ──append, unless newer than 940──▶ Decided
    with once: the answer is stored in the same transaction, and is the answer ever after

What is known of the program that decides: its store, its keys, how it makes envelopes (`Host`).
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from trilogue.aggregate import Aggregate, Boundary, Decision, Reducer, boundaries, decided, reducer_of
from trilogue.codec import Keys
from trilogue.errors import BadOption
from trilogue.events import Envelope, Receipt, Record, is_event
from trilogue.ports import Query, Store, Transaction
from trilogue.rehydrate import NOW, SEPARATOR, Snapshots, Until, pages, rehydrate

A = TypeVar("A", bound=Aggregate)
D = TypeVar("D", bound=Decision)
S = TypeVar("S")
ONCE = "once"
ONCE_KEPT_US = 7 * 86_400_000_000


class Host(Protocol):
    """The program a decision is made in."""

    store: Store
    keys: Keys | None
    snapshots: Snapshots

    def envelope(
        self, event: object, *, id: str | None = None, time_us: int | None = None, stream: str | None = None
    ) -> Envelope:
        """The event as it would travel."""
        ...


class Decided(msgspec.Struct, Generic[S], frozen=True):
    """What became of a decision.

    state: after it. events: what was appended. version: of the stream, 0 for a Decision. receipt: of the last event, None if
    there was none. answer: what the rule returned, for an Aggregate. repeated: it was decided before, under the same `once`.
    """

    state: S
    events: tuple[Any, ...]
    version: int
    receipt: Receipt | None
    answer: Any = None
    repeated: bool = False


class _Answer(msgspec.Struct):
    """What is stored under `once`."""

    version: int
    positions: list[int]
    answer: msgspec.Raw


# ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def loaded(host: Host, reducer: Reducer, id: str, until: Until = NOW) -> tuple[Any, int]:
    """The state of a stream and its version; a snapshot is taken beside it when the policy says so."""
    found = await rehydrate(host.store, reducer, id, host.keys, until)
    if until.is_now:
        host.snapshots.consider(reducer, id, host.keys, found.events, found.took_s)
    if isinstance(found.state, Aggregate):
        found.state.mark_saved(found.version)
    return found.state, found.version


def prepared(host: Host, aggregate: Aggregate, stream: str, events: Sequence[Any]) -> list[Envelope]:
    """The envelopes of an aggregate's events, the same ones if saving is tried again: their ids make it harmless."""
    envelopes: list[Envelope] = aggregate.__dict__.setdefault("_prepared", [])
    envelopes += [host.envelope(event, stream=stream) for event in events[len(envelopes) :]]
    return envelopes[: len(events)]


def saved(
    host: Host, aggregate: A, before: int, events: tuple[Any, ...], receipt: Receipt | None, answer: Any = None
) -> Decided[A]:
    """The aggregate's events are stored behind the version it had before."""
    version, own = before + len(events), aggregate.__dict__
    # What was emitted while this was being saved is still to be saved; and two savings at once are one.
    count = max(0, version - own.get("_version", 0))
    own["_prepared"] = own.get("_prepared", [])[count:]
    if count:
        aggregate.mark_saved(version, count)
    policy = aggregate.snapshot_policy
    if policy is not None and policy.every and version // policy.every > before // policy.every:
        cls: Any = type(aggregate)
        host.snapshots.consider(reducer_of(cls), aggregate.id, host.keys, policy.every, 0.0)
    return Decided(aggregate, events, version, receipt, answer)


def receipt_of(host: Host, envelope: Envelope, position: int) -> Receipt:
    """The receipt of a stored envelope."""
    return Receipt(envelope.id, position, host.store.durability)


def ruled(reducer: Reducer, state: Any, rule: Callable[[Any], Any]) -> tuple[Any, tuple[Any, ...], Any]:
    """Let a rule decide on a state: the state after it, the events, the answer. Raises what the rule raises."""
    outcome = rule(state)
    if inspect.iscoroutine(outcome):
        outcome.close()
        raise BadOption("a rule is a plain function of the state: ask and wait before, and give it what you have learnt")
    if isinstance(state, Aggregate):
        if is_event(type(outcome)) and outcome not in state.uncommitted:
            raise BadOption(f"the rule returned {outcome!r}: an Aggregate emits its events, as self.emit(...)")
        return state, state.uncommitted, outcome
    events = decided(outcome)
    for event in events:
        state = reducer.fold(state, event)
        if state is None:
            raise BadOption(f"{reducer.fold_name} returned None for {event!r}: it returns the state after the event")
    return state, tuple(events), None


def _encoded(answer: Any) -> bytes:
    try:
        return msgspec.json.encode(answer)
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise BadOption(f"the answer {answer!r} cannot be stored under once=: {error}; return plain data, or nothing") from error


# ── on one stream ────────────────────────────────────────────────────────────────────────────────────────────────────


class Deciding:
    """One decision on one stream, attempt by attempt."""

    def __init__(self, host: Host, model: Any, id: str, rule: Any, once: str | None) -> None:
        self.host, self.id, self.rule = host, id, rule
        self.reducer = reducer_of(model)
        self.stream = self.reducer.stream_of(id)
        self.once = once
        self.since: int | None = None

    async def attempt(self) -> Any:
        """Load, rule, append; raises Conflict if somebody was faster."""
        self._note_erasures()
        state, version = await loaded(self.host, self.reducer, self.id)
        state, events, answer = ruled(self.reducer, state, self.rule)
        envelopes = [self.host.envelope(event, stream=self.stream) for event in events]
        if self.once is not None:
            return await self._attempt_once(state, version, events, envelopes, answer)
        if not envelopes:
            return Decided(state, (), version, None, answer)
        positions = await self.host.store.append(envelopes, expected=(self.stream, version))
        return self._done(state, version, events, envelopes, positions, answer)

    def _note_erasures(self) -> None:
        keys = self.host.keys if self.reducer.is_personal else None
        self.since = None if keys is None else keys.erasures()

    def _done(
        self, state: Any, version: int, events: tuple[Any, ...], envelopes: list[Envelope], positions: list[int], answer: Any
    ) -> Any:
        if not positions:
            return Decided(state, (), version, None, answer)
        receipt = receipt_of(self.host, envelopes[-1], positions[-1])
        if isinstance(state, Aggregate):
            return saved(self.host, state, version, events, receipt, answer)
        return Decided(state, events, version + len(events), receipt, answer)

    async def _attempt_once(
        self, state: Any, version: int, events: tuple[Any, ...], envelopes: list[Envelope], answer: Any
    ) -> Any:
        encoded = _encoded(answer)

        def commit(tx: Transaction) -> list[int] | None:
            if tx.state(ONCE, self._once_id()) is not None:
                return None
            positions = tx.append(envelopes, stream=self.stream, expected=version) if envelopes else []
            self._remember(tx, _Answer(version + len(events), positions, msgspec.Raw(encoded)))
            return positions

        positions = await self.host.store.transact(commit, rows=3 + len(envelopes))
        if positions is None:
            return await self.repeated()
        return self._done(state, version, events, envelopes, positions, msgspec.json.decode(encoded))

    def _once_id(self) -> str:
        return f"{self.stream}{SEPARATOR}{self.once}"

    def _remember(self, tx: Transaction, answer: _Answer) -> None:
        body = msgspec.json.encode(answer)
        if self.reducer.is_personal and self.host.keys is not None:
            body = self.host.keys.seal_state(body, since=self.since) or b""
        tx.forget_states(ONCE, tx.now_us - ONCE_KEPT_US, 2)  # two go where one comes: bounded, and nobody has to tidy up
        tx.set_state(ONCE, self._once_id(), body)

    async def _answered(self) -> _Answer | None:
        """What was stored under this `once`; an empty answer if somebody was erased since."""
        body = await self.host.store.state(ONCE, self._once_id())
        if body is None:
            return None
        if self.reducer.is_personal and self.host.keys is not None:
            body = self.host.keys.unseal_state(body)
        return _Answer(0, [], msgspec.Raw(b"null")) if body is None else msgspec.json.decode(body, type=_Answer)

    async def repeated(self) -> Any:
        """What was decided before under the same `once`; None if nothing was."""
        stored = await self._answered()
        if stored is None:
            return None
        state = await self._state_at(stored.version)
        records = await self._records(stored.positions)
        events = tuple(self.reducer.read(record, self.host.keys) for record in records)
        receipt = receipt_of(self.host, records[-1], records[-1].position) if records else None
        return Decided(state, events, stored.version, receipt, msgspec.json.decode(stored.answer), repeated=True)

    async def _state_at(self, version: int) -> Any:
        return (await loaded(self.host, self.reducer, self.id, Until(version=version)))[0]

    async def _records(self, positions: list[int]) -> list[Record]:
        if not positions:
            return []
        query = Query(stream=self.stream or None, after=positions[0] - 1, before=positions[-1] + 1)
        wanted = set(positions)
        return [record async for page in pages(self.host.store, query) for record in page if record.position in wanted]


# ── across streams ───────────────────────────────────────────────────────────────────────────────────────────────────


class DecidingAcross(Deciding):
    """One decision on what carries some tags, attempt by attempt."""

    def __init__(self, host: Host, decision: Decision, once: str | None) -> None:
        cls: Any = type(decision)
        self.host, self.once, self.template = host, once, decision
        self.reducer, self.stream = reducer_of(cls), ""
        self.since: int | None = None

    def _once_id(self) -> str:
        return f"{self.reducer.name}{SEPARATOR}{self.once}"

    async def attempt(self) -> Any:
        """Read the boundary, decide, append unless something matching arrived; raises Conflict if it did."""
        self._note_erasures()
        decision, read = await read_boundary(self.host, self.template)
        events = tuple(decided(decision.decide()))
        envelopes = [self.host.envelope(event) for event in events]

        def commit(tx: Transaction) -> list[int] | None:
            if self.once is not None and tx.state(ONCE, self._once_id()) is not None:
                return None
            positions = tx.append(envelopes, unless=read) if envelopes else []
            if self.once is not None:
                self._remember(tx, _Answer(0, positions, msgspec.Raw(b"null")))
            return positions

        if not envelopes and self.once is None:
            return Decided(decision, (), 0, None)
        positions = await self.host.store.transact(commit, rows=3 + len(envelopes))
        if positions is None:
            return await self.repeated()
        receipt = receipt_of(self.host, envelopes[-1], positions[-1]) if positions else None
        return Decided(decision, events, 0, receipt)

    async def _state_at(self, version: int) -> Any:
        return copy.deepcopy(self.template)


async def read_boundary(host: Host, template: D, until: Until = NOW) -> tuple[D, list[Query]]:
    """A decision with everything in its boundary folded, and the queries that must find nothing newer when it is appended."""
    decision = copy.deepcopy(template)
    cls: Any = type(decision)
    reducer = reducer_of(cls)
    # The end of the log first: what arrives while the parts are read is newer for each of them.
    newest = await host.store.read(Query(reverse=True, limit=1))
    head = newest[0].position if newest else 0
    guarded = [_query(part, reducer) for part in boundaries(decision)]
    before = (head if until.position is None else min(head, until.position)) + 1
    until_us = None if until.time_us is None else until.time_us + 1
    found: dict[int, Record] = {}
    for query in guarded:
        async for page in pages(host.store, replace(query, before=before, until_us=until_us)):
            found.update((record.position, record) for record in page)
    for position in sorted(found):
        code = reducer.coders.get(found[position].type)
        if code is not None:  # else it is guarded, but changes nothing of what is decided
            decision = reducer.fold(decision, code.read(found[position], host.keys))
    return decision, [replace(query, after=head) for query in guarded]


def _query(part: Boundary, reducer: Reducer) -> Query:
    """What of a boundary the decision folds: a type it does not know can change nothing of what it decides."""
    return Query(types=tuple(part.types or sorted(reducer.coders)), tags=part.tags)
