"""From a function to a Subscription: every form of handler there is, and every refusal with its mend."""

import functools
import re
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Union

import pytest

from trilogue import (
    App,
    BadOption,
    BadPattern,
    Context,
    Db,
    DecodeError,
    Effect,
    Envelope,
    Failed,
    Record,
    Retry,
    Router,
    TwiceNamed,
    UnknownEvent,
    Unsupported,
    WiringError,
    event,
)
from trilogue.handlers import BATCH, CONCURRENCY, subscription


@event("video.watched", key="user")
@dataclass(frozen=True)
class Watched:
    user: str


@event("video.stopped", key="user")
@dataclass(frozen=True)
class Stopped:
    user: str


@event("badge.won")
@dataclass(frozen=True)
class Won:
    badge: str


@event("video.watched")
@dataclass(frozen=True)
class WatchedToo:
    user: str


@dataclass
class NoEvent:
    x: int


# ── forms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def one(e: Watched) -> Won | None: ...
def plain(e: Watched) -> None: ...
def either(e: Watched | Stopped, ctx: Context) -> None: ...
def old_union(e: Union[Watched, Stopped]) -> None: ...  # noqa: UP007
def annotated(e: Annotated[Watched, "told"]) -> None: ...
def in_text(e: "Watched") -> None: ...
def with_db(e: Watched, db: Db, ctx: Context) -> list[Won]: ...
def ctx_first(e: Watched, ctx: Context, db: Db) -> None: ...
def by_name_only(e: Watched, *, db: Db, ctx: Context) -> None: ...
def unannotated_extras(e: Watched, db, ctx): ...  # type: ignore[no-untyped-def]
def many(es: list[Watched], db: Db) -> list[Failed]: ...
async def many_either(es: Sequence[Watched | Stopped]) -> None: ...
def many_old(es: typing.List[Watched]) -> None: ...  # noqa: UP006
def raw(r: Record) -> None: ...
def raw_too(r): ...  # type: ignore[no-untyped-def]
def raw_many(rs: list[Record]) -> None: ...
async def yielding(e: Watched) -> AsyncIterator[Won]:
    yield Won("x")


def yielding_plain(e: Watched) -> Iterator[Won]:
    yield Won("x")


async def effect(e: Watched) -> tuple[Won, Effect]: ...  # type: ignore[empty-body]


@functools.wraps(one)
async def wrapped(*args: Any, **kwargs: Any) -> Any: ...


class Service:
    async def handle(self, e: Watched) -> None: ...
    @staticmethod
    def still(e: Watched) -> None: ...
    @classmethod
    def of_class(cls, e: Watched) -> None: ...


BOTH = ("video.stopped", "video.watched")


@pytest.mark.parametrize(
    ("handler", "pattern", "kind", "patterns", "batch", "takes_ctx"),
    [
        (one, None, "async", ("video.watched",), None, False),
        (plain, None, "thread", ("video.watched",), None, False),
        (either, None, "thread", BOTH, None, True),
        (old_union, None, "thread", BOTH, None, False),
        (annotated, None, "thread", ("video.watched",), None, False),
        (in_text, None, "thread", ("video.watched",), None, False),
        (with_db, None, "db", ("video.watched",), None, True),
        (ctx_first, None, "db", ("video.watched",), None, True),
        (by_name_only, None, "db", ("video.watched",), None, True),
        (unannotated_extras, None, "db", ("video.watched",), None, True),
        (many, None, "db", ("video.watched",), BATCH, False),
        (many_either, None, "async", BOTH, BATCH, False),
        (many_old, None, "thread", ("video.watched",), BATCH, False),
        (raw, "video.*", "thread", ("video.*",), None, False),
        (raw, "#", "thread", ("#",), None, False),
        (raw_too, "a.b", "thread", ("a.b",), None, False),
        (lambda r: None, "a.b", "thread", ("a.b",), None, False),
        (raw_many, "video.#", "thread", ("video.#",), BATCH, False),
        (either, "video.w*".replace("w*", "*"), "thread", BOTH, None, True),
        (either, "*.stopped", "thread", ("video.stopped",), None, True),
        (either, "video.watched", "thread", ("video.watched",), None, True),
        (yielding, None, "async", ("video.watched",), None, False),
        (yielding_plain, None, "thread", ("video.watched",), None, False),
        (effect, None, "async", ("video.watched",), None, False),
        (wrapped, None, "async", ("video.watched",), None, False),
        (Service().handle, None, "async", ("video.watched",), None, False),
        (Service.still, None, "thread", ("video.watched",), None, False),
        (Service.of_class, None, "thread", ("video.watched",), None, False),
    ],
)
def test_forms(
    handler: Callable[..., Any], pattern: str | None, kind: str, patterns: tuple[str, ...], batch: int | None, takes_ctx: bool
) -> None:
    sub = subscription(handler, pattern)
    assert (sub.kind, sub.group.patterns, sub.batch, sub.takes_ctx) == (kind, patterns, batch, takes_ctx)
    assert sub.group.has_effects == (kind == "db")
    assert sub.handler == handler


def test_defaults() -> None:
    sub = subscription(one, app="video")
    assert sub.group.name == f"{__name__}.one"
    assert (sub.group.ordered, sub.group.start, sub.group.app) == (True, "now", "video")
    assert (sub.concurrency, sub.timeout_us, sub.park, sub.db_limit_us) == (CONCURRENCY, None, False, 250_000)
    assert (sub.retry.attempts, sub.retry.first_us, sub.reset) == (5, 1_000_000, None)


def test_every_option_arrives() -> None:
    def reset(db: Db) -> None: ...

    retry = Retry(3, "1s")
    sub = subscription(
        many, "video.*", group="g", order=None, retry=retry, concurrency=64, on_dead="park", batch=500, start="beginning",
        reset=reset, db_limit=timedelta(seconds=1),
    )  # fmt: skip
    assert (sub.group.name, sub.group.ordered, sub.group.start, sub.retry, sub.concurrency) == (
        "g",
        False,
        "beginning",
        retry,
        64,
    )
    assert (sub.park, sub.batch, sub.reset, sub.db_limit_us) == (True, 500, reset, 1_000_000)
    assert subscription(one, timeout="30s").timeout_us == 30_000_000


def test_groups_are_named_after_their_function() -> None:
    async def inner(e: Watched) -> None: ...

    assert subscription(inner).group.name == f"{__name__}.test_groups_are_named_after_their_function.inner"
    assert subscription(Service().handle).group.name == f"{__name__}.Service.handle"


def test_a_script_and_its_import_are_the_same_group(monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    main.__file__ = "/somewhere/video.py"
    main.Watched = Watched  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "__main__", main)

    async def handle(e: Watched) -> None: ...

    handle.__module__, handle.__qualname__ = "__main__", "handle"
    assert subscription(handle).group.name == "video.handle"


def test_what_is_read_is_decoded_by_its_type() -> None:
    sub = subscription(either)
    assert sub.decode(Record("i", "video.watched", b'{"user":"u"}')) == Watched("u")
    assert sub.decode(Record("i", "video.stopped", b'{"user":"u"}')) == Stopped("u")
    with pytest.raises(DecodeError):
        sub.decode(Record("i", "video.stopped", b"{}"))
    record = Record("i", "video.stopped", b"\xff")
    assert subscription(raw, "#").decode(record) is record


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def nothing() -> None: ...
def too_many(e: Watched, user: str) -> None: ...
def defaulted(e: Watched, tries: int = 3) -> None: ...
def other_name(e: Watched, database: Db) -> None: ...
def stars(*es: Watched) -> None: ...
def stars_too(e: Watched, **more: Any) -> None: ...
def no_position(*, e: Watched) -> None: ...
def slash(e: Watched, db: Db, /) -> None: ...
def unknown_name(e: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821
def no_event(e: NoEvent) -> None: ...
def text(e: str) -> None: ...
def maybe(e: Watched | None) -> None: ...
def mixed(e: Watched | Record) -> None: ...
def twins(e: Watched | WatchedToo) -> None: ...
def a_tuple(es: tuple[Watched, ...]) -> None: ...
def bare_list(es: list) -> None: ...  # type: ignore[type-arg]
def an_instance(e: Watched("u")) -> None: ...  # type: ignore[valid-type]
async def async_db(e: Watched, db: Db) -> None: ...
async def async_yield_db(e: Watched, db: Db) -> AsyncIterator[Won]:
    yield Won("x")


def batch_ctx(es: list[Watched], ctx: Context) -> None: ...


class Callable_:  # noqa: N801
    def __call__(self, e: Watched) -> None: ...


@pytest.mark.parametrize(
    ("handler", "pattern", "options", "error", "sentence"),
    [
        (nothing, None, {}, UnknownEvent, "nothing takes nothing: expected the event first"),
        (too_many, None, {}, UnknownEvent, "too_many also takes user: expected the event first, then at most `db: Db`"),
        (defaulted, None, {}, UnknownEvent, "also takes tries"),
        (other_name, None, {}, UnknownEvent, "also takes database: expected .* `db: Db`"),
        (stars_too, None, {}, UnknownEvent, "also takes more"),
        (no_position, None, {}, UnknownEvent, r"cannot be called as \(event, db=, ctx=\)"),
        (slash, None, {}, UnknownEvent, r"cannot be called as \(event, db=, ctx=\)"),
        (unknown_name, None, {}, UnknownEvent, "annotations of handler .*unknown_name cannot be read: name 'Nowhere'"),
        (no_event, None, {}, UnknownEvent, r"NoEvent'>, which is no event: put @event\('some.type'\) above the class"),
        (text, None, {}, UnknownEvent, "which is no event"),
        (maybe, None, {}, UnknownEvent, "NoneType'>, which is no event"),
        (mixed, None, {}, UnknownEvent, "Record'>, which is no event"),
        (a_tuple, None, {}, UnknownEvent, "which is no event"),
        (bare_list, None, {}, UnknownEvent, "which is no event"),
        (an_instance, None, {}, UnknownEvent, "cannot be read|is no event"),
        (twins, None, {}, TwiceNamed, "two classes that are both event 'video.watched'"),
        (raw, None, {}, UnknownEvent, "neither events nor a pattern: annotate its parameter, or use"),
        (raw_too, None, {}, UnknownEvent, "neither events nor a pattern"),
        (one, "badge.*", {}, UnknownEvent, r"pattern 'badge\.\*' matches none of its events \(video\.watched\)"),
        (one, "video.[", {}, BadPattern, "is not understood"),
        (one, "", {}, BadPattern, "is not understood"),
        (one, 5, {}, BadPattern, "is not understood"),
        (Callable_(), None, {}, UnknownEvent, r"is no function: .* app.on\(service.method\)"),
        (functools.partial(too_many, user="u"), None, {}, UnknownEvent, "is no function"),
        (Watched, None, {}, UnknownEvent, "is no function"),
        (async_db, None, {}, Unsupported, r"takes `db` and is async: .* Effect\(lambda db: ...\)"),
        (async_yield_db, None, {}, Unsupported, "takes `db` and is async"),
        (batch_ctx, None, {}, BadOption, r"takes a batch and ctx: .* list\[Record\]"),
        (plain, None, {"timeout": "5s"}, Unsupported, "has a timeout but is not async"),
        (with_db, None, {"timeout": "5s"}, Unsupported, "has a timeout but is not async"),
        (one, None, {"timeout": "0s"}, BadOption, "timeout='0s': nothing is done in no time"),
        (one, None, {"timeout": "soon"}, BadOption, "'soon' is not understood"),
        (with_db, None, {"db_limit": 0}, BadOption, "db_limit=0: nothing is done in no time"),
        (one, None, {"batch": 5}, BadOption, r"batch=5 but takes one event: annotate its parameter as list\[...\]"),
        (many, None, {"batch": 0}, BadOption, "batch=0: expected 1 to 1000"),
        (many, None, {"batch": 1001}, BadOption, "expected 1 to 1000"),
        (many, None, {"batch": "5"}, BadOption, "batch='5': expected 1 to 1000"),
        (one, None, {"concurrency": 0}, BadOption, "concurrency=0: expected 1 to 1000"),
        (one, None, {"concurrency": 2.5}, BadOption, "concurrency=2.5: expected 1 to 1000"),
        (one, None, {"order": "user"}, BadOption, "order='user': expected 'key' or None"),
        (one, None, {"on_dead": "stop"}, BadOption, "on_dead='stop': expected 'skip' or 'park'"),
        (one, None, {"start": "yesterday"}, BadOption, "start='yesterday': expected 'now' or 'beginning'"),
        (one, None, {"retry": 5}, BadOption, r"retry=5: expected Retry\(5, '1s..5m'\)"),
        (one, None, {"reset": "drop"}, BadOption, "reset='drop': expected a function"),
        (one, None, {"group": ""}, BadOption, "group '' of .*one: expected 1 to 255 printable characters"),
        (one, None, {"group": "x" * 256}, BadOption, "expected 1 to 255"),
        (one, None, {"group": "a\nb"}, BadOption, "printable"),
        (one, None, {"group": 5}, BadOption, "expected 1 to 255"),
    ],
)
def test_refusals(handler: Callable[..., Any], pattern: Any, options: dict[str, Any], error: type, sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        subscription(handler, pattern, **options)
    assert isinstance(caught.value, WiringError)
    assert "\n" not in str(caught.value) or "group" in options


def test_refusals_name_the_handler() -> None:
    with pytest.raises(UnknownEvent, match=re.escape(f"{__name__}.no_event")):
        subscription(no_event)


# ── @app.on ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_on_returns_the_function_untouched() -> None:
    app = App("memory://")
    assert app.on(one) is one
    assert app.on("video.*", group="g")(one) is one
    assert app.on()(plain) is plain
    assert app.on(group="h")(plain) is plain
    handle = Service().handle
    assert app.on(handle) == handle
    assert [s.group.name for s in app.subscriptions] == [
        f"{__name__}.one", "g", f"{__name__}.plain", "h", f"{__name__}.Service.handle"
    ]  # fmt: skip


def test_two_handlers_of_one_name_are_refused() -> None:
    app = App("memory://")
    app.on(Service().handle)
    app.on(Service().handle)
    with pytest.raises(TwiceNamed, match=r"Service.handle': give each its own name with group="):
        _ = app.subscriptions


def test_a_router_is_included_and_one_twice_is_refused() -> None:
    router = Router()
    router.on(group="r")(one)

    @router.setup
    def tables(db: Db) -> None: ...

    app = App("memory://", name="n")
    app.include(router)
    assert [(s.group.name, s.group.app) for s in app.subscriptions] == [("r", "n")]
    assert app.setups == [tables]
    app.include(router)
    with pytest.raises(TwiceNamed):
        _ = app.subscriptions


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"grup": "g"}, "no option 'grup': did you mean group=?"),
        ({"zzz": 1}, "no option 'zzz': there are batch, concurrency, "),
        ({"app": "x"}, "no option 'app'"),
    ],
)
def test_a_slip_in_an_option_is_seen_where_it_is_written(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadOption, match=sentence):
        App("memory://").on("#", **options)


def test_naming_the_event_in_the_brackets_is_refused_with_the_mend() -> None:
    with pytest.raises(UnknownEvent, match=r"on\(Watched\): write @app.on alone; the annotation of the parameter says"):
        App("memory://").on(Watched)


# ── what handlers are given ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_context_collects_what_is_published() -> None:
    record = Record("i", "t", b"")
    ctx = Context(record, 2, replay=True)
    ctx.publish(Won("a"), Won("b"))
    ctx.publish(Won("c"))
    assert (ctx.record, ctx.attempt, ctx.replay) == (record, 2, True)
    assert ctx.emitted == [Won("a"), Won("b"), Won("c")]


def test_an_envelope_is_no_record() -> None:
    assert not isinstance(Envelope("i", "t", b""), Record)
