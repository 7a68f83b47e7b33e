"""How a settlement is written, in one savepoint.

fence      is the slot still ours? if not, nothing of its deliveries happens
effects    the user's SQL, each in a savepoint of its own
emits      onto the log
held rows  what is retried, dead, or unfinished in a span whose cursor moves
cursors    and counters
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trilogue.errors import LeaseLost, LogError, TimedOut
from trilogue.events import Delivery, Envelope, InTransaction, Settlement
from trilogue.gate import Plan, Row
from trilogue.stores.append import emit
from trilogue.stores.dialect import Sql
from trilogue.stores.groups import DEAD, PARKED, READY
from trilogue.stores.log import Types, numbers
from trilogue.stores.members import Member
from trilogue.stores.transaction import SqlTransaction
from trilogue.stores.writer import Again, answerable

ERROR_CHARS = 2_000
TRACEBACK_CHARS = 20_000
BROKEN = "an earlier settlement of this group failed: its records are delivered again"


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a settlement: the final answers to `rest`, the deliveries of which nothing happened, how many emits."""

    settlements: list[Settlement]
    lost: list[Delivery]
    emitted: int


class Effects:
    """Runs effects inside savepoints: the user's SQL, bounded in time.

    deadline: sets the moment SQL is interrupted. in_transaction: whether there still is one: interrupting a statement that
    writes makes SQLite undo the whole transaction, the other effects of the settlement included, which is then done again
    without this one.
    check: raises Rejected for what cannot be emitted. undone: what was remembered of a transaction that was undone is not true.
    """

    def __init__(
        self,
        db: SqlTransaction,
        deadline: Callable[[int | None], None],
        in_transaction: Callable[[], bool],
        translate: Callable[[Exception], Exception],
        check: Callable[[Envelope], None],
        undone: Callable[[], None],
    ) -> None:
        self.db = db
        self.deadline = deadline
        self.in_transaction = in_transaction
        self.translate = translate
        self.check = check
        self.undone = undone

    def run(self, sql: Sql, work: InTransaction) -> Sequence[Settlement]:
        """The settlements of one InTransaction; what a failing one wrote is undone."""
        sql.rows("savepoint effect")
        self.deadline(work.limit_us)
        try:
            settlements = self._run(work)
        except BaseException as raised:
            self.deadline(None)
            error = self.translate(answerable(raised))
            if isinstance(error, Again):
                raise error from raised
            if not self.in_transaction():
                self._give_up(work, error)
            sql.rows("rollback to effect")
            self.undone()
            settlements = work.failed(error)
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
        self.db.check()
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
    member: Member,
    plan: Plan,
    early: Sequence[Settlement],
    rest: Sequence[Settlement | InTransaction],
    now_us: int,
) -> Settled:
    """Write one settlement of a group: fence, effects, emits, held rows, cursors.

    early: plainly done and without a held row; by far the most, and all there is to do for them is to count.
    """
    if plan.generation.broken:
        raise LeaseLost(BROKEN)
    mine = _locked(sql, group_id, member, plan, early, rest) if sql.dialect.for_update else _fence(sql, group_id, member, plan)
    lost: list[Delivery] = []
    if mine is not plan.epochs:
        lost += [settlement.delivery for settlement in early if not _holds(settlement.delivery, mine)]
        early = [settlement for settlement in early if _holds(settlement.delivery, mine)]
    settlements = _decide(sql, effects, plan, mine, rest, lost)
    done = (*early, *(settlement for settlement in settlements if settlement.verdict == "done"))
    emits = [envelope for settlement in done for envelope in settlement.emits]
    if emits:
        emit(sql, types, emits, now_us)
    _write_held(sql, group_id, settlements, now_us, ordered=plan.ordered)
    _write_rows(sql, group_id, [row for row in (*plan.rows, *plan.followers) if row.slot in mine])
    cursors = {slot: cursor for slot, cursor in plan.cursors.items() if slot in mine}
    _move(sql, group_id, member, mine, _moves(early, settlements, cursors))
    appended, effects.db.appended = effects.db.appended, False
    return Settled(settlements, lost, len(emits) + appended)


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


def _fence(sql: Sql, group_id: int, member: Member, plan: Plan) -> dict[int, int]:
    """The slots of the plan that are still this worker's, with their epochs."""
    if sql.rows("select epoch from trilogue_groups where id = ?", (group_id,)) == [(plan.epoch,)]:
        return plan.epochs
    now = dict(sql.rows("select slot, epoch from trilogue_slots where group_id = ? and owner = ?", (group_id, member.name)))
    return {slot: epoch for slot, epoch in plan.epochs.items() if now.get(slot) == epoch}


def _locked(
    sql: Sql,
    group_id: int,
    member: Member,
    plan: Plan,
    early: Sequence[Settlement],
    rest: Sequence[Settlement | InTransaction],
) -> dict[int, int]:
    """The fence where several transactions write at a time: whoever takes one of these slots waits until the commit."""
    deliveries = [settlement.delivery for settlement in early]
    for answer in rest:
        deliveries += (answer.delivery,) if isinstance(answer, Settlement) else answer.deliveries
    slots = {delivery.lease.slot for delivery in deliveries} | plan.cursors.keys()
    slots |= {row.slot for row in (*plan.rows, *plan.followers)}
    if not slots:
        return plan.epochs
    select = (
        f"select slot, epoch from trilogue_slots where group_id = ? and owner = ? and slot in ({numbers(slots)}) order by slot"
    )
    now = dict(sql.rows(select + sql.dialect.for_update, (group_id, member.name)))
    mine = {slot: epoch for slot, epoch in plan.epochs.items() if slot in slots and now.get(slot) == epoch}
    return plan.epochs if len(mine) == len(slots) else mine


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
            "values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict (group_id, position) do update set state = excluded.state, "
            "due_us = excluded.due_us, attempt = excluded.attempt, failed_us = excluded.failed_us, error = excluded.error, "
            "traceback = excluded.traceback",
            kept,
        )


def _held_values(group_id: int, key: str | None, settlement: Settlement, now_us: int) -> tuple[Any, ...]:
    delivery = settlement.delivery
    return (group_id, delivery.record.position, delivery.lease.slot, key, *held_as(settlement, now_us))


def held_as(settlement: Settlement, now_us: int) -> tuple[Any, ...]:
    """The state, due_us, attempt, failed_us, error and traceback of a held row."""
    state, due_us, attempt = READY, 0, settlement.delivery.attempt
    failed_us: int | None = now_us
    if settlement.verdict == "retry":
        due_us, attempt = now_us + settlement.after_us, attempt + settlement.charged
    elif settlement.verdict == "dead":
        state = PARKED if settlement.park else DEAD
    else:
        failed_us = None
    error, traceback = _text(settlement.error[:ERROR_CHARS]), _text(settlement.traceback[-TRACEBACK_CHARS:])
    return state, due_us, attempt, failed_us, error, traceback


def _text(text: str) -> str | None:
    """Text that can be stored: an error may quote a file name that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00") or None


def _write_rows(sql: Sql, group_id: int, rows: Sequence[Row]) -> None:
    if rows:
        sql.many(
            "insert into trilogue_held (group_id, position, slot, key, state, attempt) values (?, ?, ?, ?, 0, ?)",
            [(group_id, row.position, row.slot, row.key, row.attempt) for row in rows],
        )


def settle_at_once(sql: Sql, group_id: int, member: Member, plan: Plan, early: Sequence[Settlement]) -> Settled | None:
    """settle() of what is plainly done and emits nothing, in one statement: its fence is in it, and slots that are not ours any
    more it leaves alone. None where that does not do."""
    if plan.generation.broken:
        raise LeaseLost(BROKEN)
    moves = _moves(early, (), plan.cursors)
    if not plan.epochs.keys() >= moves.keys():
        return None
    moved = _move(sql, group_id, member, plan.epochs, moves)
    lost = [] if len(moved) == len(moves) else [each.delivery for each in early if each.delivery.lease.slot not in moved]
    return Settled([], lost, 0)


def _moves(
    early: Sequence[Settlement], settlements: Sequence[Settlement], cursors: dict[int, int]
) -> dict[int, tuple[int, int, int]]:
    """Cursor, and what is to be added to the counters done and failed, of each slot that changes; what came from held rows moves
    no cursor but does count."""
    done = Counter([settlement.delivery.lease.slot for settlement in early])
    failed: Counter[int] = Counter()
    for settlement in settlements:
        slot = settlement.delivery.lease.slot
        if settlement.verdict == "done":
            done[slot] += 1
        elif settlement.verdict != "release":
            failed[slot] += settlement.charged
    slots = cursors.keys() | done.keys() | failed.keys()
    return {slot: (cursors.get(slot, 0), done[slot], failed[slot]) for slot in sorted(slots)}


def _move(
    sql: Sql, group_id: int, member: Member, epochs: dict[int, int], moves: dict[int, tuple[int, int, int]]
) -> Collection[int]:
    """Write cursors and counters; the slots that were moved."""
    if not moves:
        return ()
    if sql.dialect.move:
        columns = zip(*[(slot, epochs[slot], *move) for slot, move in moves.items()], strict=True)
        arrays = ["{" + ",".join(map(str, column)) + "}" for column in columns]
        return {slot for (slot,) in sql.rows(sql.dialect.move, (*arrays, group_id, member.name))}
    sql.many(
        "update trilogue_slots set cursor = case when cursor < ? then ? else cursor end, done = done + ?, failed = failed + ? "
        "where group_id = ? and slot = ?",
        [(cursor, cursor, done, failed, group_id, slot) for slot, (cursor, done, failed) in moves.items()],
    )
    return moves.keys()
