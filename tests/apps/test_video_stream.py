"""Streaming: the service's answers, who is counted and when no more, and what is known of a viewer."""

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import permutations

import pytest

from trilogue import App
from trilogue.apps.video import demo_stream, stream_analytics
from trilogue.apps.video.events import as_us
from trilogue.apps.video.personalization import CATALOGUE, MODEL, Profile, profiles, recommend, take_in
from trilogue.apps.video.stream_analytics import Now, now
from trilogue.apps.video.stream_demo import streaming
from trilogue.apps.video.stream_events import Heartbeat, QualityChanged, RecommendationUpdated, StreamingStarted
from trilogue.apps.video.stream_service import StreamingService, UnknownSession
from trilogue.events import event_type
from trilogue.ports import SeekTo

AT = datetime(2026, 1, 5, 20, tzinfo=UTC)
S = timedelta(seconds=1)


def test_topics_and_keys() -> None:
    topics: dict[type, str] = {StreamingStarted: "video-events", QualityChanged: "video-events", Heartbeat: "video-heartbeat"}
    topics[RecommendationUpdated] = "recommendation-events"
    for cls, topic in topics.items():
        assert (event_type(cls).topic, event_type(cls).key) == (topic, "user")


def test_the_service_answers_with_sessions_and_publishes_what_happens() -> None:
    async def run() -> None:
        async with streaming("memory://") as app:
            service = StreamingService(app)
            session = await service.start_streaming("ana", "v1", at=AT)
            assert (session.user, session.video, session.quality) == ("ana", "v1", "1080p")
            await service.update_quality(session.id, "4K", at=AT + 5 * S)
            await service.send_heartbeat(session.id, at=AT + 12 * S)
            assert [app.decode(record) async for record in app.history()] == [
                StreamingStarted("ana", session.id, "v1", "1080p", AT),
                QualityChanged("ana", session.id, "1080p", "4K", AT + 5 * S),
                Heartbeat("ana", session.id, 12.0, AT + 12 * S),
            ]
            for call in (service.update_quality("nobody's", "4K"), service.send_heartbeat("nobody's")):
                with pytest.raises(UnknownSession, match='no session "nobody\'s"'):
                    await call

    asyncio.run(run())


async def told(app: App, *events: object) -> None:
    await app.publish_many(events)
    await app.wait_idle(timeout="30s")


def test_who_is_silent_for_thirty_seconds_counts_no_more(url: str) -> None:
    async def run() -> None:
        async with streaming(url).running() as app:
            await told(
                app,
                StreamingStarted("ana", "s1", "v1", "4K", AT),
                StreamingStarted("bo", "s2", "v1", "1080p", AT),
                Heartbeat("ana", "s1", 20.0, AT + 20 * S),
            )
            assert await now(app, AT + 29 * S) == Now(2, 2, {"1080p": 1, "4K": 1})
            assert await now(app, AT + 30 * S) == Now(1, 1, {"4K": 1})
            assert await now(app, AT + 50 * S) == Now(0, 0, {})
            await told(app, Heartbeat("bo", "s2", 60.0, AT + 60 * S))
            assert await now(app, AT + 60 * S) == Now(1, 1, {"1080p": 1})
            await told(app, Heartbeat("bo", "s2", 7_200.0, AT + 7_200 * S))
            assert await app.db("select session from streaming_sessions") == [("s2",)]

    asyncio.run(run())


def test_a_viewer_with_two_devices_counts_once_with_the_latest_quality() -> None:
    async def run() -> None:
        async with streaming("memory://").running() as app:
            for n, quality in enumerate(("720p", "4K")):
                await told(app, StreamingStarted("ana", f"s{n}", "v1", quality, AT + n * S))
            assert await now(app, AT + 2 * S) == Now(1, 2, {"4K": 1})
            await told(app, Heartbeat("ana", "s0", 40.0, AT + 40 * S))
            assert await now(app, AT + 40 * S) == Now(1, 1, {"720p": 1})

    asyncio.run(run())


def test_topics_may_overtake_each_other() -> None:
    """A user's events of one topic are in order; a heartbeat, of another topic, may come at any time."""
    start, change = StreamingStarted("ana", "s1", "v1", "4K", AT), QualityChanged("ana", "s1", "4K", "720p", AT + 1 * S)
    beat = Heartbeat("ana", "s1", 9.0, AT + 9 * S)

    async def run() -> None:
        for order in permutations((start, change, beat)):
            if order.index(start) > order.index(change):
                continue
            async with streaming("memory://").running() as app:
                for event in order:
                    await told(app, event)
                assert await now(app, AT + 10 * S) == Now(1, 1, {"720p": 1})
                assert await app.db("select seen_us from streaming_sessions") == [(as_us(AT + 9 * S),)]

    asyncio.run(run())


def test_a_heartbeat_alone_is_no_viewer() -> None:
    async def run() -> None:
        async with streaming("memory://").running() as app:
            await told(app, Heartbeat("ana", "s1", 9.0, AT))
            assert await now(app, AT) == Now(0, 0, {})

    asyncio.run(run())


def test_a_profile_counts_videos_qualities_and_hours_once() -> None:
    async def run() -> None:
        async with streaming("memory://").running() as app:
            start = StreamingStarted("ana", "s1", "video_matrix", "4K", AT)
            await told(app, start, QualityChanged("ana", "s1", "4K", "1080p", AT + 1 * S))
            await told(app, start)  # the same under another id, as from a broker that delivers it again
            assert await profiles(app) == {"ana": Profile({"video_matrix": 1}, {"4K": 1, "1080p": 1}, 2.0)}
            assert (await profiles(app))["ana"].preferred_quality == "1080p"
            updates = [app.decode(r) async for r in app.history(types="recommendation.updated")]
            assert [(update.user, update.model) for update in updates] == [("ana", MODEL)]

    asyncio.run(run())


def test_recommendations_share_genres_and_are_new() -> None:
    profile = Profile()
    take_in(profile, StreamingStarted("ana", "s1", "video_heat", "4K", AT))
    found = recommend(profile)
    assert "video_heat" not in found
    assert found[:2] == ("video_dark_knight", "video_interstellar")
    assert recommend(Profile(videos=dict.fromkeys(CATALOGUE, 1))) == ()


def test_a_replay_gives_the_same() -> None:
    async def run() -> None:
        async with streaming("memory://").running() as app:
            await told(app, StreamingStarted("ana", "s1", "v1", "4K", AT), QualityChanged("ana", "s1", "4K", "720p", AT))
            before = await profiles(app), await now(app, AT)
            for group in ("realtime_analytics", "personalization_ml"):
                await app.replay(group, SeekTo(end="beginning"))
            await app.wait_idle(timeout="30s")
            assert (await profiles(app), await now(app, AT)) == before

    asyncio.run(run())


def test_the_scenario_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(demo_stream())
    out = capsys.readouterr().out
    assert "now: 4 viewers, 4 sessions: 4 on 1080p" in out
    assert "31 s later, without a heartbeat: 0 viewers" in out
    assert "4 profiles" in out


def test_the_window_is_thirty_seconds() -> None:
    assert stream_analytics.SILENT_US == 30_000_000
