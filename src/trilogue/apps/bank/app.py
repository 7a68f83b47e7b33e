"""The bank as `MODULE:APP` for the command line; TRILOGUE_URL says where its log is, TRILOGUE_STORE what stands beside a broker.

trilogue run trilogue.apps.bank.app:app --workers 2
trilogue streams state account-ACC001 --app trilogue.apps.bank.app:app --version 3
"""

import os

from trilogue.apps.bank.bank import make_bank

app = make_bank(os.environ.get("TRILOGUE_URL", "sqlite:///bank.db"), store=os.environ.get("TRILOGUE_STORE")).app
