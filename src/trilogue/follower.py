"""What keeps the projections of a running program going.

    every look   row.live of our version   ──▶ a Runner for its group          (an ordinary subscription)
                 row.next of our version   ──▶ a Builder                       (a strict loop, no claims)

    Builder      read a page ║ fold the one before it, 2,000 events a transaction, and move the position by compare-and-set
                 the last few are folded in the transaction that switches: readers never see less than before

Two processes may run it: who moves a position that is not where it was read loses, and looks again in a second.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

from trilogue import builds
from trilogue.builds import Build, BuildState, Moved, Row
from trilogue.errors import DecodeError, LogError, TimedOut, TrilogueError, UnknownEvent
from trilogue.events import Record
from trilogue.handlers import Failed
from trilogue.outcomes import told
from trilogue.ports import Query, Store, Transaction
from trilogue.projection import Projection, View, fold, live_subscription, tables_of
from trilogue.runner import Runner
from trilogue.sealing import holds_sealed

PAGE_RECORDS = 5_000
WINDOW = 500_000
FIRST_EVENTS, MOST_EVENTS = 250, 2_000
QUICK_S, SLOW_S = 0.03, 0.1
LOOK_S = 0.03
REFUSED_S = 0.1
REST_S = 1.0
STOP_S = 1.0

log = logging.getLogger("trilogue")
Page = tuple[list[Record], list[Any], int]


class Stopped(TrilogueError):
    """An event could not be folded: the build waits for somebody."""


class _Unfolded(Exception):
    """One of the last few events could not be folded: found out which, and said, where events are folded one by one."""


class Builder:
    """Folds the log into one build, until it is live, taken over, or an event cannot be folded."""

    def __init__(self, store: Store, projection: Projection, live: Build | None, build: Build) -> None:
        self._store, self._projection, self._live, self._build = store, projection, live, build
        self._tables = tables_of(projection, build.build)
        self._not_skipped = builds.not_skipped(projection.name)
        self._position = self._stored = build.position
        self._events = FIRST_EVENTS

    async def run(self, *, until_ready: bool = False) -> None:
        """Build until there is nothing more to do here. Raises Moved, Stopped, LogError."""
        state = self._build.state
        while state != "live":
            await self._fold_to(await self._mark(), always=state == "building")
            is_near = await self._mark() - self._position <= PAGE_RECORDS
            if is_near and (state == "building" or self._build.switch != "manual"):
                state = await self._arrive(state)
            if state == "ready" and until_ready:
                return
            if state == "ready":
                await self._rest()

    async def _rest(self) -> None:
        await self._store.changed(1.0)
        await asyncio.sleep(REFUSED_S if self._build.switch == "auto" else LOOK_S)
        body = await self._store.state(builds.OWNER, self._projection.name)
        now = None if body is None else builds.row_of(body).next
        if now is None or now.build != self._build.build:
            raise Moved(f"projection {self._projection.name!r} was switched")
        self._build = now  # somebody may have asked for the switch

    async def _arrive(self, state: BuildState) -> BuildState:
        """Fold the last few and switch, in one transaction, if it may; else it is ready."""
        name, number = self._projection.name, self._build.build

        def work(tx: Transaction) -> tuple[BuildState, int]:
            position = self._stored if self._build.switch == "manual" else self._fold_last(tx)
            return builds.arrive(tx, name, number, position), position

        limit_us = (1 + self._events // (self._projection.sub.batch or 1)) * self._projection.sub.db_limit_us
        try:
            state, self._stored = await self._store.transact(work, rows=1 + self._events, limit_us=limit_us)
        except (_Unfolded, TimedOut) as error:
            log.debug("projection %s: the last events before a switch failed (%s)", name, error)
            self._events = max(1, self._events // 2)
            return state
        self._position = max(self._position, self._stored)
        return state

    def _fold_last(self, tx: Transaction) -> int:
        """What the live group has finished since; the position that is reached, where it was if that would be too many."""
        name, number, was = self._projection.name, self._build.build, self._stored
        row = builds.find(tx, name)
        records, reached = builds.unfolded(tx, name, row, self._projection.types, self._events + 1)
        if reached <= was or len(records) > self._events:
            return was
        wanted = self._not_skipped(tx, records)
        builds.advance(tx, name, number, was, reached, len(wanted))
        try:
            self._apply(tx, [records[n] for n in wanted], [self._decoded(records[n]) for n in wanted])
        except Exception as error:
            raise _Unfolded(str(error)) from error
        return reached

    async def _mark(self) -> int:
        """Up to where this build may fold: what the live group has finished, so that nothing is published by neither."""
        if self._live is None:
            return self._build.target or 0
        try:
            return await self._store.finished_to(builds.group_name(self._projection.name, self._live.build))
        except UnknownEvent:
            raise Moved(f"projection {self._projection.name!r} was switched") from None

    async def _fold_to(self, mark: int, *, always: bool) -> None:
        """Fold up to the mark. always: note also that nothing was there to fold."""
        reading = self._read(self._position, mark)
        try:
            while self._position < mark:
                records, events, end = await asyncio.shield(reading)
                reading = self._read(end, mark)  # while this page is folded
                start = 0
                while start < len(records):
                    until = min(start + self._events, len(records))
                    last = end if until == len(records) else records[until - 1].position
                    await self._fold(records[start:until], events[start:until], last)
                    start = until
                if self._stored < end and (always or end - self._stored >= PAGE_RECORDS):
                    await self._write([], [], end)
                self._position = end
        finally:
            await asyncio.gather(reading, return_exceptions=True)  # its thread must not outlive the store

    def _read(self, after: int, mark: int) -> "asyncio.Task[Page]":
        return asyncio.create_task(self._page(after, min(after + WINDOW, mark)))

    async def _page(self, after: int, until: int) -> Page:
        """Records, their events, and the position up to which that is all."""
        if after >= until:
            return [], [], until
        query = Query(types=self._projection.types, after=after, before=until + 1, limit=PAGE_RECORDS)
        records = await self._store.read(query)
        end = records[-1].position if len(records) == PAGE_RECORDS else until
        return records, [self._decoded(record) for record in records], end

    def _decoded(self, record: Record) -> Any:
        try:
            return self._projection.decode(record)
        except DecodeError as error:
            return error  # in its place: what is before it is folded first

    # ── one transaction ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _fold(self, records: list[Record], events: list[Any], end: int) -> None:
        began = time.monotonic()
        try:
            await self._write(records, events, end)
        except (Moved, LogError):
            raise
        except Exception as error:
            log.debug("projection %s: a batch failed (%s): one by one", self._projection.name, type(error).__qualname__)
            await self._one_by_one(records, events, end)
        took_s = time.monotonic() - began  # everybody who publishes waits for it
        if took_s < QUICK_S:
            self._events = min(MOST_EVENTS, self._events * 2)
        elif took_s > SLOW_S:
            self._events = max(1, self._events // 2)

    async def _write(self, records: list[Record], events: list[Any], end: int) -> None:
        """Fold into the tables and move the position, in one transaction."""
        name, number, was = self._projection.name, self._build.build, self._stored

        def work(tx: Transaction) -> None:
            wanted = self._not_skipped(tx, records)
            # First, because folding what somebody else has folded may fail, and would be taken for a bad event.
            builds.advance(tx, name, number, was, end, len(wanted))
            self._apply(tx, [records[n] for n in wanted], [events[n] for n in wanted])

        calls = 1 + len(records) // (self._projection.sub.batch or 1)
        await self._store.transact(work, rows=1 + len(records), limit_us=calls * self._projection.sub.db_limit_us)
        self._stored = self._position = end

    def _apply(self, tx: Transaction, records: Sequence[Record], events: Sequence[Any]) -> None:
        """Fold; what the projection returns to be published is dropped."""
        for outcome in fold(self._projection, records, events, View(tx, self._tables)):
            if isinstance(outcome, Failed):
                raise outcome.error if isinstance(outcome.error, BaseException) else TrilogueError(outcome.error)

    async def _one_by_one(self, records: list[Record], events: list[Any], end: int) -> None:
        """Each event in a transaction of its own, up to the one that cannot be folded."""
        for n, record in enumerate(records):
            try:
                await self._write([record], [events[n]], end if n + 1 == len(records) else record.position)
            except (Moved, LogError):
                raise
            except Exception as error:
                await self._fail(record, error)

    async def _fail(self, record: Record, error: Exception) -> None:
        name, number, was = self._projection.name, self._build.build, self._stored
        await self._store.transact(lambda tx: builds.fail(tx, name, number, was, record, error), rows=1)
        said = told(error, is_personal=holds_sealed(record.data))[0]
        log.error("projection %s: build %d stops at position %d: %s", name, number, record.position, said)
        raise Stopped(f"build {number} of projection {name!r} stopped at position {record.position}")


class Follower:
    """Starts and stops what the rows of the projections ask for. runners: those of the live builds are kept there too."""

    def __init__(
        self, store: Store, projections: Sequence[Projection], threads: Executor, source: str, runners: list[Runner]
    ) -> None:
        self._store, self._projections, self._threads, self._source = store, projections, threads, source
        self._runners = runners
        self._live: dict[str, tuple[int, Runner]] = {}
        self._building: dict[str, tuple[int, asyncio.Task[None]]] = {}
        self._rest: dict[tuple[str, int], tuple[int, float]] = {}

    async def run(self) -> None:
        """Look, until cancelled; then nothing of it builds any more."""
        try:
            while True:
                try:
                    await self._look()
                except Exception as error:  # whatever it is: projections that stop in silence are worse
                    log.warning("looking after the projections failed, trying again: %s", error)
                    await asyncio.sleep(REST_S)
                await self._store.changed(1.0)
                await asyncio.sleep(LOOK_S)
        finally:
            tasks = [task for _, task in self._building.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        rows = {state.id: builds.row_of(state) for state in await self._store.states(builds.OWNER)}
        for projection in self._projections:
            row = rows.get(projection.name)
            if row is not None:
                await self._follow_live(projection, row)
                self._follow_next(projection, row)
                if len(row.old) > 1:  # not in the switch, whose SQL is bounded in time: large tables take long to drop
                    await self._store.transact(partial(builds.drop_older, name=projection.name))

    # ── the live build ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _follow_live(self, projection: Projection, row: Row) -> None:
        name = projection.name
        live = row.live if row.live is not None and row.live.version == projection.version else None
        number, runner = self._live.get(name, (0, None))
        if runner is not None and (live is None or live.build != number):
            del self._live[name]
            await runner.stop(STOP_S)
            self._runners.remove(runner)
            await self._store.unbind(runner.name)
        if live is not None and name not in self._live:
            group = builds.group_of(name, live, row.app)
            await self._store.bind([group])
            sub = live_subscription(projection, live.build, group, builds.not_skipped(name))
            runner = Runner(self._store, sub, self._threads, self._source)
            self._live[name] = (live.build, runner)
            self._runners.append(runner)
            runner.start()

    # ── the next build ───────────────────────────────────────────────────────────────────────────────────────────────

    def _follow_next(self, projection: Projection, row: Row) -> None:
        name, build = projection.name, row.next
        is_ours = build is not None and build.version == projection.version and build.state != "failed" and not row.paused
        number, task = self._building.get(name, (0, None))
        if task is not None and not task.done():
            if not is_ours or build is None or build.build != number:
                task.cancel()
            return
        if is_ours and build is not None and self._is_rested(name, build):
            builder = Builder(self._store, projection, row.live, build)
            self._building[name] = (build.build, asyncio.create_task(self._build(builder, name, build)))

    def _is_rested(self, name: str, build: Build) -> bool:
        """Whether nobody has moved it for a second, where we could not."""
        at = self._rest.get((name, build.build))
        if at is None:
            return True
        if at[0] != build.position:
            self._rest[name, build.build] = (build.position, time.monotonic())
            return False
        return time.monotonic() - at[1] > REST_S

    async def _build(self, builder: Builder, name: str, build: Build) -> None:
        try:
            await builder.run()
            return
        except Stopped:
            return
        except Moved as moved:
            log.debug("%s", moved)
        except Exception as error:
            log.warning("building projection %s failed, trying again: %s", name, error)
        self._rest[name, build.build] = (build.position, time.monotonic())
