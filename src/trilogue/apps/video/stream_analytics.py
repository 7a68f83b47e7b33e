"""Real-time analytics: who is watching right now, and how well, from two topics.

    streaming_sessions   session | user, video, quality, started_us, seen_us
    now(app, at)   ──>   Now(viewers=4, qualities={"1080p": 4}, sessions=4)

A session that has not been heard of for 30 s counts no more, and its quality neither; should it come back, it does again. After
an hour its row goes. Topics are not in order among each other: a heartbeat may come before the start, whose row it then begins.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from trilogue import App, Db, Retry, Router
from trilogue.apps.video.events import as_us
from trilogue.apps.video.stream_events import Heartbeat, QualityChanged, StreamingStarted

SILENT_US = 30_000_000
FORGET_US = 3_600_000_000

router = Router()


@dataclass(frozen=True, slots=True)
class Now:
    """What goes on. viewers: people. sessions: what they stream, on one device or more. qualities: of each viewer's latest."""

    viewers: int
    sessions: int
    qualities: dict[str, int]


@dataclass(slots=True)
class Seen:
    """What a batch says of a session; None: nothing."""

    user: str
    video: str | None = None
    quality: str | None = None
    started_us: int | None = None
    seen_us: int = 0


@router.setup
def tables(db: Db) -> None:
    """The read model."""
    db.execute(
        'create table if not exists streaming_sessions (session text primary key, "user" text not null, video text, '
        "quality text, started_us bigint, seen_us bigint not null)"
    )
    db.execute("create index if not exists streaming_seen on streaming_sessions (seen_us)")


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    db.execute("delete from streaming_sessions")


@router.on(group="realtime_analytics", retry=Retry(25, "20ms..1s"), batch=500, db_limit="2s", reset=reset)
def observe(events: list[StreamingStarted | QualityChanged | Heartbeat], db: Db) -> None:
    """Note who was seen, and in what quality."""
    sessions = _folded(events)
    db.executemany(
        "insert into streaming_sessions values (?, ?, ?, ?, ?, ?) on conflict (session) do update set "
        "video = coalesce(excluded.video, streaming_sessions.video), "
        "quality = coalesce(excluded.quality, streaming_sessions.quality), "
        "started_us = coalesce(excluded.started_us, streaming_sessions.started_us), "
        "seen_us = case when excluded.seen_us > streaming_sessions.seen_us "
        "then excluded.seen_us else streaming_sessions.seen_us end",
        [(id, s.user, s.video, s.quality, s.started_us, s.seen_us) for id, s in sorted(sessions.items())],
    )
    latest_us = max(seen.seen_us for seen in sessions.values())
    db.execute("delete from streaming_sessions where seen_us <= ?", (latest_us - FORGET_US,))


def _folded(events: Iterable[StreamingStarted | QualityChanged | Heartbeat]) -> dict[str, Seen]:
    sessions: dict[str, Seen] = {}
    for e in events:
        seen = sessions.setdefault(e.session, Seen(e.user))
        seen.seen_us = max(seen.seen_us, as_us(e.at))
        match e:
            case StreamingStarted():
                seen.video, seen.quality, seen.started_us = e.video, e.quality, as_us(e.at)
            case QualityChanged():
                seen.quality = e.new
    return sessions


async def now(app: App, at: datetime) -> Now:
    """Who is watching at a time: who was seen in the 30 seconds before it."""
    since_us = as_us(at) - SILENT_US
    active = "from streaming_sessions s where seen_us > ? and started_us is not null"
    [(viewers, sessions)] = await app.db(f'select count(distinct "user"), count(*) {active}', (since_us,))
    latest = (
        'and not exists (select 1 from streaming_sessions later where later."user" = s."user" '
        "and later.seen_us > ? and later.started_us > s.started_us)"
    )
    rows = await app.db(f"select quality, count(*) {active} {latest} group by quality order by quality", (since_us, since_us))
    return Now(viewers, sessions, dict(rows))
