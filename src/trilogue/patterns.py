"""Which event types a group reads: AMQP topic patterns.

    video.watched      that type
    video.*            one more word            video.watched, not video.quality.changed
    video.#            any number of words      video, video.watched, video.quality.changed
    #                  everything

A type is 1 to 32 words of letters, digits, `_` and `-`, separated by dots, 255 characters at most (AMQP's own limit).
"""

import re
from collections.abc import Iterable

from trilogue.errors import BadPattern

TYPE_CHARS = 255
_WORD = r"[A-Za-z0-9_-]+"
_TYPE = re.compile(rf"{_WORD}(?:\.{_WORD}){{0,31}}", re.ASCII)
_PATTERN = re.compile(rf"(?:{_WORD}|\*|#)(?:\.(?:{_WORD}|\*|#)){{0,31}}", re.ASCII)


def check_type(name: str) -> str:
    """The name itself if it can be an event type; raises BadPattern otherwise."""
    if isinstance(name, str) and len(name) <= TYPE_CHARS and _TYPE.fullmatch(name):
        return name
    raise BadPattern(
        f"event type {name!r} is not allowed: expected words of letters, digits, _ and - separated by dots, as 'video.watched'"
    )


def check_pattern(pattern: str) -> str:
    """The pattern itself if it is one; raises BadPattern otherwise."""
    if isinstance(pattern, str) and len(pattern) <= TYPE_CHARS and _PATTERN.fullmatch(pattern):
        return pattern
    raise BadPattern(
        f"pattern {pattern!r} is not understood: expected words separated by dots, `*` for one word, `#` for any number, "
        "as 'video.*' or 'video.#'"
    )


def is_wild(pattern: str) -> bool:
    """Whether the pattern can mean more than one type."""
    return "*" in pattern or "#" in pattern


def matches(pattern: str, event_type: str) -> bool:
    """Whether the pattern means this type.

    >>> matches("video.#", "video")
    True
    """
    # The set of places in the pattern that the words read so far can have led to: linear, where backtracking is not.
    words = pattern.split(".")
    places = _skip_hashes(words, {0})
    for word in event_type.split("."):
        places = _skip_hashes(words, {after for place in places for after in _step(words, place, word)})
    return len(words) in places


def _step(words: list[str], place: int, word: str) -> Iterable[int]:
    if place == len(words):
        return ()
    if words[place] == "#":
        return (place,)
    return (place + 1,) if words[place] in ("*", word) else ()


def _skip_hashes(words: list[str], places: set[int]) -> set[int]:
    """A `#` may also mean no word at all."""
    reached = set(places)
    for place, word in enumerate(words):
        if word == "#" and place in reached:
            reached.add(place + 1)
    return reached


def matches_any(patterns: Iterable[str], event_type: str) -> bool:
    """Whether at least one of the patterns means this type."""
    return any(matches(pattern, event_type) for pattern in patterns)
