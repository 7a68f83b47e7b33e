"""Commands that change what groups do next: `replay`, `dead redrive`, `dead drop`.

replay badge --to 2h-ago            handle again what was recorded since
dead redrive 17 --group analytics   handle a dead letter again
dead drop --all --yes               forget them all
"""

import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from cyclopts import Parameter

from trilogue import SeekTo
from trilogue.builds import refuse_replay
from trilogue.cli.load import load_app
from trilogue.cli.log import DEFAULT_LOG, GroupName, Log, check_lists_groups, find_group, group_status, near, opened
from trilogue.cli.output import note, safe, say, stamp
from trilogue.cli.show import PAGE, Position, letters_at
from trilogue.durations import microseconds
from trilogue.errors import BadOption, TrilogueError
from trilogue.events import Record, now_us
from trilogue.instances import refuse_beside
from trilogue.ports import Store

Yes = Annotated[bool, Parameter(name="--yes", help="Do not ask.")]
All = Annotated[bool, Parameter(name="--all", help="Every one: of all groups, or of the one that --group names.")]


# ── dead letters ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Choice:
    """Dead letters of one group. positions: None for all of them."""

    group: str
    positions: list[int] | None
    count: int

    def __str__(self) -> str:
        return f"{self.count:,} dead letter{'s' if self.count != 1 else ''} of group {safe(self.group)}"


async def dead_redrive(*positions: Position, group: GroupName = None, all: All = False, log: Log = DEFAULT_LOG) -> None:
    """Handle dead letters again, from their first attempt, in order per key."""
    async with opened(log) as store:
        for choice in await _chosen(store, positions, group, all):
            count = await store.redrive(choice.group, choice.positions)
            say(f"{choice}: {count:,} will be handled again")


async def dead_drop(
    *positions: Position, group: GroupName = None, all: All = False, yes: Yes = False, log: Log = DEFAULT_LOG
) -> None:
    """Forget dead letters for good; their records stay on the log."""
    async with opened(log) as store:
        choices = await _chosen(store, positions, group, all)
        if not choices:
            return
        for choice in choices:
            note(f"{choice} would be dropped")
        confirm(yes, "drop")
        for choice in choices:
            count = await store.drop_dead(choice.group, choice.positions)
            say(f"{choice}: {count:,} dropped")


async def _chosen(store: Store, positions: tuple[int, ...], group: str | None, all: bool) -> list[_Choice]:
    if not (positions or group or all):
        raise BadOption("which dead letters? give positions, --group NAME, or --all")
    if positions and all:
        raise BadOption("positions and --all contradict each other: leave one of them out")
    if group is None:
        check_lists_groups(store)
    groups = [await find_group(store, group)] if group is not None else list((await store.status()).groups)
    if positions:
        return await _at(store, group, positions)
    choices = [_Choice(each.name, None, each.dead + each.parked) for each in groups if each.dead + each.parked]
    if not choices:
        say("no dead letters")
    return choices


async def _at(store: Store, group: str | None, positions: tuple[int, ...]) -> list[_Choice]:
    places: dict[str, list[int]] = {}
    for position in sorted(set(positions)):
        for letter in await letters_at(store, group, position):
            places.setdefault(letter.group, []).append(position)
    if len(places) > 1:
        names = ", ".join(sorted(places))
        raise BadOption(f"these are dead letters of several groups: add --group with one of {names}")
    return [_Choice(name, found, len(found)) for name, found in places.items()]


def confirm(yes: bool, what: str) -> None:
    """Raise unless --yes was given or somebody at the terminal says so."""
    if yes:
        return
    if not (sys.stdin is not None and sys.stdin.isatty()):
        raise BadOption(f"nothing was done: add --yes to {what} without being asked")
    print(f"{what}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise TrilogueError("nothing was done")


# ── replay ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_AGO = re.compile(r"(.+)-ago")


async def replay(
    group: Annotated[str, Parameter(help="As `status` shows it.")],
    /,
    *,
    to: Annotated[str, Parameter(help="beginning, now, a position, a time as 2026-01-31T12:00Z, or 2h-ago.")],
    into: Annotated[str | None, Parameter(help="Leave the group alone and start this new one there.")] = None,
    emits: Annotated[bool, Parameter(help="Publish again what the handlers emit.")] = False,
    app: Annotated[str | None, Parameter(help="MODULE:APP, where the group writes through `db`: resets it.")] = None,
    yes: Yes = False,
    log: Log = DEFAULT_LOG,
) -> None:
    """Have a group handle again what it has handled, from a place on the log."""
    target = seek_to(to, now_us())
    async with _replayable(app, log) as (store, seek):
        if into is not None or app is None:
            await refuse_beside(store, group)
        is_on_a_broker = await _check_replay(store, group, target, into, yes)
        after = await seek(group, target, into=into, emits=emits)
        head = (await store.status()).head
    what = f"up to {head - after:,} records, from position {after + 1:,}" if head > after else "what comes next"
    if is_on_a_broker:
        what = "what comes next" if target.end == "now" else f"everything from {'the beginning' if target.end else to} on"
    say(f"group {safe(into or group)} will handle {safe(what)}")


@asynccontextmanager
async def _replayable(spec: str | None, log: Log) -> AsyncIterator[tuple[Store, Callable[..., Awaitable[int]]]]:
    """The store, and what seeks in it: the App where there is one, because it knows how to reset a group's tables."""
    if spec is None:
        async with opened(log) as store:
            yield store, store.seek
        return
    app = load_app(spec)
    async with app:
        yield app.store, app.replay


async def _check_replay(store: Store, group: str, target: SeekTo, into: str | None, yes: bool) -> bool:
    """Refuse what would fail, ask before something is forgotten; whether the group reads a broker, whose places are offsets."""
    refuse_replay(group)
    status = await store.status()
    is_on_a_broker = bool(group_status(status, group).lanes)
    if target.position is not None and not is_on_a_broker and not status.oldest <= target.position <= status.head + 1:
        raise BadOption(f"--to {target.position} is not on the log: expected {status.oldest} to {status.head + 1}")
    if into is not None:
        return is_on_a_broker
    lost = await _dead_before(store, group, target)
    if lost:
        note(f"{_Choice(group, None, lost)} would be forgotten without being handled again")
        confirm(yes, "replay")
    return is_on_a_broker


async def _dead_before(store: Store, group: str, target: SeekTo) -> int:
    """How many dead letters of a group a seek forgets without handling them again."""
    count = after = 0
    while letters := await store.dead(group, after=after, limit=PAGE):
        count += sum(_is_before(letter.record, target) for letter in letters)
        after = letters[-1].record.position
    return count


def _is_before(record: Record, target: SeekTo) -> bool:
    if target.position is not None:
        offset = (record.extensions or {}).get("offset")  # of one that came from a broker
        return (record.position if offset is None else int(offset)) < target.position
    if target.time_us is not None:
        return record.recorded_us < target.time_us
    return target.end == "now"


def seek_to(text: str, now_us: int) -> SeekTo:
    """The place that `--to` names; raises BadOption.

    text: beginning, now, a position, an ISO 8601 time (UTC unless it says otherwise), or a duration and `-ago`.

    >>> seek_to("17", now_us=0).position
    17
    """
    if text == "beginning":
        return SeekTo(end="beginning")
    if text == "now":
        return SeekTo(end="now")
    if text.isascii() and text.isdecimal():
        return SeekTo(position=int(text))
    if ago := _AGO.fullmatch(text):
        return SeekTo(time_us=now_us - microseconds(ago[1]))
    return SeekTo(time_us=_time_us(text, now_us))


def _time_us(text: str, now_us: int) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        question = near(text, ("beginning", "now"))
        raise BadOption(
            f"--to {text!r} is not understood:{question} expected beginning, now, a position, "
            "a time as 2026-01-31T12:00Z, or a duration as 2h-ago"
        ) from error
    us = round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)
    if us > now_us:
        raise BadOption(f"--to {text!r} lies in the future: expected a time up to {stamp(now_us)}")
    return us
