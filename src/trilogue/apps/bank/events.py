"""What happens in the bank. Amounts are Decimals of whole cents, positive; `before` is the balance just before.

    account-ACC001   AccountCreated ── MoneyDeposited | MoneyWithdrawn | InterestPaid | … ── AccountClosed

`transfer` names the transfer a movement belongs to, None at the counter.
"""

from dataclasses import dataclass
from decimal import Decimal

from trilogue import event


@event("account.created", key="account")
@dataclass(frozen=True, slots=True)
class AccountCreated:
    """An account was opened with a first deposit; withdrawals may go below zero by the overdraft limit."""

    account: str
    initial_deposit: Decimal
    overdraft_limit: Decimal


@event("account.deposited", key="account")
@dataclass(frozen=True, slots=True)
class MoneyDeposited:
    """Money came in."""

    account: str
    amount: Decimal
    description: str
    before: Decimal
    transfer: str | None = None


@event("account.withdrawn", key="account")
@dataclass(frozen=True, slots=True)
class MoneyWithdrawn:
    """Money went out."""

    account: str
    amount: Decimal
    description: str
    before: Decimal
    transfer: str | None = None


@event("account.interest_paid", key="account")
@dataclass(frozen=True, slots=True)
class InterestPaid:
    """The bank paid for a month with money in the account. month: counted from the opening, from 1."""

    account: str
    amount: Decimal
    month: int
    before: Decimal


@event("account.fee_charged", key="account")
@dataclass(frozen=True, slots=True)
class FeeCharged:
    """The bank took its fee for a month. month: counted from the opening, from 1."""

    account: str
    amount: Decimal
    month: int
    before: Decimal


@event("account.leg_recalled", key="account")
@dataclass(frozen=True, slots=True)
class LegRecalled:
    """A leg of a transfer did not come in time: should it come later, it is refused. leg: "take" or "give"."""

    account: str
    transfer: str
    leg: str
    before: Decimal


@event("account.closed", key="account")
@dataclass(frozen=True, slots=True)
class AccountClosed:
    """The account was closed and what was left of it, the final balance, paid out."""

    account: str
    final_balance: Decimal


AccountEvent = AccountCreated | MoneyDeposited | MoneyWithdrawn | InterestPaid | FeeCharged | LegRecalled | AccountClosed
