"""A bank on an event store: accounts, statements, transfers, interest, and auditors who believe nobody.

events.py  rules.py ─▶ account.py (a class) = deciders.py (functions)      pure
transfer.py  months.py    processes: what comes next, time-outs, the way back
readmodels.py             tables folded from the events
bank.py                   all of it on one App
scenario.py  load.py  ledger.py  demo.py        `trilogue demo bank`
"""

from trilogue.apps.bank.bank import Bank, make_bank
from trilogue.apps.bank.demo import demo_bank
from trilogue.apps.bank.options import BankOptions

__all__ = ["Bank", "BankOptions", "demo_bank", "make_bank"]
