"""One watch as the sources give it, and how each field of a row becomes one.

user   text, 1 to 512 characters
video  text, 1 to 512 characters
time   seconds, milliseconds or microseconds since 1970 (told apart by size), or ISO 8601 (UTC if it names no zone)
title  text; the video itself if there is none
genres "Drama|Comedy" or a list; none if there are none
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from trilogue.apps.video.events import WatchStarted, as_datetime, as_us, session_id

TEXT_CHARS = 512
LATEST_US = 253_402_300_799_000_000  # the end of year 9999, the last a datetime can hold
_NUMBER = re.compile(r"[+-]?\d{1,18}(\.\d{1,18})?", re.ASCII)
_NO_GENRES = "(no genres listed)"


class Watch(NamedTuple):
    """A user watched a video. time_us: microseconds since 1970."""

    time_us: int
    user: str
    video: str
    title: str
    genres: tuple[str, ...] = ()


def as_event(watch: Watch) -> WatchStarted:
    """The event of a watch."""
    session = session_id(watch.user, watch.video, watch.time_us)
    return WatchStarted(watch.user, watch.video, watch.title, watch.genres, session, as_datetime(watch.time_us))


class BadRow(ValueError):
    """Why a row is no watch."""


def make_watch(user: Any, video: Any, time: Any, title: Any = None, genres: Any = None) -> Watch:
    """A Watch from a row's raw values; raises BadRow with the reason."""
    name = _text("video", video)
    return Watch(
        _time_us(time),
        _text("user", user),
        name,
        _text("title", title) if title not in (None, "") else name,
        split_genres(genres),
    )


def split_genres(value: Any) -> tuple[str, ...]:
    """Genres from "Drama|Comedy", from a list of names, or from nothing; raises BadRow."""
    if value is None or value in ("", _NO_GENRES):
        return ()
    if isinstance(value, str):
        return tuple(_text("genre", part) for part in value.split("|") if part.strip())
    if isinstance(value, Sequence) and all(isinstance(part, str) for part in value):
        return split_genres("|".join(value))
    raise BadRow(f"genres {_short(value)} are not understood: expected 'Drama|Comedy' or a list of names")


def _text(field: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise BadRow(f"{field} {_short(value)} is not a text")
    text = "" if value is None else str(value).strip()
    if not text:
        raise BadRow(f"{field} is missing")
    if len(text) > TEXT_CHARS:
        raise BadRow(f"{field} is longer than {TEXT_CHARS} characters")
    if "\0" in text:
        raise BadRow(f"{field} has a zero character in it, which not every database can store")
    if not text.isascii() and not _is_unicode(text):
        raise BadRow(f"{field} is not UTF-8")
    return text


def _is_unicode(text: str) -> bool:
    """Lone surrogates come from bytes that are not UTF-8, or from a JSON escape; no log can store them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _time_us(value: Any) -> int:
    if value is None or value == "":
        raise BadRow("time is missing")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"time {_short(value)} is unreadable")
    text = str(value).strip()
    us = _scaled(text) if _NUMBER.fullmatch(text) else _from_iso(text)
    if us < 0:
        raise BadRow(f"time {_short(text)} is negative")
    if us > LATEST_US:
        raise BadRow(f"time {_short(text)} is after the year 9999")
    return us


def _scaled(text: str) -> int:
    """Seconds reach 10^11 in the year 5138; what is larger counts milliseconds, and from 10^14 on microseconds."""
    number = float(text) if "." in text else int(text)
    if number < 1e11:
        return round(number * 1_000_000)
    return round(number * 1_000) if number < 1e14 else round(number)


def _from_iso(text: str) -> int:
    try:
        when = datetime.fromisoformat(text)
        return as_us(when if when.tzinfo else when.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        raise BadRow(
            f"time {_short(text)} is unreadable: expected seconds since 1970, or ISO 8601 as 2026-01-31T20:15:00Z"
        ) from None


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
