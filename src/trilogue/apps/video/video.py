"""Video Service: somebody presses play, one event goes out, the answer comes at once.

    start_watching(user, video, title) ──> video.watch_started ──> {"status": "started", "session": …}

It knows none of the six services that react; adding a seventh changes nothing here.
"""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from trilogue import App
from trilogue.apps.video.events import WatchStarted, as_us, session_id

SESSIONS = 10_000


@dataclass(frozen=True, slots=True)
class Started:
    """The answer to start_watching()."""

    status: Literal["started"]
    session: str


class VideoService:
    """Starts watches and remembers the latest 10,000 sessions.

    app: where the events go; it has to be open.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.sessions: OrderedDict[str, WatchStarted] = OrderedDict()

    async def start_watching(
        self, user: str, video: str, title: str, genres: tuple[str, ...] = (), *, at: datetime | None = None
    ) -> Started:
        """Start a watch; when this returns it is durable on the log.

        at: when it was, with a time zone; None: now. The same user, video and time are the same session, stored once.
        Raises Conflict if that session is on the log with another title or other genres.
        """
        at = at or datetime.now(UTC)
        watch = WatchStarted(user, video, title, genres, session_id(user, video, as_us(at)), at)
        await self.app.publish(watch, id=watch.session, time=at)
        self._remember(watch)
        return Started("started", watch.session)

    def _remember(self, watch: WatchStarted) -> None:
        self.sessions[watch.session] = watch
        if len(self.sessions) > SESSIONS:
            self.sessions.popitem(last=False)
