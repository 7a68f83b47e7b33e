"""Dead letters: held rows nobody retries any more, with the record they are about and why it failed.

state 2 dead     forgotten by its key; redrive hands it out again, drop forgets it
state 1 parked   its key waits behind it; redrive tries it again, drop lets the key go on
"""

from collections.abc import Sequence
from typing import Any

from trilogue.events import Record
from trilogue.ports import DeadLetter
from trilogue.stores.dialect import Sql
from trilogue.stores.groups import DEAD, PARKED, READY, group_id_of
from trilogue.stores.log import COLUMNS, Types, record_of, unpack

_PAGE = 10_000


def listed(sql: Sql, types: Types, group: str | None, *, after: int, limit: int) -> list[DeadLetter]:
    """Dead letters by position, of one group or of all."""
    where = "" if group is None else f"and h.group_id = {group_id_of(sql, group)}"
    rows = sql.rows(
        "select g.name, h.state, h.attempt, h.error, h.traceback, h.failed_us, h.position, h.record, "
        + ", ".join("r." + column for column in COLUMNS.split(", "))
        + " from trilogue_held h join trilogue_groups g on g.id = h.group_id "
        "left join trilogue_records r on r.position = h.position and h.record is null "
        f"where h.state > {READY} and h.position > ? {where} order by h.position, g.name limit ?",
        (after, max(0, min(limit, _PAGE))),
    )
    return [_letter(sql, types, row) for row in rows]


def _letter(sql: Sql, types: Types, row: Any) -> DeadLetter:
    group, state, attempt, error, traceback, failed_us, position, body = row[:8]
    record = record_of(sql, types, row[8:]) if body is None else unpack(body, position)
    return DeadLetter(group, record, attempt, error or "", traceback or "", failed_us or 0, parked=state == PARKED)


def held(sql: Sql, types: Types, *, after: int, limit: int) -> list[Record]:
    """Records with a held row of whatever state, each once."""
    page = "select distinct position from trilogue_held where position > ? order by position limit ?"
    places = sql.rows(page, (after, max(0, min(limit, _PAGE))))
    if not places:
        return []
    between = (places[0][0], places[-1][0])
    rows = sql.rows(
        f"select {COLUMNS} from trilogue_records where position in (select position from trilogue_held "
        "where record is null and position between ? and ?) order by position",
        between,
    )
    select = "select record, position from trilogue_held where record is not null and position between ? and ?"
    inbox = {record.id: record for record in (unpack(*row) for row in sql.rows(select, between))}
    return sorted((*(record_of(sql, types, row) for row in rows), *inbox.values()), key=lambda record: record.position)


def redrive(sql: Sql, group: str, positions: Sequence[int] | None) -> int:
    """Make dead letters ready again from attempt 1."""
    return len(_change(sql, group, positions, f"update trilogue_held set state = {READY}, due_us = 0, attempt = 1"))


def drop(sql: Sql, group: str, positions: Sequence[int] | None) -> int:
    """Forget dead letters, and that a broker's group has seen their ids: sent again, they are new."""
    ids = _change(sql, group, positions, "delete from trilogue_held")
    sql.many("delete from trilogue_state where owner = ? and id = ?", [(f"seen:{group}", id) for id in ids if id is not None])
    return len(ids)


def _change(sql: Sql, group: str, positions: Sequence[int] | None, change: str) -> list[str | None]:
    """The ids of what was changed, where it came from a broker."""
    group_id = group_id_of(sql, group)
    change = f"{change} where group_id = ? and state in ({PARKED}, {DEAD})"
    if positions is None:
        changed = sql.rows(f"{change} returning record_id", (group_id,))
    else:
        at = f"{change} and position = ? returning record_id"
        changed = [row for position in positions for row in sql.rows(at, (group_id, position))]
    sql.rows("update trilogue_groups set revision = revision + 1 where id = ?", (group_id,))
    return [id for (id,) in changed]
