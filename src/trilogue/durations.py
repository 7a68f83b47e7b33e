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
        us = duration // timedelta(microseconds=1)
    elif isinstance(duration, str):
        us = _parse(duration)
    else:
        us = round(duration * 1_000_000) if 0 <= duration < LONGEST_US else -1
    if not 0 <= us <= LONGEST_US:
        raise BadOption(f"duration {duration!r} is out of range: expected 0 to 10 years")
    return us


def _parse(text: str) -> int:
    if not _WHOLE.fullmatch(text.strip()):
        raise BadOption(
            f"duration {text!r} is not understood: write a number and a unit (us ms s m h d), as '5m' or '1h30m'"
        )
    return round(sum(float(number) * UNITS_US[unit] for number, unit in _PART.findall(text)))


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
            return f"{us / UNITS_US[unit]:.3g}{unit}"
    return f"{us:.0f}us"
