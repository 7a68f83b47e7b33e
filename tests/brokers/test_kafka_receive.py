"""Receiving from a real Kafka: order, what is committed, what comes again, where groups begin."""

import asyncio
import json
from collections import Counter

import pytest
from kafka_tools import happened, kafka, nothing, numbers, plain_producer, publish, readers, receive, run, until, url

from trilogue.brokers.kafka.broker import Kafka
from trilogue.brokers.kafka.lane import Place
from trilogue.brokers.kafka.settings import read
from trilogue.errors import LeaseLost, OutOfRange, UnknownEvent
from trilogue.ports import Progress

__all__ = ["url"]


async def committed(broker: Kafka, group: str = "readers") -> dict[int, Place]:
    """Where a group is in each partition, as the server has it."""
    found = await broker._admin.committed(broker._settings.prefix + group, broker._catalog.partitions(broker._catalog.there))
    return {partition: place for (_, partition), place in found.items()}


def test_what_was_acknowledged_does_not_come_again(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            await publish(broker, (happened(n) for n in range(100)))
            found = await receive(broker, 100)
            assert await broker.acknowledge("readers", found[:60]) == []
            left = numbers(found[60:])
        async with kafka(url, readers()) as broker:
            assert sorted(numbers(await receive(broker, 40))) == sorted(left)
            await nothing(broker)

    run(main())


def test_what_was_finished_out_of_order_does_not_come_again(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&partitions=1", readers()) as broker:
            await publish(broker, (happened(n) for n in range(50)))
            found = await receive(broker, 50)
            assert await broker.acknowledge("readers", [each for each in found if each.record.position % 10]) == []
        async with kafka(url, readers(), work=False) as broker:
            place = (await committed(broker))[0]
            assert place.next == 0
            assert place.finished == tuple(n for n in range(50) if n % 10)
        async with kafka(url, readers()) as broker:
            assert numbers(await receive(broker, 5)) == [0, 10, 20, 30, 40]
            await nothing(broker)

    run(main())


def test_commits_follow_within_a_moment(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&partitions=1", readers()) as broker:
            await publish(broker, [happened(0), happened(1)])
            await broker.acknowledge("readers", (await receive(broker, 2))[:1])

            async def is_there() -> bool:
                return (await committed(broker))[0] == Place(1)

            await until(is_there, "the commit of the first record")

    run(main())


def test_what_is_handed_back_comes_before_what_follows(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&partitions=1", readers()) as broker:
            await publish(broker, (happened(n) for n in range(10)))
            found = await receive(broker, 6)
            await broker.release("readers", [found[4], found[1], found[2]])
            again = await receive(broker, 7)
            assert numbers(again) == [1, 2, 4, 6, 7, 8, 9]
            assert all(each.attempt == 1 for each in again)
            assert await broker.acknowledge("readers", [*again, found[0], found[3], found[5]]) == []
            await nothing(broker)
            assert [lane.lag for lane in await broker.lanes("readers")] == [0]

    run(main())


def test_how_much_is_out_is_bounded(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&partitions=1&in_flight=50", readers()) as broker:
            await publish(broker, (happened(n) for n in range(2_000)))
            found = await receive(broker, 50)
            # One record every 50 ms comes nevertheless, so that the group stays alive; up to a bound.
            found += await receive(broker, 200)
            await nothing(broker)
            assert numbers(found) == list(range(250))
            await broker.acknowledge("readers", found)
            assert numbers(await receive(broker, 50)) == list(range(250, 300))

    run(main())


def test_types_are_filtered_after_reading(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers("readers", "video.watched")) as broker:
            await publish(broker, (happened(n, type="video.rated" if n % 2 else "video.watched", keys=1) for n in range(20)))
            found = await receive(broker, 10)
            assert numbers(found) == list(range(0, 20, 2))
            await broker.acknowledge("readers", found)

            async def is_done() -> bool:
                await broker.receive("readers", limit=1, wait_s=0.05)
                return sum(lane.lag or 0 for lane in await broker.lanes("readers")) == 0

            await until(is_done, "no lag, though the last record is of another type")

    run(main())


# ── where groups begin ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_group_that_begins_now_gets_what_is_published_after_its_bind(url: str) -> None:
    async def main() -> None:
        async with kafka(url) as broker:
            await publish(broker, [happened(0), happened(1)])
            await broker.bind([readers(start="now")])
            await publish(broker, (happened(n) for n in range(2, 30)))
            assert sorted(numbers(await receive(broker, 28))) == list(range(2, 30))
            await nothing(broker)

    run(main())


def test_its_place_is_fixed_by_a_bind_without_work(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers(start="now"), work=False) as broker:
            await publish(broker, [happened(0), happened(1)])
        async with kafka(url, readers(start="now")) as broker:
            assert sorted(numbers(await receive(broker, 2))) == [0, 1]

    run(main())


def test_the_url_can_start_all_groups_at_the_beginning(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&start=earliest") as broker:
            await publish(broker, [happened(0)])
            await broker.bind([readers(start="now")])
            assert numbers(await receive(broker, 1)) == [0]

    run(main())


def test_topics_that_come_later_are_read_from_their_beginning(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers("all", "#", start="now")) as broker:
            await publish(broker, [happened(0, type="audio.heard"), happened(1)])
            assert sorted(numbers(await receive(broker, 2, "all"))) == [0, 1]
            async with kafka(url) as elsewhere:  # made by another process: seen within seconds
                await publish(elsewhere, [happened(2, type="radio.heard")])
            assert numbers(await receive(broker, 1, "all")) == [2]

    run(main())


def test_partitions_that_are_added_are_read_from_their_beginning(url: str) -> None:
    from confluent_kafka.admin import AdminClient, NewPartitions

    async def main() -> None:
        async with kafka(f"{url}&partitions=1", readers(start="now")) as broker:
            topic = f"{read(url).prefix}video-events"
            admin = AdminClient({"bootstrap.servers": read(url).servers})
            await asyncio.to_thread(admin.create_partitions([NewPartitions(topic, 3)])[topic].result)
        producer = plain_producer(url)
        for partition in range(3):
            producer.produce(topic, b'{"n":%d}' % partition, partition=partition)
        assert producer.flush(30) == 0
        async with kafka(url, readers("readers", "#", start="now")) as broker:
            assert sorted(numbers(await receive(broker, 3))) == [0, 1, 2]

    run(main())


def test_a_group_over_several_topics(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers("readers", "video.*", "audio.heard")) as broker:
            await publish(broker, [happened(0), happened(1, type="audio.heard"), happened(2, type="audio.lost")])
            assert sorted(numbers(await receive(broker, 2))) == [0, 1]
            assert {lane.name.partition("[")[0] for lane in await broker.lanes("readers")} == {
                f"{read(url).prefix}{name}" for name in ("video-events", "audio-events")
            }

    run(main())


def test_twenty_groups_each_get_all(url: str) -> None:
    async def main() -> None:
        groups = [readers(f"g{n}") for n in range(20)]
        async with kafka(url, *groups) as broker:
            await publish(broker, (happened(n) for n in range(50)))
            for group in groups:
                found = await receive(broker, 50, group.name)
                assert sorted(numbers(found)) == list(range(50))
                await broker.acknowledge(group.name, found)
            assert await broker.groups() == sorted(group.name for group in groups)

    run(main())


def test_a_group_nobody_bound_is_said(url: str) -> None:
    async def main() -> None:
        async with kafka(url) as broker:
            with pytest.raises(UnknownEvent, match="not bound"):
                await broker.receive("nobody", limit=1, wait_s=0)

    run(main())


def test_paused_groups_receive_nothing_and_stay_members(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            await publish(broker, [happened(0, keys=1)])
            await broker.acknowledge("readers", await receive(broker, 1))
            await broker.pause("readers")
            await publish(broker, [happened(1, keys=1)])
            await nothing(broker)
            await broker.resume("readers")
            assert numbers(await receive(broker, 1)) == [1]

    run(main())


def test_whoever_waits_is_woken(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            await publish(broker, [happened(0)])
            await asyncio.wait_for(broker.changed(60), 30)
            await broker.changed(0.01)

    run(main())


# ── offsets that are gone ────────────────────────────────────────────────────────────────────────────────────────────


async def lose_the_first(broker: Kafka, before: int) -> None:
    await broker._admin.delete_records(f"{broker._settings.prefix}video-events", before)


def test_offsets_that_are_gone_are_an_error_that_says_what_to_do(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&partitions=1", readers()) as broker:
            await publish(broker, (happened(n) for n in range(20)))
            await broker.acknowledge("readers", (await receive(broker, 5))[:5])
        async with kafka(url, work=False) as broker:
            await lose_the_first(broker, 12)
        async with kafka(url, readers()) as broker:
            with pytest.raises(OutOfRange, match=r"offset 5 of .*video-events\[0\].* 12 to 19.*trilogue replay readers"):
                await broker.receive("readers", limit=10, wait_s=20)
        async with kafka(f"{url}&reset=earliest", readers()) as broker:
            assert numbers(await receive(broker, 8)) == list(range(12, 20))

    run(main())


def test_a_cancellation_that_comes_together_with_a_record_ends_it(url: str) -> None:
    """Whoever leaves cancels who receives, and waits for that: swallowed, it would wait for ever."""

    async def main() -> None:
        async with kafka(url, readers()) as broker:
            member = broker._members["readers"]
            receiving = asyncio.create_task(member.receive(10, 20))
            await asyncio.sleep(0.1)
            member._arrived.set()
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(receiving, 5)

    run(main())


# ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Kept:
    """Cursors as a store would keep them."""

    def __init__(self) -> None:
        self.places: dict[str, Progress] = {}
        self.asked: Counter[str] = Counter()

    async def assigned(self, group: str, lane: str) -> Progress | None:
        self.asked[lane] += 1
        return self.places.get(lane)


def test_groups_with_effects_go_on_where_the_store_says(url: str) -> None:
    async def main() -> None:
        kept, group = Kept(), readers(has_effects=True)
        async with kafka(f"{url}&partitions=1", group, cursors=kept) as broker:
            await publish(broker, (happened(n) for n in range(10)))
            found = await receive(broker, 10)
            assert broker.progress("readers", found[:1] + found[3:5]) == [Progress(lane_of(url), 1, (3, 4))]
            kept.places = {each.lane: each for each in broker.progress("readers", found[:1] + found[3:5])}
            # Nothing was acknowledged: the committed offset is still the first.
        async with kafka(url, group, cursors=kept) as broker:
            again = await receive(broker, 7)
            assert numbers(again) == [1, 2, 5, 6, 7, 8, 9]
            # The store is right even where the committed offset is further.
            await broker.acknowledge("readers", again)
        async with kafka(url, group, cursors=kept) as broker:
            assert numbers(await receive(broker, 7)) == [1, 2, 5, 6, 7, 8, 9]
        assert kept.asked == {lane_of(url): 3}

    run(main())


def lane_of(url: str) -> str:
    return f"{read(url).prefix}video-events[0]"


def test_groups_without_effects_ask_nobody(url: str) -> None:
    async def main() -> None:
        kept = Kept()
        async with kafka(url, readers(), cursors=kept) as broker:
            await publish(broker, [happened(0)])
            await receive(broker, 1)
        assert not kept.asked

    run(main())


def test_a_store_that_fails_is_asked_again(url: str) -> None:
    async def main() -> None:
        class Failing(Kept):
            async def assigned(self, group: str, lane: str) -> Progress | None:
                await super().assigned(group, lane)
                if self.asked[lane] == 1:
                    raise OSError("the disk is full")
                return None

        async with kafka(f"{url}&partitions=1", readers(has_effects=True), cursors=Failing()) as broker:
            await publish(broker, [happened(0)])
            assert numbers(await receive(broker, 1)) == [0]

    run(main())


def test_nothing_is_known_of_lanes_that_were_let_go(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            await publish(broker, [happened(0)])
            found = await receive(broker, 1)
            await broker.unbind("readers")
            assert found[0].lease.lost
            assert await broker.acknowledge("readers", found) == found
            await broker.bind([readers()])
            with pytest.raises(LeaseLost, match="another process"):
                broker.progress("readers", found)
            assert await broker.acknowledge("readers", found) == found
            assert json.loads((await receive(broker, 1))[0].record.data) == {"n": 0}

    run(main())
