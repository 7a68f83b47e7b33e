"""All faults at all URLs, and the table of what came of it: `make faults`.

    make faults                      about half an hour; docs/faults.md is written anew
    make faults SEED=7               the same choices again: moments, bytes, victims
    make faults ONLY="broker killed" URLS="amqp+sqlite kafka+sqlite"      some of it, printed only

Exit code 1 if a promise was broken.
"""

import argparse
import os
import platform
import secrets
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import confluent_kafka
from faults import FAULTS, Fault, run
from places import NAMES, SERVERS, Site
from scene import Result

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
COLUMNS = ("fault", "URL", "events", "unknown", "lost", "phantom", "again (at most)", "out of order", "effects ≠ 1", "back in")
WORDS = """\
# Faults

What became of real servers, real processes and the events between them, when they were hurt. `make faults` runs all of it and
writes this page.

Two publishers and two workers run one program at every URL: a plain handler in order that fails now and then and on some events
always, one in no order, one whose effect is a row in the store, one that emits what a fifth writes down in batches. Each
process writes a line before and after everything it does; afterwards a checker compares what was published, told to be stored,
handled, and found in the tables. The checker itself is tested with bugs put into histories.

* **events**: published and told to be stored. **unknown**: publishes whose outcome was not known, repeated under their ids.
* **lost**: stored, and not handled by some group, nor among its dead letters. **phantom**: handled, and never published, or
  told to be not stored.
* **again**: handlings by the three plain handlers beyond the first, and how many the fault explains at most. Without a fault: 0.
* **out of order**: handled before an earlier event of its key, or while that had failed, or beside another of its key.
* **effects ≠ 1**: stored, and not exactly one row, in the two tables.
* **back in**: the longest time from the end of a fault until every group, worker and publisher had worked again; for the long
  queue the time it took to handle it, for the wrong password until the worker ended.
"""


def main() -> int:
    """Run what was asked for; the exit code."""
    options = _parser().parse_args()
    print(f"seed {options.seed}", flush=True)
    chosen = [(fault, name) for fault in FAULTS for name in NAMES if fault.suits(name)]
    chosen = [(fault, name) for fault, name in chosen if fault.name in (options.only or fault.name) and name in options.urls]
    with tempfile.TemporaryDirectory(prefix="trilogue-faults-") as folder, Site(Path(folder) / "set", *_servers(chosen)) as site:
        results = [_one(site, Path(folder), fault, name, options.seed) for fault, name in chosen]
        page = page_of(results, options.seed, versions(site), left_out(chosen))
    if options.write or not left_out(chosen):
        PAGE.write_text(page)
    broken = [result for result in results if not result.is_clean]
    print(f"{len(results) - len(broken)} passed, {len(broken)} failed")
    return bool(broken)


def _one(site: Site, folder: Path, fault: Fault, name: str, seed: str) -> Result:
    place = folder / f"{fault.name} {name}".replace(" ", "-")
    try:
        result = run(fault, name, site, place, seed)
    except Exception as error:
        traceback.print_exc()
        result = Result(fault.name, name, trouble=(str(error).split("\n")[0][:200] or type(error).__name__,))
    print(" ".join(f"{key}={value}" for key, value in asdict(result).items() if value not in (None, ())), flush=True)
    return result


def left_out(chosen: Sequence[tuple[Fault, str]]) -> list[str]:
    """The faults that a run does not show at every URL they suit."""
    return [fault.name for fault in FAULTS if any(fault.suits(name) and (fault, name) not in chosen for name in NAMES)]


def page_of(results: Sequence[Result], seed: str, found: Sequence[str], missing: Sequence[str] = ()) -> str:
    """The page: words, versions, table, and what went wrong. missing: what this run left out."""
    rows = [_row(result) for result in results]
    table = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    # What exactly it was is printed by the run.
    said = [(result, "; ".join(each.partition(", as [")[0] for each in result.trouble)) for result in results]
    wrong = [f"* {result.fault}, {result.name}: {words}" for result, words in said if words]
    memory = [f"{result.name} {result.rss_mb} MB" for result in results if result.rss_mb]
    parts = [
        WORDS,
        f"Seed {seed}. {', '.join(found)}.",
        f"A part of it only: not run, or not at every URL, were {', '.join(missing)}." if missing else "",
        "\n".join(table),
        f"Memory of the worker with a long queue: {', '.join(memory)}." if memory else "",
        "\n".join(["Promises that were broken in this run:", "", *wrong]) if wrong else "No promise was broken in this run.",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _row(result: Result) -> list[str]:
    back = "" if result.recovery_s is None else f"{result.recovery_s:.1f} s"
    if not result.stored:
        return [result.fault, result.name, *[""] * (len(COLUMNS) - 3), back]
    again = f"{result.repeated:,} ({result.bound:,})"
    counts = (result.stored, result.unknown, result.lost, result.phantom)
    return [result.fault, result.name, *(f"{n:,}" for n in counts), again, f"{result.disorder:,}", f"{result.effects:,}", back]


def versions(site: Site) -> list[str]:
    """Of servers, drivers and Python."""
    servers = [f"{name} {service['version']}" for name, service in site.services.items()]
    drivers = [f"{name} {version(name)}" for name in ("pika", "confluent-kafka", "psycopg", "apsw")]
    return [*servers, *drivers, f"librdkafka {confluent_kafka.libversion()[0]}", f"Python {platform.python_version()}"]


def _servers(chosen: Sequence[tuple[Fault, str]]) -> list[str]:
    schemes = {scheme for _, name in chosen for scheme in name.split("+")}
    return [server for scheme, server in SERVERS.items() if scheme in schemes]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", default=os.environ.get("SEED") or secrets.token_hex(3))
    parser.add_argument("--only", nargs="*", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--urls", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--write", action="store_true", help="the page also of a part of it, which says so")
    return parser


if __name__ == "__main__":
    sys.exit(main())
