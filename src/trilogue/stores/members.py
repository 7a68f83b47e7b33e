"""Who works for a group: members with a lease each, and the slots they own.

trilogue_members  group, worker | lease, pid       renewed at a third of the lease, gone when it passes or the process ends
trilogue_slots    group, slot   | owner, epoch     64 of them, shared evenly; taking one raises its epoch
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from trilogue.events import Group
from trilogue.ports import SLOTS
from trilogue.stores.dialect import Sql
from trilogue.stores.groups import definition


@dataclass(frozen=True, slots=True)
class Member:
    """One process's part in the groups. machine: where its pid and its monotonic clock mean something."""

    name: str
    machine: str
    pid: int


@dataclass(frozen=True, slots=True)
class Attendance:
    """What a worker learns when it reports for a group. slots: (slot, epoch, cursor, quiet_to) it owns now.

    inbox: the position last given to a held record of a broker's group. superseded: a newer program reads something else as
    this group, and nothing of it is this worker's any more.
    """

    group_id: int
    epoch: int
    revision: int
    paused: bool
    share: int
    slots: Sequence[tuple[int, int, int, int]]
    inbox: int | None = None
    superseded: bool = False


def attend(
    sql: Sql, group: Group, member: Member, now_us: int, lease_us: int, give_up: Sequence[int], in_flight: int, rate: float
) -> Attendance | None:
    """Report for work: renew the membership, give up slots, take free ones up to a fair share. None: there is no such group.

    now_us: the clock that all workers share. give_up: slots of which nothing is out.
    """
    select = "select id, epoch, revision, paused, patterns, ordered, has_effects from trilogue_groups where name = ?"
    known = sql.rows(select + sql.dialect.for_update, (group.name,))  # one at a time
    if not known:
        return None
    group_id, epoch, revision, paused, *defined = known[0]
    if tuple(defined) != definition(group):
        _stand_aside(sql, group_id, member)
        return Attendance(group_id, epoch, revision, bool(paused), 0, (), superseded=True)
    joined = not sql.rows("select 1 from trilogue_members where group_id = ? and worker = ?", (group_id, member.name))
    sql.rows(
        "insert into trilogue_members values (?, ?, ?, ?, ?, ?, ?) on conflict (group_id, worker) do update set "
        "lease_us = excluded.lease_us, in_flight = excluded.in_flight, rate = excluded.rate",
        (group_id, member.name, member.machine, member.pid, now_us + lease_us, in_flight, rate),
    )
    buried = _bury(sql, group_id, member, now_us, lease_us)
    _give_up(sql, group_id, member, give_up)
    live = sql.rows("select count(*) from trilogue_members where group_id = ?", (group_id,))[0][0]
    share = -(-SLOTS // live)
    taken = _take(sql, group_id, member, share)
    if joined or buried or give_up:
        sql.rows("update trilogue_groups set revision = revision + 1 where id = ?", (group_id,))
    if taken:
        sql.rows("update trilogue_groups set epoch = epoch + 1 where id = ?", (group_id,))
    select = "select epoch, revision, paused, inbox from trilogue_groups where id = ?"
    epoch, revision, paused, inbox = sql.rows(select, (group_id,))[0]
    slots = sql.rows(
        "select slot, epoch, cursor, quiet_to from trilogue_slots where group_id = ? and owner = ?",
        (group_id, member.name),
    )
    return Attendance(group_id, epoch, revision, bool(paused), share, slots, inbox)


def _stand_aside(sql: Sql, group_id: int, member: Member) -> None:
    """The slots are not ours any more since the group was defined anew; nobody is to keep a share for us."""
    if sql.rows("delete from trilogue_members where group_id = ? and worker = ? returning 1", (group_id, member.name)):
        sql.rows("update trilogue_groups set revision = revision + 1 where id = ?", (group_id,))


def _bury(sql: Sql, group_id: int, member: Member, now_us: int, lease_us: int) -> bool:
    """Remove members whose lease has passed or whose process is gone."""
    gone = []
    for name, machine, pid, until_us in sql.rows(
        "select worker, machine, pid, lease_us from trilogue_members where group_id = ? and worker <> ?",
        (group_id, member.name),
    ):
        # A lease further ahead than any lease can be is from before a restart of the machine, whose clock began again.
        expired = until_us < now_us or until_us > now_us + 100 * lease_us
        if expired or (machine == member.machine and not _is_alive(pid)):
            gone.append((group_id, name))
    if gone:
        sql.many("delete from trilogue_members where group_id = ? and worker = ?", gone)
    return bool(gone)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # not ours to signal, but there
        return True
    return True


def _give_up(sql: Sql, group_id: int, member: Member, slots: Sequence[int]) -> None:
    sql.many(
        "update trilogue_slots set owner = null where group_id = ? and slot = ? and owner = ?",
        [(group_id, slot, member.name) for slot in slots],
    )


def _take(sql: Sql, group_id: int, member: Member, share: int) -> bool:
    mine = sql.rows("select count(*) from trilogue_slots where group_id = ? and owner = ?", (group_id, member.name))[0][0]
    if mine >= share:
        return False
    free = sql.rows(
        "select slot from trilogue_slots where group_id = ? and "
        "(owner is null or owner not in (select worker from trilogue_members where group_id = ?)) order by slot limit ?",
        (group_id, group_id, share - mine),
    )
    sql.many(
        "update trilogue_slots set owner = ?, epoch = epoch + 1 where group_id = ? and slot = ?",
        [(member.name, group_id, slot) for (slot,) in free],
    )
    return bool(free)


def leave(sql: Sql, member: Member) -> None:
    """Give back everything: the slots are free for others at once."""
    mine = sql.rows("select group_id from trilogue_members where worker = ?", (member.name,))
    sql.many(
        "update trilogue_slots set owner = null where group_id = ? and owner = ?",
        [(group, member.name) for (group,) in mine],
    )
    sql.many("update trilogue_groups set revision = revision + 1 where id = ?", mine)
    sql.rows("delete from trilogue_members where worker = ?", (member.name,))


def renew(sql: Sql, member: Member, until_us: int) -> set[int]:
    """Prolong all leases of a worker; one that was buried meanwhile stays buried. Returns the groups it still works for."""
    return {
        group_id
        for (group_id,) in sql.rows(
            "update trilogue_members set lease_us = ? where worker = ? returning group_id", (until_us, member.name)
        )
    }
