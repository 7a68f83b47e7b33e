"""The gate as the pure module it is: a log, a table of held rows and a gate, driven by random steps.

    log      what was published                     table    held rows, as the writer would have written them
    cursors  per slot, as written                   done     what was answered "done"

Whatever happens: a key is never out twice, its records are handled in order, and below a cursor without a row = done.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trilogue.events import Delivery, Lease, Record, Settlement
from trilogue.gate import NEVER_US, Gate, HeldRow, Plan
from trilogue.ports import SLOTS

KEYS = ("a", "b", "c", None)
SLOT_OF = {"a": 3, "b": 3, "c": 60}


def record_at(position: int, key: str | None) -> Record:
    return Record(f"id-{position}", "thing.made", b"", key, position=position)


@dataclass
class Held:
    record: Record
    slot: int
    state: str = "ready"
    due_us: int = 0
    attempt: int = 1


@dataclass
class Submitted:
    plan: Plan
    settlements: list[Settlement]
    early: list[Settlement] = field(default_factory=list)


class GateMachine(RuleBasedStateMachine):
    """One worker's gate against the tables it is the memory of. Commits happen in order, but later than their plan."""

    ordered = True

    def __init__(self) -> None:
        super().__init__()
        self.now_us = 1_000
        self.epoch = 0
        self.log: list[tuple[int, Record]] = []
        self.table: dict[int, Held] = {}
        self.cursors = [0] * SLOTS
        self.done: set[int] = set()
        self.redriven: set[int] = set()
        self.out: list[Delivery] = []
        self.queue: list[Submitted] = []
        self.gate = Gate("g", ordered=self.ordered)
        self.own_all()

    # ── the store's part ─────────────────────────────────────────────────────────────────────────────────────────────

    def own_all(self) -> None:
        self.own({slot for _, slot in [(0, 3), (0, 60), (0, 7)]})

    def own(self, slots: set[int]) -> None:
        for slot in slots - set(self.gate.leases):
            self.epoch += 1
            self.gate.own(Lease(slot, self.epoch, 1 << 60, lambda: self.now_us), self.cursors[slot])
        self.learn()

    def learn(self) -> None:
        first: dict[str, tuple[int, int]] = {}
        loose: list[tuple[int, int, int]] = []
        for position, held in sorted(self.table.items()):
            if held.state == "dead":
                continue
            due_us = NEVER_US if held.state == "parked" else held.due_us
            key = held.record.key
            if self.ordered and key is not None:
                first.setdefault(key, (held.slot, due_us))
            elif held.state == "ready":
                loose.append((held.due_us, position, held.slot))
        mine = [(key, slot, due) for key, (slot, due) in first.items() if slot in self.gate.leases]
        self.gate.learn_held(mine, [entry for entry in loose if entry[2] in self.gate.leases])

    def rows_of(self, name: str) -> list[HeldRow]:
        found = [h for p, h in sorted(self.table.items()) if h.record.key == name and h.state != "dead"]
        return [HeldRow(h.record, h.slot, h.due_us, h.attempt, h.state == "parked") for h in found]

    def commit_one(self) -> None:
        submitted = self.queue.pop(0)
        plan = submitted.plan
        mine = {slot for slot, epoch in plan.epochs.items() if self.epoch_of(slot) == epoch}
        settlements = [s for s in submitted.settlements if s.delivery.lease.slot in mine]
        for settlement in [*settlements, *(s for s in submitted.early if s.delivery.lease.slot in mine)]:
            self.write(settlement)
        for row in (*plan.rows, *plan.followers):
            if row.slot in mine:
                assert row.position not in self.table, "a row is written once"
                assert row.position not in self.done, "no row for what is done"
                record = next(r for _, r in self.log if r.position == row.position)
                self.table[row.position] = Held(record, row.slot, attempt=row.attempt)
        for slot, cursor in plan.cursors.items():
            if slot in mine:
                self.cursors[slot] = max(self.cursors[slot], cursor)
        self.gate.committed(plan, settlements, self.now_us)

    def epoch_of(self, slot: int) -> int:
        lease = self.gate.leases.get(slot)
        return -1 if lease is None else lease.epoch

    def write(self, settlement: Settlement) -> None:
        delivery = settlement.delivery
        position = delivery.record.position
        match settlement.verdict:
            case "done":
                assert position not in self.done, f"position {position} is done twice"
                self.done.add(position)
                self.table.pop(position, None)
            case "retry":
                due_us = self.now_us + settlement.after_us
                self.table[position] = Held(delivery.record, delivery.lease.slot, "ready", due_us, delivery.attempt + 1)
            case "dead":
                state = "parked" if settlement.park else "dead"
                self.table[position] = Held(delivery.record, delivery.lease.slot, state)
            case "release" if not delivery.is_held:
                self.table[position] = Held(delivery.record, delivery.lease.slot, attempt=delivery.attempt)

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6))
    def publish(self, keys: list[str | None]) -> None:
        for key in keys:
            self.log.append((SLOT_OF.get(key or "", 7), record_at(len(self.log) + 1, key)))

    @rule(limit=st.integers(1, 8))
    def claim(self, limit: int) -> None:
        gate = self.gate
        lent: list[Delivery] = []
        for name in gate.due_keys(self.now_us, limit):
            lent += gate.lend_key(name, self.rows_of(name)[:limit], self.now_us)
        loose = gate.due_loose(self.now_us, limit)
        positions = sorted(position for _, position, _ in loose)
        held = [(p, self.table[p]) for p in positions if p in self.table and self.table[p].state == "ready"]
        lent += gate.lend_loose([HeldRow(h.record, h.slot, h.due_us, h.attempt, False) for _, h in held])
        plan = gate.flush()
        if plan is not None:
            self.queue.append(Submitted(plan, []))
        lent += gate.take_ready(limit)
        ahead = [(slot, r) for slot, r in self.log if r.position > gate.scan and slot in gate.leases][:limit]
        if gate.scan < len(self.log):
            end = ahead[-1][1].position if len(ahead) == limit else len(self.log)
            lent += gate.admit(ahead, end)
        self.hand_out(lent)

    def hand_out(self, lent: list[Delivery]) -> None:
        positions = [d.record.position for d in self.out if not d.lease.revoked]
        for delivery in lent:
            position = delivery.record.position
            assert position not in positions, f"position {position} is out twice"
            assert position not in self.done, f"position {position} is done already"
            positions.append(position)
            key = delivery.record.key
            if self.ordered and key is not None:
                before = [r.position for _, r in self.log if r.key == key and r.position < position]
                out = {d.record.position for d in (*self.out, *lent) if not d.lease.revoked}
                for earlier in before:
                    held = self.table.get(earlier)
                    is_dead = held is not None and held.state == "dead"
                    # What was given up may be redriven at any time: what went on meanwhile stays ahead of it.
                    answered = earlier in self.done or earlier in self.finished_early() or is_dead or earlier in self.redriven
                    assert answered or earlier in out, f"position {position} of key {key} overtakes {earlier}"
                    pending = earlier in self.dying()
                    assert answered or pending or not self.is_earlier_claim(earlier), f"key {key} is out in two claims"
        self.out += lent

    def finished_early(self) -> set[int]:
        return {s.delivery.record.position for q in self.queue for s in q.early}

    def dying(self) -> set[int]:
        return {s.delivery.record.position for q in self.queue for s in q.settlements}

    def is_earlier_claim(self, position: int) -> bool:
        return any(d.record.position == position and not d.lease.revoked for d in self.out)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), after_us=st.sampled_from([0, 50, 500]))
    def answer(self, data: st.DataObject, after_us: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.out), min_size=1, max_size=4, unique_by=id))
        chosen = self.whole_runs(chosen)
        self.out = [d for d in self.out if d not in chosen]
        live = [d for d in chosen if not d.lease.revoked]
        plan = self.gate.plan(live)
        submitted = Submitted(plan, [])
        blocked: set[str | None] = set()
        for delivery in sorted(live, key=lambda d: d.record.position):
            verdict = data.draw(st.sampled_from(["done", "done", "done", "retry", "dead", "park", "release"]))
            key = delivery.record.key if self.ordered else None
            if key is not None and key in blocked:
                verdict = "release"
            park = verdict == "park"
            settlement = Settlement(delivery, "dead" if park else verdict, after_us, park=park)
            if settlement.holds_key:
                blocked.add(key)
            early = self.gate.finish_early(settlement)
            (submitted.early if early else submitted.settlements).append(settlement)
        self.queue.append(submitted)

    def whole_runs(self, chosen: list[Delivery]) -> list[Delivery]:
        """A key is answered in order: what is out before a chosen delivery of its key is answered with it."""
        if not self.ordered:
            return chosen
        keys = {d.record.key for d in chosen if d.record.key is not None}
        return [d for d in self.out if d in chosen or (d.record.key in keys and not d.lease.revoked)]

    @precondition(lambda self: self.queue)
    @rule(count=st.integers(1, 3))
    def commit(self, count: int) -> None:
        for _ in range(min(count, len(self.queue))):
            self.commit_one()

    @rule(us=st.sampled_from([10, 100, 1_000]))
    def wait(self, us: int) -> None:
        self.now_us += us

    @rule(slot=st.sampled_from([3, 7, 60]))
    def leave(self, slot: int) -> None:
        """Membership grows and shrinks again before the slot is drained."""
        self.gate.leave({slot} & set(self.gate.leases))

    @rule()
    def stay(self) -> None:
        self.gate.leave(set())
        self.learn()

    @rule(slot=st.sampled_from([3, 7, 60]))
    def give_up_and_get_back(self, slot: int) -> None:
        """A drained slot goes to another worker that does nothing with it, and comes back."""
        if slot in self.gate.leases and self.gate.drained(slot) and not self.queue:
            self.gate.disown(slot)
            self.own({slot})

    @rule(slot=st.sampled_from([3, 7, 60]))
    def lose_and_get_back(self, slot: int) -> None:
        """The lease passes while things are out; another worker takes the slot and dies."""
        if slot in self.gate.leases:
            self.gate.disown(slot)
            self.out = [d for d in self.out if not d.lease.revoked]
            self.own({slot})

    @rule()
    def redrive(self) -> None:
        for held in self.table.values():
            if held.state in ("dead", "parked"):
                if held.state == "dead":
                    self.redriven.add(held.record.position)
                held.state, held.due_us, held.attempt = "ready", 0, 1
        self.learn()

    @rule()
    def sync(self) -> None:
        plan = self.gate.sync()
        if plan is not None:
            self.queue.append(Submitted(plan, []))

    @rule()
    def crash(self) -> None:
        """Everything in memory is gone, and what was not committed never happens."""
        self.gate.reset()
        self.queue.clear()
        self.out.clear()
        self.own_all()

    # ── what always holds ────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def nothing_is_lost(self) -> None:
        """Below the cursor of its slot and without a row = done."""
        for slot, record in self.log:
            position = record.position
            if position <= self.cursors[slot] and position not in self.table:
                assert position in self.done, f"position {position} is below the cursor, has no row and is not done"

    @invariant()
    def counts_are_right(self) -> None:
        live = [d for d in self.out if not d.lease.revoked]
        waiting = [s for q in self.queue if q.plan.generation is self.gate.generation for s in q.settlements]
        pending = [s for s in waiting if not s.delivery.lease.revoked]
        assert self.gate.out == len(live) + len(pending)
        assert self.gate.waiting >= 0
        assert self.gate.unwritten >= 0

    def teardown(self) -> None:
        """Answered "done" for long enough, everything that is not parked or dead comes to an end."""
        if not hasattr(self, "queue"):
            return
        self.stay()
        for _ in range(20 + 4 * len(self.log)):
            while self.queue:
                self.commit_one()
            self.now_us += 1_000
            self.claim(8)
            live = [d for d in self.out if not d.lease.revoked]
            plan = self.gate.plan(live)
            submitted = Submitted(plan, [])
            for settlement in map(Settlement, sorted(live, key=lambda d: d.record.position)):
                early = self.gate.finish_early(settlement)
                (submitted.early if early else submitted.settlements).append(settlement)
            self.queue.append(submitted)
            self.out.clear()
        while self.queue:
            self.commit_one()
        blocked: set[str | None] = set()
        for _, record in self.log:
            held = self.table.get(record.position)
            if held is not None and held.state == "parked" and record.key is not None:
                blocked.add(record.key)
            excused = (held is not None and held.state != "ready") or (self.ordered and record.key in blocked)
            assert excused or record.position in self.done, f"position {record.position} is never handed out"


class UnorderedGateMachine(GateMachine):
    ordered = False


settings.register_profile("gate", max_examples=150, stateful_step_count=40, deadline=None)
TestOrdered = GateMachine.TestCase
TestOrdered.settings = settings(settings.get_profile("gate"), suppress_health_check=list(HealthCheck))
TestUnordered = UnorderedGateMachine.TestCase
TestUnordered.settings = settings(settings.get_profile("gate"), suppress_health_check=list(HealthCheck))


def _owned(cursor: int = 0, *, epoch: int = 1) -> Gate:
    gate = Gate("g", ordered=True)
    gate.own(Lease(3, epoch, 1 << 60, lambda: 0), cursor)
    return gate


def test_a_lost_slots_span_does_not_take_the_cursor_of_its_successor_along() -> None:
    gate = _owned()
    assert len(gate.admit([(3, record_at(1, "a")), (3, record_at(2, "b"))], 100)) == 2
    gate.disown(3)
    gate.own(Lease(3, 2, 1 << 60, lambda: 0), 0)
    plan = gate.sync()
    assert plan is None or plan.cursors.get(3, 0) == 0


def test_a_slot_that_stays_after_all_is_read_again_from_where_it_was_left() -> None:
    gate = _owned()
    gate.leave({3})
    assert gate.admit([(3, record_at(1, "a"))], 1) == []
    gate.leave(set())
    assert gate.scan == 0
    assert len(gate.admit([(3, record_at(1, "a"))], 1)) == 1


def test_followers_are_written_when_their_key_is_due_although_something_is_out() -> None:
    gate = _owned()
    gate.learn_held([("a", 3, 0)], [])
    assert len(gate.admit([(3, record_at(1, "slow"))], 1)) == 1
    assert gate.admit([(3, record_at(2, "a"))], 2) == []
    assert gate.flush() is None
    assert gate.due_keys(1, 10) == []
    plan = gate.flush()
    assert plan is not None
    assert [row.position for row in plan.followers] == [2]
    gate.committed(plan, [], 1)
    assert gate.due_keys(1, 10) == ["a"]


def test_what_a_key_had_waiting_is_lent_in_parts_in_order() -> None:
    gate = _owned()
    first = gate.admit([(3, record_at(1, "a"))], 1)
    gate.admit([(3, record_at(n, "a")) for n in range(2, 8)], 7)
    gate.plan(first)
    gate.finish_early(Settlement(first[0]))
    part = gate.take_ready(4)
    gate.admit([(3, record_at(8, "a"))], 8)
    assert [d.record.position for d in part] == [2, 3, 4, 5]
    assert gate.take_ready(4) == []
    gate.plan(part)
    for delivery in part:
        gate.finish_early(Settlement(delivery))
    assert [d.record.position for d in gate.take_ready(10)] == [6, 7, 8]


def test_a_cursor_never_passes_what_is_out_in_a_span_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilogue.gate.CURSOR_SPREAD", 0)
    gate = Gate("g", ordered=True)
    gate.own(Lease(1, 1, 1 << 60, lambda: 0), 0)
    [ahead] = gate.admit([(1, Record("r10", "t", b"", "a", position=10))], 500)
    gate.own(Lease(40, 1, 1 << 60, lambda: 0), 0)  # lags: the scan goes back
    [behind] = gate.admit([(40, Record("r20", "t", b"", "b", position=20))], 300)
    plan = gate.plan([behind])
    assert plan.cursors == {40: 300}  # not slot 1, whose record 10 is out and has no row
    assert not ahead.is_held


def test_a_record_known_twice_is_lent_once() -> None:
    gate = Gate("g", ordered=False)
    gate.own(Lease(1, 1, 1 << 60, lambda: 0), 0)
    gate.learn_held([], [(0, 10, 1), (5, 10, 1)])
    assert gate.due_loose(9, 10) == [(0, 10, 1)]
    gate.lend_loose([HeldRow(Record("r10", "t", b"", None, position=10), 1, 0, 1, False)])
    gate.learn_held([], [(0, 10, 1)])
    assert gate.due_loose(9, 10) == []
