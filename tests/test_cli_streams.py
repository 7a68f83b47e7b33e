"""`trilogue streams`, `trace` and `snapshots`."""

import asyncio
import json
from pathlib import Path

import pytest
from bank_words import Kept
from common import Watched, Won

from trilogue import App, audited
from trilogue.cli.main import main


@pytest.fixture
def log(file_url: str) -> str:
    """A log with a stream of three events, and something that led to something."""
    app = App(file_url)

    @app.on(group="badge")
    async def badge(e: Watched) -> Won:
        return Won(e.user, "b")

    async def fill() -> None:
        async with app.running():
            with audited(who="alice", why="salary\x1b[2J"):
                for n in (1, 2, 3):
                    await app.decide(Kept, "k", lambda a, n=n: a.deposit(n))
            await app.take_snapshot(Kept, "k")
            await app.publish(Watched("u"))
            await app.wait_idle()

    asyncio.run(fill())
    return file_url


def out(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(argv) == code
    captured = capsys.readouterr()
    return captured.out + (captured.err if code else "")


def test_show(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "streams", "show", "kept-k", "--url", log)
    assert [line.split()[0] for line in text.splitlines()] == ["version", "1", "2", "3"]
    assert "alice" in text
    assert "\x1b" not in text
    said = json.loads(out(capsys, "streams", "show", "kept-k", "--json", "--url", log))
    shown = [(e["version"], e["who"], e["data"]["amount"]) for e in said["events"]]
    assert shown == [(1, "alice", "1"), (2, "alice", "2"), (3, "alice", "3")]
    assert "there is no stream 'x'" in out(capsys, "streams", "show", "x", "--url", log, code=1)


PROGRAM = """
from bank_words import Kept, accounts
from trilogue import App
app = App({url!r})
app.knows(Kept, accounts)
"""


def test_state(log: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept_program.py").write_text(PROGRAM.format(url=log))
    shown = ("streams", "state", "kept-k", "--app", "kept_program:app")
    assert out(capsys, *shown) == 'kept-k at version 3: {"id":"k","balance":"6"}\n'
    text = out(capsys, *shown, "--version", "1", "--against", "3")
    assert text == 'kept-k at version 1: {"id":"k","balance":"1"}\n  balance: "1" -> "6"\n'
    said = json.loads(out(capsys, *shown, "--position", "2", "--against", "3", "--json"))
    assert (said["version"], said["state"]["balance"], said["changes"]) == (2, "3", {"balance": ["3", "6"]})
    assert "version 0" in out(capsys, *shown, "--at", "1h-ago")
    assert "is no time" in out(capsys, *shown, "--at", "7", code=2)
    assert "give one of them" in out(capsys, *shown, "--version", "1", "--position", "1", code=2)
    missing = out(capsys, "streams", "state", "kept-K", "--app", "kept_program:app", code=1)
    assert "there is no stream 'kept-K' on this log: expected its whole name" in missing
    assert "its streams are kept-{id}, account-{id}" in out(
        capsys, "streams", "state", "x-1", "--app", "kept_program:app", code=2
    )


def test_close_and_truncate(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "add --yes" in out(capsys, "streams", "close", "kept-k", "--reason", "done", "--url", log, code=2)
    out(capsys, "streams", "close", "kept-k", "--reason", "done", "--yes", "--url", log)
    assert "closed: done" in out(capsys, "streams", "show", "kept-k", "--url", log)
    too_far = out(capsys, "streams", "truncate", "kept-k", "--before", "9", "--yes", "--url", log, code=2)
    assert "its newest event has to stay" in too_far
    assert "add --yes" in out(capsys, "streams", "truncate", "kept-k", "--before", "2", "--url", log, code=2)
    out(capsys, "streams", "truncate", "kept-k", "--before", "2", "--yes", "--url", log)
    text = out(capsys, "streams", "show", "kept-k", "--url", log)
    assert "truncated before version 2" in text
    assert "closed: done" in text
    for command in (("close", "x", "--reason", "r"), ("truncate", "x", "--before", "1")):
        assert "there is no stream" in out(capsys, "streams", *command, "--yes", "--url", log, code=1)


def test_trace(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "trace", "5", "--url", log)
    assert [line.split()[2] for line in text.splitlines()] == ["video.watched", "badge.won"]
    traced = json.loads(out(capsys, "trace", "4", "--json", "--url", log))
    assert [(each["depth"], each["type"]) for each in traced] == [(0, "video.watched"), (1, "badge.won")]
    assert out(capsys, "trace", traced[1]["id"], "--url", log) == text
    assert "position '99'" in out(capsys, "trace", "99", "--url", log, code=1)
    assert "id 'x'" in out(capsys, "trace", "x", "--url", log, code=1)


def test_snapshots(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    [kept] = json.loads(out(capsys, "snapshots", "list", "--json", "--url", log))
    assert (kept["stream"], kept["version"]) == ("kept-k", "3")
    assert "kept-k" in out(capsys, "snapshots", "list", "--url", log)
    assert "give a stream, or --all" in out(capsys, "snapshots", "drop", "--url", log, code=2)
    assert "give a stream, or --all" in out(capsys, "snapshots", "drop", "kept-k", "--all", "--url", log, code=2)
    assert "0 snapshots" in out(capsys, "snapshots", "drop", "kept", "--url", log)
    assert "1 snapshots" in out(capsys, "snapshots", "drop", "kept-k", "--url", log)
    assert "no snapshots" in out(capsys, "snapshots", "list", "--url", log)
    assert "0 snapshots" in out(capsys, "snapshots", "drop", "--all", "--url", log)
