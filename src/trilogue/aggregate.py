"""What a program decides with: pure folds and rules. No I/O, no clock, nothing async.

    events of account-7 ──apply──▶ Account(balance=50) ──withdraw(20)──▶ emits MoneyWithdrawn ──▶ appended at its version
    events of account-7 ──evolve─▶ State(50)           ──withdraw(20)──▶ returns MoneyWithdrawn     (Decider: the same, functions)
    events tagged course:c1 or student:s1 ──apply──▶ Enrol ──decide()──▶ returns Enrolled            (Decision: across streams)

The annotation of apply() or evolve() says which events it folds; others in the stream are passed over. What is emitted is
applied at once, so that there is one way an event changes the state, now and when it is read again.
"""

import copy
import dataclasses
import dis
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any, ClassVar, Generic, TypeVar, dataclass_transform

from trilogue.codec import Coder, Keys, coder
from trilogue.durations import Duration, microseconds
from trilogue.errors import BadOption, TwiceNamed, UnknownEvent
from trilogue.events import Envelope, is_event

S = TypeVar("S")
ID_CHARS = 255
MOST_DECIDED = 1_000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """When the state of a stream is kept, so that loading need not read it from the start.

    every: after so many events. slower_than: when loading took longer. version: raise it to discard all kept states; they are
    also discarded when apply() or the fields change. Never needed: without snapshots everything reads the same.
    Raises BadOption.

    >>> Snapshot(every=200, slower_than="20ms").every
    200
    """

    every: int | None = None
    slower_than: Duration | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if self.every is None and self.slower_than is None:
            raise BadOption("Snapshot() says neither every= nor slower_than=: give one of them, as Snapshot(every=200)")
        if self.every is not None and (type(self.every) is not int or self.every < 1):
            raise BadOption(f"Snapshot(every={self.every!r}): expected a number of events, from 1")

    def is_due(self, events: int, took_s: float) -> bool:
        """Whether to keep the state now: after `events` read beyond the last kept one, in `took_s` seconds."""
        if self.every is not None and events >= self.every:
            return True
        return self.slower_than is not None and events > 0 and took_s * 1_000_000 > microseconds(self.slower_than)


# ── a class per stream ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass_transform(field_specifiers=(field,))
@dataclass
class Aggregate:
    """A stream's state and its rules; a subclass is a dataclass by itself, with defaults for all its fields.

    >>> from trilogue import event
    >>> @event("deposited")
    ... @dataclass(frozen=True)
    ... class Deposited:
    ...     amount: int
    >>> class Account(Aggregate, stream="account-{id}"):
    ...     balance: int = 0
    ...     def deposit(self, amount: int) -> None:
    ...         self.emit(Deposited(amount))
    ...     def apply(self, e: Deposited) -> None:
    ...         self.balance += e.amount
    >>> account = Account("a1")
    >>> account.deposit(5)
    >>> account.balance, account.uncommitted
    (5, (Deposited(amount=5),))
    """

    id: str
    stream_pattern: ClassVar[str] = ""
    snapshot_policy: ClassVar[Snapshot | None] = None

    def __init_subclass__(cls, *, stream: str = "", snapshot: Snapshot | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.stream_pattern = _checked_pattern(stream or cls.stream_pattern, cls.__qualname__)
        cls.snapshot_policy = snapshot or cls.snapshot_policy
        dataclass(cls)

    @property
    def version(self) -> int:
        """The version of the stream it was loaded at or saved as; 0: nothing is stored yet."""
        version: int = self.__dict__.get("_version", 0)
        return version

    @property
    def uncommitted(self) -> tuple[Any, ...]:
        """The events emitted since it was loaded or saved."""
        return tuple(self.__dict__.get("_uncommitted", ()))

    def emit(self, event: object) -> None:
        """Record that something happened: it is applied now, and appended when the aggregate is saved."""
        cls: Any = type(self)
        if not reducer_of(cls).takes(event):
            raise UnknownEvent(
                f"{cls.__qualname__}.apply() does not take {type(event).__qualname__}: add it to the annotation of its parameter"
            )
        self.apply(event)  # type: ignore[attr-defined]
        self.__dict__.setdefault("_uncommitted", []).append(event)

    def mark_saved(self, version: int, events: int | None = None) -> None:
        """The first so many of its events (all of them if not given) are stored, and the stream has this version."""
        self.__dict__["_version"] = version
        left = [] if events is None else self.__dict__.get("_uncommitted", [])[events:]
        self.__dict__["_uncommitted"] = left


def _checked_pattern(pattern: str, name: str) -> str:
    if pattern.count("{id}") != 1 or pattern.count("{") != 1 or pattern.count("}") != 1:
        raise BadOption(f"{name}: stream {pattern!r} must hold {{id}} once, as stream='account-{{id}}'")
    return pattern


# ── functions per stream ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Decider(Generic[S]):
    """The same as functions: an initial state, and evolve(state, event) -> state; deciding functions are (state) -> events.

    stream: as "account-{id}". evolve: its second parameter is annotated with the events.

    >>> from trilogue import event
    >>> @event("counted")
    ... @dataclass(frozen=True)
    ... class Counted:
    ...     by: int
    >>> def evolve(total: int, e: Counted) -> int:
    ...     return total + e.by
    >>> counter = Decider("counter-{id}", 0, evolve)
    """

    stream: str
    initial: S
    evolve: Callable[[S, Any], S]
    snapshot: Snapshot | None = None

    def __post_init__(self) -> None:
        _checked_pattern(self.stream, f"Decider({self.evolve.__qualname__})")


# ── a decision across streams ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Boundary:
    """A part of what a decision reads: the records that carry all these tags, and are of one of these types if any are named."""

    tags: tuple[str, ...]
    types: tuple[str, ...] = ()


def tag(name: str, value: object) -> Boundary:
    """The records with one tag, as @event(tags=("course",)) gives it to them.

    >>> tag("course", "c1").tags
    ('course:c1',)
    """
    return Boundary((f"{name}:{value}",))


@dataclass_transform(field_specifiers=(field,))
@dataclass
class Decision:
    """A decision across streams: what it must know is its state, boundary() says where that is read.

    What it returns is appended only if nothing matching the boundary arrived since it was read. A subclass is a dataclass by
    itself and has boundary(), apply(self, e: A | B) and decide(), which returns an event, several, or none.
    The idea is the Dynamic Consistency Boundary: https://dcb.events/
    """

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        dataclass(cls)

    def boundary(self) -> Boundary | Sequence[Boundary]:
        """What is read, and guarded: one Boundary, or several of which each counts."""
        raise NotImplementedError(f"{type(self).__qualname__} needs boundary(): the tags of the events it depends on")

    def decide(self) -> Any:
        """An event, several, or None; raises what the rules say."""
        raise NotImplementedError(f"{type(self).__qualname__} needs decide(): the events that happen, or an error")


def boundaries(decision: Decision) -> tuple[Boundary, ...]:
    """The boundary of a decision as a list; raises BadOption for an empty one, which would guard nothing."""
    said = decision.boundary()
    found = (said,) if isinstance(said, Boundary) else tuple(said)
    if not found or not all(isinstance(each, Boundary) and each.tags for each in found):
        raise BadOption(f"{type(decision).__qualname__}.boundary() is {said!r}: expected tag('course', id), or a list of such")
    return found


# ── how a stream becomes a state ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Reducer:
    """How events become a state: of an Aggregate, a Decider or a Decision.

    coders: of the events it folds, by type. new: the state before any event, by id. fold: the state after one.
    state: the class of a state. fingerprint: another one when the code of the fold or the fields are others.
    """

    name: str
    pattern: str
    coders: dict[str, Coder]
    classes: tuple[type, ...]
    new: Callable[[str], Any]
    fold: Callable[[Any, Any], Any]
    state: Any
    snapshot: Snapshot | None
    fingerprint: str

    @property
    def fold_name(self) -> str:
        """What the function is called whose annotation says which events are folded."""
        return f"{self.name}.apply()" if self.fold is _apply else f"{self.name}()"

    def read(self, record: Envelope, keys: Keys | None) -> Any:
        """The typed event in a record, or the record itself where its type is not folded; raises DecodeError."""
        code = self.coders.get(record.type)
        return record if code is None else code.read(record, keys)

    def takes(self, event: object) -> bool:
        """Whether its fold is annotated with the class of this event."""
        return type(event) in self.classes

    def stream_of(self, id: str) -> str:
        """The name of the stream; raises BadOption for what cannot be an id."""
        if not isinstance(id, str) or not 0 < len(id) <= ID_CHARS or not id.isprintable():
            raise BadOption(f"{id!r} is no id for {self.pattern!r}: expected a text of 1 to {ID_CHARS} printable characters")
        return self.pattern.replace("{id}", id)

    @cached_property
    def plain(self) -> dict[tuple[str, int], Callable[[bytes], Any]]:
        """How data is read that is neither of an older version nor sealed: nearly all of it, by type and version."""
        return {(code.type, code.version): code.decode for code in self.coders.values() if not code.mark.personal}

    @property
    def is_personal(self) -> bool:
        """Whether a state may hold personal data."""
        return any(code.mark.personal for code in self.coders.values())


@lru_cache(maxsize=1024)
def reducer_of(model: Any) -> Reducer:
    """The Reducer of an Aggregate class, a Decider or a Decision class; raises UnknownEvent naming what is wrong with it."""
    if isinstance(model, Decider):
        return _of_decider(model)
    if not isinstance(model, type) or not issubclass(model, (Aggregate, Decision)):
        raise UnknownEvent(f"{model!r} is no Aggregate, no Decider and no Decision: nothing can be folded with it")
    if not hasattr(model, "apply"):
        raise UnknownEvent(f"{model.__qualname__} has no apply(): write `def apply(self, e: Opened | Closed) -> None`")
    if issubclass(model, Aggregate):
        check_defaults(model, model.__qualname__, "a new one")
    cls: Any = model
    name, pattern, policy = cls.__qualname__, getattr(cls, "stream_pattern", ""), getattr(cls, "snapshot_policy", None)
    classes = event_classes(cls.apply, f"{name}.apply()")
    coders = _coders(classes, name)
    return Reducer(name, pattern, coders, classes, cls, _apply, cls, policy, _fingerprint(cls.apply, cls, policy, coders))


def check_defaults(model: Any, said: str, what: str) -> None:
    """Raise BadOption for a field, after the id, without a default. said: how the class is named. what: begins with its id."""
    for each in dataclasses.fields(model)[1:]:
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise BadOption(f"field {each.name!r} of {said} has no default: {what} begins with its id alone")


def _of_decider(model: Decider[Any]) -> Reducer:
    name, state = model.evolve.__qualname__, _state_of(model)
    classes = event_classes(model.evolve, f"{name}()")
    coders = _coders(classes, name)

    def new(_: str) -> Any:
        return copy.deepcopy(model.initial)  # a fold may change what it was given

    print_ = _fingerprint(model.evolve, state, model.snapshot, coders, repr(model.initial))
    return Reducer(name, model.stream, coders, classes, new, model.evolve, state, model.snapshot, print_)


def _state_of(model: Decider[Any]) -> Any:
    """The class of a Decider's states: what evolve() says it returns, which may be several, or else that of the first one."""
    try:
        return typing.get_type_hints(model.evolve).get("return", type(model.initial))
    except (NameError, TypeError, AttributeError):  # said better where the events are read
        return type(model.initial)


def _apply(state: Any, event: Any) -> Any:
    state.apply(event)
    return state


def event_classes(fold: Callable[..., Any], name: str) -> tuple[type, ...]:
    """The event classes in the annotation of a function's second parameter; raises UnknownEvent."""
    try:
        hints = typing.get_type_hints(fold)
    except (NameError, TypeError, AttributeError) as error:
        raise UnknownEvent(f"the annotations of {name} cannot be read: {error}") from error
    parameters = list(hints.items() - {("return", hints.get("return"))})
    names = fold.__code__.co_varnames[: fold.__code__.co_argcount]
    annotation = dict(parameters).get(names[1] if len(names) > 1 else "")
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    classes = typing.get_args(annotation) if is_union else (annotation,)
    for cls in classes:
        if not is_event(cls):
            raise UnknownEvent(
                f"{name} takes {cls!r}, which is no event: annotate its parameter with events, as `e: Opened | Closed`"
            )
    return tuple(classes)


def _coders(classes: Sequence[type], name: str) -> dict[str, Coder]:
    coders = {code.type: code for code in map(coder, classes)}
    if len(coders) != len(classes):
        raise TwiceNamed(f"{name} takes two classes that are the same event: keep one of them")
    return coders


def _fingerprint(fold: Callable[..., Any], state: Any, policy: Snapshot | None, types: Iterable[str], initial: str = "") -> str:
    """Of what decides how events become a state: the fold's code, which events, the state's fields and where it begins.

    A change that cannot be seen here, as in a function the fold calls, is told by Snapshot(version=...).
    """
    fields = dataclasses.fields(state) if dataclasses.is_dataclass(state) else ()
    shape = [(f.name, str(f.type), _default(f)) for f in fields]
    said = repr((policy.version if policy else 1, shape, sorted(types), initial, _instructions(fold.__code__)))
    return blake2b(said.encode(), digest_size=8).hexdigest()


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        return getattr(field.default_factory, "__qualname__", "")
    return "" if field.default is dataclasses.MISSING else repr(field.default)


def _instructions(code: types.CodeType) -> list[Any]:
    """What a function does, without where it stands and what its docstring says; functions inside it included."""
    return [(each.opname, _constant(each.argval)) for each in dis.get_instructions(code)]


def _constant(value: Any) -> Any:
    """A constant as the same text in every process: a set is printed in another order in each."""
    if isinstance(value, types.CodeType):
        return _instructions(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def decided(outcome: Any) -> list[Any]:
    """What a deciding function returned, as a list of events; raises BadOption for anything else."""
    if outcome is None:
        return []
    is_several = isinstance(outcome, Iterable) and not isinstance(outcome, (str, bytes, dict)) and not is_event(type(outcome))
    items = list(outcome) if is_several else [outcome]
    for item in items:
        if not is_event(type(item)):
            raise BadOption(f"a decision returned {item!r}: expected an event, several events, or None")
    if len(items) > MOST_DECIDED:
        raise BadOption(f"a decision returned {len(items)} events: expected at most {MOST_DECIDED}")
    return items
