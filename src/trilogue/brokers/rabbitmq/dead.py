"""Dead letters in a queue of the broker's own, for direct mode.

<group>.dead:  [1] [2] [3] …      looked at by an exclusive consumer on a connection of its own, which then ends without a word:
                                  the server puts everything back in order

A letter is the event as it was, with headers that say why. Its position is the moment it died, in microseconds, because its place
in the queue changes as others go. One that the server itself put there, because its handler killed the process again and again,
has only the server's own header.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any
from zlib import crc32

from msgspec import structs
from pika import spec

from trilogue.brokers.rabbitmq import topology
from trilogue.brokers.rabbitmq.channel import Channel, Closed, method_frame
from trilogue.brokers.rabbitmq.link import Link, connect
from trilogue.brokers.rabbitmq.messages import Headers, Message, message, record
from trilogue.brokers.rabbitmq.options import Options
from trilogue.brokers.rabbitmq.publisher import Publisher
from trilogue.errors import Unavailable, UnknownEvent
from trilogue.events import Delivery, as_us, now_us
from trilogue.ports import DeadLetter

ERROR_CHARS = 2_000
TRACEBACK_CHARS = 16_000
LOOKED_AT = 10_000  # more than these are looked at only as others are removed
SILENT_S = 5.0
WATCHED_S = 5.0
LOOK_S = 0.02
AT_ONCE = 500
_PREFIX = "trilogue-"


def letter(options: Options, delivery: Delivery, *, attempts: int, error: str, traceback: str) -> Message:
    """The message to be kept for a record that its group gives up."""
    why: Headers = {
        f"{_PREFIX}group": delivery.group,
        f"{_PREFIX}attempts": attempts,
        f"{_PREFIX}error": error[:ERROR_CHARS],
        f"{_PREFIX}traceback": traceback[-TRACEBACK_CHARS:],
        f"{_PREFIX}died": _moment(),
    }
    return message(delivery.record, options.dead, options.queue(delivery.group), why)


def _moment() -> int:
    """Now, and never the same twice: it is how a letter is named, wherever in the queue it is."""
    _Last.us = max(now_us(), _Last.us + 1)
    return _Last.us


class _Last:
    us = 0


async def listed(options: Options, group: str, *, after: int, limit: int) -> list[DeadLetter]:
    """The oldest dead letters of a group beyond a position."""
    found: list[DeadLetter] = []
    async with _look(options, group) as look:
        async for _, one in look:
            if one.record.position > after:
                found.append(one)
            if len(found) > 2 * limit:
                found = _oldest(found, limit)
    return _oldest(found, limit)


def _oldest(letters: list[DeadLetter], limit: int) -> list[DeadLetter]:
    return sorted(letters, key=lambda one: one.record.position)[:limit]


async def redriven(options: Options, publisher: Publisher, group: str, positions: Sequence[int] | None) -> int:
    """Put dead letters into the group's own queue; returns how many went. Raises LogError for the first that could not."""
    count = 0
    wanted = None if positions is None else set(positions)
    async with _look(options, group) as look:
        waiting: list[tuple[int, Message]] = []
        async for tag, one in look:
            if wanted is None or one.record.position in wanted:
                waiting.append((tag, message(one.record, "", options.queue(group))))
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
    wanted = None if positions is None else set(positions)
    async with _look(options, group) as look:
        tags = [tag async for tag, one in look if wanted is None or one.record.position in wanted]
        look.remove(tags)
    return len(tags)


# ── what a letter says ───────────────────────────────────────────────────────────────────────────────────────────────


def _read(group: str, routing_key: str, properties: bytes, body: bytes) -> DeadLetter:
    made, headers = record(routing_key, properties, body, position=0, now_us=now_us())
    if f"{_PREFIX}error" not in headers:
        return _buried_by_server(group, routing_key, properties, body)
    get = headers.get
    attempts, died = get(f"{_PREFIX}attempts"), get(f"{_PREFIX}died")
    died_us = died if isinstance(died, int) else made.recorded_us
    return DeadLetter(
        group,
        structs.replace(made, position=died_us),
        attempts if isinstance(attempts, int) else 1,
        str(get(f"{_PREFIX}error")),
        str(get(f"{_PREFIX}traceback", "")),
        died_us,
        parked=False,
    )


def _buried_by_server(group: str, routing_key: str, properties: bytes, body: bytes) -> DeadLetter:
    made, headers = record(routing_key, properties, body, position=0, now_us=now_us())
    death = _death(headers)
    if made.type == routing_key and (keys := death.get("routing-keys")):
        # It had no type of its own: what it was first published with.
        made, _ = record(str(keys[0]), properties, body, position=0, now_us=now_us())
    at = death.get("time")
    # Whole seconds, so the id tells apart what died in one of them.
    died_us = (as_us(at) if isinstance(at, datetime) else 0) + crc32(made.id.encode()) % 1_000_000
    error = f"RabbitMQ gave it up ({death.get('reason', 'unknown')}): its handler may have ended the process each time"
    return DeadLetter(group, structs.replace(made, position=died_us), topology.CRASHES, error, "", died_us, parked=False)


def _death(headers: Headers) -> dict[str, Any]:
    deaths = headers.get("x-death")
    first = deaths[0] if isinstance(deaths, list) and deaths else {}
    return first if isinstance(first, dict) else {}


# ── looking without taking ───────────────────────────────────────────────────────────────────────────────────────────


class _Look:
    """The messages that are in a queue now, one after the other, each with its delivery tag."""

    def __init__(self, channel: Channel, group: str, count: int) -> None:
        self._channel, self._group, self._left, self._shown = channel, group, count, 0
        self._arrived: asyncio.Queue[tuple[int, str, bytes, bytes]] = asyncio.Queue()
        channel.on_delivery = self._deliver

    def _deliver(self, tag: int, _: int, routing_key: str, properties: bytes, body: bytes) -> None:
        self._arrived.put_nowait((tag, routing_key, properties, body))

    def remove(self, tags: Sequence[int]) -> None:
        """Take these out of the queue."""
        self._shown -= len(tags)
        for tag in tags:
            self._channel.link.write(method_frame(self._channel.number, spec.Basic.Ack(tag, False)))

    def __aiter__(self) -> AsyncIterator[tuple[int, DeadLetter]]:
        """Each once."""
        return self

    async def __anext__(self) -> tuple[int, DeadLetter]:
        """The next one."""
        if self._left <= 0 or self._shown >= LOOKED_AT:
            raise StopAsyncIteration
        self._left -= 1
        self._shown += 1
        try:
            async with asyncio.timeout(SILENT_S):
                tag, routing_key, properties, body = await self._arrived.get()
        except TimeoutError:  # somebody else took the rest
            raise StopAsyncIteration from None
        return tag, _read(self._group, routing_key, properties, body)


@contextlib.asynccontextmanager
async def _look(options: Options, group: str) -> AsyncIterator[_Look]:
    queue = options.dead_queue(group)
    link = await connect(options, f"dead letters of {group}")
    try:
        found = await _unwatched(link, queue)
        if found is None:
            raise UnknownEvent(f"{options.url} has no dead letters of group {group!r}: there is no queue {queue!r}")
        channel = await link.channel()
        # All of them: what is given back twice comes before what never was, so a part of them would come back out of order.
        await channel.call(spec.Basic.Qos(0, LOOKED_AT, False))
        look = _Look(channel, group, found.ready)
        await _consume(link, channel, queue)
        yield look
        await channel.call(spec.Basic.Qos(0, 1, False))  # answered after everything that was removed
    finally:
        await link.fin()


async def _unwatched(link: Link, queue: str) -> topology.Found | None:
    """The queue once nobody looks at it: what was shown to the last one is back in its place then."""
    for _ in range(round(WATCHED_S / LOOK_S)):
        found = await topology.look(link, queue)
        if found is None or not found.consumers:
            return found
        await asyncio.sleep(LOOK_S)
    raise Unavailable(f"{link.url}: somebody else looks at queue {queue!r} just now; try again in a moment")


async def _consume(link: Link, channel: Channel, queue: str) -> None:
    try:
        await channel.call(spec.Basic.Consume(queue=queue, consumer_tag="trilogue", exclusive=True))
    except Closed as error:
        if error.code != 403:
            raise
        raise Unavailable(f"{link.url}: somebody else looks at queue {queue!r} just now; try again in a moment") from error
