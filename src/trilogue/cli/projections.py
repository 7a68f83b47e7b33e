"""`projections`: the read models of a log, and building them anew beside themselves.

name      build  version  state     position     lag  rate    eta
balances  3      2        live     1,200,000       0  0.0     -
          4      3        building   410,000  790,000  98,000  8.1s
"""

import asyncio
import os
from collections.abc import Awaitable
from dataclasses import asdict, replace
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from trilogue import projections as models
from trilogue.cli.act import Yes, confirm
from trilogue.cli.load import load_app
from trilogue.cli.log import DEFAULT_LOG, Json, Log, near, opened
from trilogue.cli.output import Advance, note, progress, safe, say, say_json, say_table, shown
from trilogue.durations import readable
from trilogue.errors import TrilogueError, UnknownEvent
from trilogue.ports import Store
from trilogue.projections import BuildStatus, Comparison, ProjectionStatus

LOOK_S = 0.2
Name = Annotated[str, Parameter(help="As `projections list` shows it.")]
AppSpec = Annotated[str, Parameter(name="--app", help="MODULE:APP, whose projection it is.")]
Wait = Annotated[bool, Parameter(name="--wait", help="Build it here, and return when it is ready.")]
Force = Annotated[bool, Parameter(name="--force", help="Although it is behind, or records are parked, so nothing was published.")]
Sample = Annotated[int, Parameter(validator=Number(gte=0, lte=1_000), help="Show at most so many rows of each side.")]
At = Annotated[int, Parameter(validator=Number(gte=1, lte=2**63 - 1), help="As the error of the build says.")]
Reason = Annotated[str, Parameter(name="--reason", help="Why; kept with it.")]
Who = Annotated[str | None, Parameter(name="--who", help="Who says so; the user of this process if not given.")]


async def projections_list(*, json: Json = False, log: Log = DEFAULT_LOG) -> None:
    """Every projection with its builds: how far, how fast, what is wrong."""
    async with opened(log) as store:
        found = await models.statuses(store)
    if json:
        say_json([_fields(each) for each in found])
        return
    if not found:
        say("no projections")
        return
    columns = ("name", "build", "version", "state", "position", "lag", "rate", "eta")
    say_table(columns, [_row(each, build) for each in found for build in each.builds])
    for each in found:
        _say_remarks(each)


def _row(status: ProjectionStatus, build: BuildStatus) -> tuple[str | int | float, ...]:
    state = f"{build.state} (paused)" if status.paused and build.state != "old" else build.state
    eta = "-" if build.eta_s is None or not build.lag else readable(build.eta_s * 1_000_000)
    return (status.name, build.build, build.version, state, build.position, build.lag, build.rate, eta)


def _say_remarks(status: ProjectionStatus) -> None:
    for build in status.builds:
        for text in filter(None, (build.error, build.note)):
            say(f"{safe(status.name)}, build {build.build}: {safe(text)}")
    for skipped in status.skipped:
        by = f" by {safe(skipped.who)}" if skipped.who else ""
        say(f"{safe(status.name)}: position {skipped.position} is skipped{by}: {safe(skipped.reason)}")


def _fields(status: ProjectionStatus) -> dict[str, Any]:
    return asdict(status) | {"skipped": [msgspec.structs.asdict(each) for each in status.skipped]}


# ── build, compare, switch ───────────────────────────────────────────────────────────────────────────────────────────


async def projections_rebuild(name: Name, /, *, app: AppSpec, wait: Wait = False) -> int:
    """Build a projection anew beside the live one; `switch` shows it."""
    loaded = load_app(app)
    async with loaded:
        number = await loaded.rebuild(name)
        if not wait:
            say(f"projection {safe(name)}: build {number} begins as soon as its App runs; `projections list` shows how far it is")
            return 0
        await _while_shown(models.build_here(loaded.store, loaded.declared, name), loaded.store, name)
        status = await _status(loaded.store, name)
    if status.error:
        raise TrilogueError(status.error)
    say(f"projection {safe(name)}: build {number} is {status.state}, up to position {status.position:,}")
    return 0


async def _while_shown(work: Awaitable[None], store: Store, name: str) -> None:
    """Do it, with a progress bar on a terminal."""
    task = asyncio.ensure_future(work)
    try:
        with progress(f"building {safe(name)}", (await _status(store, name)).head) as advance:
            done = 0
            while not task.done():
                await asyncio.wait([task], timeout=LOOK_S)
                done = await _advanced(store, name, done, advance)
        await task
    finally:
        task.cancel()


async def _advanced(store: Store, name: str, done: int, advance: Advance) -> int:
    position = (await _status(store, name)).position
    advance(position - done)
    return position


async def _status(store: Store, name: str) -> ProjectionStatus:
    found = await models.statuses(store)
    for each in found:
        if each.name == name:
            return each
    raise UnknownEvent(f"there is no projection {name!r} on this log:{near(name, [each.name for each in found])}".rstrip(":"))


async def projections_compare(name: Name, /, *, sample: Sample = 5, json: Json = False, log: Log = DEFAULT_LOG) -> int:
    """What differs between the live build and the next one; exit code 1 if anything does."""
    async with opened(log) as store:
        status = await _status(store, name)
        found = await models.compare(store, name, sample=sample)
    if json:
        say_json([_plain(each) for each in found])
    else:
        if status.lag:
            note(f"the next build is {status.lag:,} positions behind: what differs may be what it has not folded yet")
        columns = ("table", "live", "next", "only live", "only next")
        say_table(columns, [(each.table, each.live, each.next, each.only_live, each.only_next) for each in found])
        for each in found:
            for which, row in each.sample:
                say(f"{safe(each.table)}, only {which}: {shown(repr(row).encode())}")
    return int(any(each.only_live or each.only_next or each.live != each.next for each in found))


def _plain(comparison: Comparison) -> dict[str, Any]:
    rows = [(which, [v.hex() if isinstance(v, bytes) else v for v in row]) for which, row in comparison.sample]
    return asdict(replace(comparison, sample=[])) | {"sample": rows}


async def projections_switch(name: Name, /, *, force: Force = False, log: Log = DEFAULT_LOG) -> None:
    """Show readers the build that is ready, from one moment to the next."""
    async with opened(log) as store:
        await _status(store, name)
        number = await models.switch(store, name, force=force)
    say(f"projection {safe(name)}: build {number} is live")


async def projections_drop(name: Name, /, *, yes: Yes = False, log: Log = DEFAULT_LOG) -> None:
    """Remove the tables of the build before the live one."""
    async with opened(log) as store:
        old = [each.build for each in (await _status(store, name)).builds if each.state == "old"]
        if not old:
            say(f"projection {safe(name)}: no old build")
            return
        note(f"projection {safe(name)}: the tables of build {', '.join(map(str, old))} would be dropped")
        confirm(yes, "drop")
        gone = await models.drop_old(store, name)
    say(f"projection {safe(name)}: build {', '.join(map(str, gone))} dropped")


async def projections_forget(name: Name, /, *, yes: Yes = False, log: Log = DEFAULT_LOG) -> None:
    """Remove a projection that no program declares any more: its tables, views and group."""
    async with opened(log) as store:
        status = await _status(store, name)
        numbers = ", ".join(str(each.build) for each in status.builds)
        note(f"projection {safe(name)} of {safe(status.app)} would be removed, with the tables of build {numbers}")
        confirm(yes, "forget")
        await models.forget(store, name)
    say(f"projection {safe(name)}: forgotten")


# ── pause, skip ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def projections_pause(name: Name, /, *, log: Log = DEFAULT_LOG) -> None:
    """Let a projection fold nothing, live or in a build, until `resume`."""
    await _set_paused(name, log, True)


async def projections_resume(name: Name, /, *, log: Log = DEFAULT_LOG) -> None:
    """Let a paused projection go on."""
    await _set_paused(name, log, False)


async def _set_paused(name: str, log: Log, paused: bool) -> None:
    async with opened(log) as store:
        await _status(store, name)
        await models.set_paused(store, name, paused)
    say(f"projection {safe(name)}: {'paused' if paused else 'goes on'}")


async def projections_skip(name: Name, position: At, /, *, reason: Reason, who: Who = None, log: Log = DEFAULT_LOG) -> None:
    """Pass over one event, now and in every build to come."""
    async with opened(log) as store:
        await _status(store, name)
        await models.skip(store, name, position, reason, who=who or os.environ.get("USER"))
    say(f"projection {safe(name)}: position {position:,} is passed over")
