"""What a test does to a store and no program may: look at everything due, let a worker die, take its slots, deliver again.

Reached into, because a product with a verb that kills its worker would be a loaded gun.
"""

from collections.abc import Sequence
from typing import Any

from trilogue.events import Record
from trilogue.stores import groups, status
from trilogue.stores.dialect import Sql
from trilogue.stores.worker import Worker


async def next_due(store: Any, names: Sequence[str]) -> int | None:
    """When these groups or the timers have something to do next, in microseconds: 0 if at once, None if never.

    Without a group nobody works, and timers do not fire.
    """
    if not names:
        return None
    due: int | None = await store._opened().look(lambda sql, types: status.next_due(sql, types, names))
    return due


async def is_informed(store: Any) -> bool:
    """Whether the worker has seen what was last changed about its groups: paused, set to another place, slots that moved."""
    worker = store._worker
    revisions = await store._db.glance(lambda sql, _: groups.revisions(sql))
    behind = [name for name, bound in worker._bound.items() if bound.works and revisions.get(name) != bound.revision]
    return not behind and not worker.attend_now.is_set()


async def look_again(store: Any) -> None:
    """The clock was set: fire the timers that are due, wake every claim."""
    await store._look_again()
    await store._fire_due()


async def bury(store: Any) -> None:
    """What a kill -9 leaves of a worker: what it held in memory is lost, its slots are free. Another one comes in its place."""
    dead = store._worker
    async with dead._attending:  # written later, a report for work would take slots that nobody works
        bound = list(dead._bound.values())
        dead._bound.clear()
        store._worker = Worker(store._db, lease_us=store.lease_us, payload_bytes=store.payload_bytes)
    for each in bound:
        each.gate.reset()
    await store._db.writer.submit(lambda sql: sql.rows("delete from trilogue_members where worker = ?", (dead._member.name,)))


async def take_slots(store: Any, group: str) -> None:
    """Another worker takes all slots of a group, and is gone: what is out of them can no longer be settled."""

    def take(sql: Sql) -> None:
        group_id = groups.group_id_of(sql, group)
        sql.rows("update trilogue_slots set owner = 'another', epoch = epoch + 1 where group_id = ?", (group_id,))
        sql.rows("update trilogue_groups set epoch = epoch + 1, revision = revision + 1 where id = ?", (group_id,))

    await store._write(take)
    await store._look_again()


async def deliver_again(store: Any, group: str, record: Record) -> None:
    """Lend a record once more that the group has finished."""

    def hold(sql: Sql) -> None:
        group_id = groups.group_id_of(sql, group)
        ordered = sql.rows("select ordered from trilogue_groups where id = ?", (group_id,))[0][0]
        key = "key" if ordered else "null"
        sql.rows(
            "insert into trilogue_held (group_id, position, slot, key, state, due_us, attempt) "
            f"select ?, position, slot, {key}, {groups.READY}, 0, 1 from trilogue_records where position = ? "
            "on conflict do nothing",
            (group_id, record.position),
        )
        sql.rows("update trilogue_groups set revision = revision + 1 where id = ?", (group_id,))

    await store._write(hold)
    await store._look_again()


async def held_rows(store: Any, group: str) -> list[tuple[int, int, int, str]]:
    """Position, due time, next attempt and last error of every record a group holds and has not given up on."""
    found: list[tuple[int, int, int, str]] = await store.query(
        "select h.position, h.due_us, h.attempt, coalesce(h.error, '') from trilogue_held h join trilogue_groups g "
        f"on g.id = h.group_id where g.name = ? and h.state = {groups.READY} order by h.position",
        (group,),
    )
    return found
