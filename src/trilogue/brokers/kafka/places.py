"""Where groups begin, and setting them somewhere else.

A group that has committed offsets has been there; partitions it has none for are newer than it, and are read from their
beginning. So a new group's offsets are committed when it is bound, before anything can be published after the bind returned.
"""

import asyncio
import time
from collections.abc import Iterable

from trilogue.brokers.kafka.admin import Admin, Partition
from trilogue.brokers.kafka.settings import Settings
from trilogue.errors import Unsupported
from trilogue.events import Group
from trilogue.ports import SeekTo

LEAVING_S = 5.0


async def declare(admin: Admin, settings: Settings, group: Group, partitions: list[Partition]) -> None:
    """Set a group that has never been there to where it begins."""
    if group.start == "existing" or not partitions:
        return
    beginning = group.start == "beginning" or settings.start == "earliest"
    # Looked at before the group is: if two processes declare it at once, the later one sets it no further than the first did
    # before its bind returned.
    offsets = await (admin.beginnings(partitions) if beginning else admin.ends(partitions))
    group_id = settings.prefix + group.name
    if not await admin.committed(group_id, partitions):
        await admin.alter(group_id, offsets)  # refused where it has members: then somebody else has just declared it


async def offsets_for(admin: Admin, settings: Settings, partitions: Iterable[Partition], to: SeekTo) -> dict[Partition, int]:
    """The offsets a place means; raises Unsupported for a position where there are several partitions."""
    partitions = list(partitions)
    if to.end == "now":
        return await admin.ends(partitions)
    if to.end == "beginning":
        return await admin.beginnings(partitions)
    if to.time_us is not None:
        return await admin.at_time(partitions, to.time_us)
    if to.position is None or len(partitions) != 1:
        raise Unsupported(
            f"{settings.shown}: position {to.position} names one offset and the group reads {len(partitions)} partitions: name a "
            "time, 'beginning' or 'now'"
        )
    only = partitions[0]
    first, end = (await admin.beginnings(partitions))[only], (await admin.ends(partitions))[only]
    if not first <= to.position <= end:
        raise Unsupported(f"{settings.shown}: offset {to.position} is not in {only[0]}[{only[1]}]: it holds {first} to {end - 1}")
    return {only: to.position}


async def move(admin: Admin, settings: Settings, group: str, offsets: dict[Partition, int]) -> None:
    """Set a group that has no members here any more; raises Unsupported while others have some."""
    until = time.monotonic() + LEAVING_S
    while not await admin.alter(settings.prefix + group, offsets):
        if time.monotonic() > until:
            members = await admin.members(settings.prefix + group)
            raise Unsupported(
                f"{settings.shown}: group {group!r} has {members} members in other processes, and Kafka sets no group that has "
                "members: stop them first, or replay into a new group"
            )
        await asyncio.sleep(0.1)
