"""What is declared on the server, and what differs from it said in words.

events (topic) ──pattern──▶ queue of a group                     quorum, single active consumer if it keeps order
      │ nobody wants it                │ given up, in direct mode
      ▼                                ▼
events.unrouted (fanout)       events.dead (direct)
      ▼                                ▼
events.unrouted: bounded       <group>.dead
"""

import re
from typing import Any, NamedTuple

from pika import spec

from trilogue.brokers.rabbitmq.channel import Channel, Closed
from trilogue.brokers.rabbitmq.link import Link
from trilogue.brokers.rabbitmq.options import Options
from trilogue.errors import Unavailable
from trilogue.events import Group

UNROUTED = 100_000
UNROUTED_BYTES = 256 << 20
# No limit would be 20 on RabbitMQ 4, after which messages are dropped; -1 means none there, and "drop at once" to 3.10.
NO_LIMIT = 1_000_000_000
# A message whose handler kills its process is given up by the broker, not by us.
CRASHES = 100
_DIFFERS = re.compile(r"inequivalent arg '(.+?)' for (\w+) '(.+?)' in vhost '.*?': received (.+?) but current is (.+)")


class Found(NamedTuple):
    """A queue as the server sees it: how many messages are ready, and how many consumers it has."""

    ready: int
    consumers: int


async def declare_exchanges(link: Link, options: Options) -> None:
    """The exchange of all events, and where those go that nobody wants. Raises Unavailable where something else is there."""
    channel = await link.channel()
    limits = {"x-queue-type": "quorum", "x-max-length": UNROUTED, "x-max-length-bytes": UNROUTED_BYTES}
    limits |= {"x-delivery-limit": NO_LIMIT, "x-overflow": "drop-head"}
    try:
        await channel.call(_exchange(options.unrouted, "fanout"))
        await channel.call(spec.Queue.Declare(queue=options.unrouted, durable=True, arguments=limits))
        await channel.call(spec.Queue.Bind(queue=options.unrouted, exchange=options.unrouted, routing_key=""))
        await channel.call(_exchange(options.events, "topic", {"alternate-exchange": options.unrouted}))
    except Closed as error:
        raise explained(error, options) from error
    await channel.close()


async def declare_group(link: Link, options: Options, group: Group, *, is_direct: bool) -> bool:
    """The queue of a group and its bindings; returns False if there is none and the group is not to be made.

    Raises Unavailable where something else is there under that name.
    """
    queue = options.queue(group.name)
    if group.start == "existing" and await look(link, queue) is None:
        return False
    channel = await link.channel()
    try:
        if is_direct and not group.ordered:
            await _declare_dead(channel, options, group)
        await channel.call(
            spec.Queue.Declare(queue=queue, durable=True, arguments=arguments(options, group, is_direct=is_direct))
        )
        for pattern in group.patterns:
            await channel.call(spec.Queue.Bind(queue=queue, exchange=options.events, routing_key=pattern))
    except Closed as error:
        raise explained(error, options) from error
    await channel.close()
    return True


def arguments(options: Options, group: Group, *, is_direct: bool) -> dict[str, Any]:
    """What the queue of a group is declared with."""
    is_quorum = options.queue_type == "quorum"
    made: dict[str, Any] = {"x-queue-type": options.queue_type}
    if group.ordered:
        made["x-single-active-consumer"] = True
    if is_direct and not group.ordered:
        made |= {"x-dead-letter-exchange": options.dead, "x-dead-letter-routing-key": options.queue(group.name)}
        # Without both a dead letter that cannot be delivered at once would be lost.
        made |= {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"} if is_quorum else {}
    if is_quorum:
        made["x-delivery-limit"] = CRASHES if is_direct and not group.ordered else NO_LIMIT
    return made


async def _declare_dead(channel: Channel, options: Options, group: Group) -> None:
    queue = options.dead_queue(group.name)
    made = {"x-queue-type": options.queue_type} | ({"x-delivery-limit": NO_LIMIT} if options.queue_type == "quorum" else {})
    await channel.call(_exchange(options.dead, "direct"))
    await channel.call(spec.Queue.Declare(queue=queue, durable=True, arguments=made))
    await channel.call(spec.Queue.Bind(queue=queue, exchange=options.dead, routing_key=options.queue(group.name)))


async def has_exchange(link: Link, name: str) -> bool:
    """Whether there is an exchange of that name; none is declared."""
    channel = await link.channel()
    try:
        await channel.call(spec.Exchange.Declare(exchange=name, passive=True))
    except Closed as error:
        if error.code == 404:
            return False
        raise
    await channel.close()
    return True


async def look(link: Link, queue: str) -> Found | None:
    """A queue as it is, None if there is none."""
    channel = await link.channel()
    try:
        found = await channel.call(spec.Queue.Declare(queue=queue, passive=True))
    except Closed as error:
        if error.code == 404:
            return None
        raise
    await channel.close()
    return Found(found.message_count, found.consumer_count)


async def delete(link: Link, queue: str) -> bool:
    """Delete a queue with what is in it; False if there was none."""
    if await look(link, queue) is None:
        return False
    channel = await link.channel()
    await channel.call(spec.Queue.Delete(queue=queue))
    await channel.close()
    return True


def _exchange(name: str, kind: str, made: dict[str, Any] | None = None) -> spec.Exchange.Declare:
    return spec.Exchange.Declare(exchange=name, type=kind, durable=True, arguments=made or {})


def explained(error: Closed, options: Options) -> Unavailable:
    """What the server refused to declare, with both sides of the difference and what can be done."""
    if error.code == 403:
        return Unavailable(
            f"{options.url} does not let user {options.user!r} declare what is needed ({error.text}): grant it with "
            "`rabbitmqctl set_permissions`, configure, write and read"
        )
    if not (found := _DIFFERS.search(error.text)):
        return Unavailable(f"{options.url} refused to declare exchanges and queues: {error.text}")
    argument, kind, name, wanted, there = found.groups()
    if kind == "exchange":
        mend = "let the other program use it without declaring it (passive), delete it, or choose another with ?exchange="
    else:
        mend = "give the group another name, or let its queue run empty and delete it: order= and ?queue_type= cannot change"
    return Unavailable(
        f"{options.url}: {kind} {name!r} is there already, and its {argument} is {there} where {wanted} is wanted: {mend}"
    )
