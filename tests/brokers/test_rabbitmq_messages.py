"""Envelopes as AMQP messages, and whatever messages there are as Records: no message stops the reading."""

import struct
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import BasicProperties

from trilogue import Rejected
from trilogue.brokers.rabbitmq import messages
from trilogue.brokers.rabbitmq.messages import _ID, message, record
from trilogue.codec import to_cloudevent
from trilogue.events import EARLIEST_US, LATEST_US, Envelope, Record, as_us, new_id

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


@given(ENVELOPES)
def test_the_properties_are_those_that_pika_writes(envelope: Envelope) -> None:
    made = message(envelope, "events", "key")
    assert made.properties[:12] == struct.pack(">HHQ", 60, 0, len(envelope.data))
    e = envelope
    headers: dict[str, Any] = {"specversion": "1.0", "type": e.type, "source": e.source}
    headers |= {"schemaversion": e.schema_version} if e.schema_version != 1 else {}
    seen = BasicProperties()
    seen.decode(made.properties[12:])
    headers |= {"id": e.id, "time": seen.headers["cloudEvents:time"]}
    texts = {"partitionkey": e.key, "correlationid": e.correlation_id, "causationid": e.causation_id}
    headers |= {name: text for name, text in texts.items() if text is not None}
    headers |= e.extensions or {}
    headers |= {name: text for name, text in (("subject", e.subject), ("traceparent", e.traceparent)) if text is not None}
    headers |= {"tags": msgspec.json.encode(e.tags).decode()} if e.tags else {}
    plain = BasicProperties(
        "application/json",
        headers={f"cloudEvents:{name}": value for name, value in headers.items()},
        delivery_mode=2,
        correlation_id=_short(e.correlation_id),
        message_id=_short(e.id),
        timestamp=max(0, e.time_us // 1_000_000),
    )
    assert made.properties[12:] == b"".join(plain.encode())


def _short(text: str | None) -> str | None:
    return text if text is not None and len(text.encode()) <= 255 else None


def _plainly(properties: bytes, body: bytes) -> tuple[Record, dict[str, Any]]:
    with patch.object(messages, "_quick", return_value=None):
        return record("key", properties, body, position=1, now_us=NOW_US)


@given(ENVELOPES)
def test_the_quick_way_reads_what_the_plain_way_reads(envelope: Envelope) -> None:
    raw = message(envelope, "events", "key").properties[12:]
    assert record("key", raw, envelope.data, position=1, now_us=NOW_US) == _plainly(raw, envelope.data)


PLAIN = st.builds(
    Envelope,
    id=TEXT,
    type=TEXT | st.sampled_from([_ID.decode("latin-1")]),
    data=st.just(b"{}"),
    key=MAYBE,
    source=TEXT | st.sampled_from([_ID.decode("latin-1") + "\0\0\0\1x"]),
    time_us=st.integers(EARLIEST_US, LATEST_US),
    correlation_id=MAYBE,
    causation_id=MAYBE,
)


def test_what_we_write_is_read_quickly() -> None:
    raw = message(Envelope(new_id(), "a.b", b"{}", "k", time_us=1, correlation_id="c"), "events", "key").properties[12:]
    assert messages._quick(raw, b"{}", 1, NOW_US) is not None


@given(st.data())
def test_a_damaged_message_is_read_alike_both_ways(data: st.DataObject) -> None:
    raw = bytearray(message(data.draw(PLAIN), "events", "key").properties[12:])
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    body = b'{"event_type":"x.y","payload":1}'
    quick, plain = record("key", bytes(raw), body, position=1, now_us=NOW_US), _plainly(bytes(raw), body)
    if plain[0].source == "amqp":  # it has no id of its own that could be read, and gets a new one each time
        quick, plain = [(msgspec.structs.replace(made, id=""), rest) for made, rest in (quick, plain)]
    assert quick == plain


ODD_MOMENTS = st.sampled_from(
    ["2020-01-01T00:00:00,123456Z", "2020-01-01T00:00:00.+1234_Z", "2020-01-01T00:00:00.١٢٣٤٥٦Z", "2020-W01-1T00:00:00.000000Z"]  # noqa: RUF001
)
MOMENTS = st.datetimes().map(lambda at: at.strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0"))


@given(MOMENTS | ODD_MOMENTS | st.from_regex(r"\A[0-9T:.,Z+_ -]{27}\Z"))
def test_a_time_is_what_it_is_when_it_is_read_whole(text: str) -> None:
    try:
        whole = as_us(msgspec.convert(text, datetime).astimezone(UTC))
    except (ValueError, OverflowError, msgspec.MsgspecError):
        whole = NOW_US
    assert messages._us(text, NOW_US) == whole


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
