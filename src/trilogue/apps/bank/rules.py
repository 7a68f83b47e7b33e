"""What an account may do, as functions of its plain values: shared by the class (account.py) and the functions (deciders.py).

new ──create──> open ──close──> closed          only an open account is used
withdraw: amount <= balance + overdraft limit   close: balance >= 0
"""

from decimal import Decimal
from typing import Literal

from trilogue.apps.bank.errors import (
    AccountExists,
    AccountInDebt,
    AccountIsClosed,
    InsufficientFunds,
    InvalidAmount,
    UnknownAccount,
)
from trilogue.apps.bank.money import ZERO, money, to_cents

Status = Literal["new", "open", "closed"]
FEE = Decimal("2.00")
INTEREST_A_YEAR = Decimal("0.012")


def check_new(account: str, status: Status) -> None:
    """Raises AccountExists, or AccountIsClosed: a number is given to nobody else."""
    if status == "closed":
        raise AccountIsClosed(account)
    if status == "open":
        raise AccountExists(account)


def check_open(account: str, status: Status) -> None:
    """Raises UnknownAccount or AccountIsClosed."""
    if status == "new":
        raise UnknownAccount(account)
    if status == "closed":
        raise AccountIsClosed(account)


def not_negative(amount: Decimal | int | str, what: str) -> Decimal:
    """An amount of zero or more; raises InvalidAmount. what: its name in the sentence."""
    if (checked := money(amount)) < 0:
        raise InvalidAmount(f"the {what} is {checked}: expected 0 or more")
    return checked


def check_covered(account: str, available: Decimal, asked: Decimal) -> None:
    """Raises InsufficientFunds. available: balance and overdraft limit."""
    if asked > available:
        raise InsufficientFunds(account, available, asked)


def check_closable(account: str, balance: Decimal) -> None:
    """Raises AccountInDebt."""
    if balance < 0:
        raise AccountInDebt(account, balance)


def monthly_interest(balance: Decimal) -> Decimal:
    """A month's interest on a balance, in whole cents; nothing on a debt."""
    return to_cents(balance * INTEREST_A_YEAR / 12) if balance > 0 else ZERO


def monthly_fee(available: Decimal) -> Decimal:
    """A month's fee: as much of it as there is."""
    return min(FEE, available)
