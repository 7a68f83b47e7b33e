"""What came of a decision: events, or an error; and the state afterwards."""

from collections.abc import Callable, Sequence
from typing import Any

from trilogue.testing.told import Story

_ABSENT = object()


class Outcome:
    """What was decided. Each check raises an AssertionError that tells the whole story, and returns the outcome for the next."""

    def __init__(self, story: Story, state: Any, events: Sequence[object], error: Exception | None = None) -> None:
        self._story, self._state, self._events, self._error = story, state, list(events), error

    def then(self, *events: object) -> "Outcome":
        """Exactly these events happened, in this order; none: nothing happened."""
        __tracebackhide__ = True
        if self._error is not None:
            raise self._story.raised(self._error, [repr(event) for event in events] or ["(nothing)"]) from self._error
        if self._events != list(events):
            raise self._story.differs("other events than expected", events, self._events)
        return self

    def rejects(self, error: type[Exception] | str, text: str = "") -> "Outcome":
        """It was refused: with an error of this class, or with this text in its message, or both."""
        __tracebackhide__ = True
        refused(self._story, self._error, self._events, error, text)
        return self

    def state(self, check: Callable[[Any], object]) -> "Outcome":
        """The state afterwards passes a check: a function of it that returns True, or asserts for itself."""
        __tracebackhide__ = True
        checked(self._story, self._after(), check)
        return self

    def has(self, **fields: object) -> "Outcome":
        """The state afterwards has these values in these fields."""
        __tracebackhide__ = True
        fielded(self._story, self._after(), fields)
        return self

    def _after(self) -> Any:
        if self._error is not None:
            raise self._story.raised(self._error, ["a state"]) from self._error
        return self._state


def refused(story: Story, raised: Exception | None, events: Sequence[object], error: type[Exception] | str, text: str) -> None:
    """Fail unless it raised this error. events: what happened instead."""
    kind, text = (Exception, error) if isinstance(error, str) else (error, text)
    wanted = f"{kind.__qualname__}{f' with {text!r}' if text else ''}"
    if raised is None:
        raise story.differs(f"expected {wanted}, nothing was raised", (), events)
    if not isinstance(raised, kind) or text not in str(raised):
        raise story.raised(raised, [wanted]) from raised


def checked(story: Story, state: Any, check: Callable[[Any], object]) -> None:
    """Fail if a check returns something false."""
    answer = check(state)
    if answer is not None and not answer:
        raise story.failed(f"the state does not pass its check: it is {state!r}")


def fielded(story: Story, state: Any, fields: dict[str, object]) -> None:
    """Fail unless the state, an object or a dict, has these values."""
    values = state if isinstance(state, dict) else {name: getattr(state, name, _ABSENT) for name in fields}
    got = {name: values.get(name, _ABSENT) for name in fields}
    if got != fields:
        shown = [f"{name}={'(no such field)' if got[name] is _ABSENT else repr(got[name])}" for name in fields]
        expected = [f"{name}={value!r}" for name, value in fields.items()]
        raise story.differs("its state is not as expected", [_Said(each) for each in expected], [_Said(each) for each in shown])


class _Said(str):
    """A text that is shown as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
