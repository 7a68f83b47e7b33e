"""What people type wrong: one sentence, the right exit code, nothing left behind, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trilogue.cli.main import main

Captured = pytest.CaptureFixture[str]
HELP = ["--help", "tail --help", "dead --help", "dead drop -h", "demo video --help", "--version"]
LOOKING = ["status", "tail --no-follow", "dead list", "dead show 1", "dead drop --all", "replay g --to now"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRILOGUE_URL", raising=False)
    monkeypatch.delenv("TRILOGUE_DEBUG", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("stauts", "'status'|\"status\""),
        ("dead lst", '"list"'),
        ("status --wach", "--watch"),
        ("tail --limit 0", "--limit"),
        ("tail --limit -1", "--limit"),
        ("tail --limit abc", "--limit"),
        ("tail --limit 1e9", "--limit"),
        ("tail --after -1", "--after"),
        ("tail video..x", "video.*"),
        ("publish video.watched", "JSON"),
        ("publish video..watched {}", "video.watched"),
        ("publish a {} --delay 5x", "5m"),
        ("publish a - --id x", "--id"),
        ("run video", "MODULE:APP"),
        ("run video:app --workers 0", "--workers"),
        ("replay badge", "--to"),
        ("replay badge --to begining", "'beginning'"),
        ("replay badge --to 2999-01-01", "future"),
        ("replay badge --to 5x-ago", "5m"),
        ("status --url sqlit:///x.db", "sqlite"),
        ("status --url memory://", "sqlite:///"),
        ("--url sqlite:///x.db status", "--url"),
        ("dead redrive --all 3", "--all"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(line: str, said: str, capsys: Captured, folder: Path) -> None:
    (folder / "trilogue.db").touch()
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert any(each in err for each in said.split("|"))


@pytest.mark.parametrize("line", ["", "dead", "demo"])
def test_nothing_to_do_prints_the_usage(line: str, capsys: Captured) -> None:
    assert main(line.split()) == 2
    assert "Usage: trilogue" in capsys.readouterr().out


@pytest.mark.parametrize("line", HELP)
def test_help_is_no_mistake(line: str, capsys: Captured) -> None:
    assert main(line.split()) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", LOOKING)
def test_looking_at_a_missing_file_does_not_make_it(line: str, capsys: Captured, folder: Path) -> None:
    assert main(line.split()) == 1
    assert "there is no log at trilogue.db" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_a_file_that_is_no_log_is_refused(capsys: Captured, folder: Path) -> None:
    (folder / "trilogue.db").write_bytes(b"not a database, but long enough to be looked at" * 100)
    assert main(["status"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "trilogue.db" in err


@pytest.mark.parametrize("debug", ["--debug", "TRILOGUE_DEBUG"])
def test_debug_shows_the_traceback(debug: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    if debug == "TRILOGUE_DEBUG":
        monkeypatch.setenv(debug, "1")
        assert main(["status"]) == 1
    else:
        assert main(["status", debug]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: there is no log")


def test_a_control_character_in_an_argument_is_not_echoed(capsys: Captured) -> None:
    assert main(["st\x1b]0;owned\x07"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_password_in_a_url_is_not_echoed(capsys: Captured) -> None:
    assert main(["status", "--url", "postgresq://me:sesame@host/db"]) == 2
    assert "sesame" not in capsys.readouterr().err


def test_an_ascii_locale_gets_escapes(folder: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "NO_COLOR": "1", "COLUMNS": "20"}
    command = [sys.executable, "-m", "trilogue"]
    subprocess.run([*command, "publish", "a", '{"title":"映画"}'], env=environment, check=True, capture_output=True)
    shown = subprocess.run([*command, "tail", "--no-follow"], env=environment, check=True, capture_output=True)
    assert b"\\u6620\\u753b" in shown.stdout
    subprocess.run([*command, "--help"], env=environment, check=True, capture_output=True)
