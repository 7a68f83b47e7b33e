"""Envelopes as AMQP messages, and whatever messages there are as Records.

    content_type   application/json                    headers   cloudEvents:id            "018f…"
    message_id     the event's id                                cloudEvents:type          "video.watched"
    delivery_mode  2 (persistent)                                cloudEvents:source        "trilogue"
    body           {"user":"u1","video":"v9"}                    cloudEvents:time          "2026-01-31T12:00:00.000000Z"
                                                                 cloudEvents:partitionkey  "u1"            … and so on

The binary mode of the CloudEvents binding: any AMQP program can read the body as it is. Understood, in this order: that, with
`:` or `_` behind the prefix; a whole CloudEvent in JSON (application/cloudevents+json); {"event_type", "payload", "timestamp"};
anything else, the routing key being its type. A message can say what it likes and never stops the reading of those behind it.
"""

import struct
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from pika import data as tables
from pika import spec

from trilogue.codec import JSON, from_cloudevent
from trilogue.errors import DecodeError, Rejected
from trilogue.events import MOST_VERSION, Envelope, Record, as_datetime, as_us, new_id

STRUCTURED = "application/cloudevents+json"
PROPERTIES_BYTES = 120_000  # one frame has to hold them
_SHORT = 255
_LONG = struct.Struct(">I")
_INT = struct.Struct(">i")
_LONGLONG = struct.Struct(">Q")
_HEAD = struct.Struct(">HHQ")
_FLAGS = struct.Struct(">H")
_P = spec.BasicProperties
_ALWAYS = _P.FLAG_CONTENT_TYPE | _P.FLAG_HEADERS | _P.FLAG_DELIVERY_MODE | _P.FLAG_TIMESTAMP
Headers = dict[str, Any]


class Message(NamedTuple):
    """What is to be published: where, the properties as bytes, the body, and the event's id to know it by."""

    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    id: str


class _Plain(msgspec.Struct):
    """What programs without CloudEvents publish."""

    event_type: str
    payload: msgspec.Raw
    timestamp: str | int | float | None = None


_plain = msgspec.json.Decoder(_Plain)

# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def message(envelope: Envelope, exchange: str, routing_key: str, more: Headers | None = None) -> Message:
    """An Envelope as a Message. more: further headers. Raises Rejected for what fits into no AMQP message."""
    try:
        properties = _properties(envelope, more)
    except UnicodeEncodeError as error:
        raise Rejected(f"event {envelope.type!r} cannot be published: {error}") from error
    if len(properties) > PROPERTIES_BYTES:
        raise Rejected(
            f"the attributes of event {envelope.type!r} have {len(properties)} bytes, the limit is {PROPERTIES_BYTES}: "
            "put what is long into the event itself"
        )
    return Message(exchange, routing_key, properties, envelope.data, envelope.id)


def _properties(e: Envelope, more: Headers | None) -> bytes:
    # Written out, by names made once: half the time of a call for each header.
    id, pack = e.id.encode(), _LONG.pack
    parts = [_constant(e.type, e.source, e.schema_version), _ID, pack(len(id)), id, _TIME, _time(e.time_us)]
    if e.key is not None:
        parts += (_KEY, pack(len(text := e.key.encode())), text)
    flags, content_type, after = _ALWAYS, _JSON, b"\x02"
    if e.correlation_id is not None:
        parts += (_CORRELATION, pack(len(text := e.correlation_id.encode())), text)
        if len(text) <= _SHORT:
            flags |= _P.FLAG_CORRELATION_ID
            after += bytes((len(text),)) + text
    if e.causation_id is not None:
        parts += (_CAUSATION, pack(len(text := e.causation_id.encode())), text)
    if e.subject is not None or e.traceparent is not None or e.tags or e.extensions or more:
        content_type = _short(str((e.extensions or {}).get("datacontenttype", JSON)))
        parts.append(_rare(e, more))
    if len(id) <= _SHORT:
        flags |= _P.FLAG_MESSAGE_ID
        after += bytes((len(id),)) + id
    table = b"".join(parts)
    return b"".join(
        (
            _HEAD.pack(60, 0, len(e.data)),
            _FLAGS.pack(flags),
            content_type,
            pack(len(table)),
            table,
            after,
            _LONGLONG.pack(max(0, e.time_us // 1_000_000)),
        )
    )


@lru_cache(maxsize=4_096)
def _constant(type: str, source: str, schema_version: int) -> bytes:
    """What all events of one class from one source have in common."""
    parts = [_text("specversion", "1.0"), _text("type", type), _text("source", source)]
    if schema_version > 1:  # the server reads every header of every message: each costs
        parts.append(_entry("cloudEvents:schemaversion", schema_version))
    return b"".join(parts)


def _rare(e: Envelope, more: Headers | None) -> bytes:
    found: Headers = {f"cloudEvents:{name}": value for name, value in (e.extensions or {}).items() if name != "datacontenttype"}
    found |= {"cloudEvents:subject": e.subject} if e.subject is not None else {}
    found |= {"cloudEvents:traceparent": e.traceparent} if e.traceparent is not None else {}
    found |= {"cloudEvents:tags": msgspec.json.encode(e.tags).decode()} if e.tags else {}
    return b"".join(_entry(name, value) for name, value in {**found, **(more or {})}.items())


def _name(attribute: str) -> bytes:
    return _short(f"cloudEvents:{attribute}") + b"S"


def _text(attribute: str, value: str) -> bytes:
    text = value.encode()
    return _name(attribute) + _LONG.pack(len(text)) + text


def _entry(name: str, value: object) -> bytes:
    pieces: list[bytes] = []
    tables.encode_value(pieces, value)
    return _short(name) + b"".join(pieces)


def _short(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > _SHORT:
        raise Rejected(f"{text[:40]!r}… has {len(encoded)} bytes, the limit of AMQP for it is {_SHORT}")
    return bytes((len(encoded),)) + encoded


def _time(us: int) -> bytes:
    return b"%s.%06dZ" % (_seconds(us // 1_000_000), us % 1_000_000)


@lru_cache(maxsize=1_024)
def _seconds(seconds: int) -> bytes:
    return as_datetime(seconds * 1_000_000).strftime("%Y-%m-%dT%H:%M:%S").rjust(19, "0").encode()


_JSON = _short(JSON)
_ID, _KEY = _name("id"), _name("partitionkey")
_CORRELATION, _CAUSATION = _name("correlationid"), _name("causationid")
_TIME = _name("time") + _LONG.pack(27)  # all times are as long


# ── in ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

_ATTRIBUTES = {
    f"cloudEvents{sep}{name}".encode(): name
    for sep in ":_"
    for name in (
        "specversion", "id", "type", "source", "time", "subject", "partitionkey", "correlationid", "causationid",
        "traceparent", "schemaversion", "tags",
    )
}  # fmt: skip
_PREFIXES = ("cloudEvents:", "cloudEvents_")
_FIRST_FLAGS = 1 | _P.FLAG_CONTENT_TYPE | _P.FLAG_CONTENT_ENCODING | _P.FLAG_HEADERS  # 1: there is a second word of flags
_TABLE_BYTES = 2 + len(_JSON)  # where the headers' length is, and where they begin
_TABLE = _TABLE_BYTES + 4


def record(routing_key: str, properties: bytes, body: bytes, *, position: int, now_us: int) -> tuple[Record, Headers]:
    """A message as a Record, and its headers that are no attributes of the event."""
    try:
        quick = _quick(properties, body, position, now_us)
    except Exception:  # damaged, or by somebody else who begins alike: read as all else
        quick = None
    if quick is not None:
        return quick, {}
    found: dict[str, Any] = {}
    rest: Headers = {}
    try:
        content_type = _read(properties, found, rest)
        made = _binary(found, rest, content_type, body, position, now_us) or _structured(content_type, body, position, now_us)
    except Exception:  # the headers are somebody else's bytes, and beyond reading
        content_type, made, rest = None, None, {}
    return made or _foreign(routing_key, properties, rest, content_type, body, position, now_us), rest


def _quick(raw: bytes, body: bytes, position: int, now_us: int) -> Record | None:
    """What we write ourselves where nothing rare is set, read in the order in which _properties writes; None for all else.

    Half the time of looking at each header.
    """
    start = raw.find(_ID, _TABLE)
    if start < 0 or raw[2:_TABLE_BYTES] != _JSON or not (constant := _constant_of(raw[:2], raw[_TABLE:start])):
        return None
    end, unpack = _TABLE + _LONG.unpack_from(raw, _TABLE_BYTES)[0], _LONG.unpack_from
    start += len(_ID) + 4
    at = start + unpack(raw, start - 4)[0]
    id = raw[start:at].decode()
    time_at = at + len(_TIME)
    if not id or raw[at:time_at] != _TIME:
        return None
    at = time_at + 27
    found: list[str | None] = [None, None, None]
    for n, name in enumerate((_KEY, _CORRELATION, _CAUSATION)):
        if at < end and raw.startswith(name, at):
            start = at + len(name) + 4
            at = start + unpack(raw, start - 4)[0]
            found[n] = raw[start:at].decode()
    if at != end or end > len(raw):
        return None
    (type, source, version), (key, correlation_id, causation_id) = constant, found
    time_us = _us(raw[time_at : time_at + 27].decode(), now_us)
    return Record(
        id, type, body, key, source, time_us, version, correlation_id, causation_id, None, None, None, (), position, now_us
    )  # fmt: skip


@lru_cache(maxsize=4_096)
def _constant_of(flags: bytes, constant: bytes) -> tuple[str, str, int] | None:
    """Type, source and schema version, if the properties begin as ours do and this is all there is before the id."""
    if _FLAGS.unpack(flags)[0] & _FIRST_FLAGS != _P.FLAG_CONTENT_TYPE | _P.FLAG_HEADERS:
        return None
    found: dict[str, Any] = {}
    rest: Headers = {}
    _read(_FLAGS.pack(_P.FLAG_HEADERS) + _LONG.pack(len(constant)) + constant, found, rest)
    if found.keys() - {"schemaversion"} != {"specversion", "type", "source"} or rest:
        return None
    made = _binary(found | {"id": "any"}, rest, JSON, b"", 0, 0)
    return None if made is None else (made.type, made.source, made.schema_version)


def _read(raw: bytes, found: dict[str, Any], rest: Headers) -> str | None:
    """Sort the headers into attributes and others; returns the content type."""
    flags = _FLAGS.unpack_from(raw)[0]
    if flags & 1:
        raise ValueError("flags beyond the first word")
    content_type, at = None, 2
    if flags & _P.FLAG_CONTENT_TYPE:
        at = 3 + raw[2]
        content_type = _word(raw[3:at])
    if flags & _P.FLAG_CONTENT_ENCODING:
        at += 1 + raw[at]
    if not flags & _P.FLAG_HEADERS:
        return content_type
    end = at + 4 + _LONG.unpack_from(raw, at)[0]
    at += 4
    while at < end:
        start = at + 1
        at = start + raw[at]
        name = raw[start:at]
        if raw[at] == 83:  # S, a text
            start = at + 5
            at = start + _LONG.unpack_from(raw, at + 1)[0]
            value: Any = raw[start:at].decode()
        elif raw[at] == 73:  # I, a whole number
            value = _INT.unpack_from(raw, at + 1)[0]
            at += 5
        else:
            value, at = tables.decode_value(raw, at)
            if name in _ATTRIBUTES:  # all of which are texts
                value = value.isoformat() if isinstance(value, datetime) else str(value)
        attribute = _ATTRIBUTES.get(name)
        if attribute is not None:
            found[attribute] = value
        else:
            rest[name.decode()] = value
    return content_type


@lru_cache(maxsize=256)
def _word(raw: bytes) -> str:
    return raw.decode()


def _binary(
    found: dict[str, Any], rest: Headers, content_type: str | None, body: bytes, position: int, now_us: int
) -> Record | None:
    get = found.get
    id, type, source = get("id"), get("type"), get("source")
    if not (id and type and source and get("specversion") == "1.0"):
        return None
    if not (id.__class__ is str and type.__class__ is str and source.__class__ is str):
        return None
    version, tags, time = get("schemaversion", 1), get("tags"), get("time")
    extensions = None if content_type == JSON and not rest else _extensions(rest, content_type)
    return Record(
        id,
        type,
        body,
        get("partitionkey"),
        source,
        now_us if time is None else _us(time, now_us),
        version if version.__class__ is int and 1 <= version <= MOST_VERSION else 1,
        get("correlationid"),
        get("causationid"),
        get("subject"),
        get("traceparent"),
        extensions,
        () if tags is None else msgspec.json.decode(tags, type=tuple[str, ...]),
        position,
        now_us,
    )


def _extensions(rest: Headers, content_type: str | None) -> dict[str, str | int | bool] | None:
    """Attributes without a field of their own; they leave `rest`."""
    names = [name for name in rest if name.startswith(_PREFIXES)]
    made = {name[12:]: _simple(rest.pop(name)) for name in names}
    if content_type is not None and content_type != JSON:
        made["datacontenttype"] = content_type
    return made or None


def _simple(value: object) -> str | int | bool:
    return value if isinstance(value, (str, int, bool)) else str(value)


def _structured(content_type: str | None, body: bytes, position: int, now_us: int) -> Record | None:
    if content_type is None or not content_type.lower().startswith(STRUCTURED):
        return None
    try:
        e = from_cloudevent(body)
    except DecodeError:
        return None  # the handler will find out, and the bytes are kept as they are
    return _recorded(e, position, now_us)


def _recorded(e: Envelope, position: int, now_us: int) -> Record:
    return Record(**{name: getattr(e, name) for name in Envelope.__struct_fields__}, position=position, recorded_us=now_us)


def _foreign(
    routing_key: str, raw: bytes, rest: Headers, content_type: str | None, body: bytes, position: int, now_us: int
) -> Record:
    properties = _P()
    try:
        properties.decode(raw)
    except Exception:  # as above
        properties = _P()
    id = _text_of(properties.message_id) or new_id()
    correlation_id, traceparent = _text_of(properties.correlation_id), _text_of(rest.get("traceparent"))
    extensions = _extensions({}, content_type)
    type, data, time_us = routing_key or "unknown", body, _of_timestamp(properties.timestamp, now_us)
    if plain := _as_plain(body):
        type, data, time_us = plain.event_type, bytes(plain.payload), _us(plain.timestamp, time_us)
    return Record(
        id, type, data, None, "amqp", time_us, 1, correlation_id, None, None, traceparent, extensions, (), position, now_us
    )  # fmt: skip


def _as_plain(body: bytes) -> _Plain | None:
    if body[:1] not in (b"{", b" ", b"\n"):
        return None
    try:
        found = _plain.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return found if found.event_type else None


def _text_of(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _of_timestamp(seconds: object, now_us: int) -> int:
    return seconds * 1_000_000 if isinstance(seconds, int) and 0 < seconds < 1 << 36 else now_us


def _us(time: Any, now_us: int) -> int:
    """When it happened: RFC 3339, or seconds or milliseconds since 1970; what is none of them counts as now."""
    try:
        if time.__class__ is str:
            if len(time) == 27 and time[19] == "." and time[26] == "Z" and time.isascii() and time[20:26].isdigit():
                return _second(time[:19]) + int(time[20:26])
            moment = msgspec.convert(time, datetime)
            return as_us(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
        if isinstance(time, (int, float)) and 0 < time < 1 << 45:
            return int(time * (1_000 if time > 1 << 36 else 1_000_000))
    except (ValueError, msgspec.MsgspecError, OverflowError):
        pass
    return now_us


@lru_cache(maxsize=1_024)
def _second(text: str) -> int:
    return as_us(msgspec.convert(text + "Z", datetime))
