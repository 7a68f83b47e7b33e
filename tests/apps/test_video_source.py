"""Watch logs from files: formats, columns, bad rows, order."""

import csv
import gzip
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from trilogue.apps.video.rejects import Rejects
from trilogue.apps.video.source import LINE_BYTES, check_source, parse_columns, read_watches
from trilogue.apps.video.watch import BadRow, Watch, make_watch, split_genres
from trilogue.errors import BadOption

HEADER = "user,video,time\n"


def read(path: Path | str, columns: str | None = None) -> tuple[list[Watch], list[dict[str, str]]]:
    rejected = Path(path if path != "-" else "stdin").absolute().parent / "rejects.csv"
    with Rejects(rejected) as rejects:
        watches = list(read_watches(str(path), parse_columns(columns), rejects))
    text = rejected.read_text(encoding="utf-8") if rejected.exists() else ""
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rejects.count == len(rows)
    return watches, rows


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_is_sorted_by_time_with_ties_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path, "w.csv", HEADER + "u2,b,200\nu1,z,100\nu1,a,100\nu1,m,50\n")
    watches, rejected = read(path)
    assert [(w.user, w.video, w.time_us) for w in watches] == [
        ("u1", "m", 50_000_000),
        ("u1", "z", 100_000_000),
        ("u1", "a", 100_000_000),
        ("u2", "b", 200_000_000),
    ]
    assert not rejected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.csv", "userId,movieId,timestamp,title,genres\nu,v,60,T,A|B\n"),
        ("w.tsv", "user\tvideo\ttime\ttitle\tgenres\nu\tv\t60\tT\tA|B\n"),
        ("w.txt", "user;video;time;title;genres\nu;v;60;T;A|B\n"),
        ("bom.csv", "\ufeffuser,video,time,title,genres\nu,v,60,T,A|B\n"),
        ("crlf.csv", "user,video,time,title,genres\r\nu,v,60,T,A|B\r\n\r\n"),
        ("w.jsonl", '{"user": "u", "video": "v", "time": 60, "title": "T", "genres": ["A", "B"]}\n'),
        ("w.log", '{"userId": "u", "movieId": "v", "timestamp": "1970-01-01T00:01:00Z", "title": "T", "genres": "A|B"}\n'),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_reads_the_same(tmp_path: Path, name: str, content: str, packed: bool) -> None:
    data = content.encode()
    path = write(tmp_path, f"{name}.gz" if packed else name, gzip.compress(data) if packed else data)
    assert read(path) == ([Watch(60_000_000, "u", "v", "T", ("A", "B"))], [])


def test_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "w.csv", "who,what,at,called\nu,v,60,T\n")
    watches, _ = read(path, "user=who,video=what,time=at,title=called")
    assert watches == [Watch(60_000_000, "u", "v", "T")]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(gzip.compress((HEADER + "u,v,1\n").encode()))))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdin", stdin)
    assert [w.video for w in read("-")[0]] == ["v"]


def test_movielens_folder(tmp_path: Path) -> None:
    write(tmp_path, "ratings.csv", "userId,movieId,rating,timestamp\n1,10,4.0,100\n1,11,4.0,90\n2,12,1.0,95\n")
    write(tmp_path, "movies.csv", 'movieId,title,genres\n10,"Heat, The (1995)",Crime|Drama\n11,X,(no genres listed)\n')
    watches, rejected = read(tmp_path)
    assert [(w.title, w.genres) for w in watches] == [("X", ()), ("12", ()), ("Heat, The (1995)", ("Crime", "Drama"))]
    assert not rejected


BAD_LINES = [
    (b"u,v", "2 columns where the header has 3"),
    (b"u,v,1,2", "4 columns where the header has 3"),
    (b",v,1", "user is missing"),
    (b"u, ,1", "video is missing"),
    (b"u,v,", "time is missing"),
    (b"u,v,-3", "time '-3' is negative"),
    (b"u,v,-0.5", "time '-0.5' is negative"),
    (b"u,v,soon", "time 'soon' is unreadable: expected seconds since 1970, or ISO 8601 as 2026-01-31T20:15:00Z"),
    (b"u,v,nan", "time 'nan' is unreadable: expected seconds since 1970, or ISO 8601 as 2026-01-31T20:15:00Z"),
    (b"u,v,999999999999999999", "time '999999999999999999' is after the year 9999"),
    (b"u\xff,v,1", "the line is not UTF-8"),
    (b'u,"v,1', "the line is not CSV: unexpected end of data"),
    (b"x" * 513 + b",v,1", "user is longer than 512 characters"),
    (b"x" * (LINE_BYTES + 10), f"the line is longer than {LINE_BYTES:,} bytes"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason[:30] for _, reason in BAD_LINES])
def test_bad_rows_are_written_down_and_the_rest_goes_on(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path, "w.csv", HEADER.encode() + b"u,v,1\n" + line + b"\nu,w,2\n")
    watches, rejected = read(path)
    assert [w.video for w in watches] == ["v", "w"]
    assert [(row["file"], row["line"], row["reason"]) for row in rejected] == [("w.csv", "3", reason)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "the line is not JSON"),
        ("[1]", "the line is not a JSON object"),
        ('{"user": "u", "video": "v"}', "time is missing"),
        ('{"user": null, "video": "v", "time": 1}', "user is missing"),
        ('{"user": true, "video": "v", "time": 1}', "user True is not a text"),
        ('{"user": "u\\u0000", "video": "v", "time": 1}', "user has a zero character in it, which not every database can store"),
        ('{"user": "u", "video": ["v"], "time": 1}', "video ['v'] is not a text"),
        ('{"user": "u", "video": "v", "time": {}}', "time {} is unreadable"),
        (
            '{"user": "u", "video": "v", "time": 1, "genres": 7}',
            "genres 7 are not understood: expected 'Drama|Comedy' or a list of names",
        ),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path, "w.jsonl", '{"user": 7, "video": 8, "time": 1}\n' + line + "\n")
    watches, rejected = read(path)
    assert watches == [Watch(1_000_000, "7", "8", "8")]
    assert [(row["line"], row["reason"]) for row in rejected] == [("2", reason)]


def test_a_repeated_row_comes_once(tmp_path: Path) -> None:
    path = write(tmp_path, "w.csv", HEADER + "u,v,1\nu,w,1\nu,v,1\nu,v,2\n")
    watches, rejected = read(path)
    assert [(w.video, w.time_us) for w in watches] == [("v", 1_000_000), ("w", 1_000_000), ("v", 2_000_000)]
    assert not rejected


@pytest.mark.parametrize(
    ("value", "us"),
    [
        ("0", 0),
        ("1.5", 1_500_000),
        (964982703, 964982703_000_000),
        (1700000000123, 1700000000123_000),
        ("1700000000123456", 1700000000123456),
        ("2026-01-31T20:15:00Z", 1769890500_000_000),
        ("2026-01-31 20:15:00", 1769890500_000_000),
        ("2026-01-31T21:15:00+01:00", 1769890500_000_000),
    ],
)
def test_times(value: Any, us: int) -> None:
    assert make_watch("u", "v", value).time_us == us


@pytest.mark.parametrize("value", ["", None, "(no genres listed)", "|", []])
def test_no_genres(value: Any) -> None:
    assert split_genres(value) == ()


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(BadRow, match="not UTF-8"):
        make_watch("\ud800", "v", 1)


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("w.csv", "a,b,c\n1,2,3\n", None, "no column for user and video and time"),
        ("w.csv", "a,b,c\n1,2,3\n", "user=a,video=b,time=cc", "no column 'cc'.*did you mean 'c'"),
        ("w.csv", "", None, "is empty"),
        ("w.json", "[\n1]\n", None, "one JSON array"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, name: str, content: str, columns: str | None, message: str
) -> None:
    with pytest.raises(BadOption, match=message):
        read(write(tmp_path, name, content), columns)


def test_a_damaged_gzip_file_is_one_sentence(tmp_path: Path) -> None:
    packed = gzip.compress((HEADER + "".join(f"u{n},v{n * 7919},{n}\n" for n in range(5_000))).encode())
    with pytest.raises(BadOption, match="damaged gzip file after line"):
        read(write(tmp_path, "w.csv.gz", packed[: len(packed) // 2]))


@pytest.mark.parametrize(("name", "message"), [("nothing.csv", "does not exist"), (".", "folder without ratings.csv")])
def test_no_such_input(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        check_source(str(tmp_path / name))


@pytest.mark.parametrize("text", ["user=a", "user=a,video=b,tme=c", "user,video,time", "user=a,video=b,time="])
def test_bad_columns(text: str) -> None:
    with pytest.raises(BadOption, match="expected user=NAME,video=NAME,time=NAME"):
        parse_columns(text)


def test_rejects_that_cannot_be_written_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="cannot be written"):
        Rejects(tmp_path / "no" / "such.csv").add("f", 1, "why", "text")
