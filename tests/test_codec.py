"""Typed events to bytes and back; Envelopes to CloudEvents and back, beside the official SDK."""

import base64
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
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from trilogue import BadOption, DecodeError, Envelope, Record, UnknownEvent, event, from_cloudevent, to_cloudevent
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
SPANS = st.timedeltas(timedelta(days=-10**6), timedelta(days=10**6))
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
    [b"", b"{", b"null", b"[]", b"5", b"{}", b'{"a":"1"}', b'{"a":1.5}', b'{"a":1}x', b"\xff\xfe", b'{"a":1,"b":"\xff"}', b"[" * 10_000],
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


# ── CloudEvents ──────────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1, max_size=20)
NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=20).filter(
    lambda name: (
        name
        not in {
            "id", "source", "type", "specversion", "time", "subject", "partitionkey", "correlationid", "causationid", "traceparent",
            "schemaversion", "data", "datacontenttype", "dataschema", "sequence", "recordedtime",
        }  # fmt: skip
    )
)
JSON_DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode())
ENVELOPES = st.builds(
    Envelope,
    id=PLAIN,
    type=PLAIN,
    data=JSON_DATA,
    key=st.none() | PLAIN,
    source=PLAIN,
    time_us=st.integers(EARLIEST_US, LATEST_US),
    schema_version=st.integers(1, 2**31 - 1),
    correlation_id=st.none() | PLAIN,
    causation_id=st.none() | PLAIN,
    subject=st.none() | PLAIN,
    traceparent=st.none() | PLAIN,
    extensions=st.none()
    | st.dictionaries(NAMES, st.one_of(PLAIN, st.booleans(), st.integers(-(2**31), 2**31 - 1)), min_size=1, max_size=3),
)


@given(ENVELOPES)
def test_cloudevents_come_back_as_they_went(sent: Envelope) -> None:
    assert from_cloudevent(to_cloudevent(sent)) == sent


@given(ENVELOPES)
def test_the_official_sdk_reads_what_we_write(sent: Envelope) -> None:
    read = JSONFormat().read(CloudEvent, to_cloudevent(sent))
    assert (read.get_id(), read.get_source(), read.get_type()) == (sent.id, sent.source, sent.type)
    assert read.get_specversion() == "1.0"
    assert read.get_time() == sent.time
    assert read.get_subject() == sent.subject
    assert read.get_data() == json.loads(sent.data)
    assert read.get_extension("partitionkey") == sent.key
    assert read.get_extension("correlationid") == sent.correlation_id
    assert read.get_extension("schemaversion") == sent.schema_version
    for name, value in (sent.extensions or {}).items():
        assert read.get_extension(name) == value


@given(ENVELOPES)
def test_we_read_what_the_official_sdk_writes(sent: Envelope) -> None:
    attributes: dict[str, Any] = {"id": sent.id, "source": sent.source, "type": sent.type, "specversion": "1.0", "time": sent.time}
    attributes |= {"datacontenttype": "application/json", **(sent.extensions or {}), "schemaversion": sent.schema_version}
    named = {
        "subject": sent.subject,
        "partitionkey": sent.key,
        "correlationid": sent.correlation_id,
        "causationid": sent.causation_id,
        "traceparent": sent.traceparent,
    }
    attributes |= {name: value for name, value in named.items() if value is not None}
    data = json.loads(sent.data)
    got = from_cloudevent(JSONFormat().write(CloudEvent(attributes, data)))
    assert msgspec.structs.replace(got, data=b"") == msgspec.structs.replace(sent, data=b"")
    assert json.loads(got.data) == data


@pytest.mark.parametrize(
    ("content_type", "data"),
    [
        ("application/octet-stream", b"\x00\xff"),
        ("text/plain", "grüß".encode()),
        ("application/xml", b"<a/>"),
        ("application/json", b"not json"),
        ("application/vnd.x+json", b'{"a":1}'),
        ("application/json; charset=utf-8", b'"text"'),
    ],
)
def test_data_of_other_content_types_through_the_sdk(content_type: str, data: bytes) -> None:
    extensions: dict[str, str | int | bool] = {"datacontenttype": content_type}
    sent = Envelope("i", "a.b", data, extensions=None if content_type == "application/json" else extensions)
    assert from_cloudevent(to_cloudevent(sent)) == sent
    read = JSONFormat().read(CloudEvent, to_cloudevent(sent))
    assert read.get_datacontenttype() == content_type
    got = read.get_data()
    assert got == data or json.dumps(got, separators=(",", ":")).encode() == data
    sdk = CloudEvent({"id": "i", "source": "s", "type": "a.b", "specversion": "1.0", "datacontenttype": content_type}, data)
    assert from_cloudevent(JSONFormat().write(sdk)).data == data


def test_plain_text_is_its_text_and_not_a_json_string() -> None:
    sdk = CloudEvent({"id": "i", "source": "s", "type": "a.b", "specversion": "1.0", "datacontenttype": "text/plain"}, "grüß\n")
    assert from_cloudevent(JSONFormat().write(sdk)).data == "grüß\n".encode()


def test_a_record_says_its_position_and_is_read_back_as_an_envelope() -> None:
    record = Record("i", "a.b", b"{}", time_us=1, position=12, recorded_us=1_700_000_000_000_001)
    document = json.loads(to_cloudevent(record))
    assert (document["sequence"], document["recordedtime"]) == ("0000000000000000012", "2023-11-14T22:13:20.000001Z")
    assert from_cloudevent(to_cloudevent(record)) == Envelope("i", "a.b", b"{}", time_us=1)
    assert JSONFormat().read(CloudEvent, to_cloudevent(record)).get_extension("sequence") == "0000000000000000012"


def test_a_sequence_of_somebody_else_is_kept() -> None:
    sent = Envelope("i", "a.b", b"{}", time_us=1, extensions={"sequence": "7"})
    assert from_cloudevent(to_cloudevent(sent)) == sent


def test_an_empty_key_is_left_out_because_no_attribute_may_be_empty() -> None:
    document = to_cloudevent(Envelope("i", "a.b", b"{}", key=""))
    JSONFormat().read(CloudEvent, document)
    assert from_cloudevent(document).key is None


def document(**changes: Any) -> bytes:
    return json.dumps({"specversion": "1.0", "id": "i", "source": "s", "type": "a.b"} | changes).encode()


def test_the_least_that_is_an_event() -> None:
    made = from_cloudevent(document())
    assert (made.id, made.source, made.type, made.data, made.schema_version, made.extensions) == ("i", "s", "a.b", b"null", 1, None)
    assert made.time_us > 0


def test_null_is_the_same_as_left_out() -> None:
    made = from_cloudevent(document(subject=None, time=None, whatever=None, data_base64=None, schemaversion=None))
    assert (made.subject, made.extensions, made.data) == (None, None, b"null")


def test_large_whole_numbers_in_the_data_stay_exact() -> None:
    number = 2**70 + 1
    made = from_cloudevent(b'{"specversion":"1.0","id":"i","source":"s","type":"a.b","data":{"n":%d}}' % number)
    assert made.data == b'{"n":%d}' % number
    assert b'{"n":%d}' % number in to_cloudevent(made)


def test_times_in_other_zones_and_without_one() -> None:
    assert from_cloudevent(document(time="1970-01-01T01:00:00+01:00")).time_us == 0
    assert from_cloudevent(document(time="1970-01-01T00:00:00.000001")).time_us == 1
    assert from_cloudevent(document(time="1969-12-31T23:59:59Z")).time_us == -1_000_000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"id": ""}, "'id' must be a text that is not empty"),
        ({"id": None}, "'id'"),
        ({"type": 5}, "'type'"),
        ({"source": None}, "'source'"),
        ({"specversion": "0.3"}, "version '0.3' is not understood"),
        ({"specversion": 1.0}, "not understood"),
        ({"specversion": None}, "not understood"),
        ({"time": "yesterday"}, "'yesterday' is not RFC 3339"),
        ({"time": 5}, "'time' must be a text"),
        ({"time": "2016-12-31T23:59:60Z"}, "not RFC 3339"),
        ({"schemaversion": "1"}, "expected 1 to"),
        ({"schemaversion": 0}, "expected 1 to"),
        ({"schemaversion": -1}, "expected 1 to"),
        ({"schemaversion": True}, "expected 1 to"),
        ({"schemaversion": 2**63}, "expected 1 to"),
        ({"partitionkey": 5}, "'partitionkey' must be a text"),
        ({"correlationid": True}, "'correlationid' must be a text"),
        ({"subject": ["a"]}, "'subject' must be a text"),
        ({"datacontenttype": 5}, "'datacontenttype' must be a text"),
        ({"extra": {"a": 1}}, "'extra' must be a text, a whole number or a boolean"),
        ({"extra": 1.5}, "'extra'"),
        ({"data_base64": "%%%"}, "'data_base64' is not base64"),
        ({"data_base64": "YQ"}, "'data_base64' is not base64"),
        ({"data_base64": "ü"}, "'data_base64' is not base64"),
        ({"data_base64": 5}, "'data_base64' must be a text"),
        ({"data": {}, "data_base64": base64.b64encode(b"x").decode()}, "both 'data' and 'data_base64'"),
    ],
)
def test_what_is_no_cloudevent_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DecodeError, match=sentence):
        from_cloudevent(document(**changes))


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff", b'{"id":"\xff"}', b"[" * 10_000, b'{"a":' * 10_000, b"5"])
def test_what_is_no_json_object_is_no_cloudevent(data: bytes) -> None:
    with pytest.raises(DecodeError, match="not a CloudEvent: "):
        from_cloudevent(data)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(DecodeError):
        from_cloudevent(data)


@given(
    st.dictionaries(
        st.sampled_from(["id", "source", "type", "specversion", "time", "data", "data_base64", "subject", "schemaversion", "x"]),
        st.one_of(st.none(), TEXT, st.just("1.0"), st.integers(), st.booleans(), FLOATS, st.lists(st.integers(), max_size=2)),
    )
)
def test_no_object_raises_anything_else(attributes: dict[str, Any]) -> None:
    try:
        made = from_cloudevent(json.dumps(attributes).encode())
    except DecodeError:
        return
    assert made.id and made.type and made.source
