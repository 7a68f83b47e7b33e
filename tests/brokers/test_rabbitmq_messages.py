"""Envelopes as AMQP messages, and whatever messages there are as Records: no message stops the reading."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import BasicProperties

from trilogue import Rejected
from trilogue.brokers.rabbitmq.messages import message, record
from trilogue.codec import to_cloudevent
from trilogue.events import EARLIEST_US, LATEST_US, Envelope, Record, new_id

NOW_US = 1_800_000_000_000_000
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
MAYBE = st.none() | TEXT
ENVELOPES = st.builds(
    Envelope,
    id=TEXT,
    type=TEXT,
    data=st.binary(max_size=200),
    key=MAYBE,
    source=TEXT,
    time_us=st.integers(EARLIEST_US, LATEST_US),
    schema_version=st.integers(1, 2**31 - 1),
    correlation_id=MAYBE,
    causation_id=MAYBE,
    subject=MAYBE,
    traceparent=MAYBE,
    extensions=st.none()
    | st.dictionaries(
        st.from_regex(r"x[a-z0-9]{0,15}", fullmatch=True), TEXT | st.booleans() | st.integers(-(2**63), 2**63 - 1), min_size=1
    ),
    tags=st.lists(TEXT, max_size=4).map(tuple),
)


def read(properties: BasicProperties, body: bytes, routing_key: str = "the.key") -> tuple[Record, dict[str, Any]]:
    return record(routing_key, b"".join(properties.encode()), body, position=7, now_us=NOW_US)


@given(ENVELOPES)
def test_what_goes_out_comes_back(envelope: Envelope) -> None:
    made = message(envelope, "events", "key")
    got, rest = record("key", made.properties[12:], made.body, position=3, now_us=NOW_US)
    for name in Envelope.__struct_fields__:
        assert getattr(got, name) == getattr(envelope, name), name
    assert (got.position, got.recorded_us, rest) == (3, NOW_US, {})


@given(ENVELOPES)
def test_other_programs_read_it_by_the_standard(envelope: Envelope) -> None:
    made = message(envelope, "events", "key")
    seen = BasicProperties()
    seen.decode(made.properties[12:])
    assert seen.delivery_mode == 2
    assert seen.content_type == "application/json"
    assert seen.headers["cloudEvents:id"] == envelope.id
    assert seen.headers["cloudEvents:type"] == envelope.type
    assert seen.headers["cloudEvents:source"] == envelope.source
    assert seen.headers["cloudEvents:specversion"] == "1.0"
    assert seen.headers.get("cloudEvents:partitionkey") == envelope.key
    assert seen.message_id == (envelope.id if len(envelope.id.encode()) <= 255 else None)


@given(st.binary(max_size=300), st.binary(max_size=100), st.text(max_size=20))
def test_any_bytes_become_some_record(properties: bytes, body: bytes, routing_key: str) -> None:
    got, _ = record(routing_key, properties, body, position=1, now_us=NOW_US)
    assert got.id
    assert got.type


@given(st.data())
def test_a_damaged_message_becomes_some_record(data: st.DataObject) -> None:
    raw = bytearray(message(data.draw(ENVELOPES), "events", "key").properties[12:])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    got, _ = record("key", bytes(raw), b"{}", position=1, now_us=NOW_US)
    assert got.id
    assert got.type


@pytest.mark.parametrize("sep", [":", "_"])
def test_cloudevents_of_others_in_binary_mode(sep: str) -> None:
    headers = {"specversion": "1.0", "id": "7", "type": "com.example.made", "source": "/x", "time": "2026-01-31T12:00:00+02:00"}
    made = BasicProperties(
        "text/plain", headers={f"cloudEvents{sep}{name}": value for name, value in (headers | {"hue": 3}).items()}
    )
    got, _ = read(made, b"hello")
    assert (got.id, got.type, got.source, got.data) == ("7", "com.example.made", "/x", b"hello")
    assert got.time.isoformat() == "2026-01-31T10:00:00+00:00"
    assert got.extensions == {"hue": 3, "datacontenttype": "text/plain"}


def test_a_cloudevent_as_one_document() -> None:
    envelope = Envelope(new_id(), "video.watched", b'{"user":"u1"}', "u1", "elsewhere", 1_000_000, tags=("a:1",))
    got, _ = read(BasicProperties("application/cloudevents+json; charset=utf-8"), to_cloudevent(envelope))
    for name in Envelope.__struct_fields__:
        assert getattr(got, name) == getattr(envelope, name), name


@pytest.mark.parametrize(
    ("timestamp", "us"),
    [
        ("2026-01-31T12:00:00Z", 1_769_860_800_000_000),
        ("2026-01-31T12:00:00.5", 1_769_860_800_500_000),
        (1_769_860_800, 1_769_860_800_000_000),
        (1_769_860_800.25, 1_769_860_800_250_000),
        (1_769_860_800_123, 1_769_860_800_123_000),
        ("yesterday", NOW_US),
        (None, NOW_US),
    ],
)
def test_the_plain_form(timestamp: object, us: int) -> None:
    body = msgspec.json.encode({"event_type": "video.watched", "payload": {"user": "u1"}, "timestamp": timestamp})
    got, _ = read(BasicProperties("application/json", message_id="m1"), body)
    assert (got.id, got.type, got.data, got.time_us) == ("m1", "video.watched", b'{"user":"u1"}', us)


@pytest.mark.parametrize(
    "body",
    [b"", b"hello", b"{", b"[1]", b'{"event_type": 3, "payload": 1}', b'{"event_type": "", "payload": 1}', b'{"user":"u1"}'],
)
def test_anything_else_has_its_routing_key_for_a_type(body: bytes) -> None:
    made = BasicProperties(
        message_id="m1", correlation_id="c1", timestamp=1_769_860_800, headers={"x": 1, "traceparent": "00-a-b-01"}
    )
    got, rest = read(made, body)
    assert (got.id, got.type, got.data, got.correlation_id, got.traceparent) == ("m1", "the.key", body, "c1", "00-a-b-01")
    assert got.time_us == 1_769_860_800_000_000
    assert rest == {"x": 1, "traceparent": "00-a-b-01"}


def test_without_an_id_each_message_gets_one() -> None:
    assert read(BasicProperties(), b"x")[0].id != read(BasicProperties(), b"x")[0].id


def test_a_cloudevent_that_is_none_is_kept_as_it_is() -> None:
    got, _ = read(BasicProperties("application/cloudevents+json", message_id="m"), b'{"id": 1}')
    assert (got.id, got.type, got.data) == ("m", "the.key", b'{"id": 1}')


@pytest.mark.parametrize("what", [{"extensions": {"x" * 300: 1}}, {"subject": "x" * 200_000}], ids=["name", "size"])
def test_what_fits_into_no_message_is_rejected(what: dict[str, Any]) -> None:
    with pytest.raises(Rejected, match="limit"):
        message(Envelope(new_id(), "a.b", b"{}", **what), "events", "a.b")
