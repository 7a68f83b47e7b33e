"""Typed events to bytes and back, and Envelopes to CloudEvents JSON and back.

    Watched("u1", "v9")  ──encode──>  b'{"user":"u1","video":"v9"}'  ──decode──>  Watched("u1", "v9")

msgspec does the work for dataclasses and Structs (and everything nested in them: datetime, Decimal, UUID, enums, bytes as
base64, unions); pydantic models do their own.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec

from trilogue.errors import BadOption, DecodeError
from trilogue.events import Envelope, Record, as_datetime, event_type, key_reader, new_id, now_us

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Coder:
    """How one event class goes to bytes and comes back."""

    type: str
    version: int
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    key: Callable[[Any], str | None]


@lru_cache(maxsize=4096)
def coder(cls: Any) -> Coder:
    """The Coder of an event class; raises UnknownEvent for a class without @event."""
    mark = event_type(cls)
    encode, decode = _pydantic(cls) if _is_pydantic(cls) else _msgspec(cls)
    return Coder(mark.name, mark.version, encode, decode, key_reader(cls))


def _is_pydantic(cls: Any) -> bool:
    # Asked by its shape, so that pydantic need not be installed.
    return hasattr(cls, "model_validate_json") and hasattr(cls, "model_dump_json")


def _msgspec(cls: type) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    encoder = msgspec.json.Encoder(enc_hook=_nested_to_builtin)
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(cls, dec_hook=_nested_from_builtin)

    def decode(data: bytes) -> Any:
        try:
            return decoder.decode(data)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise DecodeError(f"not a {cls.__qualname__}: {error}") from error

    return encoder.encode, decode


def _pydantic(cls: Any) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    def encode(event: Any) -> bytes:
        return bytes(event.model_dump_json(), "utf-8")

    def decode(data: bytes) -> Any:
        try:
            return cls.model_validate_json(data)
        except (ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
            raise DecodeError(f"not a {cls.__qualname__}: {error}") from error

    return encode, decode


def _nested_to_builtin(value: Any) -> Any:
    if _is_pydantic(type(value)):
        return value.model_dump(mode="json")
    raise NotImplementedError(
        f"{type(value).__qualname__} cannot be written as JSON: use a dataclass, a Struct or builtins"
    )


def _nested_from_builtin(cls: type, value: Any) -> Any:
    if _is_pydantic(cls):
        return cls.model_validate(value)  # type: ignore[attr-defined]
    raise NotImplementedError(f"{cls.__qualname__} cannot be read from JSON: use a dataclass, a Struct or builtins")


def envelope(
    event: object,
    *,
    id: str | None = None,
    time_us: int | None = None,
    source: str = "trilogue",
    cause: Envelope | None = None,
) -> Envelope:
    """Put an event into an Envelope.

    id: decides what counts as a repetition; a new UUIDv7 if not given. time_us: when it happened; now if not given.
    source: who says so. cause: the Envelope that led to this one; its correlation id is inherited.
    Raises UnknownEvent, BadOption if the event cannot be encoded.

    >>> from trilogue import event
    >>> @event("a.b")
    ... class A(msgspec.Struct):
    ...     n: int
    >>> envelope(A(1)).data
    b'{"n":1}'
    """
    code = coder(type(event))
    try:
        data = code.encode(event)
    except (TypeError, ValueError, NotImplementedError, RecursionError) as error:
        raise BadOption(f"event {code.type!r} cannot be encoded: {error}") from error
    if cause is None:
        return Envelope(
            id or new_id(),
            code.type,
            data,
            code.key(event),
            source,
            now_us() if time_us is None else time_us,
            code.version,
        )
    return Envelope(
        id or new_id(),
        code.type,
        data,
        code.key(event),
        source,
        now_us() if time_us is None else time_us,
        code.version,
        cause.correlation_id or cause.id,
        cause.id,
        None,
        cause.traceparent,
    )


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
        if (value := getattr(envelope, name)) is not None:
            document[attribute] = value
    document.update(envelope.extensions or {})
    if isinstance(envelope, Record):
        # `sequence` is compared as text, so it is padded to the width of the largest position.
        document |= {"sequence": f"{envelope.position:019d}", "recordedtime": as_datetime(envelope.recorded_us)}
    return msgspec.json.encode(document | _data(envelope))


def _data(envelope: Envelope) -> dict[str, Any]:
    content_type = (envelope.extensions or {}).get("datacontenttype", JSON)
    if content_type != JSON:
        return {"data_base64": envelope.data}
    return {"datacontenttype": JSON, "data": msgspec.Raw(envelope.data)}


def from_cloudevent(document: bytes) -> Envelope:
    """The Envelope in a CloudEvent in JSON; raises DecodeError naming the attribute that is missing or wrong.

    Attributes without a field of their own are kept in `extensions`.
    """
    try:
        attributes = msgspec.json.decode(document, type=dict[str, msgspec.Raw])
        plain = {name: msgspec.json.decode(raw) for name, raw in attributes.items() if name != "data"}
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DecodeError(f"not a CloudEvent: {error}") from error
    _check_attributes(plain)
    data = (
        base64.b64decode(plain.pop("data_base64")) if "data_base64" in plain else bytes(attributes.get("data", b"null"))
    )
    version = plain.pop("schemaversion", 1)
    time = plain.pop("time", None)
    if plain.get("datacontenttype") == JSON:
        del plain["datacontenttype"]
    for ours in ("specversion", "sequence", "recordedtime"):
        plain.pop(ours, None)
    return Envelope(
        **{name: plain.pop(name) for name in _REQUIRED},
        **{name: plain.pop(attribute, None) for attribute, name in _NAMED.items()},
        data=data,
        schema_version=version,
        time_us=now_us() if time is None else _parse_time(time),
        extensions=plain or None,
    )


def _check_attributes(attributes: dict[str, Any]) -> None:
    for name in _REQUIRED:
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise DecodeError(f"not a CloudEvent: attribute {name!r} must be a text that is not empty")
    if attributes.get("specversion") != "1.0":
        raise DecodeError(f"CloudEvents version {attributes.get('specversion')!r} is not understood: expected '1.0'")
    if not isinstance(attributes.get("schemaversion", 1), int):
        raise DecodeError("not a CloudEvent of ours: attribute 'schemaversion' must be a whole number")
    for name, value in attributes.items():
        if not isinstance(value, (str, int, bool)):
            raise DecodeError(f"not a CloudEvent: attribute {name!r} must be a text, a whole number or a boolean")


def _parse_time(text: str) -> int:
    try:
        moment = msgspec.convert(text, datetime)
    except msgspec.MsgspecError as error:
        raise DecodeError(f"not a CloudEvent: time {text!r} is not RFC 3339") from error
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)
