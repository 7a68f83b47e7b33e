"""FastStream on Kafka, as its documentation writes publishers and subscribers: pydantic models, confluent-kafka, AckPolicy.

Made as durable as ours: acks=all, idempotent, the offset committed after the handler. Its log is off.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine

from faststream import AckPolicy
from faststream.confluent import KafkaBroker, KafkaPublishMessage

from trilogue.bench import raw_kafka
from trilogue.bench.events import WRITERS
from trilogue.bench.faststream_events import Counted, Watched, sample
from trilogue.bench.measured import PATIENCE_S, Measured, Stretch
from trilogue.bench.place import Place
from trilogue.bench.raw_kafka import counts_topic, events_topic

SIDE = "FastStream"
TOGETHER = 1_000
BATCH = 500


def _broker(at: Place) -> KafkaBroker:
    return KafkaBroker(
        raw_kafka.servers_of(at),
        acks="all",
        enable_idempotence=True,
        linger_ms=raw_kafka.linger_ms(at),
        partitioner="murmur2_random",
        logger=None,
    )


def publish_one(at: Place, events: int) -> Measured:
    """One awaited publish after the other."""
    return _publish(at, events, 1)


def publish_64(at: Place, events: int) -> Measured:
    """64 tasks that each await their publishes."""
    return _publish(at, events, WRITERS)


def _publish(at: Place, events: int, tasks: int) -> Measured:
    async def run() -> float:
        batch = [sample(n) for n in range(events)]
        async with _broker(at) as broker:

            async def publisher(start: int) -> None:
                for n in range(start, events, tasks):
                    await broker.publish(batch[n], events_topic(at), key=batch[n].user.encode())

            await _connected(broker)
            began = time.perf_counter()
            await asyncio.gather(*(publisher(start) for start in range(min(tasks, events))))
            return events / (time.perf_counter() - began)

    return _published(at, events, run())


def publish_many(at: Place, events: int) -> Measured:
    """Batches of 1,000."""

    async def run() -> float:
        batch = [sample(n) for n in range(events)]
        async with _broker(at) as broker:
            await _connected(broker)
            began = time.perf_counter()
            for start in range(0, events, TOGETHER):
                messages = [KafkaPublishMessage(e, key=e.user.encode()) for e in batch[start : start + TOGETHER]]
                await broker.publish_batch(*messages, topic=events_topic(at))
            return events / (time.perf_counter() - began)

    return _published(at, events, run())


async def _connected(broker: KafkaBroker) -> None:
    await broker.ping(10.0)


def _published(at: Place, events: int, run: Coroutine[None, None, float]) -> Measured:
    raw_kafka.declare(at)
    rate = asyncio.run(run)
    raw_kafka.stored(at, events_topic(at), events)
    return Measured(rate, {"acks": "all", "idempotent": "yes"})


def consume_ordered(at: Place, events: int) -> Measured:
    """A subscriber, one by one, each offset committed after it returned."""

    def subscribe(broker: KafkaBroker, stretch: Stretch, over: asyncio.Event) -> None:
        @broker.subscriber(
            events_topic(at), group_id=_group(at), auto_offset_reset="earliest", ack_policy=AckPolicy.NACK_ON_ERROR
        )
        async def handle(e: Watched) -> None:
            if stretch.passed():
                over.set()

    return _consume(at, events, subscribe)


def consume_batches(at: Place, events: int) -> Measured:
    """A subscriber of batches of 500, the offsets of each committed after it returned."""

    def subscribe(broker: KafkaBroker, stretch: Stretch, over: asyncio.Event) -> None:
        @broker.subscriber(
            events_topic(at),
            group_id=_group(at),
            auto_offset_reset="earliest",
            ack_policy=AckPolicy.NACK_ON_ERROR,
            batch=True,
            max_records=BATCH,
        )
        async def handle(es: list[Watched]) -> None:
            if stretch.passed(len(es)):
                over.set()

    return _consume(at, events, subscribe)


def consume_emit(at: Place, events: int) -> Measured:
    """One by one, publishing what it returns before its offset is committed."""

    def subscribe(broker: KafkaBroker, stretch: Stretch, over: asyncio.Event) -> None:
        @broker.subscriber(
            events_topic(at), group_id=_group(at), auto_offset_reset="earliest", ack_policy=AckPolicy.NACK_ON_ERROR
        )
        @broker.publisher(counts_topic(at))
        async def handle(e: Watched) -> Counted:
            if stretch.passed():
                over.set()
            return Counted(user=e.user, count=e.position_s)

    measured = _consume(at, events, subscribe)
    raw_kafka.stored(at, counts_topic(at), events)
    return measured


def _group(at: Place) -> str:
    return f"{at.name}faststream"


def _consume(at: Place, events: int, subscribe: Callable[[KafkaBroker, Stretch, asyncio.Event], None]) -> Measured:
    raw_kafka.declare(at)
    raw_kafka.fill(at, events)
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
    raw_kafka.committed(at, _group(at), events_topic(at), events)
    return Measured(stretch.rate(SIDE))
