"""The commands on a real file: tail, status, dead letters, replay, groups."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from trilogue import App, Retry, event
from trilogue.cli.main import main

URL = "sqlite:///trilogue.db"
TRILOGUE = [sys.executable, "-m", "trilogue"]


@event("video.watched", key="user")
@dataclass(frozen=True)
class Watched:
    user: str
    video: str = "v"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRILOGUE_URL", raising=False)
    return tmp_path


Captured = pytest.CaptureFixture[str]


def said(capsys: Captured, *args: str, code: int = 0) -> str:
    """What a command printed; its errors where it failed."""
    capsys.readouterr()
    assert main(args) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    return err if code else out


def told(capsys: Captured, *args: str) -> Any:
    return json.loads(said(capsys, *args, "--json"))


def publish(*events: object) -> None:
    async def go() -> None:
        async with App(URL) as app:
            await app.publish_many(events)

    asyncio.run(go())


def fail_all(*groups: str, on_dead: Literal["skip", "park"] = "skip", healed: bool = False) -> list[Watched]:
    """Run groups that fail at everything (or, healed, at nothing) until they are idle; what they handled."""
    app, handled = App(URL), []

    def handle(e: Watched) -> None:
        if not healed:
            raise ValueError("no\x1b[2J")
        handled.append(e)

    for group in groups:
        app.on(group=group, retry=Retry(1), on_dead=on_dead)(handle)

    async def go() -> None:
        async with app.running():
            if not healed:
                await app.publish_many([Watched("u1"), Watched("u2"), Watched("u1", "w")])
            await app.wait_idle(timeout=30)

    asyncio.run(go())
    return handled


# ── tail ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def positions(capsys: Captured, *args: str) -> list[int]:
    return [json.loads(line)["position"] for line in said(capsys, "tail", *args, "--json").splitlines()]


def test_tail_chooses(capsys: Captured) -> None:
    publish(*[Watched(f"u{n % 3}") for n in range(30)])
    said(capsys, "publish", "badge.won", "{}")
    assert positions(capsys, "--no-follow") == list(range(22, 32))
    assert positions(capsys, "--no-follow", "--limit", "3") == [29, 30, 31]
    assert positions(capsys, "--no-follow", "--after", "0", "--limit", "3") == [1, 2, 3]
    assert positions(capsys, "--limit", "3") == [29, 30, 31]
    assert positions(capsys, "badge.#", "--no-follow") == [31]
    assert positions(capsys, "video.*", "--no-follow", "--key", "u1", "--after", "20") == [23, 26, 29]
    assert positions(capsys, "nothing.*", "--no-follow") == []
    assert positions(capsys, "--no-follow", "--after", "31") == []


def test_tail_shows_safe_lines(capsys: Captured) -> None:
    said(capsys, "publish", "a", '{"x":"\u202e"}', "--key", "k\x1b[2J")
    line = said(capsys, "tail", "--no-follow")
    assert line.startswith("1  2")
    assert line.endswith('  a  k\\x1b[2J  {"x":"\\u202e"}\n')


def test_tail_of_an_unknown_type_suggests(capsys: Captured) -> None:
    publish(Watched("u"))
    assert main(["tail", "video.wached", "--no-follow"]) == 0
    assert "did you mean 'video.watched'?" in capsys.readouterr().err


def test_tail_follows(capsys: Captured) -> None:
    publish(Watched("u1"))
    with subprocess.Popen([*TRILOGUE, "tail", "--json"], stdout=subprocess.PIPE) as tail:
        assert tail.stdout is not None
        assert json.loads(tail.stdout.readline())["position"] == 1
        publish(Watched("u2"))
        assert json.loads(tail.stdout.readline())["position"] == 2
        tail.send_signal(signal.SIGINT)
        assert tail.wait(60) == 130


def test_a_reader_that_goes_away_is_no_error() -> None:
    publish(*[Watched("u", "v" * 1_000) for _ in range(1_000)])
    reading, writing = os.pipe()
    with subprocess.Popen([*TRILOGUE, "tail", "--after", "0"], stdout=writing, stderr=subprocess.PIPE) as tail:
        os.close(writing)
        os.read(reading, 100)
        os.close(reading)
        assert tail.stderr is not None
        assert tail.stderr.read() == b""
        assert tail.wait(60) == 141


# ── status ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_status(capsys: Captured) -> None:
    fail_all("analytics")
    status = told(capsys, "status")
    (group,) = status["groups"]
    assert (status["head"], status["types"]) == (3, {"video.watched": 3})
    assert (group["name"], group["dead"], group["lag"]) == ("analytics", 3, 0)
    text = said(capsys, "status")
    assert "records 1 to 3" in text
    assert "analytics" in text


def test_status_of_an_empty_log(capsys: Captured) -> None:
    said(capsys, "publish", "a", "{}", "--delay", "1h")
    assert "no records" in said(capsys, "status")


def test_status_watch_goes_on_until_interrupted() -> None:
    publish(Watched("u"))
    with subprocess.Popen([*TRILOGUE, "status", "--watch", "--json"], stdout=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        assert [json.loads(watch.stdout.readline())["head"] for _ in range(2)] == [1, 1]
        watch.send_signal(signal.SIGINT)
        assert watch.wait(60) == 130


# ── dead letters ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_dead_letters_are_listed_and_shown(capsys: Captured) -> None:
    fail_all("analytics")
    letters = told(capsys, "dead", "list")
    assert [(letter["group"], letter["position"], letter["attempts"]) for letter in letters] == [
        ("analytics", 1, 1), ("analytics", 2, 1), ("analytics", 3, 1),
    ]  # fmt: skip
    assert len(told(capsys, "dead", "list", "--limit", "2")) == 2
    assert [letter["position"] for letter in told(capsys, "dead", "list", "--after", "2")] == [3]
    table = said(capsys, "dead", "list")
    assert "no\\x1b[2J" in table
    text = said(capsys, "dead", "show", "2")
    assert "raise ValueError" in text
    assert '"user":"u2"' in text
    assert "\x1b" not in text
    assert told(capsys, "dead", "show", "2")["data"]["user"] == "u2"


def test_a_group_or_position_that_is_not_there(capsys: Captured) -> None:
    fail_all("analytics")
    assert "did you mean 'analytics'?" in said(capsys, "dead", "list", "--group", "analitics", code=2)
    assert "position 9 is no dead letter" in said(capsys, "dead", "show", "9", code=1)
    assert "position 9 is no dead letter" in said(capsys, "dead", "redrive", "1", "9", code=1)
    assert "position 9 is no dead letter" in said(capsys, "dead", "drop", "1", "9", "--yes", code=1)
    assert len(told(capsys, "dead", "list")) == 3


def test_a_position_dead_in_two_groups_needs_the_group(capsys: Captured) -> None:
    fail_all("analytics", "badge")
    assert "analytics, badge" in said(capsys, "dead", "show", "1", code=1)
    assert "analytics, badge" in said(capsys, "dead", "redrive", "1", code=2)
    assert told(capsys, "dead", "show", "1", "--group", "badge")["group"] == "badge"
    said(capsys, "dead", "drop", "1", "--group", "badge", "--yes")
    assert len(told(capsys, "dead", "list", "--group", "badge")) == 2
    assert len(told(capsys, "dead", "list", "--group", "analytics")) == 3


def test_redrive(capsys: Captured) -> None:
    fail_all("analytics")
    assert "give positions, --group NAME, or --all" in said(capsys, "dead", "redrive", code=2)
    assert "1 dead letter of group analytics: 1 will be handled again" in said(capsys, "dead", "redrive", "2")
    assert "2 dead letters of group analytics: 2 will" in said(capsys, "dead", "redrive", "--all")
    assert said(capsys, "dead", "redrive", "--all") == "no dead letters\n"
    handled = fail_all("analytics", healed=True)
    assert sorted((e.user, e.video) for e in handled) == [("u1", "v"), ("u1", "w"), ("u2", "v")]
    assert [e.video for e in handled if e.user == "u1"] == ["v", "w"]


def test_drop_without_a_terminal_needs_yes(capsys: Captured) -> None:
    fail_all("analytics")
    assert "give positions" in said(capsys, "dead", "drop", "--yes", code=2)
    refused = said(capsys, "dead", "drop", "--all", code=2)
    assert "3 dead letters of group analytics would be dropped" in refused
    assert "add --yes" in refused
    assert len(told(capsys, "dead", "list")) == 3
    assert "3 dropped" in said(capsys, "dead", "drop", "--group", "analytics", "--yes")
    assert told(capsys, "dead", "list") == []
    assert said(capsys, "dead", "list") == "no dead letters\n"


def test_a_parked_key_goes_on_after_drop(capsys: Captured) -> None:
    fail_all("analytics", on_dead="park")
    assert [(letter["position"], letter["parked"]) for letter in told(capsys, "dead", "list")] == [(1, True), (2, True)]
    assert " parked" in said(capsys, "dead", "list")
    assert "its key waits" in said(capsys, "dead", "show", "1")
    assert "parked" in said(capsys, "status")
    assert "1 dropped" in said(capsys, "dead", "drop", "1", "--yes")
    assert fail_all("analytics", healed=True) == [Watched("u1", "w")]
    assert "1 dead letter of group analytics: 1 will be handled again" in said(capsys, "dead", "redrive", "--all")


class Typed:
    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self.answer


def test_drop_takes_yes_at_a_terminal(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_all("analytics")
    for answer in ("n\n", "\n", ""):
        monkeypatch.setattr(sys, "stdin", Typed(answer))
        assert "nothing was done" in said(capsys, "dead", "drop", "--all", code=1)
    monkeypatch.setattr(sys, "stdin", Typed("y\n"))
    assert "3 dropped" in said(capsys, "dead", "drop", "--all")


# ── replay ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_replay(capsys: Captured) -> None:
    publish(Watched("u1"))
    fail_all("badge")  # a new group starts now: behind the first
    said(capsys, "dead", "drop", "--all", "--yes")
    assert "from position 1" in said(capsys, "replay", "badge", "--to", "beginning")
    assert len(fail_all("badge", healed=True)) == 4
    assert "2 records, from position 3" in said(capsys, "replay", "badge", "--to", "3")
    assert len(fail_all("badge", healed=True)) == 2
    assert "4 records, from position 1" in said(capsys, "replay", "badge", "--to", "1h-ago")
    assert "what comes next" in said(capsys, "replay", "badge", "--to", "now")
    assert fail_all("badge", healed=True) == []
    assert "from position 1" in said(capsys, "replay", "badge", "--to", "2020-01-01T00:00:00Z", "--into", "badge-2")
    assert len(fail_all("badge-2", healed=True)) == 4


def test_replay_refuses(capsys: Captured) -> None:
    fail_all("badge")
    assert "did you mean 'badge'?" in said(capsys, "replay", "bagde", "--to", "now", code=2)
    assert "1 to 4" in said(capsys, "replay", "badge", "--to", "9", code=2)
    assert "1 to 4" in said(capsys, "replay", "badge", "--to", "0", code=2)
    forgets = said(capsys, "replay", "badge", "--to", "3", code=2)
    assert "2 dead letters of group badge would be forgotten without being handled again" in forgets
    said(capsys, "replay", "badge", "--to", "3", "--yes")
    assert told(capsys, "dead", "list") == []


APP = """
from dataclasses import dataclass
from trilogue import App, Db, event

app = App("sqlite:///trilogue.db")

@event("video.watched", key="user")
@dataclass(frozen=True)
class Watched:
    user: str
    video: str = "v"

@app.setup
def tables(db: Db) -> None:
    db.execute("create table if not exists seen (user)")

@app.on(group="seen", reset=lambda db: db.execute("delete from seen"))
def see(e: Watched, db: Db) -> None:
    db.execute("insert into seen values (?)", (e.user,))
"""


def test_replay_of_effects_resets_them(capsys: Captured, folder: Path) -> None:
    (folder / "replayed.py").write_text(APP)
    sys.path.insert(0, str(folder))
    from replayed import Watched as Seen
    from replayed import app

    async def run(events: list[object]) -> list[tuple[Any, ...]]:
        async with app.running():
            await app.publish_many(events)
            await app.wait_idle(timeout=30)
            return await app.db("select user from seen order by 1")

    try:
        assert asyncio.run(run([Seen("u1"), Seen("u2")])) == [("u1",), ("u2",)]
        assert "--app MODULE:APP" in said(capsys, "replay", "seen", "--to", "beginning", code=2)
        assert "from position 1" in said(capsys, "replay", "seen", "--to", "beginning", "--app", "replayed:app")
        assert asyncio.run(run([])) == [("u1",), ("u2",)]
    finally:
        sys.path.remove(str(folder))


# ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_group_is_forgotten(capsys: Captured) -> None:
    fail_all("analytics", "badge")
    publish(Watched("u9"))
    assert "did you mean 'badge'?" in said(capsys, "groups", "drop", "bagde", code=2)
    refused = said(capsys, "groups", "drop", "badge", code=2)
    assert "group badge would be dropped: lag 1, dead letters 3" in refused
    assert "badge: dropped" in said(capsys, "groups", "drop", "badge", "--yes")
    assert [group["name"] for group in told(capsys, "status")["groups"]] == ["analytics"]
    assert len(told(capsys, "dead", "list")) == 3


def test_the_sentence_about_an_orphaned_group_leads_out(capsys: Captured, folder: Path) -> None:
    fail_all("old-name")
    publish(Watched("u9"))
    (folder / "renamed.py").write_text("from trilogue import App\napp = App()\n")
    sentence = said(capsys, "run", "renamed:app", code=2)
    assert "`trilogue groups drop old-name`" in sentence
    said(capsys, "groups", "drop", "old-name", "--yes")

    async def run() -> None:
        async with App(URL).running():
            pass

    asyncio.run(run())
