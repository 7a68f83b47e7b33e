"""How far every group is, counted from the tables: no counter is kept that a crash could make wrong.

lag = records the group reads, beyond the cursor of their slot, + held rows that are not dead
"""

from collections import Counter
from collections.abc import Sequence

import msgspec

from trilogue.errors import HandlerFailed, UnknownEvent
from trilogue.events import now_us
from trilogue.patterns import matches_any
from trilogue.ports import GroupStatus, Kind
from trilogue.stores.dialect import Sql, clock_us
from trilogue.stores.groups import DEAD, PARKED, READY, group_id_of
from trilogue.stores.log import Types, newest, numbers, unpack

COUNT_RECORDS = 1_000_000
# Not a join: PostgreSQL, as long as it knows nothing of a table that is new, would go through all records for each slot.
_CURSOR = "(select s.cursor from trilogue_slots s where s.group_id = ? and s.slot = r.slot)"


def groups(sql: Sql, types: Types) -> list[GroupStatus]:
    """The status of every group, by name."""
    types.load(sql)
    rows = sql.rows("select id, name, app, patterns, ordered, paused from trilogue_groups order by name")
    return [_group(sql, types, *row) for row in rows]


def _group(
    sql: Sql, types: Types, group_id: int, name: str, app: str, patterns_json: str, ordered: int, paused: int
) -> GroupStatus:
    patterns = tuple(msgspec.json.decode(patterns_json))
    behind, oldest_us = _behind(sql, types, group_id, patterns)
    held = _held(sql, group_id)
    done, failed = sql.rows(
        "select cast(sum(done) as bigint), cast(sum(failed) as bigint) from trilogue_slots where group_id = ?", (group_id,)
    )[0]
    workers, in_flight, rate = sql.rows(
        "select count(*), sum(in_flight), sum(rate) from trilogue_members where group_id = ? and lease_us >= ?",
        (group_id, clock_us(sql)),
    )[0]
    lag = behind + held["ready"]
    oldest_us = min(oldest_us or held["oldest_us"], held["oldest_us"] or oldest_us)
    return GroupStatus(
        name=name,
        app=app,
        patterns=patterns,
        ordered=bool(ordered),
        paused=bool(paused),
        workers=workers,
        lag=lag,
        lag_at_least=behind >= COUNT_RECORDS,
        lag_s=max(0, now_us() - oldest_us) / 1_000_000 if lag and oldest_us else 0.0,
        in_flight=in_flight or 0,
        retrying=held["retrying"],
        waiting=held["ready"] - held["retrying"],
        parked=held["parked"],
        dead=held["dead"],
        done=done or 0,
        failed=failed or 0,
        rate=rate or 0.0,
    )


def _behind(sql: Sql, types: Types, group_id: int, patterns: tuple[str, ...]) -> tuple[int, int]:
    """Records beyond the cursors, and when the first of them was recorded."""
    if _is_inbox(sql, group_id):
        return 0, 0
    kinds = types.matching(patterns)
    cursors = dict(sql.rows("select slot, cursor from trilogue_slots where group_id = ?", (group_id,)))
    head = newest(sql)[0]
    low = min(cursors.values(), default=head)
    if not kinds or low >= head:
        return 0, 0
    wanted = "" if len(kinds) == len(types.by_number) else f"and r.type in ({numbers(kinds)})"
    count, first = sql.rows(
        "select count(*), min(position) from (select r.position from trilogue_records r "
        f"where r.position > ? and r.position > {_CURSOR} {wanted} limit {COUNT_RECORDS}) behind",
        (low, group_id),
    )[0]
    if not count:
        return 0, 0
    return count, sql.rows("select recorded_us from trilogue_records where position = ?", (first,))[0][0]


def _is_inbox(sql: Sql, group_id: int) -> bool:
    """Whether the log of a group is a broker's: then it reads nothing of this one."""
    return bool(sql.rows("select inbox is not null from trilogue_groups where id = ?", (group_id,))[0][0])


def _next(sql: Sql, types: Types, group_id: int, patterns: Sequence[str]) -> int | None:
    """The first position a group still has to read; None if there is none. Cursors alone do not tell: those of slots in
    which nothing happens stay behind."""
    low = sql.rows(
        "select min(s.cursor) from trilogue_slots s join trilogue_groups g on g.id = s.group_id "
        "where g.id = ? and g.inbox is null",
        (group_id,),
    )[0][0]
    if low is None:  # its log is a broker's: it reads nothing of this one
        return None
    kinds = numbers(types.matching(patterns))
    rows = sql.rows(
        f"select r.position from trilogue_records r where r.position > ? and r.position > {_CURSOR} "
        f"and r.type in ({kinds}) order by r.position limit 1",
        (low, group_id),
    )
    return rows[0][0] if rows else None


class _Next(msgspec.Struct):
    position: int


class _Row(msgspec.Struct):
    """What is read here of a projection's row, which builds.py writes."""

    next: _Next | None = None


def first_needed(sql: Sql, types: Types) -> int | None:
    """The first position some group, or a build of a projection, still has to read; None if there is none."""
    types.load(sql)
    groups = sql.rows("select id, patterns from trilogue_groups")
    needed = [_next(sql, types, group_id, msgspec.json.decode(patterns)) for group_id, patterns in groups]
    builds = sql.rows("select body from trilogue_state where owner = 'projection'")
    needed += [row.next.position + 1 for (body,) in builds if (row := msgspec.json.decode(body, type=_Row)).next is not None]
    return min((position for position in needed if position is not None), default=None)


def finished_to(sql: Sql, types: Types, group: str) -> int:
    """The position up to which a group has read everything; raises UnknownEvent."""
    group_id, patterns = _known(sql, group)
    types.load(sql)
    first = _next(sql, types, group_id, patterns)
    return newest(sql)[0] if first is None else first - 1


def _held(sql: Sql, group_id: int) -> dict[str, int]:
    counts: dict[str, int] = {"ready": 0, "retrying": 0, "parked": 0, "dead": 0, "oldest_us": 0}
    for state, retrying, count in sql.rows(
        "select state, attempt > 1, count(*) from trilogue_held where group_id = ? group by 1, 2", (group_id,)
    ):
        counts[{READY: "ready", PARKED: "parked", DEAD: "dead"}[state]] += count
        counts["retrying"] += count if state == READY and retrying else 0
    if counts["ready"]:
        recorded_us, body, position = sql.rows(
            "select r.recorded_us, h.record, h.position from trilogue_held h left join trilogue_records r "
            f"on r.position = h.position and h.record is null where h.group_id = ? and h.state = {READY} "
            "order by h.position limit 1",
            (group_id,),
        )[0]
        counts["oldest_us"] = recorded_us if body is None else unpack(body, position).recorded_us
    return counts


def kinds(sql: Sql) -> list[Kind]:
    """Records ever accepted by type and version: counted with the places (log.py), and those after the last noted one."""
    newer = (
        "select t.name, t.schema_version as v, 1 from trilogue_records r join trilogue_types t on t.id = r.type "
        "where r.position > (select placed from trilogue_progress)"
    )
    both = f"select name, schema_version as v, counted as n from trilogue_types union all {newer}"
    return [
        Kind(*row)
        for row in sql.rows(f"select name, v, cast(sum(n) as bigint) from ({both}) counted group by name, v order by name, v")
    ]


def count_types(sql: Sql) -> dict[str, int]:
    """Records ever accepted, by type."""
    counts: Counter[str] = Counter()
    for kind in kinds(sql):
        counts[kind.type] += kind.count
    return dict(counts)


def orphans(sql: Sql, types: Types, app: str, names: Sequence[str]) -> list[str]:
    """Groups of an app that are not among these, have work and nobody who does it."""
    types.load(sql)
    found = []
    for group_id, name, patterns in sql.rows(
        "select id, name, patterns from trilogue_groups g where app = ? and not exists (select 1 from trilogue_members m "
        "where m.group_id = g.id and m.lease_us >= ?) order by name",
        (app, clock_us(sql)),
    ):
        if name not in names and (
            _next(sql, types, group_id, msgspec.json.decode(patterns)) is not None or _moving(sql, group_id)
        ):
            found.append(name)
    return found


def is_idle(sql: Sql, types: Types, names: Sequence[str]) -> bool:
    """Whether these groups have nothing left to do; dead and parked records and what waits behind them do not count."""
    types.load(sql)
    for name in names:
        group_id, patterns = _known(sql, name)
        if _next(sql, types, group_id, patterns) is not None or _moving(sql, group_id):
            return False
    return True


def next_due(sql: Sql, types: Types, names: Sequence[str]) -> int | None:
    """When these groups or the timers have something to do next: 0 if there is something at once, None if there is nothing.

    What is in a worker's hands counts as to be done at once; groups that are paused, and parked keys, have nothing to do.
    """
    types.load(sql)
    due = [us for (us,) in sql.rows("select min(due_us) from trilogue_timers") if us is not None]
    for name in names:
        for group_id, patterns in sql.rows("select id, patterns from trilogue_groups where name = ? and not paused", (name,)):
            if _next(sql, types, group_id, msgspec.json.decode(patterns)) is not None:
                return 0
            due += _next_held(sql, group_id)
    return min(due, default=None)


def _next_held(sql: Sql, group_id: int) -> list[int]:
    """When the first row of each held key is due, and each row without order."""
    keys = (
        "select min(position) as position from trilogue_held "
        f"where group_id = ? and key is not null and state in ({READY}, {PARKED}) group by slot, key"
    )
    first = sql.rows(
        f"select min(h.due_us) from ({keys}) f join trilogue_held h on h.group_id = ? and h.position = f.position "
        f"where h.state = {READY}",
        (group_id, group_id),
    )[0][0]
    loose = sql.rows(
        f"select min(due_us) from trilogue_held where group_id = ? and key is null and state = {READY}", (group_id,)
    )[0][0]
    return [us for us in (first, loose) if us is not None]


def _moving(sql: Sql, group_id: int) -> bool:
    rows = sql.rows(
        f"select 1 from trilogue_held h where group_id = ? and state = {READY} and (key is null or not exists (select 1 from "
        f"trilogue_held p where p.group_id = h.group_id and p.slot = h.slot and p.key = h.key and p.state = {PARKED} "
        "and p.position < h.position)) limit 1",
        (group_id,),
    )
    return bool(rows)


def handled(sql: Sql, types: Types, group: str, position: int) -> bool:
    """Whether a group has finished the record at a position."""
    group_id, patterns = _known(sql, group)
    found = sql.rows("select slot, type from trilogue_records where position = ?", (position,))
    if not found:
        raise UnknownEvent(f"there is no record at position {position}")
    slot, kind = found[0]
    if kind not in types.by_number:
        types.load(sql)
    name = types.by_number[kind][0]
    if not matches_any(patterns, name):
        raise UnknownEvent(
            f"group {group!r} does not read {name!r} (it reads {', '.join(patterns)}): waiting for it would never end"
        )
    # Both as of one moment: what moves a cursor writes the row in the same transaction.
    cursor, state, error = sql.rows(
        "select s.cursor, h.state, h.error from trilogue_slots s left join trilogue_held h on h.group_id = s.group_id "
        "and h.position = ? where s.group_id = ? and s.slot = ?",
        (position, group_id, slot),
    )[0]
    if state is not None and state != READY:
        raise HandlerFailed(f"group {group!r} gave up on position {position}: {error}; see `trilogue dead show {position}`")
    return bool(state is None and cursor >= position)


def _known(sql: Sql, name: str) -> tuple[int, tuple[str, ...]]:
    """The number and the patterns of a group; raises UnknownEvent naming those there are."""
    rows = sql.rows("select id, patterns from trilogue_groups where name = ?", (name,))
    return (rows[0][0], tuple(msgspec.json.decode(rows[0][1]))) if rows else (group_id_of(sql, name), ())
