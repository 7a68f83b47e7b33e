"""Publishing to a real Kafka: where it lands, and one honest outcome each."""

import asyncio
import logging
import socket
from collections.abc import Iterable

import pytest
from confluent_kafka import KafkaError, Producer
from confluent_kafka.admin import AdminClient, NewTopic
from kafka_tools import happened, kafka, numbers, publish, readers, receive, run, url

from trilogue.brokers import open_broker
from trilogue.brokers.kafka.broker import Kafka
from trilogue.brokers.kafka.settings import read
from trilogue.errors import BadOption, OutcomeUnknown, Rejected, Unavailable, Unsupported
from trilogue.events import Envelope, Receipt, event, new_id

__all__ = ["url"]

# What Java's client makes of these keys: (murmur2(key) & 0x7fffffff) % 4, from its own published vectors of murmur2.
MURMUR2 = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}


def test_receipts_say_where_it_stands(url: str) -> None:
    async def main() -> None:
        async with kafka(url) as broker:
            first, second = await publish(broker, [happened(0, keys=1), happened(1, keys=1)])
            assert first.topic == read(url).prefix + "video-events"
            assert first.partition == second.partition
            assert (first.position, second.position) == (0, 1)
            assert first.durability == broker.durability == "process-crash"  # one broker, one replica

    run(main())


def test_equal_keys_go_where_java_clients_put_them(url: str) -> None:
    async def main() -> None:
        async with kafka(url) as broker:
            receipts = await publish(broker, [Envelope(new_id(), "video.watched", b"{}", key) for key in MURMUR2])
            assert [receipt.partition for receipt in receipts] == [(number & 0x7FFFFFFF) % 4 for number in MURMUR2.values()]

    run(main())


def test_types_that_name_a_topic_go_there(url: str) -> None:
    event("kafka.publish.pulse", topic="pulses")

    async def main() -> None:
        async with kafka(url, readers("readers", "kafka.publish.*")) as broker:
            receipts = await publish(broker, [happened(0, type="kafka.publish.pulse"), happened(1, type="kafka.publish.other")])
            prefix = read(url).prefix
            assert [receipt.topic for receipt in receipts] == [f"{prefix}pulses", f"{prefix}kafka-events"]
            assert sorted(numbers(await receive(broker, 2))) == [0, 1]

    run(main())


def test_order_per_key_is_that_of_publishing(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            for start in range(0, 3_000, 500):
                await publish(broker, (happened(n) for n in range(start, start + 500)))
            found = await receive(broker, 3_000)
            for key in range(7):
                assert numbers(each for each in found if each.record.key == f"k{key}") == list(range(key, 3_000, 7))

    run(main())


def test_many_publishers_at_once_get_their_own_receipts(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            sent = [happened(n) for n in range(500)]
            receipts = await asyncio.gather(*(publish(broker, [each]) for each in sent))
            assert [each[0].id for each in receipts] == [each.id for each in sent]
            assert len({(each[0].partition, each[0].position) for each in receipts}) == 500

    run(main())


# ── outcomes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_too_large_is_rejected_alone(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&max_bytes=2000") as broker:
            large = Envelope(new_id(), "video.watched", b"x" * 2_001)
            outcomes = await broker.publish([happened(0), large, happened(1), large, large])
            assert [type(outcome) for outcome in outcomes] == [Receipt, Rejected, Receipt, Rejected, Rejected]
            assert "max_bytes" in str(outcomes[1])
            many = await broker.publish([large] * 1_500)
            assert len(many) == 1_500
            assert all(isinstance(outcome, Rejected) for outcome in many)

    run(main())


def test_a_type_that_can_have_no_topic_is_rejected_alone(url: str) -> None:
    async def main() -> None:
        async with kafka(url) as broker:
            outcomes = await broker.publish([happened(0), Envelope(new_id(), "w" * 245 + ".x", b"{}"), happened(1)])
            assert [type(outcome) for outcome in outcomes] == [Receipt, Rejected, Receipt]
            assert "is not allowed: expected letters" in str(outcomes[1])
        async with kafka(f"{url}&partitions=3") as broker:
            outcomes = await broker.publish([happened(0), Envelope(new_id(), "other.thing", b"{}")])
            assert [type(outcome) for outcome in outcomes] == [Rejected, Receipt]
            assert "write partitions=4" in str(outcomes[0])

    run(main())


def test_what_the_topic_refuses_is_rejected(url: str) -> None:
    async def main() -> None:
        settings = read(url)
        admin = AdminClient({"bootstrap.servers": settings.servers})
        topic = NewTopic(f"{settings.prefix}video-events", 4, 1, config={"max.message.bytes": "5000"})
        await asyncio.to_thread(admin.create_topics([topic])[topic.topic].result)
        async with kafka(url) as broker:
            outcomes = await broker.publish([Envelope(new_id(), "video.watched", b"x" * 20_000, "k"), happened(1)])
            assert isinstance(outcomes[0], Rejected)

    run(main())


def test_a_server_that_went_away_leaves_the_outcome_unknown(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&timeout_s=2") as broker:
            await publish(broker, [happened(0)])
            broker._producer._client = _to_nowhere(broker)
            outcome = (await broker.publish([happened(1)]))[0]
            assert isinstance(outcome, OutcomeUnknown)
            assert outcome.stored is None

    run(main())


def _to_nowhere(broker: Kafka) -> Producer:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    return Producer(broker._settings.producer() | {"bootstrap.servers": f"127.0.0.1:{port}"}, logger=logging.getLogger("nowhere"))


def test_a_deleted_topic_is_made_anew(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&timeout_s=5") as broker:
            await publish(broker, [happened(0)])
            await broker._admin.delete([f"{read(url).prefix}video-events"])
            for _ in range(20):
                outcome = (await broker.publish([happened(1)]))[0]
                if isinstance(outcome, Receipt):
                    break
                assert isinstance(outcome, (Unavailable, OutcomeUnknown))
            assert isinstance(outcome, Receipt)

    run(main())


def test_more_than_the_buffer_holds_waits(url: str) -> None:
    async def main() -> None:
        async with kafka(url) as broker:
            broker._producer._client = Producer(broker._settings.producer() | {"queue.buffering.max.messages": 50})
            receipts = await publish(broker, [happened(n) for n in range(1_000)])
            assert len({(each.partition, each.position) for each in receipts}) == 1_000

    run(main())


def test_a_producer_that_failed_for_good_is_replaced(url: str) -> None:
    async def main() -> None:
        async with kafka(url) as broker:
            await publish(broker, [happened(0)])
            broken = broker._producer._client
            broker._producer._noted(KafkaError(KafkaError._FATAL, "made up", fatal=True))
            while broker._producer._client is broken:
                await asyncio.sleep(0.01)
            await publish(broker, [happened(1)])

    run(main())


def test_closing_confirms_what_is_on_its_way(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&linger=300ms") as broker:
            publishing = asyncio.create_task(broker.publish([happened(n) for n in range(100)]))
            while not len(broker._producer._client):
                await asyncio.sleep(0.01)
        assert all(isinstance(outcome, Receipt) for outcome in await publishing)

    run(main())


# ── topics ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_sent_before_each_partition_has_its_leader(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with kafka(url) as broker:
            asked, answered, ends = asyncio.Event(), asyncio.Event(), broker._admin.ends

            async def later(partitions: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
                asked.set()
                await answered.wait()
                return await ends(partitions)

            monkeypatch.setattr(broker._admin, "ends", later)
            publishing = asyncio.create_task(broker.publish([happened(1), happened(2)]))
            await asked.wait()
            assert len(broker._producer._client) == 0
            answered.set()
            assert all(isinstance(outcome, Receipt) for outcome in await publishing)
            asked.clear()
            await broker.publish([happened(3)])
            assert not asked.is_set()  # once for each topic

    run(main())


def test_topics_are_made_with_the_partitions_that_were_asked_for(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&partitions=3") as broker:
            await publish(broker, [happened(0)])
            topic = broker._catalog.known("video-events")
            assert topic is not None
            assert topic.partitions == 3
            config = await broker._admin.topic_config(topic.name)
            assert config["message.timestamp.type"] == "LogAppendTime"
        async with kafka(f"{url}&partitions=5") as broker:
            with pytest.raises(BadOption, match="partitions=3"):
                await broker.bind([readers()])

    run(main())


def test_two_that_make_a_topic_at_once_are_both_right(url: str) -> None:
    async def main() -> None:
        async with kafka(url) as one, kafka(url) as two:
            await asyncio.gather(*(publish(broker, [happened(n)]) for n, broker in enumerate([one, two] * 5)))

    run(main())


def test_topics_can_be_expected(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&topics=expect") as broker:
            outcome = (await broker.publish([happened(0)]))[0]
            assert isinstance(outcome, Unavailable)
            assert "topics=expect" in str(outcome)
            assert broker._admin is not None
            assert f"{read(url).prefix}video-events" not in await broker._admin.topics()

    run(main())


def test_more_replicas_than_brokers_are_refused(url: str) -> None:
    async def main() -> None:
        with pytest.raises(Unsupported, match="replication=3"):
            await open_broker(f"{url}&replication=3").open()

    run(main())


def test_nobody_there_is_said_in_time() -> None:
    async def main() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            with pytest.raises(Unavailable, match="no Kafka broker answered within 1 s"):
                await open_broker(f"kafka://ann:secret@127.0.0.1:{unused.getsockname()[1]}?connect_timeout_s=1").open()

    run(main())
