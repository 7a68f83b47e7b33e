"""A broker in memory, for development and with faults on purpose: lanes move, connections break, confirms get lost.

FakeServer  lanes [[record, …], …]   groups: what is acknowledged, who owns which lane      shared by several clients
FakeBroker  ports.Broker on it       positions=True: as Kafka (offsets, places, seek); False: as RabbitMQ
"""

import asyncio
import contextlib
import functools
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trilogue.errors import LeaseLost, LogError, OutcomeUnknown, Unavailable, UnknownEvent, Unsupported
from trilogue.events import Delivery, Durability, Envelope, Group, Lease, Receipt, Record, now_us
from trilogue.patterns import matches_any
from trilogue.ports import Cursors, DeadLetter, Feature, LaneStatus, Progress, SeekTo

QUEUE = frozenset({Feature.ORDER, Feature.COMPETE, Feature.DEAD, Feature.PERSISTENT, Feature.SHARED, Feature.MACHINES})


@dataclass
class Lane:
    """How far a group is in one lane: what is acknowledged, up to where it was sent to its owner, and under which lease."""

    number: int
    acked: set[int] = field(default_factory=set)
    out: set[int] = field(default_factory=set)
    start: int = 0
    sent: int = 0
    epoch: int = 0
    owner: "FakeBroker | None" = None
    lease: Lease | None = None


@functools.lru_cache
def _matches(patterns: tuple[str, ...], type: str) -> bool:
    return matches_any(patterns, type)


class FakeServer:
    """What all clients share. trouble: what becomes of the next publishes: "unknown" (stored, not confirmed), "unavailable"."""

    def __init__(self, lanes: int = 2, *, positions: bool = True) -> None:
        self.positions = positions
        self.log: list[list[Record]] = [[] for _ in range(lanes)]
        self.groups: dict[str, tuple[Group, list[Lane]]] = {}
        self.members: dict[str, list[FakeBroker]] = {}
        self.trouble: list[str] = []
        self.blocked = False
        self.news = asyncio.Event()
        self.published = 0
        self._epoch = 0

    def changed(self) -> None:
        """Wake everybody who waits for something."""
        self.news.set()
        self.news = asyncio.Event()

    def store(self, envelope: Envelope) -> Record:
        """Put an envelope on its lane."""
        self.published += 1
        number = self.published % len(self.log) if envelope.key is None else zlib.crc32(envelope.key.encode()) % len(self.log)
        lane = self.log[number]
        values = {name: getattr(envelope, name) for name in Envelope.__struct_fields__}
        topic, partition = ("events", number) if self.positions else (None, None)
        record = Record(**values, position=len(lane), recorded_us=now_us(), topic=topic, partition=partition)
        lane.append(record)
        self.changed()
        return record

    def lanes(self, group: str) -> list[Lane]:
        """The lanes of a group; raises UnknownEvent."""
        if group not in self.groups:
            raise UnknownEvent(f"there is no group {group!r}")
        return self.groups[group][1]

    def wanted(self, group: str, lane: Lane) -> list[Record]:
        """Records of a lane that a group reads and has not acknowledged."""
        found = self.log[lane.number][lane.start :]
        return [record for record in found if record.position not in lane.acked and self.reads(group, record)]

    def reads(self, group: str, record: Record) -> bool:
        """Whether a group reads records of this type."""
        return _matches(self.groups[group][0].patterns, record.type)

    async def balance(self, group: str) -> None:
        """Share the lanes among the members; a lane that moves is revoked."""
        members = self.members.get(group, [])
        for n, lane in enumerate(self.lanes(group)):
            owner = members[n % len(members)] if members else None
            if owner is not lane.owner:
                await self.give(group, lane, owner)

    async def give(self, group: str, lane: Lane, owner: "FakeBroker | None") -> None:
        """A new assignment of a lane: what is not acknowledged is sent again."""
        if lane.lease is not None:
            lane.lease.revoked = True
        lane.owner, lane.lease = owner, None
        if owner is not None:
            self._epoch += 1
            epoch = self._epoch
            lane.epoch = epoch
            if owner.cursors is not None and self.groups[group][0].has_effects and self.positions:
                progress = await owner.cursors.assigned(group, f"events[{lane.number}]")
                if progress is not None:
                    lane.acked |= set(range(lane.start, progress.next)) | set(progress.finished)
            if lane.epoch == epoch:  # it was not given to somebody else meanwhile
                lane.sent, lane.out = lane.start, set()
                lane.lease = Lease(lane.number, epoch, 1 << 62, lambda: 0)
        self.changed()


class FakeBroker:
    """ports.Broker on a FakeServer; a client of its own for each process. most: how many may be out and not acknowledged."""

    def __init__(self, server: FakeServer, *, most: int = 2_000) -> None:
        self.server = server
        self.url = "fake://broker"
        self.durability: Durability = "memory"
        self.features = QUEUE | {Feature.REPLAY} if server.positions else QUEUE
        self.most = most
        self.cursors: Cursors | None = None
        self.is_open = False
        self.acknowledgements = 0
        self._paused: set[str] = set()
        self._mine: set[str] = set()

    async def open(self) -> None:
        self.is_open = True

    async def close(self) -> None:
        await self.leave()
        self.is_open = False

    async def bind(self, groups: Sequence[Group], *, work: bool = True, cursors: Cursors | None = None) -> None:
        self.cursors = cursors or self.cursors
        for group in groups:
            if group.name not in self.server.groups:
                lanes = [Lane(n, start=len(log) if group.start == "now" else 0) for n, log in enumerate(self.server.log)]
                self.server.groups[group.name] = (group, lanes)
            if work and self not in self.server.members.setdefault(group.name, []):
                self.server.members[group.name].append(self)
                self._mine.add(group.name)
                await self.server.balance(group.name)

    async def unbind(self, group: str) -> None:
        if group in self._mine:
            self._mine.discard(group)
            self.server.members[group].remove(self)
            if group in self.server.groups:
                await self.server.balance(group)

    async def leave(self) -> None:
        for group in list(self._mine):
            await self.unbind(group)

    async def reconnect(self) -> None:
        """The connection breaks and comes back: every lane is assigned anew, what was not acknowledged comes again."""
        for group in self._mine:
            for lane in self.server.lanes(group):
                if lane.owner is self:
                    await self.server.give(group, lane, self)

    async def publish(self, envelopes: Sequence[Envelope]) -> list[Receipt | LogError]:
        if not self.is_open:
            raise Unavailable("the fake broker is not open")
        await asyncio.sleep(0)
        outcomes: list[Receipt | LogError] = []
        for envelope in envelopes:
            trouble = self.server.trouble.pop(0) if self.server.trouble else "unavailable" if self.server.blocked else ""
            if trouble == "unavailable":
                outcomes.append(Unavailable("the broker is not reached"))
                continue
            record = self.server.store(envelope)
            position = record.position if self.server.positions else None
            receipt = Receipt(envelope.id, position, "memory", None, record.topic, record.partition)
            outcomes.append(OutcomeUnknown("the confirm was lost") if trouble == "unknown" else receipt)
        return outcomes

    async def receive(self, group: str, *, limit: int, wait_s: float) -> list[Delivery]:
        until = asyncio.get_running_loop().time() + wait_s
        while True:
            found = [] if group in self._paused else self._next(group, limit)
            left_s = until - asyncio.get_running_loop().time()
            if found or left_s <= 0:
                return found
            news = self.server.news
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await news.wait()

    def _next(self, group: str, limit: int) -> list[Delivery]:
        found: list[Delivery] = []
        for lane in self._lanes(group):
            assert lane.lease is not None
            log = self.server.log[lane.number]
            while len(found) < limit and len(lane.out) < self.most and lane.sent < len(log):
                record = log[lane.sent]
                lane.sent += 1
                if record.position not in lane.acked and self.server.reads(group, record):
                    lane.out.add(record.position)
                    found.append(Delivery(record, group, lane.lease))
        return found

    def _lanes(self, group: str) -> list[Lane]:
        known = self.server.groups.get(group)
        return [] if known is None else [lane for lane in known[1] if lane.owner is self and lane.lease is not None]

    async def acknowledge(self, group: str, deliveries: Sequence[Delivery]) -> list[Delivery]:
        await asyncio.sleep(0)
        lost = []
        for delivery in deliveries:
            lane = next((each for each in self._lanes(group) if each.lease is delivery.lease), None)
            if lane is None or delivery.lease.revoked:
                lost.append(delivery)
            else:
                lane.acked.add(delivery.record.position)
                lane.out.discard(delivery.record.position)
                self.acknowledgements += 1
        self.server.changed()
        return lost

    async def release(self, group: str, deliveries: Sequence[Delivery]) -> None:
        for lane in self._lanes(group):
            if any(delivery.lease is lane.lease for delivery in deliveries):
                await self.server.give(group, lane, self)

    async def dead_letter(self, group: str, delivery: Delivery, *, attempts: int, error: str, traceback: str) -> None:
        raise Unsupported("no dead letters here")

    def progress(self, group: str, deliveries: Sequence[Delivery]) -> list[Progress]:
        if not self.server.positions:
            raise Unsupported("no positions here")
        found = []
        for lane in self._lanes(group):
            done = {delivery.record.position for delivery in deliveries if delivery.lease is lane.lease}
            if done:
                acked = lane.acked | done
                first = lane.start
                while first in acked:
                    first += 1
                found.append(Progress(f"events[{lane.number}]", first, tuple(sorted(n for n in acked if n > first))))
        if any(delivery.lease.revoked for delivery in deliveries):
            raise LeaseLost("a lane is gone")
        return found

    async def seek(
        self, group: str, to: SeekTo, *, into: str | None = None, moved: Callable[[], Awaitable[None]] | None = None
    ) -> int:
        if to.end is None:
            raise Unsupported("only beginning and now here")
        if into is not None:
            known = self.server.groups[group][0]
            self.server.groups[into] = (known, [Lane(n) for n in range(len(self.server.log))])
            return 0
        if any(lane.owner not in (None, self) for lane in self.server.lanes(group)):
            raise Unsupported("it has members elsewhere")
        for lane in self.server.lanes(group):
            lane.acked.clear()
            lane.start = 0 if to.end == "beginning" else len(self.server.log[lane.number])
        if moved is not None:
            await moved()
        for lane in self.server.lanes(group):
            await self.server.give(group, lane, lane.owner)
        return 0

    async def pause(self, group: str) -> None:
        self._paused.add(group)

    async def resume(self, group: str) -> None:
        self._paused.discard(group)
        self.server.changed()

    async def drop_group(self, group: str) -> None:
        for lane in self.server.lanes(group):
            await self.server.give(group, lane, None)
        del self.server.groups[group]

    async def dead(self, group: str | None, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        return []

    async def redrive(self, group: str, positions: Sequence[int] | None = None) -> int:
        return 0

    async def drop_dead(self, group: str, positions: Sequence[int] | None = None) -> int:
        return 0

    async def groups(self) -> list[str]:
        return sorted(self.server.groups)

    async def lanes(self, group: str) -> list[LaneStatus]:
        found = []
        for lane in self.server.lanes(group):
            name = f"events[{lane.number}]" if self.server.positions else ""
            wanted = self.server.wanted(group, lane)
            first = wanted[0].position if wanted else len(self.server.log[lane.number])
            place = first if self.server.positions else None
            found.append(LaneStatus(name, len(wanted), len(lane.out) if lane.owner is self else 0, next=place))
        return found

    async def changed(self, wait_s: float) -> None:
        news = self.server.news
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await news.wait()

    async def describe(self) -> dict[str, str]:
        return {"server": "fake"}


def paired(server: FakeServer, store: Any, **options: Any) -> Any:
    """A Paired log of a new client and this store."""
    from trilogue.brokers.paired import Paired

    return Paired(FakeBroker(server, **options), store)
