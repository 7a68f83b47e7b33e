"""Retention: old records go, but not what somebody still needs."""

from trilogue.stores.log import newest, position_at
from trilogue.stores.writer import Sql

TRIM_RECORDS = 5_000


def trim(sql: Sql, *, before_us: int | None, keep: int | None, needed: int | None, force: bool, streams: bool) -> int:
    """Remove up to TRIM_RECORDS old records; returns how many. The newest record always stays: its position counts on.

    needed: the first position some group still has to read.
    """
    floor = newest(sql)[0]
    if keep is not None:
        floor = min(floor, floor - keep + 1)
    if before_us is not None:
        floor = min(floor, position_at(sql, before_us))
    if needed is not None and not force:
        floor = min(floor, needed)
    is_held = "select 1 from trilogue_groups g join trilogue_held h on h.group_id = g.id and h.position = r.position"
    held = "" if force else f"and not exists ({is_held})"
    hidden = "select 1 from trilogue_state s where s.owner = 'stream' and s.id = r.stream and r.version < {first}"
    hidden = hidden.format(first="json_extract(cast(s.body as text), '$.first')")
    # The newest record of a stream stays whatever is asked: its version counts on.
    newer = "select 1 from trilogue_records n where n.stream = r.stream and n.version > r.version"
    kept = f"and (stream is null or exists ({newer}){'' if streams else f' and exists ({hidden})'})"
    doomed = f"from trilogue_records r where position < ? {held} {kept} order by position limit ?"
    which = (floor, TRIM_RECORDS)
    if force:  # what is held of a record that is gone could never be handed out again, nor be finished
        sql.many(f"delete from trilogue_held where position in (select position {doomed})", [which])
    sql.many(f"delete from trilogue_places where (slot, position) in (select slot, position {doomed})", [which])
    sql.many(f"delete from trilogue_traces where (correlation, position) in (select correlation, position {doomed})", [which])
    tagged = f"select j.value, d.position from (select more, position {doomed}) d, json_each(cast(d.more as text), '$[3]') j"
    sql.many(f"delete from trilogue_tags where (tag, position) in ({tagged})", [which])
    return sql.many(f"delete from trilogue_records where position in (select position {doomed})", [which])
