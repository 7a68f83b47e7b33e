"""Which fields of an event are personal, and how they are sealed and opened; whose keys, and where they are, is not known here.

{"order": "o1", "customer": "u7", "email": "a@example.org"}            as the program has it
{"order": "o1", "customer": "u7", "email": "sealed:1:dTc:W3qx…"}       on the log, in timers, dead letters, CloudEvents
{"order": "o1", "customer": "u7", "email": "[erased]"}                 read after u7 was erased; None where that is allowed
"""

from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Protocol, get_type_hints

import msgspec

from trilogue.errors import BadOption, DecodeError
from trilogue.events import KEY_CHARS, Envelope, EventType, field_names

ERASED = "[erased]"
PREFIX = "sealed:1:"
_QUOTED = b'"' + PREFIX.encode()


class Keys(Protocol):
    """The keys of the people whose data is sealed: one each, and once it is destroyed nobody reads their data any more."""

    def seal(self, subject: str, plain: bytes, about: bytes) -> str:
        """Seal a value; about: what it belongs to, which has to be the same to unseal it. Raises Rejected for the erased."""
        ...

    def unseal(self, sealed: str, about: bytes) -> bytes | None:
        """The value again; None if the person was erased. Raises DecodeError for what was never sealed like this."""
        ...

    def erasures(self) -> int:
        """How many people have been erased so far."""
        ...

    def seal_state(self, body: bytes, *, since: int | None = None) -> bytes | None:
        """Seal what is made of many people's data, with a key that is replaced whenever somebody is erased.

        since: erasures() from before the state was read; None is returned if somebody was erased meanwhile: it is not to be
        kept.
        """
        ...

    def unseal_state(self, sealed: bytes) -> bytes | None:
        """The state again; None if somebody was erased since."""
        ...


class NoKeys:
    """The keys of nobody, for events that are never stored: what is sealed with them is lost, everybody reads as erased."""

    def seal(self, subject: str, plain: bytes, about: bytes) -> str:
        """Nothing of it is kept."""
        return PREFIX

    def unseal(self, sealed: str, about: bytes) -> bytes | None:
        """As if everybody had been erased."""
        return None

    def erasures(self) -> int:
        """None of which is known."""
        return 0

    def seal_state(self, body: bytes, *, since: int | None = None) -> bytes | None:
        """Not to be kept."""
        return None

    def unseal_state(self, sealed: bytes) -> bytes | None:
        """As if somebody had been erased since."""
        return None


@dataclass(frozen=True, slots=True)
class Sealing:
    """What is sealed in events of one class, by the names the JSON has.

    subject: the field that says whose data it is. redacted: each personal field, and what it reads once the person is erased.
    """

    type: str
    subject: str
    redacted: dict[str, str | None]


def sealing(cls: Any, mark: EventType) -> Sealing | None:
    """What is sealed in events of a class, None if nothing is; raises BadOption for a field that cannot be sealed."""
    if mark.subject is None:
        return None
    names = _encoded_names(cls)
    for field in (mark.subject, *mark.personal):
        if field not in names:
            what = "subject" if field == mark.subject else "personal"
            raise BadOption(f"event {mark.name!r}: {what} {field!r} is no field of {cls.__qualname__}, which has {sorted(names)}")
    for field in mark.personal:
        if field in (mark.subject, mark.key, *mark.tags):
            raise BadOption(
                f"event {mark.name!r}: field {field!r} is its subject, key or tag, which stand in plain text on the log, so it "
                "cannot be personal: use an id of yours there"
            )
    return Sealing(mark.name, names[mark.subject], {names[field]: _redacted(cls, mark, field) for field in mark.personal})


def _encoded_names(cls: Any) -> dict[str, str]:
    """The name that each field has in the JSON."""
    if isinstance(cls, type) and is_dataclass(cls):
        return {name: name for name in field_names(cls)}
    if isinstance(cls, type) and issubclass(cls, msgspec.Struct):
        if cls.__struct_config__.array_like:
            raise BadOption(f"{cls.__qualname__} is written as a JSON list, whose fields have no names: drop array_like=True")
        return {field.name: field.encode_name for field in msgspec.structs.fields(cls)}
    return {name: field.serialization_alias or field.alias or name for name, field in cls.model_fields.items()}


def _redacted(cls: Any, mark: EventType, field: str) -> str | None:
    for value in (None, ERASED):
        if _accepts(cls, field, value):
            return value
    raise BadOption(
        f"event {mark.name!r}: personal field {field!r} can be neither None nor {ERASED!r}, which is what it reads once the "
        "person is erased: allow None, as `int | None`"
    )


def _accepts(cls: Any, field: str, value: str | None) -> bool:
    try:
        if hasattr(cls, "model_fields"):
            from pydantic import TypeAdapter

            info = cls.model_fields[field]
            annotation: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
            TypeAdapter(annotation).validate_python(value)
        else:
            msgspec.convert(value, get_type_hints(cls, include_extras=True)[field])
    except (ValueError, TypeError, msgspec.MsgspecError):
        return False
    return True


# ── sealing and opening ──────────────────────────────────────────────────────────────────────────────────────────────


def sealed(data: bytes, fields: Sealing, id: str, keys: Keys | None) -> bytes:
    """The encoded event with its personal fields sealed. id: of the event.

    Raises BadOption where there are no keys, or nobody is named whose data it is; Rejected for somebody who was erased.
    """
    document = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    for field in fields.redacted:
        plain = bytes(document.get(field, b"null"))
        if plain == b"null":
            continue
        if keys is None:
            raise BadOption(f"event {fields.type!r} has personal data and is sealed by an App: make it with app.envelope(event)")
        text = keys.seal(_subject(document, fields), plain, about(id, fields.type, field))
        document[field] = msgspec.Raw(msgspec.json.encode(text))
    return msgspec.json.encode(document)


def _subject(document: dict[str, msgspec.Raw], fields: Sealing) -> str:
    value = msgspec.json.decode(document.get(fields.subject, b"null"))
    subject = str(value) if type(value) in (str, int) else ""
    if not 0 < len(subject) <= KEY_CHARS or subject[0] == "\x00":
        raise BadOption(
            f"event {fields.type!r} has personal data, and its field {fields.subject!r}, which says whose, is {value!r}: "
            f"expected an id, a text of 1 to {KEY_CHARS} characters"
        )
    return subject


def unsealed(data: bytes, fields: Sealing, envelope: Envelope, keys: Keys | None, *, is_older: bool = False) -> bytes:
    """The encoded event in plain text, redacted where the person was erased. is_older: of an older version of its class.

    A personal field that was stored before it was declared personal is plain and stays so.
    Raises BadOption where there are no keys, DecodeError for what was not sealed for this place.
    """
    if _QUOTED not in data:
        return data
    document = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    for field, value in document.items():
        # In an older version the field may have had another name: there, whatever can be opened is.
        if (field in fields.redacted or is_older) and bytes(value).startswith(_QUOTED):
            document[field] = _opened(value, fields, envelope, field, keys)
    return msgspec.json.encode(document)


def _opened(value: msgspec.Raw, fields: Sealing, envelope: Envelope, field: str, keys: Keys | None) -> msgspec.Raw:
    if keys is None:
        raise BadOption(f"event {fields.type!r} has sealed data and is read without keys: read it with app.decode(record)")
    try:
        plain = keys.unseal(msgspec.json.decode(value, type=str), about(envelope.id, envelope.type, field))
    except DecodeError:
        if field in fields.redacted:
            raise
        return value  # a text that only looks like it
    return msgspec.Raw(msgspec.json.encode(fields.redacted.get(field, ERASED)) if plain is None else plain)


def redact(document: dict[str, Any], fields: Sealing) -> None:
    """After upcasting: what became a field of another name reads as that one does once the person is erased."""
    for field, redacted in fields.redacted.items():
        if redacted is None and document.get(field) == ERASED:
            document[field] = None


def holds_sealed(data: bytes) -> bool:
    """Whether there is a sealed value in the data of an event, whatever its class is."""
    return _QUOTED in data


def about(id: str, type: str, field: str) -> bytes:
    """What a sealed value belongs to: it opens nowhere else."""
    return msgspec.json.encode((id, type, field))
