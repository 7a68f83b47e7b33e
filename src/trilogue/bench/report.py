"""All figures in turn: ours, the limit, the peer, round by round, so that a machine whose speed drifts is fair to all.

    {"name": "publish_64", "rate": 71000, "limit": 6600, "ratio": 10.8, "peer": 4100, "peer_ratio": 17.3}

rate: ours, per second (latency_*: microseconds). limit: raw apsw doing the same durable work. peer: huey. Ratios are medians
of the rounds' own ratios.
"""

import asyncio
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trilogue.bench import figures, limits, peers

Measure = Callable[[Path], float]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: ours, the limit and the peer, as three measurements of the same unit."""

    name: str
    ours: Measure
    limit: Measure | None
    peer: Measure | None


@dataclass(frozen=True, slots=True)
class Result:
    """A measured Row; what was not measured is None."""

    name: str
    rate: float
    limit: float | None
    ratio: float | None
    peer: float | None
    peer_ratio: float | None


def _ours(figure: figures.Figure, events: int) -> Measure:
    async def measure(folder: Path) -> float:
        return await figure(folder, events)

    return lambda folder: asyncio.run(measure(folder))


def _percentile(measure: Callable[[Path], list[float]], at: float) -> Measure:
    def percentile(folder: Path) -> float:
        took = measure(folder)
        return took[int(at * (len(took) - 1))] * 1_000_000

    return percentile


def rows(scale: float = 1.0) -> list[Row]:
    """What is measured; scale: events per figure, 1 for a run of about a minute."""

    def n(events: int) -> int:
        return max(64, round(events * scale))

    def ours_latency(folder: Path) -> list[float]:
        return asyncio.run(figures.latency(folder, n(1_000)))

    def raw_latency(folder: Path) -> list[float]:
        return limits.latency(folder, n(1_000))

    def raw_one(folder: Path) -> float:
        return limits.publish_one(folder, n(4_000))

    def huey_publish(folder: Path) -> float:
        return peers.publish(folder, n(4_000))

    return [
        Row("publish_one", _ours(figures.publish_one, n(4_000)), raw_one, huey_publish),
        Row("publish_64", _ours(figures.publish_64, n(64_000)), raw_one, huey_publish),
        Row("publish_many", _ours(figures.publish_many, n(100_000)), lambda f: limits.publish_many(f, n(100_000)), huey_publish),
        Row(
            "consume_ordered",
            _ours(figures.consume_ordered, n(200_000)),
            lambda f: limits.consume_ordered(f, n(200_000)),
            lambda f: peers.consume_ordered(f, n(3_000)),
        ),
        Row(
            "consume_emit",
            _ours(figures.consume_emit, n(60_000)),
            lambda f: limits.consume_emit(f, n(60_000)),
            lambda f: peers.consume_emit(f, n(2_000)),
        ),
        Row("latency_p50_us", _percentile(ours_latency, 0.50), _percentile(raw_latency, 0.50), None),
        Row("latency_p99_us", _percentile(ours_latency, 0.99), _percentile(raw_latency, 0.99), None),
    ]


def run(*, only: Sequence[str] = (), rounds: int = 3, scale: float = 1.0, folder: Path | None = None) -> Iterator[Result]:
    """Measure the figures whose names begin with one of `only`, each in `rounds` alternating rounds.

    folder: where the files are made and removed; must be on the disk that is to be measured.
    """
    for row in rows(scale):
        if only and not any(row.name.startswith(name) for name in only):
            continue
        with tempfile.TemporaryDirectory(prefix="trilogue-bench-", dir=folder) as place:
            yield _measure(row, Path(place), rounds)


def _measure(row: Row, folder: Path, rounds: int) -> Result:
    ours: list[float] = []
    limit: list[float] = []
    peer: list[float] = []
    for _ in range(rounds):
        ours.append(row.ours(folder))
        if row.limit is not None:
            limit.append(row.limit(folder))
        if row.peer is not None:
            peer.append(row.peer(folder))
    return Result(row.name, statistics.median(ours), _median(limit), _ratio(ours, limit), _median(peer), _ratio(ours, peer))


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(ours: list[float], theirs: list[float]) -> float | None:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if theirs else None
