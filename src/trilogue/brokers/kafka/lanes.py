"""What of one group's partitions is here: received and waiting, lent, handed back, finished.

    thread   put ──▶ buffer ──▶ take ──▶ out ──▶ finish     loop
                        returned ◀── release ──┘
             drain, revoke: a partition goes             add: one comes

The thread that owns the consumer puts and revokes, the loop takes and finishes; one lock is between them.
"""

import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from trilogue.brokers.kafka.admin import Partition
from trilogue.brokers.kafka.lane import SPAN, Lane, Place
from trilogue.errors import LeaseLost, LogError
from trilogue.events import Delivery, Lease
from trilogue.ports import Progress


class LaneLease(Lease):
    """The right to acknowledge what came from one partition, while it is assigned to us.

    ending: the partition is about to go: what is being handled is finished, nothing more is begun.
    """

    __slots__ = ("ending", "lane")

    def __init__(self, lane: "Assigned", clock: Callable[[], int]) -> None:
        super().__init__(lane.partition, 0, 0, clock)
        self.lane, self.ending = lane, False

    @property
    def lost(self) -> bool:
        """Whether a handler must not start any more."""
        return self.ending or self.revoked or self.clock() > self.until_us

    @property
    def is_over(self) -> bool:
        """Whether nothing can be finished any more."""
        return self.revoked or self.clock() > self.until_us


class Assigned(Lane):
    """A partition that is ours.

    skip: offsets that were finished before it came. back: lent once and handed back. committed: what the last commit said.
    trouble: why it does not go on. moved_s: when something was finished.
    """

    __slots__ = ("back", "committed", "lease", "moved_s", "name", "partition", "skip", "topic", "trouble")

    def __init__(self, topic: str, partition: int, place: Place, clock: Callable[[], int]) -> None:
        super().__init__(place)
        self.topic, self.partition, self.name = topic, partition, lane_name(topic, partition)
        self.skip = frozenset(place.finished)
        self.lease = LaneLease(self, clock)
        self.back: set[int] = set()
        self.committed: Place | None = None
        self.trouble: LogError | None = None
        self.moved_s = time.monotonic()


# What waits: a delivery, or that a lane has nothing for us from one offset to below another.
Item = Delivery | tuple[Assigned, int, int]


def lane_name(topic: str, partition: int) -> str:
    """A partition as people write it."""
    return f"{topic}[{partition}]"


def lane_of(delivery: Delivery) -> Assigned:
    """The lane a delivery came from."""
    return delivery.lease.lane  # type: ignore[attr-defined, no-any-return]


class Lanes:
    """The partitions of one group that are ours."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._ours: dict[Partition, Assigned] = {}
        self._lock = threading.Condition()
        self._buffer: deque[Item] = deque()
        self._returned: list[Delivery] = []
        self._passed: list[tuple[Assigned, int]] = []

    def get(self, partition: Partition) -> Assigned | None:
        """A lane that is ours, None otherwise."""
        return self._ours.get(partition)

    def all(self) -> list[Assigned]:
        """The lanes that are ours."""
        with self._lock:
            return list(self._ours.values())

    def of(self, partitions: Iterable[Partition]) -> list[Assigned]:
        """Those of these that are ours."""
        return [lane for partition in partitions if (lane := self._ours.get(partition)) is not None]

    def taken_up(self, most: int) -> int:
        """How many records are here and not finished; `most` where what is finished would not fit a commit's metadata."""
        with self._lock:
            lanes = self._ours.values()
            if any(lane.span >= SPAN for lane in lanes):
                return most
            return len(self._buffer) + sum(len(lane.out) for lane in lanes)

    # ── lent and answered ────────────────────────────────────────────────────────────────────────────────────────────

    def put(self, items: Iterable[Item]) -> None:
        """What was received, in the order of each lane."""
        self._buffer.extend(items)

    def take(self, limit: int) -> list[Delivery]:
        """Lend deliveries: those handed back first, then what follows them. What was passed over before is finished by this."""
        taken: list[Delivery] = []
        with self._lock:
            self._finish_passed()
            while self._returned and len(taken) < limit:
                delivery = self._returned.pop(0)
                lane = lane_of(delivery)
                if not (lane.lease.revoked or lane.lease.ending):
                    lane.back.discard(delivery.record.position)
                    taken.append(delivery)
            self._take_fresh(taken, limit)
        return taken

    @property
    def has_passed(self) -> bool:
        """Whether something was passed over that the next take() finishes."""
        return bool(self._passed)

    def _finish_passed(self) -> None:
        passed, self._passed = self._passed, []
        for lane, offset in passed:
            if not lane.lease.revoked:
                lane.back.discard(offset)
                lane.finish(offset)

    def _take_fresh(self, taken: list[Delivery], limit: int) -> None:
        buffer = self._buffer
        while buffer and (len(taken) < limit or isinstance(buffer[0], tuple)):
            item = buffer.popleft()
            lane = item[0] if isinstance(item, tuple) else lane_of(item)
            # What is dropped here comes again elsewhere, so its lane must not get past it.
            if lane.lease.revoked or lane.lease.ending:
                continue
            if isinstance(item, tuple):
                self._pass_over(*item)
            else:
                lane.lend(item.record.position)
                taken.append(item)

    def _pass_over(self, lane: Assigned, first: int, end: int) -> None:
        """The first of them stands for all: out, so that the lane does not get past it, and back, as nobody works on it."""
        lane.lend(first)
        lane.back.add(first)
        lane.skip_to(end)
        self._passed.append((lane, first))

    def finish(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """These are finished; returns those whose lane is not ours any more."""
        lost, now = [], time.monotonic()
        with self._lock:
            for delivery in deliveries:
                if delivery.lease.revoked:
                    lost.append(delivery)
                    continue
                lane = lane_of(delivery)
                lane.finish(delivery.record.position)
                lane.moved_s = now
            self._lock.notify_all()
        return lost

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """They are lent again before what follows in their lane."""
        with self._lock:
            for delivery in deliveries:
                lane = lane_of(delivery)
                if not delivery.lease.revoked and delivery.record.position in lane.out:
                    lane.back.add(delivery.record.position)
                    insort(self._returned, delivery, key=_place_in_lane)
            self._lock.notify_all()

    def progress(self, deliveries: Sequence[Delivery]) -> list[Progress]:
        """Where the lanes of these will be once they are finished; raises LeaseLost."""
        by_lane: dict[Assigned, list[int]] = {}
        for delivery in deliveries:
            lane = lane_of(delivery)
            if lane.lease.is_over:
                raise LeaseLost(f"group {self._group!r}: {lane.name} belongs to another process now")
            by_lane.setdefault(lane, []).append(delivery.record.position)
        with self._lock:
            places = [(lane.name, lane.place_after(offsets)) for lane, offsets in by_lane.items()]
        return [Progress(name, place.next, place.finished) for name, place in places]

    def standing(self, partition: Partition) -> tuple[Place, int, float] | None:
        """Where a lane is, how many of it are out, when something of it was finished; None if it is not ours."""
        with self._lock:
            lane = self._ours.get(partition)
            return None if lane is None else (lane.place(), len(lane.out), lane.moved_s)

    # ── partitions come and go ───────────────────────────────────────────────────────────────────────────────────────

    def add(self, places: Mapping[Partition, Place], clock: Callable[[], int]) -> None:
        """Partitions that are ours from now on."""
        with self._lock:
            for partition, place in places.items():
                self._ours[partition] = Assigned(*partition, place, clock)

    def drain(self, lanes: Sequence[Assigned], limit_s: float, is_stopping: Callable[[], bool]) -> None:
        """Wait a little until what is out of these is finished, so that nobody does it a second time; lend nothing more."""
        until = time.monotonic() + limit_s
        with self._lock:
            for lane in lanes:
                lane.lease.ending = True
            while any(len(lane.out) > len(lane.back) for lane in lanes) and not is_stopping():
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return
                self._lock.wait(left_s)

    def revoke(self, lanes: Iterable[Assigned]) -> None:
        """Nothing of these can be finished any more."""
        with self._lock:
            for lane in lanes:
                lane.lease.revoked = True

    def forget(self, lanes: Sequence[Assigned]) -> None:
        """These are not ours any more."""
        self.revoke(lanes)
        with self._lock:
            for lane in lanes:
                if self._ours.get((lane.topic, lane.partition)) is lane:
                    del self._ours[lane.topic, lane.partition]

    def to_commit(self, lanes: Iterable[Assigned]) -> list[tuple[Assigned, Place]]:
        """Where those of these lanes are that have moved since their last commit."""
        with self._lock:
            places = [(lane, lane.place()) for lane in lanes]
        return [(lane, place) for lane, place in places if place != lane.committed]


def _place_in_lane(delivery: Delivery) -> tuple[str, int, int]:
    record = delivery.record
    return (record.topic or "", record.partition or 0, record.position)
