"""Processes: what has to happen over many events, in order, with time-outs and a way back (sagas).

    TransferRequested ──@starts──▶ MoneyTransfer t1 ──▶ Withdraw, Timer("stuck", after="15m")
    Withdrawn         ──@reacts──▶                  ──▶ Deposit
    Deposited         ──@reacts──▶                  ──▶ End()
    (15 minutes)      ──@timer───▶                  ──▶ Refund, End()

A step is pure: it changes its own fields and says what shall happen. One group handles the events of all instances; the state,
what a step emits and its timers are one transaction with "this event is done". The state of an instance:

    trilogue_state  "process:transfer" | "t1" | {"version","started_us","changed_us","position","events","timers","state"}
    trilogue_timers "trilogue.timer.transfer", key "t1": enters the log when due; one that was moved meanwhile is passed over
"""

import ast
import copy
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from functools import lru_cache
from hashlib import blake2b
from typing import Any, ClassVar, TypeVar, dataclass_transform

from trilogue.aggregate import check_defaults, event_classes
from trilogue.codec import Coder, coder, json_coder
from trilogue.durations import Duration, microseconds
from trilogue.errors import BadOption, BadPattern, TwiceNamed, UnknownEvent
from trilogue.events import as_us, field_reader, is_event
from trilogue.patterns import check_type

F = TypeVar("F", bound=Callable[..., Any])
TIMER_TYPE = "trilogue.timer."
MOST_SAID = 1_000
_MARK = "__trilogue_step__"


# ── what a step says ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Timer:
    """Wake this instance later: its step `@timer(name)` runs then, whatever was restarted in between. Set again = moved.

    name: of the step. after: a duration from now. at: a moment with a time zone. Raises BadOption.

    >>> Timer("stuck", after="15m").after
    '15m'
    """

    name: str
    after: Duration | None = field(default=None, kw_only=True)
    at: datetime | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if (self.after is None) == (self.at is None):
            raise BadOption(f"Timer({self.name!r}) needs after= or at=, one of them: as Timer({self.name!r}, after='15m')")
        if self.at is not None and self.at.tzinfo is None:
            raise BadOption(f"Timer({self.name!r}, at={self.at}) has no time zone: write datetime(..., tzinfo=UTC)")
        if self.after is not None:
            microseconds(self.after)

    def due_us(self, now_us: int) -> int:
        """When it is due, in microseconds; now_us: when it is set."""
        return as_us(self.at) if self.at is not None else now_us + microseconds(self.after or 0)


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget a timer of this instance; nothing happens if it is not set.

    name: of its step.
    """

    name: str


@dataclass(frozen=True, slots=True)
class End:
    """This instance is done: its state and its timers go, what it was told and what it said stays on the log."""


@dataclass(frozen=True, slots=True)
class Due:
    """What react() is given where the log would bring a timer that is due. name: of the timer."""

    name: str


# ── a class per kind of process ──────────────────────────────────────────────────────────────────────────────────────


@dataclass_transform(field_specifiers=(field,))
@dataclass
class Process:
    """One instance of something that takes many events; a subclass is a dataclass by itself, with defaults for its fields.

    key: the field, of every event it takes, that names the instance; an event in which it is None is nobody's.
    name: under which its state is kept; never changes.

    A step returns or yields events, Timer, Cancel and End. Keep ids in its fields and no personal data: they are stored plain.

    >>> from trilogue import event
    >>> @event("order.placed")
    ... @dataclass(frozen=True)
    ... class Placed:
    ...     order: str
    >>> class Payment(Process, key="order", name="payment"):
    ...     @starts
    ...     def placed(self, e: Placed) -> Timer:
    ...         return Timer("late", after="14d")
    ...     @timer("late")
    ...     def remind(self) -> End:
    ...         return End()
    >>> react(Payment, None, Placed("o1")).timers
    (Timer(name='late', after='14d', at=None),)
    """

    id: str
    process_key: ClassVar[str] = ""
    process_name: ClassVar[str] = ""

    def __init_subclass__(cls, *, key: str = "", name: str = "", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.process_key = key or cls.process_key
        cls.process_name = name or cls.process_name
        dataclass(cls)


def starts(step: F) -> F:
    """Mark the step for an event that begins a new instance; for a running one it is a step like others."""
    return _marked(step, "starts")


def reacts(step: F) -> F:
    """Mark the step for an event of a running instance; where there is none, the event is passed over."""
    return _marked(step, "reacts")


def timer(name: str) -> Callable[[F], F]:
    """Mark the step for a timer that is due. name: as in Timer(name, ...)."""
    if not isinstance(name, str):
        raise BadOption(f"@timer({name!r}) has no name: write @timer('stuck')")
    return lambda step: _marked(step, "timer", name)


def _marked(step: F, kind: str, name: str = "") -> F:
    if not inspect.isfunction(step):
        raise BadOption(f"@{kind} stands above {step!r}: write it directly above a method of a Process")
    if hasattr(step, _MARK):
        raise BadOption(f"step {step.__qualname__} is marked twice: one of @starts, @reacts and @timer is enough")
    setattr(step, _MARK, (kind, name))
    return step


# ── what a class says, read once ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Step:
    """One method of a process. name: of the method. starts: whether it may begin an instance."""

    name: str
    starts: bool = False


@dataclass(frozen=True, eq=False)
class Wiring:
    """What a Process class says.

    steps: by event class. timers: by name. coders: of its events, by type. instance: reads the id, by event class.
    encode, decode: of its state. version: another one when its fields are others.
    """

    model: type[Process]
    name: str
    steps: dict[type, Step]
    timers: dict[str, Step]
    coders: dict[str, Coder]
    instance: dict[type, Callable[[object], str | None]]
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    version: str

    @property
    def owner(self) -> str:
        """Under which its states are kept."""
        return f"process:{self.name}"

    @property
    def group(self) -> str:
        """The group that handles its events, unless another is named."""
        return f"process.{self.name}"

    @property
    def timer_type(self) -> str:
        """The type of its timers on the log."""
        return TIMER_TYPE + self.name

    def step_for(self, event: object) -> Step:
        """The step for an event or a Due; raises UnknownEvent."""
        step = self.timers.get(event.name) if isinstance(event, Due) else self.steps.get(type(event))
        if step is None:
            takes = f"it takes {', '.join(sorted(self.coders))} and the timers {sorted(self.timers)}"
            raise UnknownEvent(f"process {self.name!r} has no step for {event!r}: {takes}")
        return step


@lru_cache(maxsize=1024)
def wiring_of(model: Any) -> Wiring:
    """What a Process class says; raises a WiringError that names what is wrong with it."""
    if not isinstance(model, type) or not issubclass(model, Process):
        raise UnknownEvent(f"{model!r} is no process: write class MoneyTransfer(Process, key='transfer', name='transfer')")
    name, title = model.process_name, model.__qualname__
    _check_class(model, name, title)
    steps, timers = _steps(model, name), _timers(model, name)
    if not any(step.starts for step in steps.values()):
        raise BadOption(f"nothing starts process {name!r}: mark a step of {title} with @starts")
    _check_timer_names(model, timers, name)
    coders = {code.type: code for code in map(coder, steps)}
    if len(coders) < len(steps):
        raise TwiceNamed(f"process {name!r} takes two classes that are the same event: keep one of them")
    instance = {cls: field_reader(cls, f"the key of process {name!r},", model.process_key) for cls in steps}
    try:
        encode, decode = json_coder(model)
    except (TypeError, ValueError, NameError) as error:
        raise UnknownEvent(f"the state of process {name!r}, {title}, cannot be read from JSON: {error}") from error
    return Wiring(model, name, steps, timers, coders, instance, encode, decode, _fingerprint(model))


def _check_class(model: type[Process], name: str, title: str) -> None:
    if not name or not model.process_key:
        raise BadOption(f"process {title} needs key= and name=: write class {title}(Process, key='transfer', name='transfer')")
    try:
        check_type(TIMER_TYPE + name)
    except BadPattern:
        raise BadOption(f"process name {name!r} of {title}: expected words of letters, digits, _ and - with dots") from None
    check_defaults(model, f"process {title}", "an instance")


def _marked_steps(model: type[Process]) -> Iterator[tuple[Callable[..., Any], str, str]]:
    """The steps as (function, kind, timer's name), in the order they are written; overridden ones count once."""
    names = dict.fromkeys(name for base in reversed(model.__mro__) for name in vars(base))
    for function in (getattr(model, name, None) for name in names):
        mark = getattr(function, _MARK, None) if inspect.isfunction(function) else None
        if mark is None or function is None:
            continue
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise BadOption(f"step {function.__qualname__} is async: a step only decides; what it waits for comes as an event")
        yield function, *mark


def _steps(model: type[Process], name: str) -> dict[type, Step]:
    steps: dict[type, Step] = {}
    for function, kind, _ in _marked_steps(model):
        if kind == "timer":
            continue
        _check_parameters(function, 2, "(self, e: Withdrawn)")
        for cls in event_classes(function, f"step {function.__qualname__}"):
            if cls in steps:
                raise TwiceNamed(
                    f"process {name!r} has two steps for {cls.__qualname__}: {steps[cls].name} and {function.__name__}"
                )
            steps[cls] = Step(function.__name__, kind == "starts")
    return steps


def _timers(model: type[Process], name: str) -> dict[str, Step]:
    timers: dict[str, Step] = {}
    for function, kind, timer_name in _marked_steps(model):
        if kind != "timer":
            continue
        _check_parameters(function, 1, "(self)")
        if timer_name in timers:
            raise TwiceNamed(f"process {name!r} has two steps for timer {timer_name!r}: keep one of them")
        timers[timer_name] = Step(function.__name__)
    return timers


def _check_parameters(function: Callable[..., Any], count: int, expected: str) -> None:
    if len(inspect.signature(function).parameters) != count:
        raise UnknownEvent(f"step {function.__qualname__} takes other parameters: expected {expected}")


def _check_timer_names(model: type[Process], timers: dict[str, Step], name: str) -> None:
    """Refuse a name written out in Timer("…") or Cancel("…") that has no step: a slip that would show when it is too late."""
    for function, _, _ in _marked_steps(model):
        for call in _calls(function):
            if isinstance(call.func, ast.Name) and function.__globals__.get(call.func.id) in (Timer, Cancel):
                said = [*call.args[:1], *(each.value for each in call.keywords if each.arg == "name")]
                for each in said:
                    if isinstance(each, ast.Constant) and isinstance(each.value, str):
                        _check_timer(each.value, timers, f"step {function.__qualname__} of process {name!r}")


def _calls(function: Callable[..., Any]) -> list[ast.Call]:
    """The calls in a function; none where its source is not there: then the slip shows when the step runs."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _check_timer(timer_name: str, timers: dict[str, Step], where: str) -> None:
    if timer_name in timers:
        return
    near = get_close_matches(timer_name, timers, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"write a step under @timer({timer_name!r})"
    raise UnknownEvent(f"{where} names timer {timer_name!r}, for which there is no step: {hint}")


def _fingerprint(model: type[Process]) -> str:
    said = repr([(each.name, str(each.type)) for each in dataclasses.fields(model)])
    return blake2b(said.encode(), digest_size=8).hexdigest()


# ── one event, one instance: pure ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Reaction:
    """What an instance makes of an event.

    state: afterwards; None where the event was passed over, or the instance ended. emits: events to publish. timers: to set,
    one per name. cancels: names of timers to forget.
    """

    state: Process | None = None
    emits: tuple[object, ...] = ()
    timers: tuple[Timer, ...] = ()
    cancels: tuple[str, ...] = ()
    ended: bool = False


def react(model: Any, state: Process | None, event: object) -> Reaction:
    """What an instance makes of an event, without any log; the state that is handed over stays as it is.

    state: None where there is no instance yet. event: one it has a step for, or Due(name) for a timer.
    Raises UnknownEvent, BadOption, and whatever the step raises.
    """
    wiring = wiring_of(model)
    wiring.step_for(event)
    id = None if isinstance(event, Due) else wiring.instance[type(event)](event)
    if state is not None and id not in (None, state.id):
        raise BadOption(f"{event!r} is for instance {id!r} of process {wiring.name!r}, the state is of {state.id!r}")
    if id is None and not isinstance(event, Due):
        return Reaction(state)
    return reaction_of(wiring, copy.deepcopy(state), event, id or "")


def reaction_of(wiring: Wiring, state: Process | None, event: object, id: str) -> Reaction:
    """react() without a copy: for a state that was read for this."""
    step = wiring.step_for(event)
    if state is None and not step.starts:
        return Reaction()
    state = wiring.model(id) if state is None else state
    call = getattr(state, step.name)
    emits: list[object] = []
    timers: dict[str, Timer] = {}
    cancels: dict[str, None] = {}
    ended = False
    for item in _items(call() if isinstance(event, Due) else call(event)):
        if isinstance(item, (Timer, Cancel)):
            _check_timer(item.name, wiring.timers, "it")
            timers.pop(item.name, None)
            cancels.pop(item.name, None)
        match item:
            case Timer():
                timers[item.name] = item
            case Cancel():
                cancels[item.name] = None
            case End():
                ended = True
            case _ if is_event(type(item)):
                emits.append(item)
            case _:
                raise BadOption(f"it said {item!r}: expected events, Timer(...), Cancel(...) or End()")
    if ended:
        return Reaction(None, tuple(emits), ended=True)
    return Reaction(state, tuple(emits), tuple(timers.values()), tuple(cancels))


def _items(said: Any) -> Sequence[object]:
    """What a step returned or yielded, as a list."""
    if said is None:
        return ()
    is_one = is_event(type(said)) or not isinstance(said, Iterable)
    items = [said] if is_one else [item for item in said if item is not None]
    if len(items) > MOST_SAID:
        raise BadOption(f"it said {len(items)} things: expected at most {MOST_SAID:,}")
    return items
