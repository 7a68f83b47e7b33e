"""`groups` and `pause`, `resume`: who reads the log, how far they are, and what becomes of them.

group    app   state      cursor  lag  held  dead  done   reads
badge    shop  2 at work  41,210    3     0     0  9,001  video.watched

groups rename shop.bill billing     the function has moved: its group gets the name it has now
groups drop old-name --yes          a group whose handler is gone
pause badge                         lend it nothing, in no process, until `resume badge`
"""

from typing import Annotated, Any

from cyclopts import Parameter

from trilogue.brokers import is_broker
from trilogue.builds import projection_of
from trilogue.cli.act import Yes, confirm
from trilogue.cli.log import DEFAULT_LOG, Json, Log, check_lists_groups, find_group, opened
from trilogue.cli.output import note, safe, say, say_json, say_table
from trilogue.cli.show import state_of
from trilogue.errors import BadOption, TrilogueError, Unsupported
from trilogue.handlers import NAME_CHARS
from trilogue.instances import renamed
from trilogue.ports import Feature, GroupStatus, Store, Transaction

Name = Annotated[str, Parameter(help="As `status` shows it.")]


async def groups_list(*, json: Json = False, log: Log = DEFAULT_LOG) -> None:
    """List every group: what it reads, how far it is, what it holds back, who works for it."""
    async with opened(log) as store:
        check_lists_groups(store)
        found = [(each, await _cursor(store, each.name)) for each in (await store.status()).groups]
    if json:
        say_json([_fields(each, cursor) for each, cursor in found])
    elif not found:
        say("no groups yet: start handlers with `trilogue run MODULE:APP`")
    else:
        columns = ("group", "app", "state", "order", "cursor", "lag", "held", "dead", "done", "reads")
        say_table(columns, [_row(each, cursor) for each, cursor in found])


async def _cursor(store: Store, group: str) -> int | None:
    """Where a group stands; None where that is no one position."""
    return await store.finished_to(group) if Feature.HISTORY in store.features else None


def _fields(group: GroupStatus, cursor: int | None) -> dict[str, Any]:
    return {
        "group": group.name,
        "app": group.app,
        "patterns": list(group.patterns),
        "order": "per key" if group.ordered else "any",
        "paused": group.paused,
        "workers": group.workers,
        "cursor": cursor,
        "lag": group.lag,
        "lag_at_least": group.lag_at_least,
        "held": group.retrying + group.waiting,
        "parked": group.parked,
        "dead": group.dead,
        "done": group.done,
        "failed": group.failed,
    }


def _row(group: GroupStatus, cursor: int | None) -> tuple[str | int | float, ...]:
    parked = f" ({group.parked:,} parked)" if group.parked else ""
    return (
        group.name,
        group.app,
        state_of(group),
        "per key" if group.ordered else "any",
        "-" if cursor is None else f"{cursor:,}",
        f"{group.lag:,}{'+' if group.lag_at_least else ''}",
        group.retrying + group.waiting,
        f"{group.dead + group.parked:,}{parked}",
        group.done,
        ", ".join(group.patterns) or "-",
    )


async def groups_rename(
    old: Name,
    new: Annotated[str, Parameter(help="The name that its handler has now.")],
    /,
    *,
    log: Log = DEFAULT_LOG,
) -> None:
    """Give a group another name: its place on the log and what it holds go along. Its processes have to be stopped."""
    if not 0 < len(new) <= NAME_CHARS or not new.isprintable():
        raise BadOption(f"group {new!r}: expected 1 to {NAME_CHARS} printable characters")
    if is_broker(log.url):
        raise Unsupported(_how_on_a_broker(log.url, old, new))
    _refuse_projection(old, "a new build gives it its next one")
    async with opened(log) as store:
        _at_rest(await find_group(store, old))
        await store.transact(lambda tx: _rename(tx, old, new))
    say(f"group {safe(old)}: is {safe(new)} now")


def _rename(tx: Transaction, old: str, new: str) -> None:
    tx.rename_group(old, new)
    renamed(tx, old, new)


def _how_on_a_broker(url: str, old: str, new: str) -> str:
    if url.startswith("kafka"):
        return (
            f"a consumer group has its name for good: stop its processes, export the offsets of {old!r} with "
            f"`kafka-consumer-groups.sh --reset-offsets --to-current --export`, set those of {new!r} from that file "
            f"(`--from-file`), then `trilogue groups drop {old}`"
        )
    return (
        f"a queue has its name for good: start the handler as group {new!r}, let one with group={old!r} run beside it until "
        f"`trilogue status` shows that nothing is left there, then `trilogue groups drop {old}`"
    )


async def groups_drop(group: Name, /, *, yes: Yes = False, log: Log = DEFAULT_LOG) -> None:
    """Forget a group: its place on the log and its dead letters. What it wrote and the log itself stay."""
    async with opened(log) as store:
        there = await find_group(store, group)
        _at_rest(there)
        note(f"group {safe(group)} would be dropped: lag {there.lag:,}, dead letters {there.dead + there.parked:,}")
        confirm(yes, "drop")
        await store.drop_group(group)
    say(f"group {safe(group)}: dropped")


def _at_rest(group: GroupStatus) -> None:
    if group.workers:
        raise TrilogueError(f"group {group.name!r} is at work in {group.workers} processes: stop them first")


async def pause(group: Name, /, *, log: Log = DEFAULT_LOG) -> None:
    """Lend a group nothing until `resume`, in no process; what is being handled is finished. Survives restarts."""
    _refuse_projection(group, f"use `trilogue projections pause {projection_of(group)}`")
    async with opened(log) as store:
        there = await find_group(store, group)
        await store.pause(group)
    say(f"group {safe(group)}: paused{' already' if there.paused else ''}")


async def resume(group: Name, /, *, log: Log = DEFAULT_LOG) -> None:
    """Let a paused group go on."""
    _refuse_projection(group, f"use `trilogue projections resume {projection_of(group)}`")
    async with opened(log) as store:
        there = await find_group(store, group)
        await store.resume(group)
    say(f"group {safe(group)}: {'goes on' if there.paused else 'was not paused'}")


def _refuse_projection(group: str, mend: str) -> None:
    if projection_of(group) is not None:
        raise Unsupported(f"group {group!r} belongs to projection {projection_of(group)!r}: {mend}")
