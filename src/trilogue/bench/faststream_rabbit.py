"""FastStream on RabbitMQ, as its documentation writes publishers and subscribers: pydantic models, a topic exchange, AckPolicy.

Made as durable as ours: quorum queues, persistent messages, confirms, acknowledged after the handler. Its log is off.
"""

import asyncio
import time
from collections.abc import Callable

from faststream import AckPolicy
from faststream.rabbit import Channel, ExchangeType, QueueType, RabbitBroker, RabbitExchange, RabbitQueue

from trilogue.bench import raw_pika
from trilogue.bench.events import WRITERS
from trilogue.bench.faststream_events import Counted, Watched, sample
from trilogue.bench.measured import PATIENCE_S, Measured, Stretch
from trilogue.bench.place import Place
from trilogue.bench.raw_pika import COUNTED, WATCHED, exchange_of, queue_of

SIDE = "FastStream"


def _exchange(at: Place) -> RabbitExchange:
    return RabbitExchange(exchange_of(at), type=ExchangeType.TOPIC, durable=True)


def _queue(at: Place, type_name: str) -> RabbitQueue:
    kind = QueueType(raw_pika.queue_type_of(at))
    return RabbitQueue(queue_of(at, type_name), kind, durable=True, routing_key=type_name)  # type: ignore[call-overload, no-any-return]


def _broker(at: Place) -> RabbitBroker:
    return RabbitBroker(at.server, default_channel=Channel(prefetch_count=raw_pika.prefetch_of(at)), logger=None)


def publish_one(at: Place, events: int) -> Measured:
    """One awaited publish after the other."""
    return _publish(at, events, 1)


def publish_64(at: Place, events: int) -> Measured:
    """64 tasks that each await their publishes."""
    return _publish(at, events, WRITERS)


def publish_many(at: Place, events: int) -> Measured:
    """64 tasks that each await their publishes: it has no batches on RabbitMQ, and more tasks are no faster."""
    return _publish(at, events, WRITERS)


def _publish(at: Place, events: int, tasks: int) -> Measured:
    raw_pika.declare(at)
    rate = asyncio.run(_published(at, events, tasks))
    return Measured(rate, raw_pika.durability(at, queue_of(at, WATCHED), events))


async def _published(at: Place, events: int, tasks: int) -> float:
    exchange, batch = _exchange(at), [sample(n) for n in range(events)]
    async with _broker(at) as broker:
        await broker.publish(batch[0], exchange=exchange, routing_key="bench.warm")  # it looks the exchange up once

        async def publisher(start: int) -> None:
            for n in range(start, events, tasks):
                await broker.publish(
                    batch[n], exchange=exchange, routing_key=WATCHED, persist=True, headers={"key": batch[n].user}
                )

        began = time.perf_counter()
        await asyncio.gather(*(publisher(start) for start in range(min(tasks, events))))
        return events / (time.perf_counter() - began)


def consume_ordered(at: Place, events: int) -> Measured:
    """A subscriber, acknowledged after it returned; it runs as many at once as are prefetched, in no order."""

    def subscribe(broker: RabbitBroker, stretch: Stretch, over: asyncio.Event) -> None:
        @broker.subscriber(_queue(at, WATCHED), _exchange(at), ack_policy=AckPolicy.NACK_ON_ERROR)
        async def handle(e: Watched) -> None:
            if stretch.passed():
                over.set()

    rate = _consume(at, events, subscribe)
    return Measured(rate, raw_pika.durability(at, queue_of(at, WATCHED), 0))


def consume_emit(at: Place, events: int) -> Measured:
    """A subscriber whose event is published before what it handled is acknowledged."""

    def subscribe(broker: RabbitBroker, stretch: Stretch, over: asyncio.Event) -> None:
        @broker.subscriber(_queue(at, WATCHED), _exchange(at), ack_policy=AckPolicy.NACK_ON_ERROR)
        @broker.publisher(routing_key=COUNTED, exchange=_exchange(at), persist=True)
        async def handle(e: Watched) -> Counted:
            if stretch.passed():
                over.set()
            return Counted(user=e.user, count=e.position_s)

    rate = _consume(at, events, subscribe)
    raw_pika.durability(at, queue_of(at, WATCHED), 0)
    return Measured(rate, raw_pika.durability(at, queue_of(at, COUNTED), events))


def _consume(at: Place, events: int, subscribe: Callable[[RabbitBroker, Stretch, asyncio.Event], None]) -> float:
    raw_pika.declare(at)
    raw_pika.fill(at, events)
    stretch = Stretch(events)

    async def run() -> None:
        broker, over = _broker(at), asyncio.Event()
        subscribe(broker, stretch, over)
        async with broker:
            await broker.start()
            async with asyncio.timeout(PATIENCE_S):
                await over.wait()
            await broker.stop()

    asyncio.run(run())
    return stretch.rate(SIDE)
