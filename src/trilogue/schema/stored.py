"""Whether this code reads what a log holds: records of every type and schema version, held ones, timers.

    order.placed 1    31,204 stored    2,000 read    3 not: position 17: not an OrderPlaced: …
    order.placed 2     8,120 stored    2,000 read
    held records                          41 read
    timers                                12 read    1 not: timer 7c1…: there is no upcast= from version 1 to 2

Personal data is read as if everybody had been erased: no keys are needed, and that it can be read so is a promise too.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import msgspec

from trilogue.codec import Coder
from trilogue.errors import DecodeError
from trilogue.events import Envelope, Record
from trilogue.ports import Kind, Query, Store
from trilogue.schema.forms import form_of
from trilogue.sealing import Keys

SAMPLE = 1_000
PAGE = 1_000
MOST_SAID = 5
OURS = "trilogue."


@dataclass(frozen=True, slots=True)
class Unread:
    """Something stored that this code cannot read. place: as "position 17" or "timer 7c1…"."""

    type: str
    schema_version: int
    place: str
    why: str

    def __str__(self) -> str:
        return f"{self.type} version {self.schema_version}, {self.place}: {self.why}"


@dataclass(slots=True)
class Tally:
    """What was read of one kind of things. stored: how many were ever accepted, None where nobody counts.
    unread: the first of those that cannot be read, `failed` of them in all."""

    name: str
    schema_version: int | None = None
    stored: int | None = None
    looked: int = 0
    failed: int = 0
    unread: list[Unread] = field(default_factory=list)

    def look(self, code: Coder, envelope: Envelope, place: str) -> None:
        """Try one; what went wrong is noted."""
        self.looked += 1
        why = why_unread(code, envelope)
        if why is None:
            return
        self.failed += 1
        if len(self.unread) < MOST_SAID:
            self.unread.append(Unread(envelope.type, envelope.schema_version, place, why))


@dataclass(frozen=True, slots=True)
class Report:
    """What read_stored() found. unknown: types this code has no class for. newer: kinds that newer code has written."""

    tallies: list[Tally]
    unknown: list[Kind]
    newer: list[Kind]

    @property
    def unread(self) -> list[Unread]:
        """Everything that was noted as unreadable."""
        return [each for tally in self.tallies for each in tally.unread]


async def read_stored(
    store: Store, coders: Mapping[str, Coder], *, sample: int | None = SAMPLE, advance: Callable[[int], object] = lambda _: None
) -> Report:
    """Decode what an open store holds.

    sample: the oldest and the newest so many of each type and schema version; None: all. advance: told how many were read.
    """
    kinds = [kind for kind in await store.kinds() if not kind.type.startswith(OURS)]
    tallies = []
    for kind in kinds:
        if kind.type in coders:
            tally = Tally(kind.type, kind.schema_version, kind.count)
            tallies.append(tally)
            async for page in _sampled(store, kind, sample):
                _look(tally, coders, page)
                advance(len(page))
    tallies += [await _held(store, coders), await _timers(store, coders)]
    newer = [kind for kind in kinds if kind.type in coders and kind.schema_version > coders[kind.type].version]
    return Report(tallies, [kind for kind in kinds if kind.type not in coders], newer)


def _look(tally: Tally, coders: Mapping[str, Coder], page: Sequence[Record]) -> None:
    for record in page:
        if record.type in coders:
            tally.look(coders[record.type], record, f"position {record.position}")


async def _sampled(store: Store, kind: Kind, sample: int | None) -> AsyncIterator[list[Record]]:
    """The oldest, then the newest of a kind, none twice."""
    query = Query(types=(kind.type,), schema_version=kind.schema_version)
    left = sample
    while page := await store.read(replace(query, limit=PAGE if left is None else min(PAGE, left))):
        yield page
        query = replace(query, after=page[-1].position)
        left = None if left is None else left - len(page)
        if left == 0:
            break
    left, query = sample or 0, replace(query, reverse=True)
    while left and (page := await store.read(replace(query, limit=min(PAGE, left)))):
        yield page
        query = replace(query, before=page[-1].position)
        left -= len(page)


async def _held(store: Store, coders: Mapping[str, Coder]) -> Tally:
    tally, after = Tally("held records"), 0
    while page := await store.held(after=after, limit=PAGE):
        _look(tally, coders, page)
        after = page[-1].position
    return tally


async def _timers(store: Store, coders: Mapping[str, Coder]) -> Tally:
    tally, after = Tally("timers"), ""
    while page := await store.timers(after=after, limit=PAGE):
        for timer in page:
            if timer.envelope.type in coders:
                tally.look(coders[timer.envelope.type], timer.envelope, f"timer {timer.envelope.id}")
        after = page[-1].envelope.id
    return tally


# ── one envelope ─────────────────────────────────────────────────────────────────────────────────────────────────────


def why_unread(code: Coder, envelope: Envelope) -> str | None:
    """Why this code cannot read an envelope, None if it can."""
    stored = envelope.schema_version
    is_missing = stored < code.version and not code.mark.upcasts
    missing = f"there is no upcast= from version {stored} to {code.version}"
    try:
        code.read(envelope, _EVERYBODY_ERASED)
    except DecodeError as error:
        newer = f"newer code wrote version {stored}, this is version {code.version}: "
        return f"{missing}: {error}" if is_missing else f"{newer if stored > code.version else ''}{error}"
    lost = _dropped(code, envelope) if is_missing else []
    # Reading what was renamed as if it were not there is the mistake that no error tells of.
    return f"{missing}: what it holds in {', '.join(lost)} would be dropped" if lost else None


def _dropped(code: Coder, envelope: Envelope) -> list[str]:
    fields = form_of(code)["schema"].get("properties")
    data = msgspec.json.decode(envelope.data)
    return sorted(data.keys() - fields.keys()) if isinstance(data, dict) and fields is not None else []


class _Erased:
    def unseal(self, sealed: str, about: bytes) -> bytes | None:
        return None


class _AsStored:
    def unseal(self, sealed: str, about: bytes) -> bytes | None:
        return msgspec.json.encode(sealed)


_EVERYBODY_ERASED = cast("Keys", _Erased())  # only what reading asks for
_STAYS_SEALED = cast("Keys", _AsStored())


def in_todays_form(record: Record, coders: Mapping[str, Coder]) -> Record:
    """The record with its data and schema version as today's class would have them; what is sealed stays sealed.

    A type without a class stays as it is. Raises DecodeError.
    """
    code = coders.get(record.type)
    if code is None or record.schema_version >= code.version:
        return record
    fields: dict[str, Any] = {"data": code.current(record, _STAYS_SEALED), "schema_version": code.version}
    return msgspec.structs.replace(record, **fields)
