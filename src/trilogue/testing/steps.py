"""given/when/then for a Process: its own clock, its own timers, no log."""

from collections.abc import Callable, Sequence
from typing import Any

from trilogue.durations import Duration, microseconds, readable
from trilogue.events import now_us
from trilogue.process import Due, Process, react, wiring_of
from trilogue.testing.outcome import checked, fielded, refused
from trilogue.testing.told import Story, stored


class Ended:
    """Among what a process says: that it is over."""

    def __repr__(self) -> str:
        return "ended"


ended = Ended()


class GivenProcess:
    """One instance of a process after some events. What then() checks is what it said to the last event, or since after().

    Each check raises an AssertionError that tells the whole story, and returns the same for the next.
    """

    def __init__(self, model: Any, events: Sequence[object]) -> None:
        self._model, self._wiring = model, wiring_of(model)
        self._story = Story(f"process {model.__qualname__}", tuple(events))
        self._state: Process | None = None
        self._now_us = now_us()
        self._timers: dict[str, int] = {}
        self._said: list[object] = []
        self._error: Exception | None = None
        for n, event in enumerate(events, 1):
            self._begin()
            self._react(stored(event, self._story))
            if self._error is not None and n < len(events):
                raise self._error

    def when(self, event: object) -> "GivenProcess":
        """One more event comes."""
        __tracebackhide__ = True
        self._refuse_error()
        self._story = self._story.then(repr(event))
        self._begin()
        self._react(stored(event, self._story))
        return self

    def after(self, by: Duration) -> "GivenProcess":
        """Time passes, and timers that fall due on the way wake it, in order. by: "15m"."""
        __tracebackhide__ = True
        self._refuse_error()
        self._story = self._story.then(f"{readable(microseconds(by))} later")
        self._begin()
        until_us = self._now_us + microseconds(by)
        while self._timers and self._error is None:
            name = min(self._timers, key=lambda name: (self._timers[name], name))
            if self._timers[name] > until_us:
                break
            self._now_us = max(self._now_us, self._timers.pop(name))
            self._react(Due(name))
        self._now_us = until_us
        return self

    def _begin(self) -> None:
        self._said, self._error = [], None

    def _react(self, event: object) -> None:
        try:
            reaction = react(self._model, self._state, event)
        except Exception as error:
            self._error = error
            return
        self._said += [stored(each, self._story) for each in reaction.emits]
        if reaction.ended:
            self._said.append(ended)
            self._timers.clear()
        for name in reaction.cancels:
            self._timers.pop(name, None)
        self._timers |= {each.name: each.due_us(self._now_us) for each in reaction.timers}
        # As the log keeps it between two events.
        self._state = None if reaction.state is None else self._wiring.decode(self._wiring.encode(reaction.state))

    def _refuse_error(self) -> None:
        if self._error is not None:
            raise self._story.raised(self._error, ["that it goes on"]) from self._error

    # ── checks ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def then(self, *said: object) -> "GivenProcess":
        """It said exactly this, in this order: events, and `ended` if it is over. Nothing: it said nothing, and goes on."""
        __tracebackhide__ = True
        if self._error is not None:
            raise self._story.raised(self._error, [repr(each) for each in said] or ["(nothing)"]) from self._error
        if self._said != list(said):
            raise self._story.differs("it said something else than expected", said, self._said)
        return self

    def rejects(self, error: type[Exception] | str, text: str = "") -> "GivenProcess":
        """Its step raised: an error of this class, or with this text in its message, or both."""
        __tracebackhide__ = True
        refused(self._story, self._error, self._said, error, text)
        return self

    def waits(self, timer: str, after: Duration) -> "GivenProcess":
        """It waits for a timer that is due so long from now."""
        __tracebackhide__ = True
        self._refuse_error()
        left = {name: due_us - self._now_us for name, due_us in self._timers.items()}
        if left.get(timer) != microseconds(after):
            waits = [f"{name!r} in {readable(us)}" for name, us in sorted(left.items())] or ["no timer"]
            raise self._story.failed(
                "it waits for something else than expected",
                f"  expected  {timer!r} in {readable(microseconds(after))}",
                f"  got       {', '.join(waits)}",
            )
        return self

    def state(self, check: Callable[[Any], object]) -> "GivenProcess":
        """Its state passes a check: a function of it that returns True, or asserts for itself. None: there is no instance."""
        __tracebackhide__ = True
        self._refuse_error()
        checked(self._story, self._state, check)
        return self

    def has(self, **fields: object) -> "GivenProcess":
        """Its state has these values in these fields."""
        __tracebackhide__ = True
        self._refuse_error()
        fielded(self._story, self._state, fields)
        return self
