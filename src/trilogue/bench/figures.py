"""What trilogue does, in events per second: the same program on every URL, each time on a fresh log.

A broker hands a group only what comes after the group, so every group is there before what it is to read.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from trilogue.app import App
from trilogue.bench.durable import checked
from trilogue.bench.events import WRITERS, Counted, Watched, sample
from trilogue.bench.measured import PATIENCE_S, Measured, Stretch
from trilogue.bench.place import Place
from trilogue.events import Group

SIDE = "trilogue"
GROUP = "bench"


@asynccontextmanager
async def _publishing(at: Place) -> AsyncIterator[App]:
    """An App whose events somebody will want: a queue's server keeps nothing else."""
    async with at.app() as app:
        await app.store.bind([Group(GROUP, ("bench.watched",))], work=False)
        yield app


async def publish_one(at: Place, events: int) -> Measured:
    """One publish after the other, each awaited."""
    async with _publishing(at) as app:
        began = time.perf_counter()
        for n in range(events):
            await app.publish(sample(n))
        return await checked(at, app, events / (time.perf_counter() - began), events, group=GROUP)


async def publish_64(at: Place, events: int) -> Measured:
    """64 tasks that each await their publishes."""
    async with _publishing(at) as app:

        async def publisher(start: int) -> None:
            for n in range(start, events, WRITERS):
                await app.publish(sample(n))

        began = time.perf_counter()
        await asyncio.gather(*(publisher(start) for start in range(WRITERS)))
        return await checked(at, app, events / (time.perf_counter() - began), events, group=GROUP)


async def publish_many(at: Place, events: int) -> Measured:
    """Batches of 1,000."""
    async with _publishing(at) as app:
        batch = [sample(n) for n in range(events)]
        began = time.perf_counter()
        await app.publish_many(batch)
        return await checked(at, app, events / (time.perf_counter() - began), events, group=GROUP)


async def consume_ordered(at: Place, events: int) -> Measured:
    """A backlog through a typed handler, in order per key, settled durably."""
    app, stretch = at.app(), Stretch(events)

    @app.on(group=GROUP)
    async def handle(_: Watched) -> None:
        stretch.passed()

    return await _drained(app, stretch)


async def consume_emit(at: Place, events: int) -> Measured:
    """A backlog through a typed handler that returns an event for each, published with its settlement."""
    app, stretch = at.app(), Stretch(events)

    @app.on(group=GROUP)
    async def handle(e: Watched) -> Counted:
        stretch.passed()
        return Counted(e.user, e.position_s)

    return await _drained(app, stretch)


async def _drained(app: App, stretch: Stretch) -> Measured:
    """From the first event handled until all are settled."""
    async with app:
        emitted = Group("counts", ("bench.counted",))
        await app.store.bind([*(sub.group for sub in app.subscriptions), emitted], work=False)
        await app.publish_many([sample(n) for n in range(stretch.events)])
        async with app.running():
            await app.wait_idle(timeout=f"{PATIENCE_S}s")
            stretch.ends()
        return Measured(stretch.rate(SIDE))


async def latency(at: Place, events: int) -> list[float]:
    """Seconds from calling publish to the handler having the event, in one process, one after the other."""
    app = at.app()
    handled = asyncio.Event()
    took: list[float] = []

    @app.on(group=GROUP)
    async def handle(_: Watched) -> None:
        took.append(time.perf_counter() - began)
        handled.set()

    async with app.running():
        for n in range(events):
            handled.clear()
            began = time.perf_counter()
            receipt = await app.publish(sample(n))
            await handled.wait()
            if at.store is None:  # a settlement is a commit, and the other side makes one, too
                await app.wait_for(receipt, GROUP)
    return sorted(took)
