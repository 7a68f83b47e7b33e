"""Durations as people write them: `"250ms"`, `"5m"`, `"1h30m"`, a timedelta, or seconds as a number."""

import re
from datetime import timedelta

from trilogue.errors import BadOption

Duration = str | float | timedelta

UNITS_US = {"us": 1, "ms": 1_000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
LONGEST_US = 3650 * UNITS_US["d"]
_PART = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|m|h|d)")
_WHOLE = re.compile(rf"(?:{_PART.pattern})+", re.ASCII)


def microseconds(duration: Duration) -> int:
    """A duration in whole microseconds.

    duration: `"5m"`, `"1h30m"`, a timedelta, or seconds.
    Raises BadOption for anything else, below zero or above ten years.

    >>> microseconds("1.5s")
    1500000
    """
    if isinstance(duration, timedelta):
        us: float = duration // timedelta(microseconds=1)
    elif isinstance(duration, str):
        us = _parse(duration)
    elif isinstance(duration, (int, float)) and not isinstance(duration, bool):
        us = duration * 1_000_000
    else:
        raise BadOption(f"duration {duration!r} is not understood: expected '5m', a timedelta, or seconds")
    if not 0 <= us <= LONGEST_US:  # also refuses what is not a number, and infinity
        raise BadOption(f"duration {duration!r} is out of range: expected 0 to 10 years")
    return round(us)


def _parse(text: str) -> float:
    if not _WHOLE.fullmatch(text.strip()):
        raise BadOption(f"duration {text!r} is not understood: write a number and a unit (us ms s m h d), as '5m' or '1h30m'")
    return sum(float(number) * UNITS_US[unit] for number, unit in _PART.findall(text))


def seconds(duration: Duration) -> float:
    """A duration in seconds; same arguments and errors as microseconds()."""
    return microseconds(duration) / 1_000_000


def readable(us: float) -> str:
    """A duration for people, in the largest unit that keeps it short.

    >>> readable(90_000_000)
    '1.5m'
    """
    for unit in ("d", "h", "m", "s", "ms"):
        if us >= UNITS_US[unit]:
            count = us / UNITS_US[unit]
            return f"{count:.0f}{unit}" if count >= 100 else f"{count:.3g}{unit}"
    return f"{us:.0f}us"
