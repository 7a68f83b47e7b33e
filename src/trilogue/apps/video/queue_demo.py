"""Three people press play, and everybody who should know does, though analytics keeps failing.

    user123  Avengers: Endgame  ┐                      ┌ taste, recommendations, badges, ranking
    user789  The Dark Knight    ├─ video.watch_started ┼ "user123 started watching Avengers: Endgame" to each friend
    user456  Iron Man           ┘                      └ analytics: three attempts in ten fail, and are tried again

A dozen others have watched films before, so that there is something to recommend and somebody to tell.
"""

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Literal

from rich.console import Console

from trilogue import App
from trilogue.apps.place import Place, Wanted, place
from trilogue.apps.video.events import WatchStarted, as_us
from trilogue.apps.video.platform import platform
from trilogue.apps.video.report import Json, recommendations, taste
from trilogue.apps.video.video import VideoService

FILMS = {
    "endgame": ("Avengers: Endgame", ("Action", "Adventure")),
    "ironman": ("Iron Man", ("Action", "Science Fiction")),
    "panther": ("Black Panther", ("Action", "Adventure")),
    "darkknight": ("The Dark Knight", ("Action", "Crime")),
    "inception": ("Inception", ("Action", "Science Fiction")),
    "matrix": ("The Matrix", ("Action", "Science Fiction")),
    "heat": ("Heat", ("Crime", "Drama")),
    "parasite": ("Parasite", ("Drama", "Thriller")),
}
SCENARIO = (("user123", "endgame"), ("user789", "darkknight"), ("user456", "ironman"))
EARLIER = (
    ("ironman", "endgame", "panther", "matrix"),
    ("darkknight", "heat", "inception", "parasite"),
    ("matrix", "inception", "ironman", "darkknight"),
)
OTHERS = 12


async def demo_queue(url: str = "memory://", report: Literal["text", "json"] = "text", *, store: str | None = None) -> Json:
    """Play the scenario of three users, print what became of it and return it.

    url, store: the log, as App takes it. report: for people or for programs.
    """
    async with place(Wanted(url, store)) as where:
        found = await _play(where)
    if report == "json":
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        _show(found, Console())
    return found


async def _play(where: Place) -> Json:
    async with platform(where.url, store=where.store, fail={"analytics": 0.3}).running() as app:
        service = VideoService(app)
        for user, film, at in _earlier(datetime.now(UTC)):
            await service.start_watching(user, film, *FILMS[film], at=at)
        await app.wait_idle()
        since = datetime.now(UTC)
        sessions = [(await service.start_watching(user, film, *FILMS[film])).session for user, film in SCENARIO]
        await app.wait_idle()
        return await _found(app, [service.sessions[session] for session in sessions], since)


def _earlier(now: datetime) -> Iterator[tuple[str, str, datetime]]:
    for n in range(OTHERS):
        for m, film in enumerate(EARLIER[n % len(EARLIER)]):
            yield f"viewer{n + 1:02d}", film, now - timedelta(days=20 - n, hours=-2 * m)


async def _notifications(app: App, since: datetime) -> list[tuple[str, str]]:
    letters = 'select "user", text from notification_sent where at_us >= ? order by at_us, text, "user"'
    return await app.db(letters, (as_us(since),))


async def _found(app: App, watches: list[WatchStarted], since: datetime) -> Json:
    groups = {group.name: group for group in (await app.store.status()).groups}
    tastes = {watch.user: await taste(app, watch.user) for watch in watches}
    told = await _notifications(app, since)
    return {
        "watches": [{"user": w.user, "title": w.title, "session": w.session} for w in watches],
        "tastes_updated": sum(map(bool, tastes.values())),
        "tastes": tastes,
        "recommendations": {watch.user: (await recommendations(app, watch.user))[:3] for watch in watches},
        "notifications_sent": len(told),
        "notifications": [list(letter) for letter in told],
        "analytics": {
            "failed_attempts": groups["analytics"].failed,
            "dead": groups["analytics"].dead,
            "counted": (await app.db("select count(*) from analytics_handled"))[0][0],
        },
        "lag": {name: group.lag for name, group in groups.items()},
    }


def _show(found: Json, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for watch in found["watches"]:
        say(f"{watch['user']} started {watch['title']}: started, session {watch['session']}")
    say("")
    say(f"{found['tastes_updated']} tastes updated")
    for user, genres in found["tastes"].items():
        say(f"  {user}: {', '.join(genres)}; recommended: {' · '.join(found['recommendations'][user])}")
    say(f"{found['notifications_sent']} notifications sent")
    for user, text in found["notifications"]:
        say(f"  to {user}: {text}")
    analytics = found["analytics"]
    say(
        f"Analytics failed {analytics['failed_attempts']} times on the way, was tried again, and has counted all "
        f"{analytics['counted']} watches. Nobody else noticed: {sum(found['lag'].values())} events are waiting anywhere."
    )
