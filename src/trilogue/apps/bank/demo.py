"""`trilogue demo bank`: one account's story, then many transfers, then the books are checked.

scenario ─▶ accounts are opened ─▶ transfers: writers and workers, in several processes ─▶ ledger ─▶ report
"""

import json
import sys
import time
from collections import Counter

from rich.console import Console

from trilogue import App, Feature
from trilogue.apps.bank.bank import Bank, make_bank
from trilogue.apps.bank.crew import crew
from trilogue.apps.bank.ledger import check, read_ledger
from trilogue.apps.bank.load import Load, open_accounts
from trilogue.apps.bank.options import BankOptions, checked, processes
from trilogue.apps.bank.progress import live_progress
from trilogue.apps.bank.report import Json, refusal, show
from trilogue.apps.bank.scenario import play
from trilogue.apps.place import Place, place


async def demo_bank(options: BankOptions) -> Json:
    """Play the scenario and the load, check the books, print the report and return it.

    Raises BadOption for options that make no sense, and what the log raises.
    """
    async with place(checked(options)) as where:
        report = await _run(options, where)
    if options.report == "json":
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        show(report, where if where.kept else None, Console())
    return report


async def _run(options: BankOptions, where: Place) -> Json:
    bank = make_bank(where.url, store=where.store)
    workers = processes(options.workers, Feature.SHARED in bank.app.store.features)
    load = Load(options.accounts, options.transfers, options.writers, workers, options.seed)
    async with bank.app.running():
        scenario = await play(bank.app)
        await open_accounts(bank.app, load.accounts)
        began = time.monotonic()
        async with live_progress(bank.app, load.transfers):
            conflicts, lost = await _transfers(bank, where, load)
        elapsed_s = round(time.monotonic() - began, 2)
        found = {"conflicts": conflicts, "lost_workers": lost, "elapsed_s": elapsed_s}
        return {"log": bank.app.store.url, "scenario": scenario, "load": {**await _outcome(bank.app, load), **found}}


async def _transfers(bank: Bank, where: Place, load: Load) -> tuple[int, int]:
    """Let all transfers happen; how many conflicts there were, and how many processes died."""
    async with crew(bank.app, where, load) as others:
        await others.ask()
        await bank.app.wait_idle()
    await bank.app.wait_idle()  # a process that died at the last moment has left something behind
    return bank.teller.conflicts + others.conflicts, others.lost


async def _outcome(app: App, load: Load) -> Json:
    ledger = await read_ledger(app)
    return {
        "accounts": load.accounts,
        "writers": load.writers,
        "workers": load.processes,
        "transfers": len(ledger.requested),
        "completed": ledger.completed.total(),
        "failed": ledger.failed.total(),
        "reasons": dict(Counter(map(refusal, ledger.reasons)).most_common()),
        "sent_back": len(ledger.failed.keys() & ledger.taken.keys()),
        "invariants": await check(app, ledger),
    }
