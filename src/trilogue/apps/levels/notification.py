"""Level 1, event notification: the event says that something happened, and no more.

UserCreated("ann") ──> Mail Service ──"who is ann?"──> User Service
                                    <──ann@example.org──
"""

from dataclasses import dataclass

from trilogue import App, Retry, event
from trilogue.apps.levels.services import USERS, Services

NUMBER, NAME = 1, "event notification"


@event("user.created", key="user")
@dataclass(frozen=True, slots=True)
class UserCreated:
    """There is a new user."""

    user: str


EVENTS = tuple(map(UserCreated, USERS))


async def publish(app: App) -> None:
    """Let it happen."""
    await app.publish_many(EVENTS)


def receiver(app: App, services: Services) -> list[str]:
    """Mail Service: sends a welcome mail; returns the list in which it notes what it did."""
    done: list[str] = []

    @app.on(group="mail", retry=Retry(25, "10ms..200ms"))
    async def welcome(e: UserCreated) -> None:
        user = await services.user(e.user)  # the event does not say where to
        done.append(f"welcome mail to {user.email}")

    return done
