"""What a claim reads: the log from the scan on, and held rows that are due."""

from collections.abc import Sequence
from typing import Any

from trilogue.events import Record
from trilogue.gate import NEVER_US, HeldRow
from trilogue.ports import SLOTS
from trilogue.stores.dialect import Sql
from trilogue.stores.groups import DEAD, PARKED, READY
from trilogue.stores.log import COLUMNS, Types, numbers, record_of, unpack

RUN_RECORDS = 200
SCAN_POSITIONS = 50_000
_HELD = (
    f"select h.slot, h.due_us, h.attempt, h.state, h.position, h.record, {', '.join('r.' + c for c in COLUMNS.split(', '))} "
    "from trilogue_held h left join trilogue_records r on r.position = h.position and h.record is null"
)


def scan(
    sql: Sql, types: Types, *, after: int, head: int, limit: int, slots: Sequence[int], kinds: Sequence[int]
) -> tuple[list[tuple[int, Record]], int]:
    """The next records of some slots and types, with the position up to which that is all of them.

    head: where the log ended before the types were looked at: a type that came later is not in `kinds`.
    """
    if not kinds:
        return [], head
    until = min(after + SCAN_POSITIONS, head)
    owned = "" if len(slots) == SLOTS else f" and slot in ({numbers(slots)})"
    wanted = "" if len(kinds) == len(types.by_number) else f" and type in ({numbers(kinds)})"
    rows = sql.rows(
        f"select {COLUMNS} from trilogue_records where position > ? and position <= ?{owned}{wanted} order by position limit ?",
        (after, until, limit),
    )
    records = [(row[1], record_of(sql, types, row)) for row in rows]
    return records, rows[-1][0] if len(rows) == limit else until


def held_index(
    sql: Sql, group_id: int, slots: Sequence[int], *, ordered: bool
) -> tuple[list[tuple[str, int, int]], list[tuple[int, int, int]]]:
    """Which keys are held, with slot and due time of their first row; and the due times of rows without order."""
    mine = f"group_id = ? and slot in ({numbers(slots)}) and state < {DEAD}"
    first = f"select slot, key, min(position) as position from trilogue_held where {mine} and key is not null group by slot, key"
    keys = sql.rows(
        f"select f.key, f.slot, h.state, h.due_us from ({first}) f join trilogue_held h "
        "on h.group_id = ? and h.position = f.position",
        (group_id, group_id),
    )
    loose = sql.rows(
        f"select due_us, position, slot from trilogue_held where {mine} and state = {READY}"
        + (" and key is null" if ordered else ""),
        (group_id,),
    )
    return [(key, slot, NEVER_US if state == PARKED else due) for key, slot, state, due in keys], loose


def held_after(sql: Sql, group_id: int, after: int, *, limit: int) -> list[tuple[int, int, str | None, int]]:
    """The rows (position, slot, key, due) that came to a broker's group beyond a position; NEVER_US where nobody retries."""
    rows = sql.rows(
        "select position, slot, key, state, due_us from trilogue_held where group_id = ? and position > ? "
        "order by position limit ?",
        (group_id, after, limit),
    )
    return [(position, slot, key, due if state == READY else NEVER_US) for position, slot, key, state, due in rows]


def held_of_key(sql: Sql, types: Types, group_id: int, slot: int, key: str, *, limit: int) -> list[HeldRow]:
    """The first held rows of a key, in order."""
    rows = sql.rows(
        f"{_HELD} where h.group_id = ? and h.slot = ? and h.key = ? and h.state < {DEAD} order by h.position limit ?",
        (group_id, slot, key, min(limit, RUN_RECORDS)),
    )
    return [_held_row(sql, types, row) for row in rows]


def held_of_keys(sql: Sql, types: Types, group_id: int, keys: Sequence[tuple[int, str]], *, limit: int) -> list[list[HeldRow]]:
    """The first held rows of each (slot, key), one at least of each that has any, `limit` of all."""
    found: list[list[HeldRow]] = []
    for left, (slot, name) in zip(range(len(keys) - 1, -1, -1), keys, strict=True):
        room = limit - sum(map(len, found)) - left
        found.append(held_of_key(sql, types, group_id, slot, name, limit=room))
    return found


def held_at(sql: Sql, types: Types, group_id: int, positions: Sequence[int], now_us: int) -> list[HeldRow]:
    """The held rows at these positions that are still ready, and due."""
    where = f"h.group_id = ? and h.position in ({numbers(positions)}) and h.state = {READY} and h.due_us <= ?"
    rows = sql.rows(f"{_HELD} where {where} order by h.position", (group_id, now_us))
    return [_held_row(sql, types, row) for row in rows]


def _held_row(sql: Sql, types: Types, row: Any) -> HeldRow:
    slot, due_us, attempt, state, position, body = row[:6]
    record = record_of(sql, types, row[6:]) if body is None else unpack(body, position)
    return HeldRow(record, slot, due_us, attempt, state == PARKED)
