"""Every error trilogue raises, as one tree.

    TrilogueError
    ├─ WiringError            a program, a name or a URL is wrong: raised at start, nothing has happened yet
    │  ├─ UnknownScheme       no log is reached by such a URL
    │  ├─ Unsupported         this URL cannot do what was asked; the message names those that can
    │  ├─ BadOption           a value or URL option out of its range
    │  ├─ BadPattern          not an AMQP pattern
    │  ├─ UnknownEvent        a class without @event, a type nobody declared, a group nobody bound
    │  ├─ TwiceNamed          two things under one name
    │  └─ OrphanedGroup       a group has a backlog and no handler
    ├─ LogError               the log is in trouble; `stored` says what became of what was handed over
    │  ├─ Rejected            stored=False: too large, refused; sending it again unchanged will not help
    │  │  └─ StorageFull      stored=False: no room; the same call succeeds once there is room
    │  ├─ Unavailable         stored=False: cannot be opened or reached
    │  ├─ OutOfRange          stored=False: what a group has yet to read is not kept any more; somebody has to choose
    │  ├─ OutcomeUnknown      stored=None: may or may not be stored; repeating it with the same id is harmless
    │  └─ LeaseLost           stored=False: another worker owns it now; nothing of this settlement happened
    ├─ Conflict               the stream has another version, or the id is stored with other content
    │  └─ StreamClosed        the stream takes no events any more
    ├─ DecodeError            bytes that are not the event they claim to be: straight to the dead letters
    ├─ TimedOut               waited as long as was allowed
    ├─ HandlerFailed          what wait_for() raises when the awaited record is dead
    └─ Verdict                raised by a handler on purpose
       ├─ Later               handle it again after this long; not a failure
       └─ Reject              straight to the dead letters, no retry

Every message says what, where, what was expected and how to mend it.
"""

from datetime import timedelta
from typing import ClassVar


class TrilogueError(Exception):
    """The root of every error raised here."""


class WiringError(TrilogueError):
    """A program, a name or a URL is wrong; raised at start."""


class UnknownScheme(WiringError):
    """No log is reached by such a URL."""


class Unsupported(WiringError):
    """This URL cannot do what was asked."""


class BadOption(WiringError):
    """A value or URL option is out of its range."""


class BadPattern(WiringError):
    """Not an AMQP pattern: words separated by dots, `*` one word, `#` any number."""


class UnknownEvent(WiringError):
    """A class without @event, or a type or group nobody declared."""


class TwiceNamed(WiringError):
    """Two things under one name."""


class OrphanedGroup(WiringError):
    """A group has a backlog and no handler."""


class LogError(TrilogueError):
    """The log is in trouble; `stored` is False (certainly not stored) or None (unknown)."""

    stored: ClassVar[bool | None] = False


class Rejected(LogError):
    """Certainly not stored; sending it again unchanged will not help."""


class StorageFull(Rejected):
    """Certainly not stored, for want of room; the same call succeeds once there is room."""


class Unavailable(LogError):
    """The log cannot be opened or reached."""


class OutOfRange(LogError):
    """What a group has yet to read is not kept any more: going on means leaving something out, which somebody has to choose."""


class OutcomeUnknown(LogError):
    """May or may not be stored; repeating the call with the same id is harmless."""

    stored: ClassVar[bool | None] = None


class LeaseLost(LogError):
    """Another worker owns these deliveries now; nothing of the settlement happened."""


class Conflict(TrilogueError):
    """The stream has another version than expected, or the id is stored with other content.

    stream, expected, actual: where a version was expected. by: who wrote last, as far as the record says.
    """

    def __init__(
        self,
        message: str,
        *,
        stream: str | None = None,
        expected: int | None = None,
        actual: int | None = None,
        by: str | None = None,
    ) -> None:
        super().__init__(message)
        self.stream, self.expected, self.actual, self.by = stream, expected, actual, by


class StreamClosed(Conflict):
    """The stream was closed: nothing can be appended to it any more."""


class DecodeError(TrilogueError):
    """Bytes that are not the event they claim to be."""


class TimedOut(TrilogueError):
    """Waited as long as was allowed."""


class HandlerFailed(TrilogueError):
    """The record somebody waits for went to the dead letters."""


class Verdict(TrilogueError):
    """Raised by a handler on purpose, instead of returning."""


class Later(Verdict):
    """Handle this event again after a while; the attempt is not charged.

    after: `"10m"`, a timedelta, or seconds.
    """

    def __init__(self, after: "str | float | timedelta") -> None:
        super().__init__(f"later, after {after}")
        self.after = after


class Reject(Verdict):
    """Send this event to the dead letters at once.

    reason: one sentence, shown with the dead letter.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
