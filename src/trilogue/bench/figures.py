"""What trilogue does on a durable SQLite file, in events per second; each figure on a fresh file."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from trilogue.app import App
from trilogue.events import event

WRITERS = 64
KEYS = 1_000


@event("bench.watched", key="user")
class Watched(msgspec.Struct, frozen=True):
    """A typical small event."""

    user: str
    video: str
    position_s: int


@event("bench.counted", key="user", topic="bench-counts")
class Counted(msgspec.Struct, frozen=True):
    """What a handler emits."""

    user: str
    count: int


def sample(n: int) -> Watched:
    """The n-th event."""
    return Watched(f"user-{n % KEYS}", f"video-{n % 977}", n)


def app_on(folder: Path) -> App:
    """An App on a new file in the folder."""
    return App(f"sqlite:///{folder}/trilogue-{time.monotonic_ns()}.db", name="bench")


async def publish_one(folder: Path, events: int) -> float:
    """One publish after the other, each awaited."""
    async with app_on(folder) as app:
        began = time.perf_counter()
        for n in range(events):
            await app.publish(sample(n))
        return events / (time.perf_counter() - began)


async def publish_64(folder: Path, events: int) -> float:
    """64 tasks that each await their publishes."""
    async with app_on(folder) as app:

        async def publisher(start: int) -> None:
            for n in range(start, events, WRITERS):
                await app.publish(sample(n))

        began = time.perf_counter()
        await asyncio.gather(*(publisher(start) for start in range(WRITERS)))
        return events / (time.perf_counter() - began)


async def publish_many(folder: Path, events: int) -> float:
    """Batches of 1,000."""
    async with app_on(folder) as app:
        batch = [sample(n) for n in range(events)]
        began = time.perf_counter()
        await app.publish_many(batch)
        return events / (time.perf_counter() - began)


async def consume_ordered(folder: Path, events: int) -> float:
    """A backlog through a typed handler, in order per key, settled durably."""
    app = app_on(folder)

    @app.on(group="ordered", start="beginning")
    async def handle(_: Watched) -> None:
        return None

    return await _drain(app, events)


async def consume_emit(folder: Path, events: int) -> float:
    """The same, publishing one event for each with its settlement."""
    app = app_on(folder)

    @app.on(group="emitting", start="beginning")
    async def handle(e: Watched) -> Counted:
        return Counted(e.user, e.position_s)

    return await _drain(app, events)


async def _drain(app: App, events: int) -> float:
    async with app:
        await app.publish_many([sample(n) for n in range(events)])
        began = time.perf_counter()
        async with app.running():
            await app.wait_idle()
            return events / (time.perf_counter() - began)


async def latency(folder: Path, events: int) -> list[float]:
    """Seconds from calling publish to the handler having the event, in one process, each settled before the next."""
    app = app_on(folder)
    handled = asyncio.Event()
    took: list[float] = []

    @app.on(group="latency")
    async def handle(_: Watched) -> None:
        took.append(time.perf_counter() - began)
        handled.set()

    async with app.running():
        for n in range(events):
            handled.clear()
            began = time.perf_counter()
            receipt = await app.publish(sample(n))
            await handled.wait()
            await app.wait_for(receipt, "latency")
    return sorted(took)


Figure = Callable[[Path, int], Awaitable[float]]
