"""URLs to stores.

    memory://                         gone with the process
    sqlite:///video.db                relative to the current folder
    sqlite:////var/lib/app/video.db   absolute

Options: `?lease_s=10` how long a dead worker's keys wait at most; `?payload_bytes=1048576` the largest event;
`?wal_bytes=…` how large the write-ahead log may grow while a reader keeps it.
"""

import difflib
import re
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from trilogue.errors import BadOption, UnknownScheme, Unsupported
from trilogue.ports import Store
from trilogue.stores.store import SqlStore

SCHEMES = ("memory", "sqlite", "postgresql", "amqp", "kafka")
_NOT_YET = {"postgresql", "amqp", "kafka"}
_OPTIONS: dict[str, tuple[float, float]] = {
    "lease_s": (0.1, 3600),
    "payload_bytes": (1, 1 << 30),
    "wal_bytes": (1 << 20, 1 << 45),
}
_SECRET = re.compile(r"(\w*(?:password|passwd|pwd|secret|token)\w*)=[^&#]*", re.IGNORECASE)


def open_store(url: str) -> Store:
    """The store behind a URL, not opened yet.

    Raises UnknownScheme, Unsupported, BadOption; each names what would be right.
    """
    parts = _split(url)
    if parts.scheme not in SCHEMES:
        near = difflib.get_close_matches(parts.scheme, SCHEMES, 1)
        hint = f"did you mean {near[0]}://?" if near else "expected memory:// or sqlite:///file.db"
        raise UnknownScheme(f"{redacted(url)!r}: there is no log behind {parts.scheme or 'no scheme'!r}; {hint}")
    if parts.scheme in _NOT_YET:
        raise Unsupported(f"{parts.scheme}:// is not there yet in this release; use memory:// or sqlite:///file.db")
    options = _options(parts.query, url)
    if parts.scheme == "memory":
        if parts.netloc or parts.path.strip("/"):
            raise BadOption(f"{redacted(url)!r}: a memory:// log has no name, each App has its own; write memory:// alone")
        return SqlStore(":memory:", "memory://", **options)  # type: ignore[arg-type]
    return SqlStore(str(_path(parts.netloc, parts.path, url)), redacted(url), **options)  # type: ignore[arg-type]


def _split(url: str) -> SplitResult:
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


def _path(host: str, path: str, url: str) -> Path:
    if host or not path.startswith("/") or path.endswith("/"):
        raise BadOption(f"{redacted(url)!r} names no file: write sqlite:///relative.db or sqlite:////absolute/path.db")
    if path == "/:memory:":
        raise BadOption(f"{redacted(url)!r} is no file: write memory://")
    try:
        file = Path(unquote(path[1:], errors="strict")).expanduser()
    except (UnicodeDecodeError, RuntimeError) as error:
        raise BadOption(f"{redacted(url)!r}: its path cannot be read: {error}") from error
    if not str(file).isprintable():
        raise BadOption(f"{redacted(url)!r} has a control character in its path: remove it")
    return file


def _options(query: str, url: str) -> dict[str, float | int]:
    options: dict[str, float | int] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, 1)
            raise BadOption(
                f"{redacted(url)!r}: unknown option {name!r}; there are {', '.join(_OPTIONS)}" + (f"; {near[0]}?" if near else "")
            )
        if name in options:
            raise BadOption(f"{redacted(url)!r}: option {name!r} is given twice")
        options[name] = _number(name, text, url)
    return options


def _number(name: str, text: str, url: str) -> float | int:
    low, high = _OPTIONS[name]
    try:
        value = float(text) if name == "lease_s" else int(text)
    except ValueError:
        value = -1
    if not low <= value <= high:
        raise BadOption(f"{redacted(url)!r}: option {name}={text!r} is out of range: expected {low} to {high}")
    return value


def redacted(url: str) -> str:
    """The URL as it may be shown: without a password."""
    url = _SECRET.sub(r"\1=***", url)
    scheme, sep, rest = url.partition("://") if "://" in url else url.partition(":")
    # Up to the last @, wherever a password that was not encoded has its slashes; a path that begins at once has no user.
    user, at, host = ("", "", rest) if rest.startswith("/") else rest.rpartition("@")
    return f"{scheme}{sep}{user.partition(':')[0]}:***@{host}" if at else url
