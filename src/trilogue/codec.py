"""Typed events to bytes and back, and Envelopes to CloudEvents JSON and back.

    Watched("u1", "v9")  ──encode──>  b'{"user":"u1","video":"v9"}'  ──decode──>  Watched("u1", "v9")

msgspec does the work for dataclasses and Structs (and everything nested in them: datetime, Decimal, UUID, enums, bytes as
base64, unions); pydantic models do their own.
"""

import base64
import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec

from trilogue.errors import BadOption, DecodeError, UnknownEvent
from trilogue.events import (
    EARLIEST_US,
    LATEST_US,
    MOST_VERSION,
    Envelope,
    EventType,
    Record,
    Upcast,
    as_datetime,
    as_us,
    audit,
    event_type,
    key_reader,
    new_id,
    now_us,
    tags_reader,
)
from trilogue.sealing import Keys as Keys
from trilogue.sealing import Sealing, redact, sealed, sealing, unsealed

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Coder:
    """How one event class goes to bytes and comes back."""

    mark: EventType
    type: str
    version: int
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    key: Callable[[Any], str | None]
    tags: Callable[[Any], tuple[str, ...]]
    cls: Any
    sealing: Sealing | None

    def read(self, envelope: Envelope, keys: Keys | None = None) -> Any:
        """The typed event in an envelope of any schema version, sealed fields opened; raises DecodeError."""
        if envelope.schema_version == self.version and self.sealing is None:
            return self.decode(envelope.data)
        return self.decode(self.current(envelope, keys))

    def current(self, envelope: Envelope, keys: Keys | None = None) -> bytes:
        """The data as the class of today would have written it, in plain text."""
        steps = self.mark.upcasts[envelope.schema_version - 1 :]
        data = envelope.data
        if self.sealing is not None:
            data = unsealed(data, self.sealing, envelope, keys, is_older=envelope.schema_version < self.version)
        return self._upcast(data, steps, envelope.schema_version) if steps else data

    def _upcast(self, data: bytes, steps: Sequence[Upcast | None], version: int) -> bytes:
        try:
            document = msgspec.json.decode(data)
            for step in steps:
                document = document if step is None else step(document)
            if self.sealing is not None:
                redact(document, self.sealing)
            return msgspec.json.encode(document)
        except Exception as error:  # an upcaster may raise anything
            raise DecodeError(
                f"event {self.type!r} of schema version {version} does not become version {self.version}: "
                f"{type(error).__name__}: {error}"
            ) from error


@lru_cache(maxsize=4096)
def coder(cls: Any) -> Coder:
    """The Coder of an event class; raises UnknownEvent for a class without @event, or one that cannot be an event.

    Raises BadOption for personal fields that cannot be sealed.
    """
    mark = event_type(cls)
    try:
        encode, decode = _pydantic(cls) if _is_pydantic(cls) else json_coder(cls)
    except (TypeError, ValueError, NameError) as error:
        raise UnknownEvent(f"event {mark.name!r}: {cls.__qualname__} cannot be read from JSON: {error}") from error
    return Coder(mark, mark.name, mark.version, encode, decode, key_reader(cls), tags_reader(cls), cls, sealing(cls, mark))


def _is_pydantic(cls: Any) -> bool:
    # Asked by its shape, so that pydantic need not be installed.
    return hasattr(cls, "model_validate_json") and hasattr(cls, "model_dump_json")


def json_coder(cls: type) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    """Encode and decode of a dataclass or Struct; raises TypeError for another class, decode raises DecodeError."""
    if not is_dataclass(cls) and not issubclass(cls, msgspec.Struct):
        raise TypeError("it is no dataclass, msgspec Struct or pydantic model; put @dataclass below @event")
    encoder = msgspec.json.Encoder(enc_hook=_nested_to_builtin)
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(cls, dec_hook=_nested_from_builtin)

    def decode(data: bytes) -> Any:
        try:
            return decoder.decode(data)
        except Exception as error:  # whatever __post_init__ raises, too: the bytes are not such an event
            raise DecodeError(f"not a {cls.__qualname__}: {error}") from error

    return encoder.encode, decode


def _pydantic(cls: Any) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    def encode(event: Any) -> bytes:
        return _dump(event)

    def decode(data: bytes) -> Any:
        try:
            return cls.model_validate_json(data)
        except Exception as error:  # a validator may raise anything
            raise DecodeError(f"not a {cls.__qualname__}: {error}") from error

    return encode, decode


def _dump(model: Any) -> bytes:
    # By alias, and without computed fields, because that is what validation expects back.
    return bytes(model.model_dump_json(by_alias=True, round_trip=True), "utf-8")


def _nested_to_builtin(value: Any) -> Any:
    if _is_pydantic(type(value)):
        return msgspec.Raw(_dump(value))
    raise NotImplementedError(f"{type(value).__qualname__} cannot be written as JSON: use a dataclass, a Struct or builtins")


def _nested_from_builtin(cls: type, value: Any) -> Any:
    if _is_pydantic(cls):
        return cls.model_validate_json(msgspec.json.encode(value))  # type: ignore[attr-defined]
    raise NotImplementedError(f"{cls.__qualname__} cannot be read from JSON: use a dataclass, a Struct or builtins")


def envelope(
    event: object,
    *,
    id: str | None = None,
    time_us: int | None = None,
    source: str = "trilogue",
    cause: Envelope | None = None,
    keys: Keys | None = None,
    stream: str | None = None,
) -> Envelope:
    """Put an event into an Envelope.

    id: decides what counts as a repetition; a new UUIDv7 if not given. time_us: when it happened; now if not given.
    source: who says so. cause: the Envelope that led to this one; its correlation id is inherited.
    keys: seal its personal fields. stream: the stream it is for, which is its key if the class names none.
    Raises UnknownEvent, BadOption if the event cannot be encoded.

    >>> from trilogue import event
    >>> @event("a.b")
    ... class A(msgspec.Struct):
    ...     n: int
    >>> envelope(A(1)).data
    b'{"n":1}'
    """
    cls: Any = type(event)
    code = coder(cls)
    if id is None:
        id = new_id()
    try:
        data = code.encode(event)
    except (TypeError, ValueError, OverflowError, NotImplementedError, RecursionError) as error:
        raise BadOption(f"event {code.type!r} cannot be encoded: {error}") from error
    if stream is not None:
        _check_readable(code, data)
    if code.sealing is not None:
        data = sealed(data, code.sealing, id, keys)
    if time_us is None:
        time_us = now_us()
    elif not EARLIEST_US <= time_us <= LATEST_US:
        raise BadOption(f"time_us={time_us} of event {code.type!r} is out of range: expected microseconds, year 1 to 9999")
    key = code.key(event)
    return Envelope(
        id,
        code.type,
        data,
        stream if key is None else key,
        source,
        time_us,
        code.version,
        None if cause is None else cause.correlation_id or cause.id,
        None if cause is None else cause.id,
        None,
        None if cause is None else cause.traceparent,
        audit(),
        code.tags(event),
    )


def _check_readable(code: Coder, data: bytes) -> None:
    """A stream that holds one event nobody can read can never be loaded again, so it is found out before."""
    try:
        code.decode(data)
    except DecodeError as error:
        raise BadOption(f"event {code.type!r} is not what its class says, so nobody could read it again: {error}") from error


# ── CloudEvents 1.0, JSON format ─────────────────────────────────────────────────────────────────────────────────────
# https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md

_NAMED = {
    "subject": "subject",
    "partitionkey": "key",
    "correlationid": "correlation_id",
    "causationid": "causation_id",
    "traceparent": "traceparent",
}
_REQUIRED = ("id", "source", "type")
_OURS = ("specversion", "time", "schemaversion", "tags", "data", "data_base64")
_JSON_TYPE = re.compile(r"(application|text)/([a-zA-Z0-9.\-]+\+)?json\s*(;.*)?", re.IGNORECASE)


def to_cloudevent(envelope: Envelope) -> bytes:
    """The Envelope (or Record) as a CloudEvent in JSON."""
    document: dict[str, Any] = {
        "specversion": "1.0",
        "id": envelope.id,
        "source": envelope.source,
        "type": envelope.type,
        "time": as_datetime(envelope.time_us),
        "schemaversion": envelope.schema_version,
    }
    for attribute, name in _NAMED.items():
        if value := getattr(envelope, name):  # the specification knows no empty attribute
            document[attribute] = value
    if envelope.tags:
        document["tags"] = msgspec.json.encode(envelope.tags).decode()  # an attribute is a text, not a list
    document = {"datacontenttype": JSON} | (envelope.extensions or {}) | document
    if isinstance(envelope, Record):
        # `sequence` is compared as text, so it is padded to the width of the largest position.
        document |= {"sequence": f"{envelope.position:019d}", "recordedtime": as_datetime(envelope.recorded_us)}
    return msgspec.json.encode(document | _data(envelope.data, document["datacontenttype"]))


def _data(data: bytes, content_type: str) -> dict[str, Any]:
    if _JSON_TYPE.fullmatch(content_type):
        with contextlib.suppress(msgspec.DecodeError):
            return {"data": msgspec.json.decode(data, type=msgspec.Raw)}
    return {"data_base64": data}


def from_cloudevent(document: bytes) -> Envelope:
    """The Envelope in a CloudEvent in JSON; raises DecodeError naming the attribute that is missing or wrong.

    Attributes without a field of their own are kept in `extensions`; those that a log gives to its records are not.
    """
    try:
        raw = msgspec.json.decode(document, type=dict[str, msgspec.Raw])
        plain = {name: msgspec.json.decode(value) for name, value in raw.items() if name != "data"}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise DecodeError(f"not a CloudEvent: {error}") from error
    attributes = {name: value for name, value in plain.items() if value is not None}  # null means not there
    _check_attributes(attributes)
    content_type = str(attributes.get("datacontenttype", JSON))
    if content_type == JSON:
        attributes.pop("datacontenttype", None)
    if "recordedtime" in attributes:
        del attributes["recordedtime"]
        attributes.pop("sequence", None)
    known = {*_REQUIRED, *_NAMED, *_OURS}
    named: dict[str, Any] = {name: attributes.get(attribute) for attribute, name in _NAMED.items()}
    return Envelope(
        **{name: attributes[name] for name in _REQUIRED},
        **named,
        data=_data_of(attributes.get("data_base64"), raw.get("data"), content_type),
        schema_version=attributes.get("schemaversion", 1),
        time_us=_parse_time(attributes["time"]) if "time" in attributes else now_us(),
        extensions={name: value for name, value in attributes.items() if name not in known} or None,
        tags=_tags_of(attributes.get("tags", "[]")),
    )


def _tags_of(text: Any) -> tuple[str, ...]:
    try:
        return msgspec.json.decode(text, type=tuple[str, ...])
    except (msgspec.MsgspecError, TypeError) as error:
        raise DecodeError(f"not a CloudEvent of ours: 'tags' is {text!r}, expected a JSON list of texts") from error


def _data_of(encoded: str | None, data: msgspec.Raw | None, content_type: str) -> bytes:
    if encoded is None and data is None:
        return b"null"
    if encoded is None:
        text = b"" if data is None else bytes(data)
        # Text that is no JSON travels as a JSON string.
        is_text = text.startswith(b'"') and not _JSON_TYPE.fullmatch(content_type)
        return str(msgspec.json.decode(text)).encode() if is_text else text
    if data is not None and bytes(data) != b"null":
        raise DecodeError("not a CloudEvent: it has both 'data' and 'data_base64'")
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise DecodeError(f"not a CloudEvent: 'data_base64' is not base64: {error}") from error


def _check_attributes(attributes: dict[str, Any]) -> None:
    for name in _REQUIRED:
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise DecodeError(f"not a CloudEvent: attribute {name!r} must be a text that is not empty")
    if attributes.get("specversion") != "1.0":
        raise DecodeError(f"CloudEvents version {attributes.get('specversion')!r} is not understood: expected '1.0'")
    version = attributes.get("schemaversion", 1)
    if type(version) is not int or not 1 <= version <= MOST_VERSION:
        raise DecodeError(f"not a CloudEvent of ours: 'schemaversion' is {version!r}, expected 1 to {MOST_VERSION}")
    for name, value in attributes.items():
        if name in (*_NAMED, "time", "datacontenttype", "data_base64") and not isinstance(value, str):
            raise DecodeError(f"not a CloudEvent: attribute {name!r} must be a text")
        if not isinstance(value, (str, int, bool)):
            raise DecodeError(f"not a CloudEvent: attribute {name!r} must be a text, a whole number or a boolean")


def _parse_time(text: str) -> int:
    try:
        moment = msgspec.convert(text, datetime)
    except msgspec.MsgspecError as error:
        raise DecodeError(f"not a CloudEvent: time {text!r} is not RFC 3339") from error
    return as_us(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
