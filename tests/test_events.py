"""The nouns: event classes, identities, times."""

import enum
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import ClassVar

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilogue import BadOption, BadPattern, Envelope, Receipt, Record, UnknownEvent, derived_id, event, new_id
from trilogue.events import EARLIEST_US, LATEST_US, as_datetime, as_us, event_type, is_event, key_reader

# ── @event ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@event("above.slots", key="user", version=3, topic="t")
@dataclass(frozen=True, slots=True)
class AboveSlots:
    user: str


@dataclass(frozen=True, slots=True)
@event("below.slots", key="user")
class BelowSlots:
    user: str


@event("a.struct", key="user")
class Struct(msgspec.Struct, frozen=True):
    user: str


@event("a.model", key="user")
class Model(pydantic.BaseModel):
    user: str


@pytest.mark.parametrize("cls", [AboveSlots, BelowSlots, Struct, Model])
def test_every_kind_of_class_is_declared(cls: type) -> None:
    assert is_event(cls)
    assert event_type(cls).key == "user"
    assert key_reader(cls)(cls(user="u1")) == "u1"


def test_what_was_said_is_kept() -> None:
    mark = event_type(AboveSlots)
    assert (mark.name, mark.key, mark.version, mark.topic) == ("above.slots", "user", 3, "t")
    assert event_type(BelowSlots).name == "below.slots"


def test_the_class_comes_back_untouched() -> None:
    @dataclass
    class Plain:
        n: int

    assert event("plain.one")(Plain) is Plain


def test_a_subclass_is_another_event_and_says_so() -> None:
    @dataclass(frozen=True)
    class Child(AboveSlots):
        more: int = 0

    assert not is_event(Child)
    with pytest.raises(UnknownEvent, match=r"Child is not an event: put @event"):
        event_type(Child)


@pytest.mark.parametrize("thing", [5, "x", None, list[int], int, AboveSlots("u")])
def test_what_is_no_event(thing: object) -> None:
    assert not is_event(thing)


@pytest.mark.parametrize("name", ["", "a b", "a.*", "x" * 256, None])
def test_a_name_that_is_no_type_is_refused(name: str) -> None:
    with pytest.raises(BadPattern):
        event(name)


def test_without_brackets_is_refused() -> None:
    with pytest.raises(BadPattern, match=r"as 'video\.watched'"):
        event(AboveSlots)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [0, -1, 2**31, "1", 1.5])
def test_a_version_out_of_range_is_refused(version: int) -> None:
    with pytest.raises(BadOption, match=r"'a.b'"):
        event("a.b", version=version)


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Colour(enum.Enum):
    RED = "red"


class Size(enum.StrEnum):
    BIG = "big"


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("u1", "u1"),
        ("", ""),
        (None, None),
        (7, "7"),
        (Colour.RED, "red"),
        (Size.BIG, "big"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)
def test_keys_are_texts_as_in_the_data(value: object, key: str | None) -> None:
    @event("k.k", key="k")
    @dataclass
    class Keyed:
        k: object

    read = key_reader(Keyed)(Keyed(value))
    assert read == key
    assert read is None or type(read) is str


def test_an_inherited_field_can_be_the_key() -> None:
    @dataclass
    class Base:
        user: str

    @event("k.child", key="user")
    @dataclass
    class Child(Base):
        more: int

    assert key_reader(Child)(Child("u1", 1)) == "u1"


def test_no_key_is_none() -> None:
    @event("no.key")
    @dataclass
    class NoKey:
        user: str

    assert key_reader(NoKey)(NoKey("u")) is None


@pytest.mark.parametrize("key", ["usr", "counts", "", "user.name", "__class__"])
def test_a_key_that_is_no_field_is_refused_with_the_fields(key: str) -> None:
    @event("bad.key", key=key)
    @dataclass
    class Bad:
        user: str
        n: int = field(default=0)
        counts: ClassVar[int] = 0

    with pytest.raises(UnknownEvent, match=r"is no field of .*Bad, which has \['n', 'user'\]"):
        key_reader(Bad)


# ── identities ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_new_ids_are_uuids_of_version_7_and_grow() -> None:
    ids = [new_id() for _ in range(20_000)]  # more than 4,096 a millisecond
    assert ids == sorted(set(ids))
    assert {uuid.UUID(i).version for i in ids} == {7}
    assert {uuid.UUID(i).variant for i in ids} == {uuid.RFC_4122}
    assert all(str(uuid.UUID(i)) == i for i in ids)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.integers(-(2**60), 2**60), st.lists(TEXTS, max_size=4))
def test_derived_ids_are_the_same_for_the_same(time_us: int, parts: list[str]) -> None:
    made = derived_id(time_us, *parts)
    assert made == derived_id(time_us, *parts)
    assert uuid.UUID(made).version == 8
    assert uuid.UUID(made).variant == uuid.RFC_4122
    assert str(uuid.UUID(made)) == made
    assert uuid.UUID(made).int >> 80 == (time_us // 1_000) & (2**48 - 1)


@given(st.lists(TEXTS, max_size=4), st.lists(TEXTS, max_size=4))
def test_derived_ids_differ_for_different_parts(one: list[str], other: list[str]) -> None:
    assert (derived_id(0, *one) == derived_id(0, *other)) == (one == other)


@pytest.mark.parametrize("separator", ["\x1f", "\x00", ",", '"', '","', "\\"])
def test_no_part_can_look_like_two(separator: str) -> None:
    assert derived_id(0, "a" + separator + "b", "c") != derived_id(0, "a", "b" + separator + "c")
    assert derived_id(0, "a" + separator + "b") != derived_id(0, "a", "b")


def test_numbers_and_texts_are_the_same_part() -> None:
    assert derived_id(0, 1, "a") == derived_id(0, "1", "a")


# ── times ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(EARLIEST_US, LATEST_US))
def test_times_are_exact_both_ways(us: int) -> None:
    assert as_us(as_datetime(us)) == us
    assert as_datetime(us).tzinfo is UTC


@given(st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1)), st.integers(-23, 23))
def test_time_zones_are_heeded(moment: datetime, hours: int) -> None:
    there = moment.replace(tzinfo=timezone(timedelta(hours=hours)))
    assert as_datetime(as_us(there)) == there


@pytest.mark.parametrize(("us", "year"), [(2**63 - 1, 9999), (-(2**63), 1)])
def test_a_time_no_datetime_can_be_is_shown_as_the_nearest(us: int, year: int) -> None:
    assert Envelope("i", "t", b"", time_us=us).time.year == year


def test_envelopes_and_records_know_their_times() -> None:
    record = Record("i", "t", b"{}", time_us=1_000_000, position=1, recorded_us=2_000_000)
    assert record.time == datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert record.recorded == datetime(1970, 1, 1, 0, 0, 2, tzinfo=UTC)


# ── receipts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_receipt_has_a_token_where_a_position_says_who_has_handled_it() -> None:
    assert Receipt("i", 7, "os-crash").token == "7"
    with pytest.raises(BadOption, match="is delayed"):
        _ = Receipt("i", None, "os-crash", due_us=1).token
    for on_a_broker in (Receipt("i", None, "os-crash"), Receipt("i", 7, "process-crash", None, "video-events", 2)):
        with pytest.raises(BadOption, match="on a broker"):
            _ = on_a_broker.token
