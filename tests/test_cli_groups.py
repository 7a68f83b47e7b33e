"""`trilogue groups`, `pause`, `resume`: who reads the log, under which name, whether it goes on; and `trace`."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trilogue import App, Process, Retry, event, starts
from trilogue.cli.main import main
from trilogue.events import Settlement

Captured = pytest.CaptureFixture[str]
URL = "sqlite:///trilogue.db"


@event("video.watched", key="user")
@dataclass(frozen=True)
class Watched:
    user: str


@event("badge.won", key="user")
@dataclass(frozen=True)
class Won:
    user: str


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("TRILOGUE_URL", "TRILOGUE_STORE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def said(capsys: Captured, *args: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(args) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    return err if code else out


def told(capsys: Captured, *args: str) -> Any:
    return json.loads(said(capsys, *args, "--json"))


def handle(*users: str, name: str = "badge", fails: str = "nobody") -> list[str]:
    """Publish for users and run the handler under a name until it is idle; whom it has handled."""
    app, handled = App(URL, name="shop"), []

    @app.on(group=name, retry=Retry(1), start="beginning")
    async def badge(e: Watched) -> Won:
        if e.user == fails:
            raise ValueError("no")
        handled.append(e.user)
        return Won(e.user)

    async def go() -> None:
        async with app.running():
            await app.publish_many([Watched(user) for user in users])
            await app.wait_idle(timeout=30)

    asyncio.run(go())
    return handled


# ── list, rename, drop ───────────────────────────────────────────────────────────────────────────────────────────────


def test_list(capsys: Captured) -> None:
    handle("a", "b", "c", fails="b")
    [group] = told(capsys, "groups", "list")
    assert (group["group"], group["app"], group["patterns"], group["order"]) == ("badge", "shop", ["video.watched"], "per key")
    assert (group["cursor"], group["lag"], group["dead"], group["workers"], group["paused"]) == (5, 0, 1, 0, False)
    line = said(capsys, "groups", "list").splitlines()[1].split()
    assert line[:4] == ["badge", "shop", "no", "worker"]
    assert line[-1] == "video.watched"


def test_list_of_an_empty_log(capsys: Captured) -> None:
    said(capsys, "publish", "a.b", "{}")
    assert "no groups yet" in said(capsys, "groups", "list")
    assert told(capsys, "groups", "list") == []


def test_rename_takes_cursor_and_dead_letters_along(capsys: Captured) -> None:
    assert handle("a", "b", fails="b") == ["a"]
    assert "is medals now" in said(capsys, "groups", "rename", "badge", "medals")
    assert [group["group"] for group in told(capsys, "groups", "list")] == ["medals"]
    assert [letter["group"] for letter in told(capsys, "dead", "list")] == ["medals"]
    assert handle("c", name="medals") == ["c"]
    said(capsys, "dead", "redrive", "--all")
    assert handle(name="medals") == ["b"]


def test_rename_refuses(capsys: Captured) -> None:
    handle("a")
    handle("b", name="other")
    assert "did you mean 'badge'?" in said(capsys, "groups", "rename", "badg", "x", code=2)
    assert "there is a group 'other' already" in said(capsys, "groups", "rename", "badge", "other", code=2)
    assert "1 to 255 printable" in said(capsys, "groups", "rename", "badge", "a\nb", code=2)
    assert "belongs to projection 'p'" in said(capsys, "groups", "rename", "projection.p.b1", "x", code=2)
    for url, how in (("amqp://localhost", "a queue has its name for good"), ("kafka://localhost", "--from-file")):
        assert how in said(capsys, "groups", "rename", "badge", "x", "--url", url, code=2)


def test_a_group_at_work_is_neither_renamed_nor_dropped(capsys: Captured) -> None:
    app = App(URL)

    @app.on(group="badge")
    async def badge(e: Watched) -> None: ...

    async def go() -> None:
        async with app.running():
            for line in ("groups rename badge x", "groups drop badge --yes"):
                text = await asyncio.to_thread(said, capsys, *line.split(), code=1)
                assert "is at work in 1 processes: stop them first" in text

    asyncio.run(go())


def test_a_worker_of_the_old_name_is_fenced_off() -> None:
    async def go() -> None:
        app = App(URL)

        @app.on(group="badge", start="beginning")
        async def badge(e: Watched) -> None: ...

        async with app:
            await app.publish(Watched("a"))
            await app.store.bind([sub.group for sub in app.subscriptions])
            out = await app.store.claim("badge", limit=1, wait_s=5)
            await app.store.transact(lambda tx: tx.rename_group("badge", "medals"))

            assert await app.store.settle("badge", [Settlement(out[0])]) == out
            assert (await app.store.status()).groups[0].done == 0

    asyncio.run(go())


def test_a_process_finds_its_instances_under_the_new_name(capsys: Captured) -> None:
    class Course(Process, key="user", name="course"):
        user: str = ""

        @starts
        def begin(self, e: Watched) -> None: ...

    def run(group: str) -> None:
        app = App(URL)
        app.process(Course, group=group)

        async def go() -> None:
            async with app.running():
                await app.publish(Watched("a"))
                await app.wait_idle(timeout=30)

        asyncio.run(go())

    run("one")
    said(capsys, "groups", "rename", "one", "two")
    run("two")
    assert [each["id"] for each in told(capsys, "processes", "list")] == ["a"]


def test_drop(capsys: Captured) -> None:
    handle("a")
    assert "add --yes" in said(capsys, "groups", "drop", "badge", code=2)
    assert "dropped" in said(capsys, "groups", "drop", "badge", "--yes")
    assert told(capsys, "groups", "list") == []
    assert "no groups yet" in said(capsys, "groups", "drop", "badge", "--yes", code=2)


# ── pause, resume ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pause_and_resume(capsys: Captured) -> None:
    handle("a")
    assert said(capsys, "pause", "badge") == "group badge: paused\n"
    assert "already" in said(capsys, "pause", "badge")
    [group] = told(capsys, "groups", "list")
    assert group["paused"]
    assert "paused" in said(capsys, "groups", "list")
    assert said(capsys, "resume", "badge") == "group badge: goes on\n"
    assert "was not paused" in said(capsys, "resume", "badge")
    assert handle("b") == ["b"]


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_pause_of_what_is_not_there_or_not_to_be_paused_so(verb: str, capsys: Captured) -> None:
    handle("a")
    assert "did you mean 'badge'?" in said(capsys, verb, "badg", code=2)
    assert f"use `trilogue projections {verb} p`" in said(capsys, verb, "projection.p.b1", code=2)


# ── trace ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_trace_tells_which_group_made_a_record_and_where_one_died(capsys: Captured) -> None:
    handle("a")
    handle(name="other", fails="a")
    first, second = told(capsys, "trace", "1")
    assert (first["type"], first["by"], first["dead_in"]) == ("video.watched", None, ["other"])
    assert (second["type"], second["by"], second["dead_in"], second["depth"]) == ("badge.won", "badge", [], 1)
    lines = said(capsys, "trace", second["id"]).splitlines()
    assert lines[0].endswith("  dead in other")
    assert lines[1].endswith("  by badge")
