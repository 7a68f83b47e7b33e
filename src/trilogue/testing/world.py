"""The user's own app, its real handlers, store and retries, in a world whose clock stands still until it is moved.

async with simulated(app) as world:
    await world.publish(Watched("u1", "v9"))
    await world.settle()                       nothing can be done any more at the present time
    await world.advance("1h")                  from due time to due time: retries, timers, and what they lead to

Leases do not expire by that: they go by the machine's own clock, which nobody sets.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar, cast, overload

from trilogue import App
from trilogue.brokers import is_broker
from trilogue.builds import projection_of
from trilogue.codec import coder
from trilogue.durations import Duration, microseconds, readable, seconds
from trilogue.errors import BadOption, TimedOut, Unavailable, UnknownEvent, Unsupported
from trilogue.events import Receipt, Record, as_datetime, event_type, now_us, set_clock
from trilogue.ports import DeadLetter, Query, Scheduled, Store
from trilogue.process import TIMER_TYPE, wiring_of
from trilogue.projections import rows
from trilogue.runner import around
from trilogue.stores import open_store
from trilogue.testing import inside
from trilogue.testing.building import building, live_groups
from trilogue.testing.faults import Fault, FaultyStore, fault_key
from trilogue.urls import redacted

E = TypeVar("E")
Handler = str | Callable[..., Any]
WITHIN = "30s"
LOOK_S = 0.005
PAGE = 1_000


@dataclass(frozen=True, slots=True)
class Held:
    """A record a group has not finished: it waits for its next attempt, or behind another one of its key.

    attempt: the next one. error: what the last one failed with, "" if there was none.
    """

    event: Any
    record: Record
    due: datetime
    attempt: int
    error: str


@contextlib.asynccontextmanager
async def simulated(app: App, url: str | None = None) -> AsyncIterator["World"]:
    """Run an app for a test: everything as in production, but for the clock, and for what is made to go wrong.

    url: the log to use instead of the app's own, as "memory://", which it is for an app on a broker: no server's clock stands
    still. The clock of the whole process does meanwhile. Raises Unavailable if the app is open already, BadOption for the URL
    of a broker, and what opening it raises.

    >>> async with simulated(app, "memory://") as world:     # doctest: +SKIP
    ...     await world.publish(Watched("u1", "v9"))
    ...     await world.settle()
    """
    if app._opened:
        raise Unavailable("the app is open already: let simulated(app) open it, and use it inside that block")
    if url is None and is_broker(app.store.url):
        url = "memory://"
    if url is not None and is_broker(url):
        raise BadOption(f"{redacted(url)} keeps its own time, which no test can set: use memory:// or sqlite:///FILE")
    real, clock = app.store, set_clock(now_us())
    try:
        store = FaultyStore(real if url is None else open_store(url))
        app.store = cast("Store", store)
        world = World(app, store)
        try:
            await world.begin()
            yield world
        finally:
            await world.end()
    finally:
        app.store = real
        set_clock(clock)


class World:
    """What a test does with an app inside `async with simulated(app) as world`.

    app: the app itself; everything it can do, it can do here.
    """

    def __init__(self, app: App, store: FaultyStore) -> None:
        self.app = app
        self._store = store
        self._began_at = 0
        self._is_up = asyncio.Event()
        self._is_ending = False
        self._life: asyncio.Task[None] | None = None

    # ── its life ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def begin(self) -> None:
        """Open the app and run its handlers; simulated() does it."""
        self._life = asyncio.create_task(self._live(), name="trilogue simulated")
        up = asyncio.create_task(self._is_up.wait())
        await asyncio.wait({self._life, up}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        self._check_alive()
        newest = await self.app.store.read(Query(reverse=True, limit=1))
        self._began_at = newest[0].position if newest else 0

    async def end(self) -> None:
        """Stop the app; simulated() does it."""
        self._is_ending = True
        self._store.over.set()
        if self._life is not None:
            await self._life

    async def _live(self) -> None:
        around.set(self._store.surround)
        while True:
            async with self.app.running(grace=0):
                self._is_up.set()
                if not self._is_ending:
                    await self._store.over.wait()
            if not self._store.is_dead:
                return
            await self._store.rise()

    def _check_alive(self) -> None:
        if self._life is not None and self._life.done():
            self._life.result()
            raise Unavailable("this world is over: use it inside `async with simulated(app) as world:`")

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def now(self) -> datetime:
        """The time here; handlers see it as recorded and due times, not in datetime.now()."""
        return as_datetime(now_us())

    async def settle(self, *, within: Duration = WITHIN) -> None:
        """Return when nothing can be done at the present time: nothing in flight, waiting, or due.

        within: real time, after which it raises TimedOut naming who still has work.
        """
        until = time.monotonic() + seconds(within)
        while not await self._is_quiet():
            if time.monotonic() > until:
                raise TimedOut(await self._still_busy(within))
            await self.app.store.changed(LOOK_S)

    async def _is_quiet(self) -> bool:
        self._check_alive()
        # In this order: what is in flight is unfinished in the tables too, and nothing new comes of what is finished there.
        store, declared = self._store.real, self.app.declared
        before = await rows(store) if declared else {}
        due_us = await inside.next_due(store, sorted({*self._store.groups, *live_groups(before, declared)}))
        is_due = due_us is not None and due_us <= now_us()
        if is_due or self._store.out.total() or not await inside.is_informed(store):
            return False
        return not declared or (not await building(store, before, declared) and await rows(store) == before)

    async def _next_due(self) -> int | None:
        return await inside.next_due(self._store.real, sorted(self._store.groups))

    async def _still_busy(self, within: Duration) -> str:
        out = {group: count for group, count in self._store.out.items() if count}
        busy = [name for name in sorted(self._store.groups) if not await self.app.store.idle([name])]
        built = await building(self._store.real, await rows(self._store.real), self.app.declared)
        return (
            f"after {readable(microseconds(within))} there still is work: in groups {', '.join(busy) or 'none'}; in the hands of "
            f"handlers: {out or 'nothing'}; projections being built: {', '.join(built) or 'none'}. Look for a handler that waits "
            "for real time, or one that is tried again at once"
        )

    async def advance(self, by: Duration) -> None:
        """Let time pass: from one due time to the next, in order, settling at each.

        by: "1h". Raises TimedOut as settle() does.
        """
        until_us = now_us() + microseconds(by)
        await self.settle()
        while (due_us := await self._next_due()) is not None and due_us <= until_us:
            await self._set_clock(max(due_us, now_us()))
        await self._set_clock(until_us)

    async def _set_clock(self, us: int) -> None:
        set_clock(us)
        await inside.look_again(self._store.real)
        await self.settle()

    # ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────

    def fail(self, handler: Handler, *, times: int = 1, error: BaseException | type[BaseException] | None = None) -> None:
        """Let a handler raise, before it does anything, the next `times` it is called.

        handler: its group, the function, or the Process class; of a projection the name too, which fails live and not while it
        is built. error: what it raises; a RuntimeError if not given. Raises BadOption.
        """
        raised = RuntimeError("made to fail by the test") if error is None else error
        self._break(handler, *(Fault("fail", raised) for _ in range(times)))

    def crash_after(self, handler: Handler) -> None:
        """Let the process die when this handler has done its work and before the log knows: as after kill -9 it comes up again,
        and everything that was in flight is delivered again."""
        self._break(handler, Fault("crash"))

    def lose_lease(self, handler: Handler) -> None:
        """Let another worker take its records while the handler runs: its settlement is refused, and they are delivered again,
        maybe before it has ended. A handler with `db` loses them before it runs: it holds the lock while it does."""
        self._break(handler, Fault("lose"))

    async def duplicate(self, handler: Handler, receipt: Receipt | None = None) -> None:
        """Let a record be delivered once more after the handler has done its work: the next one, or one that was published.

        Raises Unsupported for a published one and a handler with `db`, whose work is in the log with its effect.
        """
        if receipt is None:
            self._break(handler, Fault("again"))
            return
        group = self._group(handler)
        if any(sub.group.has_effects for sub in self.app.subscriptions if sub.group.name == group):
            raise Unsupported(
                f"group {group!r} writes through `db`: what it has finished is never delivered again, since the effect and the "
                "note that it is done are one; use duplicate(handler) without a receipt, before the record comes"
            )
        await self.settle()
        found = await self.app.store.read(Query(after=(receipt.position or 0) - 1, limit=1))
        await inside.deliver_again(self._store.real, group, found[0])

    def _break(self, handler: Handler, *faults: Fault) -> None:
        self._store.faults[fault_key(self._group(handler))].extend(faults)

    def _group(self, handler: Handler) -> str:
        """The group of a handler; raises BadOption naming those there are."""
        names = {sub.group.name for sub in self.app.subscriptions} | self._store.groups
        if isinstance(handler, str) and handler in names:
            return handler
        for sub in self.app.subscriptions:
            if sub.handler == handler:
                return sub.group.name
        for model, options in self.app.process_classes:
            if model is handler:
                return str(options["group"] or wiring_of(model).group)
        for projection in self.app.declared:
            if handler in (projection.name, projection.sub.handler):
                return next((name for name in names if projection_of(name) == projection.name), projection.sub.group.name)
        raise BadOption(f"{handler!r} is no handler of this app: it has the groups {', '.join(sorted(names)) or 'none yet'}")

    # ── what came of it ──────────────────────────────────────────────────────────────────────────────────────────────

    async def publish(self, event: object, **options: Any) -> Receipt:
        """App.publish()."""
        return await self.app.publish(event, **options)

    @overload
    async def published(self) -> list[Any]: ...

    @overload
    async def published(self, cls: type[E]) -> list[E]: ...

    async def published(self, cls: Any = None) -> list[Any]:
        """What came onto the log since the world began, in order, by whomever: typed events, of one class if it is given.

        Events of a class that the app does not know come as Records. Timers of processes are left out.
        """
        types = "#" if cls is None else event_type(cls).name
        records = self.app.history(types=types, after=self._began_at)
        return [self._typed(record, cls) async for record in records if not record.type.startswith(TIMER_TYPE)]

    def _typed(self, record: Record, cls: Any = None) -> Any:
        try:
            return self.app.decode(record)
        except UnknownEvent:
            return record if cls is None else coder(cls).read(record, self.app.keys)

    async def held(self, handler: Handler) -> list[Held]:
        """What a handler still has to do: failed records that wait for their next attempt, and those behind them of their key."""
        held = []
        for position, due_us, attempt, error in await inside.held_rows(self._store.real, self._group(handler)):
            record = (await self.app.store.read(Query(after=position - 1, limit=1)))[0]
            held.append(Held(self._typed(record), record, as_datetime(due_us), attempt, error))
        return held

    async def dead(self, handler: Handler) -> list[DeadLetter]:
        """What a handler gave up on, by position; parked ones too."""
        return await self.app.store.dead(self._group(handler), limit=PAGE)

    async def timers(self) -> list[Scheduled]:
        """What is scheduled, in the order in which it falls due."""
        found: list[Scheduled] = []
        while page := await self.app.store.timers(after=found[-1].envelope.id if found else "", limit=PAGE):
            found += page
        return sorted(found, key=lambda timer: (timer.due_us, timer.envelope.id))
