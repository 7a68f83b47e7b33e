"""RabbitMQ as a broker: a topic exchange, a queue per group, pushed deliveries, confirmed publishes.

    options.py    what the URL says                  link.py       one connection; channel.py
    topology.py   exchanges, queues, bindings        kept.py       connected again, started again
    messages.py   Envelope <-> AMQP message          publisher.py  a window of confirms
    dead.py       dead letters, in direct mode       consumer.py   deliveries, acks.py what of them is finished

Two connections, because a memory or disk alarm stops everything on one that publishes: what is handled goes on then.
Run with RabbitMQ 3.10.8 (Debian 12). Written for 4.x too and not run there; classic queues work, and are slower.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from trilogue.brokers.rabbitmq import dead, topology
from trilogue.brokers.rabbitmq.consumer import Consumer
from trilogue.brokers.rabbitmq.kept import Kept
from trilogue.brokers.rabbitmq.link import Link, connect
from trilogue.brokers.rabbitmq.messages import Message, message
from trilogue.brokers.rabbitmq.options import Options, read
from trilogue.brokers.rabbitmq.publisher import Publisher
from trilogue.errors import LogError, Rejected, Unavailable, UnknownEvent, Unsupported
from trilogue.events import Delivery, Durability, Envelope, Group, Receipt
from trilogue.ports import Broker, Cursors, DeadLetter, Feature, LaneStatus, Progress, SeekTo
from trilogue.stores.append import check_envelope

VERIFY_S = 15.0

log = logging.getLogger("trilogue")
_WITH_HISTORY = "sqlite:///file.db, postgresql://… and kafka://… can"


class RabbitMQ:
    """The Broker behind amqp:// and amqps://."""

    features = frozenset(
        {Feature.ORDER, Feature.COMPETE, Feature.DEAD, Feature.PERSISTENT, Feature.SHARED, Feature.MACHINES}
    )  # fmt: skip
    durability: Durability = "os-crash"

    def __init__(self, options: Options) -> None:
        self.url = options.url
        self._options = options
        self._known: dict[str, Group] = {}
        self._direct: set[str] = set()
        self._consumers: dict[str, Consumer] = {}
        self._verifying: asyncio.Task[None] | None = None
        self._change: asyncio.Future[None] | None = None
        self._publisher: Publisher
        self._writing: Kept
        self._reading: Kept

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Connect twice and declare the exchanges."""
        self._publisher = Publisher(self._options)
        self._writing = Kept(self._options, "publishing", self._declare)
        self._reading = Kept(self._options, "receiving")
        try:
            await self._writing.open()
            await self._writing.keep(self._publisher)
            await self._reading.open()
        except BaseException:
            await self.close()
            raise

    async def absent(self) -> list[str]:
        """The URL if the exchange of events is not there yet; nothing is declared. Raises Unavailable."""
        link = await connect(self._options, "looking")
        try:
            return [] if await topology.has_exchange(link, self._options.events) else [self.url]
        finally:
            await link.fin()

    async def _declare(self, link: Link) -> None:
        await topology.declare_exchanges(link, self._options)

    async def close(self) -> None:
        """Confirm what was published, hand back what is out, let go."""
        await self.leave()
        await self._publisher.close()
        for kept in (self._writing, self._reading):
            if link := await kept.stop():
                await link.close()

    async def bind(self, groups: Sequence[Group], *, work: bool = True, cursors: Cursors | None = None) -> None:
        """Declare the queues of groups and bind their patterns; with `work`, begin to receive.

        cursors: not used, there are no positions; without it nobody stands beside the broker to keep failed records, so the
        queues of unordered groups get a dead letter queue.
        """
        for group in groups:
            if group.start == "beginning":
                raise Unsupported(
                    f"{self.url}: group {group.name!r} cannot start at the beginning: RabbitMQ keeps nothing for a group before "
                    f"its queue is there; {_WITH_HISTORY}"
                )
        link = await self._reading.current(self._options.connect_timeout_s)
        for group in groups:
            if not await topology.declare_group(link, self._options, group, is_direct=cursors is None):
                continue
            self._known[group.name] = group
            if cursors is None:
                self._direct.add(group.name)
            await self._consume(group, work=work)

    async def _consume(self, group: Group, *, work: bool) -> None:
        if consumer := self._consumers.get(group.name):
            consumer.group = group
        elif work:
            consumer = Consumer(self._options, group, self._changed, is_direct=group.name in self._direct)
            await self._reading.keep(consumer)
            self._consumers[group.name] = consumer
            if self._verifying is None:
                self._verifying = asyncio.create_task(self._verify())

    async def _verify(self) -> None:
        """Ask now and then whether the server still knows our consumers: a silent one would never be missed."""
        while True:
            await asyncio.sleep(VERIFY_S)
            for consumer in list(self._consumers.values()):
                try:
                    await consumer.verify()
                except Exception as error:  # the connection goes meanwhile: it is looked at again
                    log.debug("group %s: its consumer could not be looked at: %s", consumer.group.name, error)

    async def unbind(self, group: str) -> None:
        """Stop receiving for one group."""
        if consumer := self._consumers.pop(group, None):
            await self._reading.forget(consumer)
            await consumer.stop()

    async def leave(self) -> None:
        """Stop receiving: acknowledgements reach the server, then the connection ends without a word, which keeps the order."""
        if self._verifying:
            self._verifying.cancel()
            self._verifying = None
        consumers, self._consumers = list(self._consumers.values()), {}
        if not consumers:
            return
        for consumer in consumers:
            consumer.is_ending = True
            consumer.wake()
            await self._reading.forget(consumer)
        with contextlib.suppress(Unavailable):
            await asyncio.gather(*(consumer.settle() for consumer in consumers))
        if link := self._reading.link:
            await link.fin()

    # ── publish ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def publish(self, envelopes: Sequence[Envelope]) -> list[Receipt | LogError]:
        """Publish in order, persistent and confirmed, one outcome each."""
        made = [self._message(envelope) for envelope in envelopes]
        outcomes = iter(await self._publisher.publish([m for m in made if isinstance(m, Message)]))
        found: list[Receipt | LogError] = []
        for envelope, one in zip(envelopes, made, strict=True):
            error = next(outcomes) if isinstance(one, Message) else one
            found.append(Receipt(envelope.id, None, self.durability) if error is None else error)
        return found

    def _message(self, envelope: Envelope) -> Message | Rejected:
        try:
            check_envelope(envelope, self._options.payload_bytes)
            return message(envelope, self._options.events, envelope.type)
        except Rejected as error:
            return error

    # ── receive ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def receive(self, group: str, *, limit: int, wait_s: float) -> list[Delivery]:
        """The next deliveries of a group; at most `prefetch` are out and not acknowledged."""
        return await self._consumer(group).receive(limit, wait_s)

    async def acknowledge(self, group: str, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """These are finished; returns those whose channel is gone."""
        consumer = self._consumers.get(group)
        if consumer is None:
            return list(deliveries)
        lost = consumer.acknowledge(deliveries)
        self._changed()
        return lost

    async def release(self, group: str, deliveries: Sequence[Delivery]) -> None:
        """Hand back: in direct mode to the queue, which counts it as an attempt; otherwise to what waits here."""
        if consumer := self._consumers.get(group):
            consumer.release(deliveries)
            self._changed()

    async def dead_letter(self, group: str, delivery: Delivery, *, attempts: int, error: str, traceback: str) -> None:
        """Publish a copy that says why to the dead letter exchange, confirmed, then acknowledge. Raises LogError."""
        made = dead.letter(self._options, delivery, attempts=attempts, error=error, traceback=traceback)
        [outcome] = await self._publisher.publish([made])
        if outcome is not None:
            raise outcome
        await self.acknowledge(group, [delivery])

    def progress(self, group: str, deliveries: Sequence[Delivery]) -> list[Progress]:
        """There are no positions."""
        raise Unsupported(f"{self.url}: RabbitMQ has no positions to keep for group {group!r}; kafka://… has")

    async def pause(self, group: str) -> None:
        """Receive nothing of this group here."""
        self._consumer(group).is_paused = True

    async def resume(self, group: str) -> None:
        """Undo pause()."""
        consumer = self._consumer(group)
        consumer.is_paused = False
        consumer.wake()

    def _consumer(self, group: str) -> Consumer:
        if consumer := self._consumers.get(group):
            return consumer
        raise UnknownEvent(f"{self.url}: nothing is received here for group {group!r}; it receives for {sorted(self._consumers)}")

    # ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def seek(
        self, group: str, to: SeekTo, *, into: str | None = None, moved: Callable[[], Awaitable[None]] | None = None
    ) -> int:
        """There is no history."""
        raise Unsupported(f"{self.url}: group {group!r} cannot be set to {to}: RabbitMQ keeps no history; {_WITH_HISTORY}")

    async def drop_group(self, group: str) -> None:
        """Delete the queue of a group, and that of its dead letters."""
        await self.unbind(group)
        link = await self._link()
        is_gone = await topology.delete(link, self._options.queue(group))
        await topology.delete(link, self._options.dead_queue(group))
        self._known.pop(group, None)
        if not is_gone:
            raise UnknownEvent(f"{self.url} has no group {group!r}: there is no queue {self._options.queue(group)!r}")

    async def groups(self) -> list[str]:
        """The groups bound here: RabbitMQ tells of no others."""
        return sorted(self._known)

    async def lanes(self, group: str) -> list[LaneStatus]:
        """The queue of a group. What other processes have received and not acknowledged is not known here."""
        found = await topology.look(await self._link(), self._options.queue(group))
        if found is None:
            return []
        consumer = self._consumers.get(group)
        lane = LaneStatus(self._options.queue(group), found.ready, 0)
        return [consumer.status(found.ready) if consumer else lane]

    async def changed(self, wait_s: float) -> None:
        """Return when something was received or acknowledged here, at the latest after `wait_s`."""
        self._change = self._change or asyncio.get_running_loop().create_future()
        await asyncio.wait([self._change], timeout=wait_s)

    def _changed(self) -> None:
        if self._change is not None:
            self._change.set_result(None)
            self._change = None

    async def _link(self) -> Link:
        return await self._reading.current(self._options.connect_timeout_s)

    # ── dead letters ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def dead(self, group: str | None, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        """Dead letters of a group, or of all bound here, looked at and left where they are. position: when it died."""
        found: list[DeadLetter] = []
        for name in [group] if group else sorted(self._known):
            found += await dead.listed(self._options, name, after=after, limit=limit)
        return sorted(found, key=lambda letter: letter.record.position)[:limit]

    async def redrive(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Give dead letters back to their group alone, each confirmed before it goes."""
        return await dead.redriven(self._options, self._publisher, group, positions)

    async def drop_dead(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Forget dead letters."""
        return await dead.dropped(self._options, group, positions)

    # ── doctor ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def describe(self) -> dict[str, str]:
        """Server, queues, durability and limits in words."""
        o, link = self._options, await self._link()
        unrouted = await topology.look(link, o.unrouted)
        writing = self._writing.link
        version = str(link.server.get("version", "unknown"))
        is_run = version.startswith("3.10.")
        return {
            "server": f"RabbitMQ {version}" + ("" if is_run else " (proved with 3.10.8, not with this version)"),
            "cluster": str(link.server.get("cluster_name", "unknown")),
            "queue type": o.queue_type,
            "durability": _DURABILITY[o.queue_type],
            "order": "one active consumer a queue: the next takes over when it goes; lower ?prefetch= only while all are "
            "stopped, because a consumer that holds a part of what came back hands on out of order",
            "prefetch": f"{o.prefetch} deliveries a group; with large events the memory for them is {o.prefetch} times as much",
            "consumer timeout": "the server closes a channel with a delivery not acknowledged for 30 min (its default): "
            "with slow handlers lower ?prefetch=, or raise consumer_timeout there",
            "confirms": f"at most {o.window} on the way, {o.timeout_s:g} s each",
            "publishing": f"blocked: {writing.blocked}"
            if writing and writing.blocked
            else "open"
            if writing
            else "not connected",
            "unrouted": f"{unrouted.ready if unrouted else 0} events that no group wanted, in queue {o.unrouted!r}, which keeps "
            f"{topology.UNROUTED}",
            "restarts": str(self._writing.restarts + self._reading.restarts),
        }


_DURABILITY = {
    "quorum": "os-crash: confirmed once a majority of the queue's members has synced it; with one node that is its disk, with "
    "three it survives the loss of one",
    "classic": "os-crash: confirmed once synced on the one node that has the queue",
}


def open_broker(url: str) -> Broker:
    """The Broker of an amqp:// or amqps:// URL, not connected yet; raises BadOption."""
    return RabbitMQ(read(url))
