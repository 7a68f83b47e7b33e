"""Personalization: what each user watches, how well, how long, and what they might like next.

streaming.started ──> streaming_profiles   user | videos, qualities (JSON: how often each, the latest last), hours
                  ──> recommendation.updated     videos of the same genres first, those not watched yet
"""

from dataclasses import dataclass, field

import msgspec

from trilogue import App, Db, Retry, Router
from trilogue.apps.video.events import as_us
from trilogue.apps.video.handled import create_handled, forget_handled, fresh_ids, rows_of
from trilogue.apps.video.stream_events import QualityChanged, RecommendationUpdated, StreamingStarted

MODEL = "v1.0"
TOP = 3
HOURS_A_FILM = 2.0  # how long somebody really watches is in the heartbeats, which are not read here
CATALOGUE = {
    "video_marvel_endgame": ("action", "adventure"),
    "video_iron_man": ("action", "science fiction"),
    "video_black_panther": ("action", "adventure"),
    "video_dark_knight": ("action", "crime"),
    "video_heat": ("crime", "drama"),
    "video_inception": ("action", "science fiction"),
    "video_interstellar": ("drama", "science fiction"),
    "video_matrix": ("action", "science fiction"),
}

router = Router()


@dataclass(slots=True)
class Profile:
    """What is known of a user. videos, qualities: how often each, the latest last."""

    videos: dict[str, int] = field(default_factory=dict)
    qualities: dict[str, int] = field(default_factory=dict)
    hours: float = 0.0

    @property
    def preferred_quality(self) -> str | None:
        """What was chosen most often; of those that were as often, the latest."""
        return max(reversed(self.qualities), key=self.qualities.__getitem__, default=None)


@router.setup
def tables(db: Db) -> None:
    """The profiles, and which events are in them."""
    create_handled(db, "personalization")
    db.execute(
        'create table if not exists streaming_profiles ("user" text primary key, videos text, qualities text, '
        "hours double precision)"
    )


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    forget_handled(db, "personalization")
    db.execute("delete from streaming_profiles")


@router.on(group="personalization_ml", retry=Retry(25, "20ms..1s"), batch=200, db_limit="2s", reset=reset)
def learn(events: list[StreamingStarted | QualityChanged], db: Db) -> list[RecommendationUpdated]:
    """Take in what users chose; who started something gets new recommendations."""
    events = [events[n] for n in fresh_ids(db, "personalization", [f"{e.session} {as_us(e.at)}" for e in events])]
    profiles = load(db, sorted({e.user for e in events}))
    for e in events:
        take_in(profiles[e.user], e)
    db.executemany(
        'insert into streaming_profiles values (?, ?, ?, ?) on conflict ("user") do update '
        "set videos = excluded.videos, qualities = excluded.qualities, hours = excluded.hours",
        [(user, _json(p.videos), _json(p.qualities), p.hours) for user, p in profiles.items()],
    )
    started = sorted({e.user for e in events if isinstance(e, StreamingStarted)})
    return [RecommendationUpdated(user, recommend(profiles[user]), MODEL) for user in started]


def load(db: Db, users: list[str]) -> dict[str, Profile]:
    """The profiles of these users so far."""
    found = {user: Profile() for user in users}
    select = 'select "user", videos, qualities, hours from streaming_profiles where "user" in'
    for user, videos, qualities, hours in rows_of(db, select, users):
        found[user] = _profile(videos, qualities, hours)
    return found


def take_in(profile: Profile, e: StreamingStarted | QualityChanged) -> None:
    """Bring a profile up to date."""
    if isinstance(e, StreamingStarted):
        _count(profile.videos, e.video)
        profile.hours += HOURS_A_FILM
    _count(profile.qualities, e.quality if isinstance(e, StreamingStarted) else e.new)


def recommend(profile: Profile) -> tuple[str, ...]:
    """Three videos not watched yet, those that share most genres with what was watched first."""
    liked = {genre for video in profile.videos for genre in CATALOGUE.get(video, ())}
    new = [video for video in CATALOGUE if video not in profile.videos]
    return tuple(sorted(new, key=lambda video: -len(liked.intersection(CATALOGUE[video])))[:TOP])


async def profiles(app: App) -> dict[str, Profile]:
    """All profiles, by user."""
    rows = await app.db('select "user", videos, qualities, hours from streaming_profiles')
    return {user: _profile(*row) for user, *row in sorted(rows)}


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.pop(name, 0) + 1


def _json(counts: dict[str, int]) -> str:
    return msgspec.json.encode(counts).decode()


def _profile(videos: str, qualities: str, hours: float) -> Profile:
    counts = dict[str, int]
    return Profile(msgspec.json.decode(videos, type=counts), msgspec.json.decode(qualities, type=counts), hours)
