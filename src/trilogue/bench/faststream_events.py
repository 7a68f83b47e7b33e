"""The events of events.py as FastStream's documentation writes events: pydantic models."""

from pydantic import BaseModel

from trilogue.bench.events import KEYS


class Watched(BaseModel):
    """The same small event."""

    user: str
    video: str
    position_s: int


class Counted(BaseModel):
    """What a handler emits."""

    user: str
    count: int


def sample(n: int) -> Watched:
    """The n-th event."""
    return Watched(user=f"user-{n % KEYS}", video=f"video-{n % 977}", position_s=n)
