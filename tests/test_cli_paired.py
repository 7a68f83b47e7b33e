"""Commands beside a broker: places are offsets, and the log that can be read is the store's."""

import asyncio
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from services import kafka_prefix, rabbitmq_vhost

from trilogue import App, Retry, event
from trilogue.cli.main import main

Captured = pytest.CaptureFixture[str]
EVENTS = 30


@event("video.watched", key="user")
@dataclass(frozen=True)
class Watched:
    user: str
    n: int


def handle(url: str, store: str, *, healed: bool = False) -> list[int]:
    """Publish for a group that fails on the first three, and let it handle everything; what it has handled."""
    handled: list[int] = []
    app = App(url, store=store)

    @app.on(group="badge", retry=Retry(1), start="beginning")
    async def badge(e: Watched) -> None:
        if e.n < 3 and not healed:
            raise ValueError("no")
        handled.append(e.n)

    async def go() -> None:
        async with app.running():
            if not healed:
                await app.publish_many([Watched(f"u{n}", n) for n in range(EVENTS)])
            await app.wait_idle(timeout="60s")

    asyncio.run(go())
    return sorted(handled)


def said(capsys: Captured, url: str, store: str, *args: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main([*args, "--url", url, "--store", store]) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    return err if code else out


def test_lag_and_place_of_each_partition(capsys: Captured, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/a.db"
    with kafka_prefix() as prefixed:
        url = f"{prefixed}&partitions=2"
        handle(url, store)
        for n in range(5):
            said(capsys, url, store, "publish", "video.watched", json.dumps({"user": "u1", "n": n}), "--key", "u1")
        told = said(capsys, url, store, "status")
        assert "beside it the store's own log, no records" in told
        (lane,) = re.findall(r"badge +\S+video-events\[\d\] +5 +\d+ +0 +-", told)
        group = next(g for g in json.loads(said(capsys, url, store, "status", "--json"))["groups"] if g["name"] == "badge")
        assert sorted(each["lag"] for each in group["lanes"]) == [0, 5]
        assert sum(each["next"] for each in group["lanes"]) == EVENTS
        assert lane.split()[1] in {each["name"] for each in group["lanes"]}


def test_replay_on_kafka_names_offsets(capsys: Captured, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/a.db"
    with kafka_prefix() as prefixed:
        url = f"{prefixed}&partitions=1"
        assert handle(url, store) == list(range(3, EVENTS))
        forgets = said(capsys, url, store, "replay", "badge", "--to", "17", code=2)
        assert "3 dead letters of group badge would be forgotten without being handled again" in forgets
        assert "it holds 0 to 29" in said(capsys, url, store, "replay", "badge", "--to", "99", "--yes", code=2)
        assert said(capsys, url, store, "dead", "list").count("video.watched") == 3, "what was refused has forgotten nothing"
        assert "everything from 2 on" in said(capsys, url, store, "replay", "badge", "--to", "2", "--yes")
        assert handle(url, store, healed=True) == list(range(2, EVENTS))
        assert "from the beginning on" in said(capsys, url, store, "replay", "badge", "--to", "beginning", "--into", "b2")
        assert "what comes next" in said(capsys, url, store, "replay", "badge", "--to", "now")
        assert handle(url, store, healed=True) == []


def test_what_is_published_is_told_by_its_place(capsys: Captured, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/a.db"
    with kafka_prefix() as url, rabbitmq_vhost() as queues:
        told = said(capsys, url, store, "publish", "a.b", "{}")
        assert re.search(r"offset 0 of \S+-a-events\[\d\], survives process-crash", told)
        assert "in the queues, survives os-crash" in said(capsys, queues, store, "publish", "a.b", "{}")
        main(["tail", "--no-follow", "--url", url, "--store", store])
        assert "this is the log of the store beside it" in capsys.readouterr().err
