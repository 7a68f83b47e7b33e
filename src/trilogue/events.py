"""The nouns: an event before, on and after the log.

    Envelope    an event as it travels: CloudEvents 1.0 attributes, key, encoded data
    Record      an Envelope the log accepted: + position, recorded time; + stream and version where appended to a stream
    Delivery    a Record lent to one worker: + group, attempt, lease
    Settlement  the answer to a Delivery: done | retry | dead | release, + the Envelopes it emits
    Receipt     the answer to a publish: where it stands and what it survives

All times are microseconds since 1970 in UTC (`…_us`); properties give them as datetimes.
"""

import contextlib
import contextvars
import dataclasses
import operator
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from trilogue.errors import BadOption, TwiceNamed, UnknownEvent
from trilogue.patterns import check_type

if TYPE_CHECKING:
    from trilogue.ports import Db

T = TypeVar("T")
KEY_CHARS = 512
MOST_VERSION = 2**31 - 1
_MARK = "__trilogue_event__"
_topics: dict[str, str] = {}


# ── event classes ────────────────────────────────────────────────────────────────────────────────────────────────────


Upcast = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class EventType:
    """What @event says of a class: the stored name, which fields are key and tags, the schema version and how older ones
    become it, the topic, whom the data is about and which fields are personal."""

    name: str
    key: str | None = None
    version: int = 1
    topic: str | None = None
    tags: tuple[str, ...] = ()
    upcasts: tuple[Upcast | None, ...] = ()
    subject: str | None = None
    personal: tuple[str, ...] = ()


def event(
    name: str,
    *,
    key: str | None = None,
    version: int = 1,
    topic: str | None = None,
    tags: Sequence[str] = (),
    upcast: Mapping[int, Upcast | None] | None = None,
    subject: str | None = None,
    personal: Sequence[str] = (),
) -> Callable[[type[T]], type[T]]:
    """Declare a dataclass, msgspec Struct or pydantic model to be an event.

    name: the stored type, as "video.watched"; never changes, the class may move and be renamed freely.
    key: the field whose value orders deliveries; None: any order.
    version: the schema version, from 1. upcast: for each older version the pure function that makes the next one's data of
    it (None: it reads as it is): `{1: rename_amount, 2: None}` for version 3.
    topic: the Kafka topic; None: the first word of the name with "-events".
    tags: fields by which decisions across streams find the event, as `course:c1` for field course.
    personal: fields that are sealed with the key of the person whom the field `subject` names, and erased with it.
    Raises BadPattern for a name that cannot be a type, BadOption for a version out of 1 to 2³¹ - 1, a version without a way
    from it to the next, or personal fields without a subject, TwiceNamed for a second topic of the same type.

    >>> @event("video.watched", key="user")
    ... @dataclass(frozen=True)
    ... class Watched:
    ...     user: str
    ...     video: str
    """
    check_type(name)
    if not isinstance(version, int) or not 1 <= version <= MOST_VERSION:
        raise BadOption(f"version of event {name!r} is {version!r}: expected a whole number, 1 to {MOST_VERSION}")
    if bool(personal) != (subject is not None):
        raise BadOption(f"event {name!r}: personal= names the fields to seal and subject= the field that says whose: give both")
    if topic is not None:
        _name_topic(name, topic)
    mark = EventType(name, key, version, topic, tuple(tags), _upcasts(name, version, upcast), subject, tuple(personal))

    def declare(cls: type[T]) -> type[T]:
        # A mark on the class and not a registry of classes: @dataclass(slots=True) makes a second class after us, and the
        # mark is copied to it, so that whichever class the program holds is the right one.
        setattr(cls, _MARK, mark)
        return cls

    return declare


def _name_topic(name: str, topic: str) -> None:
    """Remember it by type: who publishes an Envelope and who subscribes to a pattern have no class to ask."""
    if _topics.setdefault(name, topic) != topic:
        raise TwiceNamed(f"event {name!r} is given the topics {_topics[name]!r} and {topic!r}: one type goes to one topic")


def named_topics() -> Mapping[str, str]:
    """The topics of all types that name one, of every class with @event in this process."""
    return _topics


def _upcasts(name: str, version: int, upcast: Mapping[int, Upcast | None] | None) -> tuple[Upcast | None, ...]:
    """One step per older version, in order; all there or none of them declared."""
    if upcast is None:
        return ()
    older = range(1, version)
    if sorted(upcast) != list(older):
        raise BadOption(
            f"event {name!r} has version {version} and upcast= for {sorted(upcast)}: expected one step for each of "
            f"{list(older)}, None where that version reads as it is"
        )
    wrong = [step for step in older if upcast[step] is not None and not callable(upcast[step])]
    if wrong:
        raise BadOption(f"event {name!r}: upcast[{wrong[0]}] is {upcast[wrong[0]]!r}: expected a function dict -> dict, or None")
    return tuple(upcast[step] for step in older)


def event_type(cls: type) -> EventType:
    """What @event said of this class; raises UnknownEvent if it said nothing (a base class's mark does not count)."""
    mark = vars(cls).get(_MARK)
    if isinstance(mark, EventType):
        return mark
    raise UnknownEvent(f"{cls.__qualname__} is not an event: put @event('some.type') above the class")


def is_event(cls: Any) -> bool:
    """Whether this is a class with @event."""
    return isinstance(cls, type) and _MARK in vars(cls)


def key_reader(cls: type) -> Callable[[object], str | None]:
    """A function that reads the key of an event of this class; raises UnknownEvent if the key names no field."""
    mark = event_type(cls)
    return (lambda _: None) if mark.key is None else field_reader(cls, "key", mark.key)


def tags_reader(cls: type) -> Callable[[object], tuple[str, ...]]:
    """A function that reads the tags of an event of this class; raises UnknownEvent if one names no field."""
    readers = [(name, field_reader(cls, "tags", name)) for name in event_type(cls).tags]
    if not readers:
        return lambda _: ()
    return lambda e: tuple(f"{name}:{value}" for name, read in readers if (value := read(e)) is not None)


def field_reader(cls: type, what: str, field: str) -> Callable[[object], str | None]:
    """A function that reads one field as text; raises UnknownEvent if there is no such field. what: which option named it."""
    fields = field_names(cls)
    if field not in fields:
        name = event_type(cls).name
        raise UnknownEvent(f"event {name!r}: {what} {field!r} is no field of {cls.__qualname__}, which has {sorted(fields)}")
    read = operator.attrgetter(field)
    return lambda e: value if type(value := read(e)) is str or value is None else _key_text(value)


def _key_text(value: object) -> str:
    """A key that is no text, as it stands in the data too."""
    return str(value.value if isinstance(value, Enum) else value)


def field_names(cls: type) -> set[str]:
    """The fields of a dataclass, Struct or pydantic model."""
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    names: Any = getattr(cls, "__struct_fields__", None) or getattr(cls, "model_fields", ())
    return set(names)


# ── identities ───────────────────────────────────────────────────────────────────────────────────────────────────────


def now_us() -> int:
    """The wall clock, in microseconds."""
    return time.time_ns() // 1_000 if _Clock.stands_at_us is None else _Clock.stands_at_us


def set_clock(us: int | None) -> int | None:
    """Let this process's wall clock stand still at a time, for tests that let hours pass; None: it goes again.

    us: microseconds since 1970. Returns what was set before.
    """
    before, _Clock.stands_at_us = _Clock.stands_at_us, us
    return before


class _Clock:
    """The millisecond ids are made in, as text with random bits behind, and how many of its 4,096 ids are used."""

    stands_at_us: int | None = None
    ms = 0
    head = ""
    tail = ""
    count = 0


def new_id() -> str:
    """A new UUID of version 7 (RFC 9562): time and a counter in front, so that the ids of a process only ever grow."""
    ms = time.time_ns() // 1_000_000
    if ms > _Clock.ms:
        _next_ms(ms)
    elif _Clock.count == 4_095:
        _next_ms(_Clock.ms + 1)  # more than 4,096 in a millisecond: borrowed from the next
    else:
        _Clock.count += 1
    return f"{_Clock.head}{_Clock.count:03x}{_Clock.tail}"


def _next_ms(ms: int) -> None:
    # Fresh random bits a millisecond and not an id: the counter tells the ids of one process apart, the bits processes.
    head, tail = f"{ms:012x}", f"{1 << 63 | random.getrandbits(62):x}"
    _Clock.ms, _Clock.count = ms, 0
    _Clock.head, _Clock.tail = f"{head[:8]}-{head[8:]}-7", f"-{tail[:4]}-{tail[4:]}"


def derived_id(time_us: int, *parts: str | int) -> str:
    """The same UUID (version 8, RFC 9562) for the same parts; its first 48 bits are the time in milliseconds.

    Ids of imported rows and of emitted events are made so: a repetition makes the same id and adds nothing, and the
    leading time keeps the index of ids growing at its end only.
    """
    # Encoded as a list, so that no two different lists of parts are the same bytes.
    digest = int.from_bytes(blake2b(msgspec.json.encode([str(part) for part in parts]), digest_size=10).digest(), "big")
    ms = (time_us // 1_000) & ((1 << 48) - 1)
    tail = digest & ((1 << 74) - 1)
    return _uuid((ms << 80) | (0x8 << 76) | ((tail >> 62) << 64) | (0b10 << 62) | (tail & ((1 << 62) - 1)))


def caused_id(cause: str, *parts: str | int) -> str:
    """The id of what an event led to, made of nothing but the event's id and these parts.

    A broker delivers an event again, or twice, at another time and in another place: what it leads to is the same all the same.
    """
    return derived_id(_moment_in(cause), cause, *parts)


def _moment_in(id: str) -> int:
    """The time in a UUID of version 7 or 8, in microseconds; 0 in any other id."""
    digits = id[:8] + id[9:13]
    is_timed = len(id) == 36 and id[14] in "78" and _HEX.issuperset(digits)
    return int(digits, 16) * 1_000 if is_timed else 0


_HEX = frozenset("0123456789abcdef")


def _uuid(number: int) -> str:
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


# ── who and why ──────────────────────────────────────────────────────────────────────────────────────────────────────

_audit: contextvars.ContextVar[dict[str, str | int | bool] | None] = contextvars.ContextVar("trilogue_audit", default=None)


@contextlib.contextmanager
def audited(*, who: str | None = None, why: str | None = None) -> Iterator[None]:
    """Say who acts and why: every event made inside the block carries it, as CloudEvents extensions `who` and `why`.

    >>> with audited(who="clerk 7", why="court order 12/26"):
    ...     audit()
    {'who': 'clerk 7', 'why': 'court order 12/26'}
    """
    said = {name: text for name, text in (("who", who), ("why", why)) if text is not None}
    token = _audit.set({**(_audit.get() or {}), **said})
    try:
        yield
    finally:
        _audit.reset(token)


def audit() -> dict[str, str | int | bool] | None:
    """What audited() says here; None outside of any."""
    return _audit.get()


# ── on the log ───────────────────────────────────────────────────────────────────────────────────────────────────────


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def as_datetime(us: int) -> datetime:
    """Microseconds since 1970 as a datetime in UTC; exact, and the first or last possible one if it is out of range."""
    return _EPOCH + min(max(us, EARLIEST_US), LATEST_US) * _MICROSECOND


def as_us(moment: datetime) -> int:
    """A datetime with a time zone as microseconds since 1970; exact."""
    return (moment - _EPOCH) // _MICROSECOND


def us_of(moment: datetime, name: str) -> int:
    """A moment that somebody gave, in microseconds; raises BadOption for one without a time zone. name: of the argument."""
    if moment.tzinfo is None:
        raise BadOption(f"{name}={moment} has no time zone: write datetime(..., tzinfo=UTC)")
    return as_us(moment)


EARLIEST_US = as_us(datetime.min.replace(tzinfo=UTC))
LATEST_US = as_us(datetime.max.replace(tzinfo=UTC))


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """An event as it travels; the attributes are CloudEvents 1.0, `key` is its `partitionkey` extension.

    data: the encoded event (JSON). schema_version: of the event class. extensions: further CloudEvents attributes.
    tags: what decisions across streams find it by.
    """

    id: str
    type: str
    data: bytes
    key: str | None = None
    source: str = "trilogue"
    time_us: int = 0
    schema_version: int = 1
    correlation_id: str | None = None
    causation_id: str | None = None
    subject: str | None = None
    traceparent: str | None = None
    extensions: dict[str, str | int | bool] | None = None
    tags: tuple[str, ...] = ()

    @property
    def time(self) -> datetime:
        """When it happened, as its source says."""
        return as_datetime(self.time_us)

    @property
    def who(self) -> str | None:
        """Who acted, as audited() said; None if it said nothing."""
        return self._said("who")

    @property
    def why(self) -> str | None:
        """Why, as audited() said; None if it said nothing."""
        return self._said("why")

    def _said(self, name: str) -> str | None:
        value = (self.extensions or {}).get(name)
        return None if value is None else str(value)


class Record(Envelope, frozen=True, gc=False):
    """An Envelope that the log accepted.

    position: its place in the log, from 1; on Kafka its offset in the partition; on RabbitMQ, which has no places, the number
    of the delivery. recorded_us: the log's own clock, never falling with position. stream, version: where it was appended with
    an expected version; None for published events. topic, partition: where Kafka keeps it.
    """

    position: int = 0
    recorded_us: int = 0
    stream: str | None = None
    version: int | None = None
    topic: str | None = None
    partition: int | None = None

    @property
    def recorded(self) -> datetime:
        """When the log accepted it."""
        return as_datetime(self.recorded_us)


# What a stored event survives: nothing; a kill of the server, not of its machine; power loss; the loss of one machine.
Durability = Literal["memory", "process-crash", "os-crash", "replicated"]


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What publish() returns: the event is on the log (or its timer is) and survives what `durability` names.

    id: the event's id. position: its place in the log (on Kafka the offset), None where there is none: a delayed event,
    RabbitMQ. due_us: when a delayed event enters. topic, partition: where Kafka keeps it.
    """

    id: str
    position: int | None
    durability: Durability
    due_us: int | None = None
    topic: str | None = None
    partition: int | None = None

    @property
    def token(self) -> str:
        """The position as text, to travel in an HTTP header: whoever has it can wait until a read model has got so far.

        Raises BadOption for one that has none: it is delayed, was published in a transaction of the user's, or is on a broker.
        """
        if self.due_us is not None:
            raise BadOption("this event is delayed: it can be waited for once it is on the log, and has no token before")
        if self.position is None or self.topic is not None:
            raise BadOption(
                "this event has no position that could be waited for: it is on a broker, or was published in a transaction of "
                "yours; wait_idle() waits for everything, and what a stream's decision returns has a token on every URL"
            )
        return str(self.position)


@dataclass(frozen=True, slots=True)
class Group:
    """A named reader of the log.

    patterns: which types. ordered: one at a time per key, in order. start: where a new group begins; "existing": binding it
    makes none, because only whoever moves it may.
    has_effects: it writes through `db`, so a replay in place needs its reset hook. app: the program whose handler it is.
    inbox: its records come from a broker, and the store keeps only those that did not go well.
    """

    name: str
    patterns: tuple[str, ...]
    ordered: bool = True
    start: Literal["now", "beginning", "existing"] = "now"
    has_effects: bool = False
    app: str = "trilogue"
    inbox: bool = False


class Lease:
    """The right to settle what came from one slot, shared by all its deliveries.

    It ends when its time has passed without a renewal, or when the slot was given to another worker.
    """

    __slots__ = ("clock", "epoch", "quiet_to", "revoked", "slot", "until_us")

    def __init__(self, slot: int, epoch: int, until_us: int, clock: Callable[[], int], quiet_to: int = 0) -> None:
        self.slot, self.epoch, self.until_us, self.clock = slot, epoch, until_us, clock
        self.quiet_to = quiet_to  # records up to this position are a replay: what they emit stays off the log
        self.revoked = False

    @property
    def lost(self) -> bool:
        """Whether a handler must not start any more."""
        return self.revoked or self.clock() > self.until_us


class Delivery(msgspec.Struct, eq=False):
    """A Record lent to one worker. attempt: from 1. replay: read again after a seek, its emits stay off."""

    record: Record
    group: str
    lease: Lease
    attempt: int = 1
    replay: bool = False
    is_held: bool = False  # it has a held row: settling must remove it
    span: Any = None  # which scanned part of the log it came from; the store's own


class Settlement(msgspec.Struct, gc=False):
    """The answer to one Delivery.

    verdict: done; retry after `after_us`, charged as an attempt unless `charged` is False; dead; or release: handed back as
    if never lent. park: a dead delivery blocks its key until somebody decides. emits: go onto the log with the settlement.
    """

    delivery: Delivery
    verdict: Literal["done", "retry", "dead", "release"] = "done"
    after_us: int = 0
    charged: bool = True
    park: bool = False
    error: str = ""
    traceback: str = ""
    emits: Sequence[Envelope] = ()

    @property
    def holds_key(self) -> bool:
        """Whether what follows of the same key has to wait for this record."""
        return self.verdict in ("retry", "release") or (self.verdict == "dead" and self.park)


@dataclass(slots=True, eq=False)
class InTransaction:
    """Deliveries whose handler runs inside the settlement, so that its effect happens exactly once.

    run: called with the database, inside a savepoint; returns the settlements. failed: what they are if run raises (and
    everything it wrote is undone). limit_us: how long its SQL may take. settlements: what they were, after the commit.
    doomed: it took the whole transaction down once, with this error; it fails without being run again.
    """

    deliveries: Sequence[Delivery]
    run: "Callable[[Db], Sequence[Settlement]]"
    failed: Callable[[Exception], Sequence[Settlement]]
    limit_us: int = 250_000
    settlements: Sequence[Settlement] = ()
    doomed: Exception | None = None
