"""Looking back: what was, what would have been, who did it and why, and what led to what.

what_if  the state at a version, position or time ──rule──▶ what would have happened; nothing is appended
diff     the state at one place and at another     ──▶ {"balance": (1000, 1300)} and the events in between
audit    one entry per event: version, when, who, why, and what it changed
trace    everything of one correlation, as a tree: each record under what caused it
fold     events to a value, without a table: for a page that is looked at now and then
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar, cast

import msgspec

from trilogue.aggregate import Decider, Decision, decided, reducer_of
from trilogue.codec import Keys
from trilogue.deciding import Decided, Host, loaded, read_boundary, ruled
from trilogue.errors import BadOption, UnknownEvent
from trilogue.events import Record
from trilogue.ports import Query, Store
from trilogue.rehydrate import pages, rehydrate
from trilogue.stream import until_of

S = TypeVar("S")
TRACED_RECORDS = 10_000
Place = int | datetime
Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Difference(Generic[S]):
    """Between two places of a stream. changes: by field, what it was and what it is. events: what happened in between."""

    before: S
    after: S
    changes: Changes
    events: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One event of a stream, with what it changed. who, why: as audited() said."""

    record: Record
    event: Any
    who: str | None
    why: str | None
    changes: Changes


@dataclass(frozen=True, slots=True)
class Traced:
    """One record of a trace. depth: how many causes lie between it and the root."""

    record: Record
    depth: int


class History:
    """What App inherits: looking back."""

    store: Store
    keys: Keys | None

    async def what_if(
        self,
        model: Any,
        id: str = "",
        rule: Callable[[Any], Any] | None = None,
        *,
        version: int | None = None,
        position: int | None = None,
        at: datetime | None = None,
    ) -> Decided[Any]:
        """Let a rule (or a Decision) decide on the past, or on now, and append nothing.

        Raises what the rule raises; arguments as those of load() and decide().
        """
        until, host = until_of(version, position, at), cast("Host", self)
        if isinstance(model, Decision):
            if version is not None:
                raise BadOption("a Decision reads many streams, which have versions of their own: say position= or at=")
            decision, _ = await read_boundary(host, model, until)
            return Decided(decision, tuple(decided(decision.decide())), 0, None)
        if rule is None:
            raise BadOption("what_if() needs a rule, as what_if(Account, id, lambda a: a.withdraw(5), version=3)")
        reducer = reducer_of(model)
        state, reached = await loaded(host, reducer, id, until)
        after, events, answer = ruled(reducer, state, rule)
        return Decided(after, events, reached + len(events), None, answer)

    async def diff(self, model: Any, id: str, before: Place, after: Place) -> Difference[Any]:
        """What changed between two places of a stream: versions, or recorded times.

        Raises BadOption if the first lies behind the second.
        """
        reducer = reducer_of(model)
        places = [
            until_of(*((place, None, None) if isinstance(place, int) else (None, None, place))) for place in (before, after)
        ]
        first, last = [await rehydrate(self.store, reducer, id, self.keys, place) for place in places]
        if first.version > last.version:
            raise BadOption(f"diff from {before} to {after}: the first lies behind the second, turn them around")
        query = Query(stream=reducer.stream_of(id), after=first.position, before=last.position + 1)
        records = [record async for page in pages(self.store, query) for record in page]
        events = tuple(reducer.read(record, self.keys) for record in records)
        return Difference(first.state, last.state, changes(first.state, last.state), events)

    async def audit(self, model: Any, id: str) -> list[Entry]:
        """The history of a stream: one entry per event, with who did it, why, and what it changed."""
        reducer = reducer_of(model)
        state, entries = reducer.new(id), []
        async for page in pages(self.store, Query(stream=reducer.stream_of(id))):
            for record in page:
                event, before = reducer.read(record, self.keys), state
                if record.type in reducer.coders:
                    state = reducer.fold(copy.deepcopy(state), event)
                entries.append(Entry(record, event, record.who, record.why, changes(before, state)))
        return entries

    async def trace(self, of: Record | str) -> list[Traced]:
        """Everything that belongs together with a record (or the id of one), each under what caused it, at most 10,000.

        Raises UnknownEvent if no record has this id.
        """
        return await traced(self.store, of if isinstance(of, Record) else await self._record(of))

    async def _record(self, id: str) -> Record:
        found = await self.store.read(Query(id=id, limit=1))
        if not found:
            raise UnknownEvent(f"no record has the id {id!r}: `trilogue tail` shows the ids there are")
        return found[0]

    async def fold(
        self,
        evolve: Callable[[S, Any], S],
        initial: S,
        *,
        key: str | None = None,
        stream: str | None = None,
        tags: Sequence[str] = (),
        after: int = 0,
    ) -> S:
        """Fold events to a value without keeping it; evolve(state, event) -> state says by annotation which events.

        key, stream, tags: of which records; none of them: of all.
        """
        reducer = reducer_of(Decider("fold-{id}", initial, evolve))
        query = Query(types=tuple(sorted(reducer.coders)), key=key, stream=stream, tags=tuple(tags), after=after)
        state: Any = copy.deepcopy(initial)
        async for page in pages(self.store, query):
            for record in page:
                state = evolve(state, reducer.coders[record.type].read(record, self.keys))
        return cast("S", state)


async def traced(store: Store, record: Record) -> list[Traced]:
    """Everything of a record's correlation, as a tree from its root on."""
    root = record.correlation_id or record.id
    found = await store.read(Query(id=root)) if root != record.id else [record]
    async for page in pages(store, Query(correlation=root)):
        found += page  # a root that names itself is among them once more
        if len(found) >= TRACED_RECORDS:
            break
    return _tree(found[:TRACED_RECORDS])


def changes(before: Any, after: Any) -> Changes:
    """By field what was and what is, where they differ; of a state without fields the whole, as `state`."""
    if dataclasses.is_dataclass(after):
        names = [field.name for field in dataclasses.fields(after)]
    elif isinstance(after, msgspec.Struct):
        names = list(after.__struct_fields__)
    elif before != after:
        return {"state": (before, after)}
    else:
        return {}
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _tree(records: Sequence[Record]) -> list[Traced]:
    """Each record after what caused it. What has no cause among them is a root, and of those that cause each other the first."""
    records = sorted(records, key=lambda record: record.position)
    ids = {record.id for record in records}
    caused: dict[str | None, list[Record]] = {}
    for record in records:
        cause = record.causation_id if record.causation_id in ids else None
        caused.setdefault(cause, []).append(record)
    found: dict[int, Traced] = {}
    for root in (*caused.get(None, ()), *records):
        open_ = [(root, 0)]
        while open_:
            record, depth = open_.pop()
            if record.position in found:
                continue
            found[record.position] = Traced(record, depth)
            open_ += [(child, depth + 1) for child in reversed(caused.get(record.id, ()))]
    return list(found.values())
