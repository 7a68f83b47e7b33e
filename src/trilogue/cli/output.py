"""What people and programs see: text made safe, times, tables, JSON, progress.

    'u1\x1b]0;owned\x07'  ──safe──>  'u1\\x1b]0;owned\\x07'        a payload cannot drive the terminal it is shown on

Results go to standard output, everything else (notes, questions, progress) to standard error.
"""

import base64
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from trilogue.codec import to_cloudevent
from trilogue.events import Record, as_datetime

# C0, C1 and DEL drive the terminal, bidirectional marks and line separators reorder what is seen, surrogates cannot be
# written at all.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_BEYOND_ASCII = re.compile("[^\x20-\x7e]")
_PASSWORD = re.compile(r"(://[^:/@\s]*):[^/\s]*@")
SHOWN_CHARS = 1_000
GAP = "  "


def safe(text: str) -> str:
    r"""The text with everything that could drive a terminal written out.

    >>> safe("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def safe_lines(text: str) -> str:
    """Like safe(), for text of several lines: its line ends stay."""
    return "\n".join(safe(line) for line in text.splitlines())


def shown(data: bytes) -> str:
    """A payload as one safe line, cut after 1,000 characters with its size named."""
    text = safe(data[: 4 * SHOWN_CHARS].decode("utf-8", "backslashreplace"))
    return text if len(data) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}… ({len(data):,} bytes)"


def redacted(text: str) -> str:
    """The text without the passwords of the URLs in it.

    >>> redacted("no such host: amqp://me:sesame@host/")
    'no such host: amqp://me:***@host/'
    """
    return _PASSWORD.sub(r"\1:***@", text)


def stamp(us: int) -> str:
    """Microseconds since 1970 as text.

    >>> stamp(0)
    '1970-01-01T00:00:00.000Z'
    """
    return as_datetime(us).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def say(text: str) -> None:
    """Print a result."""
    print(text)


def note(text: str) -> None:
    """Print a remark beside the result, to standard error."""
    print(text, file=sys.stderr)


def flush() -> None:
    """Hand over what has been printed; fails here and not later where nobody reads it any more."""
    if sys.stdout is not None:
        sys.stdout.flush()


def clear_screen() -> None:
    """Start at the top of an empty screen, if standard output is one."""
    Console(file=sys.stdout).clear()


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def say_table(columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> None:
    """Print rows under column names; one `name: value` block per row where the terminal is too narrow for that."""
    console = Console(file=sys.stdout, highlight=False)
    lines = [list(columns)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    if console.is_terminal and sum(widths) + len(GAP) * (len(widths) - 1) > console.width:
        for cells in lines[1:]:
            say("\n".join(f"{name}: {cell}" for name, cell in zip(columns, cells, strict=True)) + "\n")
        return
    right = [bool(rows) and not isinstance(value, str) for value in (rows[0] if rows else columns)]
    header = _line(lines[0], widths, right)
    if console.is_terminal:
        console.print(Text(header, style="bold"), soft_wrap=True)
    else:
        say(header)
    for cells in lines[1:]:
        say(_line(cells, widths, right))


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = []
    for cell, width, to_right in zip(cells, widths, right, strict=True):
        blanks = " " * (width - cell_len(cell))
        padded.append(blanks + cell if to_right else cell + blanks)
    return GAP.join(padded).rstrip()


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return safe(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def say_json(document: Any, *, line: bool = False) -> None:
    """Print a JSON document; line: on one line."""
    # Everything but ASCII is escaped: any locale can write it, and no terminal is driven by it.
    say(json.dumps(document, indent=None if line else 2))


def say_cloudevent(record: Record) -> None:
    """Print a Record as a CloudEvent on one line, in ASCII; its numbers as they are stored."""
    text = msgspec.json.format(to_cloudevent(record), indent=-1).decode()
    say(_BEYOND_ASCII.sub(_escaped, text))


def _escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be").hex()
    return "".join(f"\\u{units[n : n + 4]}" for n in range(0, len(units), 4))


def record_fields(record: Record) -> dict[str, Any]:
    """A Record for JSON; its payload as `data` if it is JSON, as `data_base64` otherwise."""
    fields: dict[str, Any] = {
        "position": record.position,
        "recorded": stamp(record.recorded_us),
        "type": record.type,
        "schema_version": record.schema_version,
        "key": record.key,
        "id": record.id,
        "time": stamp(record.time_us),
        "source": record.source,
    }
    for name in ("stream", "version", "correlation_id", "causation_id"):
        if (value := getattr(record, name)) is not None:
            fields[name] = value
    return fields | _data(record.data)


def _data(data: bytes) -> dict[str, Any]:
    try:
        return {"data": json.loads(data)}
    except (ValueError, RecursionError):
        return {"data_base64": base64.b64encode(data).decode("ascii")}


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Advance(Protocol):
    """Called with how much has been done since the last call."""

    def __call__(self, by: int, /) -> None: ...


@contextmanager
def progress(what: str, total: int | None, *, hidden: bool = False) -> Iterator[Advance]:
    """A progress bar on standard error while the block runs, if that is a terminal.

    total: how much there is to do; None if unknown. hidden: no bar, as where somebody is typing on the same terminal.
    """
    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), TaskProgressColumn(show_speed=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda by: bar.advance(task, by)
