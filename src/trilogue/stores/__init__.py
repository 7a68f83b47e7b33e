"""URLs to stores.

    memory://                         gone with the process
    sqlite:///video.db                relative to the current folder
    sqlite:////var/lib/app/video.db   absolute

Options: `?lease_s=10` how long a dead worker's keys wait at most; `?payload_bytes=1048576` the largest event;
`?wal_bytes=…` how large the write-ahead log may grow while a reader keeps it.
"""

import difflib
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

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


def open_store(url: str) -> Store:
    """The store behind a URL, not opened yet.

    Raises UnknownScheme, Unsupported, BadOption; each names what would be right.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in SCHEMES:
        near = difflib.get_close_matches(parts.scheme, SCHEMES, 1)
        hint = f"did you mean {near[0]}://?" if near else "expected memory:// or sqlite:///file.db"
        raise UnknownScheme(f"{redacted(url)!r}: there is no log behind {parts.scheme or 'no scheme'!r}; {hint}")
    if parts.scheme in _NOT_YET:
        raise Unsupported(f"{parts.scheme}:// is not there yet in this release; use memory:// or sqlite:///file.db")
    options = _options(parts.query, url)
    if parts.scheme == "memory":
        return SqlStore(":memory:", "memory://", **options)  # type: ignore[arg-type]
    return SqlStore(str(_path(parts.netloc, parts.path, url)), redacted(url), **options)  # type: ignore[arg-type]


def _path(host: str, path: str, url: str) -> Path:
    if host or not path.startswith("/") or path == "/":
        raise BadOption(f"{redacted(url)!r} names no file: write sqlite:///relative.db or sqlite:////absolute/path.db")
    return Path(unquote(path[1:])).expanduser()


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
        raise BadOption(f"{redacted(url)!r}: option {name}={text!r} is out of range: expected {low:g} to {high:g}")
    return value


def redacted(url: str) -> str:
    """The URL as it may be shown: without a password."""
    scheme, sep, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    name = user.partition(":")[0]
    return f"{scheme}{sep}{name}:***@{host}{slash}{path}" if at else url
