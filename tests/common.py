"""What the tests of the App share: three events, and how a test is run."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from trilogue import App, Context, Db, Record, Retry, event


@event("video.watched", key="user")
@dataclass(frozen=True, slots=True)
class Watched:
    user: str
    video: str = "v"


@event("badge.won", key="user")
@dataclass(frozen=True)
class Won:
    user: str
    badge: str


@event("mail.sent", key="user")
@dataclass(frozen=True)
class Sent:
    user: str


QUICK = Retry(3, "1ms")
ADD = "insert into counts as c values (?, 1) on conflict (name) do update set n = c.n + 1"


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run one test to its end, or fail it."""
    asyncio.run(asyncio.wait_for(main, 60))


async def all_of(app: App, **query: Any) -> list[Record]:
    """The whole history."""
    return [record async for record in app.history(**query)]


def counting(app: App) -> None:
    """A table that ADD counts in."""

    @app.setup
    def tables(db: Db) -> None:
        db.execute("create table if not exists counts (name text primary key, n integer not null)")


def failing(app: App, error: Callable[[], BaseException], **options: Any) -> list[int]:
    """A handler that always fails; the attempts it was called with."""
    attempts: list[int] = []

    @app.on(group="g", **options)
    async def handle(e: Watched, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise error()

    return attempts
