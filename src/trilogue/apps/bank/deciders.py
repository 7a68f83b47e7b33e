"""The same account as functions: a frozen state, evolve(), and deciding functions that take a state and return events.

    evolve(State(balance=50), MoneyDeposited(amount=5))   ──>  State(balance=55)
    withdraw("ACC001", 20)(State(balance=50))             ──>  MoneyWithdrawn(amount=20, before=50)

The same streams, events and rules as account.py; take whichever reads better to you.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal

from trilogue import Decider
from trilogue.apps.bank import rules
from trilogue.apps.bank.events import (
    AccountClosed,
    AccountCreated,
    AccountEvent,
    FeeCharged,
    InterestPaid,
    LegRecalled,
    MoneyDeposited,
    MoneyWithdrawn,
)
from trilogue.apps.bank.money import ZERO, positive

Amount = Decimal | int | str


@dataclass(frozen=True, slots=True)
class State:
    """What is known of an account."""

    status: rules.Status = "new"
    balance: Decimal = ZERO
    overdraft_limit: Decimal = ZERO
    recalled: frozenset[str] = frozenset()

    @property
    def available(self) -> Decimal:
        """What can be withdrawn."""
        return self.balance + self.overdraft_limit


Decide = Callable[[State], list[AccountEvent]]


def evolve(state: State, e: AccountEvent) -> State:
    """The state after an event."""
    match e:
        case AccountCreated():
            return replace(state, status="open", balance=e.initial_deposit, overdraft_limit=e.overdraft_limit)
        case MoneyDeposited() | InterestPaid():
            return replace(state, balance=state.balance + e.amount)
        case MoneyWithdrawn() | FeeCharged():
            return replace(state, balance=state.balance - e.amount)
        case LegRecalled():
            return replace(state, recalled=state.recalled | {f"{e.transfer} {e.leg}"})
        case AccountClosed():
            return replace(state, status="closed", balance=ZERO)


accounts = Decider("account-{id}", State(), evolve)


def create(account: str, initial_deposit: Amount = 0, overdraft_limit: Amount = 0) -> Decide:
    """Open the account; raises AccountExists, AccountIsClosed, InvalidAmount."""

    def decide(state: State) -> list[AccountEvent]:
        rules.check_new(account, state.status)
        first = rules.not_negative(initial_deposit, "first deposit")
        return [AccountCreated(account, first, rules.not_negative(overdraft_limit, "overdraft limit"))]

    return decide


def deposit(account: str, amount: Amount, description: str = "", *, transfer: str | None = None) -> Decide:
    """Pay in; raises UnknownAccount, AccountIsClosed, InvalidAmount."""

    def decide(state: State) -> list[AccountEvent]:
        rules.check_open(account, state.status)
        return [MoneyDeposited(account, positive(amount), description, state.balance, transfer)]

    return decide


def withdraw(account: str, amount: Amount, description: str = "", *, transfer: str | None = None) -> Decide:
    """Pay out; raises InsufficientFunds, UnknownAccount, AccountIsClosed, InvalidAmount."""

    def decide(state: State) -> list[AccountEvent]:
        rules.check_open(account, state.status)
        asked = positive(amount)
        rules.check_covered(account, state.available, asked)
        return [MoneyWithdrawn(account, asked, description, state.balance, transfer)]

    return decide


def end_month(account: str, month: int) -> Decide:
    """Pay interest and charge the fee, as far as there is anything to pay or charge. month: from 1."""

    def decide(state: State) -> list[AccountEvent]:
        if state.status != "open":
            return []
        interest = rules.monthly_interest(state.balance)
        fee = rules.monthly_fee(state.available + interest)
        return [
            *([InterestPaid(account, interest, month, state.balance)] if interest else ()),
            *([FeeCharged(account, fee, month, state.balance + interest)] if fee else ()),
        ]

    return decide


def recall(account: str, transfer: str, leg: str) -> Decide:
    """Refuse a leg of a transfer from now on."""

    def decide(state: State) -> list[AccountEvent]:
        return [] if f"{transfer} {leg}" in state.recalled else [LegRecalled(account, transfer, leg, state.balance)]

    return decide


def close(account: str) -> Decide:
    """Close the account and pay out what is left; raises AccountInDebt, UnknownAccount, AccountIsClosed."""

    def decide(state: State) -> list[AccountEvent]:
        rules.check_open(account, state.status)
        rules.check_closable(account, state.balance)
        return [AccountClosed(account, state.balance)]

    return decide
