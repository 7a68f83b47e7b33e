"""What an app knows, the form of its events, and what counts as a change of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, make_dataclass
from datetime import datetime, time
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilogue import Aggregate, App, Db, Decider, Decision, Record, Router, TwiceNamed, UnknownEvent, event
from trilogue.codec import coder
from trilogue.schema.changes import changes, differences, lock_text, read_lock, updated
from trilogue.schema.forms import fields_of, form_of
from trilogue.schema.known import known

# ── what an app knows ────────────────────────────────────────────────────────────────────────────────────────────────


def named(type: str, **options: Any) -> Any:
    """An event class of one field."""
    return event(type, **options)(make_dataclass(type.replace(".", "_"), [("n", int)], frozen=True))


Opened, Closed, Told, Asked, Kept = (named(name) for name in ("a.opened", "a.closed", "a.told", "a.asked", "a.kept"))


class Account(Aggregate, stream="account-{id}"):
    def apply(self, e: Opened | Closed) -> None:
        return


def evolve(state: int, e: Opened) -> int:
    return state


class Enrol(Decision):
    def apply(self, e: Opened) -> None:
        return

    def decide(self) -> Closed | None:
        return None


def test_an_app_knows_what_its_handlers_take() -> None:
    app = App("memory://")

    @app.on
    async def one(e: Opened | Closed) -> None: ...

    @app.on(batch=5)
    def many(es: list[Told], db: Db) -> None: ...

    @app.on("a.*")
    async def raw(r: Record) -> None: ...

    assert list(known(app)) == ["a.closed", "a.opened", "a.told"]


def returning(annotation: Any) -> App:
    app = App("memory://")

    async def handle(e: Opened) -> None: ...

    handle.__annotations__["return"] = annotation
    app.on(handle)
    return app


@pytest.mark.parametrize(
    "annotation", [Told, Told | None, list[Told], AsyncIterator[Told], Iterator[Told | Asked], "Told", list[list[Told]]]
)
def test_an_app_knows_what_its_handlers_return(annotation: Any) -> None:
    assert "a.told" in known(returning(annotation))


@pytest.mark.parametrize("annotation", [None, int, "list[int]"])
def test_what_is_no_event_is_passed_over(annotation: Any) -> None:
    assert list(known(returning(annotation))) == ["a.opened"]


@pytest.mark.parametrize(
    ("model", "types"),
    [
        (Kept, ["a.kept"]),
        (Account, ["a.closed", "a.opened"]),
        (Decider("x-{id}", 0, evolve), ["a.opened"]),
        (Enrol, ["a.closed", "a.opened"]),
    ],
)
def test_an_app_knows_what_it_is_told(model: Any, types: list[str]) -> None:
    app, router = App("memory://"), Router()
    router.knows(model)
    app.include(router)
    assert list(app.known) == types


def test_what_cannot_be_known_is_refused_at_once() -> None:
    app = App("memory://")
    with pytest.raises(UnknownEvent, match="is no Aggregate"):
        app.knows(Kept, int)
    assert app.models == []


def test_decode_uses_all_that_is_known_and_learns() -> None:
    app = App("memory://")
    record = App("memory://").envelope(Kept(1))
    with pytest.raises(UnknownEvent, match=r"app\.knows"):
        app.decode(record)
    app.knows(Kept)
    assert app.decode(record) == Kept(1)


def test_two_classes_of_one_version_have_to_look_the_same() -> None:
    app = App("memory://")
    app.knows(event("a.same")(make_dataclass("One", [("n", int)])), event("a.same")(make_dataclass("Two", [("n", int)])))
    assert list(app.known) == ["a.same"]
    app.knows(event("a.same")(make_dataclass("Three", [("n", str)])))
    with pytest.raises(TwiceNamed, match=r"'a\.same' version 1 is two classes that differ: .*One and .*Three"):
        _ = app.known


def test_two_classes_that_differ_in_their_key_are_told_apart() -> None:
    app = App("memory://")
    app.knows(named("a.same"), named("a.same", key="n"))
    with pytest.raises(TwiceNamed):
        _ = app.known


def test_the_newest_version_counts() -> None:
    app = App("memory://")
    newer = named("a.same", version=2, upcast={1: None})
    app.knows(named("a.same"), newer, named("a.same"))
    assert app.known["a.same"].cls is newer


# ── forms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag=True):
    name: str


@dataclass
class Tree:
    """A class that holds itself."""

    value: int
    below: "list[Tree]" = field(default_factory=list)


class Model(pydantic.BaseModel):
    """Nested, with one that holds itself."""

    amount: Decimal
    below: "list[Model]" = []


@event("a.everything", key="name", tags=("name",))
@dataclass
class Everything:
    """Some prose."""

    name: str
    tree: Tree
    other: Tree
    pet: Cat | Dog
    model: Model
    colour: Colour = Colour.RED
    at: datetime | None = None
    times: dict[str, time] = field(default_factory=dict)
    ids: tuple[UUID, ...] = ()
    price: Decimal = Decimal("1.5")


@event("a.model", key="name")
class EverythingModel(pydantic.BaseModel):
    """Some prose."""

    name: str = pydantic.Field(alias="called", description="more prose")
    model: Model
    colour: Colour = Colour.RED
    amount: Decimal = Decimal(1)
    not_json: Any = pydantic.Field(default_factory=dict)


@pytest.mark.parametrize("cls", [Everything, EverythingModel])
def test_a_form_has_no_names_of_ours(cls: type) -> None:
    text = msgspec.json.encode(form_of(coder(cls))).decode()
    for name in ("Everything", "Tree", "Model", "Colour", "prose", "title", "test_schema"):
        assert name not in text


def test_a_form_says_what_is_promised() -> None:
    form = form_of(coder(Everything))
    assert (form["version"], form["key"], form["tags"], form["subject"], form["personal"]) == (1, "name", ["name"], None, [])
    assert form["schema"]["required"] == ["model", "name", "other", "pet", "tree"]
    assert form["schema"]["properties"]["at"]["format"] == "date-time"
    assert form["schema"]["properties"]["times"]["format"] == "time"
    assert fields_of(form)[:3] == ["at?", "colour?", "ids?"]
    assert "called" in form_of(coder(EverythingModel))["schema"]["properties"]


@pytest.mark.parametrize("cls", [Everything, EverythingModel])
def test_a_form_does_not_differ_from_itself(cls: type) -> None:
    form = form_of(coder(cls))
    again = msgspec.json.decode(msgspec.json.encode(form))
    assert differences(form, again) == []


class Frozen(pydantic.BaseModel, frozen=True):
    n: int = 1


def test_a_default_that_cannot_be_written_down_is_said() -> None:
    cls = event("a.default")(make_dataclass("Odd", [("f", Frozen, Frozen())]))
    with pytest.raises(UnknownEvent, match=r"Odd has no schema: .* field\(default_factory"):
        form_of(coder(cls))


# ── differences ──────────────────────────────────────────────────────────────────────────────────────────────────────


def form(*fields: Any, **options: Any) -> dict[str, Any]:
    return form_of(coder(event("a.b", **options)(make_dataclass("C", fields))))


def kinds(was: Any, now: Any) -> list[tuple[str, str]]:
    return [(each.field, each.kind) for each in differences(form(("f", was)), form(("f", now)))]


def nested(*fields: Any) -> Any:
    return make_dataclass("Nested", fields)


def listed(**fields: Any) -> Any:
    """A Struct that is written as a list."""
    return msgspec.defstruct("Listed", [(n, *t) if isinstance(t, tuple) else (n, t) for n, t in fields.items()], array_like=True)


INNER, MORE = nested(("a", int)), nested(("a", int), ("b", int, 1))
REQUIRED, OTHER, NONE = nested(("a", int), ("b", int)), nested(("a", str)), nested()


@pytest.mark.parametrize(
    ("was", "now", "found"),
    [
        (int, int, []),
        (int, str, [("f", "retyped")]),
        (str, datetime, [("f", "retyped")]),
        (str | None, datetime | None, [("f", "retyped")]),
        (list[str], list[datetime], [("f", "retyped")]),
        (str, UUID, [("f", "retyped")]),
        (Decimal, float, [("f", "retyped")]),
        (int, float, [("f", "widened")]),
        (float, int, [("f", "retyped")]),
        (int, int | None, [("f", "widened")]),
        (int | None, int, [("f", "retyped")]),
        (int | str, int | None, [("f", "retyped")]),
        (int, Any, [("f", "widened")]),
        (Any, int, [("f", "retyped")]),
        (int | None, Any, [("f", "widened")]),
        (INNER, Any, [("f", "widened")]),
        (Any, Any, []),
        (Literal["a"], Literal["a", "b"], [("f", "widened")]),
        (Literal["a", "b"], Literal["a"], [("f", "retyped")]),
        (tuple[int, str], tuple[int, str], []),
        (tuple[int, str], tuple[int, int], [("f.001", "retyped")]),
        (tuple[int, str], tuple[int], [("f.001", "removed"), ("f", "retyped")]),
        (listed(a=int), listed(a=int, b=(str, "")), [("f.001", "added")]),
        (listed(a=int), listed(a=int, b=str), [("f.001", "required")]),
        (listed(a=int), listed(a=str), [("f.000", "retyped")]),
        (list[int], list[str], [("f[]", "retyped")]),
        (list[int], int, [("f", "retyped")]),
        (dict[str, int], dict[str, str], [("f{}", "retyped")]),
        (dict[str, int], dict, [("f", "retyped")]),
        (dict, INNER, [("f", "retyped")]),
        (INNER, MORE, [("f.b", "added")]),
        (MORE, INNER, [("f.b", "removed")]),
        (INNER, REQUIRED, [("f.b", "required")]),
        (REQUIRED, MORE, [("f.b", "optional")]),
        (MORE, REQUIRED, [("f.b", "required")]),
        (INNER, OTHER, [("f.a", "retyped")]),
        (INNER, NONE, [("f.a", "removed")]),
        (list[INNER], list[MORE], [("f[].b", "added")]),
        (INNER | None, MORE | None, [("f.b", "added")]),
        (INNER | None, OTHER | None, [("f.a", "retyped")]),
        (Cat | Dog, Cat | Dog, []),
        (Cat | Dog, Dog | Cat, []),
        (Cat, Cat | Dog, [("f", "widened")]),
        (Cat | Dog, Dog, [("f", "retyped")]),
    ],
)
def test_what_differs(was: Any, now: Any, found: list[tuple[str, str]]) -> None:
    assert kinds(was, now) == found


def test_a_type_that_holds_itself_is_compared_once() -> None:
    @dataclass
    class Before:
        value: int
        below: "Before | None" = None

    @dataclass
    class After:
        value: str
        below: "After | None" = None

    for cls in (Before, After):
        cls.__annotations__["below"] = cls | None
    assert kinds(Before, Before) == []
    assert kinds(Before, After) == [("f.value", "retyped")]


TYPES = st.sampled_from([int, str, float, bool, datetime, Decimal, UUID, int | None, list[int], dict[str, str], INNER, Cat | Dog])
FIELDS = st.dictionaries(st.sampled_from("abcdef"), TYPES, min_size=1)


@given(FIELDS, st.sampled_from("xyz"), TYPES)
def test_an_optional_field_more_is_all_that_differs(fields: dict[str, Any], name: str, more: Any) -> None:
    was = form(*fields.items())
    assert [(d.field, d.kind) for d in differences(was, form(*fields.items(), (name, more | None, None)))] == [(name, "added")]
    assert [(d.field, d.kind) for d in differences(was, form(*fields.items(), (name, more)))] == [(name, "required")]
    assert [(d.field, d.kind) for d in differences(form(*fields.items(), (name, more)), was)] == [(name, "removed")]


@given(FIELDS, FIELDS)
def test_nothing_that_differs_is_missed(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert bool(differences(form(*one.items()), form(*other.items()))) == (one != other)


BUILTIN = st.sampled_from([int, str, bool, Decimal, UUID, int | None, list[int], dict[str, str], INNER])
CHANGES: dict[str, Callable[[Any], Any]] = {
    "stays": lambda kind: kind,
    "may be null": lambda kind: kind | None,
    "becomes a number": lambda kind: float if kind is int else kind,
    "becomes anything": lambda kind: Any,
    "goes": lambda kind: None,
}


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(BUILTIN, st.sampled_from(sorted(CHANGES))), min_size=1), st.data())
def test_what_is_said_to_be_readable_is(fields: dict[str, tuple[Any, str]], data: st.DataObject) -> None:
    was = event("a.b")(make_dataclass("Was", [(name, kind) for name, (kind, _) in fields.items()]))
    now = [(name, CHANGES[change](kind)) for name, (kind, change) in fields.items() if change != "goes"]
    new = event("a.b")(make_dataclass("Now", [*now, ("z", int, 7)]))
    kinds = {each.kind for each in differences(form_of(coder(was)), form_of(coder(new)))}
    assert kinds <= {"added", "widened", "removed"}
    stored = was(**{name: data.draw(st.from_type(kind)) for name, (kind, _) in fields.items()})
    assert coder(new).decode(coder(was).encode(stored)).z == 7


# ── releases ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def rename(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "b": data["a"]}


def declared(*fields: Any, **options: Any) -> dict[str, Any]:
    return {"a.b": coder(event("a.b", **options)(make_dataclass("C", fields)))}


A, A_TEXT, B, B_MAYBE = ("a", int), ("a", str), ("b", int), ("b", int, 0)
RELEASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("the same", declared(A), declared(A), ""),
    ("an optional field", declared(A), declared(A, B_MAYBE), "fine: field 'b' is new and optional"),
    ("a default", declared(A, B_MAYBE), declared(A, ("b", int, 7)), "fine: field 'b' default was 0, is 7: records stored"),
    ("required to optional", declared(A, B), declared(A, B_MAYBE), "fine: field 'b' is optional"),
    ("a required field", declared(A), declared(A, B), "field 'b' is new and required; give it a default, or declare version=2"),
    ("a removed field", declared(A, B), declared(A), "field 'b' is gone; put it back, or declare version=2 with upcast={1: ...}"),
    ("a retyped field", declared(A), declared(A_TEXT), "field 'a' was integer, is string; put it back"),
    ("a wider field", declared(A), declared(("a", int | None)), "field 'a' was integer, is integer or null; put it back"),
    ("no class any more", declared(A), {}, "has no class any more; keep its class and name it in app.knows"),
    ("a new type", {}, declared(A), "fine: is new"),
    ("raised with steps", declared(A), declared(B, version=2, upcast={1: rename}), "fine: is new, after version 1"),
    ("raised, the same", declared(A), declared(A, version=2), "fine: is new, after version 1"),
    ("raised without steps", declared(A), declared(B, version=2), "field 'a' is gone since version 1, and there is no upcast="),
    ("raised, retyped", declared(A), declared(A_TEXT, version=2), "there is no upcast=; add upcast={1: ...}, functions from"),
    ("raised with None", declared(A), declared(B, version=2, upcast={1: None}), "'b' is new and required since version 1, and"),
    ("None, a field less", declared(A, B), declared(A, version=2, upcast={1: None}), "fine: is new, after version 1"),
    ("None, a wider field", declared(A), declared(("a", float), version=2, upcast={1: None}), "fine: is new, after version 1"),
    ("lowered", declared(A, version=2), declared(A), "was released as version 2 already; version=2 or more"),
    ("another key", declared(A, B, key="a"), declared(A, B, key="b"), "key was a, is b: stored records keep the key"),
    ("no key", declared(A, key="a"), declared(A), "key was a, is none"),
    ("tags", declared(A), declared(A, tags=("a",)), "tags was none, is a: stored records keep the tags"),
    ("a renamed key", declared(A, key="a"), declared(B, key="b", version=2, upcast={1: rename}), "fine: is new, after version 1"),
    (
        "a renamed tag",
        declared(A, tags=("a",)),
        declared(B, tags=("b",), version=2, upcast={1: rename}),
        "tags was a, is b: stored records keep the tags",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("was", "now", "said"), [case[1:] for case in RELEASES], ids=[case[0] for case in RELEASES])
def test_a_release_against_the_lock(was: dict[str, Any], now: dict[str, Any], said: str) -> None:
    lock = updated({}, was)
    found = [f"{'' if change.breaking else 'fine: '}{change.said}; {change.mend}" for change in changes(lock, now)]
    breaking = [each for each in found if not each.startswith("fine: ")]
    assert bool(breaking) == (bool(said) and not said.startswith("fine: "))
    assert bool(found) == bool(said)
    assert any(said.removeprefix("fine: ") in each for each in found or [""])


def test_personal_data_does_not_change_hands() -> None:
    fields = (("who", str), ("mail", str), ("phone", str))
    was = updated({}, declared(*fields, subject="who", personal=("mail",)))
    more = declared(*fields, subject="who", personal=("mail", "phone"))
    assert [change.breaking for change in changes(was, more)] == [True]
    assert "personal was mail, is mail, phone" in str(changes(was, more)[0])
    plain = declared(*fields)
    assert len([change for change in changes(was, plain) if change.breaking]) == 2


def test_every_released_version_is_kept_and_still_has_to_be_read() -> None:
    lock = updated(updated({}, declared(A)), declared(B, version=2, upcast={1: rename}))
    assert [form["version"] for form in lock["a.b"]] == [1, 2]
    third = declared(("c", int), version=3, upcast={1: rename, 2: None})
    said = [str(change) for change in changes(lock, third) if change.breaking]
    assert said == [
        "a.b version 3: field 'c' is new and required since version 2, and upcast= says None: it reads as it is; "
        "add upcast={1: ..., 2: None}, functions from one version's data to the next one's"
    ]
    forgotten = declared(B, version=2)
    assert any("since version 1" in str(change) for change in changes(lock, forgotten) if change.breaking)


def test_the_lock_file_is_the_same_for_the_same_forms() -> None:
    lock = updated({}, {**declared(A), "z.z": coder(Everything)})
    text = lock_text(lock)
    assert lock_text(read_lock(text, "f")) == text
    assert read_lock(text, "f") == lock
    assert text.count(b"\n") > 50


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b'{"format":1}', b'{"format":1,"types":[]}', b'{"format":1,"types":{"a":[{}]}}', b"<<<<<<<",
     b'{"format":1,"types":{"a":[{"version":"x"}]}}', b'{"format":1,"types":{"a":3}}',
     b'{"format":1,"types":{"a":[{"version":1}]}}'],
)  # fmt: skip
def test_what_is_no_lock_file_is_said(text: bytes) -> None:
    with pytest.raises(Exception, match=r"^x\.json is no lock file: .* or make a new one with --update"):
        read_lock(text, "x.json")


def test_a_lock_file_of_a_later_release_is_said() -> None:
    with pytest.raises(Exception, match=r"x\.json has format 2: this release of trilogue knows 1"):
        read_lock(b'{"format":2,"types":{}}', "x.json")


# ── tolerant reading ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class AsDataclass:
    a: int
    b: str = "b"
    c: list[int] = field(default_factory=list)


class AsStruct(msgspec.Struct):
    a: int
    b: str = "b"
    c: list[int] = []


class AsModel(pydantic.BaseModel):
    a: int
    b: str = "b"
    c: list[int] = []


@pytest.mark.parametrize("cls", [AsDataclass, AsStruct, AsModel])
@given(
    more=st.dictionaries(st.text(max_size=5).filter(lambda n: n not in "abc"), st.integers() | st.text(max_size=3), max_size=3)
)
def test_unknown_fields_are_ignored_and_new_optional_ones_have_their_defaults(cls: Callable[..., Any], more: Any) -> None:
    code = coder(event("a.tolerant")(cls))
    assert code.decode(msgspec.json.encode({**more, "a": 1})) == cls(a=1, b="b", c=[])


# ── chains of upcasters ──────────────────────────────────────────────────────────────────────────────────────────────

STEPS = st.lists(st.none() | st.sampled_from("abcdef"), min_size=1, max_size=8)


@given(STEPS, st.data())
def test_a_chain_runs_from_the_stored_version_in_order_and_once(names: list[str | None], data: st.DataObject) -> None:
    """Each step adds its name to a trace; None adds nothing."""

    def step(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda fields: {"trace": [*fields["trace"], name]}

    upcast = {n: None if name is None else step(name) for n, name in enumerate(names, 1)}
    cls: Any = event("a.chain", version=len(names) + 1, upcast=upcast)(make_dataclass("Chain", [("trace", list[str])]))
    stored = data.draw(st.integers(1, len(names) + 1))
    made = msgspec.structs.replace(App("memory://").envelope(cls([])), schema_version=stored)
    assert coder(cls).read(made).trace == [name for name in names[stored - 1 :] if name is not None]


# ── at the start ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_class_that_cannot_be_read_is_refused_when_the_app_is_opened(file_url: str, tmp_path: Path) -> None:
    async def go() -> None:
        app = App(file_url)
        app.knows(named("a.bad", key="missing"))
        with pytest.raises(UnknownEvent, match="key 'missing' is no field"):
            async with app:
                pass

    asyncio.run(go())
    assert list(tmp_path.iterdir()) == []
