"""Receiving from RabbitMQ: order, bounds, acknowledgements of what is finished and of nothing else, and beginning again."""

import asyncio
import random

import pytest
from amqp import PAIRED, envelope, envelopes, handled, numbers, opened, published, taken, until
from common import run
from proxy import proxy_to, through
from services import rabbitmq_api, rabbitmq_vhost

from trilogue import Unsupported
from trilogue.brokers.rabbitmq import RabbitMQ, topology
from trilogue.errors import UnknownEvent
from trilogue.events import Delivery, Group
from trilogue.ports import SeekTo

ORDERED = Group("readers", ("video.#",))
COMPETING = Group("workers", ("video.#",), ordered=False)


def figures(url: str, queue: str = "readers") -> dict[str, int]:
    """What the server says of a queue; a few seconds old."""
    found = rabbitmq_api("GET", f"/api/queues/{url.rpartition('/')[2].partition('?')[0]}/{queue}")
    assert isinstance(found, dict)
    return {"messages": -1} | found


def test_no_more_than_the_prefetch_are_out() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url + "?prefetch=7", ORDERED) as broker:
                await published(broker, envelopes(20))
                got = await taken(broker, "readers", 7)
                assert await broker.receive("readers", limit=100, wait_s=0.2) == []
                await broker.acknowledge("readers", got[:3])
                assert numbers(await taken(broker, "readers", 3)) == [7, 8, 9]
                assert await broker.receive("readers", limit=100, wait_s=0.2) == []
                [lane] = await broker.lanes("readers")
                assert (lane.name, lane.in_flight, lane.lag) == ("readers", 7, 17)

    run(main())


@pytest.mark.parametrize("seed", range(1))
def test_finished_in_any_order_the_server_forgets_exactly_those(seed: int) -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            chance = random.Random(seed)
            async with opened(url, ORDERED) as broker:
                await published(broker, envelopes(120))
                out = await taken(broker, "readers", 120)
                kept = set(chance.sample(range(120), 9))
                finished = [d for d in out if d.record.position - 1 not in kept]
                chance.shuffle(finished)
                while finished:
                    size = chance.randint(1, 12)
                    some, finished = finished[:size], finished[size:]
                    assert await broker.acknowledge("readers", some) == []
                    assert await broker.acknowledge("readers", some) == []  # twice is once
                assert (await broker.lanes("readers"))[0].in_flight == 9
                await until(lambda: figures(url)["messages"] == 9)
                await broker.leave()
                async with opened(url, ORDERED) as other:
                    assert numbers(await taken(other, "readers", 9)) == sorted(kept)
                    assert (await other.lanes("readers"))[0].lag == 9

    run(main())


def test_acknowledged_in_one_go_the_queue_is_empty_at_the_server() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                await published(broker, envelopes(50))
                got = await taken(broker, "readers", 50)
                await broker.acknowledge("readers", got[20:])
                await broker.acknowledge("readers", got[:20])
            await until(lambda: figures(url)["messages"] == 0)

    run(main())


def test_released_records_come_again_in_order_before_what_follows() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                await published(broker, envelopes(10))
                got = await taken(broker, "readers", 6)
                await broker.acknowledge("readers", [got[1]])
                await broker.release("readers", [got[4], got[2]])
                await broker.release("readers", [got[2]])  # twice is once
                again = await taken(broker, "readers", 6)
                assert numbers(again) == [2, 4, 6, 7, 8, 9]
                assert [d.attempt for d in again] == [1] * 6

    run(main())


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_one_consumer_is_active_and_the_next_goes_on_in_order(kind: str) -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            url += f"?prefetch=40&queue_type={kind}"
            async with opened(url, ORDERED) as first, opened(url, ORDERED) as second:
                await published(first, envelopes(200))
                seen = numbers(got := await taken(first, "readers", 25))
                assert await second.receive("readers", limit=1, wait_s=0.2) == []
                await first.acknowledge("readers", [d for d in got if d.record.position % 3])
                unfinished = [n for n, d in zip(seen, got, strict=True) if not d.record.position % 3]
                await first.leave()
                rest = [n for n in range(200) if n not in seen or n in unfinished]
                later: list[int] = []
                while len(later) < len(rest):
                    more = await taken(second, "readers", 1)
                    await second.acknowledge("readers", more)
                    later += numbers(more)
                assert later == rest

    run(main())


@pytest.mark.parametrize("turn", range(5))
def test_a_close_in_the_middle_hands_over_in_order(turn: int) -> None:
    """A polite close would put back what is not acknowledged in any order."""

    async def main() -> None:
        with rabbitmq_vhost() as url:
            url += "?prefetch=100"
            async with opened(url, ORDERED, restarts=None) as first, opened(url, ORDERED) as second:
                await published(second, envelopes(300))
                got = await taken(first, "readers", 60)
                await first.acknowledge("readers", got[: 10 * turn])
                await first.close()
                order: list[int] = []
                while len(order) < 300 - 10 * turn:
                    more = await taken(second, "readers", 1)
                    await second.acknowledge("readers", more)
                    order += numbers(more)
                assert order == list(range(10 * turn, 300))

    run(main())


def test_competing_consumers_share_a_queue() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            url += "?prefetch=10"
            async with opened(url, COMPETING) as first, opened(url, COMPETING) as second:
                await published(first, envelopes(20))
                one, two = await taken(first, "workers", 10), await taken(second, "workers", 10)
                assert sorted(numbers(one) + numbers(two)) == list(range(20))

    run(main())


def test_each_group_gets_what_its_patterns_say() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            groups = [Group("all", ("#",)), Group("one", ("video.*",)), Group("two", ("badge.won", "video.watched"))]
            async with opened(url, *groups) as broker:
                made = [envelope(1, "video.watched"), envelope(2, "badge.won"), envelope(3, "video.quality.changed")]
                await published(broker, made)
                assert numbers(await taken(broker, "all", 3)) == [1, 2, 3]
                assert numbers(await taken(broker, "one", 1)) == [1]
                assert numbers(await taken(broker, "two", 2)) == [1, 2]
                assert await broker.groups() == ["all", "one", "two"]
                # The same group once more, with one pattern more.
                await broker.bind([Group("one", ("video.*", "badge.#"))], cursors=PAIRED)
                await published(broker, [envelope(4, "badge.lost")])
                assert numbers(await taken(broker, "one", 1)) == [4]

    run(main())


def test_a_group_that_is_only_declared_keeps_what_comes_for_it() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED, work=False) as broker:
                await published(broker, envelopes(3))
                assert (await broker.lanes("readers"))[0].lag == 3
                with pytest.raises(UnknownEvent, match="nothing is received here"):
                    await broker.receive("readers", limit=1, wait_s=0)
            async with opened(url, ORDERED) as broker:
                assert numbers(await taken(broker, "readers", 3)) == [0, 1, 2]

    run(main())


def test_paused_nothing_is_received_until_it_is_resumed() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                await broker.pause("readers")
                await published(broker, envelopes(3))
                assert await broker.receive("readers", limit=5, wait_s=0.2) == []
                waiting = asyncio.create_task(broker.receive("readers", limit=5, wait_s=20))
                await asyncio.sleep(0)
                await broker.resume("readers")
                assert numbers(await waiting)[0] == 0

    run(main())


def test_a_cancelled_receive_loses_nothing() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                got: list[Delivery] = []
                publishing = asyncio.create_task(published(broker, envelopes(300)))
                while len(got) < 200:
                    waiting = asyncio.create_task(broker.receive("readers", limit=3, wait_s=1))
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                    waiting.cancel()
                    try:
                        got += await waiting
                    except asyncio.CancelledError:
                        await asyncio.sleep(0.001)
                await publishing
                assert numbers(got) == list(range(len(got)))

    run(main())


def test_a_lost_connection_revokes_what_is_out_and_it_comes_again_in_order() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with proxy_to(url) as proxy, opened(through(proxy, url), ORDERED, restarts=None) as broker:
                await published(broker, envelopes(30))
                got = await taken(broker, "readers", 20)
                await broker.acknowledge("readers", got[:5])
                await broker.lanes("readers")  # the acknowledgements are through
                proxy.cut()
                await until(lambda: got[5].lease.lost)
                assert await broker.acknowledge("readers", got[5:]) == got[5:]
                await broker.release("readers", got[5:])
                again = await taken(broker, "readers", 25)
                assert numbers(again) == list(range(5, 30))
                assert not again[0].lease.lost
                assert await broker.acknowledge("readers", again) == []
            await until(lambda: figures(url)["messages"] == 0)

    run(main())


def test_a_queue_deleted_while_it_is_consumed_is_made_again() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED, Group("others", ("#",)), restarts=1) as broker:
                await published(broker, envelopes(3))
                got = await taken(broker, "readers", 3)
                others = await taken(broker, "others", 3)
                rabbitmq_api("DELETE", f"/api/queues/{url.rpartition('/')[2]}/readers")
                await until(lambda: got[0].lease.lost)
                await until(lambda: active(broker))
                await published(broker, [envelope(4)])
                assert numbers(await taken(broker, "readers", 1)) == [4]
                # The other group did not notice.
                assert await broker.acknowledge("others", others) == []

    async def active(broker: RabbitMQ) -> bool:
        link = broker._reading.link
        assert link is not None
        found = await topology.look(link, "readers")
        return found is not None and found.consumers == 1

    run(main())


def test_a_consumer_the_server_does_not_know_any_more_is_noticed() -> None:
    """The connection stands, the consumer is gone, and nobody said so: the commonest silent failure of clients."""

    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED, restarts=1) as broker:
                consumer = broker._consumers["readers"]
                channel = consumer._channel
                assert channel is not None
                from pika import spec

                await channel.call(spec.Basic.Cancel("trilogue"))
                await published(broker, [envelope(1)])
                assert await broker.receive("readers", limit=1, wait_s=0.2) == []
                await consumer.verify()
                assert numbers(await taken(broker, "readers", 1)) == [1]

    run(main())


def test_a_consumer_that_is_given_nothing_beside_others_is_noticed() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            group = Group("readers", ("video.#",), ordered=False)
            async with opened(f"{url}?prefetch=1", group) as other, opened(url, group, restarts=1) as broker:
                consumer = broker._consumers["readers"]
                channel = consumer._channel
                assert channel is not None
                from pika import spec

                await channel.call(spec.Basic.Cancel("trilogue"))
                await published(broker, [envelope(n) for n in range(3)])
                await taken(other, "readers", 1)
                assert await broker.receive("readers", limit=1, wait_s=0.2) == []
                await consumer.verify()
                assert not channel.closed.done(), "once may be a coincidence"
                await consumer.verify()
                await taken(broker, "readers", 2)

    run(main())


def test_every_consumer_consumes_again_after_its_connection_was_cut_many_times() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            groups = [Group(f"g{n}", ("video.#",)) for n in range(4)]
            async with (
                opened(url) as writer,
                proxy_to(url) as proxy,
                opened(through(proxy, url), *groups, restarts=None) as broker,
            ):
                for turn in range(5):
                    await published(writer, [made := envelope(turn)])
                    for group in groups:
                        await comes(broker, group.name, made.id)
                    proxy.cut()
                await until(lambda: broker._reading.restarts >= 5)

    async def comes(broker: RabbitMQ, group: str, id: str) -> None:
        """Acknowledgements that were cut off come first, once more."""
        while id not in await handled(broker, group, 1):
            pass

    run(main())


def test_what_there_is_no_place_for_is_refused() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                with pytest.raises(Unsupported, match=r"sqlite.*kafka"):
                    await broker.bind([Group("late", ("#",), start="beginning")], cursors=PAIRED)
                with pytest.raises(Unsupported, match=r"sqlite.*kafka"):
                    await broker.seek("readers", SeekTo(end="beginning"))
                with pytest.raises(Unsupported, match="kafka"):
                    broker.progress("readers", [])

    run(main())


def test_a_dropped_group_is_gone_with_what_waited() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                await published(broker, envelopes(3))
                await broker.drop_group("readers")
                assert await broker.lanes("readers") == []
                assert await broker.groups() == []
                with pytest.raises(UnknownEvent, match="readers"):
                    await broker.drop_group("readers")
                await broker.bind([ORDERED], cursors=PAIRED)
                await published(broker, [envelope(9)])
                assert numbers(await taken(broker, "readers", 1)) == [9]

    run(main())


def test_a_group_that_must_be_there_is_not_made() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, Group("gone", ("#",), start="existing")) as broker:
                assert await broker.lanes("gone") == []
                assert await broker.groups() == []

    run(main())


def test_a_group_left_can_be_bound_again() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                await published(broker, envelopes(4))
                got = await taken(broker, "readers", 2)
                await broker.acknowledge("readers", got[:1])
                await broker.leave()
                assert got[1].lease.lost
                assert await broker.acknowledge("readers", got[1:]) == got[1:]
                await broker.bind([ORDERED], cursors=PAIRED)
                assert numbers(await taken(broker, "readers", 3)) == [1, 2, 3]

    run(main())


def test_changed_returns_when_something_arrives_and_when_something_is_finished() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                waiting = asyncio.create_task(broker.changed(20))
                await asyncio.sleep(0)
                await published(broker, [envelope(1)])
                await asyncio.wait_for(waiting, 10)
                got = await taken(broker, "readers", 1)
                waiting = asyncio.create_task(broker.changed(20))
                await asyncio.sleep(0)
                await broker.acknowledge("readers", got)
                await asyncio.wait_for(waiting, 10)

    run(main())


def test_a_binding_left_behind_brings_nothing() -> None:
    """RabbitMQ does not tell what a queue is bound to: patterns a group no longer has still bring events to it."""

    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, Group("readers", ("video.#", "thing.#"))) as broker:
                await broker.unbind("readers")
                await broker.bind([Group("readers", ("thing.#",))], cursors=PAIRED)
                await published(broker, [envelope(0), envelope(1), envelope(2, "thing.made"), envelope(3)])
                got = await taken(broker, "readers", 1)
                assert numbers(got) == [2]
                assert await broker.acknowledge("readers", got) == []
                await until(lambda: _has_out(broker, True))  # the last one, until it is asked again
                assert await broker.receive("readers", limit=10, wait_s=1) == []
                assert await broker.receive("readers", limit=10, wait_s=0) == []
                await until(lambda: _has_out(broker, False))

    async def _has_out(broker: RabbitMQ, expected: bool) -> bool:
        [lane] = await broker.lanes("readers")
        return (lane.in_flight > 0, (lane.lag or 0) > 0) == (expected, expected)

    run(main())
