"""The demonstration's outcome, for people.

{"scenario": {"balances": [1000, 1500, 1300, 500, 800, -400], "at_event_3": 1300, "conflict": true, "history": […], …},
 "load": {"accounts": 100, "transfers": 5000, "completed": 4650, "failed": 350, "conflicts": 12, "elapsed_s": 9.8,
          "reasons": {…}, "invariants": {"money_neither_made_nor_lost": true, …}}}
"""

import shlex
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from trilogue.apps.bank.scenario import ACCOUNT
from trilogue.apps.place import Place, shown

Json = dict[str, Any]


def show(report: Json, kept: Place | None, console: Console) -> None:
    """Print a report. kept: the log, if it is still there."""
    scenario, load = report["scenario"], report["load"]
    console.print(_history(scenario))
    for line in (*_scenario_lines(scenario), "", *_load_lines(load)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for name, holds in load["invariants"].items():
        mark = "[green]holds[/]" if holds else "[bold red]BROKEN[/]"
        console.print(f"  {name.replace('_', ' ')}: {mark}", highlight=False, soft_wrap=True)
    for line in _look_around(kept) if kept is not None else ():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _history(scenario: Json) -> Table:
    table = Table(title=f"Account {scenario['account']}", title_justify="left", title_style="bold")
    for name in ("event", "", "description", "who", "amount", "balance"):
        table.add_column(name, justify="right" if name in ("event", "amount", "balance") else "left")
    for line, balance in zip(scenario["history"], scenario["balances"], strict=True):
        sign = "-" if line["event"] == "MoneyWithdrawn" else "+"
        what = line["description"] or "first deposit"
        table.add_row(str(line["version"]), line["event"], what, line["who"], f"{sign}{line['amount']:,}", f"{balance:,}")
    return table


def _scenario_lines(scenario: Json) -> Iterator[str]:
    yield f"After its third event it held {scenario['at_event_3']:,}: the first three events, folded."
    yield f"Asked for 1,000 more, the bank says: {scenario['refused']}."
    if scenario["conflict"]:
        yield f"Two copies were loaded, both deposited, the first was saved. The second: {scenario['conflict_said']}."
    else:
        yield "Two copies were loaded, both deposited, AND BOTH WERE SAVED."
    kept = scenario["snapshot"]
    same = "the same account as all its events" if kept["same"] else "ANOTHER ACCOUNT THAN ALL ITS EVENTS"
    yield f"The snapshot of version {kept['version']} and what came after it give {same}."


def _load_lines(load: Json) -> Iterator[str]:
    yield (
        f"{load['transfers']:,} transfers between {load['accounts']:,} accounts, asked for by {load['writers']:,} writers in "
        f"{load['workers']} process{'es' if load['workers'] > 1 else ''}: {load['elapsed_s']:.1f} s"
    )
    yield f"  {load['completed']:,} completed, {load['failed']:,} did not:"
    for reason, count in load["reasons"].items():
        yield f"    {count:,} {reason}"
    yield f"  {load['sent_back']:,} of them had been taken from their account already, and were sent back"
    yield f"  {load['conflicts']:,} times somebody else was faster at an account; the rule was applied to what was there then"
    if load["lost_workers"]:
        yield f"  {load['lost_workers']} processes died on the way; the others went on with their work"


def _look_around(kept: Place) -> Iterator[str]:
    url = shlex.quote(shown(kept.url))
    if kept.store is not None:
        url += f" --store {shlex.quote(shown(kept.store))}"
    yield "\nThe log is kept. Look around:"
    for command in (f"streams show account-{ACCOUNT}", "tail transfer.failed --no-follow", "projections list", "status"):
        yield f"  trilogue {command} --url {url}"


def refusal(reason: str) -> str:
    """The kind of a reason, without the account it names."""
    for words, kind in (("cannot pay", "asked for more than there was"), ("is closed", "went to a closed account")):
        if words in reason:
            return kind
    return "went to an account that was never opened" if "there is no account" in reason else "got no answer"
