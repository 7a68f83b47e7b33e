"""One group of this process: a consumer, the thread that owns it, and what of its partitions is out.

    thread   poll, consume ──▶ lanes.put          loop   receive ──▶ lanes.take
             commit every 0.2 s ◀── lane.place          acknowledge ──▶ lanes.finish
             a partition comes: where does the group go on?
             a partition goes: wait a little for what is out, revoke it, commit
             a partition is lost: revoke, commit nothing

Every call of the consumer is made by its thread, because librdkafka lets them wait for each other. What both sides touch is in
lanes.py.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from trilogue.brokers.kafka.admin import GONE, NOT_ALLOWED, Partition, quiet
from trilogue.brokers.kafka.lane import Place, decoded, encoded
from trilogue.brokers.kafka.lanes import Assigned, Item, Lanes, lane_name
from trilogue.brokers.kafka.settings import Settings
from trilogue.errors import LogError, OutOfRange, Unavailable
from trilogue.events import Delivery, Group, Record
from trilogue.patterns import matches_any
from trilogue.ports import Cursors, Progress

POLL_S = 0.1
COMMIT_S = 0.2
BATCH = 1_000
FULL_S = 0.05  # one record this often while there is no room: a paused partition would be silent for a second afterwards
SPILL = 200  # so many of those; then it is paused after all
ASK_S = 10.0
BACKOFF_S = 1.0
LEAVE_S = 5.0
GOODBYE_S = 0.25
CLOSE_S = 10.0

log = logging.getLogger("trilogue")


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
        self._lanes = Lanes(group.name)
        self.standing = self._lanes.standing
        self._settings, self._read, self._changed = settings, read, changed
        self._cursors = cursors if group.has_effects else None
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._room = threading.Event()
        self._stopping = threading.Event()
        self._trouble: LogError | None = None
        # A server that does not answer yet, as after a crash, is asked again by who joins anew, before our session is over.
        self._ask_s = min(ASK_S, settings.session_s / 2)
        self._turned_s = time.monotonic()
        self._subscribed: list[str] = []
        self._halted = False
        self._ending = False
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
            if self._ending:  # who receives hands back what waits there of partitions that are about to go
                self._ending = False
                return []
            if (taken := self._lanes.take(0 if self.paused else limit)) or self._lanes.has_passed:
                return taken
            self._raise_trouble()
            left_s = until - time.monotonic()
            if left_s <= 0 or self._stopping.is_set():
                return []
            # Not wait_for(), here and elsewhere: in Python 3.11 it swallows a cancellation that comes together with the wake-up,
            # and who was cancelled would go on for ever.
            try:
                async with asyncio.timeout(left_s):
                    await self._arrived.wait()
            except TimeoutError:
                return []

    def _raise_trouble(self) -> None:
        for trouble in (self._trouble, *(lane.trouble for lane in self._lanes.all())):
            if trouble is not None:
                raise trouble

    def acknowledge(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """These are finished; those whose lane was lost."""
        lost = self._lanes.finish(deliveries)
        self._room.set()
        self._changed()
        return lost

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """They come again before what follows in their lane."""
        self._lanes.release(deliveries)
        self._arrived.set()

    def progress(self, deliveries: Sequence[Delivery]) -> list[Progress]:
        """Where the lanes of these will be once they are finished; raises LeaseLost."""
        return self._lanes.progress(deliveries)

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
        self._lanes.forget(self._lanes.all())

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
        self._trouble = None
        try:
            while not self._stopping.is_set():
                self._turn(consumer)
            self._leave(consumer)
        finally:
            # Closing calls back, and then there must be nothing left to commit: it may be lost already.
            self._lanes.forget(self._lanes.all())
            consumer.close()

    def _leave(self, consumer: Consumer) -> None:
        """Commit, and say good-bye.

        While others join or leave, commits are refused; polling lets that come to its end, and tells if partitions go meanwhile.
        """
        self._lanes.revoke(self._lanes.all())
        until = time.monotonic() + min(LEAVE_S, self._settings.session_s)
        while not self._commit(consumer, self._lanes.all(), wait=True) and time.monotonic() < until:
            consumer.poll(POLL_S)
        # Closing at once can swallow the good-bye of a member that is just joining: the others would wait for its session to end.
        consumer.unsubscribe()
        until = time.monotonic() + GOODBYE_S
        while time.monotonic() < until:
            consumer.poll(GOODBYE_S / 5)

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
            self._commit(consumer, self._lanes.all(), wait=False)

    def _subscribe(self, consumer: Consumer) -> None:
        if self._subscribed:
            consumer.subscribe(self._subscribed, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
        else:
            consumer.unsubscribe()

    def _poll(self, consumer: Consumer) -> list[Message]:
        room = self._settings.in_flight - self._lanes.taken_up(self._settings.in_flight)
        if room <= 0:
            return self._poll_full(consumer, -room)
        if self._halted:
            self._halted = False
            consumer.resume(consumer.assignment())
        message = consumer.poll(POLL_S)
        if message is None:
            return []
        if room == 1:
            return [message]
        partition = (message.topic() or "", message.partition() or 0)
        lane = self._lanes.get(partition)
        more = consumer.consume(min(room, BATCH) - 1, 0)
        # That calls back: its partition may have gone, and come again from its committed place. Then so does the message.
        return [message, *more] if self._lanes.get(partition) is lane else more

    def _poll_full(self, consumer: Consumer, beyond: int) -> list[Message]:
        self._room.clear()
        self._room.wait(FULL_S)
        if beyond >= SPILL and not self._halted:
            self._halted = True
            consumer.pause(consumer.assignment())
        message = consumer.poll(0)
        return [] if message is None else [message]

    def _deliver(self, consumer: Consumer, messages: list[Message]) -> None:
        items: list[Item] = []
        passed: dict[Assigned, tuple[Assigned, int, int]] = {}
        name, lane_at, wants, read = self.group.name, self._lanes.get, self._wants, self._read
        for message in messages:
            error = message.error()
            if error is not None:
                self._failed(consumer, message, error)
                continue
            lane = lane_at((message.topic(), message.partition()))  # type: ignore[arg-type]
            if lane is None:
                continue
            record = read(message)
            if not wants(record.type) or (lane.skip and record.position in lane.skip):
                first = passed[lane][1] if lane in passed else record.position
                passed[lane] = lane, first, record.position + 1
                continue
            if lane in passed:
                items.append(passed.pop(lane))
            items.append(Delivery(record, name, lane.lease))
        if items or passed:
            self._trouble = None
            self._lanes.put(items)
            self._lanes.put(passed.values())
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
        lane = self._lanes.get((message.topic() or "", message.partition() or 0))
        if lane is None:
            return
        first, end = consumer.get_watermark_offsets(TopicPartition(lane.topic, lane.partition), timeout=self._ask_s)
        lane.trouble = OutOfRange(
            f"group {self.group.name!r} goes on at offset {lane.next} of {lane.name}, which is not there any more: the "
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
        self._lanes.add(places, self._overdue)
        consumer.incremental_assign([TopicPartition(*partition, place.next) for partition, place in places.items()])
        self._turned_s = time.monotonic()

    def _overdue(self) -> int:
        """The clock of our leases: above 0 once the thread stood still for longer than the broker waits for us."""
        return 1 if time.monotonic() - self._turned_s > self._settings.session_s else 0

    def _places(self, consumer: Consumer, partitions: list[TopicPartition]) -> dict[Partition, Place]:
        kept = self._kept([(each.topic, each.partition) for each in partitions])
        found: dict[Partition, Place] = {}
        for each in consumer.committed(partitions, timeout=self._ask_s) if partitions else ():
            partition = (each.topic, each.partition)
            if each.error is not None:
                raise KafkaException(each.error)
            if (progress := kept.get(lane_name(*partition))) is not None:
                found[partition] = Place(progress.next, tuple(progress.finished))
            elif each.offset >= 0:
                found[partition] = decoded(each.offset, each.metadata)
            else:
                # The group began before this partition was there: everything in it is new to it.
                found[partition] = Place(consumer.get_watermark_offsets(TopicPartition(*partition), timeout=self._ask_s)[0])
        return found

    def _kept(self, partitions: Sequence[Partition]) -> dict[str, Progress]:
        """Where a store says the group goes on."""
        cursors = self._cursors
        if cursors is None:
            return {}

        async def ask() -> dict[str, Progress]:
            names = [lane_name(*partition) for partition in partitions]
            # Together, so that the store writes them in one transaction: the broker waits no longer than a session.
            answers = await asyncio.gather(*(cursors.assigned(self.group.name, name) for name in names))
            return {name: answer for name, answer in zip(names, answers, strict=True) if answer is not None}

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(self._ask_s)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        lanes = self._lanes.of((each.topic, each.partition) for each in partitions)
        self._ending = any(lane.out for lane in lanes)
        self._call(self._wake)
        self._lanes.drain(lanes, min(self._settings.drain_s, self._settings.session_s / 3), self._stopping.is_set)
        # Revoked first: what is acknowledged after the commit was made up would be told finished, and come again.
        self._lanes.revoke(lanes)
        self._commit(consumer, lanes, wait=True)
        self._lanes.forget(lanes)
        consumer.incremental_unassign(partitions)
        self._turned_s = time.monotonic()

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._lanes.forget(self._lanes.of((each.topic, each.partition) for each in partitions))
        consumer.incremental_unassign(partitions)

    # ── commits ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _commit(self, consumer: Consumer, lanes: list[Assigned], *, wait: bool) -> bool:
        """Commit where lanes have moved to; False if it was refused, and then it is made again with the next one."""
        offsets = []
        for lane, place in self._lanes.to_commit(lanes):
            lane.committed = place
            offsets.append(TopicPartition(lane.topic, lane.partition, place.next, encoded(place)))
        if not offsets:
            return True
        try:
            done = consumer.commit(offsets=offsets, asynchronous=not wait)  # type: ignore[call-overload]
        except KafkaException as error:
            self._committed(error.args[0], offsets)
            return False
        return not any(each.error is not None for each in done or ())

    def _committed(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        """What came of a commit; one that failed, as they do during a rebalance, is made again."""
        for each in offsets:
            lane = self._lanes.get((each.topic, each.partition))
            if lane is not None and (error is not None or each.error is not None):
                lane.committed = None


def _sentence(error: Exception) -> str:
    if isinstance(error, KafkaException):
        return str(error.args[0].str())
    return str(error) or type(error).__name__
