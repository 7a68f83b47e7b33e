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
from trilogue.brokers import DEFAULT_STORE


@dataclass(frozen=True, slots=True)
class Bank:
    """A bank on one log. app: everything it does. teller: who moves the money."""

    app: App
    teller: Teller


def make_bank(url: str, *, store: str | None = DEFAULT_STORE) -> Bank:
    """A bank. url, store: of its log, as App takes them; several processes may open the same one.

    >>> bank = make_bank("memory://")
    """
    app = App(url, store=store, name="bank")
    app.knows(Account, TransferCompleted, TransferFailed)
    app.include(readmodels.router)
    app.process(MoneyTransfer)
    app.process(Months)
    end_months(app)
    return Bank(app, Teller(app))
