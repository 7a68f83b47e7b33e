"""Retention: old records go, but not what somebody still needs. A window of the log at a time, so that publishing goes on.

trilogue_state  owner "retention", id "removed"
[17000, 1760000000000000]      position and recorded time of the newest record that was removed: the log is whole only after it,
                               whatever older records have stayed
"""

from typing import Any

import msgspec

from trilogue.events import now_us
from trilogue.stores.dialect import Sql
from trilogue.stores.log import PUT_STATE, StreamMarks, newest, numbers, position_at

OWNER, REMOVED = "retention", "removed"
TRIM_RECORDS = 5_000
WINDOW = 50_000

# The newest record of a stream stays whatever is asked: its version counts on.
_NEWER = "exists (select 1 from trilogue_records n where n.stream = r.stream and n.version > r.version)"
_MARKS = "(select s.body from trilogue_state s where s.owner = 'stream' and s.id = r.stream)"
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
    held = "" if force else f"and not {_HELD}"
    until = min(floor, start + WINDOW)
    found = sql.rows(
        f"select position, slot, correlation, more, recorded_us, version, {_MARKS} from trilogue_records r "
        f"where position >= ? and position < ? {held} and (stream is null or {_NEWER}) order by position limit ?",
        (start, until, TRIM_RECORDS),
    )
    rows = found if streams else [row for row in found if not _is_rested_on(*row[3:])]
    if rows:
        _remove(sql, rows, force=force)
        _note_removed(sql, rows[-1][0], rows[-1][4])
    return len(rows), found[-1][0] + 1 if len(found) == TRIM_RECORDS else until


def _is_rested_on(more: bytes | None, _recorded_us: int, version: int | None, marks: bytes | None) -> bool:
    """Whether decisions may rest on a record: one of a stream that is shown, or one with tags."""
    first = msgspec.json.decode(marks, type=StreamMarks).first if marks else 0
    return (version is not None and version >= first) or bool(more and _tags(more))


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
        sql.rows(PUT_STATE, (OWNER, REMOVED, now_us(), msgspec.json.encode((position, recorded_us))))


def _tags(more: bytes) -> list[str]:
    said: list[Any] = msgspec.json.decode(more)
    return said[3] if len(said) > 3 else []
