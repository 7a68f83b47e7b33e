"""huey on SQLite with fsync: the same events as tasks, through its public API, without the polling of its consumer."""

import time
from typing import Any

from huey import SqliteHuey

from trilogue.bench.events import KEYS
from trilogue.bench.measured import Measured
from trilogue.bench.place import Place

SIDE = "huey"


def _huey(at: Place) -> Any:
    # results=False: huey then stores no result, which would be a second write per task.
    return SqliteHuey("bench", filename=f"{at.folder}/huey-{time.monotonic_ns()}.db", fsync=True, results=False)


def _tasks(huey: Any) -> tuple[Any, Any]:
    @huey.task()  # type: ignore[untyped-decorator]
    def counted(user: str, count: int) -> None:
        return None

    @huey.task()  # type: ignore[untyped-decorator]
    def watched(user: str, video: str, position_s: int, emit: bool) -> None:
        if emit:
            counted(user, position_s)

    return watched, counted


def _enqueue(watched: Any, events: int, *, emit: bool = False) -> None:
    for n in range(events):
        watched(f"user-{n % KEYS}", f"video-{n % 977}", n, emit)


def publish_one(at: Place, events: int) -> Measured:
    """One enqueue after the other: with several threads huey is slower, it holds one write lock."""
    watched, _ = _tasks(_huey(at))
    began = time.perf_counter()
    _enqueue(watched, events)
    return Measured(events / (time.perf_counter() - began))


def consume_ordered(at: Place, events: int) -> Measured:
    """Dequeue and execute in order."""
    return _consume(at, events, emit=False)


def consume_emit(at: Place, events: int) -> Measured:
    """Dequeue and execute in order, each task enqueuing another."""
    return _consume(at, events, emit=True)


def _consume(at: Place, events: int, *, emit: bool) -> Measured:
    huey = _huey(at)
    watched, _ = _tasks(huey)
    _enqueue(watched, events, emit=emit)
    began = time.perf_counter()
    for _ in range(events):
        huey.execute(huey.dequeue())
    return Measured(events / (time.perf_counter() - began))
