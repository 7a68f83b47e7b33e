"""What an App says of its projections and does with them: list, rebuild, compare, switch, drop, pause, skip.

    await app.rebuild("balances")    begin a build beside the live one       (a running program builds it)
    await app.compare("balances")    rows that only one of them has
    await app.switch("balances")     readers see the new one from one moment to the next
    await app.drop_old("balances")   remove the tables of the one before

All of it is in the log's own store, so the command line does the same without the program, rebuild excepted.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Protocol, TypeVar

import msgspec

from trilogue import builds
from trilogue.builds import Build, Busy, Moved, Row, Skip
from trilogue.errors import BadOption, HandlerFailed, TrilogueError, UnknownEvent
from trilogue.events import audit, now_us
from trilogue.follower import REST_S, Builder, Stopped
from trilogue.ports import GroupStatus, Query, Store, Transaction
from trilogue.projection import Projection, physical

T = TypeVar("T")
SAMPLE_ROWS = 5
BUSY_S = 5.0
REASON_CHARS = 500


@dataclass(frozen=True, slots=True)
class BuildStatus:
    """One set of tables. state: building, ready, failed, live, old. position: folded up to here. lag: records behind (of a
    build: positions). rate: events per second. eta_s: seconds until it has caught up, None where that cannot be said."""

    build: int
    version: int
    state: str
    position: int
    lag: int
    rate: float
    eta_s: float | None
    error: str
    note: str


@dataclass(frozen=True, slots=True)
class ProjectionStatus:
    """A projection: the figures of the build under way, or else of the live one. builds: all of them, oldest first.

    skipped: events that are passed over."""

    name: str
    app: str
    version: int
    state: str
    paused: bool
    position: int
    head: int
    lag: int
    rate: float
    eta_s: float | None
    error: str
    skipped: Sequence[Skip]
    builds: Sequence[BuildStatus]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the next build of a table differs from the live one, in the columns both have. sample: (which, row) of either."""

    table: str
    live: int
    next: int
    only_live: int
    only_next: int
    sample: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)


class _Host(Protocol):
    store: Store

    @property
    def declared(self) -> Sequence[Projection]: ...


class Projections:
    """The part of an App that is about its projections."""

    async def projections(self: _Host) -> list[ProjectionStatus]:
        """How far every projection of this log is, by name."""
        return await statuses(self.store)

    async def rebuild(self: _Host, name: str) -> int:
        """Begin to build a projection anew beside the live one, instead of a build under way; returns the build's number.

        It waits for switch() when it is ready. Raises UnknownEvent.
        """
        projection = next((each for each in self.declared if each.name == name), None)
        if projection is None:
            names = ", ".join(each.name for each in self.declared) or "none"
            raise UnknownEvent(f"this app has no projection {name!r}: it has {names}")
        found = projection
        return await self.store.transact(lambda tx: builds.begin(tx, found, builds.find(tx, name), switch="manual").build)

    async def compare(self: _Host, name: str, *, sample: int = SAMPLE_ROWS) -> list[Comparison]:
        """What differs between the live build and the next one, table by table.

        sample: at most so many rows of each side. Raises TrilogueError if there are no two builds.
        """
        return await compare(self.store, name, sample=sample)

    async def switch(self: _Host, name: str, *, force: bool = False) -> int:
        """Show the build that is ready, from one moment to the next; returns its number.

        force: although records are parked for the live one, of which nothing was published, or the build is behind. Without it,
        the program of its version has 5 s to fold the rest. Raises TrilogueError.
        """
        return await switch(self.store, name, force=force)

    async def drop_old(self: _Host, name: str) -> list[int]:
        """Remove the tables of the build before the live one; returns the numbers of those that went."""
        return await drop_old(self.store, name)

    async def pause(self: _Host, name: str) -> None:
        """Let a projection fold nothing, live or in a build, until resume(); survives restarts."""
        await set_paused(self.store, name, True)

    async def resume(self: _Host, name: str) -> None:
        """Undo pause()."""
        await set_paused(self.store, name, False)

    async def skip(self: _Host, name: str, position: int, reason: str) -> None:
        """Pass over one event, now and in every build to come; audited(who=) says who.

        Raises BadOption without a reason, UnknownEvent for a position that is not on the log.
        """
        await skip(self.store, name, position, reason)


# ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def rows(store: Store) -> dict[str, Row]:
    """The rows of all projections on a log."""
    return {state.id: builds.row_of(state) for state in await store.states(builds.OWNER)}


async def statuses(store: Store) -> list[ProjectionStatus]:
    """How far every projection of a log is, by name."""
    found = await rows(store)
    status = await store.status()
    groups = {group.name: group for group in status.groups}
    listed = []
    for name, row in found.items():
        live = None if row.live is None else groups.get(builds.group_name(name, row.live.build))
        reached, skipped = await _reached(store, name, row), await _skipped(store, name)
        listed.append(_status(name, row, live, reached, status.head, skipped))
    return listed


async def _skipped(store: Store, name: str) -> list[Skip]:
    states = await store.states(builds.skip_owner(name), limit=builds.MOST_SKIPPED)
    return [msgspec.json.decode(state.body, type=Skip) for state in states]


def _status(name: str, row: Row, group: GroupStatus | None, reached: int, head: int, skipped: Sequence[Skip]) -> ProjectionStatus:
    all_builds = [_old(build) for build in row.old]
    if row.live is not None:
        all_builds.append(_live(row.live, group, reached))
    if row.next is not None:
        all_builds.append(_next(row.next, head))
    now = all_builds[-1]
    state = "paused" if row.paused else now.state
    position, lag, rate, eta_s = now.position, now.lag, now.rate, now.eta_s
    return ProjectionStatus(
        name, row.app, now.version, state, row.paused, position, head, lag, rate, eta_s, now.error, skipped, all_builds
    )


def _old(build: Build) -> BuildStatus:
    return BuildStatus(build.build, build.version, "old", build.position, 0, 0.0, None, "", "")


def _live(build: Build, group: GroupStatus | None, reached: int) -> BuildStatus:
    if group is None:
        return BuildStatus(build.build, build.version, "live", build.position, 0, 0.0, None, "its group was dropped", "")
    error = f"{group.parked:,} records are parked: see `trilogue dead list --group {group.name}`" if group.parked else ""
    eta_s = 0.0 if not group.lag else group.lag / group.rate if group.rate > 0 else None
    position = max(build.position, reached)
    return BuildStatus(build.build, build.version, "live", position, group.lag, group.rate, eta_s, error, "")


def _next(build: Build, head: int) -> BuildStatus:
    end = head if build.target is None else build.target
    seconds = (build.moved_us - build.began_us) / 1_000_000
    rate = build.folded / seconds if seconds > 0 else 0.0
    passed = build.position - build.start
    lag = max(0, end - build.position)
    eta_s = 0.0 if not lag else lag * seconds / passed if passed > 0 and build.state == "building" else None
    return BuildStatus(build.build, build.version, build.state, build.position, lag, rate, eta_s, build.error, build.note)


# ── doing ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def compare(store: Store, name: str, *, sample: int = SAMPLE_ROWS) -> list[Comparison]:
    """What differs between the live build and the next one, table by table."""
    row = await store.transact(lambda tx: builds.find(tx, name), rows=1)
    if row.live is None or row.next is None:
        raise TrilogueError(
            f"projection {name!r} has no two builds to compare: begin one with "
            f"`trilogue projections rebuild {name} --app MODULE:APP`"
        )
    return [await _compared(store, row.live, row.next, table, sample) for table in row.next.tables if table in row.live.tables]


async def _compared(store: Store, live: Build, coming: Build, table: str, sample: int) -> Comparison:
    ours, theirs = physical(table, live.build), physical(table, coming.build)
    mine, known = await store.transact(lambda tx: (tx.columns(ours), tx.columns(theirs)), rows=1)
    columns = [column for column in mine if column in known]
    both = ", ".join(f'"{column}"' for column in columns) or "null"
    parts = f"with l as (select {both} from {ours}), n as (select {both} from {theirs}) "
    # One statement each, so that both tables are seen at the same moment.
    [counts] = await store.query(
        f"{parts} select (select count(*) from l), (select count(*) from n), "
        "(select count(*) from (select * from l except select * from n) gone), "
        "(select count(*) from (select * from n except select * from l) new)"
    )
    rows = [("live", row) for row in await store.query(f"{parts} select * from l except select * from n limit ?", (sample,))]
    rows += [("next", row) for row in await store.query(f"{parts} select * from n except select * from l limit ?", (sample,))]
    return Comparison(table, counts[0], counts[1], counts[2], counts[3], rows)


async def switch(store: Store, name: str, *, force: bool) -> int:
    """Show the build that is ready; returns its number.

    Where there is still something to fold, who builds it is asked to fold that and switch.
    """
    asked: int | None = None
    until = monotonic() + BUSY_S
    try:
        while True:
            try:
                return (await store.transact(partial(builds.switch, name=name, force=force, asked=asked))).build
            except Busy:  # at most times nothing is under way a moment later
                if monotonic() > until:
                    raise
            if asked is None:
                asked = await store.transact(partial(builds.ask, name=name))
            await asyncio.sleep(0.02)
    except BaseException:
        if asked is not None:
            await store.transact(partial(builds.ask, name=name, asked=asked))
        raise


async def forget(store: Store, name: str) -> None:
    """Remove a projection that no program declares any more: its group, views, tables and what is known of it.

    Raises UnknownEvent, and TrilogueError while somebody works for it.
    """
    ours = [group for group in (await store.status()).groups if builds.projection_of(group.name) == name]
    if any(group.workers for group in ours):
        raise TrilogueError(f"projection {name!r} is kept up to date by a program that runs: stop it, then forget the projection")
    await store.transact(lambda tx: builds.forget(tx, name))


async def drop_old(store: Store, name: str) -> list[int]:
    """Remove the tables of old builds; returns their numbers."""
    return await store.transact(lambda tx: builds.drop_old(tx, name))


async def set_paused(store: Store, name: str, paused: bool) -> None:
    """Let a projection fold nothing, or go on."""
    await store.transact(lambda tx: builds.set_paused(tx, name, paused))


async def build_here(store: Store, declared: Sequence[Projection], name: str) -> None:
    """Build what is to be built of one projection until it is ready; returns at once if that is nothing.

    Raises LogError. Where somebody else builds it, waits for them.
    """
    projection = next(each for each in declared if each.name == name)
    while True:
        row = await store.transact(lambda tx: builds.find(tx, name), rows=1)
        build = row.next
        if build is None or build.state != "building" or build.version != projection.version:
            return
        if row.paused:
            raise TrilogueError(f"projection {name!r} is paused: let it go on with `trilogue projections resume {name}`")
        try:
            await Builder(store, projection, row.live, build).run(until_ready=True)
        except (Moved, Stopped):
            await asyncio.sleep(REST_S)


async def skip(store: Store, name: str, position: int, reason: str, *, who: str | None = None) -> None:
    """Pass over one event, now and in every build to come."""
    if not reason.strip() or len(reason) > REASON_CHARS:
        raise BadOption(f"skipping position {position} of {name!r} wants a reason of 1 to {REASON_CHARS} characters")
    said = (audit() or {}).get("who")
    skipped = Skip(position, reason, who or (None if said is None else str(said)), now_us())
    await store.transact(lambda tx: builds.skip(tx, name, skipped))


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def handled(store: Store, name: str, position: int) -> bool:
    """Whether what readers of a projection see contains a position.

    Raises HandlerFailed if it cannot, UnknownEvent if the projection does not read such a record or there is none of that name.
    """
    row = (await rows(store)).get(name)
    if row is None:
        raise UnknownEvent(f"there is no group and no projection {name!r} on this log")
    if row.live is None:
        return _is_built(name, row.next, position)
    try:
        return await store.handled(builds.group_name(name, row.live.build), position)
    except UnknownEvent:
        now = (await rows(store)).get(name)
        if now is not None and now.live is not None and now.live.build != row.live.build:
            return False  # switched just now: the next look tells
        raise


def _is_built(name: str, build: Build | None, position: int) -> bool:
    if build is not None and build.state == "failed":
        raise HandlerFailed(f"projection {name!r} is not live yet: {build.error}")
    return build is not None and build.position >= position


async def busy(store: Store, declared: Sequence[Projection]) -> bool:
    """Whether a projection of these versions is being built, or has records to fold."""
    found = await rows(store)
    live = []
    for projection in declared:
        row = found.get(projection.name)
        if row is None:
            return True
        if row.next is not None and row.next.version == projection.version and await _will_move(store, projection, row, row.next):
            return True
        if row.live is not None and row.live.version == projection.version:
            live.append(builds.group_name(projection.name, row.live.build))
    try:
        return not await store.idle(live)
    except UnknownEvent:
        return True  # switched just now: the next look tells


async def _will_move(store: Store, projection: Projection, row: Row, build: Build) -> bool:
    """Whether a build is under way, about to be shown, or behind what it may fold."""
    if build.state != "ready":
        return build.state == "building"
    reached = await _reached(store, projection.name, row)
    behind = Query(types=projection.types, after=build.position, before=reached + 1, limit=1)
    return (build.switch != "manual" and not build.note) or bool(await store.read(behind))


async def _reached(store: Store, name: str, row: Row) -> int:
    """What the live group has read; 0 if there is none, or it was left this moment."""
    if row.live is None:
        return 0
    try:
        return await store.finished_to(builds.group_name(name, row.live.build))
    except UnknownEvent:
        return 0


def declare_all(declared: Sequence[Projection], app: str, *, work: bool) -> Callable[[Transaction], None]:
    """What makes the tables of new projections, and with `work` begins the builds of newer versions, in one transaction."""

    def declare(tx: Transaction) -> None:
        for projection in declared:
            builds.declare(tx, projection, app, work=work)

    return declare
