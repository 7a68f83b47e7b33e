"""The bank put together.

accounts (streams)  ◀── Teller ◀── transfers (a process) ◀── request_transfer()
       │            ◀── months (a process, by timer)
       └──▶ balances, statements, days (projections)
"""

from dataclasses import dataclass

from trilogue import App
from trilogue.apps.bank import readmodels
from trilogue.apps.bank.account import Account
from trilogue.apps.bank.months import Months, end_months
from trilogue.apps.bank.transfer import MoneyTransfer, Teller, TransferCompleted, TransferFailed
from trilogue.apps.place import app_on


@dataclass(frozen=True, slots=True)
class Bank:
    """A bank on one log. app: everything it does. teller: who moves the money."""

    app: App
    teller: Teller


def make_bank(url: str, *, store: str | None = None) -> Bank:
    """A bank. url: of its log; several processes may open the same one. store: what stands beside a broker.

    >>> bank = make_bank("memory://")
    """
    app = app_on(url, store, "bank")
    app.knows(Account, TransferCompleted, TransferFailed)
    app.include(readmodels.router)
    app.process(MoneyTransfer)
    app.process(Months)
    end_months(app)
    return Bank(app, Teller(app))
