"""How a failure is told: what was given, what was done, and expected beside got.

Account 'ACC001': other events than expected
  given     AccountCreated(id='ACC001', deposit=1000)
  when      <lambda> at test_account.py:12
  expected                                  got
! MoneyWithdrawn(amount=5)                  MoneyWithdrawn(amount=6)
    amount=5                                amount=6
! (nothing)                                 AccountClosed(final=994)
"""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trilogue.codec import coder
from trilogue.errors import TrilogueError
from trilogue.events import field_names, is_event

WIDTH = 60
_NOTHING = object()


@dataclass(frozen=True, slots=True)
class Story:
    """What a test says so far. title: of what. given: the events. done: what was done after them."""

    title: str
    given: tuple[object, ...]
    done: tuple[str, ...] = ()

    def then(self, what: str) -> "Story":
        """The same, with one more thing done."""
        return dataclasses.replace(self, done=(*self.done, what))

    def failed(self, what: str, *lines: str) -> AssertionError:
        """The failure to raise: what is wrong, what was given and done, and more lines."""
        given = [repr(event) for event in self.given] or ["(nothing)"]
        told = [*_listed("given", given), *_listed("when", self.done)]
        return AssertionError("\n".join([f"{self.title}: {what}", *told, *lines]))

    def differs(self, what: str, expected: Sequence[object], got: Sequence[object]) -> AssertionError:
        """The failure of two lists that should be equal."""
        return self.failed(what, *side_by_side(expected, got))

    def raised(self, error: Exception, expected: Sequence[str]) -> AssertionError:
        """The failure of something that should not have raised."""
        return self.failed(f"it raised {_said(error)}", *_listed("expected", expected))


def _listed(name: str, lines: Sequence[str]) -> list[str]:
    return [f"  {name if not n else '':<9} {line}" for n, line in enumerate(lines)]


def _said(error: Exception) -> str:
    return f"{type(error).__qualname__}: {error}"


def side_by_side(expected: Sequence[object], got: Sequence[object]) -> list[str]:
    """Two lists as lines, one beside the other; a ! where they differ, and the fields in which events of one class do."""
    lines = [_row(" ", "expected", "got")]
    for left, right in zip_longest(expected, got, fillvalue=_NOTHING):
        same = left is right or left == right
        lines += _rows(" " if same else "!", _shown(left), _shown(right))
        lines += [] if same else _fields(left, right)
    return lines


def _shown(item: object) -> str:
    return "(nothing)" if item is _NOTHING else repr(item)


def _fields(left: Any, right: Any) -> Iterator[str]:
    if type(left) is not type(right) or not is_event(type(left)):
        return
    for name in sorted(field_names(type(left))):
        if getattr(left, name) != getattr(right, name):
            yield from _rows(" ", f"    {name}={getattr(left, name)!r}", f"    {name}={getattr(right, name)!r}")


def _rows(mark: str, left: str, right: str) -> list[str]:
    pairs = zip_longest(_wrapped(left), _wrapped(right), fillvalue="")
    return [_row(mark if not n else " ", *pair) for n, pair in enumerate(pairs)]


def _row(mark: str, left: str, right: str) -> str:
    return f"{mark} {left:<{WIDTH}} {right}".rstrip()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="      ", drop_whitespace=False) or [""]


def name_of(action: Callable[..., Any]) -> str:
    """What a function is called, and where it is."""
    code = getattr(action, "__code__", None)
    name = getattr(action, "__qualname__", repr(action)).rpartition("<locals>.")[2]
    return name if code is None else f"{name} at {Path(code.co_filename).name}:{code.co_firstlineno}"


def stored(event: Any, story: Story) -> Any:
    """The event as it comes back from the log; fails for one that comes back as another."""
    if not is_event(type(event)):
        raise story.failed(f"{event!r} is no event: expected an object of a class with @event")
    cls: Any = type(event)
    code = coder(cls)
    try:
        read = code.decode(code.encode(event))
    except (TrilogueError, TypeError, ValueError, NotImplementedError) as error:
        raise story.failed(f"{event!r} cannot be stored and read again: {error}") from error
    if read != event and code.encode(read) != code.encode(event):
        raise story.failed(f"an event comes back from the log as another: {event!r} is stored, {read!r} is read")
    return read
