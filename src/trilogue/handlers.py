"""From a plain function to a Subscription: what it reads, how it is called, what its answer means.

    async def badge(e: Watched) -> BadgeWon | None        runs on the loop; what it returns is published
    def resize(e: Uploaded, ctx: Context) -> None         runs in a thread
    def count(e: Watched, db: Db) -> None                 runs in the settlement's savepoint: its effect happens exactly once
    def load(es: list[Watched], db: Db) -> list[Failed]   many at once, each may fail alone
    def audit(r: Record) -> None                          with a pattern: whatever it is, as it is

The annotation of the first parameter says which events; nothing is guessed from names, except `db` and `ctx`.
"""

import difflib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trilogue.codec import Coder, Keys, coder
from trilogue.durations import Duration, microseconds
from trilogue.errors import BadOption, TwiceNamed, UnknownEvent, Unsupported
from trilogue.events import Group, Record, is_event
from trilogue.patterns import check_pattern, matches
from trilogue.ports import Db
from trilogue.retry import Retry

NAME_CHARS = 255
CONCURRENCY = 16
BATCH = 100
MOST_CONCURRENCY = 1_000
MOST_BATCH = 1_000
Kind = Literal["async", "thread", "db"]


class Context:
    """What a handler may know besides its event: `ctx: Context`.

    record: the Record. attempt: from 1. replay: whether this is a replay, so that what it emits stays off the log.
    """

    __slots__ = ("attempt", "emitted", "record", "replay")

    def __init__(self, record: Record, attempt: int, replay: bool) -> None:
        self.record, self.attempt, self.replay = record, attempt, replay
        self.emitted: list[object] = []

    def publish(self, *events: object) -> None:
        """Publish with the settlement: exactly when, and only if, this handler's work is done."""
        self.emitted.extend(events)


@dataclass(frozen=True, slots=True)
class Effect:
    """What an async handler returns to write into the database with its settlement.

    write: called with the database, inside a savepoint. Compute and wait before; this is for the writing alone.
    """

    write: Callable[[Db], object]


@dataclass(frozen=True, slots=True)
class Failed:
    """One event of a batch that failed. item: the event itself, or its index. error: why."""

    item: object
    error: BaseException | str


@dataclass(frozen=True, slots=True)
class Subscription:
    """A Group, its handler and the policy around it.

    whole: it is replayed in place from the beginning only, because its reset also empties what earlier records made.
    """

    group: Group
    handler: Callable[..., Any]
    kind: Kind
    coders: dict[str, Coder] = field(repr=False)
    takes_ctx: bool
    batch: int | None
    retry: Retry
    concurrency: int
    timeout_us: int | None
    park: bool
    db_limit_us: int
    reset: Callable[[Db], None] | None
    keys: Keys | None = None
    whole: bool = False

    def decode(self, record: Record) -> Any:
        """The event in a record, or the record itself for a handler of patterns; raises DecodeError."""
        code = self.coders.get(record.type)
        return record if code is None else code.read(record, self.keys)


def subscription(
    handler: Callable[..., Any],
    pattern: str | None = None,
    *,
    app: str = "trilogue",
    group: str | None = None,
    order: Literal["key"] | None = "key",
    retry: Retry | None = None,
    concurrency: int = CONCURRENCY,
    timeout: Duration | None = None,
    on_dead: Literal["skip", "park"] = "skip",
    batch: int | None = None,
    start: Literal["now", "beginning"] = "now",
    reset: Callable[[Db], None] | None = None,
    db_limit: Duration = "250ms",
) -> Subscription:
    """Read a handler's signature; raises a WiringError that names the handler and the mend."""
    name = _qualified(handler)
    parameters, hints = _signature(handler, name)
    takes_db, takes_ctx = "db" in parameters[1:], "ctx" in parameters[1:]
    annotation = hints.get(parameters[0], Record)
    is_list = get_origin(annotation) in (list, Sequence, typing.Sequence)
    coders = _coders(get_args(annotation)[0] if is_list else annotation, name)
    kind = _kind(handler, takes_db, name)
    patterns = _patterns(pattern, coders, name)
    _check(name, kind, timeout, batch, is_list, takes_ctx, concurrency, order, on_dead, start)
    _check_policy(name, retry, reset, {"timeout": timeout, "db_limit": db_limit})
    group_name = name if group is None else group
    if not isinstance(group_name, str) or not 0 < len(group_name) <= NAME_CHARS or not group_name.isprintable():
        raise BadOption(f"group {group_name!r} of {name}: expected 1 to {NAME_CHARS} printable characters")
    return Subscription(
        group=Group(group_name, patterns, order == "key", start, has_effects=takes_db, app=app),
        handler=handler,
        kind=kind,
        coders=coders,
        takes_ctx=takes_ctx,
        batch=(batch or BATCH) if is_list else None,
        retry=retry or Retry(),
        concurrency=concurrency,
        timeout_us=None if timeout is None else microseconds(timeout),
        park=on_dead == "park",
        db_limit_us=microseconds(db_limit),
        reset=reset,
    )


_OPTIONS = inspect.signature(subscription).parameters.keys() - {"handler", "pattern", "app"}


def check_options(options: dict[str, Any]) -> None:
    """Raise BadOption for what subscription() does not take, so that a slip is seen where it is written."""
    for name in options.keys() - _OPTIONS:
        near = difflib.get_close_matches(name, _OPTIONS, 1)
        hint = f"did you mean {near[0]}=?" if near else f"there are {', '.join(sorted(_OPTIONS))}"
        raise BadOption(f"@app.on has no option {name!r}: {hint}")


def _qualified(handler: Callable[..., Any]) -> str:
    module = getattr(handler, "__module__", "") or ""
    if module == "__main__":
        # A script run directly and the same file imported must read with the same group.
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "main").stem
    name = getattr(handler, "__qualname__", None) or type(handler).__qualname__
    return f"{module}.{name}".replace("<locals>.", "")


def _signature(handler: Callable[..., Any], name: str) -> tuple[list[str], dict[str, Any]]:
    if not inspect.isroutine(handler):
        raise UnknownEvent(f"handler {name} is no function: write @app.on above a function, or use app.on(service.method)")
    try:
        signature = inspect.signature(handler)
        hints = get_type_hints(handler)
    except (TypeError, ValueError, NameError, AttributeError) as error:
        raise UnknownEvent(f"the annotations of handler {name} cannot be read: {error}") from error
    parameters = list(signature.parameters)
    unknown = [p for p in parameters[1:] if p not in ("db", "ctx")]
    if not parameters or unknown:
        got = f"also takes {', '.join(unknown)}" if parameters else "takes nothing"
        raise UnknownEvent(f"handler {name} {got}: expected the event first, then at most `db: Db` and `ctx: Context`")
    try:
        signature.bind(None, **dict.fromkeys(parameters[1:]))
    except TypeError as error:
        raise UnknownEvent(f"handler {name} cannot be called as (event, db=, ctx=): {error}") from error
    return parameters, hints


def _coders(annotation: Any, name: str) -> dict[str, Coder]:
    """The coders of the annotated classes, by type name; empty for Record."""
    classes = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if classes == (Record,):
        return {}
    found: dict[str, Coder] = {}
    for cls in classes:
        if not is_event(cls):
            raise UnknownEvent(f"handler {name} takes {cls!r}, which is no event: put @event('some.type') above the class")
        code = coder(cls)
        if code.type in found:
            raise TwiceNamed(f"handler {name} takes two classes that are both event {code.type!r}: keep one of them")
        found[code.type] = code
    return found


def _patterns(pattern: str | None, coders: dict[str, Coder], name: str) -> tuple[str, ...]:
    if pattern is None:
        if not coders:
            raise UnknownEvent(
                f"handler {name} says neither events nor a pattern: annotate its parameter, or use @app.on('some.*')"
            )
        return tuple(sorted(coders))
    check_pattern(pattern)
    if not coders:
        return (pattern,)
    both = tuple(sorted(known for known in coders if matches(pattern, known)))
    if not both:
        raise UnknownEvent(f"handler {name}: pattern {pattern!r} matches none of its events ({', '.join(sorted(coders))})")
    return both


def _check_policy(name: str, retry: Retry | None, reset: Callable[[Db], None] | None, limits: dict[str, Duration | None]) -> None:
    if retry is not None and not isinstance(retry, Retry):
        raise BadOption(f"handler {name} has retry={retry!r}: expected Retry(5, '1s..5m')")
    if reset is not None and not callable(reset):
        raise BadOption(f"handler {name} has reset={reset!r}: expected a function that takes the database")
    for option, limit in limits.items():
        if limit is not None and microseconds(limit) == 0:
            raise BadOption(f"handler {name} has {option}={limit!r}: nothing is done in no time; expected a duration, as '5s'")


def _kind(handler: Callable[..., Any], takes_db: bool, name: str) -> Kind:
    is_async = inspect.iscoroutinefunction(handler) or inspect.isasyncgenfunction(handler)
    if takes_db and is_async:
        raise Unsupported(
            f"handler {name} takes `db` and is async: the writer cannot wait. Make it a plain function, or return "
            "Effect(lambda db: ...) from an async one"
        )
    return "db" if takes_db else "async" if is_async else "thread"


def _check(
    name: str,
    kind: Kind,
    timeout: Duration | None,
    batch: int | None,
    is_list: bool,
    takes_ctx: bool,
    concurrency: int,
    order: str | None,
    on_dead: str,
    start: str,
) -> None:
    if timeout is not None and kind != "async":
        raise Unsupported(
            f"handler {name} has a timeout but is not async: a thread cannot be stopped. Make it async, or drop timeout="
        )
    if batch is not None and not is_list:
        raise BadOption(f"handler {name} has batch={batch} but takes one event: annotate its parameter as list[...]")
    for option, number, most in (("batch", batch, MOST_BATCH), ("concurrency", concurrency, MOST_CONCURRENCY)):
        if number is not None and (type(number) is not int or not 1 <= number <= most):
            raise BadOption(f"handler {name} has {option}={number!r}: expected 1 to {most}")
    if is_list and takes_ctx:
        raise BadOption(f"handler {name} takes a batch and ctx: a context belongs to one event; take list[Record] instead")
    for option, value, allowed in (
        ("order", order, ("key", None)),
        ("on_dead", on_dead, ("skip", "park")),
        ("start", start, ("now", "beginning")),
    ):
        if value not in allowed:
            raise BadOption(f"handler {name} has {option}={value!r}: expected {' or '.join(map(repr, allowed))}")
