"""What the tests of the Kafka adapter share: events, an open broker, receiving until something has come."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from confluent_kafka import Producer
from services import kafka_prefix

from trilogue.brokers import open_broker
from trilogue.brokers.kafka.broker import Kafka
from trilogue.brokers.kafka.settings import read
from trilogue.events import Delivery, Envelope, Group, Receipt, new_id, now_us
from trilogue.ports import Cursors

WAIT_S = 30.0


@pytest.fixture
def url() -> Iterator[str]:
    """The shared server, with a prefix of one's own."""
    with kafka_prefix() as prefixed:
        yield prefixed


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run one test to its end, or fail it."""
    asyncio.run(asyncio.wait_for(main, 240))


def happened(n: int, *, type: str = "video.watched", keys: int = 7) -> Envelope:
    """The nth event; its key is one of so many."""
    return Envelope(new_id(), type, b'{"n":%d}' % n, f"k{n % keys}", time_us=now_us())


def readers(name: str = "readers", *patterns: str, **options: Any) -> Group:
    """A group that reads from the beginning, unless told otherwise."""
    return Group(name, patterns or ("video.*",), **{"start": "beginning", **options})


@asynccontextmanager
async def kafka(url: str, *groups: Group, work: bool = True, cursors: Cursors | None = None) -> AsyncIterator[Kafka]:
    """An open broker, bound to groups."""
    broker = open_broker(url)
    assert isinstance(broker, Kafka)
    await broker.open()
    try:
        if groups:
            await broker.bind(groups, work=work, cursors=cursors)
        yield broker
    finally:
        await broker.close()


async def publish(broker: Kafka, envelopes: Iterable[Envelope]) -> list[Receipt]:
    """Publish, and every one has to be stored."""
    outcomes = await broker.publish(list(envelopes))
    receipts = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
    assert len(receipts) == len(outcomes), outcomes
    return receipts


async def receive(broker: Kafka, count: int, group: str = "readers", *, wait_s: float = WAIT_S) -> list[Delivery]:
    """The next deliveries, exactly so many."""
    found: list[Delivery] = []
    while len(found) < count:
        batch = await broker.receive(group, limit=count - len(found), wait_s=wait_s)
        assert batch, f"only {len(found)} of {count} came"
        found += batch
    return found


async def nothing(broker: Kafka, group: str = "readers") -> None:
    """Nothing more comes."""
    assert await broker.receive(group, limit=10, wait_s=1.5) == []


def numbers(deliveries: Iterable[Delivery]) -> list[int]:
    """Which events these are."""
    return [int(delivery.record.data[5:-1]) for delivery in deliveries]


def plain_producer(url: str) -> Producer:
    """A producer of somebody who knows nothing of us."""
    return Producer({"bootstrap.servers": read(url).servers, "acks": "all"})


async def until(holds: Any, what: str) -> None:
    """Wait until something is so."""
    for _ in range(300):
        if await holds():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"never came about: {what}")
