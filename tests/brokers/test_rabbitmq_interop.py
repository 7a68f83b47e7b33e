"""Programs that know nothing of trilogue: plain pika, aio-pika and FastStream publish for us and handle ours."""

import asyncio
import json

import aio_pika
import pika
from amqp import envelope, opened, published, taken
from common import run
from faststream.rabbit import ExchangeType, RabbitBroker, RabbitExchange, RabbitMessage, RabbitQueue
from services import rabbitmq_vhost

from trilogue.events import Group

READERS = Group("readers", ("video.#",))
BODY = {"user": "u1", "video": "v9"}


def _publish_with_pika(url: str) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.confirm_delivery()  # what is sent without, to a queue that was just made, may be lost with the connection
    plain = {"event_type": "video.watched", "payload": BODY, "timestamp": "2026-01-31T12:00:00Z"}
    channel.basic_publish("events", "video.watched", json.dumps(plain).encode(), pika.BasicProperties("application/json"))
    headers = {"cloudEvents:specversion": "1.0", "cloudEvents:id": "ce-1", "cloudEvents:type": "video.watched"}
    headers |= {"cloudEvents:source": "/pika", "cloudEvents:partitionkey": "u1"}
    channel.basic_publish(
        "events", "video.watched", json.dumps(BODY).encode(), pika.BasicProperties("application/json", headers=headers)
    )
    connection.close()


def test_plain_pika_publishes_for_us() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, READERS) as broker:
                await asyncio.to_thread(_publish_with_pika, url)
                plain, binary = [d.record for d in await taken(broker, "readers", 2)]
                assert (plain.type, json.loads(plain.data), plain.key) == ("video.watched", BODY, None)
                assert plain.time.isoformat() == "2026-01-31T12:00:00+00:00"
                assert (binary.id, binary.source, binary.key, json.loads(binary.data)) == ("ce-1", "/pika", "u1", BODY)

    run(main())


def _take_with_pika(url: str) -> tuple[pika.BasicProperties, bytes]:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    for _, properties, body in connection.channel().consume("readers", auto_ack=True, inactivity_timeout=20):
        connection.close()
        assert properties is not None
        assert body is not None
        return properties, body
    raise AssertionError


def test_plain_pika_handles_ours() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, READERS, work=False) as broker:
                made = envelope(7, correlation_id="c", schema_version=2)
                await published(broker, [made])
                properties, body = await asyncio.to_thread(_take_with_pika, url)
                assert json.loads(body) == {"n": 7}
                assert (properties.message_id, properties.correlation_id) == (made.id, "c")
                assert (properties.content_type, properties.delivery_mode) == ("application/json", 2)
                assert properties.headers["cloudEvents:partitionkey"] == "k"
                assert properties.headers["cloudEvents:schemaversion"] == 2

    run(main())


def test_aio_pika_publishes_for_us_and_handles_ours() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, READERS) as broker:
                connection = await aio_pika.connect(url)
                channel = await connection.channel()
                exchange = await channel.get_exchange("events")
                await exchange.publish(
                    aio_pika.Message(json.dumps(BODY).encode(), message_id="a-1", content_type="application/json"),
                    "video.watched",
                )
                [delivery] = await taken(broker, "readers", 1)
                assert (delivery.record.id, delivery.record.type) == ("a-1", "video.watched")
                assert json.loads(delivery.record.data) == BODY
                queue = await channel.declare_queue("theirs", auto_delete=True)
                await queue.bind(exchange, "video.#")
                await published(broker, [made := envelope(8)])
                async with asyncio.timeout(20):
                    async with queue.iterator() as messages:
                        message = await anext(messages)
                        await message.ack()
                assert (message.message_id, json.loads(message.body)) == (made.id, {"n": 8})
                assert message.headers["cloudEvents:type"] == "video.watched"
                await connection.close()

    run(main())


def test_faststream_publishes_for_us_and_handles_ours() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, READERS) as broker:
                # Ours is there; a program beside it uses it without declaring it.
                exchange = RabbitExchange("events", type=ExchangeType.TOPIC, durable=True, declare=False)
                theirs = RabbitBroker(url, logger=None)
                got: asyncio.Future[tuple[dict[str, int], str]] = asyncio.get_running_loop().create_future()

                @theirs.subscriber(RabbitQueue("theirs", routing_key="video.handled", auto_delete=True), exchange)
                async def handle(body: dict[str, int], message: RabbitMessage) -> None:
                    got.set_result((body, message.message_id))

                await theirs.start()
                await theirs.publish(BODY, exchange=exchange, routing_key="video.watched", persist=True)
                [delivery] = await taken(broker, "readers", 1)
                assert (delivery.record.type, json.loads(delivery.record.data)) == ("video.watched", BODY)
                assert delivery.record.correlation_id
                await published(broker, [made := envelope(9, "video.handled")])
                assert await asyncio.wait_for(got, 20) == ({"n": 9}, made.id)
                await theirs.stop()

    run(main())
