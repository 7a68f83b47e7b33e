"""Given these events, when this is done, then that must come of it: pure, no event loop, no log.

given(Account, "ACC001", AccountCreated(...)).when(lambda a: a.withdraw(5)).then(MoneyWithdrawn(...)).has(balance=995)
given(accounts, "ACC001", AccountCreated(...)).when(withdraw(5)).then(MoneyWithdrawn(...))                       a Decider
given(Enrol("c1", "s1"), CourseOpened("c1", 1), Enrolled("c1", "s2")).rejects(CourseFull, "c1")                a Decision
given(balances, MoneyDeposited(...)).twice().then(balances=[("ACC001", 1000)])                               a projection
given(MoneyTransfer, TransferRequested(...)).waits("stuck", "15m").after("15m").then(Refund(...), ended)        a Process

Every event is stored and read again on the way, as the log does it.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, overload

from trilogue.aggregate import Aggregate, Boundary, Decider, Decision, Reducer, boundaries, decided, reducer_of
from trilogue.codec import coder
from trilogue.errors import BadOption
from trilogue.process import Process
from trilogue.projection import Projection
from trilogue.testing.outcome import Outcome
from trilogue.testing.steps import GivenProcess
from trilogue.testing.tables import GivenTables
from trilogue.testing.told import Story, name_of, stored


@overload
def given(model: type[Aggregate] | Decider[Any], id: str, /, *events: object) -> "GivenStream": ...


@overload
def given(model: Decision, /, *events: object) -> Outcome: ...


@overload
def given(model: type[Process], /, *events: object) -> GivenProcess: ...


@overload
def given(model: Projection | Callable[..., Any], /, *events: object) -> GivenTables: ...


def given(model: Any, /, *events: Any) -> Any:
    """What happened before: the beginning of a test.

    model: an Aggregate class or a Decider, followed by the id; a Decision; a projection's function; a Process class.
    events: in order. Raises AssertionError for events that would be passed over, BadOption for anything else as model.

    >>> given(Account, "a1").has(balance=0)     # doctest: +SKIP
    """
    if isinstance(model, Decision):
        return _decided(model, events)
    if isinstance(model, Decider) or (isinstance(model, type) and issubclass(model, Aggregate)):
        if not events or not isinstance(events[0], str):
            raise BadOption("after an Aggregate or Decider comes the id: given(Account, 'ACC001', AccountCreated(...))")
        return GivenStream(model, events[0], events[1:])
    if isinstance(model, type) and issubclass(model, Process):
        return GivenProcess(model, events)
    return GivenTables(model, events)


class GivenStream:
    """A stream that holds these events."""

    def __init__(self, model: Any, id: str, events: Sequence[object]) -> None:
        self._model, self._id = model, id
        self._reducer = reducer_of(model)
        self._reducer.stream_of(id)
        self._story = Story(f"{_title(model, self._reducer)} {id!r}", tuple(events))
        self._events = [_taken(self._reducer, event, self._story) for event in events]

    def when(self, action: Callable[[Any], Any]) -> Outcome:
        """Do something to the aggregate, or decide from the Decider's state: what it emits or returns is the outcome."""
        __tracebackhide__ = True
        story = self._story.then(name_of(action))
        try:
            if isinstance(self._model, Decider):
                return self._returned(decided(action(self._state(()))), story)
            return self._emitted(action, story)
        except AssertionError:
            raise
        except Exception as error:
            return Outcome(story, None, (), error)

    def _returned(self, events: Sequence[Any], story: Story) -> Outcome:
        events = [_taken(self._reducer, event, story) for event in events]
        return Outcome(story, self._state(events), events)

    def _emitted(self, action: Callable[[Any], Any], story: Story) -> Outcome:
        account = self._state(())
        action(account)
        events = [stored(event, story) for event in account.uncommitted]
        again = self._state(events)
        if account != again:
            raise story.differs(
                "its state is another one than its events lead to: change it in apply() alone", [again], [account]
            )
        return Outcome(story, account, events)

    def _state(self, more: Sequence[Any]) -> Any:
        """The state after the given events and more."""
        state = copy.deepcopy(self._reducer.new(self._id))
        for event in (*self._events, *more):
            state = self._reducer.fold(state, event)
        if isinstance(state, Aggregate):
            state.mark_saved(len(self._events))
        return state

    def state(self, check: Callable[[Any], object]) -> "GivenStream":
        """Check the state after the given events; see Outcome.state()."""
        __tracebackhide__ = True
        Outcome(self._story, self._state(()), ()).state(check)
        return self

    def has(self, **fields: object) -> "GivenStream":
        """Check fields of the state after the given events; see Outcome.has()."""
        __tracebackhide__ = True
        Outcome(self._story, self._state(()), ()).has(**fields)
        return self


def _title(model: Any, reducer: Reducer) -> str:
    return reducer.pattern if isinstance(model, Decider) else str(model.__qualname__)


def _taken(reducer: Reducer, event: object, story: Story) -> Any:
    """The event as it is read; fails for one that the fold is not annotated with."""
    if not reducer.takes(event):
        raise story.failed(f"{event!r} would be passed over: the annotation of {reducer.fold_name} does not name its class")
    return stored(event, story)


# ── a decision across streams ────────────────────────────────────────────────────────────────────────────────────────


def _decided(decision: Decision, events: Sequence[object]) -> Outcome:
    __tracebackhide__ = True
    model: Any = type(decision)
    reducer, within = reducer_of(model), boundaries(decision)
    story = Story(repr(decision), tuple(events))
    state = copy.deepcopy(decision)
    for event in events:
        if not _is_within(within, event):
            raise story.failed(f"{event!r} lies outside its boundary, which is {_bounds(within)}: the decision would not see it")
        state = reducer.fold(state, _taken(reducer, event, story))
    try:
        made = [stored(event, story) for event in decided(state.decide())]
    except AssertionError:
        raise
    except Exception as error:
        return Outcome(story, state, (), error)
    for event in made:
        if reducer.takes(event) and not _is_within(within, event):
            raise story.failed(
                f"it makes {event!r}, which lies outside its boundary, {_bounds(within)}: the same decision made again, or at "
                "the same time, would not see it. Give the event those tags"
            )
    return Outcome(story, state, made)


def _is_within(within: Sequence[Boundary], event: Any) -> bool:
    cls: Any = type(event)
    code = coder(cls)
    tags = set(code.tags(event))
    return any(tags.issuperset(each.tags) and (not each.types or code.type in each.types) for each in within)


def _bounds(within: Sequence[Boundary]) -> str:
    said = [(" and ".join(each.tags), " or ".join(each.types)) for each in within]
    return ", or ".join(f"{tags} of type {types}" if types else tags for tags, types in said)
