"""What one measurement says: how fast it was, and how durable the very connection was that did it.

Measured(2_410.0, {"synchronous": 2, "journal_mode": "wal", "wal_autocheckpoint": 4000, "sqlite": "3.54.1"})
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trilogue.errors import Unavailable

Durability = dict[str, str | int]
READ_BACK = ("synchronous", "journal_mode", "wal_autocheckpoint")
CHECKPOINT_PAGES = 4_000  # every side writes back as often: a checkpoint is an fsync too
PATIENCE_S = 600.0  # for one side of one round


@dataclass(frozen=True, slots=True)
class Measured:
    """rate: events per second, or microseconds. durability: as the connection that wrote, or the server, says of itself.
    way: how it was done, if there are several."""

    rate: float
    durability: Durability | None = None
    way: str = ""


class Stretch:
    """The time from the first event handled to the last one of so many; connecting, which is before, is not what is measured."""

    def __init__(self, events: int) -> None:
        self.events = events
        self.count = self._first = 0
        self._began = self._ended = 0.0

    def passed(self, count: int = 1) -> bool:
        """So many events more were handled; whether these were the last."""
        if not self.count:
            self._began, self._first = time.perf_counter(), count
        self.count += count
        if self.count < self.events:
            return False
        self.ends()
        return True

    def ends(self) -> None:
        """Now, and not when the last one was handled: something of it had still to be made durable."""
        self._ended = time.perf_counter()

    def rate(self, side: str) -> float:
        """Events per second; raises Unavailable if they were not so many."""
        check_stored(side, self.count, self.events)
        return (self.events - self._first + 1) / (self._ended - self._began)  # the first ones had come before it began


def pragmas_of(read: Callable[[str], Any], sqlite: str) -> Durability:
    """What decides how often a connection waits for the disk; read: the value of one pragma."""
    return {name: read(name) for name in READ_BACK} | {"sqlite": sqlite}


def weakest(said: Sequence[Durability]) -> Durability:
    """Of several connections the one that waits least for the disk."""
    return min(said, key=lambda durability: int(durability.get("synchronous", 0)))


def check_stored(side: str, stored: int, expected: int) -> None:
    """Raise Unavailable if a side did not do the work it was measured at."""
    if stored != expected:
        raise Unavailable(f"{side} stored {stored} where {expected} were expected: its figure would say nothing")
