"""The platform as a whole: feeding, failing, the chain, the demonstrations."""

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from trilogue import App, Conflict, Db, Retry, Router
from trilogue.apps.video import VideoOptions, demo_queue, demo_video
from trilogue.apps.video.chain import run_chain
from trilogue.apps.video.events import WatchStarted, as_datetime, as_us
from trilogue.apps.video.feed import AnswerTimes, Feeder
from trilogue.apps.video.generator import generate
from trilogue.apps.video.options import checked
from trilogue.apps.video.platform import SERVICES, failing, platform
from trilogue.apps.video.video import VideoService
from trilogue.apps.video.watch import as_event
from trilogue.errors import BadOption

MOVIELENS = Path(__file__).parents[3] / "shared/data/ml-latest-small"


def handled(report: dict[str, Any]) -> dict[str, int]:
    return {name: service["handled"] for name, service in report["services"].items()}


def test_start_watching_answers_with_a_session_that_is_the_event() -> None:
    async def run() -> None:
        async with App("memory://") as app:
            service = VideoService(app)
            at = datetime(2026, 1, 5, tzinfo=UTC)
            started = await service.start_watching("ana", "v1", "Heat", ("Crime",), at=at)
            again = await service.start_watching("ana", "v1", "Heat", ("Crime",), at=at)
            assert started == again
            assert started.status == "started"
            assert service.sessions[started.session].title == "Heat"
            [record] = [record async for record in app.history()]
            assert (record.id, record.key, record.type, record.time) == (started.session, "ana", "video.watch_started", at)
            with pytest.raises(Conflict):
                await service.start_watching("ana", "v1", "Ronin", at=at)

    asyncio.run(run())


def test_a_feeder_keeps_each_users_order_and_counts_conflicts() -> None:
    async def run() -> None:
        watches = list(islice(generate(5, users=20), 500))
        async with App("memory://") as app:
            feeder = Feeder(VideoService(app))
            await feeder.feed(iter([*watches, watches[0]._replace(title="other")]))
            assert (feeder.sent, feeder.conflicts) == (500, 1)
            records = [record async for record in app.history()]
            for user in {watch.user for watch in watches}:
                assert [r.time_us for r in records if r.key == user] == [w.time_us for w in watches if w.user == user]

    asyncio.run(run())


def test_times_survive_exactly() -> None:
    for us in (0, 1, 1_700_000_000_123_457, 253_402_300_799_000_000):
        assert as_us(as_datetime(us)) == us


def test_answer_times_are_right_to_two_percent() -> None:
    times = AnswerTimes(n / 1_000 for n in range(1, 1_001))
    assert times.percentile_ms(50) == pytest.approx(500, rel=0.02)
    assert times.percentile_ms(99) == pytest.approx(990, rel=0.02)
    assert AnswerTimes().summary() == {"p50": None, "p99": None}


def test_a_failing_service_loses_nothing() -> None:
    counting = Router()

    @counting.setup
    def table(db: Db) -> None:
        db.execute("create table if not exists met (session text primary key)")

    @counting.on(group="counting", order=None, retry=Retry(25, "1ms..10ms"), batch=50, start="beginning")
    def count(watches: list[WatchStarted], db: Db) -> None:
        db.executemany("insert into met values (?)", [(w.session,) for w in watches])

    async def run() -> None:
        app = App("memory://", name="test")
        app.include(failing(counting, 0.3, random.Random(1)))
        async with app.running():
            await Feeder(VideoService(app)).feed(islice(generate(1, users=10), 300))
            await app.wait_idle(timeout="60s")
            [group] = (await app.store.status()).groups
            assert await app.db("select count(*) from met") == [(300,)]
            assert group.failed > 50
            assert group.dead == 0

    asyncio.run(run())


def test_the_chain_refuses_everything_when_one_service_is_down() -> None:
    watches = [as_event(watch) for watch in islice(generate(1), 5)]

    async def run() -> None:
        whole = await run_chain(watches, call_s=0.01)
        assert (whole.accepted, whole.refused, whole.left_behind) == (5, 0, 0)
        assert min(whole.answers_s) >= 0.01 * 0.9 * len(SERVICES)
        broken = await run_chain(watches, down="badge", call_s=0.01, timeout_s=0.5)
        assert (broken.accepted, broken.refused) == (0, 5)
        assert min(broken.refused_after_s) >= 2 * 0.5
        assert broken.left_behind == 4 * 5  # four services come before it and keep what they wrote

    asyncio.run(run())


def test_demo_queue_tells_the_story(capsys: pytest.CaptureFixture[str]) -> None:
    report = asyncio.run(demo_queue(report="json"))
    assert json.loads(capsys.readouterr().out) == report
    assert [(w["user"], w["title"]) for w in report["watches"]] == [
        ("user123", "Avengers: Endgame"),
        ("user789", "The Dark Knight"),
        ("user456", "Iron Man"),
    ]
    assert report["tastes_updated"] == 3
    assert all(len(titles) == 3 for titles in report["recommendations"].values())
    assert any(text == "user123 started watching Avengers: Endgame" for _, text in report["notifications"])
    assert any(text.startswith("new recommendations: ") for _, text in report["notifications"])
    assert report["analytics"]["failed_attempts"] > 0
    assert report["analytics"]["dead"] == 0
    assert set(report["lag"].values()) == {0}


def test_demo_queue_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(demo_queue())
    out = capsys.readouterr().out
    assert "3 tastes updated" in out
    assert "notifications sent" in out


def test_demo_video_on_generated_watches(capsys: pytest.CaptureFixture[str]) -> None:
    report = asyncio.run(demo_video(VideoOptions(limit=1_500, chain_sample=0)))
    out = capsys.readouterr().out
    assert "1,500 watches, six services" in out
    assert handled(report) == dict.fromkeys(SERVICES, 1_500)
    assert report["services"]["analytics"]["failed_attempts"] > 100
    assert {service["dead"] for service in report["services"].values()} == {0}
    assert report["hit_rate_at_10"]["model"] > report["hit_rate_at_10"]["popularity"] > 0


def test_a_service_that_is_down_gets_everything_once_it_is_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = VideoOptions(limit=300, chain_sample=0, down=("badge",), db=str(tmp_path / "v.db"), report="json")
    report = asyncio.run(demo_video(options))
    assert json.loads(capsys.readouterr().out) == report
    assert [(down["service"], down["delivered"]) for down in report["down"]] == [("badge", 300)]
    assert handled(report) == dict.fromkeys(SERVICES, 300)
    again = asyncio.run(demo_video(options))
    assert handled(again) == handled(report)
    assert again["hit_rate_at_10"] == report["hit_rate_at_10"]
    assert again["notifications"] == report["notifications"]
    assert again["watches"] == report["watches"] == 300


def test_bad_rows_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "w.csv"
    log.write_text("user,video,time\na,v,1\na,v\na,v,1\nb,v,-4\nb,w,3\n")
    report = asyncio.run(demo_video(VideoOptions(input=str(log), chain_sample=0, db=str(tmp_path / "v.db"))))
    assert (report["watches"], report["rejected"]) == (2, 2)
    assert report["rejects_file"] == str(tmp_path / "v.db.rejects.csv")
    assert "2 rows were no watches" in capsys.readouterr().out
    assert Path(report["rejects_file"]).read_text().count("\n") == 3


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "w.jsonl"
    log.write_text('{"user": "a\\u001b[2J", "video": "v", "time": 1, "title": "x\\u001b]0;y"}\n')
    asyncio.run(demo_video(VideoOptions(input=str(log), chain_sample=0)))
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (VideoOptions(fail=("analitics=0.3",)), "no service 'analitics'.*did you mean 'analytics'"),
        (VideoOptions(fail=("badge=1.5",)), "rate from 0 to 1"),
        (VideoOptions(fail=("badge=nan",)), "rate from 0 to 1"),
        (VideoOptions(fail=("badge",)), "rate from 0 to 1"),
        (VideoOptions(down=("rank",)), "did you mean 'ranking'"),
        (VideoOptions(speed="fast"), "expected max, or how many times as fast"),
        (VideoOptions(speed="0x"), "expected max, or how many times as fast"),
        (VideoOptions(limit=0), "expected 1 or more"),
        (VideoOptions(chain_sample=-1), "expected 0 to 1,000"),
        (VideoOptions(columns="user=a,video=b,time=c"), "no input"),
        (VideoOptions(input="no such file"), "does not exist"),
        (VideoOptions(db="no/such/folder/v.db"), "there is no folder"),
        (VideoOptions(db="."), "is a folder"),
    ],
)
def test_options_that_make_no_sense_are_one_sentence(options: VideoOptions, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        checked(options)


def test_speed_is_kept() -> None:
    async def run() -> float:
        watches: Iterator[Any] = islice(generate(1), 10)
        async with platform("memory://") as app:
            began = time.monotonic()
            await Feeder(VideoService(app), speed=10_000).feed(watches)
            return time.monotonic() - began

    span_s = [watch.time_us for watch in islice(generate(1), 10)]
    assert asyncio.run(run()) >= (span_s[-1] - span_s[0]) / 1_000_000 / 10_000


PROGRAM = """
import asyncio, sys
from trilogue.apps.video import VideoOptions, demo_video
asyncio.run(demo_video(VideoOptions(limit=4_000, chain_sample=0, db=sys.argv[1], report="json")))
"""


@pytest.mark.processes
def test_a_killed_run_is_finished_by_the_next_and_a_third_adds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "v.db")]
    for size in (400_000, 6_000_000):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and written(tmp_path) < size:
            time.sleep(0.02)
        process.kill()
        process.wait()
    reports = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(2)]
    for report in reports:
        assert report["watches"] == 4_000
        assert handled(report) == dict.fromkeys(SERVICES, 4_000)
        assert {service["dead"] for service in report["services"].values()} == {0}
    assert reports[0]["notifications"] == reports[1]["notifications"]
    assert reports[0]["hit_rate_at_10"] == reports[1]["hit_rate_at_10"]


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.skipif(not MOVIELENS.is_dir(), reason="needs the MovieLens folder beside the repository")
def test_movielens(capsys: pytest.CaptureFixture[str]) -> None:
    report = asyncio.run(demo_video(VideoOptions(input=str(MOVIELENS), limit=5_000, chain_sample=0, report="json")))
    capsys.readouterr()
    assert handled(report) == dict.fromkeys(SERVICES, 5_000)
    assert report["rejected"] == 0
    assert report["hit_rate_at_10"]["model"] > report["hit_rate_at_10"]["popularity"]
