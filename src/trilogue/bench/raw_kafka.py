"""confluent-kafka by itself doing the same: keyed messages, acknowledged by all replicas, offsets committed after the decoding.

bench-3f9c1a-raw-events   4 partitions          bench-3f9c1a-raw-counts   4 partitions
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec  # type: ignore[attr-defined]

from trilogue.bench.events import WRITERS, Counted, Watched, sample
from trilogue.bench.measured import PATIENCE_S, Measured, Stretch, check_stored
from trilogue.bench.place import Place
from trilogue.errors import OutcomeUnknown, TimedOut
from trilogue.events import new_id
from trilogue.urls import split

SIDE = "raw confluent-kafka"
BATCH = 500
WAIT_S = 30.0
LOOK_S = 10.0
_ENCODE = msgspec.json.Encoder().encode
_DECODE = msgspec.json.Decoder(Watched).decode


def servers_of(at: Place) -> str:
    """What a driver wants to know: hosts and ports."""
    return split(at.server).netloc.rpartition("@")[2]


def _client(at: Place) -> dict[str, Any]:
    return {"bootstrap.servers": servers_of(at), "log_level": 2}  # what fails is raised


def events_topic(at: Place) -> str:
    """Where the sides that are not ours publish."""
    return f"{at.name}raw-events"


def counts_topic(at: Place) -> str:
    """Where their handlers publish."""
    return f"{at.name}raw-counts"


def linger_ms(at: Place) -> int:
    """How long a producer waits for company, the same on every side."""
    return int(at.option("linger", "1ms").removesuffix("ms"))


def declare(at: Place) -> None:
    """Topics with as many partitions as trilogue makes; they take messages when this returns."""
    partitions = int(at.option("partitions", "4"))
    names = (events_topic(at), counts_topic(at))
    admin = AdminClient(_client(at))
    for made in admin.create_topics([NewTopic(name, partitions, 1) for name in names], request_timeout=WAIT_S).values():
        made.result()
    until = time.monotonic() + WAIT_S
    while not _have_leaders(admin, [TopicPartition(name, n) for name in names for n in range(partitions)]):
        if time.monotonic() > until:
            raise TimedOut(f"{', '.join(names)}: not every partition had a leader within {WAIT_S:.0f} s")


def _have_leaders(admin: AdminClient, partitions: list[TopicPartition]) -> bool:
    """Whether messages may be sent: what is sent a moment too early can be confirmed and never stored (KAFKA-15591)."""
    admin.list_topics(timeout=WAIT_S)  # or it goes on believing that there is no such topic
    latest: Any = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    answers = admin.list_offsets(dict.fromkeys(partitions, latest), request_timeout=WAIT_S)
    return all(answer.exception() is None for answer in answers.values())


def delete(at: Place) -> None:
    """Every topic and every group of this place."""
    admin = AdminClient(_client(at))
    topics = [name for name in admin.list_topics(timeout=WAIT_S).topics if name.startswith(at.name)]
    groups = [found.group_id for found in admin.list_consumer_groups(request_timeout=WAIT_S).result().valid]
    for done in admin.delete_consumer_groups([name for name in groups if name.startswith(at.name)] or [at.name]).values():
        done.exception()  # one that somebody is still in ends by itself
    if topics:
        for gone in admin.delete_topics(topics, request_timeout=WAIT_S).values():
            gone.exception()


def producer_of(at: Place) -> Producer:
    """One that waits for all replicas and never writes twice."""
    options = {"acks": "all", "enable.idempotence": True, "linger.ms": linger_ms(at), "partitioner": "murmur2_random"}
    return Producer(_client(at) | options)


@contextmanager
def _consumer(at: Place, topic: str) -> Iterator[Consumer]:
    options = {"group.id": f"{at.name}raw", "auto.offset.reset": "earliest", "enable.auto.commit": False}
    with closing(Consumer(_client(at) | options)) as consumer:
        consumer.subscribe([topic])
        yield consumer


def stored(at: Place, topic: str, expected: int) -> None:
    """Raise Unavailable if there are not so many messages in a topic."""
    with closing(Consumer(_client(at) | {"group.id": f"{at.name}count"})) as consumer:
        partitions = consumer.list_topics(topic, WAIT_S).topics[topic].partitions
        ends = [consumer.get_watermark_offsets(TopicPartition(topic, n), WAIT_S)[1] for n in partitions]
    check_stored(topic, sum(ends), expected)


def committed(at: Place, group: str, topic: str, expected: int) -> None:
    """Raise Unavailable if a group has not committed so many messages of a topic."""
    with closing(Consumer(_client(at) | {"group.id": group})) as consumer:
        partitions = consumer.list_topics(topic, WAIT_S).topics[topic].partitions
        found = consumer.committed([TopicPartition(topic, n) for n in partitions], WAIT_S)
    check_stored(f"{topic} (committed)", sum(max(0, place.offset) for place in found), expected)


def publish_one(at: Place, events: int) -> Measured:
    """One after the other, each acknowledged before the next."""
    return _publish(at, events, 1)


def publish_64(at: Place, events: int) -> Measured:
    """64 unacknowledged at most."""
    return _publish(at, events, WRITERS)


def publish_many(at: Place, events: int) -> Measured:
    """As many unacknowledged as the driver takes."""
    return _publish(at, events, events)


def _publish(at: Place, events: int, window: int) -> Measured:
    declare(at)
    took = fill(at, events, window)
    stored(at, events_topic(at), events)
    return Measured(events / took, {"acks": "all", "idempotent": "yes"})


def fill(at: Place, events: int, window: int | None = None) -> float:
    """Publish so many events, and return the seconds until all were acknowledged."""
    batch, producer = [sample(n) for n in range(events)], producer_of(at)
    producer.list_topics(events_topic(at), WAIT_S)  # connected
    flight = _Flight(producer, events_topic(at), window or events)
    began = time.perf_counter()
    for e in batch:
        flight.publish(e, e.user)
    flight.land()
    return time.perf_counter() - began


class _Flight:
    """Publishes with at most so many messages unacknowledged."""

    def __init__(self, producer: Producer, topic: str, window: int) -> None:
        self.producer, self.topic, self.window = producer, topic, window
        self.sent = self.acknowledged = 0

    def publish(self, e: Watched | Counted, key: str) -> None:
        """What any program has to say of an event: an id, the type, a key."""
        while self.sent - self.acknowledged >= self.window:
            self.producer.poll(0.1)
        headers: list[tuple[str, str | bytes | None]] = [("ce_id", new_id()), ("ce_type", "bench")]
        while True:
            try:
                self.producer.produce(self.topic, _ENCODE(e), key, on_delivery=self._delivered, headers=headers)
                break
            except BufferError:  # the driver has enough; it makes room while it is polled
                self.producer.poll(0.1)
        self.sent += 1
        self.producer.poll(0)

    def land(self) -> None:
        """Return once everything is acknowledged."""
        until = time.monotonic() + PATIENCE_S
        while self.acknowledged < self.sent:
            if time.monotonic() > until:
                raise TimedOut(f"{self.sent - self.acknowledged} messages were not acknowledged in {PATIENCE_S:.0f} s")
            self.producer.poll(0.1)

    def _delivered(self, error: object, _: Message) -> None:
        if error is not None:
            raise OutcomeUnknown(f"the server refused a message: {error}")
        self.acknowledged += 1


def consume_ordered(at: Place, events: int) -> Measured:
    """Decode batches of 500; commit each after it."""
    return _consume(at, events, lambda _: None)


def consume_emit(at: Place, events: int) -> Measured:
    """Publish one message for each; commit once these are acknowledged."""
    flight = _Flight(producer_of(at), counts_topic(at), events)

    def emit(handled: list[Watched]) -> None:
        for e in handled:
            flight.publish(Counted(e.user, e.position_s), e.user)
        flight.land()

    measured = _consume(at, events, emit)
    stored(at, counts_topic(at), events)
    return measured


def _consume(at: Place, events: int, handle: Callable[[list[Watched]], None]) -> Measured:
    declare(at)
    fill(at, events)
    stretch, over = Stretch(events), False
    with _consumer(at, events_topic(at)) as consumer:
        until = time.monotonic() + PATIENCE_S
        while not over and time.monotonic() < until:
            messages = consumer.consume(BATCH, 0.1)
            if not messages:
                continue
            handle([_decoded(message) for message in messages])
            over = stretch.passed(len(messages))
            consumer.commit(asynchronous=not over)  # type: ignore[call-overload]
    committed(at, f"{at.name}raw", events_topic(at), events)
    return Measured(stretch.rate(SIDE))


def _decoded(message: Message) -> Watched:
    if (error := message.error()) is not None:
        raise KafkaException(error)
    return _DECODE(message.value() or b"")


def latency(at: Place, events: int) -> list[float]:
    """Seconds from publishing to the consumer having the message, in one process, one after the other."""
    declare(at)
    flight, took = _Flight(producer_of(at), events_topic(at), 1), []
    with _consumer(at, events_topic(at)) as consumer:
        for n in range(events + 1):  # the first one waits until the consumer has its partitions
            e, until = sample(n), time.monotonic() + PATIENCE_S
            began = time.perf_counter()
            flight.publish(e, e.user)
            while (message := consumer.poll(0.1)) is None and time.monotonic() < until:
                flight.producer.poll(0)
            took.append(time.perf_counter() - began)
            if message is None:
                raise TimedOut(f"a message did not come in {PATIENCE_S:.0f} s")
            _decoded(message)
            consumer.commit(asynchronous=True)
    return sorted(took[1:])


def versions(at: Place) -> dict[str, Any]:
    """What the driver can tell of the server: how many brokers there are."""
    nodes = AdminClient(_client(at)).list_topics(timeout=LOOK_S).brokers
    return {"kafka_brokers": len(nodes)}
