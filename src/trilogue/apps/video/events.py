"""What happens on the platform.

WatchStarted            somebody pressed play        Video Service ──> six services
RecommendationUpdated   there is something new       Recommendation Service ──> Notification Service
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from trilogue import derived_id, event

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@event("video.watch_started", key="user")
@dataclass(frozen=True, slots=True)
class WatchStarted:
    """A user started a video. session: also the event's id, so that a service can tell watches apart."""

    user: str
    video: str
    title: str
    genres: tuple[str, ...]
    session: str
    watched_at: datetime

    @property
    def watched_us(self) -> int:
        """When, in microseconds since 1970."""
        return as_us(self.watched_at)


@event("recommendation.updated", key="user")
@dataclass(frozen=True, slots=True)
class RecommendationUpdated:
    """There are new titles for a user, the best first."""

    user: str
    titles: tuple[str, ...]
    updated_at: datetime


def as_us(when: datetime) -> int:
    """A datetime with a time zone in microseconds since 1970, exactly."""
    return (when - _EPOCH) // _MICROSECOND


def as_datetime(us: int) -> datetime:
    """Microseconds since 1970 as a datetime in UTC, exactly."""
    return _EPOCH + us * _MICROSECOND


def session_id(user: str, video: str, watched_us: int) -> str:
    """The same session for the same watch: a row that comes twice, or is imported again, is one event.

    watched_us: microseconds since 1970.
    """
    return derived_id(watched_us, user, video, watched_us)
