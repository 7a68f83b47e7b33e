"""Four people stream, two of them change to another quality, all are heard of, and then nobody any more.

alice   video_marvel_endgame   4K ─▶ 1080p  ┐  video-events      ┬─▶ realtime_analytics: 4 viewers, all on 1080p
bob     video_dark_knight      1080p        ├─                   └─▶ personalization_ml: 4 profiles, recommendations
carol   video_inception        720p ─▶ 1080p│  video-heartbeat   ──▶ realtime_analytics; 30 s of silence: 0 viewers
david   video_matrix           1080p        ┘
"""

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from rich.console import Console

from trilogue import App, Receipt
from trilogue.apps.place import KAFKA, Place, Wanted, app_on, place
from trilogue.apps.video import personalization, stream_analytics
from trilogue.apps.video.stream_events import RecommendationUpdated
from trilogue.apps.video.stream_service import StreamingService

Json = dict[str, Any]
VIEWERS = (
    ("alice", "video_marvel_endgame", "4K"),
    ("bob", "video_dark_knight", "1080p"),
    ("carol", "video_inception", "720p"),
    ("david", "video_matrix", "1080p"),
)
CHANGE, TO = ("alice", "carol"), "1080p"
SILENCE = timedelta(seconds=31)


def streaming(url: str, *, store: str | None = None) -> App:
    """An App with both services. store: what stands beside a broker."""
    app = app_on(url, store, "streaming")
    app.include(stream_analytics.router)
    app.include(personalization.router)
    return app


async def demo_stream(url: str = "memory://", report: Literal["text", "json"] = "text", *, store: str | None = None) -> Json:
    """Play the scenario of four viewers, print what became of it and return it.

    url, store: the log, as App takes it. report: for people or for programs.
    """
    async with place(Wanted(url, store), **KAFKA) as where:
        found = await _play(where)
    if report == "json":
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        _show(found, Console())
    return found


async def _play(where: Place) -> Json:
    app = streaming(where.url, store=where.store)
    recommended: dict[str, list[str]] = {}

    @app.on(group="screens")
    async def show(e: RecommendationUpdated) -> None:
        recommended[e.user] = list(e.recommendations)

    async with app.running():
        service = StreamingService(app)
        sessions = [await service.start_streaming(*viewer) for viewer in VIEWERS]
        started = [{"user": s.user, "video": s.video, "quality": s.quality, **_where(s.receipt)} for s in sessions]
        changed = [await service.update_quality(s.id, TO) for s in sessions if s.user in CHANGE]
        heard = [_where((await service.send_heartbeat(s.id)).receipt) for s in sessions]
        await app.wait_idle(timeout="60s")
        at = datetime.now(UTC)
        return {
            "log": app.store.url,
            "started": started,
            "changed": [{"user": s.user, "to": s.quality} for s in changed],
            "heartbeats": heard,
            "now": asdict(await stream_analytics.now(app, at)),
            "after_31_s_of_silence": asdict(await stream_analytics.now(app, at + SILENCE)),
            "profiles": {
                user: asdict(profile) | {"preferred_quality": profile.preferred_quality}
                for user, profile in (await personalization.profiles(app)).items()
            },
            "recommended": dict(sorted(recommended.items())),
        }


def _where(receipt: Receipt) -> Json:
    """Where on the log an event is; topic and partition on Kafka only."""
    return {"topic": receipt.topic, "partition": receipt.partition, "position": receipt.position}


# ── for people ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _show(found: Json, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for one in found["started"]:
        say(f"{one['user']} started {one['video']} in {one['quality']}: {_place(one)}")
    for one in found["changed"]:
        say(f"{one['user']} changed to {one['to']}")
    say(f"{len(found['heartbeats'])} heartbeats, the last: {_place(found['heartbeats'][-1])}")
    say("")
    for when, name in (("now", "now"), ("31 s later, without a heartbeat", "after_31_s_of_silence")):
        seen = found[name]
        qualities = ", ".join(f"{count} on {quality}" for quality, count in seen["qualities"].items()) or "nobody"
        say(f"{when}: {seen['viewers']} viewers, {seen['sessions']} sessions: {qualities}")
    say("")
    say(f"{len(found['profiles'])} profiles")
    for user, profile in found["profiles"].items():
        watched = ", ".join(profile["videos"])
        say(f"  {user}: {watched}; {profile['hours']:g} h, mostly in {profile['preferred_quality']}")
        say(f"    recommended: {' · '.join(found['recommended'].get(user, ['nothing yet']))}")


def _place(one: Json) -> str:
    if one["topic"] is None:
        return "on the log" if one["position"] is None else f"position {one['position']}"
    return f"topic {one['topic']}, partition {one['partition']}, offset {one['position']}"
