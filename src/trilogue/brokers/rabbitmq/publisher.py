"""Publishing, confirmed: a window of messages that are written and not confirmed yet, and what waits for room in it.

publish ─▶ batch ─▶ waiting ──room──▶ window: tag ─▶ (batch, place) ──ack──▶ None, it is there
                       │                 │ returned ─▶ Rejected
                    time-out             │ nack, time-out, connection lost ─▶ OutcomeUnknown
                       ▼                 ▼
                   Unavailable: never written, certainly not there

A nack is no refusal: where one of several queues could not take a message, the others have it.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

from pika import spec

from trilogue.brokers.rabbitmq.channel import Channel, method_frame
from trilogue.brokers.rabbitmq.link import FRAME, FRAME_END, Link
from trilogue.brokers.rabbitmq.messages import Message
from trilogue.brokers.rabbitmq.options import Options
from trilogue.errors import LogError, OutcomeUnknown, Rejected, Unavailable

CLOSE_S = 5.0
_TARGETS = 10_000


class _Batch:
    """Messages published together. sent: how many were written. missing: how many have no outcome yet."""

    __slots__ = ("deadline", "done", "messages", "missing", "outcomes", "sent")

    def __init__(self, messages: Sequence[Message], deadline: float, done: asyncio.Future[None]) -> None:
        self.messages, self.deadline, self.done = messages, deadline, done
        self.sent, self.missing = 0, len(messages)
        self.outcomes: list[LogError | None] = [None] * len(messages)


class Publisher:
    """Everything that is published over one connection."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._tag = 0
        self._window: dict[int, tuple[_Batch, int]] = {}
        self._waiting: deque[_Batch] = deque()
        self._open: dict[_Batch, None] = {}  # in order of their deadlines
        self._returned: set[int] = set()
        self._targets: dict[tuple[str, str], bytes] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, link: Link) -> asyncio.Future[Unavailable]:
        """Publish over this connection from now on; returns what is done when that has ended."""
        channel = await link.channel()
        await channel.call(spec.Confirm.Select())
        channel.on_confirm, channel.on_return = self._confirmed, self._was_returned
        link.on_room = self._pump
        self._tag = 0
        self._targets.clear()
        self._channel = channel
        channel.closed.add_done_callback(lambda closed: self._lost(channel, closed.result()))
        self._pump()
        return channel.closed

    async def publish(self, messages: Sequence[Message]) -> list[LogError | None]:
        """Publish in order; for each None once the broker has it, or the error that says what became of it."""
        if not messages:
            return []
        batch = _Batch(messages, self._loop.time() + self._options.timeout_s, self._loop.create_future())
        self._open[batch] = None
        if self._timer is None:
            self._timer = self._loop.call_at(batch.deadline, self._expire)
        self._waiting.append(batch)
        self._pump()
        try:
            await batch.done
        finally:
            self._open.pop(batch, None)
        return batch.outcomes

    async def close(self) -> None:
        """Wait a bounded time for what is on its way."""
        if self._open:
            await asyncio.wait([batch.done for batch in self._open], timeout=CLOSE_S)
        for batch in [batch for batch in self._open if not batch.done.done()]:
            self._give_up(batch)
        if self._timer:
            self._timer.cancel()

    # ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _pump(self) -> None:
        """Write what waits, as far as there is room."""
        channel = self._channel
        if channel is None:
            return
        link, window = channel.link, self._window
        while self._waiting and len(window) < self._options.window and link.blocked is None and not link.is_full:
            batch = self._waiting[0]
            if batch.done.done():  # it timed out, or nobody waits any more
                self._waiting.popleft()
                continue
            self._tag += 1
            window[self._tag] = (batch, batch.sent)
            link.write(self._frames(channel, batch.messages[batch.sent]))
            batch.sent += 1
            if batch.sent == len(batch.messages):
                self._waiting.popleft()

    def _frames(self, channel: Channel, message: Message) -> bytes:
        exchange, routing_key, properties, body, _ = message
        number = channel.number
        target = self._targets.get((exchange, routing_key))
        if target is None:
            target = method_frame(number, spec.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=True))
            if len(self._targets) < _TARGETS:
                self._targets[exchange, routing_key] = target
        head = FRAME.pack(2, number, len(properties))
        most = channel.link.frame_bytes - 8
        if 0 < len(body) <= most:
            return b"".join((target, head, properties, FRAME_END, FRAME.pack(3, number, len(body)), body, FRAME_END))
        frames = [target, head, properties, FRAME_END]
        for at in range(0, len(body), most):
            part = body[at : at + most]
            frames += (FRAME.pack(3, number, len(part)), part, FRAME_END)
        return b"".join(frames)

    # ── outcomes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _confirmed(self, tag: int, multiple: bool, stored: bool) -> None:
        window = self._window
        if multiple:
            tags = []
            for older in window:
                if older > tag:
                    break
                tags.append(older)
        else:
            tags = [tag]
        for one in tags:
            entry = window.pop(one, None)
            if entry is not None:
                self._outcome(*entry, one, stored)
        if self._waiting:
            self._pump()

    def _outcome(self, batch: _Batch, place: int, tag: int, stored: bool) -> None:
        if not stored:
            batch.outcomes[place] = OutcomeUnknown(
                f"{self._options.url} could not keep event {batch.messages[place].id!r} in every queue (nack): some may have it; "
                "publish it again with the same id"
            )
        elif self._returned and tag in self._returned:
            self._returned.discard(tag)
            batch.outcomes[place] = self._refused(batch.messages[place])
        self._count(batch)

    def _refused(self, message: Message) -> Rejected:
        return Rejected(
            f"{self._options.url} has no queue for event {message.id!r} with routing key {message.routing_key!r}; the queue for "
            f"such, {self._options.unrouted!r}, is gone and made again when a program starts"
        )

    def _count(self, batch: _Batch) -> None:
        batch.missing -= 1
        if not batch.missing and not batch.done.done():
            batch.done.set_result(None)

    def _was_returned(self, properties: bytes) -> None:
        """Comes before the confirm. Which message it is only its properties tell."""
        for tag, (batch, place) in self._window.items():
            if tag not in self._returned and batch.messages[place].properties[12:] == properties:
                self._returned.add(tag)
                return

    def _lost(self, channel: Channel, why: Unavailable) -> None:
        if self._channel is channel:
            self._channel = None
        window, self._window = self._window, {}
        self._returned.clear()
        for batch, place in window.values():
            batch.outcomes[place] = OutcomeUnknown(
                f"{why}; event {batch.messages[place].id!r} was on its way: publish it again with the same id"
            )
            self._count(batch)
        for batch in {batch for batch, _ in window.values() if not batch.done.done()}:
            # What follows would overtake what is unknown and published again.
            self._not_sent(batch, str(why))

    def _not_sent(self, batch: _Batch, why: str) -> None:
        for place in range(batch.sent, len(batch.messages)):
            batch.outcomes[place] = Unavailable(f"{why}: event {batch.messages[place].id!r} was not sent")
        batch.done.set_result(None)

    def _expire(self) -> None:
        """One timer for all: batches end in the order in which they began."""
        self._timer = None
        now = self._loop.time()
        for batch in list(self._open):
            if batch.deadline > now:
                self._timer = self._loop.call_at(batch.deadline, self._expire)
                return
            if not batch.done.done():
                self._give_up(batch)

    def _give_up(self, batch: _Batch) -> None:
        waited = f"{self._options.timeout_s:g} s{self._why_slow()}"
        for place in [place for other, place in self._window.values() if other is batch]:
            batch.outcomes[place] = OutcomeUnknown(
                f"{self._options.url} did not confirm event {batch.messages[place].id!r} within {waited}: "
                "publish it again with the same id"
            )
        self._not_sent(batch, f"{self._options.url} took no events for {waited}")

    def _why_slow(self) -> str:
        if self._channel is None:
            return " (not connected)"
        if reason := self._channel.link.blocked:
            return f" (it takes none at present: {reason})"
        return ""
