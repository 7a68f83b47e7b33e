"""Direct mode on RabbitMQ: the broker counts the attempts and keeps the dead letters."""

import pytest
from amqp import envelope, envelopes, handled, numbers, opened, published, taken, until
from common import run
from services import rabbitmq_api, rabbitmq_vhost

from trilogue.brokers.rabbitmq import RabbitMQ, dead, topology
from trilogue.errors import UnknownEvent
from trilogue.events import Group

WORKERS = Group("workers", ("video.#",), ordered=False)


async def buried(broker: RabbitMQ, count: int) -> None:
    """Publish and give up so many."""
    await published(broker, envelopes(count))
    for delivery in await taken(broker, "workers", count):
        await broker.dead_letter(
            "workers", delivery, attempts=3, error=f"ValueError: {delivery.record.data!r}", traceback="Traceback …"
        )


async def dead_numbers(broker: RabbitMQ) -> list[int]:
    return [int(letter.record.data[5:-1]) for letter in await broker.dead("workers")]


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_released_records_come_again_with_a_higher_attempt(kind: str) -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(f"{url}?queue_type={kind}", WORKERS, direct=True) as broker:
                await published(broker, [envelope(1)])
                attempts = []
                for _ in range(4):
                    [delivery] = await taken(broker, "workers", 1)
                    attempts.append(delivery.attempt)
                    await broker.release("workers", [delivery])
                assert attempts == ([1, 2, 3, 4] if kind == "quorum" else [1, 2, 2, 2])

    run(main())


def test_a_dead_letter_keeps_the_event_and_the_reason() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, WORKERS, direct=True) as broker:
                made = envelope(7, "video.watched", "u1", correlation_id="c", tags=("a:1",), schema_version=3)
                await published(broker, [made])
                [delivery] = await taken(broker, "workers", 1)
                await broker.dead_letter("workers", delivery, attempts=5, error="ValueError: no", traceback="T" * 50_000)
                [letter] = await broker.dead("workers")
                assert (letter.group, letter.attempts, letter.error, letter.parked) == ("workers", 5, "ValueError: no", False)
                assert len(letter.traceback) == 16_000
                for name in type(made).__struct_fields__:
                    assert getattr(letter.record, name) == getattr(made, name), name
                assert (await broker.lanes("workers"))[0].lag == 0

    run(main())


def test_looking_leaves_them_in_order_and_driving_again_takes_them_in_order() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, WORKERS, Group("others", ("#",), ordered=False), direct=True) as broker:
                await buried(broker, 20)
                assert await dead_numbers(broker) == list(range(20))
                assert await dead_numbers(broker) == list(range(20))
                places = [letter.record.position for letter in await broker.dead("workers")]
                assert places == sorted(set(places))
                page = await broker.dead(None, after=places[4], limit=3)
                assert [letter.record.position for letter in page] == places[5:8]
                assert await broker.redrive("workers", [places[1], places[3]]) == 2
                assert numbers(await taken(broker, "workers", 2)) == [1, 3]
                assert await broker.drop_dead("workers", [places[0], 12345]) == 1
                assert await dead_numbers(broker) == [2, *range(4, 20)]
                assert await broker.redrive("workers") == 17
                again = await taken(broker, "workers", 17)
                assert numbers(again) == [2, *range(4, 20)]
                assert [d.attempt for d in again] == [1] * 17
                assert {d.record.type for d in again} == {"video.watched"}
                assert await broker.dead("workers") == []
                # Nobody else sees them a second time.
                assert len(await handled(broker, "others", 20)) == 20
                assert await broker.receive("others", limit=1, wait_s=0.2) == []

    run(main())


def test_more_letters_than_are_looked_at_are_all_driven_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(dead, "LOOKED_AT", 6)
        monkeypatch.setattr(dead, "AT_ONCE", 4)
        with rabbitmq_vhost() as url:
            async with opened(url, WORKERS, direct=True) as broker:
                await buried(broker, 20)
                assert len(await broker.dead("workers")) == 6
                assert await broker.redrive("workers") == 20
                assert sorted(numbers(await taken(broker, "workers", 20))) == list(range(20))

    run(main())


def test_a_letter_that_cannot_be_given_back_stays() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, WORKERS, direct=True, restarts=None) as broker:
                await buried(broker, 2)
                await broker.unbind("workers")
                link = broker._reading.link
                assert link is not None
                await topology.delete(link, "workers")
                from trilogue import Rejected

                with pytest.raises(Rejected):
                    await broker.redrive("workers")
                assert await dead_numbers(broker) == [0, 1]

    run(main())


def test_foreign_messages_are_buried_and_driven_again_with_their_type() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, WORKERS, direct=True) as broker:
                vhost = url.rpartition("/")[2]
                message = {"routing_key": "video.raw", "payload": "not json", "payload_encoding": "string", "properties": {}}
                rabbitmq_api("POST", f"/api/exchanges/{vhost}/events/publish", message)
                [delivery] = await taken(broker, "workers", 1)
                await broker.dead_letter("workers", delivery, attempts=1, error="no", traceback="")
                assert await broker.redrive("workers") == 1
                [delivery] = await taken(broker, "workers", 1)
                assert (delivery.record.type, delivery.record.data) == ("video.raw", b"not json")

    run(main())


def test_a_message_whose_handler_kills_its_process_is_given_up_by_the_broker() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, WORKERS, direct=True) as broker:
                await published(broker, [made := envelope(1)])
                for _ in range(topology.CRASHES + 1):
                    [delivery] = await taken(broker, "workers", 1)
                    await broker.release("workers", [delivery])
                await until(lambda: is_dead(broker))
                [letter] = await broker.dead("workers")
                assert letter.record.id == made.id
                assert "delivery_limit" in letter.error
                assert await broker.redrive("workers") == 1
                [delivery] = await taken(broker, "workers", 1)
                assert (delivery.record.id, delivery.record.type, delivery.attempt) == (made.id, "video.watched", 1)

    async def is_dead(broker: RabbitMQ) -> bool:
        link = broker._reading.link
        assert link is not None
        found = await topology.look(link, "workers.dead")
        return found is not None and found.ready == 1

    run(main())


def test_a_group_without_dead_letters_is_said() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url) as broker:
                with pytest.raises(UnknownEvent, match="nobody"):
                    await broker.dead("nobody")
                assert await broker.dead(None) == []

    run(main())
