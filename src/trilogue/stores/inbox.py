"""What a store keeps for groups whose log is a broker: records that did not go well, places, what was seen.

trilogue_groups.inbox   position last given        trilogue_held    position | key | state, due, attempt | record, record_id
trilogue_state          "lane:GROUP"  topic[0]     [epoch, next, finished]     where a group with effects is in a lane
                        "seen:GROUP"  event id      for a day: what was taken over, or had its effect; delivered again, it is over

    fresh from the broker ──goes well──▶ acknowledged, nothing is written
                          ──fails──────▶ a held row that carries its record, then acknowledged
    its key follows       ──divert─────▶ further rows: whether the key still is held is decided where they are written

From then on the rows are claimed, settled, redriven and dropped by the code for all held rows. Only who owns a lane adds rows
of its keys, so nothing of a key can come between the look and the row. Another process may finish the last row of a key between
the two: then the new one is the first, and is noticed by its position as any other.
"""

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from trilogue.errors import LeaseLost
from trilogue.events import Delivery, Group, InTransaction, Settlement, now_us
from trilogue.ports import SLOTS, Assignment, Db, Diverted, Marks, Place, PlacesAfter, Progress, Taken
from trilogue.stores.append import emit
from trilogue.stores.database import Database
from trilogue.stores.dialect import Sql
from trilogue.stores.groups import DEAD, definition, group_id_of
from trilogue.stores.log import Types, numbers, pack, slot_of
from trilogue.stores.settling import Effects, held_as
from trilogue.stores.writer import Again

T = TypeVar("T")
SEEN_US = 24 * 3_600 * 1_000_000
LOOK_KEYS = 200
EFFECT_ROWS = 1_000  # as many as always go through the writer's thread: they run the user's code


class Inbox:
    """ports.Inbox on a Database. wrote: told after each change, so that claims look again. attend: learns the epochs of slots."""

    def __init__(self, db: Database, effects: Effects, wrote: Callable[[], None], attend: Callable[[], Awaitable[None]]) -> None:
        self._db, self._effects, self._wrote, self._attend = db, effects, wrote, attend

    async def marks(self, group: Group) -> Marks:
        """What tells whether anything about a group has changed; raises UnknownEvent."""
        return await self._db.glance(lambda sql, _: _marks(sql, group))

    async def held_keys(self, group: str, after: int) -> list[str]:
        """Keys that have rows ready or parked beyond a position."""
        keys: list[str] = await self._db.look(lambda sql, _: _held_keys(sql, group, after))
        return keys

    async def divert(self, group: str, deliveries: Sequence[Delivery]) -> Diverted:
        """Put those whose key is held behind its rows."""
        return await self._write(lambda sql: divert(sql, group, deliveries, now_us()), rows=1 + len(deliveries))

    async def settle(
        self, group: str, answers: Sequence[Settlement | InTransaction], *, places: PlacesAfter | None = None, seen: bool = False
    ) -> Taken:
        """Write what became of fresh deliveries, effects and emits included, in one transaction."""
        types = self._db.writer_types

        def write(sql: Sql) -> Taken:
            try:
                return settle(sql, types, self._effects, group, answers, places, now_us(), seen=seen)
            except Again:
                types.forget()
                raise

        inside = any(isinstance(answer, InTransaction) for answer in answers)
        return await self._write(write, rows=len(answers) + EFFECT_ROWS * inside)

    async def assigned(self, group: str, lane: str) -> Assignment:
        """A lane came to this process; where the group goes on in it."""
        return await self._write(lambda sql: assigned(sql, group, lane))

    async def start_over(self, group: str, reset: Callable[[Db], None] | None, ends: dict[str, int]) -> None:
        """Forget what is held for a group and where it is. ends: by lane, below which its emits stay off."""
        db = self._db.transaction
        await self._write(lambda sql: start_over(sql, group, reset, db, ends))
        await self._attend()  # or what is held from now on would be lent, and refused, under the epochs from before

    async def replay_ends(self, group: str) -> dict[str, int]:
        """By lane, below which offset a replay is going on."""
        rows: list[Any] = await self._db.glance(lambda sql, _: _states(sql, f"replay:{group}"))
        return {lane: msgspec.json.decode(body, type=int) for lane, body in rows}

    async def names(self) -> list[str]:
        """The groups whose log is a broker."""
        select = "select name from trilogue_groups where inbox is not null order by name"
        rows: list[Any] = await self._db.look(lambda sql, _: sql.rows(select))
        return [name for (name,) in rows]

    async def _write(self, run: Callable[[Sql], T], *, rows: int = 1) -> T:
        result: T = await self._db.write(run, rows=rows)
        self._wrote()
        return result


# ── held records ─────────────────────────────────────────────────────────────────────────────────────────────────────


def hold(
    sql: Sql, group: str, group_id: int, settlements: Sequence[Settlement], now_us: int, *, ordered: bool
) -> tuple[int, int]:
    """Make a held row of each, in this order; returns the positions last given before and after: between them all are ours.

    That comes from the update, which waits for others that add rows: what was read before it may not be true any more.
    What was taken over before makes none: its broker delivers it again for want of an acknowledgement, maybe when its own row
    is worked off and those that followed it are not.
    """
    seen = _seen_among(sql, f"seen:{group}", [settlement.delivery.record.id for settlement in settlements])
    fresh = [settlement for settlement in settlements if settlement.delivery.record.id not in seen]
    update = "update trilogue_groups set inbox = inbox + ? where id = ? returning inbox"
    last: int = sql.rows(update, (len(fresh), group_id))[0][0]
    rows = []
    for position, settlement in enumerate(fresh, last - len(fresh) + 1):
        record = settlement.delivery.record
        slot = position % SLOTS if record.key is None else slot_of(record.key)
        key = record.key if ordered else None
        rows.append((group_id, position, slot, key, *held_as(settlement, now_us), pack(record), record.id))
    sql.many(
        "insert into trilogue_held (group_id, position, slot, key, state, due_us, attempt, failed_us, error, traceback, record, "
        "record_id) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict do nothing",
        rows,
    )
    _note_seen(sql, group, {settlement.delivery.record.id for settlement in fresh}, now_us)
    return last - len(fresh), last


def divert(sql: Sql, group: str, deliveries: Sequence[Delivery], now_us: int) -> Diverted:
    """Put those whose key is held behind its rows; the others are free to go."""
    group_id = group_id_of(sql, group)
    there = _held_among(sql, group_id, {delivery.record.key for delivery in deliveries} - {None})
    held = [delivery.record.key in there for delivery in deliveries]
    behind = [Settlement(d, "release") for d, is_held in zip(deliveries, held, strict=True) if is_held]
    before, after = hold(sql, group, group_id, behind, now_us, ordered=True) if behind else _reached(sql, group_id)
    return Diverted(held, before, after)


def _reached(sql: Sql, group_id: int) -> tuple[int, int]:
    """As hold() with nothing to hold."""
    reached: int = sql.rows("select inbox from trilogue_groups where id = ?", (group_id,))[0][0]
    return reached, reached


def _held_among(sql: Sql, group_id: int, names: set[Any]) -> set[str]:
    found: set[str] = set()
    some = sorted(names)
    for start in range(0, len(some), LOOK_KEYS):
        part = some[start : start + LOOK_KEYS]
        slots, marks = numbers({slot_of(name) for name in part}), ", ".join("?" * len(part))
        select = f"select distinct key from trilogue_held where group_id = ? and slot in ({slots}) and key in ({marks})"
        found.update(key for (key,) in sql.rows(f"{select} and state < {DEAD}", (group_id, *part)))
    return found


def _marks(sql: Sql, group: Group) -> Marks:
    select = "select inbox, revision, paused, patterns, ordered, has_effects from trilogue_groups where id = ?"
    inbox, revision, paused, *defined = sql.rows(select, (group_id_of(sql, group.name),))[0]
    return Marks(inbox or 0, revision, bool(paused), tuple(defined) != definition(group))


def _held_keys(sql: Sql, group: str, after: int) -> list[str]:
    select = f"select distinct key from trilogue_held where group_id = ? and position > ? and state < {DEAD} and key is not null"
    return [key for (key,) in sql.rows(select, (group_id_of(sql, group), after))]


# ── settlements ──────────────────────────────────────────────────────────────────────────────────────────────────────


def settle(
    sql: Sql,
    types: Types,
    effects: Effects,
    group: str,
    answers: Sequence[Settlement | InTransaction],
    places: PlacesAfter | None,
    now_us: int,
    *,
    seen: bool,
) -> Taken:
    """Write what became of fresh deliveries: effects, places with their fences, emits, held rows.

    places: where the lanes are with what was answered here, which what comes again is not. seen: an event whose effect has
    happened is recognised by its id, also where it stands on the log a second time. Raises LeaseLost.
    """
    group_id = group_id_of(sql, group)
    ordered = bool(sql.rows("select ordered from trilogue_groups where id = ?", (group_id,))[0][0])
    decided = _Decided(sql, effects, group if seen else None, now_us, ordered=ordered)
    for answer in answers:
        decided.add(answer)
    for place in places([settlement.delivery for settlement in decided.settlements]) if places else ():
        _keep_place(sql, group, place)
    emits = [envelope for settlement in decided.settlements for envelope in settlement.emits if settlement.verdict == "done"]
    if emits:
        emit(sql, types, emits, now_us)
    kept = [settlement for settlement in decided.settlements if settlement.verdict != "done"]
    before, after = hold(sql, group, group_id, kept, now_us, ordered=ordered) if kept else _reached(sql, group_id)
    _count_failed(sql, group_id, kept)
    effects.db.appended = False
    return Taken(decided.settlements, decided.again, before, after)


def _count_failed(sql: Sql, group_id: int, kept: Sequence[Settlement]) -> None:
    failed = sum(settlement.verdict != "release" and settlement.charged for settlement in kept)
    if failed:
        # Of whichever slot: these counters are only ever added up.
        sql.rows("update trilogue_slots set failed = failed + ? where group_id = ? and slot = 0", (failed, group_id))


@dataclass(slots=True)
class _Decided:
    """The final answers, in order. again: what has to be handled anew, because a part of its batch has happened before.

    group: where events are recognised by their ids, None elsewhere. failed: the ids that are held rows' now.
    """

    sql: Sql
    effects: Effects
    group: str | None
    now_us: int
    ordered: bool
    settlements: list[Settlement] = field(default_factory=list)
    again: list[Delivery] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    _behind: set[str | None] = field(default_factory=set)
    _later: set[str | None] = field(default_factory=set)

    def add(self, answer: Settlement | InTransaction) -> None:
        deliveries = (answer.delivery,) if isinstance(answer, Settlement) else answer.deliveries
        key = deliveries[0].record.key if self.ordered and len(deliveries) == 1 else None
        if key is not None and key in self._later:
            self.again += deliveries
            return
        if key is not None and key in self._behind:
            final: Sequence[Settlement] = [Settlement(deliveries[0], "release")]
        elif isinstance(answer, Settlement):
            final = [answer]
        else:
            final = self._run(answer)
        if key is not None and final and final[0].holds_key:
            self._behind.add(key)
        self.failed |= {settlement.delivery.record.id for settlement in final if settlement.verdict != "done"}
        self.settlements += final

    def _run(self, work: InTransaction) -> Sequence[Settlement]:
        if self.group is None:
            return self.effects.run(self.sql, work)
        # Noted before it happens: another process that was given the same event waits here until this has happened, or has not.
        ids = {delivery.record.id for delivery in work.deliveries} - self.failed
        noted = _note_seen(self.sql, self.group, ids, self.now_us)
        # One event may have been delivered twice into one batch: the second is finished, the first answers for it.
        first = {delivery.record.id: delivery for delivery in reversed(work.deliveries) if delivery.record.id in noted}
        again = [delivery for delivery in work.deliveries if first.get(delivery.record.id) is delivery]
        if len(again) == len(work.deliveries):
            final = self.effects.run(self.sql, work)
            self._forget(settlement.delivery.record.id for settlement in final if settlement.verdict != "done")
            return final
        self._forget(noted)
        done = [Settlement(delivery) for delivery in work.deliveries if first.get(delivery.record.id) is not delivery]
        self.again += again
        if self.ordered:
            self._later |= {delivery.record.key for delivery in again}
        work.settlements = [*done, *(Settlement(delivery, "release") for delivery in again)]
        return done

    def _forget(self, ids: Iterable[str]) -> None:
        """Their effect has not happened after all."""
        self.sql.many("delete from trilogue_state where owner = ? and id = ?", [(f"seen:{self.group}", id) for id in ids])


def _seen_among(sql: Sql, owner: str, ids: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for start in range(0, len(ids), LOOK_KEYS):
        part = ids[start : start + LOOK_KEYS]
        select = f"select id from trilogue_state where owner = ? and id in ({', '.join('?' * len(part))})"
        found.update(id for (id,) in sql.rows(select, (owner, *part)))
    return found


def _note_seen(sql: Sql, group: str, ids: Collection[str], now_us: int) -> set[str]:
    """From now on the store answers for these: a broker that delivers one again changes nothing. Returns those that are new."""
    owner, some = f"seen:{group}", sorted(ids)
    new: set[str] = set()
    for start in range(0, len(some), LOOK_KEYS):
        part = some[start : start + LOOK_KEYS]
        insert = f"insert into trilogue_state (owner, id, at_us, body) values {', '.join(['(?, ?, ?, ?)'] * len(part))}"
        values = [value for id in part for value in (owner, id, now_us, b"")]
        new.update(id for (id,) in sql.rows(f"{insert} on conflict (owner, id) do nothing returning id", values))
    sql.rows(
        "delete from trilogue_state where (owner, id) in (select owner, id from trilogue_state where owner = ? and at_us < ? "
        "order by at_us limit ?)",
        (owner, now_us - SEEN_US, 2 * len(ids)),
    )
    return new


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Kept(msgspec.Struct, array_like=True):
    """Where a group is in a lane. next: -1 where it has finished nothing there yet."""

    epoch: int
    next: int = -1
    finished: tuple[int, ...] = ()


def assigned(sql: Sql, group: str, lane: str) -> Assignment:
    """Fence out who had the lane before, and tell how far it came; counted here, because clocks of machines differ."""
    if sql.dialect.state:
        sql.rows(sql.dialect.state, (f"lane:{group}\x1f{lane}",))  # there may be no row yet that could be locked
    was = _kept(sql, group, lane) or _Kept(0)
    _put(sql, f"lane:{group}", lane, _Kept(was.epoch + 1, was.next, was.finished))
    began = was.next >= 0 or bool(was.finished)
    return Assignment(was.epoch + 1, Progress(lane, was.next, was.finished) if began else None)


def _keep_place(sql: Sql, group: str, place: Place) -> None:
    lane = place.progress.lane
    kept = _kept(sql, group, lane)
    if kept is None or kept.epoch != place.epoch:
        raise LeaseLost(f"{lane} of group {group!r} went to another worker")
    # What other settlements have finished meanwhile stays finished, whichever was planned first.
    first = max(kept.next, place.progress.next)
    finished = sorted(offset for offset in {*kept.finished, *place.progress.finished} if offset >= first)
    _put(sql, f"lane:{group}", lane, _Kept(place.epoch, first, tuple(finished)))


def _kept(sql: Sql, group: str, lane: str) -> _Kept | None:
    select = "select body from trilogue_state where owner = ? and id = ?" + sql.dialect.for_update
    rows = sql.rows(select, (f"lane:{group}", lane))
    return msgspec.json.decode(rows[0][0], type=_Kept) if rows else None


def start_over(sql: Sql, group: str, reset: Callable[[Db], None] | None, db: Db, ends: dict[str, int]) -> None:
    """Forget what is held for a group and where it is; whoever works for it now can settle nothing of it any more."""
    group_id = group_id_of(sql, group)
    if reset is not None:
        reset(db)
    sql.rows("delete from trilogue_held where group_id = ?", (group_id,))
    sql.rows("update trilogue_slots set epoch = epoch + 1 where group_id = ?", (group_id,))
    sql.rows("update trilogue_groups set epoch = epoch + 1, revision = revision + 1 where id = ?", (group_id,))
    sql.rows("delete from trilogue_state where owner in (?, ?)", (f"seen:{group}", f"replay:{group}"))
    for lane, _ in _states(sql, f"lane:{group}"):
        _put(sql, f"lane:{group}", lane, _Kept(assigned(sql, group, lane).epoch))
    for lane, end in ends.items():
        _put(sql, f"replay:{group}", lane, end)


def _states(sql: Sql, owner: str) -> list[Any]:
    return sql.rows("select id, body from trilogue_state where owner = ?", (owner,))


def _put(sql: Sql, owner: str, id: str, body: Any) -> None:
    sql.rows(
        "insert into trilogue_state (owner, id, at_us, body) values (?, ?, ?, ?) on conflict (owner, id) do update set "
        "at_us = excluded.at_us, body = excluded.body",
        (owner, id, now_us(), msgspec.json.encode(body)),
    )
