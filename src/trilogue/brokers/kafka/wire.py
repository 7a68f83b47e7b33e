"""Envelopes as Kafka messages and back: CloudEvents, binary mode when we send, whatever comes when we read.

key      b"u1"                                   the event's key
value    b'{"user":"u1","video":"v9"}'           the data, plain JSON: readable by any program
headers  ce_specversion ce_id ce_source ce_type ce_time
         ce_subject ce_correlationid ce_causationid ce_traceparent ce_schemaversion ce_tags ce_…   only those that are set

binary mode      has ce_id                       https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings
structured mode  content-type: application/cloudevents+json
anything else    plain JSON of a program that knows neither; its id follows from topic, partition and offset
"""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec
from confluent_kafka import Message

from trilogue.brokers.kafka.topics import EVENTS
from trilogue.codec import from_cloudevent
from trilogue.errors import BadPattern, DecodeError
from trilogue.events import MOST_VERSION, Envelope, Record, as_datetime, as_us, derived_id
from trilogue.patterns import check_type

Headers = list[tuple[str, str | bytes | None]]  # as librdkafka's types have it; ours are bytes
STRUCTURED = b"application/cloudevents"
FOREIGN = "foreign"
_OURS = ("ce_specversion", "ce_type", "ce_source", "ce_id", "ce_time")
_OPTIONAL = (
    ("subject", "ce_subject"),
    ("correlation_id", "ce_correlationid"),
    ("causation_id", "ce_causationid"),
    ("traceparent", "ce_traceparent"),
)


# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def headers_of(envelope: Envelope) -> Headers:
    """The attributes of an envelope as headers. Each costs both sides a microsecond: only those that are set."""
    headers: Headers = [  # in the order of _OURS
        *_fixed(envelope.type, envelope.source),
        ("ce_id", envelope.id.encode()),
        ("ce_time", _time_text(envelope.time_us)),
    ]
    if envelope.subject:  # written out: a loop over the names costs a third more
        headers.append(("ce_subject", envelope.subject.encode()))
    if envelope.correlation_id:
        headers.append(("ce_correlationid", envelope.correlation_id.encode()))
    if envelope.causation_id:
        headers.append(("ce_causationid", envelope.causation_id.encode()))
    if envelope.traceparent:
        headers.append(("ce_traceparent", envelope.traceparent.encode()))
    if envelope.schema_version != 1:
        headers.append(("ce_schemaversion", b"%d" % envelope.schema_version))
    if envelope.tags:
        headers.append(("ce_tags", msgspec.json.encode(envelope.tags)))
    if envelope.extensions:
        headers += [_extension(name, value) for name, value in envelope.extensions.items()]
    return headers


@lru_cache(maxsize=4_096)
def _fixed(event_type: str, source: str) -> Headers:
    return [("ce_specversion", b"1.0"), ("ce_type", event_type.encode()), ("ce_source", source.encode())]


def _extension(name: str, value: str | int | bool) -> tuple[str, bytes]:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return ("content-type" if name == "datacontenttype" else f"ce_{name}", text.encode())


def _time_text(us: int) -> bytes:
    seconds, rest = divmod(us, 1_000_000)
    return b"%s.%06dZ" % (_second_text(seconds), rest)


@lru_cache(maxsize=1_024)
def _second_text(seconds: int) -> bytes:
    return as_datetime(seconds * 1_000_000).replace(tzinfo=None, microsecond=0).isoformat().encode()


# ── in ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def reader(prefix: str, undecodable: Callable[[str, DecodeError], None]) -> Callable[[Message], Record]:
    """A function that reads messages, whoever wrote them.

    prefix: of our topics. undecodable: told of messages that claim to be CloudEvents and are none; they are read as plain data,
    so that whoever handles them can refuse them.
    """

    def read(message: Message) -> Record:
        try:
            return _read(message, prefix)
        except DecodeError as error:
            undecodable(message.topic() or "", error)
            return _foreign(message, prefix)

    return read


def _read(message: Message, prefix: str) -> Record:
    pairs: Any = message.headers()
    if not pairs:
        return _foreign(message, prefix)
    try:
        if len(pairs) == len(_OURS):
            # What we write ourselves where nothing optional is set: half the cost of looking each header up.
            (a, _), (b, event_type), (c, source), (d, event_id), (e, time) = pairs
            if (a, b, c, d, e) == _OURS and event_id and event_type and source:
                return _record(message, event_id.decode(), _text(event_type), _text(source), time)
        headers: dict[str, bytes] = {name: value for name, value in pairs if value is not None}
        if headers.get("ce_id"):
            return _binary(message, headers)
    except (ValueError, KeyError, AttributeError, msgspec.MsgspecError) as error:  # AttributeError: a header without a value
        raise DecodeError(f"not a CloudEvent in binary mode: {type(error).__name__}: {error}") from error
    return _structured(message) if _is_structured(headers) else _foreign(message, prefix)


def _record(message: Message, event_id: str, event_type: str, source: str, time: bytes | None) -> Record:
    key, recorded_us = message.key(), message.timestamp()[1] * 1_000
    return Record(
        event_id,
        event_type,
        message.value() or b"null",  # none: a tombstone
        None if key is None else _key(key),
        source,
        recorded_us if time is None else _time_us(time),
        position=_int(message.offset()),
        recorded_us=recorded_us,
        topic=message.topic(),
        partition=message.partition(),
    )


def _binary(message: Message, headers: dict[str, bytes]) -> Record:
    event_id, event_type, source = headers.pop("ce_id"), headers.pop("ce_type"), headers.pop("ce_source", b"")
    if not event_type:
        raise ValueError("ce_type is empty")
    headers.pop("ce_specversion", None)
    time = headers.pop("ce_time", None)
    return _with_optional(_record(message, event_id.decode(), _text(event_type), _text(source), time), headers)


def _with_optional(record: Record, headers: dict[str, bytes]) -> Record:
    found: dict[str, Any] = {name: headers.pop(header).decode() for name, header in _OPTIONAL if headers.get(header)}
    if (version := headers.pop("ce_schemaversion", None)) is not None:
        found["schema_version"] = _version(version)
    if (tags := headers.pop("ce_tags", None)) is not None:
        found["tags"] = msgspec.json.decode(tags, type=tuple[str, ...])
    if (key := headers.pop("ce_partitionkey", None)) is not None and record.key is None:
        found["key"] = key.decode()
    content_type = headers.pop("content-type", None)
    extensions: dict[str, str | int | bool] = {
        name.removeprefix("ce_"): value.decode() for name, value in headers.items() if name.startswith("ce_") and value
    }
    if content_type and not content_type.startswith(b"application/json"):
        extensions["datacontenttype"] = content_type.decode()
    return msgspec.structs.replace(record, **found, extensions=extensions or None)


def _version(text: bytes) -> int:
    version = int(text)
    if not 1 <= version <= MOST_VERSION:
        raise ValueError(f"ce_schemaversion is {version}, expected 1 to {MOST_VERSION}")
    return version


def _is_structured(headers: dict[str, bytes]) -> bool:
    return headers.get("content-type", b"").lower().startswith(STRUCTURED)


def _structured(message: Message) -> Record:
    envelope = from_cloudevent(message.value() or b"")
    fields = {name: getattr(envelope, name) for name in Envelope.__struct_fields__}
    if envelope.key is None:
        fields["key"] = _key_of(message)
    return Record(
        **fields,
        position=_int(message.offset()),
        recorded_us=message.timestamp()[1] * 1_000,
        topic=message.topic(),
        partition=message.partition(),
    )


class _Plain(msgspec.Struct):
    """What the plain messages of other programs have, as far as they have it."""

    event_type: str | None = None
    type: str | None = None
    payload: msgspec.Raw = msgspec.Raw()
    timestamp: str | float | None = None


def _foreign(message: Message, prefix: str) -> Record:
    topic, partition, offset = message.topic() or "", _int(message.partition()), _int(message.offset())
    recorded_us = message.timestamp()[1] * 1_000
    value = message.value() or b"null"  # none: a tombstone
    try:
        plain = msgspec.json.decode(value, type=_Plain)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        plain = _Plain()
    return Record(
        derived_id(recorded_us, topic, partition, offset),
        _allowed(plain.event_type or plain.type) or _allowed(topic.removeprefix(prefix).removesuffix(EVENTS)) or FOREIGN,
        bytes(plain.payload) if plain.event_type and bytes(plain.payload) else value,
        _key_of(message),
        FOREIGN,
        _moment_us(plain.timestamp, recorded_us),
        position=offset,
        recorded_us=recorded_us,
        topic=topic,
        partition=partition,
    )


@lru_cache(maxsize=1_024)
def _allowed(name: str | None) -> str | None:
    try:
        return check_type(name or "")
    except BadPattern:
        return None


def _moment_us(timestamp: str | float | None, otherwise: int) -> int:
    try:
        moment = msgspec.convert(timestamp, datetime, strict=False)
    except msgspec.MsgspecError:
        return otherwise
    return as_us(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def _key_of(message: Message) -> str | None:
    key = message.key()
    return None if key is None else _key(key)


@lru_cache(maxsize=16_384)
def _key(key: bytes) -> str:
    return key.decode(errors="backslashreplace")


@lru_cache(maxsize=4_096)
def _text(text: bytes) -> str:
    return text.decode()


def _time_us(text: bytes) -> int:
    if len(text) == 27 and text[19] == 46 and text[26] == 90 and (micros := text[20:26]).isdigit():  # . and Z
        return _second_us(text[:19]) + int(micros)
    return _any_time_us(text)


@lru_cache(maxsize=1_024)
def _second_us(text: bytes) -> int:
    return _any_time_us(text + b"Z")


def _any_time_us(text: bytes) -> int:
    moment = msgspec.convert(text.decode(), datetime)
    return as_us(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def _int(number: int | None) -> int:
    return -1 if number is None else number
