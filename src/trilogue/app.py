"""What a program holds: publish on one side, handlers on the other, a URL in between.

app = App("sqlite:///video.db")
@app.on
async def badge(e: Watched) -> BadgeWon | None: ...

async with app:            publish, history, db          (a web process)
async with app.running():  the same, and handlers run    (a test, a script)
await app.run()            until SIGTERM                 (`trilogue run module:app`)
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from time import monotonic
from typing import Any

from trilogue import codec, features, projections
from trilogue.brokers import DEFAULT_STORE, open_log
from trilogue.builds import projection_of, refuse_replay
from trilogue.durations import Duration, microseconds, seconds
from trilogue.errors import BadOption, LogError, OrphanedGroup, TimedOut, TwiceNamed, Unsupported
from trilogue.events import Envelope, Receipt, now_us, us_of
from trilogue.follower import Follower
from trilogue.handlers import NAME_CHARS, Subscription, subscription
from trilogue.history import History
from trilogue.instances import LISTED, ProcessInstance, process_instances, process_subscriptions, refuse_beside
from trilogue.outcomes import cause
from trilogue.ports import Db, SeekTo, Store
from trilogue.privacy import ErasureReceipt, erase, keys_path
from trilogue.projection import Projection, declarations
from trilogue.projections import Projections
from trilogue.reading import Reading
from trilogue.rehydrate import Snapshots
from trilogue.router import Router
from trilogue.runner import Runner
from trilogue.schema.known import known
from trilogue.stores.keys import Keyring
from trilogue.stream import Streams
from trilogue.sync import SyncApp
from trilogue.watch import LoopWatch, watch_progress

PUBLISH_RECORDS = 1_000
THREADS = 32
GRACE = "10s"
TRIM_EVERY_S = 60.0

log = logging.getLogger("trilogue")


class App(Router, Reading, Streams, History, Projections):
    """One program on one log.

    url: memory://, sqlite:///file.db, postgresql://…, amqp://… or kafka://…. store: what stands beside a broker, None: nothing.
    name: tells its groups and the source of its events from another program's.
    keep_for: while handlers run, records older than this are removed once no group needs them.

    >>> app = App("memory://")
    """

    def __init__(
        self,
        url: str = "sqlite:///trilogue.db",
        *,
        store: str | None = DEFAULT_STORE,
        name: str = "trilogue",
        keep_for: Duration | None = None,
    ) -> None:
        super().__init__()
        if not 0 < len(name) <= NAME_CHARS or not name.isprintable():
            raise BadOption(f"App(name={name!r}): expected 1 to {NAME_CHARS} printable characters")
        self.name = name
        self._keep_for = None if keep_for is None else seconds(keep_for)
        self.store: Store = open_log(url, store=store)
        self.keys: Keyring = Keyring()
        self.snapshots = Snapshots(self.store)
        self._opened = 0
        self._subscriptions: list[Subscription] = []
        self._declared: list[Projection] = []
        self._known: tuple[Any, dict[str, codec.Coder]] = (None, {})

    @property
    def subscriptions(self) -> Sequence[Subscription]:
        """What is subscribed, as read from the handlers' signatures; raises a WiringError naming the first mistake."""
        if len(self._subscriptions) != len(self.handlers) + len(self.process_classes):
            subs = [subscription(handler, pattern, app=self.name, **options) for handler, pattern, options in self.handlers]
            subs += process_subscriptions(self.process_classes, self.name)
            for n, sub in enumerate(subs):
                if any(sub.group.name == other.group.name for other in subs[:n]):
                    raise TwiceNamed(f"two handlers are group {sub.group.name!r}: give each its own name with group=")
            self._subscriptions = [replace(sub, keys=self.keys) for sub in subs]
        return self._subscriptions

    @property
    def declared(self) -> Sequence[Projection]:
        """The projections, as read from their signatures; raises a WiringError naming the first mistake."""
        if len(self._declared) != len(self.projection_functions):
            declared = declarations(self.projection_functions, self.name)
            self._declared = [replace(each, sub=replace(each.sub, keys=self.keys)) for each in declared]
        return self._declared

    @property
    def known(self) -> Mapping[str, codec.Coder]:
        """The event classes of this app by type: of its handlers, processes and projections, and of knows().

        Raises a WiringError naming the first mistake.
        """
        told = (len(self.subscriptions), len(self.declared), len(self.models))
        if self._known[0] != told:
            self._known = (told, known(self))
        return self._known[1]

    # ── opening, running ─────────────────────────────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> "App":
        if not self._opened:
            features.check(self.store.url, self.store.features, self.subscriptions, self.declared, self.known.values())
            await self.store.open()
            self.keys.open(keys_path(self.store))
            try:
                if self.setups:
                    await self.store.transact(self._set_up)
                if self.declared:
                    await self.store.transact(projections.declare_all(self.declared, self.name, work=False))
            except BaseException:
                await self._close()
                raise
        self._opened += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._opened -= 1
        if not self._opened:
            await self._close()

    async def _close(self) -> None:
        await self.snapshots.stop()
        await self.store.close()
        self.keys.close()

    def _set_up(self, db: Db) -> None:
        for create in dict.fromkeys(self.setups):
            create(db)

    @contextlib.asynccontextmanager
    async def running(self, *, grace: Duration = GRACE) -> "AsyncIterator[App]":
        """Open and run the handlers in the background until the block ends.

        grace: how long handlers may finish after that. Raises OrphanedGroup.
        """
        async with self:
            await self._refuse_orphans()
            if self.declared:
                await self.store.transact(projections.declare_all(self.declared, self.name, work=True))
            await self.store.bind([sub.group for sub in self.subscriptions])
            threads = ThreadPoolExecutor(THREADS, thread_name_prefix="trilogue handler")
            runners = [Runner(self.store, sub, threads, self.name) for sub in self.subscriptions]
            loop_watch = LoopWatch(runners)
            tasks = [asyncio.create_task(watch_progress(self.store, runners)), asyncio.create_task(self._trim_old())]
            if self.declared:
                tasks.append(asyncio.create_task(Follower(self.store, self.declared, threads, self.name, runners).run()))
            for runner in runners:
                runner.start()
            try:
                yield self
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.gather(*(runner.stop(seconds(grace)) for runner in runners))
                await self.store.leave()
                loop_watch.stop()
                threads.shutdown(wait=False, cancel_futures=True)

    async def _trim_old(self) -> None:
        while self._keep_for is not None:
            try:
                await self.trim(older_than=self._keep_for)
            except LogError as error:
                log.warning("removing old records failed: %s", error)
            await asyncio.sleep(TRIM_EVERY_S)

    async def _refuse_orphans(self) -> None:
        known = [sub.group.name for sub in self.subscriptions]
        for group in await self.store.orphans(self.name, known):
            if projection_of(group) in {each.name for each in self.declared}:
                continue  # of a build whose version this program does not have: it waits for one that has
            raise OrphanedGroup(
                f"group {group!r} has records waiting and no handler in this program: give its handler "
                f"group={group!r} again, or forget it with `trilogue groups drop {group}`; if another program reads "
                "with it, tell the two apart by App(name=...)"
            )

    async def run(self, *, grace: Duration = GRACE) -> None:
        """Run until SIGTERM or SIGINT: finish what has begun, settle, return. A second signal ends the process at once."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if stop.is_set():
                os._exit(128 + number)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        try:
            async with self.running(grace=grace):
                await stop.wait()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    # ── publishing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def envelope(
        self, event: object, *, id: str | None = None, time_us: int | None = None, stream: str | None = None
    ) -> Envelope:
        """The event as it would travel; inside a handler its cause is the record being handled.

        id: decides what counts as a repetition. time_us: when it happened, in microseconds; now if not given. stream: the one
        it is for, which is its key if it has no other.
        Raises UnknownEvent, BadOption.
        """
        if isinstance(event, Envelope):
            if id is not None or time_us is not None:
                raise BadOption(
                    "an Envelope has its id and time already: make it with them, by app.envelope(event, id=, time_us=)"
                )
            return event
        return codec.envelope(event, id=id, time_us=time_us, source=self.name, cause=cause.get(), keys=self.keys, stream=stream)

    async def publish(
        self,
        event: object,
        *,
        id: str | None = None,
        time: datetime | None = None,
        delay: Duration | None = None,
        at: datetime | None = None,
        tx: object | None = None,
    ) -> Receipt:
        """Put an event (or Envelope) on the log; durable when it returns.

        id: repeating a publish with the same id adds nothing. time: when it happened; now if not given.
        delay, at: enter the log then and not now; cancel() with the receipt prevents it.
        tx: your own transaction, of SQLAlchemy, psycopg or asyncpg, on the PostgreSQL database of this log: published with its
        commit and not without it; the receipt has no position yet.
        Raises Rejected, StorageFull, Conflict (id stored with other content), OutcomeUnknown (repeat it with the same id).
        """
        envelope = self.envelope(event, id=id, time_us=None if time is None else us_of(time, "time"))
        due_us = _due(delay, at)
        if tx is not None:
            await self.store.publish_in(tx, [envelope], due_us)
            return Receipt(envelope.id, None, self.store.durability, due_us)
        if due_us is not None:
            await self.store.schedule([envelope], due_us)
            return Receipt(envelope.id, None, self.store.durability, due_us)
        return _stored(await self.store.publish([envelope]))[0]

    async def publish_many(self, events: Sequence[object]) -> list[Receipt]:
        """Publish in order, up to 1,000 in one transaction; each thousand is stored whole or not at all.

        events: events or Envelopes. Raises as publish(); what was stored before stays, and repeating it adds nothing if the
        Envelopes carry their ids.
        """
        receipts: list[Receipt] = []
        for start in range(0, len(events), PUBLISH_RECORDS):
            with self.keys.together():
                envelopes = [self.envelope(event) for event in events[start : start + PUBLISH_RECORDS]]
            receipts += _stored(await self.store.publish(envelopes))
        return receipts

    async def erase(self, subject: str, *, reason: str, timeout: Duration = "10s") -> ErasureReceipt:
        """Erase a person: their key is destroyed, so that the personal fields of their events read as erased from now on.

        subject: as the events name them. reason: kept on the log. timeout: how long to wait for the groups that react to it.
        The receipt says what is done and what is not; erasing again completes it. Writing waits while the file is written anew.
        Raises Rejected if nothing was ever sealed for them, BadOption.
        """
        return await erase(self.store, self.keys, subject, reason=reason, source=self.name, timeout=timeout)

    async def cancel(self, receipt: Receipt) -> bool:
        """Prevent a delayed event; False if it has entered the log already or never was delayed."""
        return await self.store.cancel(receipt.id)

    # ── waiting, replaying, trimming ─────────────────────────────────────────────────────────────────────────────────

    async def wait_idle(self, *, timeout: Duration | None = None) -> None:
        """Return when every group of this app has nothing left to do; dead and parked records do not count.

        Raises TimedOut.
        """
        names = [sub.group.name for sub in self.subscriptions]
        until = None if timeout is None else monotonic() + seconds(timeout)
        while not await self.store.idle(names) or (self.declared and await projections.busy(self.store, self.declared)):
            if until is not None and monotonic() > until:
                raise TimedOut(f"the groups of this app still have work after {timeout}")
            await self.store.changed(0.05)

    async def replay(self, group: str, to: SeekTo, *, into: str | None = None, emits: bool = False) -> int:
        """Let a group of this app read again; returns the position after which it starts.

        to: where. into: leave the group alone and make a new one that starts there. emits: also publish again what its handler
        returns. In place, a group that writes through `db` is emptied by its reset hook first. Raises Unsupported, UnknownEvent.
        """
        refuse_replay(group)
        if into is not None:
            await refuse_beside(self.store, group)
        sub = next((sub for sub in self.subscriptions if sub.group.name == group), None)
        if sub is not None and sub.whole and to.end != "beginning":
            raise Unsupported(
                f"group {group!r} is a process: its instances are made anew by a replay, and those that began earlier would be "
                "lost; replay it from the beginning"
            )
        return await self.store.seek(group, to, into=into, emits=emits, reset=None if sub is None else sub.reset)

    async def processes(
        self, name: str | None = None, *, stuck: Duration | None = None, limit: int = LISTED
    ) -> list[ProcessInstance]:
        """The instances of processes that have not ended, by process and id.

        name: of one process. stuck: only those that have a record that failed, or no change for so long and no timer to come.
        Raises UnknownEvent for a process this log does not have.

        >>> [each.id for each in await app.processes("transfer", stuck="1h")]     # doctest: +SKIP
        """
        return await process_instances(self.store, name, stuck=stuck, limit=limit)

    async def trim(
        self,
        *,
        older_than: Duration | None = None,
        keep: int | None = None,
        force: bool = False,
        streams: bool = False,
    ) -> int:
        """Remove records older than a duration and beyond the newest `keep`; returns how many went.

        What a group still needs stays unless `force`, records of streams and those with tags, on which
        decisions rest, stay unless `streams`; the newest always stays, of each stream too.
        """
        older_than_us = None if older_than is None else microseconds(older_than)
        return await self.store.trim(older_than_us=older_than_us, keep=keep, force=force, streams=streams)

    def sync(self) -> SyncApp:
        """The same for programs without an event loop: `with app.sync() as bus: bus.publish(...)`."""
        return SyncApp(self)


def _stored(outcomes: Sequence[Receipt | LogError]) -> list[Receipt]:
    """The receipts; raises the first error if one event was not stored, or may not be."""
    receipts = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
    if len(receipts) < len(outcomes):
        raise next(outcome for outcome in outcomes if isinstance(outcome, LogError))
    return receipts


def _due(delay: Duration | None, at: datetime | None) -> int | None:
    if delay is not None and at is not None:
        raise BadOption("delay= and at= say the same thing: give one of them")
    if delay is not None:
        return now_us() + microseconds(delay)
    return None if at is None else us_of(at, "at")
