"""Why the bank says no, as one tree. These are the bank's own: trilogue knows none of them.

BankError
├─ InvalidAmount         not an amount of money above zero
├─ InsufficientFunds     more than balance and overdraft limit: .available, .asked
├─ AccountInDebt         cannot be closed
├─ AccountExists         was opened before
├─ UnknownAccount        was never opened
└─ AccountIsClosed       was closed before
"""

from decimal import Decimal


class BankError(Exception):
    """The root of what the bank refuses."""


class InvalidAmount(BankError):
    """Not an amount of money above zero."""


class InsufficientFunds(BankError):
    """More was asked for than balance and overdraft limit allow."""

    def __init__(self, account: str, available: Decimal, asked: Decimal) -> None:
        super().__init__(f"account {account} cannot pay {asked}: {available} is available")
        self.account, self.available, self.asked = account, available, asked


class AccountInDebt(BankError):
    """An account in debt cannot be closed."""

    def __init__(self, account: str, balance: Decimal) -> None:
        super().__init__(f"account {account} is in debt by {-balance}: pay that in before closing it")
        self.account, self.balance = account, balance


class AccountExists(BankError):
    """The account was opened before."""

    def __init__(self, account: str) -> None:
        super().__init__(f"account {account} is open already: choose another number")
        self.account = account


class UnknownAccount(BankError):
    """The account was never opened."""

    def __init__(self, account: str) -> None:
        super().__init__(f"there is no account {account}: open it first")
        self.account = account


class AccountIsClosed(BankError):
    """The account was closed before."""

    def __init__(self, account: str) -> None:
        super().__init__(f"account {account} is closed: it can no longer be used")
        self.account = account
