"""Which builds of a projection there are: one row per projection, changed together with the tables it tells of.

    trilogue_state  owner "projection", id = name
    {"live": {"build": 3, "version": 2, …}, "next": {"build": 4, "position": 17000, "state": "building", …}, "old": […]}

                    fold to the mark            same act: group, view, row
    begin ──▶ building ──────────▶ ready ──switch──▶ live ──the next one──▶ old ──drop──▶ gone
                └──▶ failed (an event) ──skip, or mend and restart──▶ building
    a switch that is asked for while records are to be folded is made by who builds, with the last of them

What the live group has finished (the mark) bounds a build beside it: it folds without publishing, so it must never be ahead
of the one who publishes. At the switch the new group starts where the build stands and is quiet up to where the old one was.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from trilogue.errors import BadOption, TrilogueError, TwiceNamed, UnknownEvent, Unsupported
from trilogue.events import Group, Record
from trilogue.outcomes import told
from trilogue.ports import Query, State, Transaction
from trilogue.projection import Projection, create_tables, physical
from trilogue.sealing import holds_sealed

OWNER = "projection"
MOST_SKIPPED = 10_000
MOST_BEHIND = 500_000
ERROR_CHARS = 1_000
_GROUP = re.compile(r"projection\.(\w+)\.b\d+")

BuildState = Literal["building", "ready", "failed", "live", "old"]


class Moved(TrilogueError):
    """Somebody else has moved, replaced or paused this build."""


class Busy(TrilogueError):
    """Records are under way for the live build just now: trying again soon helps."""


class Behind(Busy):
    """The build has not folded all that readers see."""


class Build(msgspec.Struct):
    """One set of tables. position: folded up to here; once live, its group has the cursors. start: the position it began after.
    missing: up to here records may have been removed before they were folded. switch: auto, manual, or asked for just now.
    target: where the very first build stops and goes live. folded: events. note: why it does not switch by itself."""

    build: int
    version: int
    tables: dict[str, str]
    indexes: list[str]
    types: list[str]
    position: int
    start: int
    began_us: int
    moved_us: int
    missing: int = 0
    state: BuildState = "building"
    switch: str = "auto"
    target: int | None = None
    folded: int = 0
    failed_at: int | None = None
    error: str = ""
    note: str = ""


class Row(msgspec.Struct):
    """All builds of one projection. builds: the number given last. app: the program whose projection it is."""

    app: str
    live: Build | None = None
    next: Build | None = None
    old: list[Build] = msgspec.field(default_factory=list)
    paused: bool = False
    builds: int = 0


def group_name(name: str, build: int) -> str:
    """The group that keeps a live build up to date.

    >>> group_name("balances", 3)
    'projection.balances.b3'
    """
    return f"projection.{name}.b{build}"


def projection_of(group: str) -> str | None:
    """The projection whose group this is, None for any other.

    >>> projection_of("projection.balances.b3")
    'balances'
    """
    found = _GROUP.fullmatch(group)
    return None if found is None else found[1]


def refuse_replay(group: str) -> None:
    """Raise Unsupported for the group of a projection: folding twice into one table is no way to build it anew."""
    if (name := projection_of(group)) is not None:
        raise Unsupported(
            f"group {group!r} keeps a projection up to date: build it anew with "
            f"`trilogue projections rebuild {name} --app MODULE:APP`"
        )


def group_of(name: str, build: Build, app: str) -> Group:
    """That group; it is made by switch() and never by a worker, who may be late."""
    return Group(group_name(name, build.build), tuple(build.types), has_effects=True, app=app, start="existing")


def row_of(state: State | bytes) -> Row:
    """The row as it is kept."""
    return msgspec.json.decode(state if isinstance(state, bytes) else state.body, type=Row)


def find(tx: Transaction, name: str) -> Row:
    """The row of a projection; raises UnknownEvent."""
    body = tx.state(OWNER, name)
    if body is None:
        raise UnknownEvent(f"there is no projection {name!r} on this log: open the App that declares it once, or mend the name")
    return row_of(body)


def keep(tx: Transaction, name: str, row: Row) -> None:
    """Write the row."""
    tx.set_state(OWNER, name, msgspec.json.encode(row))


# ── declare, begin ───────────────────────────────────────────────────────────────────────────────────────────────────


def declare(tx: Transaction, projection: Projection, app: str, *, work: bool) -> None:
    """Make a new projection's first build and view; with `work`, begin the build of a newer version too. Raises BadOption for
    tables that changed without the version."""
    body = tx.state(OWNER, projection.name)
    row = Row(app) if body is None else row_of(body)
    for build in (row.live, row.next):
        _check_unchanged(projection, build)
    if body is None:
        begin(tx, projection, row, switch="auto")
    elif work:
        _begin_if_newer(tx, projection, row)


def _check_unchanged(projection: Projection, build: Build | None) -> None:
    if build is None or build.version != projection.version:
        return
    if (build.tables, build.indexes) != (dict(projection.tables), list(projection.indexes)):
        raise BadOption(
            f"projection {projection.name!r} has other tables or indexes than version {build.version} was built with: "
            f"raise it to version={build.version + 1}, and they are built anew beside the old ones"
        )


def _begin_if_newer(tx: Transaction, projection: Projection, row: Row) -> None:
    known = max((build.version for build in (row.live, row.next) if build is not None), default=0)
    if row.live is not None and tx.group_held(group_name(projection.name, row.live.build)) is None:
        row.old, row.live, known = [*row.old, row.live], None, 0  # somebody dropped its group: nothing keeps it up to date
    if known < projection.version:
        begin(tx, projection, row, switch=projection.switch)
    elif row.next is not None and row.next.state == "failed" and row.next.version == projection.version:
        row.next.state, row.next.error = "building", ""
        keep(tx, projection.name, row)


def begin(tx: Transaction, projection: Projection, row: Row, *, switch: str) -> Build:
    """Begin a build beside what is live, instead of one that is under way. Raises TwiceNamed for a table of another one."""
    name = projection.name
    _check_tables(tx, projection)
    if row.next is not None:
        _drop_tables(tx, row.next)
    head = _edge(tx, reverse=True)
    start = max(0, (_edge(tx, reverse=False) or 1) - 1)
    row.builds += 1
    build = Build(
        row.builds, projection.version, dict(projection.tables), list(projection.indexes), list(projection.types),
        start, start, tx.now_us, tx.now_us, switch=switch,
    )  # fmt: skip
    create_tables(tx, build.tables, build.indexes, build.build)
    row.next = build
    if row.live is None:
        build.switch, build.target = "auto", head
        _show(tx, name, build, row.old)
    _note_removed(tx, row, build)
    keep(tx, name, row)
    if row.live is None and start == head:
        switch_over(tx, name, row)  # nothing to fold: live at once
        drop_older(tx, name)
    return build


def _check_tables(tx: Transaction, projection: Projection) -> None:
    wanted = {table.lower(): table for table in projection.tables}
    for name, body in tx.execute("select id, body from trilogue_state where owner = ? and id <> ?", (OWNER, projection.name)):
        row = row_of(body)
        theirs = {table.lower() for build in _all(row) for table in build.tables}
        if both := wanted.keys() & theirs:
            raise TwiceNamed(
                f"projection {projection.name!r} wants the table {wanted[min(both)]!r}, which projection {name!r} of program "
                f"{row.app!r} has on this log: call one of them something else; if {name!r} was renamed, keep its name with "
                f"name={name!r}, or remove it with `trilogue projections forget {name}`"
            )


def _all(row: Row) -> list[Build]:
    return [*row.old, *(build for build in (row.live, row.next) if build is not None)]


def _note_removed(tx: Transaction, row: Row, build: Build) -> bool:
    """What was removed from the log before it was folded is missing in a build: the live one, which has it, is not replaced
    by itself. Of older records some may be left, so where the log begins does not tell. False: nothing new."""
    removed, live = max(tx.removed()[0], build.start), row.live
    if removed <= build.missing or build.start < build.position >= removed:
        return False
    build.missing = removed
    if live is not None and removed > max(live.start, live.missing):
        build.switch = "manual"
        build.note = f"records up to position {removed} were removed from the log: they are missing here; compare, then switch"
    return True


def _edge(tx: Transaction, *, reverse: bool) -> int:
    """The newest or oldest position; 0 on an empty log."""
    records = tx.read(Query(reverse=reverse, limit=1))
    return records[0].position if records else 0


def _show(tx: Transaction, name: str, build: Build, before: Sequence[Build]) -> None:
    """Let the views that readers use show a build. before: whose views are gone if it has no such table."""
    for table in {table for each in before for table in each.tables} - build.tables.keys():
        tx.execute(f"drop view if exists {table}")
    for table in build.tables:
        if tx.kind_of(table) == "table":
            raise BadOption(f"projection {name!r} cannot show {table!r}: there is a table of that name; rename one of them")
        tx.execute(f"drop view if exists {table}")
        tx.execute(_view(table, build))


def _view(table: str, build: Build) -> str:
    return f"CREATE VIEW {table} as select * from {physical(table, build.build)}"


# ── while it is built ────────────────────────────────────────────────────────────────────────────────────────────────


def advance(tx: Transaction, name: str, number: int, was: int, position: int, folded: int) -> None:
    """Move a build on by compare-and-set, with what has been folded in the same transaction. Raises Moved."""
    row, build = _building(tx, name, number, was)
    build.position, build.moved_us = position, tx.now_us
    build.folded += folded
    keep(tx, name, row)


def _building(tx: Transaction, name: str, number: int, was: int) -> tuple[Row, Build]:
    row = find(tx, name)
    if row.paused or row.next is None or row.next.build != number or row.next.state == "failed":
        raise Moved(f"build {number} of projection {name!r} is not under way any more")
    if row.next.position != was:
        raise Moved(f"build {number} of projection {name!r} is at {row.next.position}, not at {was}: somebody else builds it")
    if _note_removed(tx, row, row.next):
        keep(tx, name, row)
    return row, row.next


def fail(tx: Transaction, name: str, number: int, was: int, record: Record, error: BaseException) -> None:
    """An event cannot be folded: the build stops before it. Raises Moved."""
    row, build = _building(tx, name, number, was)
    position, kind = record.position, record.type
    said = told(error, is_personal=holds_sealed(record.data))[0][:ERROR_CHARS]
    build.state, build.failed_at = "failed", position
    build.error = (
        f"position {position} ({kind}): {said}; mend the projection and start it again, or pass the event over: "
        f"`trilogue projections skip {name} {position} --reason …`"
    )
    keep(tx, name, row)


def arrive(tx: Transaction, name: str, number: int, was: int) -> BuildState:
    """The build has reached the mark: it is ready, and switches by itself if it may. Raises Moved."""
    row, build = _building(tx, name, number, was)
    note = build.note
    if build.switch != "manual":
        refusal = _behind(tx, name, row) or _refusal(tx, name, row)
        if refusal is None:
            return switch_over(tx, name, row).state
        if isinstance(refusal, Behind):
            return build.state  # a few more came meanwhile
        note = str(refusal) if build.switch == "auto" else note
    if (build.state, build.note) != ("ready", note):
        build.state, build.note = "ready", note
        keep(tx, name, row)
    return build.state


# ── switch, drop ─────────────────────────────────────────────────────────────────────────────────────────────────────


def switch(tx: Transaction, name: str, *, force: bool, asked: int | None = None) -> Build:
    """Show the build that is ready. force: although records are held for the live one, or it is behind. asked: this build,
    maybe shown meanwhile. Raises Busy, TrilogueError."""
    row = find(tx, name)
    if row.live is not None and row.live.build == asked:
        drop_older(tx, name)
        return row.live
    if row.next is None:
        raise TrilogueError(
            f"projection {name!r} has no other build: begin one with `trilogue projections rebuild {name} --app MODULE:APP`"
        )
    if row.next.state != "ready":
        raise TrilogueError(f"build {row.next.build} of projection {name!r} is {row.next.state}, not ready: {_mend(row.next)}")
    refusal = None if force else _refusal(tx, name, row) or _behind(tx, name, row)
    if refusal is not None:
        raise refusal
    build = switch_over(tx, name, row)
    drop_older(tx, name)
    return build


def ask(tx: Transaction, name: str, asked: int | None = None) -> int | None:
    """Let who builds switch as soon as all is folded; returns the number of the build. asked: this one not any more."""
    row = find(tx, name)
    was, now = ("manual", "asked") if asked is None else ("asked", "manual")
    if row.next is None or asked not in (None, row.next.build):
        return None
    if row.next.switch == was:
        row.next.switch = now
        keep(tx, name, row)
    return row.next.build


def unfolded(tx: Transaction, name: str, row: Row, types: Sequence[str], limit: int) -> tuple[list[Record], int]:
    """What readers see and the next build has not folded, at most `limit` records, and up to where that would be all."""
    if row.live is None or row.next is None:
        return [], 0
    reached = tx.group_reached(group_name(name, row.live.build))
    return tx.read(Query(types=tuple(types), after=row.next.position, before=reached + 1, limit=limit)), reached


def _behind(tx: Transaction, name: str, row: Row) -> Behind | None:
    """Why readers would miss what they have seen already; None if they would not."""
    if row.live is None or row.next is None or tx.group_held(group_name(name, row.live.build)) is None:
        return None
    build, reached = row.next, tx.group_reached(group_name(name, row.live.build))
    # Who builds notes where it is, so it is far behind only if nobody does: no need to look whether there is anything to fold.
    if reached - build.position <= MOST_BEHIND and not unfolded(tx, name, row, build.types, 1)[0]:
        return None
    return Behind(
        f"build {build.build} of projection {name!r} has folded up to position {build.position:,}, and readers see up to "
        f"{reached:,}: let the program of version {build.version} run, which folds the rest, or force it"
    )


def _mend(build: Build) -> str:
    return build.error or "wait until it has caught up, see `trilogue projections list`"


def _refusal(tx: Transaction, name: str, row: Row) -> TrilogueError | None:
    """Why the live build cannot be left now; None if it can."""
    if row.live is None:
        return None
    group = group_name(name, row.live.build)
    ready, parked = tx.group_held(group) or (0, 0)
    if ready:
        return Busy(
            f"group {group!r} has {ready:,} records under way or to be tried again: wait until they are done, or force it"
        )
    if parked:
        return TrilogueError(
            f"group {group!r} has {parked:,} parked records, of which nothing was published: look at them with "
            f"`trilogue dead list --group {group}` and skip or redrive them, or force the switch"
        )
    return None


def switch_over(tx: Transaction, name: str, row: Row) -> Build:
    """One act: the group of the new build instead of the old one's, the views, the row."""
    build, live = row.next, row.live
    if build is None:
        raise TrilogueError(f"projection {name!r} has no build to switch to")
    instead_of = None if live is None else group_name(name, live.build)
    tx.start_group(group_of(name, build, row.app), build.position, instead_of=instead_of, paused=row.paused)
    if live is not None:
        live.state = "old"
        row.old.append(live)
    build.state, build.error, build.note = "live", "", ""
    row.live, row.next = build, None
    _show(tx, name, build, row.old)
    keep(tx, name, row)
    return build


def drop_old(tx: Transaction, name: str) -> list[int]:
    """Remove the tables of old builds; returns which."""
    return _drop(tx, name, 0)


def drop_older(tx: Transaction, name: str) -> list[int]:
    """Remove the tables of old builds, but not of the newest one; returns which."""
    return _drop(tx, name, 1)


def _drop(tx: Transaction, name: str, kept: int) -> list[int]:
    row = find(tx, name)
    gone, row.old = row.old[: len(row.old) - kept], row.old[len(row.old) - kept :]
    for old in gone:
        _drop_tables(tx, old)
    if gone:
        keep(tx, name, row)
    return [old.build for old in gone]


def forget(tx: Transaction, name: str) -> None:
    """Remove a projection: its group, views, tables, skipped events and row."""
    row = find(tx, name)
    if row.live is not None and tx.group_held(group := group_name(name, row.live.build)) is not None:
        tx.drop_group(group)
    for build in _all(row):
        for table in build.tables:
            if tx.shows(table, physical(table, build.build)):
                tx.execute(f"drop view {table}")
        _drop_tables(tx, build)
    tx.clear_states(skip_owner(name))
    tx.set_state(OWNER, name, None)


def _drop_tables(tx: Transaction, build: Build) -> None:
    for table in build.tables:
        tx.execute(f"drop table if exists {physical(table, build.build)}")


# ── pause, skip ──────────────────────────────────────────────────────────────────────────────────────────────────────


def set_paused(tx: Transaction, name: str, paused: bool) -> None:
    """Let nothing be folded, live or in a build, until it is resumed."""
    row = find(tx, name)
    row.paused = paused
    if row.live is not None:
        tx.pause_group(group_name(name, row.live.build), paused)
    keep(tx, name, row)


class Skip(msgspec.Struct):
    """An event that is passed over, with why and by whom."""

    position: int
    reason: str
    who: str | None = None
    at_us: int = 0


def skip_owner(name: str) -> str:
    """Whose state the skipped positions are. The id "" says that there are any."""
    return f"skip:{name}"


def skip(tx: Transaction, name: str, skipped: Skip) -> None:
    """Pass over one event, in this build and all others; a build that failed there goes on, a key parked there too."""
    row = find(tx, name)
    if not tx.read(Query(after=skipped.position - 1, before=skipped.position + 1, limit=1)):
        raise UnknownEvent(f"there is no record at position {skipped.position}: nothing to skip")
    tx.set_state(skip_owner(name), "", b"1")
    tx.set_state(skip_owner(name), f"{skipped.position:019d}", msgspec.json.encode(skipped))
    if row.live is not None:
        tx.drop_held(group_name(name, row.live.build), skipped.position)
    if row.next is not None and row.next.state == "failed" and row.next.failed_at == skipped.position:
        row.next.state, row.next.error, row.next.failed_at = "building", "", None
    keep(tx, name, row)


def not_skipped(name: str) -> Callable[[Transaction, Sequence[Record]], Sequence[int]]:
    """A function that says which of some records are not passed over: their places among them."""
    owner = skip_owner(name)

    def wanted(tx: Transaction, records: Sequence[Record]) -> Sequence[int]:
        if tx.state(owner, "") is None:
            return range(len(records))
        return [n for n, record in enumerate(records) if tx.state(owner, f"{record.position:019d}") is None]

    return wanted
