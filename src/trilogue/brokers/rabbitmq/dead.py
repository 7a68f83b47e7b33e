"""Dead letters in a queue of the broker's own, for direct mode.

<group>.dead:  [1] [2] [3] …      looked at by an exclusive consumer on a connection of its own, which then ends without a word:
                                  the server puts everything back in order

A letter is the event as it was, with headers that say why. One that the server itself put there, because its handler
killed the process again and again, has only the server's own header.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pika import spec

from trilogue.brokers.rabbitmq import topology
from trilogue.brokers.rabbitmq.link import Channel, Closed, Link, connect, method_frame
from trilogue.brokers.rabbitmq.messages import Headers, Message, message, record
from trilogue.brokers.rabbitmq.options import Options
from trilogue.brokers.rabbitmq.publisher import Publisher
from trilogue.errors import Unavailable, UnknownEvent
from trilogue.events import Delivery, Record, now_us
from trilogue.ports import DeadLetter

ERROR_CHARS = 2_000
TRACEBACK_CHARS = 16_000
LISTED = 65_535
SILENT_S = 5.0
AT_ONCE = 500
_PREFIX = "trilogue-"


def letter(options: Options, delivery: Delivery, *, attempts: int, error: str, traceback: str) -> Message:
    """The message to be kept for a record that its group gives up."""
    why: Headers = {
        f"{_PREFIX}group": delivery.group,
        f"{_PREFIX}attempts": attempts,
        f"{_PREFIX}error": error[:ERROR_CHARS],
        f"{_PREFIX}traceback": traceback[-TRACEBACK_CHARS:],
        f"{_PREFIX}died": now_us(),
    }
    return message(delivery.record, options.dead, options.queue(delivery.group), why)


async def listed(options: Options, group: str, *, after: int, limit: int) -> list[DeadLetter]:
    """The dead letters of a group from one place on."""
    found: list[DeadLetter] = []
    async with _look(options, group, most=after + limit) as look:
        async for tag, made, headers in look:
            if tag > after:
                found.append(_dead_letter(group, made, headers))
    return found


async def redriven(options: Options, publisher: Publisher, group: str, positions: Sequence[int] | None) -> int:
    """Put dead letters into the group's own queue; returns how many went. Raises LogError for the first that could not."""
    count = 0
    async with _look(options, group, most=max(positions, default=0) if positions is not None else None) as look:
        waiting: list[tuple[int, Message]] = []
        async for tag, made, _ in look:
            if positions is None or tag in positions:
                waiting.append((tag, message(made, "", options.queue(group))))
            if len(waiting) == AT_ONCE:
                count += await _give_back(publisher, look, waiting)
        count += await _give_back(publisher, look, waiting)
    return count


async def _give_back(publisher: Publisher, look: "_Look", waiting: list[tuple[int, Message]]) -> int:
    outcomes = await publisher.publish([made for _, made in waiting])
    stored = [tag for (tag, _), error in zip(waiting, outcomes, strict=True) if error is None]
    look.remove(stored)
    waiting.clear()
    for error in outcomes:
        if error is not None:
            raise error
    return len(stored)


async def dropped(options: Options, group: str, positions: Sequence[int] | None) -> int:
    """Remove dead letters; returns how many went."""
    count = 0
    async with _look(options, group, most=max(positions, default=0) if positions is not None else None) as look:
        async for tag, _, _ in look:
            if positions is None or tag in positions:
                look.remove([tag])
                count += 1
    return count


def _dead_letter(group: str, made: Record, headers: Headers) -> DeadLetter:
    if f"{_PREFIX}error" not in headers:
        death = _death(headers)
        error = f"RabbitMQ gave it up: {death.get('reason', 'unknown')}; its handler may have ended the process each time"
        return DeadLetter(group, made, topology.CRASHES, error, "", made.recorded_us, parked=False)
    get = headers.get
    attempts, died = get(f"{_PREFIX}attempts"), get(f"{_PREFIX}died")
    return DeadLetter(
        group,
        made,
        attempts if isinstance(attempts, int) else 1,
        str(get(f"{_PREFIX}error")),
        str(get(f"{_PREFIX}traceback", "")),
        died if isinstance(died, int) else made.recorded_us,
        parked=False,
    )


def _death(headers: Headers) -> dict[str, Any]:
    deaths = headers.get("x-death")
    first = deaths[0] if isinstance(deaths, list) and deaths else {}
    return first if isinstance(first, dict) else {}


# ── looking without taking ───────────────────────────────────────────────────────────────────────────────────────────


class _Look:
    """The messages that are in a queue now, one after the other. most: no more than so many of them."""

    def __init__(self, channel: Channel, count: int) -> None:
        self._channel, self._left = channel, count
        self._arrived: asyncio.Queue[tuple[int, Record, Headers]] = asyncio.Queue()
        channel.on_delivery = self._deliver

    def _deliver(self, tag: int, _: int, routing_key: str, properties: bytes, body: bytes) -> None:
        made, headers = record(routing_key, properties, body, position=tag, now_us=now_us())
        keys = _death(headers).get("routing-keys")
        if keys and made.type == routing_key:  # it had no type of its own: what it was first published with
            made, headers = record(str(keys[0]), properties, body, position=tag, now_us=now_us())
        self._arrived.put_nowait((tag, made, headers))

    def remove(self, tags: Sequence[int]) -> None:
        """Take these out of the queue."""
        for tag in tags:
            self._channel.link.write(method_frame(self._channel.number, spec.Basic.Ack(tag, False)))

    def __aiter__(self) -> AsyncIterator[tuple[int, Record, Headers]]:
        """Each with its place."""
        return self

    async def __anext__(self) -> tuple[int, Record, Headers]:
        """The next one."""
        if self._left <= 0:
            raise StopAsyncIteration
        self._left -= 1
        try:
            async with asyncio.timeout(SILENT_S):
                return await self._arrived.get()
        except TimeoutError:  # somebody else took the rest
            raise StopAsyncIteration from None


@contextlib.asynccontextmanager
async def _look(options: Options, group: str, *, most: int | None) -> AsyncIterator[_Look]:
    """most: how many to look at; None: at all there are, those that are removed making room for the next."""
    queue = options.dead_queue(group)
    link = await connect(options, f"dead letters of {group}")
    try:
        found = await topology.look(link, queue)
        if found is None:
            raise UnknownEvent(f"{options.url} has no dead letters of group {group!r}: there is no queue {queue!r}")
        count = found.ready if most is None else min(most, found.ready)
        channel = await link.channel()
        await channel.call(spec.Basic.Qos(0, min(max(1, count), LISTED), False))
        look = _Look(channel, count)
        await _consume(link, channel, queue)
        yield look
        await channel.call(spec.Basic.Qos(0, 1, False))  # answered after everything that was removed
    finally:
        await link.fin()


async def _consume(link: Link, channel: Channel, queue: str) -> None:
    try:
        await channel.call(spec.Basic.Consume(queue=queue, consumer_tag="trilogue", exclusive=True))
    except Closed as error:
        if error.code != 403:
            raise
        raise Unavailable(f"{link.url}: somebody else looks at queue {queue!r} just now; try again in a moment") from error
