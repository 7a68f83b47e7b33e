"""One group of this process: a consumer, the thread that owns it, and what of its partitions is out.

    thread   poll, consume ──▶ Deliveries ──▶ buffer          loop   receive ──▶ lane.lend
             commit every 0.2 s ◀── lane.place                       acknowledge ──▶ lane.finish
             a partition comes: where does the group go on?
             a partition goes: wait a little for what is out, commit, let go
             a partition is lost: revoke, commit nothing

Every call of the consumer is made by its thread, because librdkafka lets them wait for each other. What both sides touch, the
lanes, is behind one lock.
"""

import asyncio
import logging
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from trilogue.brokers.kafka.admin import GONE, NOT_ALLOWED, Partition, quiet
from trilogue.brokers.kafka.lane import SPAN, Lane, Place, decoded, encoded
from trilogue.brokers.kafka.settings import Settings
from trilogue.errors import LeaseLost, LogError, OutOfRange, Unavailable
from trilogue.events import Delivery, Group, Lease, Record
from trilogue.patterns import matches_any
from trilogue.ports import Cursors, Progress

POLL_S = 0.1
COMMIT_S = 0.2
BATCH = 1_000
FULL_S = 0.05  # one record this often while there is no room: a paused partition would be silent for a second afterwards
SPILL = 200  # so many of those; then it is paused after all
ASK_S = 10.0
BACKOFF_S = 1.0
CLOSE_S = 10.0

log = logging.getLogger("trilogue")


class LaneLease(Lease):
    """The right to acknowledge what came from one partition, while it is assigned to us."""

    __slots__ = ("lane",)

    def __init__(self, lane: "Assigned", epoch: int, clock: Callable[[], int]) -> None:
        super().__init__(lane.partition, epoch, 0, clock)
        self.lane = lane


class Assigned:
    """A partition that is ours. skip: offsets that were finished before it came. back: lent once and handed back."""

    __slots__ = ("back", "committed", "draining", "lane", "lease", "moved_s", "name", "partition", "skip", "topic", "trouble")

    def __init__(self, topic: str, partition: int, place: Place, epoch: int, clock: Callable[[], int]) -> None:
        self.topic, self.partition, self.name = topic, partition, lane_name(topic, partition)
        self.lane = Lane(place)
        self.skip = frozenset(place.finished)
        self.lease = LaneLease(self, epoch, clock)
        self.committed: Place | None = None
        self.back: set[int] = set()
        self.draining = False
        self.trouble: LogError | None = None
        self.moved_s = time.monotonic()


def lane_name(topic: str, partition: int) -> str:
    """A partition as people write it."""
    return f"{topic}[{partition}]"


class Member:
    """Receives for one group. topics: full names. changed: called on the loop when something was received or acknowledged."""

    def __init__(
        self,
        group: Group,
        settings: Settings,
        topics: Collection[str],
        read: Callable[[Message], Record],
        changed: Callable[[], None],
        cursors: Cursors | None,
    ) -> None:
        self.group, self.topics, self.paused = group, sorted(topics), False
        self.lanes: dict[Partition, Assigned] = {}
        self._settings, self._read, self._changed = settings, read, changed
        self._cursors = cursors if group.has_effects else None
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Condition()
        self._buffer: deque[Delivery | tuple[Assigned, int]] = deque()
        self._returned: list[Delivery] = []
        self._arrived = asyncio.Event()
        self._room = threading.Event()
        self._stopping = threading.Event()
        self._trouble: LogError | None = None
        self._turned_s = time.monotonic()
        self._subscribed: list[str] = []
        self._halted = False
        self._broken: Exception | None = None
        self._commit_at_s = 0.0
        self._wants = lru_cache(maxsize=4_096)(lambda event_type: matches_any(group.patterns, event_type))
        self._thread = threading.Thread(target=self._run, name=f"trilogue kafka {group.name}", daemon=True)
        self._thread.start()

    # ── on the loop ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        """The next deliveries, in the order of their lanes; raises what keeps the group from going on."""
        until = time.monotonic() + wait_s
        while True:
            self._arrived.clear()
            if not self.paused and (taken := self._take(limit)):
                return taken
            self._raise_trouble()
            left_s = until - time.monotonic()
            if left_s <= 0 or self._stopping.is_set():
                return []
            try:
                await asyncio.wait_for(self._arrived.wait(), left_s)
            except TimeoutError:
                return []

    def _raise_trouble(self) -> None:
        for trouble in (self._trouble, *(each.trouble for each in list(self.lanes.values()))):
            if trouble is not None:
                raise trouble

    def _take(self, limit: int) -> list[Delivery]:
        taken: list[Delivery] = []
        with self._lock:
            while self._returned and len(taken) < limit:
                delivery = self._returned.pop(0)
                lane = _lane(delivery)
                if not delivery.lease.revoked and not lane.draining:
                    lane.back.discard(delivery.record.position)
                    taken.append(delivery)
            self._take_fresh(taken, limit)
        return taken

    def _take_fresh(self, taken: list[Delivery], limit: int) -> None:
        buffer = self._buffer
        while buffer and len(taken) < limit:
            item = buffer.popleft()
            if isinstance(item, tuple):
                item[0].lane.skip_to(item[1])
                continue
            lease = item.lease
            lane = lease.lane  # type: ignore[attr-defined]
            if lease.revoked or lane.draining:
                continue
            lane.lane.lend(item.record.position)
            taken.append(item)

    def acknowledge(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """These are finished; those whose lane was lost."""
        lost, now = [], time.monotonic()
        with self._lock:
            for delivery in deliveries:
                lease = delivery.lease
                if lease.revoked:
                    lost.append(delivery)
                    continue
                lane = lease.lane  # type: ignore[attr-defined]
                lane.lane.finish(delivery.record.position)
                lane.moved_s = now
            self._lock.notify_all()
        self._room.set()
        self._changed()
        return lost

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """They come again before what follows in their lane."""
        with self._lock:
            for delivery in deliveries:
                lane = _lane(delivery)
                if delivery.lease.revoked or delivery.record.position not in lane.lane.out:
                    continue
                lane.back.add(delivery.record.position)
                insort(self._returned, delivery, key=_place_in_lane)
            self._lock.notify_all()
        self._arrived.set()

    def progress(self, deliveries: Sequence[Delivery]) -> list[Progress]:
        """Where the lanes of these will be once they are finished; raises LeaseLost."""
        by_lane: dict[Assigned, list[int]] = {}
        for delivery in deliveries:
            if delivery.lease.lost:
                raise LeaseLost(f"group {self.group.name!r}: {_lane(delivery).name} belongs to another process now")
            by_lane.setdefault(_lane(delivery), []).append(delivery.record.position)
        with self._lock:
            places = [(lane, lane.lane.place_after(offsets)) for lane, offsets in by_lane.items()]
        return [Progress(lane.name, place.next, place.finished) for lane, place in places]

    def place(self, partition: Partition) -> tuple[Place, int, float] | None:
        """Where a lane is, how many of it are out here, and since when none was acknowledged; None if it is not ours."""
        lane = self.lanes.get(partition)
        if lane is None:
            return None
        with self._lock:
            return lane.lane.place(), len(lane.lane.out), lane.moved_s

    def subscribe(self, topics: Collection[str]) -> None:
        """Read these topics from now on."""
        self.topics = sorted(topics)

    def resume(self) -> None:
        """Receive again."""
        self.paused = False
        self._arrived.set()

    async def stop(self) -> None:
        """Commit what is finished, let go of everything, leave the group; bounded."""
        self._stopping.set()
        self._room.set()
        self._arrived.set()
        await asyncio.to_thread(self._thread.join, CLOSE_S)
        if self._thread.is_alive():
            log.warning(
                "group %s: leaving takes longer than %.0f s; its partitions move when its session ends", self.group.name, CLOSE_S
            )
        self._revoke(list(self.lanes.values()))

    # ── the thread ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._consume()
            except Exception as error:  # whatever it is: a group that ends in silence is worse than one that tries again
                if self._stopping.is_set():
                    return
                log.warning("group %s: %s; joining again in %.0f s", self.group.name, _sentence(error), BACKOFF_S)
                self._stopping.wait(BACKOFF_S)

    def _consume(self) -> None:
        consumer = Consumer(
            self._settings.consumer(self._settings.prefix + self.group.name) | {"on_commit": self._committed}, logger=quiet
        )
        self._turned_s, self._subscribed, self._broken, self._halted = time.monotonic(), [], None, False
        try:
            while not self._stopping.is_set():
                self._turn(consumer)
            self._let_go(consumer, list(self.lanes.values()))
        finally:
            # Closing calls back, and then there must be nothing left to wait for, or to commit after a failure.
            self._revoke(list(self.lanes.values()))
            consumer.close()

    def _turn(self, consumer: Consumer) -> None:
        now = time.monotonic()
        if now - self._turned_s > self._settings.session_s:
            raise Unavailable(f"stood still for {now - self._turned_s:.1f} s, longer than the session lasts")
        self._turned_s = now
        if self._broken is not None:
            raise self._broken
        if self._subscribed != self.topics:
            self._subscribed = list(self.topics)
            self._subscribe(consumer)
        self._deliver(consumer, self._poll(consumer))
        if now >= self._commit_at_s:
            self._commit_at_s = now + COMMIT_S
            self._commit(consumer, list(self.lanes.values()), wait=False)

    def _subscribe(self, consumer: Consumer) -> None:
        if self._subscribed:
            consumer.subscribe(self._subscribed, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
        else:
            consumer.unsubscribe()

    def _poll(self, consumer: Consumer) -> list[Message]:
        room = self._settings.in_flight - self._taken_up()
        if room <= 0:
            return self._poll_full(consumer, -room)
        if self._halted:
            self._halted = False
            consumer.resume(consumer.assignment())
        message = consumer.poll(POLL_S)
        if message is None:
            return []
        return [message, *consumer.consume(min(room, BATCH) - 1, 0)] if room > 1 else [message]

    def _taken_up(self) -> int:
        """How much of what may be in flight is; all of it where finished offsets would not fit a commit's metadata any more."""
        with self._lock:
            lanes = list(self.lanes.values())
            if any(lane.lane.span >= SPAN for lane in lanes):
                return self._settings.in_flight
            return len(self._buffer) + sum(len(lane.lane.out) for lane in lanes)

    def _poll_full(self, consumer: Consumer, beyond: int) -> list[Message]:
        self._room.clear()
        self._room.wait(FULL_S)
        if beyond >= SPILL and not self._halted:
            self._halted = True
            consumer.pause(consumer.assignment())
        message = consumer.poll(0)
        return [] if message is None else [message]

    def _deliver(self, consumer: Consumer, messages: list[Message]) -> None:
        items: list[Delivery | tuple[Assigned, int]] = []
        passed: dict[Assigned, int] = {}
        name, lanes, wants, read = self.group.name, self.lanes, self._wants, self._read
        for message in messages:
            error = message.error()
            if error is not None:
                self._failed(consumer, message, error)
                continue
            lane = lanes.get((message.topic(), message.partition()))  # type: ignore[arg-type]
            if lane is None:
                continue
            record = read(message)
            if not wants(record.type) or (lane.skip and record.position in lane.skip):
                passed[lane] = record.position + 1
                continue
            if passed:
                passed.pop(lane, None)
            items.append(Delivery(record, name, lane.lease))
        if items or passed:
            self._buffer.extend(items)
            self._buffer.extend(passed.items())
            self._call(self._wake)

    def _wake(self) -> None:
        self._arrived.set()
        self._changed()

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop was closed without us
            self._stopping.set()

    # ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────

    def _failed(self, consumer: Consumer, message: Message, error: KafkaError) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            self._out_of_range(consumer, message)
        elif error.code() in NOT_ALLOWED:
            self._trouble = Unavailable(
                f"{self._settings.shown}: group {self.group.name!r}: {error.str()}: ask for the permission"
            )
            self._call(self._wake)
        elif error.code() in GONE:
            log.warning("group %s: topic %s is not there any more; waiting for it to come back", self.group.name, message.topic())
        elif error.fatal() or error.code() == KafkaError._MAX_POLL_EXCEEDED:
            raise KafkaException(error)
        else:
            log.warning("group %s: %s", self.group.name, error.str())

    def _out_of_range(self, consumer: Consumer, message: Message) -> None:
        lane = self.lanes.get((message.topic() or "", message.partition() or 0))
        if lane is None:
            return
        first, end = consumer.get_watermark_offsets(TopicPartition(lane.topic, lane.partition), timeout=ASK_S)
        lane.trouble = OutOfRange(
            f"group {self.group.name!r} goes on at offset {lane.lane.next} of {lane.name}, which is not there any more: the "
            f"topic holds {first} to {end - 1}. Choose: `trilogue replay {self.group.name} --to beginning` handles what is left, "
            "`--to now` leaves it out; ?reset=earliest or ?reset=latest in the URL chooses for every group and every time"
        )
        self._call(self._wake)

    # ── partitions come and go ───────────────────────────────────────────────────────────────────────────────────────

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        try:
            places = self._places(consumer, partitions)
        except Exception as error:  # raised by the next turn: out of a callback it would not arrive
            self._broken = error
            return
        with self._lock:
            for partition, place in places.items():
                self.lanes[partition] = Assigned(*partition, place, _next_epoch(), self._overdue)
        consumer.incremental_assign([TopicPartition(*partition, place.next) for partition, place in places.items()])
        self._turned_s = time.monotonic()

    def _overdue(self) -> int:
        """The clock of our leases: above 0 once the thread stood still for longer than the broker waits for us."""
        return 1 if time.monotonic() - self._turned_s > self._settings.session_s else 0

    def _places(self, consumer: Consumer, partitions: list[TopicPartition]) -> dict[Partition, Place]:
        kept = self._kept([(each.topic, each.partition) for each in partitions])
        found: dict[Partition, Place] = {}
        for each in consumer.committed(partitions, timeout=ASK_S) if partitions else ():
            partition = (each.topic, each.partition)
            if each.error is not None:
                raise KafkaException(each.error)
            if (progress := kept.get(lane_name(*partition))) is not None:
                found[partition] = Place(progress.next, tuple(progress.finished))
            elif each.offset >= 0:
                found[partition] = decoded(each.offset, each.metadata)
            else:
                # The group began before this partition was there: everything in it is new to it.
                found[partition] = Place(consumer.get_watermark_offsets(TopicPartition(*partition), timeout=ASK_S)[0])
        return found

    def _kept(self, partitions: Sequence[Partition]) -> dict[str, Progress]:
        """Where a store says the group goes on."""
        cursors = self._cursors
        if cursors is None:
            return {}

        async def ask() -> dict[str, Progress]:
            epoch = _next_epoch()
            names = [lane_name(*partition) for partition in partitions]
            answers = [await cursors.assigned(self.group.name, name, epoch) for name in names]
            return {name: answer for name, answer in zip(names, answers, strict=True) if answer is not None}

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(min(ASK_S, self._settings.session_s))

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        lanes = self._of(partitions)
        self._drain(lanes)
        self._let_go(consumer, lanes)
        consumer.incremental_unassign(partitions)
        self._turned_s = time.monotonic()

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._revoke(self._of(partitions))
        consumer.incremental_unassign(partitions)

    def _of(self, partitions: Iterable[TopicPartition]) -> list[Assigned]:
        found = [self.lanes.get((each.topic, each.partition)) for each in partitions]
        return [lane for lane in found if lane is not None]

    def _drain(self, lanes: list[Assigned]) -> None:
        """Wait a little until what is out of these is finished, so that nobody does it a second time."""
        until = time.monotonic() + min(self._settings.drain_s, self._settings.session_s / 3)
        with self._lock:
            for lane in lanes:
                lane.draining = True
            while any(len(lane.lane.out) > len(lane.back) for lane in lanes):
                left_s = until - time.monotonic()
                if left_s <= 0 or self._stopping.is_set():
                    return
                self._lock.wait(left_s)

    def _let_go(self, consumer: Consumer, lanes: list[Assigned]) -> None:
        """Revoked first: what is acknowledged after the commit was made up would be told finished, and come again."""
        self._revoke(lanes)
        self._commit(consumer, lanes, wait=True)

    def _revoke(self, lanes: Iterable[Assigned]) -> None:
        with self._lock:
            for lane in lanes:
                lane.lease.revoked = True
                self.lanes.pop((lane.topic, lane.partition), None)

    # ── commits ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _commit(self, consumer: Consumer, lanes: list[Assigned], *, wait: bool) -> None:
        offsets = []
        for lane in lanes:
            with self._lock:
                place = lane.lane.place()
            if place != lane.committed:
                lane.committed = place
                offsets.append(TopicPartition(lane.topic, lane.partition, place.next, encoded(place)))
        if not offsets:
            return
        try:
            consumer.commit(offsets=offsets, asynchronous=not wait)  # type: ignore[call-overload]
        except KafkaException as error:
            self._committed(error.args[0], offsets)

    def _committed(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        """A commit that failed, as they do during a rebalance, is made again with the next one."""
        for each in offsets:
            lane = self.lanes.get((each.topic, each.partition))
            if lane is not None and (error is not None or each.error is not None):
                lane.committed = None


def _lane(delivery: Delivery) -> Assigned:
    return delivery.lease.lane  # type: ignore[attr-defined, no-any-return]


def _place_in_lane(delivery: Delivery) -> tuple[str, int, int]:
    record = delivery.record
    return (record.topic or "", record.partition or 0, record.position)


class _Epoch:
    """The newest epoch given out here."""

    last = 0


def _next_epoch() -> int:
    # The wall clock, so that it nearly always grows across processes, too; the store makes sure.
    _Epoch.last = max(_Epoch.last + 1, time.time_ns() // 1_000)
    return _Epoch.last


def _sentence(error: Exception) -> str:
    if isinstance(error, KafkaException):
        return str(error.args[0].str())
    return str(error) or type(error).__name__
