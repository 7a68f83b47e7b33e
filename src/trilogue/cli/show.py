"""Commands that only look: `tail`, `status`, `dead list`, `dead show`.

12  2026-11-22T15:09:38.123Z  video.watched  u1  {"user":"u1","video":"v9"}      tail
group      lag  in flight  retrying  …                                           status
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, replace
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from trilogue.cli.load import load_app
from trilogue.cli.log import DEFAULT_LOG, GroupName, Json, Log, check_lists_groups, find_group, opened, type_question
from trilogue.cli.output import (
    clear_screen,
    flush,
    note,
    record_fields,
    safe,
    safe_lines,
    say,
    say_cloudevent,
    say_json,
    say_table,
    shown,
    stamp,
)
from trilogue.codec import Coder
from trilogue.durations import readable
from trilogue.errors import DecodeError, TrilogueError
from trilogue.events import Record
from trilogue.patterns import check_pattern, is_wild
from trilogue.ports import DeadLetter, Feature, GroupStatus, LaneStatus, Query, Status, Store
from trilogue.schema.stored import in_todays_form

PAGE = 1_000
LATEST = 10
SHOWN_DEAD, MOST_DEAD = 100, 10_000
WATCH_S = 1.0
MOST = 2**63 - 1

Position = Annotated[int, Parameter(validator=Number(gte=1, lte=MOST), help="As `dead list` shows it.")]
After = Annotated[int, Parameter(validator=Number(gte=0, lte=MOST), help="Only what stands behind this position.")]
Limit = Annotated[int, Parameter(validator=Number(gte=1, lte=10**9))]


# ── tail ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def tail(
    pattern: Annotated[str, Parameter(help="Which types, as `video.*` or `video.#`; all of them if not given.")] = "#",
    /,
    *,
    after: After | None = None,
    key: Annotated[str | None, Parameter(help="Only records of this key.")] = None,
    limit: Annotated[Limit | None, Parameter(help="End after this many; without --after these are the newest.")] = None,
    follow: Annotated[bool, Parameter(name="--follow", negative="--no-follow", help="Wait for more.")] = True,
    app: Annotated[str | None, Parameter(help="MODULE:APP: as its classes are today; with --json, CloudEvents.")] = None,
    json: Json = False,
    log: Log = DEFAULT_LOG,
) -> int:
    """Print the newest ten records, or those behind --after, and go on with what comes."""
    query = Query(types=(check_pattern(pattern),), key=key)
    printer = _Printer(None if app is None else load_app(app).known, json)
    async with opened(log) as store:
        if Feature.HISTORY not in store.features:
            note("what is published goes to the broker: this is the log of the store beside it")
        if not is_wild(pattern) and (question := await type_question(store, pattern)) is not None:
            note(f"no record has type {pattern!r} so far:{question}".rstrip(":"))
        start = after if after is not None else await _before_newest(store, query, limit or LATEST)
        left = limit
        async for page in _pages(store, replace(query, after=start), follow=follow):
            for record in page[:left]:
                printer.say(record)
            flush()
            left = None if left is None else left - len(page)
            if left is not None and left <= 0:
                break
    return int(printer.failed > 0)


async def _pages(store: Store, query: Query, *, follow: bool) -> AsyncIterator[list[Record]]:
    while True:
        # Up to the head as it is now, and next time from there: a rare type does not have the log read again and again.
        head = await _head(store)
        while page := await store.read(replace(query, before=head + 1, limit=PAGE)):
            yield page
            query = replace(query, after=page[-1].position)
        if not follow:
            return
        query = replace(query, after=max(head, query.after))
        await store.changed(WATCH_S)


async def _head(store: Store) -> int:
    newest = await store.read(Query(reverse=True, limit=1))
    return newest[0].position if newest else 0


async def _before_newest(store: Store, query: Query, count: int) -> int:
    """The position behind which the newest `count` records of the query begin."""
    before: int | None = None
    while count > 0:
        page = await store.read(replace(query, reverse=True, before=before, limit=min(count, PAGE)))
        if not page:
            break
        before = page[-1].position
        count -= len(page)
    return await _head(store) if before is None else before - 1


class _Printer:
    """Prints records as they are stored, or with coders as their classes are today; failed: how many could not be made so."""

    def __init__(self, coders: Mapping[str, Coder] | None, json: bool) -> None:
        self.coders, self.json, self.failed = coders, json, 0

    def say(self, record: Record) -> None:
        if self.coders is not None:
            record = self._todays(record, self.coders)
        if not self.json:
            key = "-" if record.key is None else safe(record.key)
            say(f"{record.position}  {stamp(record.recorded_us)}  {safe(record.type)}  {key}  {shown(record.data)}")
        elif self.coders is None:
            say_json(record_fields(record), line=True)
        else:
            say_cloudevent(record)

    def _todays(self, record: Record, coders: Mapping[str, Coder]) -> Record:
        try:
            return in_todays_form(record, coders)
        except DecodeError as error:
            self.failed += 1
            note(f"position {record.position} is shown as stored: {safe(str(error))}")
            return record


# ── status ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def status(
    *,
    watch: Annotated[bool, Parameter(help="Print it again every second.")] = False,
    json: Json = False,
    log: Log = DEFAULT_LOG,
) -> None:
    """Print how far each group is, what it holds back, and what the log contains."""
    async with opened(log) as store:
        while True:
            now = await store.status()
            if json:
                say_json(status_fields(now), line=watch)
            else:
                _say_status(now, _where(store), clear=watch)
            flush()
            if not watch:
                return
            await asyncio.sleep(WATCH_S)


def status_fields(status: Status) -> dict[str, Any]:
    """A Status for JSON."""
    return {
        "url": status.url,
        "head": status.head,
        "oldest": status.oldest,
        "timers": status.timers,
        "bytes": status.bytes,
        "types": dict(status.types),
        "groups": [asdict(replace(group, lanes=list(group.lanes))) for group in status.groups],
    }


def _where(store: Store) -> str | None:
    """Whose records a status counts, if not those of the URL; None where there are none to count."""
    if Feature.HISTORY in store.features:
        return ""
    return "beside it the store's own log, " if Feature.EFFECTS in store.features else None


def _say_status(status: Status, where: str | None, *, clear: bool) -> None:
    if clear:
        clear_screen()
    records = f"records {status.oldest:,} to {status.head:,}" if status.head else "no records"
    timers = f", {status.timers:,} timers" if status.timers else ""
    say(safe(status.url) + ("\n" if where is None else f": {where}{records}, {size(status.bytes)}{timers}\n"))
    if status.types:
        most_first = sorted(status.types.items(), key=lambda each: -each[1])
        say_table(("type", "records"), most_first)
        say("")
    if not status.groups:
        say("no groups yet: start handlers with `trilogue run MODULE:APP`")
        return
    rows = [_group_row(group) for group in status.groups]
    # What no group has is left out, so that a healthy log's table fits into 80 columns.
    columns = [name for name in rows[0] if name not in _ONLY_IF_ANY or any(row[name] for row in rows)]
    say_table(columns, [[row[name] for name in columns] for row in rows])
    if lanes := [_lane_row(group, lane) for group in status.groups for lane in group.lanes if lane.lag and lane.next is not None]:
        say("")
        say_table(("group", "partition", "lag", "next", "in flight", "stalled"), lanes)


def _lane_row(group: GroupStatus, lane: LaneStatus) -> tuple[str | int, ...]:
    stalled = readable(round(lane.stalled_s) * 1_000_000) if lane.stalled_s >= 1 else "-"
    return (group.name, lane.name, lane.lag or 0, lane.next or 0, lane.in_flight, stalled)


_ONLY_IF_ANY = ("in flight", "retrying", "waiting", "parked")


def _group_row(group: GroupStatus) -> dict[str, str | int | float]:
    return {
        "group": group.name,
        "state": state_of(group),
        "lag": f"{group.lag:,}+" if group.lag_at_least else group.lag,
        "behind": readable(group.lag_s * 1_000_000) if group.lag else "-",
        "in flight": group.in_flight,
        "retrying": group.retrying,
        "waiting": group.waiting,
        "parked": group.parked,
        "dead": group.dead,
        "done": group.done,
        "per s": group.rate,
    }


def state_of(group: GroupStatus) -> str:
    """Who works for a group, in a word or two."""
    if group.paused:
        return "paused"
    return f"{group.workers} at work" if group.workers else "no worker"


def size(count: int) -> str:
    """A number of bytes for people.

    >>> size(4_200_000)
    '4.2 MB'
    """
    amount = float(count)
    units = ["TB", "GB", "MB", "kB", "bytes"]
    while amount >= 1_000 and len(units) > 1:
        amount /= 1_000
        units.pop()
    return f"{amount:,.0f} {units[-1]}" if amount >= 100 else f"{amount:.3g} {units[-1]}"


# ── dead letters ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def dead_list(
    *,
    group: GroupName = None,
    after: After = 0,
    limit: Annotated[int, Parameter(validator=Number(gte=1, lte=MOST_DEAD), help="At most this many.")] = SHOWN_DEAD,
    json: Json = False,
    log: Log = DEFAULT_LOG,
) -> None:
    """List the records that groups gave up on."""
    async with opened(log) as store:
        if group is None:
            check_lists_groups(store)
        else:
            await find_group(store, group)
        letters = await store.dead(group, after=after, limit=limit)
    if json:
        say_json([_letter_fields(letter) for letter in letters])
        return
    if not letters:
        say("no dead letters")
        return
    say_table(_LETTER_COLUMNS, [_letter_row(letter) for letter in letters])
    if len(letters) == limit:
        # Of several groups' letters at the last position, some may be left: begin there again.
        last = letters[-1].record.position - (group is None)
        note(f"the first {limit:,} are shown: go on with --after {last}, or raise --limit")


async def dead_show(position: Position, /, *, group: GroupName = None, json: Json = False, log: Log = DEFAULT_LOG) -> None:
    """Show one dead letter whole: its payload, the error and where it was raised."""
    async with opened(log) as store:
        if group is not None:
            await find_group(store, group)
        letter = _only(await letters_at(store, group, position), position)
    if json:
        say_json(_letter_fields(letter))
    else:
        _say_letter(letter)


async def letters_at(store: Store, group: str | None, position: int) -> list[DeadLetter]:
    """The dead letters at one position: one per group that gave up on it. Raises TrilogueError if there is none."""
    letters = await store.dead(group, after=position - 1, limit=PAGE)
    found = [letter for letter in letters if letter.record.position == position]
    if found:
        return found
    whose = f" of group {group!r}" if group else ""
    raise TrilogueError(f"position {position} is no dead letter{whose}: see `trilogue dead list`")


def _only(letters: list[DeadLetter], position: int) -> DeadLetter:
    if len(letters) == 1:
        return letters[0]
    names = ", ".join(letter.group for letter in letters)
    raise TrilogueError(f"position {position} is a dead letter of several groups: add --group with one of {names}")


_LETTER_COLUMNS = ("position", "group", "type", "key", "attempts", "died", "error")


def _letter_row(letter: DeadLetter) -> tuple[str | int, ...]:
    record = letter.record
    died = stamp(letter.died_us) + (" parked" if letter.parked else "")
    error = (letter.error.splitlines() or [""])[0]
    return (str(record.position), letter.group, record.type, record.key or "-", letter.attempts, died, error)


def _letter_fields(letter: DeadLetter) -> dict[str, Any]:
    return {
        "group": letter.group,
        "attempts": letter.attempts,
        "error": letter.error,
        "traceback": letter.traceback,
        "died": stamp(letter.died_us),
        "parked": letter.parked,
        **record_fields(letter.record),
    }


def _say_letter(letter: DeadLetter) -> None:
    fields = _letter_fields(letter)
    for name in ("data", "data_base64", "error", "traceback", "parked"):
        fields.pop(name, None)
    for name, value in fields.items():
        say(f"{name}: {safe(str(value))}")
    say(f"parked: {'its key waits for redrive or drop' if letter.parked else 'no'}")
    say(f"\npayload ({len(letter.record.data):,} bytes):\n{shown(letter.record.data)}")
    say(f"\nerror: {safe_lines(letter.error)}")
    if letter.traceback:
        say(f"\n{safe_lines(letter.traceback)}")
