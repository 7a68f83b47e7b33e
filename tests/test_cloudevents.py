"""Envelopes to CloudEvents and back, beside the official SDK."""

import base64
import json
from typing import Any

import msgspec
import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from trilogue import DecodeError, Envelope, Record, from_cloudevent, to_cloudevent
from trilogue.events import EARLIEST_US, LATEST_US

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)

PLAIN = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1, max_size=20)
NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=20).filter(
    lambda name: (
        name
        not in {
            "id",
            "source",
            "type",
            "specversion",
            "time",
            "subject",
            "partitionkey",
            "correlationid",
            "causationid",
            "traceparent",
            "schemaversion",
            "data",
            "datacontenttype",
            "dataschema",
            "sequence",
            "recordedtime",
        }
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
    attributes: dict[str, Any] = {
        "id": sent.id,
        "source": sent.source,
        "type": sent.type,
        "specversion": "1.0",
        "time": sent.time,
    }
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
    assert (made.id, made.source, made.type, made.data, made.schema_version, made.extensions) == (
        "i",
        "s",
        "a.b",
        b"null",
        1,
        None,
    )
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
    assert made.id
    assert made.type
    assert made.source
