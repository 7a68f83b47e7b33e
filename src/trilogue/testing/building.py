"""Whether projections are at rest: their live builds are groups like others, builds beside them are not.

row.live     its group is looked at with the others; it may exist before anybody works for it
row.next     building, about to be shown, or behind what the live one has done: not at rest
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trilogue.builds import Row, group_name
from trilogue.ports import Query, Store
from trilogue.projection import Projection
from trilogue.stores import groups

Rows = Mapping[str, Row]


def live_groups(found: Rows, declared: Sequence[Projection]) -> list[str]:
    """The groups of the live builds of these projections."""
    return [group for each in declared if (group := _live_group(each, found.get(each.name))) is not None]


def _live_group(projection: Projection, row: Row | None) -> str | None:
    if row is None or row.live is None or row.live.version != projection.version:
        return None
    return group_name(projection.name, row.live.build)


async def building(store: Store, found: Rows, declared: Sequence[Projection]) -> list[str]:
    """The projections of which a build goes on, or is about to be shown."""
    return [each.name for each in declared if await _moves(store, found.get(each.name), each)]


async def _moves(store: Store, row: Row | None, projection: Projection) -> bool:
    if row is None:
        return True
    build = row.next
    if row.paused or build is None or build.version != projection.version:
        return False
    if build.state != "ready" or row.live is None:
        return build.state == "building"
    live = group_name(projection.name, row.live.build)
    if build.switch == "auto" and not await _holds(store, live):
        return True
    behind = await store.read(Query(types=projection.types, after=build.position, limit=1))
    return bool(behind) and behind[0].position <= await store.finished_to(live)


async def _holds(store: Store, group: str) -> bool:
    """Whether records are held for a group, so that its build cannot be left."""
    held: list[Any] = await store.query(
        "select 1 from trilogue_held h join trilogue_groups g on g.id = h.group_id "
        f"where g.name = ? and h.state in ({groups.READY}, {groups.PARKED}) limit 1",
        (group,),
    )
    return bool(held)
