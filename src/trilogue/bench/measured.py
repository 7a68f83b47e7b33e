"""What one measurement says: how fast it was, and how durable the very connection was that did it.

Measured(2_410.0, {"synchronous": 2, "journal_mode": "wal", "wal_autocheckpoint": 4000, "sqlite": "3.54.1"})
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trilogue.errors import Unavailable

Pragmas = dict[str, str | int]
READ_BACK = ("synchronous", "journal_mode", "wal_autocheckpoint")
CHECKPOINT_PAGES = 4_000  # every side writes back as often: a checkpoint is an fsync too


@dataclass(frozen=True, slots=True)
class Measured:
    """rate: per second. pragmas: of the connection that wrote, read back from it. way: how it was done, if there are several."""

    rate: float
    pragmas: Pragmas | None = None
    way: str = ""


def pragmas_of(read: Callable[[str], Any], sqlite: str) -> Pragmas:
    """What decides how often a connection waits for the disk; read: the value of one pragma."""
    return {name: read(name) for name in READ_BACK} | {"sqlite": sqlite}


def weakest(said: Sequence[Pragmas]) -> Pragmas:
    """Of several connections the one that waits least for the disk."""
    return min(said, key=lambda pragmas: int(pragmas["synchronous"]))


def check_stored(side: str, stored: int, expected: int) -> None:
    """Raise Unavailable if a side did not do the work it was measured at."""
    if stored != expected:
        raise Unavailable(f"{side} stored {stored} where {expected} were expected: its figure would say nothing")
