import io
import json
import sys

import pytest

from trilogue.cli import output
from trilogue.cli.output import safe, safe_lines, say_json, say_table, shown, stamp
from trilogue.events import Record


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain ünïcödé 映画", "plain ünïcödé 映画"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("\udcff\ud800", "\\udcff\\ud800"),
        ("\u2028", "\\u2028"),
    ],
)
def test_what_could_drive_a_terminal_is_written_out(text: str, written: str) -> None:
    assert safe(text) == written


def test_line_ends_of_a_traceback_stay() -> None:
    assert safe_lines("a\n  b\x1b\n") == "a\n  b\\x1b"


def test_a_long_payload_is_cut_and_its_size_named() -> None:
    assert shown(b"x" * 1_000) == "x" * 1_000
    assert shown(b"x" * 5_000) == "x" * 1_000 + "… (5,000 bytes)"
    assert shown(b"\xff\xfe") == "\\xff\\xfe"


def test_times_are_utc() -> None:
    assert stamp(1_700_000_000_123_456) == "2023-11-14T22:13:20.123Z"


def test_json_escapes_everything_but_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    say_json({"a": "\x1b\u202eé"}, line=True)
    text = capsys.readouterr().out
    assert text.isascii()
    assert "\x1b" not in text
    assert json.loads(text) == {"a": "\x1b\u202eé"}


def test_a_payload_that_is_no_json_is_base64() -> None:
    assert output.record_fields(Record("1", "a", b'{"n":1}'))["data"] == {"n": 1}
    assert output.record_fields(Record("1", "a", b"\x00\xff"))["data_base64"] == "AP8="
    assert output.record_fields(Record("1", "a", b'"\xff"'))["data_base64"] == "Iv8i"
    assert "data_base64" in output.record_fields(Record("1", "a", b"[" * 100_000))
    assert "data_base64" in output.record_fields(Record("1", "a", b"9" * 5_000))


def test_a_table_lines_up_and_numbers_stand_right(capsys: pytest.CaptureFixture[str]) -> None:
    say_table(("name", "count"), [("映画", 1), ("b\x1b", 12_345)])
    assert capsys.readouterr().out == "name    count\n映画        1\nb\\x1b  12,345\n"


def test_an_empty_table_has_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    say_table(("name", "count"), [])
    assert capsys.readouterr().out == "name  count\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_narrow_terminal_gets_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    say_table(("name", "count"), [("a-rather-long-group", 1)])
    assert terminal.getvalue() == "name: a-rather-long-group\ncount: 1\n\n"


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("publishing", 3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_progress_shows_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with output.progress("publishing", 3) as advance:
        advance(3)
    assert "publishing" in terminal.getvalue()
