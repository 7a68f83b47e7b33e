"""The events of the queue figures: bench.watched is published and handled, bench.counted is what a handler emits."""

import msgspec

from trilogue.events import event

WRITERS = 64
KEYS = 1_000


@event("bench.watched", key="user")
class Watched(msgspec.Struct, frozen=True):
    """A typical small event."""

    user: str
    video: str
    position_s: int


@event("bench.counted", key="user", topic="bench-counts")
class Counted(msgspec.Struct, frozen=True):
    """What a handler emits."""

    user: str
    count: int


def sample(n: int) -> Watched:
    """The n-th event."""
    return Watched(f"user-{n % KEYS}", f"video-{n % 977}", n)
