"""Messages and envelopes: ours, CloudEvents of others, and plain JSON."""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec
import pytest
from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st
from msgspec import MsgspecError

from trilogue.brokers.kafka import wire
from trilogue.brokers.kafka.wire import headers_of, reader
from trilogue.codec import to_cloudevent
from trilogue.durations import UNITS_US
from trilogue.errors import DecodeError
from trilogue.events import EARLIEST_US, LATEST_US, Envelope, Record

complaints: list[DecodeError] = []
read = reader("shop-", lambda topic, error: complaints.append(error))


def message(value: bytes | None, headers: Any = None, key: bytes | None = b"k", topic: str = "shop-video-events") -> Message:
    return Message(topic=topic, partition=2, offset=9, key=key, value=value, headers=headers, timestamp=(1, 1_700_000_000_123))


def sent(envelope: Envelope) -> Record:
    return read(message(envelope.data, headers_of(envelope), None if envelope.key is None else envelope.key.encode()))


TEXT = st.text(min_size=1, max_size=20).filter(lambda text: "\ud800" not in text)


ENVELOPES = st.builds(
    Envelope,
    id=TEXT,
    type=TEXT,
    data=st.binary(min_size=1),
    key=st.none() | st.text(max_size=9),
    source=TEXT,
    time_us=st.integers(EARLIEST_US, LATEST_US),
    schema_version=st.integers(1, 2**31 - 1),
    correlation_id=st.none() | TEXT,
    causation_id=st.none() | TEXT,
    subject=st.none() | TEXT,
    traceparent=st.none() | TEXT,
    extensions=st.none() | st.dictionaries(st.sampled_from(["who", "why", "zone"]), TEXT, min_size=1),
    tags=st.lists(TEXT, max_size=3).map(tuple),
)


@given(ENVELOPES)
def test_an_envelope_comes_back_as_it_was(envelope: Envelope) -> None:
    record = sent(envelope)
    assert {name: getattr(record, name) for name in Envelope.__struct_fields__} == {
        name: getattr(envelope, name) for name in Envelope.__struct_fields__
    }
    assert (record.position, record.partition, record.topic) == (9, 2, "shop-video-events")
    assert record.recorded_us == 1_700_000_000_123_000


def test_only_what_is_set_is_sent() -> None:
    headers = headers_of(Envelope("1", "a.b", b"{}", "k", time_us=0))
    assert headers == [
        ("ce_specversion", b"1.0"),
        ("ce_type", b"a.b"),
        ("ce_source", b"trilogue"),
        ("ce_id", b"1"),
        ("ce_time", b"1970-01-01T00:00:00.000000Z"),
    ]


def test_cloudevents_of_others_in_binary_mode() -> None:
    record = read(
        message(
            b"<a/>",
            [
                ("ce_id", b"7"),
                ("ce_source", b"/s"),
                ("ce_specversion", b"1.0"),
                ("ce_type", b"com.x"),
                ("content-type", b"text/xml"),
            ],
        )
    )
    assert (record.id, record.type, record.source, record.data) == ("7", "com.x", "/s", b"<a/>")
    assert record.extensions == {"datacontenttype": "text/xml"}
    assert record.time_us == record.recorded_us


def test_cloudevents_in_structured_mode() -> None:
    envelope = Envelope("7", "video.watched", b'{"n":1}', None, "/s", as_us_2020(), subject="x", tags=("a:1",))
    record = read(message(to_cloudevent(envelope), [("content-type", b"application/cloudevents+json; charset=utf-8")]))
    assert (record.id, record.type, record.data, record.key, record.subject) == ("7", "video.watched", b'{"n":1}', "k", "x")
    assert (record.position, record.tags, record.time_us) == (9, ("a:1",), as_us_2020())


def as_us_2020() -> int:
    return 18_262 * UNITS_US["d"]


@pytest.mark.parametrize(
    ("value", "event_type", "data"),
    [
        (b'{"event_type":"video.watched","payload":{"n":1},"timestamp":0}', "video.watched", b'{"n":1}'),
        (b'{"type":"video.seen","n":1}', "video.seen", b'{"type":"video.seen","n":1}'),
        (b'{"n":1}', "video", b'{"n":1}'),
        (b"not json", "video", b"not json"),
        (b'{"event_type":"no type at all!"}', "video", b'{"event_type":"no type at all!"}'),
        (None, "video", b"null"),
    ],
)
def test_plain_messages_of_others(value: bytes | None, event_type: str, data: bytes) -> None:
    record = read(message(value))
    assert (record.type, record.data, record.key) == (event_type, data, "k")
    assert record.id == read(message(value)).id  # the same each time it is delivered
    assert record.id != read(Message(topic="shop-video-events", partition=2, offset=10, value=value, timestamp=(1, 1))).id


def test_times_of_others() -> None:
    for text, us in (('"2020-01-01T00:00:00Z"', as_us_2020()), (str(as_us_2020() // 1_000_000), as_us_2020())):
        record = read(message(b'{"event_type":"a.b","payload":{},"timestamp":%s}' % text.encode()))
        assert record.time_us == us


def test_a_tombstone_of_ours_is_no_end() -> None:
    tombstone = message(None, headers_of(Envelope("1", "a.b", b"", "k")))
    assert not tombstone  # this is why nobody may ask whether there is a message
    assert read(tombstone).data == b"null"


@pytest.mark.parametrize(
    "headers",
    [
        [("ce_id", b"1")],
        [("ce_id", b"1"), ("ce_type", b"\xff")],
        [("ce_id", b"1"), ("ce_type", b"a.b"), ("ce_schemaversion", b"0")],
        [("ce_id", b"1"), ("ce_type", b"a.b"), ("ce_time", b"noon")],
        [("ce_id", b"1"), ("ce_type", b"a.b"), ("ce_tags", b"[1]")],
        [("content-type", b"application/cloudevents+json")],
    ],
)
def test_what_claims_to_be_one_and_is_none_is_read_as_plain_data(headers: Any) -> None:
    complaints.clear()
    record = read(message(b"[]", headers))
    assert (record.type, record.data) == ("video", b"[]")
    assert len(complaints) == 1


NAMES = st.sampled_from(["ce_id", "ce_type", "ce_time", "ce_schemaversion", "content-type", "x"])


@given(st.binary(), st.lists(st.tuples(NAMES, st.none() | st.binary())))
def test_nothing_that_is_read_raises(value: bytes, headers: Any) -> None:
    assert read(message(value, headers)).position == 9


OURS = ("ce_specversion", "ce_type", "ce_source", "ce_id", "ce_time")
MOMENTS = st.datetimes().map(lambda at: at.strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0").encode())
ODD_MOMENTS = st.sampled_from(
    [
        b"2020-01-01T00:00:00,123456Z",
        b"2020-01-01T00:00:00.+1234_Z",
        b"2020-01-01T00:00:60.000000Z",
        b"2020-02-30T00:00:00.000000Z",
    ]
)
VALUES = st.none() | st.binary(max_size=4) | st.sampled_from([b"", b"1.0", b"a.b", b"/s"]) | MOMENTS | ODD_MOMENTS


@given(st.binary(max_size=9), st.tuples(VALUES, VALUES, VALUES, VALUES, VALUES), st.none() | st.binary(max_size=3))
def test_the_quick_way_reads_what_the_plain_way_reads(value: bytes, values: tuple[bytes | None, ...], key: bytes | None) -> None:
    headers: Any = list(zip(OURS, values, strict=True))
    complaints.clear()
    quick = read(message(value, headers, key))
    complained = len(complaints)
    complaints.clear()
    assert quick == read(message(value, headers[::-1], key))  # in another order they are looked up one by one
    assert complained == len(complaints)


@given(MOMENTS | ODD_MOMENTS | st.binary(min_size=27, max_size=27) | st.from_regex(rb"\A[0-9T:.Z+-]{27}\Z"))
def test_a_time_is_what_it_is_when_it_is_read_whole(text: bytes) -> None:
    def outcome(function: Callable[[bytes], int]) -> int | None:
        try:
            return function(text)
        except (ValueError, MsgspecError):
            return None

    assert outcome(wire._time_us) == outcome(wire._any_time_us)


@given(ENVELOPES)
def test_the_headers_are_those_of_the_plain_way(envelope: Envelope) -> None:
    e, time = envelope, msgspec.json.decode(to_cloudevent(envelope), type=dict[str, Any])["time"]
    texts = {"subject": e.subject, "correlationid": e.correlation_id, "causationid": e.causation_id, "traceparent": e.traceparent}
    plain = {"specversion": "1.0", "type": e.type, "source": e.source, "id": e.id}
    plain |= {name: text for name, text in texts.items() if text is not None}
    plain |= {"schemaversion": str(e.schema_version)} if e.schema_version != 1 else {}
    plain |= {"tags": msgspec.json.encode(e.tags).decode()} if e.tags else {}
    plain |= {name: str(text) for name, text in (e.extensions or {}).items()}
    headers: Any = headers_of(e)
    sent = {name.removeprefix("ce_"): value.decode() for name, value in headers}
    assert msgspec.convert(sent.pop("time"), datetime) == msgspec.convert(time, datetime)
    assert sent == plain


def test_an_event_without_an_id_is_none() -> None:
    record = read(message(b"{}", [(name, b"" if name == "ce_id" else b"a.b") for name in OURS]))
    assert (record.id, record.source) == (read(message(b"{}")).id, "foreign")


def test_keys_that_are_no_text_are_kept_apart() -> None:
    assert read(message(b"{}", None, b"\xff\x01")).key != read(message(b"{}", None, b"\xff\x02")).key


def test_plain_programs_read_ours() -> None:
    envelope = Envelope("1", "a.b", b'{"n":1}', "k")
    assert json.loads(message(envelope.data, headers_of(envelope)).value() or b"") == {"n": 1}
