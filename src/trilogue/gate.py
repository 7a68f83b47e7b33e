"""Which records of one group may be out at a worker now. Pure: no clock of its own, no I/O, no user types.

    log     ──scan──▶ Span(end=120)   record 101 k=a   lent          a is out: what follows of a waits in memory
                                      record 102 k=b   lent
                                      record 103 k=a   waiting       (lent when 101 is answered)
                                      record 104 k=c   follower      c has held rows: 104 becomes one more of them
    settle  ──plan──▶ cursor := 120, and a held row for every record of the span that is not finished

Three rules keep every key in order:
  1. A key is out in one claim. What follows waits, in memory for a little, in held rows beyond that.
  2. A key with held rows gets its records from there, by position, until there are none left; its records in the log
     join the rows meanwhile.
  3. A held row is changed only by the owner of its slot, and what it was lent for is over when the change is committed.

A span "moves" when something of it is settled: the cursor goes to its end, and whatever is unfinished becomes a row. Below
the cursor without a row means done. Unordered groups and records without a key use the same rows, each for itself.
"""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from trilogue.events import Delivery, Lease, Record, Settlement
from trilogue.ports import SLOTS

NEVER_US = 1 << 62
WAITING_PER_KEY = 1_000
WAITING_RECORDS = 8_000
WAITING_BYTES = 32 << 20
FOLLOWERS_UNWRITTEN = 1_000
HELD_ENTRIES = 100_000
CURSOR_SPREAD = 20_000


class Generation:
    """What the gate knows of the store. Once something it told the writer failed, nothing told under it may happen."""

    __slots__ = ("broken",)

    def __init__(self) -> None:
        self.broken = False


class Span:
    """A scanned part of the log up to `end`. lent: unfinished and in memory, by position. followers: to become rows."""

    __slots__ = ("end", "followers", "lent", "moved", "slots")

    def __init__(self, end: int) -> None:
        self.end = end
        self.lent: dict[int, Delivery] = {}
        self.followers: list[Row] = []
        self.slots: set[int] = set()
        self.moved = False


@dataclass(slots=True)
class Row:
    """A held row about to be written."""

    position: int
    slot: int
    key: str | None
    attempt: int = 1


@dataclass(slots=True)
class HeldRow:
    """A held row as read from the store, with its record."""

    record: Record
    slot: int
    due_us: int
    attempt: int
    parked: bool


class Key(msgspec.Struct, eq=False, gc=False):
    """One key that has something out, waiting or held; made for every key of a claim, hence a Struct."""

    slot: int
    out: int = 0
    waiting: list[Delivery] = []
    has_rows: bool = False
    due_us: int = 0
    unwritten: int = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing of this key is held, out or waiting any more."""
        return not (self.out or self.waiting or self.has_rows or self.unwritten)

    @property
    def can_load(self) -> bool:
        """Whether its held rows are to be read next: nothing of it is under way."""
        return self.has_rows and not (self.out or self.waiting or self.unwritten)


@dataclass(slots=True)
class Plan:
    """What one settlement changes of a group's progress, for the writer. epochs, cursors: by slot."""

    generation: Generation
    epoch: int
    epochs: dict[int, int]
    ordered: bool
    cursors: dict[int, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    followers: list[Row] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (self.cursors or self.rows or self.followers)


class Gate:
    """The gate of one group in one process. Times are given in by the caller, in microseconds."""

    def __init__(self, group: str, *, ordered: bool) -> None:
        self.group = group
        self.ordered = ordered
        self.epoch = 0
        self._start()

    def _start(self) -> None:
        self.generation = Generation()
        self.knowledge = object()  # another one whenever learn_held() has been told anew
        self.leases: dict[int, Lease] = {}
        self.leaving: set[int] = set()
        self.seen = [0] * SLOTS
        self.stored = [0] * SLOTS
        self.scan = 0
        self.synced = 0
        self.spans: list[Span] = []  # unmoved, by end
        self.keys: dict[str, Key] = {}
        self.out = 0
        self.out_by_slot = [0] * SLOTS
        self.waiting = 0
        self.record_bytes = 1  # of late, on average: told by whoever scans, so that memory is bounded in bytes too
        self.unwritten = 0
        self._wants_flush = False
        self._ready: deque[list[Delivery]] = deque()
        self._due_keys: list[tuple[int, str]] = []
        self._loose: list[tuple[int, int, int]] = []
        self._loose_out: dict[int, int] = {}  # position: slot

    def reset(self) -> None:
        """Forget everything: the store is read again. What is out can no longer be settled."""
        for lease in self.leases.values():
            lease.revoked = True
        self.generation.broken = True
        self._start()

    # ── slots ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def own(self, lease: Lease, cursor: int) -> None:
        """Begin with a slot at its stored cursor."""
        slot = lease.slot
        self.leases[slot] = lease
        self.seen[slot] = self.stored[slot] = cursor
        # Slots change hands one by one and may lag: the scan goes back to the slowest, `seen` skips what others had.
        self.scan = cursor if len(self.leases) == 1 else min(self.scan, cursor)

    def disown(self, slot: int) -> None:
        """Let go of a slot; nothing of it may be answered any more."""
        self.leases.pop(slot).revoked = True
        self.leaving.discard(slot)
        for name in [name for name, key in self.keys.items() if key.slot == slot]:
            key = self.keys.pop(name)
            self.waiting -= len(key.waiting)
            self.unwritten -= key.unwritten
        for span in self.spans:
            span.lent = {position: d for position, d in span.lent.items() if d.lease.slot != slot}
            span.followers = [row for row in span.followers if row.slot != slot]
            span.slots.discard(slot)  # when it moves, it must not take the cursor of the slot's next owner along
        self._ready = deque(run for run in self._ready if run[0].lease.slot != slot)
        self._loose = [entry for entry in self._loose if entry[2] != slot]
        heapq.heapify(self._loose)
        self._loose_out = {position: s for position, s in self._loose_out.items() if s != slot}
        self.out -= self.out_by_slot[slot]
        self.out_by_slot[slot] = 0

    def leave(self, slots: set[int]) -> None:
        """Take nothing new of these slots, so that they drain; one that stays after all is read again from where it was left."""
        for slot in self.leaving - slots:
            if slot in self.leases:
                self.scan = min(self.scan, self.seen[slot])
        self.leaving = slots

    def drained(self, slot: int) -> bool:
        """Whether nothing of the slot is out."""
        return not self.out_by_slot[slot]

    # ── what the store holds ─────────────────────────────────────────────────────────────────────────────────────────

    def learn_held(self, keys: Iterable[tuple[str, int, int]], loose: Iterable[tuple[int, int, int]]) -> None:
        """Take over the index of held rows. keys: (key, slot, due of its first row). loose: (due, position, slot)."""
        self.knowledge = object()
        due = {key: (slot, due_us) for key, slot, due_us in keys if slot in self.leases}
        for name, key in self.keys.items():
            if key.has_rows and name not in due:
                due[name] = (key.slot, 0)  # gone from the store: looking once more will find that out
        for name, (slot, due_us) in due.items():
            key = self.keys.setdefault(name, Key(slot))
            self._hold(name, key, due_us)
        self._loose = [entry for entry in loose if entry[1] not in self._loose_out and entry[2] in self.leases]
        heapq.heapify(self._loose)

    def notice(self, rows: Iterable[tuple[int, int, str | None, int]]) -> None:
        """Held rows (position, slot, key, due) that came to a broker's group; they follow what is held of their keys."""
        for position, slot, name, due_us in rows:
            self.scan = max(self.scan, position)
            if slot not in self.leases:
                continue
            if name is not None and self.ordered:
                key = self.keys.setdefault(name, Key(slot))
                if not key.has_rows:
                    self._hold(name, key, due_us)
            elif due_us < NEVER_US:
                heapq.heappush(self._loose, (due_us, position, slot))

    def _hold(self, name: str, key: Key, due_us: int) -> None:
        key.has_rows = True
        key.due_us = due_us
        if due_us < NEVER_US:
            heapq.heappush(self._due_keys, (due_us, name))

    @property
    def is_full(self) -> bool:
        """Whether nothing new may be read from the log: memory is bounded."""
        waiting = self.waiting >= WAITING_RECORDS or self.waiting * self.record_bytes >= WAITING_BYTES
        return waiting or len(self.keys) + len(self._loose) >= HELD_ENTRIES

    def next_due_us(self) -> int:
        """When the next held record may go out; NEVER_US if there is none."""
        loose = self._loose[0][0] if self._loose else NEVER_US
        return min(loose, self._due_keys[0][0] if self._due_keys else NEVER_US)

    def due_keys(self, now_us: int, limit: int) -> list[str]:
        """Keys whose held rows may go out now: load each and give it to lend_key()."""
        due: list[str] = []
        while self._due_keys and self._due_keys[0][0] <= now_us and len(due) < limit:
            when, name = heapq.heappop(self._due_keys)
            key = self.keys.get(name)
            # Entries are never removed from the heap when a key changes: a stale one is recognised here.
            if key is None or key.due_us != when or key.slot in self.leaving or name in due:
                continue
            if key.can_load:
                due.append(name)
            elif key.unwritten and not (key.out or key.waiting):
                self._wants_flush = True
        return due

    def due_loose(self, now_us: int, limit: int) -> list[tuple[int, int, int]]:
        """Held records without order that may go out now, as (due, position, slot): load each and give it to lend_loose()."""
        due: dict[int, tuple[int, int, int]] = {}
        while self._loose and self._loose[0][0] <= now_us and len(due) < limit:
            entry = heapq.heappop(self._loose)
            # One that came back and was read from the store as well has two entries.
            if entry[1] not in self._loose_out:
                due.setdefault(entry[1], entry)
        return list(due.values())

    def still_due(self, names: Iterable[str], loose: Iterable[tuple[int, int, int]]) -> None:
        """Take back what due_keys() and due_loose() told of and could not be loaded."""
        for name in names:
            if name in self.keys:
                heapq.heappush(self._due_keys, (self.keys[name].due_us, name))
        for entry in loose:
            heapq.heappush(self._loose, entry)

    def lend_key(self, name: str, rows: Sequence[HeldRow], now_us: int) -> list[Delivery]:
        """Lend the first rows of a held key, as many as are due in a row."""
        key = self.keys[name]
        if not rows:
            key.has_rows = False
            self._forget_if_idle(name, key)
            return []
        run: list[Delivery] = []
        for row in rows:
            if row.parked or row.due_us > now_us:
                break
            run.append(self._lend_row(row))
        if not run:
            self._hold(name, key, NEVER_US if rows[0].parked else rows[0].due_us)
        key.out += len(run)
        return run

    def lend_loose(self, rows: Sequence[HeldRow]) -> list[Delivery]:
        """Lend held records without order."""
        owned = [row for row in rows if row.slot in self.leases and row.record.position not in self._loose_out]
        self._loose_out.update((row.record.position, row.slot) for row in owned)
        return [self._lend_row(row) for row in owned]

    def _lend_row(self, row: HeldRow) -> Delivery:
        self.out += 1
        self.out_by_slot[row.slot] += 1
        lease = self.leases[row.slot]
        return Delivery(row.record, self.group, lease, row.attempt, row.record.position <= lease.quiet_to, is_held=True)

    # ── what the log holds ───────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, records: Iterable[tuple[int, Record]], end: int) -> list[Delivery]:
        """Take scanned (slot, record) pairs up to position `end`; returns those to lend now."""
        span = Span(end)
        lend: list[Delivery] = []
        fresh: set[str] = set()
        leases, seen, leaving = self.leases, self.seen, self.leaving
        for slot, record in records:
            lease = leases.get(slot)
            if lease is None or record.position <= seen[slot] or slot in leaving:
                continue
            span.slots.add(slot)
            delivery = Delivery(record, self.group, lease, 1, record.position <= lease.quiet_to, False, span)
            if record.key is None or not self.ordered or self._may_go(record.key, slot, delivery, fresh):
                span.lent[record.position] = delivery
                self.out_by_slot[slot] += 1
                lend.append(delivery)
        self.out += len(lend)
        self._advance(end)
        if span.slots:
            # Not simply appended: after a lagging slot was taken over, the scan has gone back.
            insort(self.spans, span, key=_end)
        return lend

    def _may_go(self, name: str, slot: int, delivery: Delivery, fresh: set[str]) -> bool:
        """Whether a record of an ordered key goes out with this claim; if not, it waits or follows."""
        key = self.keys.get(name)
        if key is None:
            key = self.keys[name] = Key(slot)
            fresh.add(name)
        if name in fresh:
            key.out += 1
            return True
        if key.has_rows or len(key.waiting) >= WAITING_PER_KEY:
            self._follow(name, key, delivery)
        else:
            delivery.span.lent[delivery.record.position] = delivery
            key.waiting.append(delivery)
            self.waiting += 1
        return False

    def _follow(self, name: str, key: Key, delivery: Delivery) -> None:
        if not key.has_rows:
            self._hold(name, key, 0)
        delivery.span.followers.append(Row(delivery.record.position, key.slot, name, delivery.attempt))
        key.unwritten += 1
        self.unwritten += 1

    def _advance(self, end: int) -> None:
        self.scan = end
        for slot in self.leases:
            if self.seen[slot] < end and slot not in self.leaving:
                self.seen[slot] = end

    def take_ready(self, limit: int) -> list[Delivery]:
        """Deliveries that had waited for their key and may go out now."""
        taken: list[Delivery] = []
        while self._ready and len(taken) < limit:
            run = self._not_more_than(limit - len(taken), self._ready.popleft())
            for delivery in run:
                self.out_by_slot[delivery.lease.slot] += 1
            self.out += len(run)
            taken += run
        return taken

    def _not_more_than(self, limit: int, run: list[Delivery]) -> list[Delivery]:
        """The first of a key's deliveries; the rest waits on."""
        rest = run[limit:]
        if rest:
            key = self.keys[run[0].record.key or ""]
            key.out -= len(rest)
            key.waiting = rest + key.waiting
            self.waiting += len(rest)
        return run[:limit]

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, answered: Iterable[Delivery]) -> Plan:
        """What settling these deliveries does to cursor and rows; spans count as moved from here on."""
        plan = self._empty_plan()
        last: Span | None = None
        for delivery in answered:
            span = delivery.span
            if span is None:
                continue
            span.lent.pop(delivery.record.position, None)
            if not span.moved and (last is None or span.end > last.end):
                last = span
        if last is not None:
            self._move(plan, last.end)
        return plan

    def flush(self) -> Plan | None:
        """A plan that writes followers, if some key cannot go on without it and nothing lent will soon do it."""
        if self.unwritten < (FOLLOWERS_UNWRITTEN if self.out and not self._wants_flush else 1):
            return None
        self._wants_flush = False
        last = max((span.end for span in self.spans if span.followers), default=0)
        return self._moved_to(last) if last else None

    def sync(self) -> Plan | None:
        """A plan that brings all cursors to where nothing is unfinished; before stopping, or after a long quiet scan."""
        plan = self._moved_to(self.spans[-1].end if self.spans else 0)
        self._sync_cursors(plan, self.scan)
        return None if plan.is_empty else plan

    @property
    def lags_behind_scan(self) -> bool:
        """Whether so much was skipped since cursors were written that a restart would read it again."""
        return not self.spans and self.scan - self.synced > CURSOR_SPREAD

    def _moved_to(self, end: int) -> Plan:
        plan = self._empty_plan()
        self._move(plan, end)
        return plan

    def _empty_plan(self) -> Plan:
        return Plan(self.generation, self.epoch, {slot: lease.epoch for slot, lease in self.leases.items()}, self.ordered)

    def _move(self, plan: Plan, end: int) -> None:
        while self.spans and self.spans[0].end <= end:
            span = self.spans.pop(0)
            span.moved = True
            for delivery in span.lent.values():
                record = delivery.record
                delivery.is_held = True
                if not self.ordered or record.key is None:
                    self._loose_out[record.position] = delivery.lease.slot
                key = record.key if self.ordered else None
                plan.rows.append(Row(record.position, delivery.lease.slot, key, delivery.attempt))
            plan.followers += span.followers
            for slot in span.slots:
                if slot in self.leases:
                    plan.cursors[slot] = span.end
        if end - self.synced > CURSOR_SPREAD:
            self._sync_cursors(plan, end)
        for slot, cursor in plan.cursors.items():
            self.stored[slot] = cursor

    def _sync_cursors(self, plan: Plan, end: int) -> None:
        """Slots that saw nothing for long get their cursor too: a restart must not read the whole log again for them."""
        self.synced = end
        # After the scan has gone back, a span behind `end` may still hold records of a slot before it.
        unmoved = {slot for span in self.spans for slot in span.slots}
        for slot in self.leases:
            if slot not in unmoved and self.seen[slot] >= end and self.stored[slot] < end:
                plan.cursors[slot] = self.stored[slot] = end

    def finish_early(self, settlement: Settlement) -> bool:
        """Free the key of a delivery that is done and has no held row, before the commit; False for any other.

        What comes next of the key is settled after this one or, if this one fails, not at all.
        """
        delivery = settlement.delivery
        if settlement.verdict != "done" or delivery.is_held:
            return False
        self.out -= 1
        self.out_by_slot[delivery.lease.slot] -= 1
        name = delivery.record.key
        if name is not None and self.ordered:
            key = self.keys[name]
            if key.out == 1 and not (key.waiting or key.has_rows or key.unwritten):
                del self.keys[name]
            else:
                self._answered(name, None)
        return True

    def committed(self, plan: Plan, settlements: Iterable[Settlement], now_us: int) -> None:
        """The writer has done all this. settlements: all but those finished early."""
        if plan.generation is not self.generation:
            return
        for row in plan.followers:
            key = self.keys.get(row.key) if row.key is not None else None
            lease = self.leases.get(row.slot)
            # The slot may have gone and come back meanwhile: then the key is another one, which never counted these rows.
            if key is not None and lease is not None and lease.epoch == plan.epochs.get(row.slot):
                key.unwritten -= 1
                self.unwritten -= 1
                self._wake(row.key or "", key)
        for settlement in settlements:
            if not settlement.delivery.lease.revoked:
                self._settled(settlement, now_us)

    def _settled(self, settlement: Settlement, now_us: int) -> None:
        delivery = settlement.delivery
        self._count_in(delivery)
        due_us = _due(settlement, now_us)
        name = delivery.record.key
        if self.ordered and name is not None:
            self._answered(name, due_us)
            return
        self._loose_out.pop(delivery.record.position, None)
        if due_us is not None and due_us < NEVER_US:
            heapq.heappush(self._loose, (due_us, delivery.record.position, delivery.lease.slot))

    def _count_in(self, delivery: Delivery) -> None:
        self.out -= 1
        self.out_by_slot[delivery.lease.slot] -= 1

    def _answered(self, name: str, due_us: int | None) -> None:
        """One delivery of a key came back; due_us: when its row may go out again, None if it has none any more."""
        key = self.keys[name]
        key.out -= 1
        if due_us is not None:
            # Of several given back together one that has to wait decides, the earliest: if that is not the head of the rows,
            # looking at them will tell. A later one would let the head wait longer than it was told to.
            waits = [us for us in (due_us, key.due_us) if 0 < us < NEVER_US] if key.has_rows else []
            self._hold(name, key, min(waits, default=due_us))
            self._waiting_follow(name, key)
        if key.out:
            return
        if key.waiting:
            self._ready.append(key.waiting)
            key.out = len(key.waiting)
            self.waiting -= key.out
            key.waiting = []
        else:
            self._wake(name, key)
            self._forget_if_idle(name, key)

    def _waiting_follow(self, name: str, key: Key) -> None:
        self.waiting -= len(key.waiting)
        for delivery in key.waiting:
            if not delivery.span.moved:
                del delivery.span.lent[delivery.record.position]
                self._follow(name, key, delivery)
        key.waiting = []

    def _wake(self, name: str, key: Key) -> None:
        if key.can_load and key.due_us < NEVER_US:
            heapq.heappush(self._due_keys, (key.due_us, name))

    def _forget_if_idle(self, name: str, key: Key) -> None:
        if key.is_idle:
            del self.keys[name]


def _due(settlement: Settlement, now_us: int) -> int | None:
    """When the row of this settlement may go out again; None: it has no row that waits."""
    match settlement.verdict:
        case "retry":
            return now_us + settlement.after_us
        case "dead":
            return NEVER_US if settlement.park else None
        case "release":
            return 0
    return None


def _end(span: Span) -> int:
    return span.end
