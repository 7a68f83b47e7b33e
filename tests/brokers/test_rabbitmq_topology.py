"""What is declared on RabbitMQ, and what is said where something else is there."""

import pytest
from amqp import PAIRED, envelope, numbers, opened, published, taken
from common import run
from services import rabbitmq_api, rabbitmq_vhost

from trilogue import BadOption, Unavailable
from trilogue.brokers import open_broker
from trilogue.brokers.rabbitmq.options import read
from trilogue.events import Group

ORDERED = Group("readers", ("video.#",))
COMPETING = Group("workers", ("video.#",), ordered=False)


def arguments(url: str, queue: str) -> dict[str, object]:
    found = rabbitmq_api("GET", f"/api/queues/{url.rpartition('/')[2].partition('?')[0]}/{queue}")
    assert isinstance(found, dict)
    assert found["durable"]
    return dict(found["arguments"])


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_queues_are_durable_and_of_the_kind_that_was_asked_for(kind: str) -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(f"{url}?queue_type={kind}", ORDERED, COMPETING):
                made = arguments(url, "readers")
                assert (made["x-queue-type"], made["x-single-active-consumer"]) == (kind, True)
                assert arguments(url, "workers").keys() & {"x-single-active-consumer", "x-dead-letter-exchange"} == set()
                # Never a limit that drops: not the -1 that 3.10 takes for "at once", nor the 20 of 4.x.
                assert made.get("x-delivery-limit", 10**9) == 10**9
                assert arguments(url, "events.unrouted")["x-max-length"] == 100_000

    run(main())


def test_direct_groups_get_a_dead_letter_queue() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, COMPETING, direct=True):
                made = arguments(url, "workers")
                assert made["x-dead-letter-exchange"] == "events.dead"
                assert made["x-dead-letter-strategy"] == "at-least-once"
                assert arguments(url, "workers.dead")["x-delivery-limit"] == 10**9

    run(main())


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (("", ORDERED), ("?queue_type=classic", ORDERED), ["'readers'", "x-queue-type", "quorum", "classic"]),
        (("", ORDERED), ("", Group("readers", ("video.#",), ordered=False)), ["'readers'", "x-single-active-consumer", "true"]),
    ],
    ids=["queue type", "order"],
)
def test_another_queue_of_that_name_is_explained_with_both_sides(
    first: tuple[str, Group], second: tuple[str, Group], said: list[str]
) -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url + first[0], first[1]):
                pass
            broker = open_broker(url + second[0])
            await broker.open()
            with pytest.raises(Unavailable) as caught:
                await broker.bind([second[1]], cursors=PAIRED)
            await broker.close()
            for text in (*said, "another name"):
                assert text in str(caught.value)

    run(main())


def test_another_exchange_of_that_name_is_explained() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            rabbitmq_api("PUT", f"/api/exchanges/{url.rpartition('/')[2]}/events", {"type": "fanout", "durable": True})
            broker = open_broker(url)
            with pytest.raises(Unavailable, match=r"exchange 'events'.*type.*fanout.*topic.*\?exchange="):
                await broker.open()
            async with opened(url + "?exchange=happenings", ORDERED) as other:
                await published(other, [envelope(1)])
                assert numbers(await taken(other, "readers", 1)) == [1]

    run(main())


def test_a_prefix_keeps_programs_apart() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url + "?prefix=a-", ORDERED) as one, opened(url + "?prefix=b-", ORDERED) as two:
                await published(one, [envelope(1)])
                await published(two, [envelope(2)])
                assert numbers(await taken(one, "readers", 1)) == [1]
                assert numbers(await taken(two, "readers", 1)) == [2]
                assert arguments(url, "a-readers")

    run(main())


def test_a_user_who_may_not_declare_is_told_what_to_grant() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            vhost, user = url.rpartition("/")[2], url.partition("://")[2].partition(":")[0]
            rabbitmq_api("PUT", f"/api/permissions/{vhost}/{user}", {"configure": "", "write": "", "read": ""})
            broker = open_broker(url)
            with pytest.raises(Unavailable, match="set_permissions"):
                await broker.open()

    run(main())


def test_describe_says_what_there_is() -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with opened(url, ORDERED) as broker:
                said = await broker.describe()
                assert said["server"].startswith("RabbitMQ ")
                assert said["publishing"] == "open"
                assert said["unrouted"].startswith("0 events")
                assert said["restarts"] == "0"
                assert "os-crash" in said["durability"]

    run(main())


# ── URLs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "vhost", "port"),
    [
        ("amqp://h", "/", 5672),
        ("amqp://h/", "/", 5672),
        ("amqp://h/%2f", "/", 5672),
        ("amqp://h:1/shop", "shop", 1),
        ("amqp://h/a%2Fb?prefetch=3", "a/b", 5672),
        ("amqps://h/", "/", 5671),
    ],
)
def test_where_a_url_leads(url: str, vhost: str, port: int) -> None:
    options = read(url)
    assert (options.vhost, options.port, options.user, options.password) == (vhost, port, "guest", "guest")
    assert (options.tls is not None) == url.startswith("amqps")


def test_user_and_password_are_decoded_and_hidden() -> None:
    options = read("amqp://me:p%40ss%2Fw@h/")
    assert (options.user, options.password) == ("me", "p@ss/w")
    assert "p@ss" not in repr(options)
    assert "p%40ss" not in repr(options)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("amqp://u:secret@h/?prefetch=0", "1 to 2000"),
        ("amqp://u:secret@h/?prefetsh=1", "prefetch?"),
        ("amqp://u:secret@h/?queue_type=stream", "quorum or classic"),
        ("amqp://u:secret@h/?prefix=amq.", "printable"),
        ("amqp://u:secret@h/a/b", "%2f"),
        ("amqp://u:secret@h:99999/", "port"),
        ("amqp://u:secret@/x", "no host"),
        ("amqp://u:secret@h/?ca=x.pem", "amqps"),
        ("amqps://u:secret@h/?ca=no-such-file.pem", "PEM"),
        ("amqps://u:secret@h/?key=k.pem", "without cert="),
    ],
)
def test_a_wrong_url_is_explained_without_its_password(url: str, said: str) -> None:
    with pytest.raises(BadOption) as caught:
        open_broker(url)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
