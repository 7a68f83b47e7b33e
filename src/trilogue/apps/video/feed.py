"""Watches into the platform, as many users at once would start them, and how long each waited for its answer.

    chunk of watches ──> 128 tasks, each: wait until it is time ─ start_watching() ─ note the answer time
    next chunk       <── read in a thread meanwhile

A user's watches reach the log in order: tasks take them in order, and nothing is awaited between taking and publishing.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from math import ceil, log2

from trilogue.apps.video.events import as_datetime
from trilogue.apps.video.video import VideoService
from trilogue.apps.video.watch import Watch
from trilogue.errors import Conflict

AT_ONCE = 128
CHUNK = 5_000


class AnswerTimes:
    """Percentiles of any number of durations, to 2 %, in bounded memory."""

    PER_DOUBLING = 32

    def __init__(self, seconds: Iterable[float] = ()) -> None:
        self._counts: Counter[int] = Counter()
        for each in seconds:
            self.add(each)

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[round(log2(max(seconds, 1e-9)) * self.PER_DOUBLING)] += 1

    def percentile_ms(self, percent: float) -> float | None:
        """The duration that so many percent do not exceed, in milliseconds; None if nothing was counted."""
        left = ceil(self._counts.total() * percent / 100)
        for bucket in sorted(self._counts):
            left -= self._counts[bucket]
            if left <= 0:
                return float(f"{2 ** (bucket / self.PER_DOUBLING) * 1_000:.3g}")
        return None

    def summary(self) -> dict[str, float | None]:
        """p50 and p99 in milliseconds."""
        return {"p50": self.percentile_ms(50), "p99": self.percentile_ms(99)}


class Feeder:
    """Starts watches through a VideoService.

    speed: how many times as fast as they were; None: as fast as it goes.
    answers: how long each start_watching() took. sent: how many came back. conflicts: sessions that are on the log with
    another title or other genres.
    """

    def __init__(self, service: VideoService, speed: float | None = None) -> None:
        self.service = service
        self.speed = speed
        self.answers = AnswerTimes()
        self.sent = 0
        self.conflicts = 0
        self._began: tuple[float, int] | None = None

    async def feed(self, watches: Iterator[Watch], *, at_once: int = AT_ONCE) -> None:
        """Start all watches, so many at once at most."""
        chunk = await asyncio.to_thread(_take, watches)
        while chunk:
            reading = asyncio.create_task(asyncio.to_thread(_take, watches))
            queue = iter(chunk)
            await asyncio.gather(*(self._work(queue) for _ in range(at_once)))
            chunk = await reading

    async def _work(self, queue: Iterator[Watch]) -> None:
        for watch in queue:
            if self.speed is not None:
                await self._until(watch.time_us, self.speed)
            await self._start(watch)

    async def _until(self, time_us: int, speed: float) -> None:
        now = time.monotonic()
        began, first_us = self._began = self._began or (now, time_us)
        await asyncio.sleep(max(0.0, began + (time_us - first_us) / 1_000_000 / speed - now))

    async def _start(self, watch: Watch) -> None:
        at = as_datetime(watch.time_us)
        began = time.perf_counter()
        try:
            await self.service.start_watching(watch.user, watch.video, watch.title, watch.genres, at=at)
        except Conflict:
            self.conflicts += 1
        else:
            self.sent += 1
        self.answers.add(time.perf_counter() - began)


def _take(watches: Iterator[Watch]) -> list[Watch]:
    return list(islice(watches, CHUNK))
