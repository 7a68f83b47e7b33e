"""What happens while people stream, and the topic it goes to on Kafka. The key is the user, so a user's events stay in order.

StreamingStarted · QualityChanged     video-events             Streaming Service ──> analytics, personalization
Heartbeat                             video-heartbeat          frequent, so it has a topic of its own
RecommendationUpdated                 recommendation-events    Personalization ──> whoever shows it
"""

from dataclasses import dataclass
from datetime import datetime

from trilogue import event

EVENTS, HEARTBEATS, RECOMMENDATIONS = "video-events", "video-heartbeat", "recommendation-events"


@event("streaming.started", key="user", topic=EVENTS)
@dataclass(frozen=True, slots=True)
class StreamingStarted:
    """A user streams a video."""

    user: str
    session: str
    video: str
    quality: str
    at: datetime


@event("streaming.quality_changed", key="user", topic=EVENTS)
@dataclass(frozen=True, slots=True)
class QualityChanged:
    """The picture got better, or worse."""

    user: str
    session: str
    old: str
    new: str
    at: datetime


@event("streaming.heartbeat", key="user", topic=HEARTBEATS)
@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Still watching. position_s: how far into the film, in seconds."""

    user: str
    session: str
    position_s: float
    at: datetime


@event("recommendation.updated", key="user", topic=RECOMMENDATIONS)
@dataclass(frozen=True, slots=True)
class RecommendationUpdated:
    """There are new videos for a user, the best first. model: the version of what chose them."""

    user: str
    recommendations: tuple[str, ...]
    model: str
