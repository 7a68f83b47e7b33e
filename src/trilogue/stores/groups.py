"""Groups in the store: who owns which slot, what is claimed, how a settlement is written.

    trilogue_groups   name, patterns, epoch, revision
    trilogue_slots    64 per group: cursor, epoch, owner
    trilogue_members  the workers of a group, each with a lease to renew
    trilogue_held     the exceptions to the cursors

A settlement is one savepoint: fence, effects, emits, held rows, cursors. If the fence says that a slot has changed hands,
nothing of that slot's deliveries happens.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from trilogue.errors import LeaseLost, LogError, TimedOut, UnknownEvent, Unsupported
from trilogue.events import Delivery, Envelope, Group, InTransaction, Record, Settlement
from trilogue.gate import NEVER_US, HeldRow, Plan, Row
from trilogue.ports import SLOTS, Db, SeekTo
from trilogue.stores.log import COLUMNS, Types, emit, newest, numbers, oldest, position_at, record_of
from trilogue.stores.writer import Again, Sql

READY, PARKED, DEAD = 0, 1, 2
RUN_RECORDS = 200
SCAN_POSITIONS = 50_000
ERROR_CHARS = 2_000
TRACEBACK_CHARS = 20_000


@dataclass(frozen=True, slots=True)
class Worker:
    """One process's part in the groups. machine: where its pid and its monotonic clock mean something."""

    name: str
    machine: str
    pid: int


@dataclass(frozen=True, slots=True)
class Attendance:
    """What a worker learns when it reports for a group. slots: (slot, epoch, cursor, quiet_to) it owns now."""

    group_id: int
    epoch: int
    revision: int
    paused: bool
    share: int
    slots: Sequence[tuple[int, int, int, int]]


# ── binding and membership ───────────────────────────────────────────────────────────────────────────────────────────


def bind(sql: Sql, groups: Sequence[Group], now_us: int) -> None:
    """Declare groups; a known one keeps its cursor."""
    for group in groups:
        patterns = msgspec.json.encode(group.patterns).decode()
        there = sql.rows("select id, app, patterns, ordered, has_effects from trilogue_groups where name = ?", (group.name,))
        if not there:
            create(sql, group, newest(sql)[0] if group.start == "now" else oldest(sql) - 1, now_us)
        elif there[0][1:] != (group.app, patterns, group.ordered, group.has_effects):
            sql.rows(
                "update trilogue_groups set app = ?, patterns = ?, ordered = ?, has_effects = ?, revision = revision + 1 where id = ?",
                (group.app, patterns, group.ordered, group.has_effects, there[0][0]),
            )
            if there[0][3] != group.ordered:
                _reorder(sql, there[0][0], ordered=group.ordered)


def _reorder(sql: Sql, group_id: int, *, ordered: bool) -> None:
    """Held rows carry a key exactly where order matters."""
    key = "(select r.key from trilogue_records r where r.position = trilogue_held.position)" if ordered else "null"
    sql.rows(f"update trilogue_held set key = {key} where group_id = ?", (group_id,))


def create(sql: Sql, group: Group, cursor: int, now_us: int) -> None:
    """A new group whose slots all stand at one cursor."""
    patterns = msgspec.json.encode(group.patterns).decode()
    sql.rows(
        "insert into trilogue_groups (name, app, patterns, ordered, has_effects, bound_us) values (?, ?, ?, ?, ?, ?)",
        (group.name, group.app, patterns, group.ordered, group.has_effects, now_us),
    )
    group_id = group_id_of(sql, group.name)
    sql.many(
        "insert into trilogue_slots (group_id, slot, cursor) values (?, ?, ?)",
        [(group_id, s, cursor) for s in range(SLOTS)],
    )


def group_id_of(sql: Sql, name: str) -> int:
    """The number of a group; raises UnknownEvent naming those there are."""
    rows = sql.rows("select id from trilogue_groups where name = ?", (name,))
    if rows:
        return int(rows[0][0])
    names = [row[0] for row in sql.rows("select name from trilogue_groups order by name limit 50")]
    raise UnknownEvent(f"there is no group {name!r}; this log has {', '.join(names) or 'none yet'}")


def attend(
    sql: Sql, name: str, worker: Worker, now_us: int, lease_us: int, give_up: Sequence[int], in_flight: int, rate: float
) -> Attendance | None:
    """Report for work: renew the membership, give up slots, take free ones up to a fair share. None: there is no such group.

    now_us: the machine's monotonic clock. give_up: slots of which nothing is out.
    """
    known = sql.rows("select id from trilogue_groups where name = ?", (name,))
    if not known:
        return None
    group_id = int(known[0][0])
    joined = not sql.rows("select 1 from trilogue_members where group_id = ? and worker = ?", (group_id, worker.name))
    sql.rows(
        "insert into trilogue_members values (?, ?, ?, ?, ?, ?, ?) on conflict do update set "
        "lease_us = excluded.lease_us, in_flight = excluded.in_flight, rate = excluded.rate",
        (group_id, worker.name, worker.machine, worker.pid, now_us + lease_us, in_flight, rate),
    )
    buried = _bury(sql, group_id, worker, now_us, lease_us)
    _give_up(sql, group_id, worker, give_up)
    live = sql.rows("select count(*) from trilogue_members where group_id = ?", (group_id,))[0][0]
    share = -(-SLOTS // live)
    taken = _take(sql, group_id, worker, share)
    if joined or buried or give_up:
        sql.rows("update trilogue_groups set revision = revision + 1 where id = ?", (group_id,))
    if taken:
        sql.rows("update trilogue_groups set epoch = epoch + 1 where id = ?", (group_id,))
    epoch, revision, paused = sql.rows("select epoch, revision, paused from trilogue_groups where id = ?", (group_id,))[0]
    slots = sql.rows(
        "select slot, epoch, cursor, quiet_to from trilogue_slots where group_id = ? and owner = ?",
        (group_id, worker.name),
    )
    return Attendance(group_id, epoch, revision, bool(paused), share, slots)


def _bury(sql: Sql, group_id: int, worker: Worker, now_us: int, lease_us: int) -> bool:
    """Remove members whose lease has passed or whose process is gone."""
    gone = []
    for name, machine, pid, until_us in sql.rows(
        "select worker, machine, pid, lease_us from trilogue_members where group_id = ? and worker <> ?",
        (group_id, worker.name),
    ):
        # A lease further ahead than any lease can be is from before a restart of the machine, whose clock began again.
        expired = until_us < now_us or until_us > now_us + 100 * lease_us
        if expired or (machine == worker.machine and not _is_alive(pid)):
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


def _give_up(sql: Sql, group_id: int, worker: Worker, slots: Sequence[int]) -> None:
    sql.many(
        "update trilogue_slots set owner = null where group_id = ? and slot = ? and owner = ?",
        [(group_id, slot, worker.name) for slot in slots],
    )


def _take(sql: Sql, group_id: int, worker: Worker, share: int) -> bool:
    mine = sql.rows("select count(*) from trilogue_slots where group_id = ? and owner = ?", (group_id, worker.name))[0][0]
    if mine >= share:
        return False
    free = sql.rows(
        "select slot from trilogue_slots where group_id = ? and "
        "(owner is null or owner not in (select worker from trilogue_members where group_id = ?)) order by slot limit ?",
        (group_id, group_id, share - mine),
    )
    sql.many(
        "update trilogue_slots set owner = ?, epoch = epoch + 1 where group_id = ? and slot = ?",
        [(worker.name, group_id, slot) for (slot,) in free],
    )
    return bool(free)


def leave(sql: Sql, worker: Worker) -> None:
    """Give back everything: the slots are free for others at once."""
    mine = sql.rows("select group_id from trilogue_members where worker = ?", (worker.name,))
    sql.many(
        "update trilogue_slots set owner = null where group_id = ? and owner = ?",
        [(group, worker.name) for (group,) in mine],
    )
    sql.many("update trilogue_groups set revision = revision + 1 where id = ?", mine)
    sql.rows("delete from trilogue_members where worker = ?", (worker.name,))


def renew(sql: Sql, worker: Worker, until_us: int) -> set[int]:
    """Prolong all leases of a worker; one that was buried meanwhile stays buried. Returns the groups it still works for."""
    return {
        group_id
        for (group_id,) in sql.rows(
            "update trilogue_members set lease_us = ? where worker = ? returning group_id", (until_us, worker.name)
        )
    }


# ── claiming ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    # SQLite takes the other columns from the row that has the minimum: https://sqlite.org/lang_select.html#bareagg
    keys = sql.rows(
        f"select key, slot, state, due_us, min(position) from trilogue_held where {mine} and key is not null group by slot, key",
        (group_id,),
    )
    loose = sql.rows(
        f"select due_us, position, slot from trilogue_held where {mine} and state = {READY}"
        + (" and key is null" if ordered else ""),
        (group_id,),
    )
    return [(key, slot, NEVER_US if state == PARKED else due) for key, slot, state, due, _ in keys], loose


_HELD = f"select h.slot, h.due_us, h.attempt, h.state, {', '.join('r.' + c for c in COLUMNS.split(', '))} from trilogue_held h join trilogue_records r on r.position = h.position"


def held_of_key(sql: Sql, types: Types, group_id: int, slot: int, key: str) -> list[HeldRow]:
    """The first held rows of a key, in order."""
    rows = sql.rows(
        f"{_HELD} where h.group_id = ? and h.slot = ? and h.key = ? and h.state < {DEAD} order by h.position limit {RUN_RECORDS}",
        (group_id, slot, key),
    )
    return [_held_row(sql, types, row) for row in rows]


def held_at(sql: Sql, types: Types, group_id: int, positions: Sequence[int]) -> list[HeldRow]:
    """The held rows at these positions that are still ready."""
    rows = sql.rows(
        f"{_HELD} where h.group_id = ? and h.position in ({numbers(positions)}) and h.state = {READY} order by h.position",
        (group_id,),
    )
    return [_held_row(sql, types, row) for row in rows]


def _held_row(sql: Sql, types: Types, row: Any) -> HeldRow:
    slot, due_us, attempt, state = row[:4]
    return HeldRow(record_of(sql, types, row[4:]), slot, due_us, attempt, state == PARKED)


# ── settling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a settlement: the final answers to `rest`, the deliveries of which nothing happened, how many emits."""

    settlements: list[Settlement]
    lost: list[Delivery]
    emitted: int


class Effects:
    """Runs effects inside savepoints: the user's SQL, bounded in time.

    deadline: sets the moment SQL is interrupted. in_transaction: whether there still is one: interrupting a statement that
    writes makes SQLite undo the whole transaction, other groups' work included, which is then done again without this one.
    check: raises Rejected for what cannot be emitted.
    """

    def __init__(
        self,
        db: Db,
        deadline: Callable[[int | None], None],
        in_transaction: Callable[[], bool],
        translate: Callable[[Exception], Exception],
        check: Callable[[Envelope], None],
    ) -> None:
        self.db = db
        self.deadline = deadline
        self.in_transaction = in_transaction
        self.translate = translate
        self.check = check

    def run(self, sql: Sql, work: InTransaction) -> Sequence[Settlement]:
        """The settlements of one InTransaction; what a failing one wrote is undone."""
        sql.rows("savepoint effect")
        self.deadline(work.limit_us)
        try:
            settlements = self._run(work)
        except Exception as error:
            self.deadline(None)
            if not self.in_transaction():
                self._give_up(work, self.translate(error))
            sql.rows("rollback to effect")
            settlements = work.failed(self.translate(error))
        finally:
            self.deadline(None)
        sql.rows("release effect")
        work.settlements = settlements
        return settlements

    def _run(self, work: InTransaction) -> Sequence[Settlement]:
        if work.doomed is not None:
            raise work.doomed
        settlements = work.run(self.db)
        if not self.in_transaction():
            raise TimedOut("its SQL was interrupted, and it went on as if nothing had happened: let the error through")
        for settlement in settlements:
            for envelope in settlement.emits:
                self.check(envelope)
        return settlements

    def _give_up(self, work: InTransaction, error: Exception) -> None:
        if isinstance(error, LogError):  # the disk is full: no fault of this effect
            raise error
        work.doomed = error
        raise Again


def settle(
    sql: Sql,
    types: Types,
    effects: Effects,
    group_id: int,
    worker: Worker,
    plan: Plan,
    early: Sequence[Settlement],
    rest: Sequence[Settlement | InTransaction],
    now_us: int,
) -> Settled:
    """Write one settlement of a group: fence, effects, emits, held rows, cursors.

    early: plainly done and without a held row; by far the most, and all there is to do for them is to count.
    """
    if plan.generation.broken:
        raise LeaseLost("an earlier settlement of this group failed: its records are delivered again")
    mine = _fence(sql, group_id, worker, plan)
    lost: list[Delivery] = []
    if mine is not plan.epochs:
        lost += [settlement.delivery for settlement in early if not _holds(settlement.delivery, mine)]
        early = [settlement for settlement in early if _holds(settlement.delivery, mine)]
    settlements = _decide(sql, effects, plan, mine, rest, lost)
    emits = [envelope for settlement in (*early, *settlements) for envelope in settlement.emits]
    if emits:
        emit(sql, types, emits, now_us)
    _write_held(sql, group_id, settlements, now_us, ordered=plan.ordered)
    _write_rows(sql, group_id, [row for row in (*plan.rows, *plan.followers) if row.slot in mine])
    cursors = {slot: cursor for slot, cursor in plan.cursors.items() if slot in mine}
    _write_cursors(sql, group_id, early, settlements, cursors)
    return Settled(settlements, lost, len(emits))


def _decide(
    sql: Sql,
    effects: Effects,
    plan: Plan,
    mine: dict[int, int],
    answers: Sequence[Settlement | InTransaction],
    lost: list[Delivery],
) -> list[Settlement]:
    """The final answers, in order, after running the effects; what is not ours any more goes to `lost`."""
    settlements: list[Settlement] = []
    blocked: set[str] = set()
    for answer in answers:
        deliveries = (answer.delivery,) if isinstance(answer, Settlement) else answer.deliveries
        if mine is not plan.epochs and not all(_holds(delivery, mine) for delivery in deliveries):
            # A batch can be lost in part: what is still ours of it is handed back.
            settlements += [Settlement(delivery, "release") for delivery in deliveries if _holds(delivery, mine)]
            lost += [delivery for delivery in deliveries if not _holds(delivery, mine)]
            continue
        key = deliveries[0].record.key if plan.ordered and len(deliveries) == 1 else None
        if key in blocked:
            # What goes before it of its key has just failed: it waits behind it.
            final: Sequence[Settlement] = [Settlement(deliveries[0], "release")]
        else:
            final = (answer,) if isinstance(answer, Settlement) else effects.run(sql, answer)
        if key is not None and final[0].holds_key:
            blocked.add(key)
        settlements += final
    return settlements


def _holds(delivery: Delivery, mine: dict[int, int]) -> bool:
    return mine.get(delivery.lease.slot) == delivery.lease.epoch


def _fence(sql: Sql, group_id: int, worker: Worker, plan: Plan) -> dict[int, int]:
    """The slots of the plan that are still this worker's, with their epochs."""
    if sql.rows("select epoch from trilogue_groups where id = ?", (group_id,)) == [(plan.epoch,)]:
        return plan.epochs
    now = dict(sql.rows("select slot, epoch from trilogue_slots where group_id = ? and owner = ?", (group_id, worker.name)))
    return {slot: epoch for slot, epoch in plan.epochs.items() if now.get(slot) == epoch}


def _write_held(sql: Sql, group_id: int, settlements: Iterable[Settlement], now_us: int, *, ordered: bool) -> None:
    gone: list[tuple[int, int]] = []
    kept: list[tuple[Any, ...]] = []
    for settlement in settlements:
        delivery = settlement.delivery
        if settlement.verdict == "done":
            if delivery.is_held:
                gone.append((group_id, delivery.record.position))
        elif settlement.verdict != "release" or not delivery.is_held:
            key = settlement.delivery.record.key if ordered else None
            kept.append(_held_values(group_id, key, settlement, now_us))
    if gone:
        sql.many("delete from trilogue_held where group_id = ? and position = ?", gone)
    if kept:
        sql.many(
            "insert into trilogue_held (group_id, position, slot, key, state, due_us, attempt, failed_us, error, traceback) "
            "values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict do update set state = excluded.state, due_us = excluded.due_us, "
            "attempt = excluded.attempt, failed_us = excluded.failed_us, error = excluded.error, traceback = excluded.traceback",
            kept,
        )


def _held_values(group_id: int, key: str | None, settlement: Settlement, now_us: int) -> tuple[Any, ...]:
    delivery = settlement.delivery
    state, due_us, attempt = READY, 0, delivery.attempt
    failed_us: int | None = now_us
    if settlement.verdict == "retry":
        due_us, attempt = now_us + settlement.after_us, attempt + settlement.charged
    elif settlement.verdict == "dead":
        state = PARKED if settlement.park else DEAD
    else:
        failed_us = None
    return (
        group_id,
        delivery.record.position,
        delivery.lease.slot,
        key,
        state,
        due_us,
        attempt,
        failed_us,
        _text(settlement.error[:ERROR_CHARS]),
        _text(settlement.traceback[-TRACEBACK_CHARS:]),
    )


def _text(text: str) -> str | None:
    """Text that can be stored: an error may quote a file name that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode() or None


def _write_rows(sql: Sql, group_id: int, rows: Sequence[Row]) -> None:
    if rows:
        sql.many(
            "insert into trilogue_held (group_id, position, slot, key, state, attempt) values (?, ?, ?, ?, 0, ?)",
            [(group_id, row.position, row.slot, row.key, row.attempt) for row in rows],
        )


def _write_cursors(
    sql: Sql, group_id: int, early: Sequence[Settlement], settlements: Sequence[Settlement], cursors: dict[int, int]
) -> None:
    """Cursors and counters of the slots that changed; what came from held rows moved no cursor but does count."""
    done = Counter([settlement.delivery.lease.slot for settlement in early])
    failed: Counter[int] = Counter()
    for settlement in settlements:
        slot = settlement.delivery.lease.slot
        if settlement.verdict == "done":
            done[slot] += 1
        elif settlement.verdict != "release":
            failed[slot] += settlement.charged
    slots = cursors.keys() | done.keys() | failed.keys()
    sql.many(
        "update trilogue_slots set cursor = max(cursor, ?), done = done + ?, failed = failed + ? where group_id = ? and slot = ?",
        [(cursors.get(slot, 0), done[slot], failed[slot], group_id, slot) for slot in slots],
    )


# ── seek, pause, drop ────────────────────────────────────────────────────────────────────────────────────────────────


def seek(
    sql: Sql,
    name: str,
    to: SeekTo,
    *,
    into: str | None,
    emits: bool,
    reset: Callable[[Db], None] | None,
    db: Db,
    now_us: int,
) -> int:
    """Set a group, or a new one with its patterns, to start after the returned position."""
    group_id = group_id_of(sql, name)
    cursor = _cursor_for(sql, to)
    app, patterns, ordered, has_effects = sql.rows(
        "select app, patterns, ordered, has_effects from trilogue_groups where id = ?", (group_id,)
    )[0]
    if into is not None:
        if sql.rows("select 1 from trilogue_groups where name = ?", (into,)):
            raise Unsupported(f"group {into!r} exists already: replay into a name that is new")
        create(
            sql,
            Group(into, tuple(msgspec.json.decode(patterns)), bool(ordered), has_effects=bool(has_effects), app=app),
            cursor,
            now_us,
        )
        return cursor
    if has_effects and reset is None:
        raise Unsupported(
            f"group {name!r} writes through `db`: replaying it in place would apply every effect twice; give its handler reset= and "
            "name the app (--app MODULE:APP), or replay into a new group"
        )
    if reset is not None:
        reset(db)
    quiet = "0" if emits else "max(quiet_to, cursor)"
    sql.rows(
        f"update trilogue_slots set epoch = epoch + 1, quiet_to = {quiet}, cursor = ? where group_id = ?",
        (cursor, group_id),
    )
    sql.rows("delete from trilogue_held where group_id = ?", (group_id,))
    sql.rows("update trilogue_groups set epoch = epoch + 1, revision = revision + 1 where id = ?", (group_id,))
    return cursor


def _cursor_for(sql: Sql, to: SeekTo) -> int:
    head = newest(sql)[0]
    if to.end == "now":
        return head
    if to.end == "beginning":
        return oldest(sql) - 1
    if to.time_us is not None:
        return position_at(sql, to.time_us) - 1
    if to.position is None or not oldest(sql) <= to.position <= head + 1:
        raise Unsupported(f"position {to.position} is not on the log: it holds {oldest(sql)} to {head}")
    return to.position - 1


def set_paused(sql: Sql, name: str, paused: bool) -> None:
    """Pause or resume a group."""
    sql.rows("update trilogue_groups set paused = ?, revision = revision + 1 where id = ?", (paused, group_id_of(sql, name)))


def drop(sql: Sql, name: str) -> None:
    """Forget a group."""
    group_id = group_id_of(sql, name)
    for table in ("held", "slots", "members"):
        sql.rows(f"delete from trilogue_{table} where group_id = ?", (group_id,))
    sql.rows("delete from trilogue_groups where id = ?", (group_id,))
