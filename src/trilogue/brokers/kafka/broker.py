"""The port: what a paired or direct log asks of Kafka, put together from the pieces beside this file."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import ClassVar

from confluent_kafka import libversion

from trilogue.brokers.kafka import lane, places, topics
from trilogue.brokers.kafka.admin import Admin, Partition
from trilogue.brokers.kafka.catalog import Catalog, Topic
from trilogue.brokers.kafka.dead import DeadLetters
from trilogue.brokers.kafka.lanes import lane_name
from trilogue.brokers.kafka.member import Member
from trilogue.brokers.kafka.producer import Letter, Outcome, Producer
from trilogue.brokers.kafka.settings import read
from trilogue.brokers.kafka.wire import headers_of, reader
from trilogue.errors import BadOption, DecodeError, LogError, Rejected, Unavailable, UnknownEvent, Unsupported
from trilogue.events import Delivery, Durability, Envelope, Group, Receipt, named_topics
from trilogue.ports import Cursors, DeadLetter, Feature, LaneStatus, Progress, SeekTo

LOOK_S = 5.0
FLUSH_S = 10.0
TYPES = 10_000

log = logging.getLogger("trilogue")


class Kafka:
    """A Broker on a Kafka cluster."""

    features: ClassVar[frozenset[Feature]] = frozenset(
        {Feature.ORDER, Feature.COMPETE, Feature.DEAD, Feature.REPLAY, Feature.PERSISTENT, Feature.SHARED, Feature.MACHINES}
    )

    def __init__(self, url: str) -> None:
        self._settings = read(url)
        self.url = self._settings.shown
        self.durability: Durability = "process-crash"
        self._groups: dict[str, Group] = {}
        self._members: dict[str, Member] = {}
        self._cursors: Cursors | None = None
        self._by_type: dict[str, Topic] = {}
        self._doubted: set[str] = set()
        self._seen: dict[tuple[str, Partition], tuple[lane.Place, float]] = {}
        self._version = 0
        self._change = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._warned: set[str] = set()
        self._is_open = False

    # ── open and close ───────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Connect; raises Unavailable, at once for a wrong password, after connect_timeout_s for an absent server."""
        if self._is_open:
            raise Unavailable(f"{self.url} is open already: one open log per App")
        self._admin = Admin(self._settings)
        brokers = await self._admin.reach()
        if self._settings.replication is not None and self._settings.replication > brokers:
            raise Unsupported(
                f"{self.url}: replication={self._settings.replication} needs as many brokers, and there are {brokers}"
            )
        self._catalog = Catalog(self._settings, self._admin)
        await self._catalog.refresh()
        self.durability = await self._expected_durability()
        self._read = reader(self._settings.prefix, self._undecodable)
        self._producer = Producer(self._settings, self._gone)
        self._dead = DeadLetters(self._settings, self._admin, self._catalog, self._producer, self._read)
        self._is_open = True

    async def _expected_durability(self) -> Durability:
        """Of topics we make: what a Receipt says is of its own topic."""
        cluster = await self._admin.cluster()
        replicas = self._settings.replication or int(cluster["default.replication.factor"])
        return "replicated" if replicas > 1 and int(cluster["min.insync.replicas"]) > 1 else "process-crash"

    async def close(self) -> None:
        """Leave all groups, wait a little for what is on its way, let go."""
        if not self._is_open:
            return
        self._is_open = False
        await self.leave()
        left = await self._producer.close(FLUSH_S)
        if left:
            log.warning("%s: closed with %d events unconfirmed: they may or may not be stored", self.url, left)

    def _undecodable(self, topic: str, error: DecodeError) -> None:
        if topic not in self._warned and len(self._warned) < TYPES:
            self._warned.add(topic)
            log.warning("topic %s: a message was read as plain data (said once): %s", topic, error)

    # ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def bind(self, groups: Sequence[Group], *, work: bool = True, cursors: Cursors | None = None) -> None:
        """Declare groups, and with `work` join them; a new group's place is fixed when this returns.

        cursors: where the places of groups with effects are. Raises BadOption for a topic with another number of partitions.
        """
        await self._catalog.ensure({name for group in groups for name in topics.needed(group.patterns, named_topics())})
        await self._catalog.refresh()
        await asyncio.gather(*(self._declare(group) for group in groups))
        self._groups |= {group.name: group for group in groups}
        self._cursors = cursors
        if not work:
            return
        for group in groups:
            if group.name not in self._members:
                self._join(group)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="trilogue kafka topics")

    async def _declare(self, group: Group) -> None:
        await places.declare(self._admin, self._settings, group, self._catalog.partitions(self._topics_of(group)))

    def _topics_of(self, group: Group) -> Collection[str]:
        """The topics a group reads, of those that are there."""
        declared, there = named_topics(), self._catalog.there
        wanted = topics.needed(group.patterns, declared) | topics.also(group.patterns, declared, there)
        return {name for name in (*wanted, topics.redrive_topic(group.name)) if name in there}

    def _full(self, names: Collection[str]) -> list[str]:
        return [self._settings.prefix + name for name in names]

    def _join(self, group: Group) -> None:
        self._members[group.name] = Member(
            group, self._settings, self._full(self._topics_of(group)), self._read, self._changed, self._cursors
        )

    async def _look(self) -> None:
        """Topics come up elsewhere, too: who subscribes to them hears of it within seconds."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._catalog.refresh()
                self._subscribe()
            except LogError as error:
                log.warning("%s: looking for new topics failed, trying again in %.0f s: %s", self.url, LOOK_S, error)

    def _subscribe(self) -> None:
        if self._version != self._catalog.version:
            self._version = self._catalog.version
            self._by_type.clear()
            for name, member in self._members.items():
                member.subscribe(self._full(self._topics_of(self._groups[name])))

    async def unbind(self, group: str) -> None:
        """Leave one group."""
        self._groups.pop(group, None)
        member = self._members.pop(group, None)
        if member is not None:
            await member.stop()

    async def leave(self) -> None:
        """Leave all groups, with a commit of what is finished; what is out comes again."""
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
            self._looking = None
        members, self._members = list(self._members.values()), {}
        await asyncio.gather(*(member.stop() for member in members))

    # ── publish ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def publish(self, envelopes: Sequence[Envelope]) -> list[Receipt | LogError]:
        """Publish in order, one outcome each; a missing topic is made first."""
        try:
            wrong = await self._find_topics({envelope.type for envelope in envelopes})
        except LogError as error:
            return [error for _ in envelopes]
        letters: list[Letter] = []
        refused: dict[int, Rejected] = {}
        most, by_type = self._settings.max_bytes, self._by_type
        for n, envelope in enumerate(envelopes):
            if len(envelope.data) > most or envelope.type in wrong:
                refused[n] = self._refusal(envelope, wrong)
                continue
            key = envelope.key
            letters.append(
                (by_type[envelope.type].name, None if key is None else key.encode(), envelope.data, headers_of(envelope))
            )
        outcomes = await self._producer.send(letters)
        if not refused:
            return [self._receipt(envelope, outcome) for envelope, outcome in zip(envelopes, outcomes, strict=True)]
        sent = iter(outcomes)
        return [refused[n] if n in refused else self._receipt(each, next(sent)) for n, each in enumerate(envelopes)]

    def _refusal(self, envelope: Envelope, wrong: Mapping[str, BadOption]) -> Rejected:
        if envelope.type in wrong:
            return Rejected(f"event {envelope.type!r}: {wrong[envelope.type]}")
        return Rejected(
            f"event {envelope.type!r} has {len(envelope.data):,} bytes, and {self.url} takes {self._settings.max_bytes:,}: "
            "raise max_bytes="
        )

    async def _find_topics(self, types: Collection[str]) -> dict[str, BadOption]:
        """Learn the topics of types, made where they are missing; returns why some types can have none."""
        by_type = self._by_type
        unknown = [each for each in types if each not in by_type]
        if not unknown:
            return {}
        declared = named_topics()
        names, _ = _topics_of(unknown, declared)
        with contextlib.suppress(BadOption):  # of one of them: told below
            await self._catalog.ensure(set(names.values()))
        if self._doubted:
            doubted, self._doubted = self._doubted, set()
            await self._producer.look_again(doubted)
        self._subscribe()
        if len(by_type) > TYPES:
            by_type.clear()
        # Of all of them: while the topics were made, others may have been found to be gone.
        names, wrong = _topics_of([each for each in types if each not in by_type], declared)
        for each, name in names.items():
            try:
                by_type[each] = self._catalog.checked(name)
            except BadOption as error:
                wrong[each] = error
        return wrong

    def _receipt(self, envelope: Envelope, outcome: Outcome) -> Receipt | LogError:
        if isinstance(outcome, LogError):
            return outcome
        topic = self._by_type.get(envelope.type)
        durability = self.durability if topic is None else topic.durability
        name = None if topic is None else topic.name
        return Receipt(envelope.id, outcome[1], durability, None, name, outcome[0])

    def _gone(self, full_names: Collection[str]) -> None:
        """Topics may be deleted: who publishes next looks."""
        for name in full_names:
            self._catalog.forget(name)
        self._doubted |= set(full_names)
        self._by_type.clear()

    # ── receive ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _member(self, group: str) -> Member:
        member = self._members.get(group)
        if member is None:
            raise UnknownEvent(f"{self.url}: group {group!r} is not bound here")
        return member

    async def receive(self, group: str, *, limit: int, wait_s: float) -> list[Delivery]:
        """The next deliveries, in the order of their lanes; raises OutOfRange where offsets are gone."""
        return await self._member(group).receive(limit, wait_s)

    async def acknowledge(self, group: str, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """These are finished; committed within 0.2 s. Returns those whose lane was lost."""
        member = self._members.get(group)
        return list(deliveries) if member is None else member.acknowledge(deliveries)

    async def release(self, group: str, deliveries: Sequence[Delivery]) -> None:
        """They come again, before what follows them."""
        if (member := self._members.get(group)) is not None:
            member.release(deliveries)

    def progress(self, group: str, deliveries: Sequence[Delivery]) -> list[Progress]:
        """Where the lanes will be once these are finished; raises LeaseLost."""
        return self._member(group).progress(deliveries)

    async def pause(self, group: str) -> None:
        """Receive nothing of this group here; it stays a member."""
        self._member(group).paused = True

    async def resume(self, group: str) -> None:
        """Undo pause()."""
        self._member(group).resume()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def changed(self, wait_s: float) -> None:
        """Return when something was received or acknowledged here, at the latest after `wait_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._change.wait()

    # ── dead letters ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def dead_letter(self, group: str, delivery: Delivery, *, attempts: int, error: str, traceback: str) -> None:
        """Write it to GROUP.dead, confirmed; then acknowledge it."""
        await self._dead.add(delivery, attempts, error, traceback)
        await self.acknowledge(group, [delivery])

    async def dead(self, group: str | None, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        """Dead letters of a group or of all; positions are those of the group's dead-letter topic, from 1."""
        return await self._dead.listed(group, after, limit)

    async def redrive(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Give letters back through GROUP.redrive, which nobody else reads; its members see a new one within seconds."""
        count = await self._dead.redrive(group, positions)
        self._subscribe()
        return count

    async def drop_dead(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Forget dead letters."""
        return await self._dead.drop(group, positions)

    # ── operations ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def seek(
        self, group: str, to: SeekTo, *, into: str | None = None, moved: Callable[[], Awaitable[None]] | None = None
    ) -> int:
        """Set a group whose members are all in this process, or a new one; the offset where it reads one partition, else 0.

        moved: awaited once it is set, before its members join again. Raises Unsupported, UnknownEvent.
        """
        partitions = await self._partitions_of(group)
        offsets = await places.offsets_for(self._admin, self._settings, partitions, to)
        if into is not None:
            if await self._admin.committed(self._settings.prefix + into, partitions):
                raise Unsupported(f"group {into!r} exists already: replay into a name that is new")
            await places.move(self._admin, self._settings, into, offsets)
        else:
            await self._move(group, offsets, moved or _nothing)
        return next(iter(offsets.values())) if len(offsets) == 1 else 0

    async def _move(self, group: str, offsets: dict[Partition, int], moved: Callable[[], Awaitable[None]]) -> None:
        member = self._members.get(group)
        if member is None:
            await places.move(self._admin, self._settings, group, offsets)
            await moved()
            return
        await member.stop()
        try:
            await places.move(self._admin, self._settings, group, offsets)
            await moved()
        finally:
            if self._members.get(group) is member:
                self._join(self._groups[group])
                self._members[group].paused = member.paused

    async def _partitions_of(self, group: str) -> list[Partition]:
        await self._catalog.refresh()
        bound = self._groups.get(group)
        found = self._catalog.partitions(self._topics_of(bound)) if bound is not None else []
        found = found or sorted(
            await self._admin.committed(self._settings.prefix + group, self._catalog.partitions(self._catalog.there))
        )
        if not found:
            raise UnknownEvent(f"{self.url}: there is no group {group!r}: `trilogue groups list` shows those there are")
        return found

    async def drop_group(self, group: str) -> None:
        """Forget a group, its dead letters and what waits to be redriven."""
        await self.unbind(group)
        group_id = self._settings.prefix + group
        if not await self._admin.delete_group(group_id):
            members = await self._admin.members(group_id)
            if members:
                raise Unsupported(f"{self.url}: group {group!r} has {members} members in other processes: stop them first")
            raise UnknownEvent(f"{self.url}: there is no group {group!r}: `trilogue groups list` shows those there are")
        await self._catalog.refresh()
        own = (topics.dead_topic(group), topics.redrive_topic(group))
        await self._admin.delete(self._full([name for name in own if name in self._catalog.there]))

    async def groups(self) -> list[str]:
        """The groups with our prefix, ours or not, and those bound here."""
        found = {group_id.removeprefix(self._settings.prefix) for group_id in await self._admin.groups()}
        return sorted(found | self._groups.keys())

    async def lanes(self, group: str) -> list[LaneStatus]:
        """How far a group is in each partition it reads. in_flight: of those that are ours.

        stalled_s: of those that are not, since it was first seen here that nothing moved.
        """
        partitions, member = await self._partitions_of(group), self._members.get(group)
        here = {each: standing for each in partitions if member is not None and (standing := member.standing(each))}
        elsewhere = [each for each in partitions if each not in here]
        ends, first, committed = await asyncio.gather(
            self._admin.ends(partitions),
            self._admin.beginnings(elsewhere),
            self._admin.committed(self._settings.prefix + group, elsewhere),
        )
        found, now = [], time.monotonic()
        for each in partitions:
            place, in_flight, moved_s = here.get(each) or self._elsewhere(
                group, each, committed.get(each, lane.Place(first.get(each, 0))), now
            )
            left = lane.lag(place, ends[each])
            found.append(LaneStatus(lane_name(*each), left, in_flight, now - moved_s if left else 0.0, place.next))
        return found

    def _elsewhere(self, group: str, partition: Partition, place: lane.Place, now: float) -> tuple[lane.Place, int, float]:
        """Where another process is, and since when, as far as it was looked at from here."""
        seen, since = self._seen.get((group, partition), (None, now))
        if seen != place:
            self._seen[group, partition] = place, now
            since = now
        return place, 0, since

    async def describe(self) -> dict[str, str]:
        """The cluster, how records are kept, and what durability follows."""
        cluster = await self._admin.cluster()
        replicas = str(self._settings.replication or cluster["default.replication.factor"])
        why = (
            f"{replicas} replicas of which {cluster['min.insync.replicas']} must have it: survives the loss of a machine"
            if self.durability == "replicated"
            else f"{replicas} replica(s), {cluster['min.insync.replicas']} in sync: survives a kill of the broker, not a power "
            "loss: Kafka does not sync its files before it confirms"
        )
        return {
            "server": f"Kafka {cluster['version']}",
            "cluster": cluster["cluster"],
            "brokers": cluster["brokers"],
            "replication": replicas,
            "min.insync.replicas": cluster["min.insync.replicas"],
            "durability": f"{self.durability}: {why}",
            "protocol": self._settings.protocol,
            "client": f"librdkafka {libversion()[0]}",
        }


async def _nothing() -> None: ...


def _topics_of(types: Collection[str], declared: Mapping[str, str]) -> tuple[dict[str, str], dict[str, BadOption]]:
    """The names of their topics, and what is wrong with those that Kafka does not allow."""
    names: dict[str, str] = {}
    wrong: dict[str, BadOption] = {}
    for each in types:
        try:
            names[each] = topics.topic_of(each, declared)
        except BadOption as error:
            wrong[each] = error
    return names, wrong
