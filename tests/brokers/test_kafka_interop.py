"""Programs that know nothing of trilogue: theirs is handled, ours is read by them."""

import asyncio
import json
from typing import Any

from confluent_kafka import Consumer
from faststream.confluent import KafkaBroker
from faststream.confluent.annotations import KafkaMessage
from kafka_tools import WAIT_S, happened, kafka, plain_producer, publish, readers, receive, run, url

from trilogue.brokers.kafka.settings import read
from trilogue.codec import to_cloudevent
from trilogue.events import Envelope

__all__ = ["url"]


def topic_of(url: str) -> str:
    return f"{read(url).prefix}video-events"


def test_messages_of_a_plain_producer_are_handled(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers("readers", "video.#")) as broker:
            producer = plain_producer(url)
            chapter = {"event_type": "video.watched", "payload": {"n": 0}, "timestamp": "2026-01-01T12:00:00"}
            producer.produce(topic_of(url), json.dumps(chapter), "u1")
            producer.produce(topic_of(url), b'{"n":1}', "u1")
            producer.produce(topic_of(url), None, "u1")
            structured = to_cloudevent(Envelope("mine", "video.rated", b'{"n":2}', "u1", "/elsewhere"))
            producer.produce(topic_of(url), structured, "u1", headers={"content-type": "application/cloudevents+json"})
            binary = {"ce_specversion": "1.0", "ce_id": "7", "ce_type": "video.seen", "ce_source": "/elsewhere"}
            producer.produce(topic_of(url), b'{"n":3}', "u1", headers=binary)
            assert producer.flush(30) == 0
            records = [each.record for each in await receive(broker, 5)]
            assert [record.type for record in records] == ["video.watched", "video", "video", "video.rated", "video.seen"]
            assert [record.data for record in records] == [b'{"n": 0}', b'{"n":1}', b"null", b'{"n":2}', b'{"n":3}']
            assert {record.key for record in records} == {"u1"}
            assert records[0].time.hour == 12

    run(main())


def test_events_of_faststream_are_handled(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers("readers", "video.#")) as broker:
            theirs = KafkaBroker(read(url).servers, logger=None)
            await theirs.connect()
            try:
                for n in range(3):
                    await theirs.publish({"n": n}, topic=topic_of(url), key=b"u1")
                await theirs.publish({"n": 3}, topic=topic_of(url), key=b"u1", headers={"ce_id": "3", "ce_type": "video.rated"})
            finally:
                await theirs.stop()
            found = await receive(broker, 4)
            assert [json.loads(each.record.data) for each in found] == [{"n": n} for n in range(4)]
            assert [each.record.type for each in found] == ["video"] * 3 + ["video.rated"]

    run(main())


def test_a_plain_consumer_reads_ours(url: str) -> None:
    async def main() -> None:
        async with kafka(url) as broker:
            sent = [happened(n, keys=1) for n in range(5)]
            await publish(broker, sent)
        found = await asyncio.to_thread(read_plainly, url, 5)
        assert [json.loads(message.value()) for message in found] == [{"n": n} for n in range(5)]
        assert [dict(message.headers())["ce_id"].decode() for message in found] == [each.id for each in sent]
        assert {message.key() for message in found} == {b"k0"}

    run(main())


def read_plainly(url: str, count: int) -> list[Any]:
    config = {"bootstrap.servers": read(url).servers, "group.id": f"{read(url).prefix}plain", "auto.offset.reset": "earliest"}
    consumer = Consumer(config)
    consumer.subscribe([topic_of(url)])
    found: list[Any] = []
    try:
        while len(found) < count:
            message = consumer.poll(WAIT_S)
            assert message is not None
            assert message.error() is None
            found.append(message)
        return found
    finally:
        consumer.close()


def test_faststream_reads_ours(url: str) -> None:
    async def main() -> None:
        got: asyncio.Queue[tuple[dict[str, int], str]] = asyncio.Queue()
        theirs = KafkaBroker(read(url).servers, logger=None)

        @theirs.subscriber(topic_of(url), group_id=f"{read(url).prefix}theirs", auto_offset_reset="earliest")
        async def handle(body: dict[str, int], message: KafkaMessage) -> None:
            await got.put((body, message.headers["ce_type"]))

        async with kafka(url) as broker:
            await publish(broker, [happened(n, keys=1) for n in range(3)])
            await theirs.start()
            try:
                for n in range(3):
                    assert await asyncio.wait_for(got.get(), WAIT_S) == ({"n": n}, "video.watched")
            finally:
                await theirs.stop()

    run(main())
