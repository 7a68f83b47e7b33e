"""A small account and a small course, for the tests of the event store side."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal

from trilogue import Aggregate, Boundary, Decider, Decision, Snapshot, event, tag


@event("account.opened", key="account")
@dataclass(frozen=True)
class Opened:
    account: str
    balance: Decimal


@event("account.deposited", key="account")
@dataclass(frozen=True)
class Deposited:
    account: str
    amount: Decimal


@event("account.withdrawn", key="account")
@dataclass(frozen=True)
class Withdrawn:
    account: str
    amount: Decimal


class InsufficientFunds(Exception):
    pass


class Account(Aggregate, stream="account-{id}"):
    balance: Decimal = Decimal(0)

    def deposit(self, amount: int) -> dict[str, Decimal]:
        self.emit(Deposited(self.id, Decimal(amount)))
        return {"balance": self.balance}

    def withdraw(self, amount: int) -> None:
        if amount > self.balance:
            raise InsufficientFunds(f"available {self.balance}, asked {amount}")
        self.emit(Withdrawn(self.id, Decimal(amount)))

    def apply(self, e: Opened | Deposited | Withdrawn) -> None:
        match e:
            case Opened():
                self.balance = e.balance
            case Deposited():
                self.balance += e.amount
            case Withdrawn():
                self.balance -= e.amount


class Kept(Account, stream="kept-{id}", snapshot=Snapshot(every=5)):
    """The same with snapshots."""


@dataclass(frozen=True)
class State:
    balance: Decimal = Decimal(0)


def evolve(state: State, e: Deposited | Withdrawn) -> State:
    change = e.amount if isinstance(e, Deposited) else -e.amount
    return replace(state, balance=state.balance + change)


accounts = Decider("account-{id}", State(), evolve)


def withdraw(account: str, amount: int) -> "Rule":
    return Rule(account, amount)


@dataclass(frozen=True)
class Rule:
    account: str
    amount: int

    def __call__(self, state: State) -> Iterator[Withdrawn]:
        if self.amount > state.balance:
            raise InsufficientFunds("no")
        yield Withdrawn(self.account, Decimal(self.amount))


@event("course.opened", key="course", tags=("course",))
@dataclass(frozen=True)
class CourseOpened:
    course: str
    seats: int


@event("course.enrolled", key="course", tags=("course", "student"))
@dataclass(frozen=True)
class Enrolled:
    course: str
    student: str


class Full(Exception):
    pass


class Enrol(Decision):
    course: str
    student: str
    seats: int = 0
    taken: int = 0
    mine: int = 0

    def boundary(self) -> list[Boundary]:
        return [tag("course", self.course), tag("student", self.student)]

    def apply(self, e: CourseOpened | Enrolled) -> None:
        match e:
            case CourseOpened():
                self.seats = e.seats
            case Enrolled():
                self.taken += e.course == self.course
                self.mine += e.student == self.student

    def decide(self) -> Enrolled:
        if self.taken >= self.seats:
            raise Full(f"{self.seats} seats")
        if self.mine >= 3:
            raise Full("3 courses")
        return Enrolled(self.course, self.student)
