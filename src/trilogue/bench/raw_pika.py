"""pika by itself doing the same: persistent messages, confirmed in a window, acknowledged after they were decoded.

events (topic, durable) ──bench.watched──> quorum queue      an exchange and queues of its own for each place
                        ──bench.counted──> quorum queue
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pika
from pika.adapters.select_connection import SelectConnection

from trilogue.bench.events import Counted, Watched, sample
from trilogue.bench.measured import Measured, Stretch, check_stored
from trilogue.bench.place import Place
from trilogue.errors import OutcomeUnknown, Unavailable
from trilogue.events import new_id, now_us

SIDE = "raw pika"
WATCHED, COUNTED = "bench.watched", "bench.counted"
OURS = ("bench", "counts", "events.unrouted")  # queues of our groups, and of what nobody wants
WINDOW = 1_024
PREFETCH = "256"  # what trilogue takes where the URL does not say
_ENCODE = msgspec.json.Encoder().encode
_DECODE = msgspec.json.Decoder(Watched).decode


def exchange_of(at: Place) -> str:
    """The exchange the sides that are not ours use."""
    return f"{at.name}raw-events"


def queue_of(at: Place, type_name: str) -> str:
    """Their queue of one type."""
    return f"{at.name}raw-{type_name}"


def queue_type_of(at: Place) -> str:
    """quorum or classic, the same on every side."""
    return at.option("queue_type", "quorum")


def prefetch_of(at: Place) -> int:
    """How many messages a consumer may have out, the same on every side."""
    return int(at.option("prefetch", PREFETCH))


@contextmanager
def channel_of(at: Place) -> Iterator[Any]:
    """A channel for what is not measured."""
    connection = pika.BlockingConnection(pika.URLParameters(at.server))
    try:
        yield connection.channel()
    finally:
        connection.close()


def declare(at: Place) -> None:
    """Exchange and queues for both types."""
    with channel_of(at) as channel:
        channel.exchange_declare(exchange_of(at), "topic", durable=True)
        for type_name in (WATCHED, COUNTED):
            made = {"x-queue-type": queue_type_of(at)}
            channel.queue_declare(queue_of(at, type_name), durable=True, arguments=made)
            channel.queue_bind(queue_of(at, type_name), exchange_of(at), type_name)


def durability(at: Place, queue: str, ready: int) -> dict[str, str | int]:
    """How durable the queue and its first message are; raises Unavailable if there are not so many messages in it."""
    with channel_of(at) as channel:
        found: dict[str, str | int] = {"queue": queue_type_of(at)}
        count = _ready(channel, queue, ready)
        if ready:
            channel.basic_qos(prefetch_count=1)  # it is handed back when the connection closes
            _, properties, _ = next(channel.consume(queue, inactivity_timeout=10))
            found["delivery_mode"] = properties.delivery_mode
    check_stored(queue, count, ready)
    return found


def _ready(channel: Any, queue: str, expected: int) -> int:
    """The server counts a little late."""
    until = time.monotonic() + 10
    while (count := channel.queue_declare(queue, passive=True).method.message_count) != expected and time.monotonic() < until:
        channel.connection.sleep(0.05)
    return int(count)


def delete(at: Place) -> None:
    """Everything that any side made at this place."""
    queues = [queue_of(at, type_name) for type_name in (WATCHED, COUNTED)]
    with channel_of(at) as channel:
        for queue in (*queues, *(at.name + name for name in OURS)):
            channel.queue_delete(queue)
        for exchange in (exchange_of(at), f"{at.name}events", f"{at.name}events.unrouted"):
            channel.exchange_delete(exchange)


def publish_one(at: Place, events: int) -> Measured:
    """One after the other, each confirmed before the next."""
    return _publish(at, events, 1)


def publish_64(at: Place, events: int) -> Measured:
    """64 unconfirmed at most."""
    return _publish(at, events, 64)


def publish_many(at: Place, events: int) -> Measured:
    """1,024 unconfirmed at most."""
    return _publish(at, events, WINDOW)


def _publish(at: Place, events: int, window: int) -> Measured:
    declare(at)
    took = fill(at, events, window)
    return Measured(events / took, durability(at, queue_of(at, WATCHED), events))


def fill(at: Place, events: int, window: int = WINDOW) -> float:
    """Publish so many events, and return the seconds until all were confirmed."""
    batch = [sample(n) for n in range(events)]
    took = 0.0

    def start(channel: Any) -> None:
        began = time.perf_counter()
        publisher = _Publisher(channel, exchange_of(at))

        def more() -> None:
            nonlocal took
            confirmed = publisher.confirmed
            for e in batch[publisher.sent : min(confirmed + window, events)]:
                publisher.publish(WATCHED, e, e.user)
            if confirmed == events:
                took = time.perf_counter() - began
                channel.connection.close()

        publisher.on_confirmed = more
        more()

    _run(at, start)
    return took


class _Publisher:
    """Publishes on one channel and knows up to which message everything is confirmed."""

    def __init__(self, channel: Any, exchange: str) -> None:
        self.channel, self.exchange = channel, exchange
        self.sent = self.confirmed = 0
        self.on_confirmed: Callable[[], None] = lambda: None
        self._ahead: set[int] = set()  # confirmed, but not all before it
        channel.confirm_delivery(self._answered)

    def publish(self, type_name: str, e: Watched | Counted, key: str) -> None:
        """What any program has to say of a durable event: an id, the type, the time, a key."""
        self.sent += 1
        properties = pika.BasicProperties("application/json", None, {"key": key}, 2, message_id=new_id(), type=type_name)
        properties.timestamp = now_us() // 1_000_000
        self.channel.basic_publish(self.exchange, type_name, _ENCODE(e), properties)

    def _answered(self, frame: Any) -> None:
        method = frame.method
        if method.NAME != "Basic.Ack":
            raise OutcomeUnknown("the server refused a message: its figure would say nothing")
        before = self.confirmed
        if method.multiple:
            self.confirmed = max(before, method.delivery_tag)
        else:
            self._ahead.add(method.delivery_tag)
        while self.confirmed + 1 in self._ahead:
            self.confirmed += 1
            self._ahead.remove(self.confirmed)
        if self.confirmed > before:
            self.on_confirmed()


def _run(at: Place, start: Callable[[Any], None]) -> None:
    """One connection with one channel, until it is closed on purpose."""

    def failed(_: Any, error: object) -> None:
        connection.ioloop.stop()
        if not isinstance(error, pika.exceptions.ConnectionClosedByClient):
            raise Unavailable(f"the connection to RabbitMQ was lost: {error}")

    def opened(_: Any) -> None:
        connection.channel(on_open_callback=start)

    parameters = pika.URLParameters(at.server)
    connection = SelectConnection(parameters, opened, on_open_error_callback=failed, on_close_callback=failed)
    try:
        connection.ioloop.start()
    finally:
        connection.ioloop.close()


def consume_ordered(at: Place, events: int) -> Measured:
    """Decode each message as it comes; acknowledge by half prefetches."""
    declare(at)
    fill(at, events)
    stretch, prefetch = Stretch(events), prefetch_of(at)

    def start(channel: Any) -> None:
        def handle(_: Any, method: Any, __: Any, body: bytes) -> None:
            _DECODE(body)
            last = stretch.passed()
            if last or method.delivery_tag % (prefetch // 2) == 0:
                channel.basic_ack(method.delivery_tag, multiple=True)
            if last:
                channel.connection.close()

        channel.basic_qos(prefetch_count=prefetch)
        channel.basic_consume(queue_of(at, WATCHED), handle)

    _run(at, start)
    return Measured(stretch.rate(SIDE), durability(at, queue_of(at, WATCHED), 0))


def consume_emit(at: Place, events: int) -> Measured:
    """Publish one message for each, and acknowledge what is confirmed."""
    declare(at)
    fill(at, events)
    stretch = Stretch(events)

    def start(channel: Any) -> None:
        publisher = _Publisher(channel, exchange_of(at))  # its n-th message answers the n-th delivery

        def handle(_: Any, __: Any, ___: Any, body: bytes) -> None:
            e = _DECODE(body)
            publisher.publish(COUNTED, Counted(e.user, e.position_s), e.user)

        def confirmed() -> None:
            channel.basic_ack(publisher.confirmed, multiple=True)
            if stretch.passed(publisher.confirmed - stretch.count):
                channel.connection.close()

        publisher.on_confirmed = confirmed
        channel.basic_qos(prefetch_count=prefetch_of(at))
        channel.basic_consume(queue_of(at, WATCHED), handle)

    _run(at, start)
    durability(at, queue_of(at, WATCHED), 0)
    return Measured(stretch.rate(SIDE), durability(at, queue_of(at, COUNTED), events))


def latency(at: Place, events: int) -> list[float]:
    """Seconds from publishing to the consumer having the message, in one process, one after the other."""
    declare(at)
    took: list[float] = []
    began = 0.0

    def start(channel: Any) -> None:
        publisher = _Publisher(channel, exchange_of(at))

        def publish() -> None:
            nonlocal began
            e = sample(len(took))
            began = time.perf_counter()
            publisher.publish(WATCHED, e, e.user)

        def handle(_: Any, method: Any, __: Any, body: bytes) -> None:
            _DECODE(body)
            took.append(time.perf_counter() - began)
            channel.basic_ack(method.delivery_tag)
            if len(took) == events:
                channel.connection.close()
            else:
                publish()

        channel.basic_qos(prefetch_count=prefetch_of(at))
        channel.basic_consume(queue_of(at, WATCHED), handle, callback=lambda _: publish())

    _run(at, start)
    return sorted(took)


def versions(at: Place) -> dict[str, str]:
    """Of the server, as it introduces itself."""
    with channel_of(at) as channel:
        return {"rabbitmq": str(channel.connection._impl.server_properties.get("version"))}
