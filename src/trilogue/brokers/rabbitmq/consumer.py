"""One group's queue as it is read here: deliveries that wait to be taken, and acknowledgements of whatever is finished.

server ──push, at most prefetch──▶ buffer ──receive──▶ (handled) ──acknowledge──▶ acks.py ──▶ server
                                      ▲───────────────release─────┘

All deliveries of a channel share one Lease. When the channel goes, the lease is revoked: the server delivers again, here or
elsewhere.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache

from pika import spec

from trilogue.brokers.rabbitmq import topology
from trilogue.brokers.rabbitmq.acks import Acks
from trilogue.brokers.rabbitmq.channel import Channel, Silent, method_frame
from trilogue.brokers.rabbitmq.link import FRAME_END, Link
from trilogue.brokers.rabbitmq.messages import record
from trilogue.brokers.rabbitmq.options import Options
from trilogue.errors import Unavailable
from trilogue.events import Delivery, Group, Lease, now_us
from trilogue.patterns import matches_any
from trilogue.ports import LaneStatus

_ANSWER = struct.Struct(">BHIIQB")
_UP_TO, _REQUEUE = 1, 2
QUIET_S = 0.05
PATIENCE_S = 2.0
MOST_PATIENCE_S = 30.0
_NEVER_US = 1 << 62


def _no_clock() -> int:
    return 0


@lru_cache(maxsize=4_096)
def _wanted(patterns: tuple[str, ...], routing_key: str) -> bool:
    return matches_any(patterns, routing_key)


def _frame(channel: Channel, method: int, tag: int, flag: int = 0) -> bytes:
    return _ANSWER.pack(spec.FRAME_METHOD, channel.number, 13, method, tag, flag) + FRAME_END


class Consumer:
    """The deliveries of one group. One Lease per channel: all of them are lost together.

    is_direct: no store stands beside the broker: the broker counts the attempts. on_change: called when something arrives or
    the channel is gone.
    """

    def __init__(self, options: Options, group: Group, on_change: Callable[[], None], *, is_direct: bool) -> None:
        self.group, self._options, self._on_change, self._is_direct = group, options, on_change, is_direct
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._lease = Lease(0, 0, _NEVER_US, _no_clock)
        self._lease.revoked = True
        self._buffer: deque[Delivery] = deque()
        self._unwanted: list[int] = []
        self._passed: list[int] = []
        self._acks = Acks()
        self._moved_at = self._loop.time()
        self._silent = 0
        self._arrived: asyncio.Future[None] | None = None
        self._patience_s = PATIENCE_S
        self.is_paused = False
        self.is_ending = False

    # ── the channel ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self, link: Link) -> asyncio.Future[Unavailable]:
        """Consume over this connection from now on; returns what is done when that has ended."""
        await topology.declare_group(link, self._options, self.group, is_direct=self._is_direct)
        channel = await link.channel()
        await channel.call(spec.Basic.Qos(0, self._options.prefetch, False))
        self._begin(channel)
        channel.on_delivery = self._deliver
        channel.closed.add_done_callback(lambda _: self._lost(channel))
        try:
            await self._consume(channel)
            await self._check(link)
        except BaseException:
            await channel.close()
            raise
        return channel.closed

    async def _consume(self, channel: Channel) -> None:
        """Begin to consume. While a quorum queue has no leader yet, as after a crash, the server does not answer: then again."""
        consume = spec.Basic.Consume(queue=self._options.queue(self.group.name), consumer_tag="trilogue")
        try:
            await channel.call(consume, self._patience_s)
        except Silent as error:
            self._patience_s = min(2 * self._patience_s, MOST_PATIENCE_S)
            # The whole connection: a consumer that comes into being after all must not be left behind, deaf.
            channel.link.drop(error)
            raise
        self._patience_s = PATIENCE_S

    async def _check(self, link: Link) -> int:
        """How many messages wait; raises Unavailable where the server knows of no consumer: nothing would ever come."""
        found = await topology.look(link, self._options.queue(self.group.name))
        if found is None or not found.consumers:
            raise Unavailable(
                f"{self._options.url}: the queue of group {self.group.name!r} has no consumer after consuming began"
            )
        return found.ready

    async def verify(self) -> None:
        """End the channel if the server does not know its consumer any more, or gives it nothing of what waits."""
        channel = self._channel
        if channel is None or channel.link.lost.done():
            return
        try:
            waiting = await self._check(channel.link)
            # Where the queue has other consumers, too, it only shows by that. An ordered one gives to one of them alone.
            is_silent = waiting > 0 and not (self.group.ordered or self.is_paused or self._buffer or self._acks.out)
            self._silent = self._silent + 1 if is_silent else 0
            if self._silent > 1:
                raise Unavailable(f"{self._options.url}: group {self.group.name!r} is given nothing of {waiting:,} messages")
        except Unavailable as error:
            if not channel.closed.done():
                channel.closed.set_result(error)

    def _begin(self, channel: Channel) -> None:
        self._channel, self._silent = channel, 0
        self._lease = Lease(0, self._lease.epoch + 1, _NEVER_US, _no_clock)
        self._acks = Acks()
        self._buffer.clear()
        self._unwanted.clear()
        self._passed.clear()

    def _lost(self, channel: Channel) -> None:
        if self._channel is not channel:
            return
        self._channel = None
        self._lease.revoked = True
        self._buffer.clear()
        self.wake()
        channel.mute()
        if channel.link.channels.get(channel.number) is channel and not self.is_ending:
            # Still open: the server cancelled the consumer alone.
            channel.link.write(method_frame(channel.number, spec.Channel.Close(200, "", 0, 0)))

    async def settle(self) -> None:
        """Return when the server has seen every acknowledgement: a call is answered after what was sent before it.

        A quorum queue that is busy keeps some back a moment longer, and says nothing when it has them.
        """
        if self._channel is not None:
            await self._channel.call(spec.Basic.Qos(0, self._options.prefetch, False))
            await asyncio.sleep(max(0.0, self._moved_at + QUIET_S - self._loop.time()))

    async def stop(self) -> None:
        """Stop consuming this group alone."""
        self.is_ending = True
        if self._channel is not None:
            await self._channel.close()

    # ── in ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _deliver(self, tag: int, redelivered: int, routing_key: str, properties: bytes, body: bytes) -> None:
        made, headers = record(routing_key, properties, body, position=tag, now_us=now_us())
        attempt = self._attempt(redelivered, headers) if self._is_direct and redelivered else 1
        if not self._acks.out:
            self._moved_at = self._loop.time()
        self._acks.last = tag
        if routing_key != self._options.queue(self.group.name) and not _wanted(self.group.patterns, routing_key):
            # Bound by another version of the program, whose patterns are others: RabbitMQ tells nobody of a queue's bindings.
            self._unwanted.append(tag)
            self.wake()
            return
        self._buffer.append(Delivery(made, self.group.name, self._lease, attempt))
        if len(self._buffer) == 1:
            self.wake()

    def _attempt(self, redelivered: int, headers: dict[str, object]) -> int:
        """Quorum queues count; a classic one only says that it is not the first time."""
        count = headers.get("x-delivery-count")
        return count + 1 if isinstance(count, int) and count > 0 else 2

    def wake(self) -> None:
        """Let receive() look again."""
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
        self._arrived = None
        self._on_change()

    async def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        """Take what has arrived, waiting for the first. What is not for this group is acknowledged when it is asked again."""
        self._finish(self._passed)
        self._passed.clear()
        if not (self._ready or self._unwanted) and wait_s > 0:
            self._arrived = self._arrived or self._loop.create_future()
            await asyncio.wait([self._arrived], timeout=wait_s)
        self._passed, self._unwanted = self._unwanted, self._passed
        if not self._ready:
            return []
        buffer = self._buffer
        return [buffer.popleft() for _ in range(min(limit, len(buffer)))]

    @property
    def _ready(self) -> bool:
        return bool(self._buffer) and not self.is_paused and not self.is_ending

    # ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def acknowledge(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """These are finished; returns those whose channel is gone."""
        lease = self._lease
        if lease.revoked or self._channel is None:
            return list(deliveries)
        self._finish([d.record.position for d in deliveries if d.lease is lease])
        return [d for d in deliveries if d.lease is not lease]

    def _finish(self, tags: Sequence[int]) -> None:
        channel = self._channel
        if channel is None:
            return
        prefix, beyond = self._acks.finish(tags)
        frames = [_frame(channel, spec.Basic.Ack.INDEX, prefix, _UP_TO)] if prefix else []
        frames += [_frame(channel, spec.Basic.Ack.INDEX, tag) for tag in beyond]
        self._write(channel, frames)

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """Hand back: to the queue where the broker counts the attempts, else to what waits here, in order."""
        lease, channel = self._lease, self._channel
        if lease.revoked or channel is None:
            return
        waiting = {d.record.position for d in self._buffer}
        own = {d.record.position: d for d in deliveries if d.lease is lease and self._acks.is_out(d.record.position)}
        own = {tag: own[tag] for tag in own.keys() - waiting}
        if self._is_direct and not self.group.ordered:
            self._acks.finish(own)
            self._write(channel, [_frame(channel, spec.Basic.Nack.INDEX, tag, _REQUEUE) for tag in sorted(own)])
            return
        self._buffer = deque(sorted([*own.values(), *self._buffer], key=lambda d: d.record.position))
        self.wake()

    def _write(self, channel: Channel, frames: list[bytes]) -> None:
        if frames:
            self._moved_at = self._loop.time()
            channel.link.write(b"".join(frames))

    # ── how far ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def in_flight(self) -> int:
        """How many were received here and are not acknowledged."""
        return 0 if self._lease.revoked else self._acks.out

    def status(self, ready: int | None) -> LaneStatus:
        """ready: how many wait in the queue, None if that is not known."""
        out = self.in_flight
        stalled_s = self._loop.time() - self._moved_at if out else 0.0
        return LaneStatus(self._options.queue(self.group.name), None if ready is None else ready + out, out, stalled_s)
