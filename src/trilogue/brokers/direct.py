"""A broker alone as a log (store=None): what it can do itself, and a refusal of everything else.

    receive ──▶ gate ──▶ claim ──▶ (handle) ──▶ settle     done    publish what it emits, confirmed, then acknowledge
                  ▲                               │        dead    the broker's dead letters, confirmed, then acknowledge
                  └──── in hand until due ◀───────┘        retry   where there are positions (Kafka), again from here: its key
                                                                   waits, and so does the lane's offset;
                                                                   else (RabbitMQ) given back, and the broker counts

A record that is tried again stays in this process's hands, so its waits are bounded (features.WAIT_IN_HAND_US); a handler's
retry= that waits longer is refused when the program starts.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic

from trilogue.brokers.received import Received, Work, status_of
from trilogue.brokers.refused import Refused, not_taken, plain
from trilogue.durations import readable
from trilogue.errors import LeaseLost, LogError, Rejected, StorageFull, Unavailable, UnknownEvent
from trilogue.events import Delivery, Durability, Envelope, Group, InTransaction, Receipt, Settlement
from trilogue.features import WAIT_IN_HAND_US, refusal
from trilogue.ports import ANY_VERSION, Broker, Db, DeadLetter, Feature, GroupStatus, SeekTo, Status

RECEIVE_RECORDS = 1_000
RECEIVE_WAIT_S = 60.0
BACKOFF_S = 1.0
BURIALS = 5
NOTHING_S = 0.01
COUNTED_DEAD = 1_000

log = logging.getLogger("trilogue")


class Direct(Refused):
    """A Store over a Broker alone."""

    def __init__(self, broker: Broker) -> None:
        self.url = broker.url
        self.durability: Durability = broker.durability
        self._broker = broker
        # Only where records have positions does one that is given back come again before what follows it.
        self._in_place = Feature.REPLAY in broker.features
        keeps = {Feature.COMPETE, Feature.DEAD, Feature.PERSISTENT, Feature.SHARED, Feature.MACHINES}
        self.features = broker.features & (keeps | ({Feature.ORDER, Feature.REPLAY} if self._in_place else set()))
        self._readings: dict[str, Received] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_open = False

    # ── open and close ───────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Connect."""
        if self._is_open:
            raise Unavailable(f"{self.url} is open already: one open log per App")
        await self._broker.open()
        self.durability = self._broker.durability
        self._is_open = True

    async def absent(self) -> list[str]:
        """The URL if nothing of ours is there yet; looked at before opening, which would make it."""
        return await self._broker.absent() if hasattr(self._broker, "absent") else []

    async def close(self) -> None:
        """Hand back what is out and let go."""
        if not self._is_open:
            return
        await self.leave()
        self._is_open = False
        await self._broker.close()

    def _opened(self) -> Broker:
        if not self._is_open:
            raise Unavailable(f"{self.url} is not open: use it inside `async with app:`")
        return self._broker

    async def describe(self) -> dict[str, str]:
        """The broker's own facts."""
        return await self._opened().describe()

    # ── publish ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def publish(self, envelopes: Sequence[Envelope]) -> list[Receipt | LogError]:
        """Publish in order, each with its own outcome."""
        broker = self._opened()
        refused = [not_taken(envelope) for envelope in envelopes]
        sent = iter(await broker.publish([envelope for envelope, error in zip(envelopes, refused, strict=True) if not error]))
        return [error or next(sent) for error in refused]

    async def append(self, envelopes: Sequence[Envelope], *, expected: tuple[str, int] | None = None) -> list[int]:
        """Publish; raises the first error if one of them was not stored. Returns offsets, 0 where there are none."""
        if expected is not None:
            version = "any version" if expected[1] == ANY_VERSION else f"version {expected[1]}"
            self.refuse(f"an event cannot be appended to stream {expected[0]!r} at {version}", Feature.EXPECTED)
        for error in filter(None, map(not_taken, envelopes)):
            raise error  # before anything is sent: what is sent cannot be taken back
        positions = []
        for outcome in await self.publish(envelopes):
            if isinstance(outcome, LogError):
                raise outcome
            positions.append(outcome.position or 0)
        return positions

    # ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def bind(self, groups: Sequence[Group], *, work: bool = True) -> None:
        """Declare groups; with `work`, begin to receive."""
        broker = self._opened()
        for group in groups:
            self._check(group)
        await broker.bind(groups, work=work)
        for group in groups if work else ():
            if group.name in self._readings:
                continue
            reading = self._readings[group.name] = Received(group)
            reading.pump = asyncio.create_task(self._receive(reading), name=f"trilogue receive {group.name}")

    def _check(self, group: Group) -> None:
        if group.ordered and Feature.ORDER not in self.features:
            self.refuse(f"group {group.name!r} keeps order per key", Feature.ORDER, "give its handler order=None")
        if group.has_effects:
            self.refuse(f"group {group.name!r} writes through `db`", Feature.EFFECTS)

    async def _receive(self, reading: Received) -> None:
        while True:
            while reading.gate.is_full:
                reading.room.clear()
                await reading.room.wait()
                await self._hand_over(reading)
            try:
                came = await self._broker.receive(reading.group.name, limit=RECEIVE_RECORDS, wait_s=RECEIVE_WAIT_S)
            except Exception as error:  # whatever it is: a group that ends in silence is worse than one that tries again
                reading.error = error if isinstance(error, LogError) else Unavailable(f"{type(error).__qualname__}: {error}")
                reading.wake()
                await asyncio.sleep(BACKOFF_S)
                continue
            await self._hand_over(reading)
            reading.admit(came)
            if not came:
                await asyncio.sleep(NOTHING_S)  # one that answers "nothing" at once must not stop the event loop

    async def _hand_over(self, reading: Received) -> None:
        """Hand back what waits here of lanes that are about to go: what is begun now would be handled elsewhere once more."""
        if going := reading.gate.drop_lost():
            await self._broker.release(reading.group.name, going)

    async def unbind(self, group: str) -> None:
        """Stop working for one group."""
        if group in self._readings:
            await self._stop(self._readings.pop(group))
        await self._opened().unbind(group)

    async def leave(self) -> None:
        """Stop working for all groups; what is out goes back."""
        for name in list(self._readings):
            await self._stop(self._readings.pop(name))
        for task in list(self._tasks):
            await task
        if self._is_open:
            await self._broker.leave()

    async def _stop(self, reading: Received) -> None:
        if reading.pump is not None:
            reading.pump.cancel()
            await asyncio.gather(reading.pump, return_exceptions=True)
        for _, due in reading.in_hand.values():
            due.cancel()
        reading.in_hand.clear()

    def _reading(self, group: str) -> Received:
        self._opened()
        if group not in self._readings:
            known = ", ".join(self._readings) or "none"
            raise UnknownEvent(f"this process does not work for group {group!r}; it works for {known}")
        return self._readings[group]

    async def claim(self, group: str, *, limit: int, wait_s: float) -> list[Delivery]:
        """Lend up to `limit` deliveries, waiting up to `wait_s` for the first."""
        reading = self._reading(group)
        until = monotonic() + wait_s
        while True:
            if reading.error is not None:
                error, reading.error = reading.error, None
                raise error
            taken = reading.gate.take(limit)
            if taken:
                reading.room.set()
                return taken
            reading.more.clear()
            left = until - monotonic()
            if left <= 0:
                return []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await reading.more.wait()

    # ── settle ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def settle(self, group: str, answers: Sequence[Settlement | InTransaction]) -> Awaitable[list[Delivery]]:
        """Answer deliveries; what is done and emits nothing frees its key at once."""
        reading = self._reading(group)
        work = Work()
        for answer in answers:
            for settlement in self._without_effects(answer) if isinstance(answer, InTransaction) else (answer,):
                self._sort(reading, work, settlement)
        return self._settled(reading, work)

    def _without_effects(self, answer: InTransaction) -> Sequence[Settlement]:
        """What an Effect that a handler returned comes to: there is nowhere to write it, however often it is tried."""
        error = refusal(self.url, "a handler returned an Effect", Feature.EFFECTS)
        answer.settlements = answer.failed(error)
        for settlement in answer.settlements:
            settlement.verdict = "dead"
        return answer.settlements

    def _sort(self, reading: Received, work: Work, settlement: Settlement) -> None:
        delivery = settlement.delivery
        if settlement.verdict == "dead" and settlement.park:
            self.refuse(f"group {reading.group.name!r} parks keys", Feature.PARK, "leave on_dead='park' out")
        if delivery.lease.revoked:
            work.lost.append(delivery)
            reading.over(delivery)
        elif settlement.verdict == "done" and not settlement.emits:
            work.done.append(delivery)
            reading.finished(delivery)
        elif settlement.verdict == "done":
            work.emitting.append(settlement)
        elif settlement.verdict == "release":
            work.back.append(delivery)
        elif settlement.verdict == "retry" and settlement.after_us <= WAIT_IN_HAND_US:
            work.again.append(settlement)
        else:
            work.dead.append(settlement if settlement.verdict == "dead" else self._too_late(reading, settlement))

    def _too_late(self, reading: Received, settlement: Settlement) -> Settlement:
        """A wait that nobody could know of before: Later("1h")."""
        wait = f"group {reading.group.name!r} is to handle a record again after {readable(settlement.after_us)}"
        told = refusal(self.url, wait, Feature.RETRY, f"wait {readable(WAIT_IN_HAND_US)} at most")
        return Settlement(settlement.delivery, "dead", error=f"{told} ({settlement.error})")

    async def _settled(self, reading: Received, work: Work) -> list[Delivery]:
        if work.emitting:
            async with reading.publishing if reading.group.ordered else contextlib.nullcontext():
                await self._publish(reading, work)
        for settlement in work.again:
            self._put_by(reading, settlement)
        for delivery in [each for each in work.back if not each.lease.lost or each.lease.revoked]:
            reading.back(delivery)
        if going := [each for each in work.back if each.lease.lost and not each.lease.revoked]:
            for delivery in going:  # their lanes are about to go
                reading.over(delivery)
            await self._broker.release(reading.group.name, going)
        if work.done:
            work.lost += await self._broker.acknowledge(reading.group.name, work.done)
        for settlement in work.dead:
            await self._bury(reading, work, settlement)
        return work.lost

    async def _publish(self, reading: Received, work: Work) -> None:
        """Publish what they emit, in order; those whose emits are all confirmed are done."""
        ready = [each for each in work.emitting if not reading.is_behind(each.delivery)]
        work.back += [each.delivery for each in work.emitting if reading.is_behind(each.delivery)]
        outcomes = iter(await self._outcomes([envelope for each in ready for envelope in each.emits]))
        for each in ready:
            errors = [outcome for outcome in [next(outcomes) for _ in each.emits] if isinstance(outcome, LogError)]
            if reading.is_behind(each.delivery):  # one of its key has just failed: it is handled again behind that
                work.back.append(each.delivery)
            elif not errors:
                work.done.append(each.delivery)
                reading.finished(each.delivery)
            elif isinstance(errors[0], Rejected) and not isinstance(errors[0], StorageFull):
                each.error = f"what its handler emits cannot be published: {errors[0]}"
                work.dead.append(each)
            else:
                self._once_more(reading, each.delivery, f"what its handler emits was not confirmed: {errors[0]}")

    async def _outcomes(self, envelopes: Sequence[Envelope]) -> Sequence[Receipt | LogError]:
        try:
            return await self.publish(envelopes)
        except Exception as error:  # whatever it is: deliveries that nobody settles would be out for ever
            return [Unavailable(f"{type(error).__qualname__}: {error}")] * len(envelopes)

    async def _bury(self, reading: Received, work: Work, settlement: Settlement) -> None:
        delivery, name = settlement.delivery, reading.group.name
        error, trace = plain(settlement.error), plain(settlement.traceback)
        why = ""
        for _ in range(BURIALS):
            try:
                await self._broker.dead_letter(name, delivery, attempts=delivery.attempt, error=error, traceback=trace)
            except LeaseLost:
                work.lost.append(delivery)
                reading.over(delivery)
                return
            except Exception as failure:  # whatever it is, as above
                why = str(failure)
                await asyncio.sleep(BACKOFF_S)
            else:
                reading.failed += 1
                reading.finished(delivery)
                return
        self._once_more(reading, delivery, f"it could not be put with the dead letters: {why}")

    # ── trying again ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _once_more(self, reading: Received, delivery: Delivery, why: str) -> None:
        """Handle it again soon, for no fault of its own."""
        log.warning("group %s: a record is handled again: %s", reading.group.name, why)
        self._put_by(reading, Settlement(delivery, "retry", round(BACKOFF_S * 1_000_000), charged=False))

    def _put_by(self, reading: Received, settlement: Settlement) -> None:
        """Keep a delivery in hand until it is due; its key waits."""
        delivery, loop = settlement.delivery, asyncio.get_running_loop()
        reading.failed += settlement.charged
        due = loop.call_later(settlement.after_us / 1_000_000, self._due, reading, delivery, settlement.charged)
        reading.put_by(delivery, due)

    def _due(self, reading: Received, delivery: Delivery, charged: bool) -> None:
        reading.take_up(delivery)
        if self._in_place or not charged or delivery.lease.revoked:
            delivery.attempt += charged
            reading.back(delivery)
            return
        reading.remember(delivery)
        task = asyncio.create_task(self._give_back(reading, delivery))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _give_back(self, reading: Received, delivery: Delivery) -> None:
        with contextlib.suppress(LogError):  # a connection that is gone has handed it back itself
            await self._broker.release(reading.group.name, [delivery])
        reading.over(delivery)

    # ── groups, dead letters ─────────────────────────────────────────────────────────────────────────────────────────

    async def seek(
        self,
        group: str,
        to: SeekTo,
        *,
        into: str | None = None,
        emits: bool = False,
        reset: Callable[[Db], None] | None = None,
    ) -> int:
        """Set a group, or a new one, to start again."""
        broker = self._opened()
        if Feature.REPLAY not in self.features:
            self.refuse(f"group {group!r} cannot be set back", Feature.REPLAY)
        if reset is not None:
            self.refuse(f"group {group!r} has tables to reset", Feature.EFFECTS)
        if into is None and not emits:
            what = f"what the handlers of group {group!r} publish while it reads again cannot be kept back"
            self.refuse(what, Feature.RETRY, "say that it may be published again (emits=True, --emits)")
        return await broker.seek(group, to, into=into)

    async def drop_group(self, group: str) -> None:
        """Forget a group and what waits for it."""
        broker = self._opened()
        if group in self._readings:
            await self._stop(self._readings.pop(group))
        await broker.drop_group(group)

    async def dead(self, group: str | None, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        """Dead letters the broker keeps."""
        if group is not None:
            await self._check_known(group)
        return await self._opened().dead(group, after=after, limit=limit)

    async def redrive(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Give dead letters back to their group."""
        await self._check_known(group)
        return await self._opened().redrive(group, positions)

    async def drop_dead(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Forget dead letters."""
        await self._check_known(group)
        return await self._opened().drop_dead(group, positions)

    async def _check_known(self, group: str) -> None:
        """Raise UnknownEvent for a name that is a slip, where the broker can list its groups; the others look by themselves."""
        names = await self._opened().groups() if self._in_place else [group]
        if group not in names:
            raise UnknownEvent(f"there is no group {group!r} on {self.url}; there are {', '.join(names) or 'none yet'}")

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def orphans(self, app: str, names: Sequence[str]) -> list[str]:
        """None that could be told: a broker does not know which program a group belongs to."""
        self._opened()
        return []

    async def idle(self, names: Sequence[str]) -> bool:
        """Whether nothing waits for these groups at the broker, and nothing of them is out here."""
        broker = self._opened()
        if any(name in self._readings and not self._readings[name].gate.is_idle for name in names):
            return False
        lanes = [lane for name in names for lane in await broker.lanes(name)]
        return not any(lane.lag or lane.in_flight for lane in lanes)

    async def changed(self, wait_s: float) -> None:
        """Return when something may have changed, at the latest after `wait_s`."""
        await self._opened().changed(wait_s)

    async def status(self) -> Status:
        """The groups the broker tells of. Their dead letters are counted up to 1,000 each; there is no one head."""
        broker = self._opened()
        names = sorted({*await broker.groups(), *self._readings})
        groups = []
        for name in names:
            with contextlib.suppress(UnknownEvent):  # gone since it was listed
                groups.append(await self._group_status(broker, name))
        return Status(self.url, 0, 0, {}, 0, 0, groups)

    @property
    def lists_groups(self) -> bool:
        """Whether the broker tells of groups that nobody here has named: RabbitMQ does not."""
        return self._in_place

    async def group(self, name: str) -> GroupStatus:
        """One group, bound here or not; raises UnknownEvent."""
        broker = self._opened()
        await self._check_known(name)
        if not await broker.lanes(name):
            raise UnknownEvent(f"there is no group {name!r} on {self.url}")
        return await self._group_status(broker, name)

    async def _group_status(self, broker: Broker, name: str) -> GroupStatus:
        dead = 0
        with contextlib.suppress(UnknownEvent):  # a group of a program with a store beside the broker keeps none here
            dead = len(await broker.dead(name, limit=COUNTED_DEAD))
        return status_of(name, self._readings.get(name), await broker.lanes(name), dead)
