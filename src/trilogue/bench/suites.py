"""What is measured on which kind of URL, beside what, and what it is meant to reach.

    "amqp"   publish_many   trilogue    50,000 events
                            raw pika    50,000          aim: 0.9 times as fast
                            FastStream  10,000          aim: 4 times as fast

Every side has the function of a figure's name, and does its work on a place of its own.
"""

import asyncio
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trilogue.bench import figures, store_figures
from trilogue.bench.measured import Measured
from trilogue.bench.place import Place
from trilogue.errors import Unsupported

Measure = Callable[[Place, int], Measured]
LEAST = 128  # one save of 100 events, two of each of 64 tasks
PER_S, US = "events/s", "µs"


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a figure. what: what it does. events: how many, fewer where it is slow. aim: how many times as fast as this
    side we mean to be; of our own side how many a second."""

    name: str
    what: str
    measure: Measure
    events: int
    aim: float | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure. family: what `only` also knows it by."""

    name: str
    family: str
    unit: str
    ours: Side
    beside: tuple[Side, ...]


@dataclass(frozen=True, slots=True)
class Other:
    """A module that is measured beside ours. by: its function, if it is not the figure's name. way: said with its name."""

    module: Any
    events: int
    aim: float | None = None
    by: str | None = None
    way: str | None = None


def suite(scheme: str, scale: float = 1.0) -> list[Figure]:
    """The figures of one kind of URL. scale: events per figure, as a factor. Raises Unsupported where a peer is missing."""
    suites = {"sqlite": _sqlite, "postgresql": _postgresql, "amqp": _rabbitmq, "kafka": _kafka}
    return suites[scheme](lambda events: max(LEAST, round(events * scale)))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"trilogue.bench.{name}")
    except ImportError as error:
        raise Unsupported("what it is measured beside is not installed: pip install 'trilogue[all,bench]'") from error


def _figure(name: str, events: int, *others: Other, family: str = "queue", aim: float | None = None) -> Figure:
    ours = getattr(store_figures if family == "store" else figures, name)
    sides = tuple(_side(name, other) for other in others)
    return Figure(name, family, PER_S, Side(figures.SIDE, _sentence(ours), _running(ours), events, aim), sides)


def _side(name: str, other: Other) -> Side:
    measure = getattr(other.module, other.by or name)
    called = other.module.SIDE + (f", {other.way}" if other.way else "")
    return Side(called, _sentence(measure), measure, other.events, other.aim)


def _sentence(measure: Any) -> str:
    return " ".join((measure.__doc__ or "").split())


def _running(figure: Callable[[Place, int], Any]) -> Callable[[Place, int], Any]:
    """A figure of ours as what the other sides are: a function that returns when it is done."""

    async def run(at: Place, events: int) -> Any:
        return await figure(at, events)

    return lambda at, events: asyncio.run(run(at, events))


def _latencies(events: int, raw: Any) -> list[Figure]:
    return [_latency(share, events, raw) for share in (0.50, 0.99)]


def _latency(share: float, events: int, raw: Any) -> Figure:
    def percentile(took: Callable[[Place, int], list[float]]) -> Measure:
        def measure(at: Place, events: int) -> Measured:
            times = took(at, events)
            return Measured(times[int(share * (len(times) - 1))] * 1_000_000)

        return measure

    ours = Side(figures.SIDE, _sentence(figures.latency), percentile(_running(figures.latency)), events)
    beside = (Side(raw.SIDE, _sentence(raw.latency), percentile(raw.latency), events),)
    return Figure(f"latency_p{round(share * 100)}_us", "queue", US, ours, beside)


def _sqlite(n: Callable[[int], int]) -> list[Figure]:
    raw, huey = _module("raw_apsw"), _module("huey_sqlite")
    raw_store, peer = _module("raw_apsw_store"), _module("eventsourcing_sqlite")
    one_by_one = Other(raw, n(4_000), by="publish_one"), Other(huey, n(4_000), by="publish_one")
    return [
        _figure("publish_one", n(4_000), *one_by_one),
        _figure("publish_64", n(64_000), *one_by_one),
        _figure("publish_many", n(100_000), Other(raw, n(100_000)), one_by_one[1]),
        _figure("consume_ordered", n(200_000), Other(raw, n(200_000)), Other(huey, n(3_000))),
        _figure("consume_emit", n(60_000), Other(raw, n(60_000)), Other(huey, n(2_000))),
        *_latencies(n(1_000), raw),
        _figure("save_one", n(4_000), Other(raw_store, n(4_000)), Other(peer, n(4_000)), family="store"),
        _figure("save_100", n(40_000), Other(raw_store, n(40_000)), Other(peer, n(40_000)), family="store"),
        _figure("save_64_tasks", n(64_000), Other(raw_store, n(4_000), by="save_one"), Other(peer, n(4_096)), family="store"),
        _figure("rehydrate", n(20_000), Other(raw_store, n(20_000)), Other(peer, n(20_000)), family="store"),
        _figure("project", n(200_000), Other(raw_store, n(200_000)), Other(peer, n(3_000)), family="store"),
    ]


def _postgresql(n: Callable[[int], int]) -> list[Figure]:
    raw, peer = _module("raw_psycopg"), _module("eventsourcing_postgresql")
    return [
        _figure("publish_one", n(1_000), Other(raw, n(1_000))),
        _figure("publish_64", n(20_000), Other(raw, n(1_000), by="publish_one")),
        _figure("publish_many", n(100_000), Other(raw, n(100_000), aim=0.5)),
        _figure("consume_ordered", n(100_000), Other(raw, n(100_000)), aim=30_000),
        _figure("consume_emit", n(40_000), Other(raw, n(40_000))),
        *_latencies(n(500), raw),
        _figure("save_one", n(1_000), Other(raw, n(1_000)), *_both(peer, n(1_000), 1.4, "save_one"), family="store"),
        _figure("save_100", n(20_000), Other(raw, n(20_000)), Other(peer, n(20_000)), family="store"),
        _figure(
            "save_64_tasks",
            n(20_000),
            Other(raw, n(1_000), by="save_one"),
            *_both(peer, n(2_048), 15, "save_64_tasks"),
            family="store",
        ),
        _figure("rehydrate", n(20_000), Other(raw, n(20_000)), Other(peer, n(20_000)), family="store"),
        _figure("project", n(100_000), Other(raw, n(100_000)), family="store"),
    ]


def _both(peer: Any, events: int, aim: float, name: str) -> tuple[Other, Other]:
    """As it is by default, and with the functions in the database that it offers, which are twice as fast."""
    return Other(peer, events, aim), Other(peer, events, by=f"{name}_by_functions", way="database functions")


def _rabbitmq(n: Callable[[int], int]) -> list[Figure]:
    raw, peer = _module("raw_pika"), _module("faststream_rabbit")
    return [
        _figure("publish_one", n(1_000), Other(raw, n(1_000)), Other(peer, n(1_000))),
        _figure("publish_64", n(20_000), Other(raw, n(20_000)), Other(peer, n(8_000), 4)),
        _figure("publish_many", n(50_000), Other(raw, n(50_000), 0.9), Other(peer, n(8_000), 4)),
        _figure("consume_ordered", n(50_000), Other(raw, n(50_000)), Other(peer, n(8_000), 7)),
        _figure("consume_emit", n(20_000), Other(raw, n(20_000)), Other(peer, n(4_000), 3)),
        *_latencies(n(500), raw),
    ]


def _kafka(n: Callable[[int], int]) -> list[Figure]:
    raw, peer = _module("raw_kafka"), _module("faststream_kafka")
    batches = Other(peer, n(100_000), 1.2, by="consume_batches", way="batches of 500")
    return [
        _figure("publish_one", n(500), Other(raw, n(500)), Other(peer, n(500))),
        _figure("publish_64", n(40_000), Other(raw, n(40_000)), Other(peer, n(20_000), 2.5)),
        _figure("publish_many", n(200_000), Other(raw, n(200_000)), Other(peer, n(40_000), 2.5)),
        _figure("consume_ordered", n(200_000), Other(raw, n(200_000)), Other(peer, n(6_000), 20), batches),
        _figure("consume_emit", n(40_000), Other(raw, n(40_000)), Other(peer, n(2_000), 10)),
        *_latencies(n(500), raw),
    ]
