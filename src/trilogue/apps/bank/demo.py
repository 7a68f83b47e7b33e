"""`trilogue demo bank`: one account's story, then many transfers, then the books are checked.

scenario ─▶ accounts are opened ─▶ transfers: writers and workers, in several processes ─▶ ledger ─▶ report
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from trilogue import App
from trilogue.apps.bank.bank import Bank, make_bank
from trilogue.apps.bank.crew import crew
from trilogue.apps.bank.ledger import check
from trilogue.apps.bank.load import Load, open_accounts
from trilogue.apps.bank.options import BankOptions, checked
from trilogue.apps.bank.progress import COMPLETED, FAILED, REQUESTED, live_progress
from trilogue.apps.bank.report import Json, refusal, show
from trilogue.apps.bank.scenario import play


async def demo_bank(options: BankOptions) -> Json:
    """Play the scenario and the load, check the books, print the report and return it.

    Raises BadOption for options that make no sense.
    """
    with _database(checked(options)) as url:
        report = await _run(options, url)
    if options.report == "json":
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        show(report, options.db, Console())
    return report


@contextmanager
def _database(path: Path | None) -> Iterator[str]:
    """The URL of the file to keep, or of one that is gone afterwards."""
    if path is not None:
        yield f"sqlite:///{quote(str(path))}"
        return
    with tempfile.TemporaryDirectory(prefix="trilogue-") as folder:
        yield f"sqlite:///{quote(folder)}/bank.db"


async def _run(options: BankOptions, url: str) -> Json:
    bank = make_bank(url)
    load = Load(options.accounts, options.transfers, options.writers, options.workers, options.seed)
    async with bank.app.running():
        scenario = await play(bank.app)
        await open_accounts(bank.app, load.accounts)
        began = time.monotonic()
        async with live_progress(bank.app, load.transfers):
            conflicts, lost = await _transfers(bank, url, load)
        elapsed_s = round(time.monotonic() - began, 2)
        found = {"conflicts": conflicts, "lost_workers": lost, "elapsed_s": elapsed_s}
        return {"scenario": scenario, "load": {**await _outcome(bank.app, options), **found, "invariants": await check(bank.app)}}


async def _transfers(bank: Bank, url: str, load: Load) -> tuple[int, int]:
    """Let all transfers happen; how many conflicts there were, and how many processes died."""
    async with crew(bank.app, url, load) as others:
        await others.ask()
        await bank.app.wait_idle()
    await bank.app.wait_idle()  # a process that died at the last moment has left something behind
    return bank.teller.conflicts + others.conflicts, others.lost


async def _outcome(app: App, options: BankOptions) -> Json:
    types = (await app.store.status()).types
    failed = [app.decode(record).reason async for record in app.history(types=FAILED)]
    return {
        "accounts": options.accounts,
        "writers": options.writers,
        "workers": options.workers,
        "transfers": types.get(REQUESTED, 0),
        "completed": types.get(COMPLETED, 0),
        "failed": len(failed),
        "reasons": dict(Counter(map(refusal, failed)).most_common()),
        "sent_back": types.get("transfer.returned", 0),
    }
