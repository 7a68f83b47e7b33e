"""Typed events to bytes and back."""

import enum
import json
import uuid
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Literal

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilogue import BadOption, DecodeError, Envelope, UnknownEvent, event
from trilogue.codec import coder, envelope
from trilogue.events import EARLIEST_US, LATEST_US


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Flag(enum.StrEnum):
    ON = "on"


@dataclass(frozen=True, slots=True)
class Inner:
    name: str
    at: datetime
    price: Decimal | None = None


class Cat(msgspec.Struct, tag="cat", frozen=True):
    lives: int


class Dog(msgspec.Struct, tag="dog", frozen=True):
    tricks: tuple[str, ...] = ()


class Address(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)
    street: str = pydantic.Field(alias="st")
    built: date | None = None
    data: bytes = b""


@event("codec.dataclass", key="name")
@dataclass(frozen=True, slots=True)
class AsDataclass:
    name: str
    maybe: int | None
    either: int | str | None
    at: datetime
    day: date
    clock: time
    span: timedelta
    price: Decimal
    ident: uuid.UUID
    colour: Colour
    level: Level
    flag: Flag
    blob: bytes
    inner: Inner
    inners: list[Inner]
    pet: Cat | Dog
    address: Address | None
    by_name: dict[str, Inner]
    pair: tuple[int, str]
    kind: Literal["x", "y"]
    some: frozenset[int] = frozenset()
    ratio: float = 0.0


@event("codec.struct", key="name")
class AsStruct(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    maybe: int | None
    either: int | str | None
    at: datetime
    price: Decimal
    ident: uuid.UUID
    colour: Colour
    level: Level
    blob: bytes
    inner: Inner
    pet: Cat | Dog
    address: Address
    ratio: float = 0.0


@event("codec.model", key="name")
class AsModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)
    name: str
    maybe: int | None
    either: int | str | None
    at: datetime
    day: date
    price: Decimal
    ident: uuid.UUID
    colour: Colour
    level: Level
    blob: bytes
    inner: Inner
    address: Address
    ratio: float = 0.0


@dataclass(slots=True)
@event("codec.below", key="name")
class Below:
    name: str
    inner: Inner | None = None


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WHOLE = st.integers(-(2**63), 2**63 - 1)
MOMENTS = st.datetimes(timezones=st.just(UTC))
PRICES = st.decimals(allow_nan=False, allow_infinity=False)
INNERS = st.builds(Inner, TEXT, MOMENTS, st.none() | PRICES)
ADDRESSES = st.builds(lambda s, d, b: Address(st=s, built=d, data=b), TEXT, st.none() | st.dates(), TEXT.map(str.encode))
PETS = st.builds(Cat, WHOLE) | st.builds(Dog, st.lists(TEXT, max_size=3).map(tuple))
SPANS = st.timedeltas(timedelta(days=-(10**6)), timedelta(days=10**6))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)

COMMON: dict[str, Any] = {
    "name": TEXT,
    "maybe": st.none() | WHOLE,
    "either": st.none() | WHOLE | TEXT,
    "at": MOMENTS,
    "price": PRICES,
    "ident": st.uuids(),
    "colour": st.sampled_from(Colour),
    "level": st.sampled_from(Level),
    "inner": INNERS,
    "ratio": FLOATS,
}
DATACLASSES = st.builds(
    AsDataclass,
    **COMMON,
    day=st.dates(),
    clock=st.times(),
    span=SPANS,
    flag=st.sampled_from(Flag),
    blob=st.binary(max_size=30),
    inners=st.lists(INNERS, max_size=3),
    pet=PETS,
    address=st.none() | ADDRESSES,
    by_name=st.dictionaries(TEXT, INNERS, max_size=3),
    pair=st.tuples(WHOLE, TEXT),
    kind=st.sampled_from(["x", "y"]),
    some=st.frozensets(WHOLE, max_size=3),
)
STRUCTS = st.builds(AsStruct, **COMMON, blob=st.binary(max_size=30), pet=PETS, address=ADDRESSES)
MODELS = st.builds(AsModel, **COMMON, day=st.dates(), blob=TEXT.map(str.encode), address=ADDRESSES)
BELOWS = st.builds(Below, TEXT, st.none() | INNERS)


@given(st.one_of(DATACLASSES, STRUCTS, MODELS, BELOWS))
def test_events_come_back_as_they_went(value: Any) -> None:
    made = envelope(value)
    again = coder(type(value)).decode(made.data)
    assert again == value
    assert type(again) is type(value)
    assert made.key == value.name
    assert json.loads(made.data)["name"] == value.name


# ── what changes over time ───────────────────────────────────────────────────────────────────────────────────────────


@event("codec.evolved")
@dataclass
class Evolved:
    a: int
    b: str = "default"
    c: list[int] = field(default_factory=list)


def test_more_fields_are_ignored_and_missing_ones_have_their_defaults() -> None:
    decode = coder(Evolved).decode
    assert decode(b'{"a":1,"zzz":{"deep":[1]}}') == Evolved(1, "default", [])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"5",
        b"{}",
        b'{"a":"1"}',
        b'{"a":1.5}',
        b'{"a":1}x',
        b"\xff\xfe",
        b'{"a":1,"b":"\xff"}',
        b"[" * 10_000,
    ],
)
def test_bytes_that_are_not_the_event(data: bytes) -> None:
    with pytest.raises(DecodeError, match="not a Evolved: "):
        coder(Evolved).decode(data)


@event("codec.checked")
@dataclass
class Checked:
    n: int

    def __post_init__(self) -> None:
        if self.n == 0:
            raise KeyError("zero")
        if self.n < 0:
            raise ValueError("negative")


@event("codec.checked_model")
class CheckedModel(pydantic.BaseModel):
    n: int

    @pydantic.field_validator("n")
    @classmethod
    def check(cls, n: int) -> int:
        if n == 0:
            raise KeyError("zero")
        return pydantic.TypeAdapter(pydantic.PositiveInt).validate_python(n)


@pytest.mark.parametrize("cls", [Checked, CheckedModel])
@pytest.mark.parametrize("n", [0, -1])
def test_whatever_a_class_says_against_the_bytes_is_a_decode_error(cls: type, n: int) -> None:
    with pytest.raises(DecodeError, match=cls.__name__):
        coder(cls).decode(json.dumps({"n": n}).encode())


@event("codec.aliased", key="user")
class Aliased(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    user: str = pydantic.Field(alias="userId")

    @pydantic.computed_field
    def shouted(self) -> str:
        return self.user.upper()


def test_a_model_with_an_alias_and_a_computed_field_comes_back() -> None:
    made = envelope(Aliased(userId="u1"))
    assert made.data == b'{"userId":"u1"}'
    assert made.key == "u1"
    assert coder(Aliased).decode(made.data) == Aliased(userId="u1")


@event("codec.renamed", key="user_id")
class Renamed(msgspec.Struct, rename="camel"):
    user_id: str


def test_a_renamed_struct_comes_back() -> None:
    made = envelope(Renamed("u1"))
    assert (made.data, made.key) == (b'{"userId":"u1"}', "u1")
    assert coder(Renamed).decode(made.data) == Renamed("u1")


# ── what cannot be an event ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_plain_class_is_refused() -> None:
    @event("codec.plain")
    class Plain:
        a: int

    with pytest.raises(UnknownEvent, match="no dataclass, msgspec Struct or pydantic model; put @dataclass"):
        coder(Plain)


def test_a_union_that_cannot_be_told_apart_is_refused() -> None:
    @dataclass
    class Other:
        y: int

    @event("codec.union")
    @dataclass
    class Union:
        u: Inner | Other

    with pytest.raises(UnknownEvent, match=r"'codec\.union': .*Union cannot be read from JSON: Type unions"):
        coder(Union)


def test_an_annotation_that_names_nothing_is_refused() -> None:
    @event("codec.nothing")
    @dataclass
    class Nothing:
        u: "NoSuchThing"  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(UnknownEvent, match="NoSuchThing"):
        coder(Nothing)


def test_without_event_is_refused() -> None:
    with pytest.raises(UnknownEvent, match=r"Inner is not an event: put @event\('some.type'\) above the class"):
        envelope(Inner("a", datetime.now(UTC)))


@event("codec.any")
@dataclass
class Anything:
    value: Any


@pytest.mark.parametrize("value", [object(), "\ud800", {(1, 2): 3}, 1j, open])
def test_what_cannot_be_encoded_is_refused_by_name(value: object) -> None:
    with pytest.raises(BadOption, match=r"event 'codec\.any' cannot be encoded: "):
        envelope(Anything(value))


@pytest.mark.parametrize("value", [2**64, -(2**70), "", "\x00", 0.1, 1e308, [], {"": None}])
def test_values_at_the_edge_come_back(value: object) -> None:
    assert coder(Anything).decode(envelope(Anything(value)).data) == Anything(value)


def test_a_circle_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(BadOption, match=r"'codec\.any' cannot be encoded"):
        envelope(Anything(circle))


# ── envelopes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_envelope_says_what_it_was_told() -> None:
    made = envelope(Below("u1"), id="i", time_us=5, source="s")
    assert (made.id, made.type, made.key, made.time_us, made.source, made.schema_version) == ("i", "codec.below", "u1", 5, "s", 1)
    assert (made.correlation_id, made.causation_id) == (None, None)


def test_causes_are_inherited() -> None:
    first = Envelope("1", "a", b"", traceparent="00-1")
    second = envelope(Below("u"), id="2", cause=first)
    third = envelope(Below("u"), id="3", cause=second)
    assert (second.correlation_id, second.causation_id, second.traceparent) == ("1", "1", "00-1")
    assert (third.correlation_id, third.causation_id, third.traceparent) == ("1", "2", "00-1")


def test_an_empty_id_is_not_replaced_by_a_new_one() -> None:
    assert envelope(Below("u"), id="").id == ""


@pytest.mark.parametrize("time_us", [EARLIEST_US - 1, LATEST_US + 1, 10**18])
def test_a_time_beyond_the_calendar_is_refused(time_us: int) -> None:
    with pytest.raises(BadOption, match="year 1 to 9999"):
        envelope(Below("u"), time_us=time_us)
