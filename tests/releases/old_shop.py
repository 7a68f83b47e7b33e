"""A shop that has been running for three releases: what its events are today, and a log as an early release left it.

    0.1.0   order.placed 1: order, customer, amount          shop-0.1.0.sql holds both of these, word for word
            order.placed 2: order, customer, total, note
    today   order.placed 3: order, customer, total, currency, note, gift     shop.jsonl holds one of each, as CloudEvents

The files are what programs out there hold: they are added to and never changed. NAME.lock.json holds the released forms of
the events in NAME.jsonl; a new version, or a new app of this package, adds to both.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from trilogue import App, Envelope, event, from_cloudevent

HERE = Path(__file__).parent


def renamed(data: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in data.items() if name != "amount"}, "total": data["amount"]}


def in_euros(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "currency": "EUR"}


@event("shop.order.placed", key="customer", version=3, upcast={1: renamed, 2: in_euros})
@dataclass(frozen=True)
class Placed:
    order: str
    customer: str
    total: Decimal
    currency: str
    note: str = ""
    gift: bool = False


@event("shop.order.shipped", key="customer")
@dataclass(frozen=True)
class Shipped:
    order: str
    customer: str


# What shop-0.1.0.sql holds: on the log, and of that in the stream order-o3; held; in timers.
LOG = (
    Placed("o1", "c1", Decimal("9.90"), "EUR"),
    Shipped("o1", "c1"),
    Placed("o2", "c2", Decimal(5), "EUR"),
    Placed("o3", "c3", Decimal("1.50"), "EUR"),
    Placed("o4", "c4", Decimal(7), "EUR", "gift"),
    Placed("o5", "c1", Decimal(8), "EUR"),
    Placed("o3", "c3", Decimal("2.50"), "EUR"),
    Shipped("o3", "c3"),
)
PLACED = tuple(each for each in LOG if isinstance(each, Placed))
STREAM = tuple(each for each in LOG if each.order == "o3")
HELD = tuple(each for each in LOG[:4] if isinstance(each, Placed))
TIMERS = (Placed("o6", "c6", Decimal(3), "EUR"), Placed("o7", "c7", Decimal(4), "EUR"))


def old_log(path: Path) -> str:
    """Make the file that release 0.1.0 left; its URL."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((HERE / "shop-0.1.0.sql").read_text())
    return f"sqlite:///{path}"


def released(name: str) -> list[Envelope]:
    """The events of a .jsonl file."""
    return [from_cloudevent(line) for line in _lines(HERE / name)]


def _lines(path: Path) -> Iterator[bytes]:
    return iter(path.read_bytes().splitlines())


app = App("sqlite:///shop.db", name="shop")
app.knows(Placed, Shipped)
