"""All figures in turn: ours, the limit, the peer, round by round, so that a machine whose speed drifts is fair to all.

    {"name": "publish_64", "rate": 71000, "limit": 6600, "ratio": 10.8, "peer": 4100, "peer_ratio": 17.3, "peer_name": "huey"}

rate: ours, per second (latency_*: microseconds). limit: raw apsw doing the same durable work. peer: the best-known library
that does the same. Ratios are medians of the rounds' own ratios. pragmas: what each side's connection said of itself.
"""

import asyncio
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trilogue.bench import figures, limits, peers, store_figures, store_limits
from trilogue.bench.measured import Measured, Pragmas, weakest
from trilogue.errors import BadOption, Unsupported

Measure = Callable[[Path], float | Measured]
LEAST = 128  # one save of 100 events, two of each of 64 tasks


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: ours, the limit and the peer, as three measurements of the same unit. family: what `only` also knows it by."""

    name: str
    ours: Measure
    limit: Measure | None
    peer: Measure | None
    family: str = "queue"

    @property
    def peer_name(self) -> str:
        """The library it is measured beside."""
        return "eventsourcing" if self.family == "store" else "huey"


@dataclass(frozen=True, slots=True)
class Result:
    """A measured Row; what was not measured is None."""

    name: str
    rate: float
    limit: float | None
    ratio: float | None
    peer: float | None
    peer_ratio: float | None
    peer_name: str | None
    peer_way: str | None
    pragmas: dict[str, Pragmas]


def _ours(figure: Callable[[Path, int], Awaitable[float | Measured]], events: int) -> Measure:
    async def measure(folder: Path) -> float | Measured:
        return await figure(folder, events)

    return lambda folder: asyncio.run(measure(folder))


def _percentile(measure: Callable[[Path], list[float]], at: float) -> Measure:
    def percentile(folder: Path) -> float:
        took = measure(folder)
        return took[int(at * (len(took) - 1))] * 1_000_000

    return percentile


def rows(scale: float = 1.0) -> list[Row]:
    """What is measured; scale: events per figure, 1 for a run of about two minutes."""

    def n(events: int) -> int:
        return max(LEAST, round(events * scale))

    return [*_queue_rows(n), *_store_rows(n)]


def _queue_rows(n: Callable[[int], int]) -> list[Row]:

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


def _store_rows(n: Callable[[int], int]) -> list[Row]:
    ours, raw = store_figures, store_limits

    def row(name: str, ours: Measure, limit: Measure, peer_events: int) -> Row:
        return Row(name, ours, limit, lambda folder: _eventsourcing(name, folder, peer_events), "store")

    def raw_one(folder: Path) -> Measured:
        return raw.save_one(folder, n(4_000))

    return [
        row("save_one", _ours(ours.save_one, n(4_000)), raw_one, n(4_000)),
        row("save_100", _ours(ours.save_100, n(40_000)), lambda f: raw.save_100(f, n(40_000)), n(40_000)),
        row("save_64_tasks", _ours(ours.save_64_tasks, n(64_000)), raw_one, n(4_096)),
        row("rehydrate", _ours(ours.rehydrate, n(20_000)), lambda f: raw.rehydrate(f, n(20_000)), n(20_000)),
        row("project", _ours(ours.project, n(200_000)), lambda f: raw.project(f, n(200_000)), n(3_000)),
    ]


def _eventsourcing(name: str, folder: Path, events: int) -> Measured:
    try:
        from trilogue.bench import store_peers
    except ImportError as error:
        raise Unsupported("the peer is not installed: pip install 'trilogue[bench]'") from error
    measured: Measured = getattr(store_peers, name)(folder, events)
    return measured


def run(*, only: Sequence[str] = (), rounds: int = 3, scale: float = 1.0, folder: Path | None = None) -> Iterator[Result]:
    """Measure the figures whose names begin with one of `only`, or whose family it is, each in `rounds` alternating rounds.

    folder: where the files are made and removed; must be on the disk that is to be measured.
    Raises Unsupported where a peer is not installed.
    """
    for row in rows(scale):
        if only and not any(name == row.family or row.name.startswith(name) for name in only):
            continue
        with tempfile.TemporaryDirectory(prefix="trilogue-bench-", dir=folder) as place:
            yield _measure(row, Path(place), rounds)


def _measure(row: Row, folder: Path, rounds: int) -> Result:
    sides = {"trilogue": row.ours, "raw apsw": row.limit, row.peer_name: row.peer}
    found: dict[str, list[Measured]] = {side: [] for side, measure in sides.items() if measure is not None}
    for _ in range(rounds):
        for side, measure in sides.items():
            if measure is not None:
                found[side].append(_as_measured(measure(folder)))
    ours, limit, peer = (_rates(found.get(side, [])) for side in sides)
    said = {side: [one.pragmas for one in measured if one.pragmas is not None] for side, measured in found.items()}
    pragmas = {side: weakest(read) for side, read in said.items() if read}
    _check_same_durability(row.name, pragmas)
    return Result(
        row.name,
        statistics.median(ours),
        _median(limit),
        _ratio(ours, limit),
        _median(peer),
        _ratio(ours, peer),
        row.peer_name if peer else None,
        _ways(found.get(row.peer_name, [])),
        pragmas,
    )


def _as_measured(found: float | Measured) -> Measured:
    return found if isinstance(found, Measured) else Measured(found)


def _rates(found: Sequence[Measured]) -> list[float]:
    return [measured.rate for measured in found]


def _ways(found: Sequence[Measured]) -> str | None:
    """How the peer did it: the way that was best in each round, named once."""
    return " or ".join(sorted({measured.way for measured in found if measured.way})) or None


def _check_same_durability(name: str, pragmas: dict[str, Pragmas]) -> None:
    """Ratios of sides that wait for the disk differently would say nothing."""
    for pragma in ("synchronous", "journal_mode"):
        said = {side: read[pragma] for side, read in pragmas.items()}
        if len(set(said.values())) > 1:
            raise BadOption(f"{name}: {pragma} is {said}: expected the same on every side, there is no figure to compare")


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(ours: list[float], theirs: list[float]) -> float | None:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if theirs else None
