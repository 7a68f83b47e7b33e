"""Retention: old records go, but not what somebody still needs. A window of the log at a time, so that publishing goes on.

trilogue_state  owner "retention", id "removed"
[17000, 1760000000000000]      position and recorded time of the newest record that was removed: the log is whole only after it,
                               whatever older records have stayed
"""

from typing import Any

import msgspec

from trilogue.events import now_us
from trilogue.stores.log import newest, numbers, position_at
from trilogue.stores.writer import Sql

OWNER, REMOVED = "retention", "removed"
TRIM_RECORDS = 5_000
WINDOW = 50_000

# The newest record of a stream stays whatever is asked: its version counts on.
_NEWER = "exists (select 1 from trilogue_records n where n.stream = r.stream and n.version > r.version)"
_HIDDEN = (
    "exists (select 1 from trilogue_state s where s.owner = 'stream' and s.id = r.stream "
    "and r.version < json_extract(cast(s.body as text), '$.first'))"
)
_UNTAGGED = "(more is null or coalesce(json_array_length(cast(more as text), '$[3]'), 0) = 0)"
_HELD = (
    "exists (select 1 from trilogue_groups g join trilogue_held h on h.group_id = g.id and h.position = r.position "
    "where g.inbox is null)"
)


def floor_of(sql: Sql, *, before_us: int | None, keep: int | None, needed: int | None) -> int:
    """The first position that stays. needed: the first one some group still has to read."""
    floor = newest(sql)[0]  # the newest record always stays: its position counts on
    if keep is not None:
        floor = min(floor, floor - keep + 1)
    if before_us is not None:
        floor = min(floor, position_at(sql, before_us))
    return floor if needed is None else min(floor, needed)


def removed(sql: Sql) -> tuple[int, int]:
    """Position and recorded time of the newest record that was removed; (0, 0) if none was."""
    rows = sql.rows("select body from trilogue_state where owner = ? and id = ?", (OWNER, REMOVED))
    return msgspec.json.decode(rows[0][0], type=tuple[int, int]) if rows else (0, 0)


def trim(sql: Sql, start: int, floor: int, *, force: bool, streams: bool) -> tuple[int, int]:
    """Remove what may go of a window from `start` on; returns how many went, and where the next window begins."""
    # What decisions rest on stays unless asked for: streams, and whatever carries tags.
    may_go = f"(stream is null or {_NEWER})" if streams else f"(stream is null or ({_NEWER} and {_HIDDEN})) and {_UNTAGGED}"
    held = "" if force else f"and not {_HELD}"
    until = min(floor, start + WINDOW)
    rows = sql.rows(
        "select position, slot, correlation, more, recorded_us from trilogue_records r where position >= ? and position < ? "
        f"{held} and {may_go} order by position limit ?",
        (start, until, TRIM_RECORDS),
    )
    _remove(sql, rows, force=force)
    if rows:
        _note_removed(sql, rows[-1][0], rows[-1][4])
    return len(rows), rows[-1][0] + 1 if len(rows) == TRIM_RECORDS else until


def _remove(sql: Sql, rows: list[Any], *, force: bool) -> None:
    if force:  # what is held of a record that is gone could never be handed out again, nor be finished
        gone = numbers(row[0] for row in rows)
        sql.rows(f"delete from trilogue_held where record is null and position in ({gone})")
    sql.many("delete from trilogue_places where slot = ? and position = ?", [(slot, position) for position, slot, *_ in rows])
    traces = [(correlation, position) for position, _, correlation, *_ in rows if correlation is not None]
    sql.many("delete from trilogue_traces where correlation = ? and position = ?", traces)
    tags = [(tag, row[0]) for row in rows if row[3] for tag in _tags(row[3])]
    sql.many("delete from trilogue_tags where tag = ? and position = ?", tags)
    sql.many("delete from trilogue_records where position = ?", [(row[0],) for row in rows])


def _note_removed(sql: Sql, position: int, recorded_us: int) -> None:
    """In the transaction that removes: whoever starts from the log must know, and see it, from then on."""
    if position > removed(sql)[0]:
        put = "insert or replace into trilogue_state (owner, id, at_us, body) values (?, ?, ?, ?)"
        sql.rows(put, (OWNER, REMOVED, now_us(), msgspec.json.encode((position, recorded_us))))


def _tags(more: bytes) -> list[str]:
    said: list[Any] = msgspec.json.decode(more)
    return said[3] if len(said) > 3 else []
