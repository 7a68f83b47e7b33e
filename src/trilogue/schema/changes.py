"""What became of an event's form since it was released, and whether that can be read on both sides.

    was {"amount": string}   is {"amount": integer}            retyped    breaking
    was {"a"}                is {"a", "b"}                     required   breaking: what is stored has no b
    was {"a"}                is {"a", "b?"}                    added      fine
    was version 1            is version 2, upcast={1: f}       fine, whatever changed

The lock file holds the form of every version ever released: {"types": {"order.placed": [{"version": 1, …}, {"version": 2, …}]}}
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from trilogue.codec import Coder
from trilogue.errors import TrilogueError
from trilogue.schema.forms import Form, form_of

Lock = dict[str, list[Form]]
LOCK_FORMAT = 1
_MARKS = ("key", "tags", "subject", "personal")


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was. field: its path in the data. kind: removed, added, required, optional, retyped,
    widened (what was allowed still is) or default. said: how it was and is."""

    field: str
    kind: str
    said: str


@dataclass(frozen=True, slots=True)
class Change:
    """What a release would change. breaking: what is stored, or what runs beside it, could not be read. mend: what to do."""

    type: str
    version: int
    breaking: bool
    said: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.type} version {self.version}: {self.said}" + (f"; {self.mend}" if self.mend else "")


# ── two forms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def differences(was: Form, now: Form) -> list[Difference]:
    """What differs in the schemas of two forms, field by field."""
    return list(_Compared(was["schema"], now["schema"]).nodes(was["schema"], now["schema"], ""))


class _Compared:
    """Two JSON Schemas; nodes of them are compared with references followed."""

    def __init__(self, was: Form, now: Form, seen: Iterable[tuple[int, int]] = ()) -> None:
        self.was, self.now = was, now
        self.seen = set(seen)

    def nodes(self, was: Any, now: Any, at: str) -> Iterator[Difference]:
        was, now = _followed(was, self.was), _followed(now, self.now)
        if (id(was), id(now)) in self.seen:  # a type that holds itself
            return
        self.seen.add((id(was), id(now)))
        if _is_anything(now) and not _is_anything(was):
            yield Difference(at, "widened", f"was {shown(was, self.was)}, is anything")
            return
        if "properties" in was and "properties" in now:
            yield from self.objects(was, now, at)
        if "prefixItems" in was and "prefixItems" in now:
            yield from self.objects(_by_place(was), _by_place(now), at)
        if "anyOf" in was or "anyOf" in now:
            yield from self.unions(was, now, at)
            return
        for part, sign in (("items", "[]"), ("additionalProperties", "{}")):
            if isinstance(was.get(part), dict) and isinstance(now.get(part), dict):
                yield from self.nodes(was[part], now[part], at + sign)
        if _rest(was) != _rest(now):
            yield Difference(at, "widened" if _is_wider(was, now) else "retyped", f"was {shown(was)}, is {shown(now)}")

    def objects(self, was: Form, now: Form, at: str) -> Iterator[Difference]:
        old, new = was["properties"], now["properties"]
        needed = set(was.get("required", ())), set(now.get("required", ()))
        for name in sorted({*old, *new}):
            path = f"{at}.{name}".lstrip(".")
            if name not in new:
                yield Difference(path, "removed", "is gone")
            elif name not in old:
                yield _required(path, "is new and required") if name in needed[1] else Difference(path, "added", "is new")
            else:
                if (name in needed[0]) != (name in needed[1]):
                    yield _required(path, "is required now") if name in needed[1] else Difference(path, "optional", "is optional")
                elif old[name].get("default") != new[name].get("default"):
                    yield Difference(path, "default", f"default was {_default(old[name])}, is {_default(new[name])}")
                yield from self.nodes(old[name], new[name], path)

    def unions(self, was: Form, now: Form, at: str) -> Iterator[Difference]:
        """Alternatives that are the same pair off, those of one kind are compared, the rest came or went."""
        old, new = list(was.get("anyOf", (was,))), list(now.get("anyOf", (now,)))
        for each in list(old):
            same = next((other for other in new if self.are_same(each, other)), None)
            if same is not None:
                old.remove(each)
                new.remove(same)
        for each in list(old):
            kin = next((other for other in new if _are_kin(_followed(each, self.was), _followed(other, self.now))), None)
            if kin is not None:
                old.remove(each)
                new.remove(kin)
                yield from self.nodes(each, kin, at)
        if old or new or _outside(was) != _outside(now):
            said = f"was {shown(was, self.was)}, is {shown(now, self.now)}"
            yield Difference(at, "retyped" if old or _outside(was) != _outside(now) else "widened", said)

    def are_same(self, was: Form, now: Form) -> bool:
        return not list(_Compared(self.was, self.now, self.seen).nodes(was, now, ""))


def _is_anything(node: Form) -> bool:
    return not _rest(node)


def _by_place(node: Form) -> Form:
    """A list with a type for each place, as an object with the places for names."""
    places = [f"{n:03d}" for n in range(len(node["prefixItems"]))]
    return {"properties": dict(zip(places, node["prefixItems"], strict=True)), "required": places[: node.get("minItems", 0)]}


def _required(path: str, said: str) -> Difference:
    return Difference(path, "required", said)


def _followed(node: Any, document: Form) -> Any:
    while isinstance(node, dict) and "$ref" in node:
        node = document if node["$ref"] == "#" else document["$defs"][node["$ref"]]
    return node if isinstance(node, dict) else {"allowed": node}


def _rest(node: Form) -> Form:
    """What is compared as it stands: neither fields, which are compared one by one, nor what says nothing of the type."""
    nested = [part for part in ("properties", "items", "additionalProperties") if isinstance(node.get(part), dict)]
    silent = ("required", "default", "$defs", *nested, *(("minItems", "prefixItems") if "prefixItems" in node else ()))
    return {name: value for name, value in node.items() if name not in silent} | dict.fromkeys(nested, True)


def _outside(node: Form) -> Form:
    # A format stands beside anyOf, or within the only alternative.
    return {name: value for name, value in _rest(node).items() if name == "format"} if "anyOf" in node else {}


def _is_wider(was: Form, now: Form) -> bool:
    """Whether everything that was allowed still is: more values of an enum, a number where there were whole ones."""
    old, new = _rest(was), _rest(now)
    if "enum" in old and "enum" in new:
        return set(map(repr, old.pop("enum"))) <= set(map(repr, new.pop("enum"))) and old == new
    return old.pop("type", None) == "integer" and new.pop("type", None) == "number" and old == new


def _are_kin(was: Form, now: Form) -> bool:
    """Whether two alternatives are the same one changed: of one type, and with the same tag if they have one."""
    if was.get("type") != now.get("type"):
        return False
    tags = [
        {name: p["enum"] for name, p in each.get("properties", {}).items() if len(p.get("enum", ())) == 1} for each in (was, now)
    ]
    return tags[0] == tags[1]


def _default(node: Form) -> str:
    return msgspec.json.encode(node["default"]).decode() if "default" in node else "none"


def shown(node: Form, document: Form | None = None) -> str:
    """A JSON Schema in a few words.

    >>> shown({"anyOf": [{"type": "string", "format": "uuid"}, {"type": "null"}]})
    'string (uuid) or null'
    """
    node = _followed(node, document or {}) if "$ref" not in node or document else {"type": "object"}
    if "anyOf" in node:
        return " or ".join(shown(each, document) for each in node["anyOf"])
    if "enum" in node:
        return "one of " + ", ".join(str(each) for each in node["enum"])
    words = str(node.get("type", "anything"))
    details = [f"{name} {value}" if name != "format" else str(value) for name, value in _rest(node).items() if name != "type"]
    return f"{words} ({', '.join(details)})" if details else words


# ── the lock file ────────────────────────────────────────────────────────────────────────────────────────────────────


def read_lock(text: bytes, where: str) -> Lock:
    """The released forms by type, oldest first; raises TrilogueError for what is no lock file."""
    try:
        document = msgspec.json.decode(text)
        if document["format"] != LOCK_FORMAT:
            raise TrilogueError(f"{where} has format {document['format']!r}: this release of trilogue knows {LOCK_FORMAT}")
        lock = {str(name): sorted(forms, key=lambda form: int(form["version"])) for name, forms in document["types"].items()}
        for forms in lock.values():
            for form in forms:
                _ = form["schema"]["type"], [form[mark] for mark in _MARKS]
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrilogueError(f"{where} is no lock file: {error!r}; restore it, or make a new one with --update") from error
    return lock


def lock_text(lock: Lock) -> bytes:
    """The lock file: the same bytes for the same forms."""
    document = {"format": LOCK_FORMAT, "types": {name: lock[name] for name in sorted(lock)}}
    return msgspec.json.format(msgspec.json.encode(document, order="deterministic"), indent=2) + b"\n"


def updated(lock: Lock, coders: Mapping[str, Coder]) -> Lock:
    """The lock with the forms of today in it; what today's code has no class or only older versions of is let go."""
    return {
        name: [*(f for f in lock.get(name, ()) if f["version"] < code.version), form_of(code)] for name, code in coders.items()
    }


def changes(lock: Lock, coders: Mapping[str, Coder]) -> list[Change]:
    """What today's classes change of what was released, by type."""
    found: list[Change] = []
    for name in sorted({*lock, *coders}):
        forms = lock.get(name, [])
        if name not in coders:
            found.append(_gone(name, forms[-1]["version"] if forms else 1))
        elif not forms:
            found.append(Change(name, coders[name].version, False, "is new"))
        else:
            found += _of_type(coders[name], forms)
    return found


def _gone(name: str, version: int) -> Change:
    mend = "keep its class and name it in app.knows(...), or nobody can read what is stored"
    return Change(name, version, True, "has no class any more", mend)


def _of_type(code: Coder, forms: Sequence[Form]) -> Iterator[Change]:
    newest, now = forms[-1], form_of(code)
    if code.version < newest["version"]:
        said = f"was released as version {newest['version']} already"
        yield Change(code.type, code.version, True, said, f"version={newest['version']} or more: versions only ever grow")
        return
    if code.version > newest["version"]:
        yield Change(code.type, code.version, False, f"is new, after version {newest['version']}")
    yield from _marks(code, newest, now)
    for was in forms:
        yield from _same_version(code, was, now) if was["version"] == code.version else _older_version(code, was, now)


_WHY = {
    "key": "stored records keep the key they have, so that one key's order would be of two kinds",
    "tags": "stored records keep the tags they have, and decisions by tags would miss the others",
    "subject": "what is sealed with one person's key is not opened with another's",
    "personal": "stored records are sealed as they are: what was plain stays plain, what was sealed stays unread",
}


def _marks(code: Coder, was: Form, now: Form) -> Iterator[Change]:
    for mark in _MARKS:
        if was[mark] == now[mark] or _is_renamed(mark, was, now):
            continue
        said = f"{mark} was {_named(was[mark])}, is {_named(now[mark])}: {_WHY[mark]}"
        yield Change(code.type, code.version, True, said, "put it back, or make it an event with a name of its own")


def _is_renamed(mark: str, was: Form, now: Form) -> bool:
    """Whether the fields only have other names in a newer version: their values are the same. A tag's name is on the log."""
    old, new = was["schema"].get("properties", {}), now["schema"].get("properties", {})
    went, came = _names(was[mark]) - _names(now[mark]), _names(now[mark]) - _names(was[mark])
    moved = len(went) == len(came) and went <= old.keys() - new.keys() and came <= new.keys() - old.keys()
    return bool(mark != "tags" and now["version"] > was["version"] and moved)


def _names(mark: Any) -> set[str]:
    return set(mark if isinstance(mark, list) else [mark] if mark else [])


def _named(mark: Any) -> str:
    return ", ".join(sorted(_names(mark))) or "none"


_FINE = {"added", "optional", "default"}
_REMARKS = {"default": ": records stored without the field read as if it were that", "added": " and optional"}


def _same_version(code: Coder, was: Form, now: Form) -> Iterator[Change]:
    """One version is one form: who knows it reads what anybody wrote as it, so only optional fields may come."""
    for each in differences(was, now):
        if each.kind in _FINE:
            yield Change(code.type, code.version, False, f"{_field(each)} {each.said}{_REMARKS.get(each.kind, '')}")
            continue
        raised = f"version={code.version + 1} with {_steps(code.version + 1, code)}"
        mend = f"give it a default, or declare {raised}" if each.kind == "required" else f"put it back, or declare {raised}"
        yield Change(code.type, code.version, True, f"{_field(each)} {each.said}", mend)


def _older_version(code: Coder, was: Form, now: Form) -> Iterator[Change]:
    """What was stored as an older version: with steps that are functions anything goes; without, it has to read as it is."""
    steps = code.mark.upcasts[was["version"] - 1 :]
    if any(step is not None for step in steps):
        return
    wrong = {"required", "retyped"} if steps else {"required", "retyped", "removed"}  # None says: what is gone may be dropped
    for each in differences(was, now):
        if each.kind in wrong:
            says = "upcast= says None: it reads as it is" if steps else "there is no upcast="
            said = f"{_field(each)} {each.said} since version {was['version']}, and {says}"
            yield Change(code.type, code.version, True, said, f"add {_steps(code.version, code)}")


def _steps(version: int, code: Coder) -> str:
    there = code.mark.upcasts
    steps = [f"{n}: {'None' if n <= len(there) and there[n - 1] is None else '...'}" for n in range(1, version)]
    return f"upcast={{{', '.join(steps)}}}, functions from one version's data to the next one's"


def _field(difference: Difference) -> str:
    return f"field {difference.field!r}" if difference.field else "the whole"
