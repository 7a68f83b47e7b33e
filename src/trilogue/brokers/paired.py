"""A broker with a store beside it as one log: the same program, only the URL changes.

    publish ───────────────▶ BROKER ──▶ reader.py ──▶ handlers ──▶ acknowledge
                               ▲            │ failed, effects
    append(expected=), timers  │ relay      ▼
    transact, emits with db ─▶ STORE's log, held rows, states, places, tables ──▶ projections

A record that goes well costs the store nothing. What aggregates, timers and settlements write is on the store's log, from where
one ordered group, `trilogue.relay`, puts it on the broker. Groups that are moved by the transaction that writes them (`start`
"existing": projections) read the store's log; all others read the broker.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence

from trilogue.brokers.beside import Beside
from trilogue.brokers.reader import Reader
from trilogue.errors import LogError, Rejected, TrilogueError, Unavailable, UnknownEvent, Unsupported
from trilogue.events import Delivery, Envelope, Group, Receipt, Record
from trilogue.outcomes import Answer
from trilogue.patterns import matches_any
from trilogue.ports import (
    Broker,
    Db,
    Feature,
    GroupStatus,
    InboxStore,
    LaneStatus,
    Progress,
    Query,
    SeekTo,
    Status,
)
from trilogue.relay import RELAY, Relay
from trilogue.stores.append import check_envelope

# What was published to the broker is not on the store's log: it cannot be read there, and an id is not looked up.
ON_THE_STORES_LOG = frozenset({Feature.HISTORY, Feature.DEDUP, Feature.PROJECTIONS})
LOOK_S = 0.05
BACKOFF_S = 1.0

log = logging.getLogger("trilogue")


class Paired(Beside):
    """ports.Store over a Broker and a Store."""

    def __init__(self, broker: Broker, store: InboxStore) -> None:
        self.broker, self.store = broker, store
        self.url = broker.url
        self.durability = broker.durability
        self.features = store.features - ON_THE_STORES_LOG - ({Feature.REPLAY} - broker.features)
        self._readers: dict[str, Reader] = {}
        self._epochs: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._tasks: list[asyncio.Task[None]] = []
        self._folding: list[Group] = []
        self._told: set[str] = set()
        self._turns = 0
        self._is_open = False

    # ── open and close ───────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Connect to both."""
        await self.store.open()
        try:
            await self.broker.open()
        except BaseException:
            await self.store.close()
            raise
        self.durability = self.broker.durability  # told by the server
        self._is_open = True

    async def absent(self) -> list[str]:
        """Which of the two, by URL, has nothing of ours yet; looked at before opening, which would make it."""
        return [url for part in (self.broker, self.store) if hasattr(part, "absent") for url in await part.absent()]

    async def close(self) -> None:
        """Let go of both; what was in flight is handed back."""
        self._is_open = False
        await self._stop()
        try:
            await self.broker.close()
        finally:
            await self.store.close()

    async def bind(self, groups: Sequence[Group], *, work: bool = True) -> None:
        """Declare groups; with `work`, receive and relay."""
        ours = [group for group in groups if group.start == "existing"]
        if ours:
            await self.store.bind(ours, work=work)
            self._folding += ours
        received = [dataclasses.replace(group, inbox=True) for group in groups if group.start != "existing"]
        if Feature.REPLAY in self.broker.features:
            received = await self._placed(received)
        # On the broker first: what it refuses must not take the group from those that work for it now, and a new one cut off
        # between broker and store would otherwise seem to have been here.
        await self.broker.bind(received, work=False, cursors=self)
        await self.store.bind(received, work=work)
        if not work:
            return
        await self.broker.bind(received, cursors=self)
        for group in received:
            if group.name not in self._readers:
                self._readers[group.name] = reader = self._reader(group)
                reader.start()
        if not self._tasks:
            await self.store.bind([Group(RELAY, ("#",), start="beginning", app="")])
            self._tasks = [
                asyncio.create_task(Relay(self.store, RELAY, self._send).run(), name=RELAY),
                asyncio.create_task(self._watch(), name="trilogue paired watch"),
            ]

    async def _placed(self, groups: Sequence[Group]) -> list[Group]:
        """Groups that have been here begin at the beginning where the broker has forgotten their place.

        Kafka does so after a week without workers; beginning at "now" then would leave out what was published meanwhile.
        """
        known = set(await self.store.inbox.names())
        return [dataclasses.replace(group, start="beginning") if group.name in known else group for group in groups]

    def _reader(self, group: Group) -> Reader:
        places = group.has_effects and Feature.REPLAY in self.broker.features
        epochs = self._epochs[group.name]
        return Reader(self.broker, self.store, group, self.publish, places=places, epochs=epochs, rejoin=self._rejoin)

    async def assigned(self, group: str, lane: str) -> Progress | None:
        """ports.Cursors: a lane came to this process; where a group with effects goes on in it."""
        found = await self.store.inbox.assigned(group, lane)
        self._epochs[group][lane] = max(found.epoch, self._epochs[group].get(lane, 0))
        return found.progress

    async def _rejoin(self, group: Group) -> None:
        """Have the lanes of a group assigned anew."""
        await self.broker.unbind(group.name)
        await self.broker.bind([group], cursors=self)

    async def _watch(self) -> None:
        """Learn what others change: a group is paused, dead letters are driven again."""
        while True:
            await self.store.changed(1.0)
            await asyncio.sleep(LOOK_S)
            for reader in list(self._readers.values()):
                try:
                    await reader.look()
                    if reader.may_come_back:
                        await self.broker.bind([reader.group], cursors=self)
                        reader.start()
                except TrilogueError as error:
                    log.debug("group %s: looking failed, trying again: %s", reader.name, error)
                    await asyncio.sleep(BACKOFF_S)

    async def unbind(self, group: str) -> None:
        """Stop working for one group."""
        reader = self._readers.pop(group, None)
        if reader is not None:
            await reader.stop()
            await self.broker.unbind(group)
        await self.store.unbind(group)

    async def leave(self) -> None:
        """Stop working for all groups: what is out goes back to where it came from."""
        await self._stop()
        try:
            await self.broker.leave()
        finally:
            await self.store.leave()

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *(reader.stop() for reader in self._readers.values()), return_exceptions=True)
        self._readers.clear()

    # ── publish, append, read ────────────────────────────────────────────────────────────────────────────────────────

    async def publish(self, envelopes: Sequence[Envelope]) -> list[Receipt | LogError]:
        """Put envelopes on the broker, each with its own outcome; what may never be stored is not sent."""
        if self._folding:
            self._tell_unseen({envelope.type for envelope in envelopes} - self._told)
        return await self._send(envelopes)

    def _tell_unseen(self, types: Iterable[str]) -> None:
        """Say once of a type that a projection here reads it, and does not see what is put on the broker."""
        for each in types:
            self._told.add(each)
            for group in self._folding:
                if matches_any(group.patterns, each):
                    log.warning(
                        "event %r is published to %s, and %s reads the log of the store: it sees what a stream or a transaction "
                        "appends, and not this (said once)",
                        each,
                        self.url,
                        group.name,
                    )

    async def _send(self, envelopes: Sequence[Envelope]) -> list[Receipt | LogError]:
        if not self._is_open:
            raise Unavailable(f"{self.url} is not open: use it inside `async with app:`")
        refused = {n: error for n, envelope in enumerate(envelopes) if (error := self._refusal(envelope)) is not None}
        if not refused:
            return await self.broker.publish(envelopes)
        sent = iter(await self.broker.publish([envelope for n, envelope in enumerate(envelopes) if n not in refused]))
        return [refused[n] if n in refused else next(sent) for n in range(len(envelopes))]

    def _refusal(self, envelope: Envelope) -> Rejected | None:
        try:
            self._check(envelope)
        except Rejected as error:
            return error
        return None

    def _check(self, envelope: Envelope) -> None:
        """Raise Rejected for what the store could not hold, should its handler fail."""
        check_envelope(envelope, self.store.payload_bytes, takes_nul=self.store.takes_nul)

    async def append(self, envelopes: Sequence[Envelope], *, expected: tuple[str, int] | None = None) -> list[int]:
        """With a stream: onto the store's log, relayed from there. Without: onto the broker; offsets, or 0 if there are none."""
        if expected is not None:
            return await self.store.append(envelopes, expected=expected)
        for envelope in envelopes:  # before anything is sent: what is sent cannot be taken back
            self._check(envelope)
        positions = []
        for outcome in await self.publish(envelopes):
            if not isinstance(outcome, Receipt):
                raise outcome
            positions.append(outcome.position or 0)
        return positions

    async def read(self, query: Query) -> list[Record]:
        """One page of the store's log: what aggregates, timers and settlements wrote."""
        return await self.store.read(query)

    # ── claim, settle ────────────────────────────────────────────────────────────────────────────────────────────────

    async def claim(self, group: str, *, limit: int, wait_s: float) -> list[Delivery]:
        """Lend up to `limit` deliveries, waiting up to `wait_s` for the first."""
        reader = self._readers.get(group)
        return await (self.store.claim(group, limit=limit, wait_s=wait_s) if reader is None else reader.claim(limit, wait_s))

    def settle(self, group: str, answers: Sequence[Answer]) -> Awaitable[list[Delivery]]:
        """Answer deliveries; keys of those done are free at once, the awaitable returns those whose lane or lease was lost."""
        self._turns += 1
        reader = self._readers.get(group)
        return self.store.settle(group, answers) if reader is None else reader.settle(answers)

    # ── moving groups ────────────────────────────────────────────────────────────────────────────────────────────────

    async def seek(
        self,
        group: str,
        to: SeekTo,
        *,
        into: str | None = None,
        emits: bool = False,
        reset: Callable[[Db], None] | None = None,
    ) -> int:
        """Set a group, or a new one, to start again; returns as Broker.seek()."""
        if Feature.REPLAY not in self.broker.features:
            raise Unsupported(
                f"{self.url} keeps nothing that was acknowledged: group {group!r} cannot be replayed; kafka://, sqlite:// and "
                "postgresql:// can"
            )
        if group not in await self.store.inbox.names():
            return await self.store.seek(group, to, into=into, emits=emits, reset=reset)
        if into is not None:
            return await self.broker.seek(group, to, into=into)
        if reset is None and await self._has_effects(group):
            raise Unsupported(
                f"group {group!r} writes through `db`: replaying it in place would apply every effect twice; give its handler "
                "reset= and name the app (--app MODULE:APP), or replay into a new group"
            )
        ends = {} if emits else await self._ends(group)
        # The broker first, which may refuse it: what is held, and the user's tables, are not emptied for nothing.
        return await self.broker.seek(group, to, moved=lambda: self.store.inbox.start_over(group, reset, ends))

    async def _has_effects(self, group: str) -> bool:
        if group in self._readers:
            return self._readers[group].group.has_effects
        said = await self.store.query("select has_effects from trilogue_groups where name = ?", (group,))
        return bool(said[0][0])

    async def _ends(self, group: str) -> dict[str, int]:
        """How far the group was in each lane: what it emits of records before that stays off."""
        lanes = await self.broker.lanes(group)
        unknown = [lane.name for lane in lanes if lane.next is None]
        if unknown:
            raise Unsupported(
                f"{self.url} does not tell how far group {group!r} is in {', '.join(unknown)}, so what it publishes while it is "
                "replayed cannot be kept back: ask for it with emits=True (its ids repeat), or replay into a new group"
            )
        return {lane.name: lane.next for lane in lanes if lane.next is not None}

    async def pause(self, group: str) -> None:
        """Lend nothing of this group until resume()."""
        await self.store.pause(group)
        await self._look(group)

    async def resume(self, group: str) -> None:
        """Undo pause()."""
        await self.store.resume(group)
        await self._look(group)

    async def _look(self, group: str) -> None:
        if group in self._readers:
            await self._readers[group].look()

    async def drop_group(self, group: str) -> None:
        """Forget a group on both sides."""
        is_received = group in await self.store.inbox.names()
        reader = self._readers.pop(group, None)
        if reader is not None:
            await reader.stop()
            await self.broker.unbind(group)
        await self.store.drop_group(group)
        if is_received:
            with contextlib.suppress(UnknownEvent):  # it was on one side only
                await self.broker.drop_group(group)

    async def redrive(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Handle dead letters again."""
        count = await self.store.redrive(group, positions)
        await self._look(group)
        return count

    # ── how far it is ────────────────────────────────────────────────────────────────────────────────────────────────

    async def idle(self, names: Sequence[str]) -> bool:
        """Whether these groups have nothing left to do, and nothing is on its way to the broker."""
        before = self._turns
        at_rest = await self._relayed() and await self.store.idle(names)
        for name in names:
            at_rest = at_rest and await self._is_at_rest(name)
        # What was settled meanwhile may have put something on the store's log, from where it comes round again.
        return at_rest and before == self._turns and await self._relayed()

    async def _relayed(self) -> bool:
        return not self._tasks or await self.store.idle([RELAY])

    async def _is_at_rest(self, group: str) -> bool:
        reader = self._readers.get(group)
        if reader is not None and not reader.is_idle:
            return False
        lanes = await self._lanes(group)
        return not any(lane.lag or lane.in_flight for lane in lanes)

    async def _lanes(self, group: str) -> Sequence[LaneStatus]:
        try:
            return await self.broker.lanes(group)
        except UnknownEvent:  # of the store's own log
            return ()

    async def status(self) -> Status:
        """The store at a glance, with how far the broker's groups are."""
        found = await self.store.status()
        received = set(await self.store.inbox.names())
        groups = [await self._with_lanes(each) if each.name in received else each for each in found.groups]
        return dataclasses.replace(found, url=self.url, groups=groups)

    async def _with_lanes(self, group: GroupStatus) -> GroupStatus:
        lanes = await self._lanes(group.name)
        reader = self._readers.get(group.name)
        return dataclasses.replace(
            group,
            lag=group.lag + sum(lane.lag or 0 for lane in lanes),
            lag_at_least=group.lag_at_least or any(lane.lag is None for lane in lanes),
            lag_s=max([group.lag_s, *(lane.stalled_s for lane in lanes)]),
            in_flight=group.in_flight + sum(lane.in_flight for lane in lanes),
            done=group.done + (0 if reader is None else reader.finished),
            lanes=lanes,
        )

    async def orphans(self, app: str, names: Sequence[str]) -> list[str]:
        """Groups of an app beyond these names that have work, on the broker or held, and nobody who does it."""
        found = set(await self.store.orphans(app, names))
        received = set(await self.store.inbox.names())
        for group in (await self.store.status()).groups:
            is_left = group.app == app and group.name not in names and group.name in received and not group.workers
            if is_left and any(lane.lag for lane in await self._lanes(group.name)):
                found.add(group.name)
        return sorted(found)

    async def handled(self, group: str, position: int) -> bool:
        """Of groups on the store's log; raises Unsupported for the others, whose places are not positions."""
        await self._refuse_received(group, "whether it has finished a position")
        return await self.store.handled(group, position)

    async def finished_to(self, group: str) -> int:
        """Of groups on the store's log; raises Unsupported for the others."""
        await self._refuse_received(group, "a position up to which it has read everything")
        return await self.store.finished_to(group)

    async def _refuse_received(self, group: str, what: str) -> None:
        if group in await self.store.inbox.names():
            raise Unsupported(
                f"group {group!r} reads {self.url}, whose records have no one position: it cannot tell {what}; memory://, "
                "sqlite:// and postgresql:// can, and so can projections here"
            )

    async def changed(self, wait_s: float) -> None:
        """Return when anything may have changed on either side, at the latest after `wait_s`."""
        waits = [asyncio.ensure_future(self.store.changed(wait_s)), asyncio.ensure_future(self.broker.changed(wait_s))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def describe(self) -> dict[str, str]:
        """What `trilogue doctor` prints: the broker's facts, and which store stands beside it."""
        many = Feature.MACHINES in self.store.features
        reach = "workers on many machines" if many else "workers on one machine; postgresql:// as the store serves many"
        return {**await self.broker.describe(), "store": f"{self.store.url}: {reach}"}
