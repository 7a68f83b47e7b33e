"""Aggregates, deciders and decisions by themselves: pure."""

import os
import subprocess
import sys
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from bank_words import Account, Deposited, Enrol, InsufficientFunds, Kept, Opened, State, Withdrawn, accounts, evolve

from trilogue import Aggregate, BadOption, Boundary, Decider, Decision, Snapshot, TwiceNamed, UnknownEvent, event, tag
from trilogue.aggregate import boundaries, decided, reducer_of
from trilogue.durations import Duration


def test_emitting_applies_at_once_and_remembers() -> None:
    account = Account("a")
    account.deposit(5)
    account.withdraw(2)
    assert account.balance == 3
    assert account.uncommitted == (Deposited("a", Decimal(5)), Withdrawn("a", Decimal(2)))
    assert account.version == 0


def test_a_rule_that_refuses_leaves_everything_as_it_was() -> None:
    account = Account("a")
    with pytest.raises(InsufficientFunds):
        account.withdraw(1)
    assert (account.balance, account.uncommitted) == (0, ())


def test_what_apply_refuses_is_not_emitted() -> None:
    class Odd(Aggregate, stream="odd-{id}"):
        def apply(self, e: Deposited) -> None:
            raise ZeroDivisionError

    odd = Odd("o")
    with pytest.raises(ZeroDivisionError):
        odd.emit(Deposited("o", Decimal(1)))
    assert odd.uncommitted == ()


def test_an_aggregate_is_a_plain_dataclass() -> None:
    assert Account("a", balance=Decimal(3)) == Account("a", Decimal(3))
    assert repr(Account("a")) == "Account(id='a', balance=Decimal('0'))"
    other = Account("a")
    other.mark_saved(7)
    assert other == Account("a")  # the version is no part of its state


def test_an_event_apply_does_not_take_is_refused_with_the_mend() -> None:
    with pytest.raises(UnknownEvent, match=r"Account.apply\(\) does not take CourseOpened: add it to the annotation"):
        Account("a").emit(__import__("bank_words").CourseOpened("c", 1))


@pytest.mark.parametrize("pattern", ["account", "{id}{id}", "a-{name}", "{id}-{x}", "a}{id}"])
def test_a_stream_pattern_holds_id_once(pattern: str) -> None:
    with pytest.raises(BadOption, match="must hold"):

        class Wrong(Aggregate, stream=pattern):
            pass

    with pytest.raises(BadOption, match="must hold"):
        Decider(pattern, State(), evolve)


def test_a_subclass_inherits_stream_and_policy() -> None:
    class Special(Kept):
        pass

    assert reducer_of(Special).stream_of("x") == "kept-x"
    assert reducer_of(Special).snapshot == Snapshot(every=5)


@pytest.mark.parametrize("id", ["", "x" * 256, "a\nb", 7])
def test_ids_that_are_none(id: Any) -> None:
    with pytest.raises(BadOption, match="is no id"):
        reducer_of(Account).stream_of(id)


def test_what_cannot_be_folded_says_so() -> None:
    class Bare(Aggregate, stream="bare-{id}"):
        pass

    def fold(state: int, e: int) -> int:
        return state

    def twice(state: int, e: "Deposited | Also") -> int:
        return state

    for wrong in (Bare, Decider("x-{id}", 0, fold), int, None):
        with pytest.raises(UnknownEvent):
            reducer_of(wrong)
    twice.__annotations__["e"] = Deposited | Also
    with pytest.raises(TwiceNamed):
        reducer_of(Decider("x-{id}", 0, twice))


@event("account.deposited")
@dataclass(frozen=True)
class Also:
    n: int


def test_the_reducer_knows_the_events() -> None:
    reducer = reducer_of(Account)
    assert sorted(reducer.coders) == ["account.deposited", "account.opened", "account.withdrawn"]
    assert reducer.takes(Opened("a", Decimal(1)))
    state = reducer.new("a")
    assert reducer.fold(state, Opened("a", Decimal(9))).balance == 9
    assert reducer_of(accounts).fold(State(), Deposited("a", Decimal(4))) == State(Decimal(4))


FINGERPRINT = """
from dataclasses import dataclass
from trilogue import Aggregate, Snapshot, event
from trilogue.aggregate import reducer_of
@event("x")
@dataclass(frozen=True)
class X:
    kind: str
class A(Aggregate, stream="a-{id}", snapshot=Snapshot(every=1)):
    n: int = 0
    def apply(self, e: X) -> None:
        self.n += e.kind in {"a", "b", "c", "d"}
print(reducer_of(A).fingerprint)
"""


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    prints = {
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(prints) == 1


def test_what_else_is_folded_changes_the_fingerprint() -> None:
    def fold(state: int, e: Deposited) -> int:
        return state + 1

    def more(state: int, e: Deposited | Withdrawn) -> int:
        return state + 1

    def zero(start: int) -> str:
        class Counter(Aggregate, stream="c-{id}"):
            n: int = start

            def apply(self, e: Deposited) -> None:
                self.n += 1

        return reducer_of(Counter).fingerprint

    prints = {reducer_of(Decider("x-{id}", initial, each)).fingerprint for initial in (0, 1) for each in (fold, more)}
    assert len(prints) == 4
    assert zero(0) != zero(100)


def test_another_fold_has_another_fingerprint() -> None:
    class One(Aggregate, stream="s-{id}", snapshot=Snapshot(every=1)):
        n: int = 0

        def apply(self, e: Deposited) -> None:
            self.n += 1

    def variant(step: int = 1, version: int = 1, more: bool = False) -> str:
        if more:

            class More(Aggregate, stream="s-{id}", snapshot=Snapshot(every=1)):
                n: int = 0
                m: int = 0

                def apply(self, e: Deposited) -> None:
                    self.n += 1

            return reducer_of(More).fingerprint
        policy = Snapshot(every=1, version=version)
        if step == 1:

            class Same(Aggregate, stream="s-{id}", snapshot=policy):
                n: int = 0

                def apply(self, e: Deposited) -> None:
                    """Another docstring changes nothing."""
                    self.n += 1

            return reducer_of(Same).fingerprint

        class Other(Aggregate, stream="s-{id}", snapshot=policy):
            n: int = 0

            def apply(self, e: Deposited) -> None:
                self.n += 2

        return reducer_of(Other).fingerprint

    assert variant(1) == reducer_of(One).fingerprint
    assert len({variant(1), variant(2), variant(version=2), variant(more=True)}) == 4


@pytest.mark.parametrize(("every", "slower_than"), [(None, None), (0, None), (-1, None), (True, None), ("5", None)])
def test_snapshot_policies_that_are_none(every: Any, slower_than: Duration | None) -> None:
    with pytest.raises(BadOption):
        Snapshot(every=every, slower_than=slower_than)


def test_when_a_snapshot_is_due() -> None:
    assert [Snapshot(every=5).is_due(n, 9.0) for n in (4, 5, 6)] == [False, True, True]
    assert [Snapshot(slower_than="20ms").is_due(n, s) for n, s in ((1, 0.019), (1, 0.021), (0, 9.0))] == [False, True, False]


def test_boundaries() -> None:
    assert boundaries(Enrol("c", "s")) == (Boundary(("course:c",)), Boundary(("student:s",)))

    class One(Enrol):
        def boundary(self) -> Any:
            return tag("course", self.course)

    assert boundaries(One("c", "s")) == (Boundary(("course:c",)),)
    for nothing in ([], None, [Boundary(())], "course:c"):

        class Empty(Enrol):
            def boundary(self, nothing: Any = nothing) -> Any:
                return nothing or ()

        with pytest.raises(BadOption, match="boundary"):
            boundaries(Empty("c", "s"))


def test_a_decision_needs_its_parts() -> None:
    class Nothing(Decision):
        pass

    with pytest.raises(NotImplementedError, match="needs boundary"):
        boundaries(Nothing())
    with pytest.raises(NotImplementedError, match="needs decide"):
        Nothing().decide()


def test_what_a_decision_returns() -> None:
    e = Deposited("a", Decimal(1))
    assert decided(None) == []
    assert decided(e) == [e]
    assert decided([e, e]) == [e, e]
    assert decided(x for x in (e,)) == [e]
    for wrong in (5, "text", [e, 5], {"a": 1}):
        with pytest.raises(BadOption, match="expected an event"):
            decided(wrong)
    with pytest.raises(BadOption, match="at most 1000"):
        decided([e] * 1_001)
