"""Streaming Service: who starts, changes quality or is still there becomes an event; the answer comes at once.

start_streaming("alice", "video_matrix", "4K") ──> streaming.started           Session
update_quality(session, "1080p")               ──> streaming.quality_changed   4K ─▶ 1080p
send_heartbeat(session)                        ──> streaming.heartbeat         how far into the film
"""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime

from trilogue import App, Receipt
from trilogue.apps.video.events import as_us, session_id
from trilogue.apps.video.stream_events import Heartbeat, QualityChanged, StreamingStarted

SESSIONS = 10_000


class UnknownSession(LookupError):
    """There is no session of this name, or it is among the older than the latest 10,000."""


@dataclass(slots=True)
class Session:
    """Somebody who streams. receipt: of the latest event, which says where on the log that is."""

    id: str
    user: str
    video: str
    quality: str
    started_at: datetime
    receipt: Receipt


class StreamingService:
    """Knows the latest 10,000 sessions.

    app: where the events go; it has to be open.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.sessions: OrderedDict[str, Session] = OrderedDict()

    async def start_streaming(self, user: str, video: str, quality: str = "1080p", *, at: datetime | None = None) -> Session:
        """Start; when this returns it is durable on the log. at: when it was, with a time zone; None: now."""
        at = at or datetime.now(UTC)
        id = session_id(user, video, as_us(at))
        receipt = await self.app.publish(StreamingStarted(user, id, video, quality, at), id=id, time=at)
        self.sessions[id] = session = Session(id, user, video, quality, at, receipt)
        if len(self.sessions) > SESSIONS:
            self.sessions.popitem(last=False)
        return session

    async def update_quality(self, session: str, new: str, *, at: datetime | None = None) -> Session:
        """Go on in another quality; raises UnknownSession."""
        found, at = self._known(session), at or datetime.now(UTC)
        found.receipt = await self.app.publish(QualityChanged(found.user, session, found.quality, new, at), time=at)
        found.quality = new
        return found

    async def send_heartbeat(self, session: str, *, at: datetime | None = None) -> Session:
        """Say that somebody is still there; raises UnknownSession."""
        found, at = self._known(session), at or datetime.now(UTC)
        position_s = (at - found.started_at).total_seconds()
        found.receipt = await self.app.publish(Heartbeat(found.user, session, position_s, at), time=at)
        return found

    def _known(self, session: str) -> Session:
        if session not in self.sessions:
            raise UnknownSession(f"there is no session {session!r}: start_streaming() makes one and returns it")
        return self.sessions[session]
