"""URLs as plain parts, with the sentences that say what is wrong with one.

amqp://user:secret@host:5672/%2f?prefetch=256
└ scheme  └ hidden wherever shown          └ options, each with its range
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from trilogue.errors import BadOption

_SECRET = re.compile(r"(\w*(?:password|passwd|pwd|secret|token)\w*)=[^&#]*", re.IGNORECASE)
Reader = Callable[[str], Any]


def split(url: str) -> SplitResult:
    """The parts of a URL; raises BadOption for what is none."""
    if not isinstance(url, str):
        raise BadOption(f"a URL is a text, as 'sqlite:///file.db': this is {type(url).__qualname__}")
    url = url.strip()
    if not url.isprintable():
        raise BadOption(f"{redacted(url)!r} has a line break or control character in it: remove it")
    if "#" in url:
        raise BadOption(f"{redacted(url)!r}: everything after # would be lost; write %23 for a # that is meant")
    try:
        return urlsplit(url)
    except ValueError:  # its text may contain the password
        raise BadOption(f"{redacted(url)!r} is no URL: check the brackets, they belong around IPv6 addresses only") from None


def options(query: str, url: str, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """The options of a URL, each read by its own reader, which raises ValueError saying what was expected.

    Raises BadOption for one that is unknown, given twice or out of its range.
    """
    found: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in readers:
            near = difflib.get_close_matches(name, readers, 1)
            raise BadOption(
                f"{redacted(url)!r}: unknown option {name!r}; there are {', '.join(readers)}" + (f"; {near[0]}?" if near else "")
            )
        if name in found:
            raise BadOption(f"{redacted(url)!r}: option {name!r} is given twice")
        try:
            found[name] = readers[name](text)
        except ValueError as error:
            raise BadOption(f"{redacted(url)!r}: option {name}={text!r} is out of range: expected {error}") from None
    return found


def whole(low: int, high: int) -> Reader:
    """A reader of whole numbers."""
    return _number(int, low, high)


def number(low: float, high: float) -> Reader:
    """A reader of numbers."""
    return _number(float, low, high)


def _number(kind: Callable[[str], Any], low: float, high: float) -> Reader:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise ValueError(f"{low} to {high}")
        return value

    return read


def one_of(*words: str) -> Reader:
    """A reader of one of some words."""

    def read(text: str) -> str:
        if text not in words:
            raise ValueError(" or ".join(words))
        return text

    return read


def redacted(url: str) -> str:
    """The URL as it may be shown: without a password."""
    url = _SECRET.sub(r"\1=***", url)
    scheme, sep, rest = url.partition("://") if "://" in url else url.partition(":")
    # Up to the last @, wherever a password that was not encoded has its slashes; a path that begins at once has no user.
    user, at, host = ("", "", rest) if rest.startswith("/") else rest.rpartition("@")
    return f"{scheme}{sep}{user.partition(':')[0]}:***@{host}" if at else url
