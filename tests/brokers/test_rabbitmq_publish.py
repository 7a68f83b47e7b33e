"""Publishing to RabbitMQ: one honest outcome for each event."""

import asyncio

import pytest
from amqp import envelope, envelopes, handled, numbers, opened, published, taken, until
from common import run
from proxy import proxy_to, through
from services import rabbitmq_api, rabbitmq_vhost

from trilogue import LogError, OutcomeUnknown, Rejected, Unavailable
from trilogue.brokers import open_broker
from trilogue.brokers.rabbitmq import topology
from trilogue.events import Group, Receipt

ORDERED = Group("readers", ("video.#",))


def test_what_is_published_is_received_in_order_and_whole() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                made = envelopes(2_500)
                made.append(
                    envelope(2_500, schema_version=7, correlation_id="c", causation_id="a", subject="s", tags=("x:1", "y:ü"))
                )
                await published(broker, made)
                got = await taken(broker, "readers", 256)
                while len(got) < len(made):
                    await broker.acknowledge("readers", got)
                    got += await taken(broker, "readers", min(256, len(made) - len(got)))
                assert numbers(got) == list(range(2_501))
                last = got[-1].record
                for name in type(made[-1]).__struct_fields__:
                    assert getattr(last, name) == getattr(made[-1], name), name

    run(main())


def test_many_tasks_each_get_their_own_confirm() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url + "?window=32&prefetch=1000", ORDERED) as broker:
                made = envelopes(500)
                await asyncio.gather(*(published(broker, [one]) for one in made))
                assert sorted(await handled(broker, "readers", 500)) == sorted(one.id for one in made)

    run(main())


def test_a_large_event_travels_in_several_frames() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                from trilogue.events import Envelope, new_id

                sizes = [0, 1, 131_063, 131_064, 131_065, 400_000, 1 << 20]
                made = [Envelope(new_id(), "video.big", b"x" * size, "k") for size in sizes]
                await published(broker, made)
                got = await taken(broker, "readers", len(sizes))
                assert [d.record.data for d in got] == [one.data for one in made]

    run(main())


def test_what_cannot_be_stored_is_rejected_alone_and_before_it_is_sent() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url + "?payload_bytes=100", ORDERED) as broker:
                large = envelope(10**120)
                heavy = envelope(3, extensions={"x": "y" * 200_000})
                outcomes = await broker.publish([envelope(1), large, heavy, envelope(2)])
                assert [type(o) for o in outcomes] == [Receipt, Rejected, Rejected, Receipt]
                assert "the limit is 100" in str(outcomes[1])
                assert numbers(await taken(broker, "readers", 2)) == [1, 2]

    run(main())


def test_an_event_nobody_subscribed_to_is_kept_and_counted() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                await published(broker, [envelope(1, "badge.won"), envelope(2, "video.watched"), envelope(3, "badge.won")])
                await until(lambda: unrouted(broker, "2 events"))

    async def unrouted(broker: object, text: str) -> bool:
        return (await broker.describe())["unrouted"].startswith(text)  # type: ignore[attr-defined]

    run(main())


def test_an_event_that_not_even_the_queue_for_such_could_take_is_rejected() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                link = broker._reading.link
                assert link is not None
                assert await topology.delete(link, "events.unrouted")
                outcomes = await broker.publish([envelope(1), envelope(2, "badge.won"), envelope(3)])
                assert [type(o) for o in outcomes] == [Receipt, Rejected, Receipt]
                assert "events.unrouted" in str(outcomes[1])

    run(main())


def test_a_nack_means_unknown_because_another_queue_may_have_it() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED, Group("others", ("#",))) as broker:
                # A queue of somebody else that is full and says so.
                vhost = url.rpartition("/")[2]
                full = {"x-max-length": 1, "x-overflow": "reject-publish"}
                rabbitmq_api("PUT", f"/api/queues/{vhost}/full", {"durable": True, "arguments": full})
                rabbitmq_api("POST", f"/api/bindings/{vhost}/e/events/q/full", {"routing_key": "video.#"})
                outcomes = await broker.publish(envelopes(10))
                unknown = [o for o in outcomes if isinstance(o, OutcomeUnknown)]
                assert len(unknown) >= 5
                assert not [o for o in outcomes if isinstance(o, Rejected)]
                assert all(o.stored is None for o in unknown)
                assert numbers(await taken(broker, "readers", 10)) == list(range(10))

    run(main())


def test_a_connection_cut_between_message_and_confirm_leaves_the_outcome_unknown() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with proxy_to(url) as proxy, opened(through(proxy, url), ORDERED, restarts=None) as broker:
                await published(broker, [envelope(0)])
                proxy.is_deaf = True
                publishing = asyncio.create_task(broker.publish(envelopes(5)))
                async with opened(url, Group("readers", ("video.#",)), work=False) as witness:
                    await until(lambda: ready(witness, 6))
                proxy.is_deaf = False
                proxy.cut()
                outcomes = await publishing
                assert [type(o) for o in outcomes] == [OutcomeUnknown] * 5
                assert "publish it again with the same id" in str(outcomes[0])
                await published(broker, [envelope(6)])

    async def ready(witness: object, count: int) -> bool:
        [lane] = await witness.lanes("readers")  # type: ignore[attr-defined]
        # The other process has received some of them: six in all.
        found = rabbitmq_api("GET", f"/api/queues/{witness.url.rpartition('/')[2]}/readers")  # type: ignore[attr-defined]
        assert isinstance(found, dict)
        return lane.lag is not None and found.get("messages", 0) >= count

    run(main())


def test_cut_anywhere_while_writing_nothing_confirmed_is_missing_and_nothing_unwritten_is_there() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with (
                proxy_to(url) as proxy,
                opened(through(proxy, url), restarts=None) as broker,
                opened(url, ORDERED) as reader,
            ):
                sure, unknown, absent = set(), set(), set()
                for cut in (1, 300, 777, 5_000, 20_000, 31_007):
                    await published_again(broker)
                    proxy.cut_after(cut)
                    made = envelopes(200)
                    for one, outcome in zip(made, await broker.publish(made), strict=True):
                        found = (
                            sure if isinstance(outcome, Receipt) else unknown if isinstance(outcome, OutcomeUnknown) else absent
                        )
                        found.add(one.id)
                await published_again(broker)
                await published(broker, [last := envelope(-1, "video.last")])
                there: list[str] = []
                while last.id not in there:
                    got = await reader.receive("readers", limit=100, wait_s=1)
                    await reader.acknowledge("readers", got)
                    there += [d.record.id for d in got]
                assert proxy.cuts == 6
                assert sure <= set(there)
                assert not absent & set(there)
                assert unknown
                assert len(there) == len(set(there))

    async def published_again(broker: object) -> None:
        async def works() -> bool:
            return isinstance((await broker.publish([envelope(-1, "probe")]))[0], Receipt)  # type: ignore[attr-defined]

        await until(works)

    run(main())


def test_a_frozen_server_lets_publishes_end_by_their_time_out() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with (
                proxy_to(url) as proxy,
                opened(through(proxy, url) + "?timeout_s=0.5&window=3", ORDERED, restarts=None) as broker,
            ):
                await published(broker, [envelope(0)])
                proxy.freeze()
                outcomes = await broker.publish(envelopes(5))
                # Three were written, the others never.
                assert [type(o) for o in outcomes] == [OutcomeUnknown] * 3 + [Unavailable] * 2
                assert [type(o) for o in await broker.publish(envelopes(1))] == [Unavailable]
                proxy.thaw()
                await until(lambda: works(broker))

    async def works(broker: object) -> bool:
        return isinstance((await broker.publish([envelope(9)]))[0], Receipt)  # type: ignore[attr-defined]

    run(main())


def test_a_server_that_is_away_makes_publishes_unavailable_and_certainly_absent() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with proxy_to(url) as proxy, opened(through(proxy, url) + "?timeout_s=0.3", ORDERED, restarts=None) as broker:
                proxy.refuses = True
                proxy.cut()
                await until(lambda: broker._writing.link is None)
                [outcome] = await broker.publish([envelope(1)])
                assert isinstance(outcome, Unavailable)
                assert outcome.stored is False
                assert "not connected" in str(outcome)
                proxy.refuses = False
                await until(lambda: works(broker))

    async def works(broker: object) -> bool:
        return isinstance((await broker.publish([envelope(9)]))[0], Receipt)  # type: ignore[attr-defined]

    run(main())


def test_a_cancelled_publish_that_was_not_written_is_not_written_later() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with proxy_to(url) as proxy, opened(through(proxy, url), ORDERED, restarts=None) as broker:
                proxy.refuses = True
                proxy.cut()
                await until(lambda: broker._writing.link is None)
                waiting = asyncio.create_task(broker.publish([envelope(1)]))
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                proxy.refuses = False
                await published(broker, [envelope(2)])
                assert numbers(await taken(broker, "readers", 1)) == [2]

    run(main())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda url: url.replace(":", ":x", 2).replace("amqp:x", "amqp:"), "check user and password"),
        (lambda url: url + "x", "virtual host"),
    ],
    ids=["password", "vhost"],
)
def test_wrong_credentials_are_said_at_once_without_the_password(change: object, said: str) -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            broker = open_broker(change(url) + "?connect_timeout_s=60")  # type: ignore[operator]
            with pytest.raises(Unavailable) as caught:
                await broker.open()
            assert said in str(caught.value)
            secret = url.split("@")[0].rpartition(":")[2]
            assert secret not in str(caught.value)
            assert secret not in broker.url

    run(main())


def test_an_absent_server_is_said_after_a_bounded_time() -> None:
    async def main() -> None:
        broker = open_broker("amqp://u:hidden@127.0.0.1:1/?connect_timeout_s=0.3")
        with pytest.raises(Unavailable) as caught:
            await broker.open()
        assert "127.0.0.1:1" in str(caught.value)
        assert "hidden" not in str(caught.value)

    run(main())


def test_close_waits_for_what_is_on_its_way() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            broker = open_broker(url)
            await broker.open()
            publishing = asyncio.create_task(broker.publish(envelopes(300)))
            await asyncio.sleep(0)
            await broker.close()
            assert [o for o in await publishing if isinstance(o, LogError)] == []

    run(main())
