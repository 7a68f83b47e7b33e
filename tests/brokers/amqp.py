"""What the RabbitMQ tests share: brokers on a virtual host of their own, envelopes, and asking until something is so."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from trilogue import LogError
from trilogue.brokers.rabbitmq import RabbitMQ, open_broker
from trilogue.events import Delivery, Envelope, Group, Receipt, new_id, now_us
from trilogue.ports import Progress

PATIENCE_S = 30


class Beside:
    """Stands for a store beside the broker."""

    async def assigned(self, group: str, lane: str) -> Progress | None:
        raise NotImplementedError


PAIRED = Beside()


@asynccontextmanager
async def opened(
    url: str, *groups: Group, direct: bool = False, work: bool = True, restarts: int | None = 0
) -> AsyncIterator[RabbitMQ]:
    """A broker with groups bound. restarts: how often anything may have begun again at the end; None: as often as it likes."""
    broker = open_broker(url)
    assert isinstance(broker, RabbitMQ)
    await broker.open()
    try:
        await broker.bind(groups, work=work, cursors=None if direct else PAIRED)
        yield broker
        if restarts is not None:
            assert (await broker.describe())["restarts"] == str(restarts)
    finally:
        await broker.close()


def envelope(n: int, type: str = "video.watched", key: str | None = "k", **more: object) -> Envelope:
    return Envelope(new_id(), type, b'{"n":%d}' % n, key, "tests", now_us(), **more)  # type: ignore[arg-type]


def envelopes(count: int, type: str = "video.watched", keys: int = 1) -> list[Envelope]:
    return [envelope(n, type, f"k{n % keys}") for n in range(count)]


async def published(broker: RabbitMQ, made: Sequence[Envelope]) -> None:
    outcomes = await broker.publish(made)
    assert [o for o in outcomes if isinstance(o, LogError)] == []
    assert [o.id for o in outcomes if isinstance(o, Receipt)] == [e.id for e in made]


async def taken(broker: RabbitMQ, group: str, count: int) -> list[Delivery]:
    """So many deliveries, or as many as come in time."""
    found: list[Delivery] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            found += await broker.receive(group, limit=count - len(found), wait_s=1)
    return found


async def handled(broker: RabbitMQ, group: str, count: int) -> list[str]:
    """Take and acknowledge so many; their ids."""
    ids: list[str] = []
    while len(ids) < count:
        got = await taken(broker, group, 1)
        got += await broker.receive(group, limit=count - len(ids) - 1, wait_s=0)
        lost = await broker.acknowledge(group, got)
        ids += [d.record.id for d in got if d not in lost]
    return ids


async def until(question: Callable[[], Awaitable[bool] | bool]) -> None:
    """Ask until the answer is yes."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = question()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(0.01)


def numbers(deliveries: Sequence[Delivery]) -> list[int]:
    """The n of each event."""
    return [int(d.record.data[5:-1]) for d in deliveries]
