"""A watch log read from files, as watches in order of time.

    ratings.csv + movies.csv ┐                ┌─> Watch ──> temporary table ──> sorted by time, ties in file order
    CSV, TSV, JSON Lines     ├─ lines ─ rows ─┤
    the same as .gz, or `-`  ┘                └─> bad row ──> rejects file

Memory is bounded whatever the size: a line holds 1 MiB at most, and the rows are sorted in a temporary SQLite database that
spills to disk (25 million rows want about 2 GB there). Only a MovieLens folder's movies.csv is held whole.
A line is a row: quoted fields hold no line breaks, so a forgotten quote costs one row and not the rest of the file.
"""

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import apsw
import msgspec

from trilogue.apps.video.rejects import Rejects
from trilogue.apps.video.watch import BadRow, Watch, make_watch, split_genres
from trilogue.errors import BadOption

FIELDS = ("user", "video", "time", "title", "genres")
NEEDED = FIELDS[:3]
ALIASES = {
    "user": ("user", "user_id", "userid", "uid"),
    "video": ("video", "video_id", "videoid", "movie", "movie_id", "movieid", "film", "item", "item_id"),
    "time": ("time", "timestamp", "watched_at", "date", "datetime", "ts"),
    "title": ("title", "name"),
    "genres": ("genres", "genre"),
}
LINE_BYTES = 1 << 20
SORT_CACHE_KIB = 32_768
_CHUNK = 5_000

Columns = dict[str, str]
Titles = dict[str, tuple[str, tuple[str, ...]]]


class Line(NamedTuple):
    """One line of a file. number: from 1. error: why it cannot be a row, or empty."""

    number: int
    text: str
    error: str = ""


def read_watches(source: str, columns: Columns | None, rejects: Rejects) -> Iterator[Watch]:
    """The watches of a file, a MovieLens folder or standard input (`-`), sorted by time, each only once.

    columns: which column is the user, video, time, title, genres; None: by their usual names.
    rejects: where bad rows go.
    Raises BadOption if there is no such file, or it has no such columns.
    """
    if source != "-" and Path(source).is_dir():
        return _sorted(_read_movielens(Path(source), columns, rejects))
    check_source(source)
    return _sorted(_read_file(source, columns, rejects))


def check_source(source: str) -> None:
    """Raise BadOption if there is nothing to read at `source` (a file, a MovieLens folder or `-`)."""
    path = Path(source)
    if source == "-" or path.is_file():
        return
    if not path.exists():
        raise BadOption(f"input {source!r} does not exist: expected a file, a MovieLens folder, or - for standard input")
    if not _beside(path, "ratings.csv"):
        raise BadOption(f"input {source!r} is a folder without ratings.csv: expected a MovieLens folder or a file")


def parse_columns(text: str | None) -> Columns | None:
    """`user=userId,video=movieId,time=timestamp` as a dict; raises BadOption."""
    if text is None:
        return None
    columns: Columns = {}
    for part in text.split(","):
        field, _, name = part.partition("=")
        if field.strip() not in FIELDS or not name.strip():
            raise BadOption(
                f"columns part {part!r} is not understood: expected user=NAME,video=NAME,time=NAME (also title=, genres=)"
            )
        columns[field.strip()] = name.strip()
    if missing := [field for field in NEEDED if field not in columns]:
        raise BadOption(f"columns {text!r} say nothing of {' and '.join(missing)}: expected user=NAME,video=NAME,time=NAME")
    return columns


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_movielens(folder: Path, columns: Columns | None, rejects: Rejects) -> Iterator[Watch]:
    ratings = _beside(folder, "ratings.csv")
    if ratings is None:
        raise BadOption(f"input '{folder}' is a folder without ratings.csv: expected a MovieLens folder or a file")
    movies = _beside(folder, "movies.csv")
    titles = _read_titles(movies, rejects) if movies else {}
    for watch in _read_file(str(ratings), columns, rejects):
        title, genres = titles.get(watch.video, (watch.title, watch.genres))
        yield watch._replace(title=title, genres=genres)


def _beside(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_titles(path: Path, rejects: Rejects) -> Titles:
    titles: Titles = {}
    names = {"video": "movieId", "title": "title", "genres": "genres"}
    for line, row in _rows(str(path), names, tuple(names)):
        try:
            if isinstance(row, BadRow):
                raise row
            titles[row["video"]] = (row["title"] or row["video"], split_genres(row.get("genres")))
        except BadRow as error:
            rejects.add(path.name, line.number, str(error), line.text)
    return titles


def _read_file(source: str, columns: Columns | None, rejects: Rejects) -> Iterator[Watch]:
    for line, row in _rows(source, columns, NEEDED):
        try:
            if isinstance(row, BadRow):
                raise row
            yield make_watch(row.get("user"), row.get("video"), row.get("time"), row.get("title"), row.get("genres"))
        except BadRow as error:
            rejects.add(_label(source), line.number, str(error), line.text)


def _rows(source: str, columns: Columns | None, needed: tuple[str, ...]) -> Iterator[tuple[Line, dict[str, Any] | BadRow]]:
    """Each line with its row: values by field, or why there are none."""
    with _open(source) as stream:
        lines = (line for line in _lines(stream, source) if line.error or line.text.strip())
        first = next(lines, None)
        if first is None:
            raise BadOption(f"input {source!r} is empty: expected a header line or JSON Lines")
        if _is_json(source, first.text):
            parse = _json_parser(columns)
            yield first, _parsed(parse, first)
        else:
            parse = _csv_parser(source, first.text, columns, needed)
        for line in lines:
            yield line, _parsed(parse, line)


def _parsed(parse: Callable[[str], dict[str, Any]], line: Line) -> dict[str, Any] | BadRow:
    try:
        return BadRow(line.error) if line.error else parse(line.text)
    except BadRow as error:
        return error


@contextmanager
def _open(source: str) -> Iterator[BinaryIO]:
    """The bytes of a file or of standard input, unpacked if they are gzip."""
    try:
        raw: Any = sys.stdin.buffer if source == "-" else open(source, "rb")  # noqa: SIM115 - closed below, standard input is not
    except OSError as error:
        raise BadOption(f"input {source!r} cannot be opened: {error.strerror}") from None
    try:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        yield io.BufferedReader(gzip.GzipFile(fileobj=raw)) if packed else raw
    finally:
        if source != "-":
            raw.close()


def _lines(stream: BinaryIO, source: str) -> Iterator[Line]:
    number = 0
    try:
        while data := stream.readline(LINE_BYTES + 1):
            number += 1
            yield _line(stream, number, data)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise BadOption(f"input {source!r} is a damaged gzip file after line {number}: unpack what is left of it first") from None


def _line(stream: BinaryIO, number: int, data: bytes) -> Line:
    if len(data) > LINE_BYTES:
        while data and not data.endswith(b"\n"):
            data = stream.readline(LINE_BYTES)
        return Line(number, "", f"the line is longer than {LINE_BYTES:,} bytes")
    try:
        return Line(number, data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"))
    except UnicodeDecodeError:
        return Line(number, data.decode("utf-8", "backslashreplace").rstrip("\r\n"), "the line is not UTF-8")


def _label(source: str) -> str:
    return "standard input" if source == "-" else Path(source).name


# ── lines to rows ────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_json(source: str, first: str) -> bool:
    name = source.removesuffix(".gz")
    if first.lstrip().startswith("["):
        raise BadOption(f"input {source!r} is one JSON array: expected JSON Lines, one object on each line")
    return name.endswith((".jsonl", ".ndjson")) or first.lstrip().startswith("{")


def _json_parser(columns: Columns | None) -> Callable[[str], dict[str, Any]]:
    decode = msgspec.json.Decoder().decode
    spellings = {field: (name,) for field, name in columns.items()} if columns else ALIASES

    def parse(text: str) -> dict[str, Any]:
        try:
            found = decode(text)
        except (msgspec.DecodeError, UnicodeEncodeError):
            raise BadRow("the line is not JSON") from None
        if not isinstance(found, dict):
            raise BadRow("the line is not a JSON object")
        lowered = found if columns else {name.lower(): value for name, value in found.items()}
        return {field: next((lowered[n] for n in names if n in lowered), None) for field, names in spellings.items()}

    return parse


def _csv_parser(source: str, header: str, columns: Columns | None, needed: tuple[str, ...]) -> Callable[[str], dict[str, Any]]:
    delimiter = "\t" if source.removesuffix(".gz").endswith(".tsv") else max(",\t;|", key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
    places = _places(source, names, columns, needed)

    def parse(text: str) -> dict[str, Any]:
        try:
            values = next(csv.reader((text,), delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise BadRow(f"the line is not {_kind(delimiter)}: {error}") from None
        if len(values) != len(names):
            raise BadRow(f"{len(values)} columns where the header has {len(names)}")
        return {field: values[place] for field, place in places.items()}

    return parse


def _kind(delimiter: str) -> str:
    return "TSV" if delimiter == "\t" else "CSV"


def _places(source: str, names: list[str], columns: Columns | None, needed: tuple[str, ...]) -> dict[str, int]:
    if columns:
        return {field: _place(source, names, name) for field, name in columns.items()}
    lowered = [name.lower() for name in names]
    places = {
        field: next(lowered.index(name) for name in aliases if name in lowered)
        for field, aliases in ALIASES.items()
        if any(name in lowered for name in aliases)
    }
    if missing := [field for field in needed if field not in places]:
        raise BadOption(
            f"input {source!r} has no column for {' and '.join(missing)} among {_listed(names)}: "
            "say which with --columns user=NAME,video=NAME,time=NAME"
        )
    return places


def _place(source: str, names: list[str], name: str) -> int:
    if name in names:
        return names.index(name)
    near = get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise BadOption(f"input {source!r} has no column {name!r}, only {_listed(names)}{hint}")


def _listed(names: list[str]) -> str:
    return ascii(", ".join(names[:20])[:200])


# ── in order of time ─────────────────────────────────────────────────────────────────────────────────────────────────


def _sorted(watches: Iterator[Watch]) -> Iterator[Watch]:
    """The watches by time, ties as they came, a repeated (time, user, video) only once."""
    table = apsw.Connection("")  # a private temporary database, on disk as far as it outgrows its cache
    try:
        table.execute(f"pragma journal_mode = off; pragma cache_size = -{SORT_CACHE_KIB}").fetchall()
        table.execute("create table watches (time_us integer, user text, video text, title text, genres text)")
        while chunk := [(*watch[:4], "|".join(watch.genres)) for watch in islice(watches, _CHUNK)]:
            with table:
                table.executemany("insert into watches values (?, ?, ?, ?, ?)", chunk)
        yield from _once(table.execute("select * from watches order by time_us, rowid"))
    finally:
        table.close()


def _once(rows: Iterator[tuple[Any, ...]]) -> Iterator[Watch]:
    now_us, met = -1, set[tuple[str, str]]()
    for time_us, user, video, title, genres in rows:
        if time_us != now_us:
            now_us, met = time_us, set()
        if (user, video) in met:
            continue
        met.add((user, video))
        yield Watch(time_us, user, video, title, tuple(genres.split("|")) if genres else ())
