"""Operating groups on a real Kafka: replay, dead letters, lag, dropping."""

import time

import pytest
from kafka_tools import happened, kafka, nothing, numbers, publish, readers, receive, run, until, url

from trilogue.brokers.kafka.broker import Kafka
from trilogue.brokers.kafka.settings import read
from trilogue.errors import UnknownEvent, Unsupported
from trilogue.events import Delivery
from trilogue.ports import DeadLetter, SeekTo

__all__ = ["url"]


async def handled(broker: Kafka, count: int, group: str = "readers") -> list[Delivery]:
    """The next deliveries, acknowledged."""
    found = await receive(broker, count, group)
    assert await broker.acknowledge(group, found) == []
    return found


# ── replay ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_replay_in_place(url: str, protocol: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&protocol={protocol}", readers()) as broker:
            await publish(broker, (happened(n) for n in range(30)))
            out = await receive(broker, 30)
            await broker.acknowledge("readers", out[:20])
            assert await broker.seek("readers", SeekTo(end="beginning")) == 0
            assert await broker.acknowledge("readers", out[20:]) == out[20:]
            assert sorted(numbers(await handled(broker, 30))) == list(range(30))
            await broker.seek("readers", SeekTo(end="now"))
            await nothing(broker)
            await publish(broker, [happened(30)])
            assert numbers(await handled(broker, 1)) == [30]

    run(main())


def test_replay_from_a_time_and_into_a_new_group(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            await publish(broker, (happened(n) for n in range(10)))
            first = max(each.record.recorded_us for each in await handled(broker, 10))
            await publish(broker, (happened(n) for n in range(10, 20)))
            while min(each.record.recorded_us for each in await handled(broker, 10)) <= first:
                raise AssertionError("the broker's clock went backwards")
            await broker.seek("readers", SeekTo(time_us=first + 1_000), into="again")
            with pytest.raises(Unsupported, match="exists already"):
                await broker.seek("readers", SeekTo(end="now"), into="again")
            await broker.bind([readers("again", start="existing")])
            assert sorted(numbers(await handled(broker, 10, "again"))) == list(range(10, 20))
            await nothing(broker, "again")
            await nothing(broker)  # the group itself is where it was
            await broker.seek("readers", SeekTo(time_us=int(time.time() * 1_000_000) + 3_600_000_000))
            await nothing(broker)

    run(main())


def test_an_offset_needs_a_single_partition(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            with pytest.raises(Unsupported, match="reads 4 partitions"):
                await broker.seek("readers", SeekTo(position=3))
        async with kafka(f"{url}&partitions=1", readers("one", "audio.*")) as broker:
            await publish(broker, (happened(n, type="audio.heard") for n in range(5)))
            await handled(broker, 5, "one")
            assert await broker.seek("one", SeekTo(position=3)) == 3
            assert numbers(await handled(broker, 2, "one")) == [3, 4]
            with pytest.raises(Unsupported, match="holds 0 to 4"):
                await broker.seek("one", SeekTo(position=9))

    run(main())


def test_a_group_with_members_elsewhere_is_not_set(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker, kafka(url) as elsewhere:
            await publish(broker, [happened(0)])
            await handled(broker, 1)
            with pytest.raises(Unsupported, match="has 1 members in other processes"):
                await elsewhere.seek("readers", SeekTo(end="beginning"))
            with pytest.raises(Unsupported, match="1 members"):
                await elsewhere.drop_group("readers")
            await publish(broker, [happened(1)])
            assert numbers(await handled(broker, 1)) == [1]
        async with kafka(url) as elsewhere:
            await elsewhere.seek("readers", SeekTo(end="beginning"))
        async with kafka(url, readers()) as broker:
            assert sorted(numbers(await handled(broker, 2))) == [0, 1]

    run(main())


def test_a_group_that_never_was_is_said(url: str) -> None:
    async def main() -> None:
        async with kafka(url) as broker:
            for act in (broker.seek("nobody", SeekTo(end="now")), broker.drop_group("nobody"), broker.lanes("nobody")):
                with pytest.raises(UnknownEvent, match="no group 'nobody'"):
                    await act

    run(main())


# ── dead letters ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def bury(broker: Kafka, deliveries: list[Delivery], group: str = "readers") -> None:
    for delivery in deliveries:
        await broker.dead_letter(group, delivery, attempts=3, error="ValueError: no", traceback="line 1")


def places(letters: list[DeadLetter]) -> list[int]:
    return [letter.record.position for letter in letters]


def test_dead_letters_are_kept_with_their_error(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            sent = [happened(n) for n in range(3)]
            await publish(broker, sent)
            await bury(broker, sorted(await receive(broker, 3), key=lambda each: each.record.id))
            letters = await broker.dead("readers")
            assert [letter.record.id for letter in letters] == [each.id for each in sent]
            assert (letters[0].group, letters[0].attempts, letters[0].error) == ("readers", 3, "ValueError: no")
            assert (letters[0].record.data, letters[0].record.key) == (sent[0].data, sent[0].key)
            assert places(letters) == [1, 2, 3]
            assert places(await broker.dead(None, after=1, limit=1)) == [2]
            assert sum(lane.lag or 0 for lane in await broker.lanes("readers")) == 0
        async with kafka(url, readers()) as broker:
            await nothing(broker)

    run(main())


def test_redriven_letters_go_to_their_group_alone(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers(), readers("others")) as broker:
            await publish(broker, (happened(n, keys=1) for n in range(4)))
            await bury(broker, await receive(broker, 4))
            await handled(broker, 4, "others")
            assert await broker.redrive("readers", [2]) == 1
            assert numbers(await handled(broker, 1)) == [1]
            assert places(await broker.dead("readers")) == [1, 3, 4]
            assert await broker.redrive("readers") == 3
            assert numbers(await handled(broker, 3)) == [0, 2, 3]
            assert await broker.dead("readers") == []
            assert await broker.redrive("readers") == 0
            await nothing(broker, "others")

    run(main())


def test_redriven_letters_reach_members_elsewhere(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            await publish(broker, [happened(0)])
            await bury(broker, await receive(broker, 1))
            async with kafka(url) as elsewhere:
                assert await elsewhere.redrive("readers") == 1
            assert numbers(await handled(broker, 1)) == [0]

    run(main())


def test_dropped_letters_are_gone_and_their_space_too(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            await publish(broker, (happened(n, keys=1) for n in range(5)))
            await bury(broker, await receive(broker, 5))
            assert await broker.drop_dead("readers", [1, 2, 4]) == 3
            assert places(await broker.dead("readers")) == [3, 5]
            topic = (f"{read(url).prefix}readers.dead", 0)
            assert (await broker._admin.beginnings([topic]))[topic] == 2
            assert await broker.drop_dead("readers") == 2
            assert await broker.dead(None) == []
            async with kafka(url) as elsewhere:
                assert await elsewhere.dead("readers") == []

    run(main())


# ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lag_in_flight_and_stalls_by_lane(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&partitions=2", readers()) as broker:
            await publish(broker, (happened(n) for n in range(20)))
            found = await receive(broker, 20)
            lanes = await broker.lanes("readers")
            assert [sum(lane.lag or 0 for lane in lanes), sum(lane.in_flight for lane in lanes)] == [20, 20]
            first = [each for each in found if each.record.partition == 0]
            await broker.acknowledge("readers", first)
            lanes = await broker.lanes("readers")
            assert [lane.lag for lane in lanes] == [0, 20 - len(first)]
            assert lanes[0].stalled_s == 0
            assert lanes[1].stalled_s > 0
            assert lanes[0].next == len(first)
        async with kafka(url) as elsewhere:  # told from what is committed
            assert [lane.lag for lane in await elsewhere.lanes("readers")] == [0, 20 - len(first)]

    run(main())


def test_dropping_a_group_forgets_all_of_it(url: str) -> None:
    async def main() -> None:
        async with kafka(url, readers()) as broker:
            await publish(broker, [happened(0)])
            await bury(broker, await receive(broker, 1))
            await broker.redrive("readers")
            await broker.drop_group("readers")
            assert await broker.groups() == []

            async def is_gone() -> bool:
                return not any(".dead" in name or ".redrive" in name for name in await broker._admin.topics())

            await until(is_gone, "the group's own topics are deleted")
            await broker.bind([readers(start="now")])
            await nothing(broker)

    run(main())


def test_the_cluster_is_described(url: str) -> None:
    async def main() -> None:
        async with kafka(url) as broker:
            said = await broker.describe()
            assert said["brokers"] == "1"
            assert said["durability"].startswith("process-crash: 1 replica")
            assert "power loss" in said["durability"]

    run(main())
