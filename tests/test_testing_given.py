"""trilogue.testing.given: what it accepts, and that every check can fail, and says so."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from trilogue import App, BadOption, Db, event
from trilogue.aggregate import Aggregate, Boundary, Decider, Decision, tag
from trilogue.process import Cancel, End, Process, Timer, reacts, starts, timer
from trilogue.projection import projection
from trilogue.testing import ended, given


class InsufficientFunds(Exception):
    pass


@event("account.opened", key="account")
@dataclass(frozen=True)
class Opened:
    account: str


@event("money.deposited", key="account")
@dataclass(frozen=True)
class Deposited:
    account: str
    amount: Decimal


@event("money.withdrawn", key="account")
@dataclass(frozen=True)
class Withdrawn:
    account: str
    amount: Decimal


@event("some.other")
@dataclass(frozen=True)
class Other:
    n: int = 0


class Account(Aggregate, stream="account-{id}"):
    balance: Decimal = Decimal(0)
    looked: int = 0

    def deposit(self, amount: Decimal) -> None:
        self.emit(Deposited(self.id, amount))

    def withdraw(self, amount: Decimal) -> None:
        if amount > self.balance:
            raise InsufficientFunds(f"available {self.balance}, asked {amount}")
        self.emit(Withdrawn(self.id, amount))

    def look(self) -> None:
        self.looked += 1

    def apply(self, e: Deposited | Withdrawn) -> None:
        match e:
            case Deposited():
                self.balance += e.amount
            case Withdrawn():
                self.balance -= e.amount


@dataclass(frozen=True)
class State:
    balance: Decimal = Decimal(0)


def evolve(state: State, e: Deposited | Withdrawn) -> State:
    return State(state.balance + (e.amount if isinstance(e, Deposited) else -e.amount))


accounts = Decider("account-{id}", State(), evolve)


def withdraw(amount: Decimal) -> Callable[[State], Withdrawn]:
    def decide(state: State) -> Withdrawn:
        if amount > state.balance:
            raise InsufficientFunds(f"available {state.balance}, asked {amount}")
        return Withdrawn("a1", amount)

    return decide


TEN, FIVE = Deposited("a1", Decimal(10)), Withdrawn("a1", Decimal(5))
BOTH = pytest.mark.parametrize(
    ("model", "action", "too_much"),
    [
        (Account, lambda a: a.withdraw(Decimal(5)), lambda a: a.withdraw(Decimal(50))),
        (accounts, withdraw(Decimal(5)), withdraw(Decimal(50))),
    ],
    ids=["aggregate", "decider"],
)


def fails(check: Callable[[], object], *lines: str) -> None:
    """The check raises an AssertionError that holds these lines, in this order."""
    with pytest.raises(AssertionError) as caught:
        check()
    text = str(caught.value)
    assert re.search(".*".join(map(re.escape, lines)), text, re.DOTALL), text


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@BOTH
def test_what_was_given_is_folded_and_what_happens_is_checked(model: Any, action: Any, too_much: Any) -> None:
    story = given(model, "a1", TEN, TEN)
    story.has(balance=Decimal(20)).state(lambda s: s.balance == 20)
    story.when(action).then(FIVE).has(balance=Decimal(15)).state(lambda s: s.balance == 15)
    story.when(too_much).rejects(InsufficientFunds, "available 20").rejects("asked 50").rejects(InsufficientFunds)
    story.when(lambda _: None).then().has(balance=Decimal(20))  # the same beginning, as often as wanted


@BOTH
def test_other_events_than_expected_are_shown_side_by_side(model: Any, action: Any, too_much: Any) -> None:
    outcome = given(model, "a1", TEN).when(action)
    fails(
        lambda: outcome.then(Withdrawn("a1", Decimal(6)), Opened("a1")),
        "'a1': other events than expected",
        "  given     Deposited(account='a1', amount=Decimal('10'))",
        "  when      ",
        " at test_testing_given.py:",
        "  expected    ",
        " got",
        "! Withdrawn(account='a1', amount=Decimal('6'))",
        "   Withdrawn(account='a1', amount=Decimal('5'))",
        "      amount=Decimal('6')",
        "  amount=Decimal('5')",
        "! Opened(account='a1')",
        "   (nothing)",
    )


@BOTH
def test_each_check_of_a_stream_can_fail(model: Any, action: Any, too_much: Any) -> None:
    story = given(model, "a1", TEN)
    fails(lambda: story.when(action).then(), "other events", "(nothing)", "Withdrawn")
    fails(lambda: story.when(action).then(FIVE, FIVE), "other events", "Withdrawn", "(nothing)")
    fails(lambda: story.when(too_much).then(FIVE), "it raised InsufficientFunds: available 10, asked 50", "expected  Withdrawn")
    fails(lambda: story.when(too_much).then(), "it raised InsufficientFunds", "expected  (nothing)")
    fails(lambda: story.when(too_much).has(balance=Decimal(10)), "it raised InsufficientFunds")
    fails(lambda: story.when(too_much).state(lambda s: True), "it raised InsufficientFunds")
    fails(lambda: story.when(too_much).rejects(ValueError), "it raised InsufficientFunds", "expected  ValueError")
    fails(lambda: story.when(too_much).rejects("closed"), "it raised InsufficientFunds", "expected  Exception with 'closed'")
    fails(lambda: story.when(too_much).rejects(InsufficientFunds, "closed"), "InsufficientFunds with 'closed'")
    fails(lambda: story.when(action).rejects(InsufficientFunds), "expected InsufficientFunds, nothing was raised", "Withdrawn")
    fails(lambda: story.when(lambda _: None).rejects("no"), "nothing was raised")
    fails(lambda: story.when(action).has(balance=Decimal(10)), "its state is", "balance=Decimal('10')", "balance=Decimal('5')")
    fails(lambda: story.has(balance=Decimal(11)), "balance=Decimal('11')", "balance=Decimal('10')")
    fails(lambda: story.has(saldo=1), "saldo=1", "saldo=(no such field)")
    fails(lambda: story.when(action).state(lambda s: s.balance == 10), "the state does not pass its check: it is")
    fails(lambda: story.state(lambda s: False), "the state does not pass its check")


def test_a_check_of_the_state_may_assert_for_itself() -> None:
    def check(account: Account) -> None:
        assert account.balance == 11, "eleven"

    with pytest.raises(AssertionError, match="eleven"):
        given(Account, "a1", TEN).state(check)


def test_nothing_given_is_a_new_stream() -> None:
    given(Account, "a1").has(balance=Decimal(0)).state(lambda a: a.version == 0)
    given(Account, "a1", TEN).state(lambda a: a.version == 1)
    fails(lambda: given(Account, "a1").when(lambda a: a.deposit(Decimal(1))).then(), "  given     (nothing)")


def test_an_event_that_would_be_passed_over_is_no_beginning() -> None:
    fails(lambda: given(Account, "a1", Other()), "Other(n=0) would be passed over", "Account.apply()")
    fails(lambda: given(accounts, "a1", Other()), "Other(n=0) would be passed over", "evolve()")
    fails(lambda: given(accounts, "a1").when(lambda s: Other()), "Other(n=0) would be passed over")


def test_a_state_that_is_changed_beside_the_events_is_found() -> None:
    """After a restart it would be another one."""
    fails(
        lambda: given(Account, "a1", TEN).when(lambda a: a.look()).then(),
        "its state is another one than its events lead to",
        "looked=0",
        "looked=1",
    )


def test_an_event_that_does_not_survive_being_stored_is_found() -> None:
    amount: Any = 0.1
    fails(lambda: given(Account, "a1", Deposited("a1", amount)), "comes back from the log as another", "Decimal('0.1')")
    text: Any = "1e"
    fails(lambda: given(Account, "a1", Deposited("a1", text)), "cannot be stored and read again")
    fails(lambda: given(accounts, "a1").when(lambda s: Withdrawn("a1", amount)), "comes back from the log as another")
    no_event: Any = "no event"
    fails(lambda: given(Account, "a1", no_event), "would be passed over")


def test_the_id_is_asked_for() -> None:
    with pytest.raises(BadOption, match="comes the id"):
        given(Account, TEN)  # type: ignore[call-overload]
    with pytest.raises(BadOption, match="is no id"):
        given(Account, "")


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────────


@event("course.opened", tags=("course",))
@dataclass(frozen=True)
class CourseOpened:
    course: str
    seats: int


@event("student.enrolled", tags=("course", "student"))
@dataclass(frozen=True)
class Enrolled:
    course: str
    student: str


@event("student.enrolled.bare")
@dataclass(frozen=True)
class Bare:
    course: str


class Enrol(Decision):
    course: str
    student: str
    seats: int = 0
    makes: type = Enrolled

    def boundary(self) -> Sequence[Boundary]:
        return (tag("course", self.course), tag("student", self.student))

    def apply(self, e: CourseOpened | Enrolled | Bare) -> None:
        match e:
            case CourseOpened() if e.course == self.course:
                self.seats += e.seats
            case Enrolled() if e.course == self.course:
                self.seats -= 1

    def decide(self) -> Any:
        if self.seats < 1:
            raise InsufficientFunds("full")
        return Bare(self.course) if self.makes is Bare else Enrolled(self.course, self.student)


def test_a_decision_decides_from_what_lies_in_its_boundary() -> None:
    opened = CourseOpened("c1", 1)
    given(Enrol("c1", "s1"), opened).then(Enrolled("c1", "s1")).has(seats=1)
    given(Enrol("c1", "s1"), opened, Enrolled("c1", "s2")).rejects("full")
    given(Enrol("c1", "s1"), opened, Enrolled("c2", "s1")).then(Enrolled("c1", "s1"))


def test_each_check_of_a_decision_can_fail() -> None:
    opened = CourseOpened("c1", 1)
    fails(lambda: given(Enrol("c1", "s1"), opened).then(), "Enrol(course='c1'", "other events", "(nothing)", "Enrolled")
    fails(lambda: given(Enrol("c1", "s1"), opened).rejects("full"), "nothing was raised", "Enrolled")
    fails(lambda: given(Enrol("c1", "s1")).then(Enrolled("c1", "s1")), "it raised InsufficientFunds: full")
    fails(lambda: given(Enrol("c1", "s1")).rejects("closed"), "it raised InsufficientFunds: full")


def test_a_given_event_outside_the_boundary_is_found() -> None:
    fails(
        lambda: given(Enrol("c1", "s1"), CourseOpened("c1", 1), Enrolled("c2", "s2")),
        "Enrolled(course='c2', student='s2') lies outside its boundary, which is course:c1, or student:s1",
    )
    fails(lambda: given(Enrol("c1", "s1"), Bare("c1")), "lies outside its boundary")


def test_types_of_a_boundary_count() -> None:
    class Narrow(Enrol):
        def boundary(self) -> Sequence[Boundary]:
            return (Boundary(("course:c1",), ("course.opened",)),)

    fails(
        lambda: given(Narrow("c1", "s1"), CourseOpened("c1", 1), Enrolled("c1", "s2")),
        "outside its boundary, which is course:c1 of type course.opened",
    )


def test_a_decided_event_that_the_next_decision_would_not_see_is_found() -> None:
    fails(
        lambda: given(Enrol("c1", "s1", makes=Bare), CourseOpened("c1", 9)),
        "it makes Bare(course='c1'), which lies outside its boundary",
    )


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@event("transfer.requested")
@dataclass(frozen=True)
class Requested:
    transfer: str
    amount: Decimal


@event("transfer.taken")
@dataclass(frozen=True)
class Taken:
    transfer: str


@event("transfer.given")
@dataclass(frozen=True)
class Given:
    transfer: str


@event("transfer.give")
@dataclass(frozen=True)
class Give:
    transfer: str
    amount: Decimal


@event("transfer.refund")
@dataclass(frozen=True)
class Refund:
    transfer: str
    amount: Decimal


class Transfer(Process, key="transfer", name="given.transfer"):
    amount: Decimal = Decimal(0)
    reminded: int = 0

    @starts
    def requested(self, e: Requested) -> Any:
        if e.amount <= 0:
            raise ValueError("no amount")
        self.amount = e.amount
        return [Timer("stuck", after="15m"), Timer("remind", after="5m")]

    @reacts
    def taken(self, e: Taken) -> Any:
        yield Give(self.id, self.amount)
        yield Timer("stuck", after="30m")
        yield Cancel("remind")

    @reacts
    def done(self, e: Given) -> End:
        return End()

    @timer("remind")
    def remind(self) -> Timer:
        self.reminded += 1
        return Timer("remind", after="5m")

    @timer("stuck")
    def hangs(self) -> Any:
        yield Refund(self.id, self.amount)
        yield End()


ASKED, TAKEN = Requested("t1", Decimal(7)), Taken("t1")


def test_a_process_is_told_events_and_time() -> None:
    given(Transfer, ASKED).then().waits("stuck", "15m").waits("remind", "5m").has(amount=Decimal(7), id="t1")
    given(Transfer, ASKED, TAKEN).then(Give("t1", Decimal(7))).waits("stuck", "30m")
    given(Transfer, ASKED, TAKEN).after("29m").then().waits("stuck", "1m").after("1m").then(Refund("t1", Decimal(7)), ended)
    given(Transfer, ASKED).after("12m").then().has(reminded=2).waits("remind", "3m").waits("stuck", "3m")
    given(Transfer, ASKED).after("2m").when(TAKEN).then(Give("t1", Decimal(7))).waits("stuck", "30m")
    given(Transfer, ASKED, TAKEN).when(Given("t1")).then(ended).after("1d").then().state(lambda s: s is None)
    given(Transfer).when(TAKEN).then()  # nobody's: passed over
    given(Transfer, Requested("t1", Decimal(0))).rejects(ValueError, "no amount")
    given(Transfer, ASKED).when(Requested("t1", Decimal(0))).rejects("no amount")


def test_each_check_of_a_process_can_fail() -> None:
    story = given(Transfer, ASKED, TAKEN)
    fails(lambda: story.then(), "process Transfer: it said something else", "given     Requested(", "(nothing)", "Give(")
    fails(lambda: story.then(Give("t1", Decimal(8))), "!", "amount=Decimal('8')", "amount=Decimal('7')")
    fails(lambda: story.then(Give("t1", Decimal(7)), ended), "! ended", "(nothing)")
    fails(lambda: given(Transfer, ASKED, TAKEN, Given("t1")).then(), "(nothing)", "ended")
    fails(lambda: story.waits("stuck", "29m"), "'stuck' in 29m", "got       'stuck' in 30m")
    fails(lambda: story.waits("remind", "5m"), "'remind' in 5m", "got       'stuck' in 30m")
    fails(lambda: given(Transfer).waits("stuck", "5m"), "got       no timer")
    fails(lambda: given(Transfer, ASKED, TAKEN, Given("t1")).waits("stuck", "30m"), "got       no timer")
    fails(lambda: story.has(amount=Decimal(8)), "amount=Decimal('8')", "amount=Decimal('7')")
    fails(lambda: story.state(lambda s: s.reminded == 1), "does not pass its check")
    fails(lambda: story.rejects("no amount"), "nothing was raised", "Give(")
    fails(lambda: given(Transfer, ASKED).after("15m").then(ended), "when      15m later", "! ended", "Refund(")
    fails(lambda: given(Transfer, ASKED).after("14m").then(Refund("t1", Decimal(7)), ended), "! Refund", "(nothing)")


def test_a_step_that_raised_is_not_passed_over_in_silence() -> None:
    def story() -> Any:
        return given(Transfer, ASKED).when(Requested("t1", Decimal(0)))

    for check in (
        lambda: story().then(),
        lambda: story().then(ended),
        lambda: story().has(amount=Decimal(7)),
        lambda: story().state(lambda s: True),
        lambda: story().waits("stuck", "15m"),
        lambda: story().after("15m"),
        lambda: story().when(TAKEN),
        lambda: story().rejects(KeyError),
    ):
        fails(check, "it raised ValueError: no amount")
    with pytest.raises(ValueError, match="no amount"):
        given(Transfer, Requested("t1", Decimal(0)), TAKEN)


def test_timers_fall_due_in_their_order_and_end_with_the_process() -> None:
    class Two(Process, key="transfer", name="given.two"):
        log: list[str] = dataclasses.field(default_factory=list)

        @starts
        def begin(self, e: Requested) -> Any:
            return [Timer("b", after="2m"), Timer("a", after="3m"), Timer("end", after="4m"), Timer("late", after="5m")]

        @timer("a")
        def a(self) -> Taken:
            return Taken("a")

        @timer("b")
        def b(self) -> Taken:
            return Taken("b")

        @timer("end")
        def end(self) -> End:
            return End()

        @timer("late")
        def late(self) -> Taken:
            return Taken("late")

    given(Two, ASKED).after("1h").then(Taken("b"), Taken("a"), ended)


# ── projections ──────────────────────────────────────────────────────────────────────────────────────────────────────


def balances(e: Deposited | Withdrawn, db: Db) -> None:
    sign = 1 if isinstance(e, Deposited) else -1
    db.execute(
        "insert into {balances} values (?, ?) on conflict do update set cents = cents + excluded.cents",
        (e.account, sign * int(e.amount * 100)),
    )


def known(es: list[Opened], db: Db) -> None:
    db.executemany("insert or ignore into {known} values (?)", [(e.account,) for e in es])


BALANCES = projection(balances, tables={"balances": "account text primary key, cents integer not null"})
KNOWN = projection(known, tables={"known": "account text primary key"}, indexes=("known(account)",))


def test_a_projection_writes_these_rows() -> None:
    given(BALANCES).then(balances=[])
    given(BALANCES, TEN, FIVE, Deposited("a2", Decimal(1))).then(balances=[("a2", 100), ("a1", 500)])
    given(KNOWN, Opened("a1"), Opened("a2"), Opened("a1")).then(known=[("a1",), ("a2",)]).then(known=[("a2",), ("a1",)])


def test_a_projection_may_be_asked_not_to_mind_a_repetition() -> None:
    given(KNOWN, Opened("a1"), Opened("a2")).twice().then(known=[("a1",), ("a2",)])
    fails(lambda: given(BALANCES, TEN).twice().then(balances=[("a1", 1000)]), "! ('a1', 1000)", "('a1', 2000)")
    given(BALANCES, TEN, FIVE).twice().then(balances=[("a1", 1000)])


def test_each_check_of_a_projection_can_fail() -> None:
    story = given(BALANCES, TEN, Deposited("a2", Decimal(1)))
    fails(
        lambda: story.then(balances=[("a1", 1000), ("a2", 101)]),
        "projection 'balances': table 'balances' holds other rows",
        "given     Deposited(",
        "  ('a1', 1000)",
        " ('a1', 1000)",
        "! ('a2', 101)",
        " ('a2', 100)",
    )
    fails(lambda: story.then(balances=[("a1", 1000)]), "(nothing)", "('a2', 100)")
    fails(lambda: story.then(balances=[("a1", 1000), ("a2", 100), ("a2", 100)]), "! ('a2', 100)", "(nothing)")
    fails(lambda: story.then(balance=[]), "it has no table 'balance': there is balances")
    fails(lambda: given(BALANCES, Other()), "Other(n=0) would be passed over: it reads money.deposited, money.withdrawn")
    with pytest.raises(BadOption, match="names no table"):
        story.then()


def test_what_is_nothing_to_begin_with_is_refused() -> None:
    with pytest.raises(BadOption, match="nothing to begin a test with"):
        given(balances)
    with pytest.raises(BadOption, match="nothing to begin a test with"):
        given(App)
