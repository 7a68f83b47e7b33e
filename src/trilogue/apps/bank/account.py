"""A bank account as a class: its methods check the rules and emit, apply() is the only place where it changes.

    account = Account("ACC001")
    account.create(1000, overdraft_limit=500)       ──> AccountCreated       balance 1000.00
    account.withdraw(1200, "loan")                  ──> MoneyWithdrawn       balance -200.00
    account.withdraw(400)                           ──> InsufficientFunds: 300.00 is available

Pure: nothing here reads a clock, a file or the log. deciders.py is the same as functions.
"""

from decimal import Decimal

from trilogue import Aggregate, Snapshot
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


class Account(Aggregate, stream="account-{id}", snapshot=Snapshot(every=100)):
    """One account; its id is the account number. recalled: legs of transfers that came too late, as "t1 give"."""

    status: rules.Status = "new"
    balance: Decimal = ZERO
    overdraft_limit: Decimal = ZERO
    recalled: frozenset[str] = frozenset()

    @property
    def available(self) -> Decimal:
        """What can be withdrawn."""
        return self.balance + self.overdraft_limit

    def create(self, initial_deposit: Amount = 0, overdraft_limit: Amount = 0) -> None:
        """Open the account; raises AccountExists, AccountIsClosed, InvalidAmount."""
        rules.check_new(self.id, self.status)
        first = rules.not_negative(initial_deposit, "first deposit")
        self.emit(AccountCreated(self.id, first, rules.not_negative(overdraft_limit, "overdraft limit")))

    def deposit(self, amount: Amount, description: str = "", *, transfer: str | None = None) -> None:
        """Pay in; raises UnknownAccount, AccountIsClosed, InvalidAmount."""
        rules.check_open(self.id, self.status)
        self.emit(MoneyDeposited(self.id, positive(amount), description, self.balance, transfer))

    def withdraw(self, amount: Amount, description: str = "", *, transfer: str | None = None) -> None:
        """Pay out; raises InsufficientFunds, UnknownAccount, AccountIsClosed, InvalidAmount."""
        rules.check_open(self.id, self.status)
        asked = positive(amount)
        rules.check_covered(self.id, self.available, asked)
        self.emit(MoneyWithdrawn(self.id, asked, description, self.balance, transfer))

    def end_month(self, month: int) -> None:
        """Pay interest and charge the fee, as far as there is anything to pay or charge. month: from 1."""
        if self.status != "open":
            return
        if interest := rules.monthly_interest(self.balance):
            self.emit(InterestPaid(self.id, interest, month, self.balance))
        if fee := rules.monthly_fee(self.available):
            self.emit(FeeCharged(self.id, fee, month, self.balance))

    def recall(self, transfer: str, leg: str) -> None:
        """Refuse a leg of a transfer from now on."""
        if f"{transfer} {leg}" not in self.recalled:
            self.emit(LegRecalled(self.id, transfer, leg, self.balance))

    def close(self) -> None:
        """Close the account and pay out what is left; raises AccountInDebt, UnknownAccount, AccountIsClosed."""
        rules.check_open(self.id, self.status)
        rules.check_closable(self.id, self.balance)
        self.emit(AccountClosed(self.id, self.balance))

    def apply(self, e: AccountEvent) -> None:
        """How an event changes the account, now and when it is read again."""
        match e:
            case AccountCreated():
                self.status, self.balance, self.overdraft_limit = "open", e.initial_deposit, e.overdraft_limit
            case MoneyDeposited() | InterestPaid():
                self.balance += e.amount
            case MoneyWithdrawn() | FeeCharged():
                self.balance -= e.amount
            case LegRecalled():
                self.recalled |= {f"{e.transfer} {e.leg}"}
            case AccountClosed():
                self.status, self.balance = "closed", ZERO
