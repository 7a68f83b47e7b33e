"""The gate for what a broker delivered, as the pure module it is: lanes, a store and a gate, driven by random steps.

    lanes    what the broker still has to deliver, in order        out       lent and not answered
    rows     held in the store, by key                             handled   in the order of their keys

Whatever happens: a key is out in one claim, nothing overtakes, nothing is lost, and what waits is bounded.
"""

from collections import defaultdict

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trilogue.brokers import keyed
from trilogue.brokers.keyed import KeyedGate
from trilogue.events import Delivery, Lease, Record

KEYS = ("a", "b", "c", None)


def lease() -> Lease:
    return Lease(0, 0, 1 << 62, lambda: 0)


def delivery(n: int, key: str | None, lane: Lease, *, data: bytes = b"") -> Delivery:
    return Delivery(Record(f"id-{n}", "thing.made", data, key, position=n), "g", lane)


def numbers(deliveries: list[Delivery]) -> list[int]:
    return [each.record.position for each in deliveries]


def admitted(*keys: str | None, ordered: bool = True) -> KeyedGate:
    gate, lane = KeyedGate(ordered=ordered), lease()
    gate.admit(delivery(n, key, lane) for n, key in enumerate(keys))
    return gate


def test_a_key_is_out_in_one_claim_and_what_follows_waits() -> None:
    gate = admitted("a", "b", "a")
    out = gate.take(2)
    assert numbers(out) == [0, 1]
    assert numbers(gate.take(10)) == []
    gate.finish(out[1])
    assert numbers(gate.take(10)) == []
    gate.finish(out[0])
    assert numbers(gate.take(10)) == [2]


def test_a_claim_takes_a_run_of_a_key() -> None:
    assert numbers(admitted("a", "b", "a").take(10)) == [0, 1, 2]


def test_without_order_nothing_waits() -> None:
    gate = admitted("a", "a", "a", ordered=False)
    assert numbers(gate.take(1)) == [0]
    assert numbers(gate.take(5)) == [1, 2]


def test_records_without_a_key_wait_for_nobody() -> None:
    gate = admitted(None, None)
    assert numbers(gate.take(1)) == [0]
    assert numbers(gate.take(1)) == [1]


def test_what_is_given_back_comes_before_what_followed() -> None:
    gate = admitted("a", "a", "a", "a")
    out = gate.take(3)
    gate.finish(out[0])
    gate.give_back(out[2])
    gate.give_back(out[1])
    assert numbers(gate.take(10)) == [1, 2, 3]


def test_a_key_that_is_held_is_looked_up_and_not_lent() -> None:
    gate = KeyedGate(ordered=True)
    gate.learn(["a"])
    lane = lease()
    gate.admit([delivery(1, "a", lane), delivery(2, "b", lane)])
    assert numbers(gate.take(10)) == [2]
    checks = gate.begin_checks(10)
    assert numbers(checks) == [1]
    gate.admit([delivery(3, "a", lane)])
    assert not gate.has_checks, "while it is looked up, what follows waits"
    gate.not_held("a")
    gate.give_back(checks[0])
    assert numbers(gate.take(10)) == [1, 3]


def test_a_key_that_is_learnt_to_be_held_is_not_lent_any_more() -> None:
    gate = admitted("a", "a", "b")
    gate.learn(["a"])
    assert numbers(gate.take(10)) == [2]
    assert numbers(gate.begin_checks(10)) == [0, 1]


def test_a_held_record_is_not_lent_beside_a_fresh_one_of_its_key() -> None:
    gate = admitted("a", "b")
    out = gate.take(1)
    held = delivery(9, "a", lease())
    assert not gate.may_lend(held)
    gate.finish(out[0])
    assert gate.may_lend(held)
    gate.lend_held([held])
    gate.admit([delivery(10, "a", lease())])
    assert numbers(gate.take(10)) == [1], "what is fresh of its key waits"
    gate.finish(held)
    assert numbers(gate.begin_checks(10)) == [10]


def test_a_lane_that_is_lost_takes_what_waits_of_it_along() -> None:
    gate, old, new = KeyedGate(ordered=True), lease(), lease()
    gate.admit([delivery(1, "a", old), delivery(2, "a", old), delivery(3, None, old)])
    out = gate.take(1)
    old.revoked = True
    gate.admit([delivery(1, "a", new), delivery(2, "a", new)])
    assert numbers(gate.take(10)) == [], "the first of it is still out"
    gate.finish(out[0])
    assert [(each.record.position, each.lease is new) for each in gate.take(10)] == [(1, True), (2, True)]


def test_what_is_lost_makes_room_at_once() -> None:
    gate, old = KeyedGate(ordered=True), lease()
    gate.admit(delivery(n, "a", old) for n in range(keyed.WAITING_PER_KEY + 10))
    gate.take(1)
    gate.admit(delivery(n, "a", old) for n in range(2))
    assert numbers(gate.take(5)) == []
    old.revoked = True
    gate.drop_lost()
    assert (gate.waiting, gate.is_full) == (0, False)


def test_a_key_that_is_far_behind_stops_receiving() -> None:
    gate, lane = KeyedGate(ordered=True), lease()
    gate.admit([delivery(0, "a", lane)])
    out = gate.take(1)
    gate.admit(delivery(n, "a", lane) for n in range(1, keyed.WAITING_PER_KEY + 1))
    assert gate.is_full
    gate.finish(out[0])
    gate.take(keyed.WAITING_PER_KEY)
    assert not gate.is_full


def test_much_or_large_stops_receiving() -> None:
    lane = lease()
    many = KeyedGate(ordered=True)
    many.admit(delivery(n, f"k{n}", lane) for n in range(keyed.WAITING_RECORDS))
    assert many.is_full
    large = KeyedGate(ordered=False)
    large.admit(delivery(n, None, lane, data=b"x" * (1 << 20)) for n in range(32))
    assert large.is_full
    large.take(1)
    assert not large.is_full


def test_clearing_gives_back_everything_in_order() -> None:
    gate = admitted("a", None, "a", "b")
    out = gate.take(1)
    assert numbers(gate.clear()) == [1, 2, 3]
    gate.finish(out[0])
    assert gate.is_idle


def test_what_is_learnt_while_it_is_asked_counts_beside_the_answer() -> None:
    gate = KeyedGate(ordered=True)
    gate.learn(["gone", "there"])
    gate.begin_learning_anew()
    gate.learn(["new"])
    gate.learn_anew(["there"])
    assert gate.held == {"there", "new"}


class GateMachine(RuleBasedStateMachine):
    """One lane per key, so that the order of a key is the order of numbers; the store is a set of rows by key."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = KeyedGate(ordered=True)
        self.lane = lease()
        self.published = 0
        self.unsent: list[tuple[int, str | None]] = []
        self.unacked: dict[int, str | None] = {}
        self.out: dict[int, list[Delivery]] = defaultdict(list)
        self.checks: list[Delivery] = []
        self.claims = 0
        self.rows: dict[str, list[int]] = defaultdict(list)
        self.asked: list[str] | None = None
        self.done: dict[str | None, list[int]] = defaultdict(list)

    @rule(key=st.sampled_from(KEYS))
    def publish(self, key: str | None) -> None:
        self.published += 1
        self.unsent.append((self.published, key))

    @rule(count=st.integers(1, 5))
    def receive(self, count: int) -> None:
        batch, self.unsent = self.unsent[:count], self.unsent[count:]
        self.unacked.update(batch)
        self.gate.admit([delivery(n, key, self.lane) for n, key in batch])

    @rule(limit=st.integers(1, 4))
    def take(self, limit: int) -> None:
        self.claims += 1
        taken = self.gate.take(limit)
        assert len(taken) <= limit
        busy = {each.record.key for claim in self.out.values() for each in claim if not each.lease.revoked} - {None}
        for each in taken:
            assert each.record.key not in busy, "a key is out in one claim"
            assert not self.rows[each.record.key or ""], "a held key is not overtaken"
            assert not each.lease.revoked
        self.out[self.claims] = taken

    def _answered(self, data: st.DataObject) -> Delivery | None:
        claims = [n for n, claim in self.out.items() if claim]
        if not claims:
            return None
        return self.out[data.draw(st.sampled_from(claims))].pop(0)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        each = self._answered(data)
        if each is not None:
            if not each.lease.revoked:
                self.done[each.record.key].append(each.record.position)
                del self.unacked[each.record.position]
            self.gate.finish(each)

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """It becomes a row; what was lent behind it is given back."""
        each = self._answered(data)
        if each is None:
            return
        claim = next((claim for claim in self.out.values() if any(e.record.key == each.record.key for e in claim)), [])
        behind = [e for e in claim if e.record.key == each.record.key] if each.record.key is not None else []
        if not each.lease.revoked:
            del self.unacked[each.record.position]
            if each.record.key is None:
                self.done[None].append(each.record.position)
            else:
                self.rows[each.record.key].append(each.record.position)
                self.gate.learn([each.record.key])
        self.gate.finish(each)
        for other in behind:
            claim.remove(other)
            self.gate.give_back(other)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A claim is given back, in whatever order."""
        claims = [n for n, claim in self.out.items() if claim]
        if claims:
            claim = self.out[data.draw(st.sampled_from(claims))]
            for each in data.draw(st.permutations(claim)):
                self.gate.give_back(each)
            claim.clear()

    @precondition(lambda self: not self.checks)
    @rule(limit=st.integers(1, 4))
    def begin_checks(self, limit: int) -> None:
        self.checks = self.gate.begin_checks(limit)

    @precondition(lambda self: self.checks)
    @rule()
    def end_checks(self) -> None:
        checks, self.checks = self.checks, []
        for each in checks:
            key = each.record.key or ""
            if not self.rows[key]:
                self.gate.not_held(key)
        for each in checks:
            key = each.record.key or ""
            if self.rows[key] and not each.lease.revoked:
                assert self.rows[key][-1] < each.record.position, "rows are in order"
                self.rows[key].append(each.record.position)
                del self.unacked[each.record.position]
                self.gate.finish(each)
            else:
                self.gate.give_back(each)

    @rule(key=st.sampled_from([key for key in KEYS if key]))
    def drain_a_row(self, key: str) -> None:
        """Another worker finishes the first row of a key."""
        if self.rows[key]:
            self.done[key].append(self.rows[key].pop(0))

    @rule()
    def ask_which_are_held(self) -> None:
        self.gate.begin_learning_anew()
        self.asked = [key for key, rows in self.rows.items() if rows]

    @precondition(lambda self: self.asked is not None)
    @rule()
    def learn_anew(self) -> None:
        self.gate.learn_anew(self.asked or ())
        assert self.gate.held >= {key for key, rows in self.rows.items() if rows}
        self.asked = None

    @rule()
    def lose_the_lane(self) -> None:
        self.lane.revoked = True
        self.lane = lease()
        self.unsent = sorted([*self.unacked.items(), *self.unsent])
        self.unacked.clear()

    @rule()
    def drop_lost(self) -> None:
        self.gate.drop_lost()

    @invariant()
    def order_is_kept(self) -> None:
        for key, done in self.done.items():
            assert key is None or done == sorted(done)

    @invariant()
    def counts_are_true(self) -> None:
        lent = sum(map(len, self.out.values())) + len(self.checks)
        assert self.gate.out == lent
        assert self.gate.waiting >= 0
        assert self.gate.ready <= self.gate.waiting

    def teardown(self) -> None:
        """Whatever was going on, everything is handled in the end."""
        for claim in self.out.values():
            for each in claim:
                self.gate.give_back(each)
        self.out.clear()
        if self.checks:
            self.end_checks()
        for _ in range(200):
            self.receive(5)
            for key in ("a", "b", "c"):
                self.drain_a_row(key)
            self.begin_checks(50)
            self.end_checks()
            self.take(50)
            for each in self.out.pop(self.claims):
                self.done[each.record.key].append(each.record.position)
                del self.unacked[each.record.position]
                self.gate.finish(each)
        assert sorted(n for done in self.done.values() for n in done) == list(range(1, self.published + 1))
        assert self.gate.is_idle
        assert not self.gate.has_checks
        self.order_is_kept()


TestGateMachine = GateMachine.TestCase
TestGateMachine.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
pytestmark = pytest.mark.filterwarnings("error")
