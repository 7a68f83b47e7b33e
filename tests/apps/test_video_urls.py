"""The demonstrations behind every kind of URL: the same program, the same counts."""

import asyncio
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from logs import KINDS, PAIRS, log

from trilogue.apps.bank import BankOptions, demo_bank
from trilogue.apps.levels import demo_levels
from trilogue.apps.video import VideoOptions, demo, demo_queue, demo_stream, demo_video
from trilogue.apps.video.chain import run_chain
from trilogue.apps.video.platform import SERVICES

pytestmark = pytest.mark.timeout(240)
LIMIT = 500


def video(url: str, store: str | None, **options: Any) -> dict[str, Any]:
    given = VideoOptions(limit=LIMIT, chain_sample=5, report="json", url=url, store=store, **options)
    return asyncio.run(asyncio.wait_for(demo_video(given), 200))


def counts(report: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same everywhere. What is recommended, and so told, depends on whose watch is handled first."""
    user = dict(report["user"])
    user.pop("recommendations")
    services = {name: (s["handled"], s["repeated"], s["dead"], s["lag"]) for name, s in report["services"].items()}
    top = {name: report["top"][name] for name in ("all_time", "genres", "hours")}
    return {"watches": report["watches"], "sent": report["sent"], "services": services, "top": top, "user": user}


@pytest.fixture(autouse=True, scope="module")
def quick_chain() -> Iterator[None]:
    """The chain of calls is the same everywhere, and waits for real: not here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_chain", partial(run_chain, call_s=0.001, timeout_s=0.1))
        yield


@pytest.fixture(scope="module")
def expected(quick_chain: None) -> dict[str, Any]:
    return counts(video("memory://", None))


@pytest.mark.parametrize("kind", KINDS)
def test_video_gives_the_same_counts(kind: str, tmp_path: Path, expected: dict[str, Any], capsys: Any) -> None:
    with log(kind, tmp_path) as wanted:
        report = video(str(wanted.url), wanted.store)
    assert counts(report) == expected
    assert report["services"]["analytics"]["failed_attempts"] > LIMIT / 10
    assert report["outage"]["events"] == {"accepted": 5, "refused": 0, "delivered_when_back": 5, "delivered_before": 0}


@pytest.mark.parametrize("kind", ["postgresql", *PAIRS])
def test_video_again_on_what_was_kept_adds_nothing(kind: str, tmp_path: Path, expected: dict[str, Any], capsys: Any) -> None:
    with log(kind, tmp_path) as wanted:
        reports = [video(str(wanted.url), wanted.store, down=("badge",)) for _ in range(2)]
    for report in reports:
        assert handled(report) == dict.fromkeys(SERVICES, LIMIT)
        assert counts(report)["top"] == expected["top"]
        assert counts(report)["user"] == expected["user"]
    # What is published again a store does not take, and a broker may deliver: then the services pass it over, and say so.
    repeated = {service["repeated"] for service in reports[1]["services"].values()}
    assert repeated <= ({0, LIMIT} if "+" in kind else {0})
    assert reports[0]["down"][0]["delivered"] == LIMIT


def handled(report: dict[str, Any]) -> dict[str, int]:
    return {name: service["handled"] for name, service in report["services"].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_bank_holds_its_invariants(kind: str, tmp_path: Path, capsys: Any) -> None:
    with log(kind, tmp_path) as wanted:
        options = BankOptions(accounts=8, transfers=80, writers=4, report="json", url=wanted.url, store=wanted.store)
        report = asyncio.run(asyncio.wait_for(demo_bank(options), 200))
    load = report["load"]
    assert set(load["invariants"].values()) == {True}, load["invariants"]
    assert load["workers"] == (1 if kind == "memory" else 2)
    assert (load["transfers"], load["completed"] + load["failed"], load["lost_workers"]) == (80, 80, 0)
    assert load["reasons"]["went to a closed account"] == 3
    assert report["scenario"]["balances"] == [1000, 1500, 1300, 500, 800, -400]
    assert report["scenario"]["conflict"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_queue_tells_its_story(kind: str, tmp_path: Path, capsys: Any) -> None:
    with log(kind, tmp_path) as wanted:
        report = asyncio.run(asyncio.wait_for(demo_queue(str(wanted.url), "json", store=wanted.store), 100))
    assert report["tastes_updated"] == 3
    assert report["analytics"]["counted"] == 51
    assert report["analytics"]["dead"] == 0
    assert "user123 started watching Avengers: Endgame" in {text for _, text in report["notifications"]}
    assert set(report["lag"].values()) == {0}


@pytest.mark.parametrize("kind", KINDS)
def test_levels_ask_for_the_same(kind: str, tmp_path: Path, capsys: Any) -> None:
    with log(kind, tmp_path) as wanted:
        report = asyncio.run(asyncio.wait_for(demo_levels("json", url=str(wanted.url), store=wanted.store), 100))
    assert json.loads(capsys.readouterr().out) == report
    assert [level["asked"] for level in report["levels"]] == [{"user": 3}, {}, {}]
    assert [level["done_while_services_are_down"] for level in report["levels"]] == [0, 3, 3]
    assert report["levels"][2]["did"][2] == "ann has 120.00: +100.00 -30.00 +50.00"


@pytest.mark.parametrize("kind", KINDS)
def test_four_viewers_stream(kind: str, tmp_path: Path, capsys: Any) -> None:
    with log(kind, tmp_path) as wanted:
        report = asyncio.run(asyncio.wait_for(demo_stream(str(wanted.url), "json", store=wanted.store), 100))
    assert json.loads(capsys.readouterr().out) == report
    assert report["now"] == {"viewers": 4, "sessions": 4, "qualities": {"1080p": 4}}
    assert report["after_31_s_of_silence"] == {"viewers": 0, "sessions": 0, "qualities": {}}
    assert set(report["profiles"]) == set(report["recommended"]) == {"alice", "bob", "carol", "david"}
    assert {profile["preferred_quality"] for profile in report["profiles"].values()} == {"1080p"}
    topics = {one["topic"] for one in report["started"]} | {one["topic"] for one in report["heartbeats"]}
    named = {str(topic).rpartition("video-")[2] for topic in topics}
    assert named == ({"events", "heartbeat"} if "kafka" in kind else {"None"})
