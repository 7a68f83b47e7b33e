"""huey on SQLite with fsync: the same events as tasks, through its public API, without the polling of its consumer."""

import time
from pathlib import Path
from typing import Any

from trilogue.bench.figures import KEYS
from trilogue.errors import Unsupported


def _huey(folder: Path) -> Any:
    try:
        from huey import SqliteHuey
    except ImportError as error:
        raise Unsupported("the peer is not installed: pip install 'trilogue[bench]'") from error
    # results=False: huey then stores no result, which would be a second write per task.
    return SqliteHuey("bench", filename=f"{folder}/huey-{time.monotonic_ns()}.db", fsync=True, results=False)


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


def publish(folder: Path, events: int) -> float:
    """One enqueue after the other: with several threads huey is slower, it holds one write lock."""
    watched, _ = _tasks(_huey(folder))
    began = time.perf_counter()
    _enqueue(watched, events)
    return events / (time.perf_counter() - began)


def consume_ordered(folder: Path, events: int) -> float:
    """Dequeue and execute in order."""
    return _consume(folder, events, emit=False)


def consume_emit(folder: Path, events: int) -> float:
    """The same, each task enqueuing another."""
    return _consume(folder, events, emit=True)


def _consume(folder: Path, events: int, *, emit: bool) -> float:
    huey = _huey(folder)
    watched, _ = _tasks(huey)
    _enqueue(watched, events, emit=emit)
    began = time.perf_counter()
    for _ in range(events):
        huey.execute(huey.dequeue())
    return events / (time.perf_counter() - began)
