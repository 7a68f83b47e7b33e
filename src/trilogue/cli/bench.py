"""`bench`: our figures beside the raw driver and a peer (huey, eventsourcing, FastStream), as ratios of one run.

bench                                           on a durable SQLite file, three rounds, about four minutes
bench --url amqp://… --only consume --json      the same figures on a server, in places of its own that are removed again
bench --url kafka://… --store postgresql://…    with this store beside the broker, and not a new SQLite file
bench --only store                              those of the event store: save_one, save_100, save_64_tasks, rehydrate, project
bench --full                                    SQLite: also whether anything grows up to 10,000,000 records, and memory
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from trilogue.cli.output import note, say, say_json, say_table
from trilogue.errors import BadOption

Row = dict[str, Any]
DEFAULT_URL = "sqlite:///bench.db"
_LEVELS = {0: "OFF", 1: "NORMAL", 2: "FULL", 3: "EXTRA"}


def bench(
    *,
    url: Annotated[str, Parameter(help="What to measure: sqlite://, postgresql://, amqp:// or kafka://.")] = DEFAULT_URL,
    store: Annotated[str | None, Parameter(help="Beside a broker; a new SQLite file if there is none.")] = None,
    only: Annotated[
        tuple[str, ...], Parameter(help="Figures whose names begin so, as publish; or store, or queue: one side.")
    ] = (),
    rounds: Annotated[int, Parameter(validator=Number(gte=1, lte=50), help="Of which the median counts.", show_default=True)] = 3,
    scale: Annotated[float, Parameter(validator=Number(gt=0, lte=100), help="Events per figure, as a factor.")] = 1.0,
    full: Annotated[bool, Parameter(help="Also how it scales with the log: many minutes, 6 GB of disk.")] = False,
    folder: Annotated[Path | None, Parameter(help="On the disk to measure; temporary folders there are removed again.")] = None,
    json: Annotated[bool, Parameter(help="JSON: environment, and figures of name, value, beside, aim, met and more.")] = False,
) -> int:
    """Measure queue and event store beside the raw driver (the limit) and a peer, in alternating rounds of one run."""
    from trilogue.bench import environment  # here: all of it needs the extra `bench`

    if full and not url.startswith("sqlite:"):
        raise BadOption("--full measures how an SQLite file grows: leave --url out")
    around = environment.around(url, store, rounds=rounds, scale=scale)
    figures = [*_figures(url, store, only, rounds, scale, folder), *(_scale(folder) if full else ())]
    if not figures:
        raise BadOption(
            f"no figure begins with {' or '.join(only)}: there are {', '.join(_names(url))}; queue, store: all of one side"
        )
    if json:
        say_json({"environment": around, "figures": figures})
        return 0
    say_table(("FIGURE", "TRILOGUE", "BESIDE", "ITS", "RATIO", "AIM", "MET"), [line for row in figures for line in _lines(row)])
    for text in (*_durability(figures), ", ".join(f"{name} {value}" for name, value in around.items())):
        say(text)
    return 0


def _figures(url: str, store: str | None, only: tuple[str, ...], rounds: int, scale: float, folder: Path | None) -> list[Row]:
    from trilogue.bench import report

    found: list[Row] = []
    for result in report.run(url, store=store, only=only, rounds=rounds, scale=scale, folder=folder):
        note(f"measured {result.name}")
        found.append(asdict(result))
    return found


def _names(url: str) -> list[str]:
    from trilogue.bench.place import scheme_of
    from trilogue.bench.suites import suite

    return [figure.name for figure in suite(scheme_of(url))]


def _lines(row: Row) -> list[tuple[str, ...]]:
    """A line for each side it is measured beside, and one for an aim of its own."""
    first = (row["name"], _shown(row["value"]))
    lines = [
        (
            f"{side['name']}{' (' + side['way'] + ')' if side['way'] else ''}",
            _shown(side["value"]),
            _shown(side["ratio"]),
            *_aim(side),
        )
        for side in row["beside"]
    ]
    if row["aim"] is not None or not lines:
        lines.append(("-", "-", "-", *_aim(row)))
    return [(*(first if n == 0 else ("", "")), *line) for n, line in enumerate(lines)]


def _side(row: Row) -> str:
    return f"{row['name']} ({row['way']})" if row["way"] else str(row["name"])


def _aim(row: Row) -> tuple[str, str]:
    return ("-", "-") if row["aim"] is None else (_shown(float(row["aim"])), "yes" if row["met"] else "no")


def _durability(rows: list[Row]) -> list[str]:
    """What the connections said of themselves, a line for each side."""
    said = {side: settings for row in rows for side, settings in row["durability"].items()}
    return [f"{side}: {', '.join(f'{name}={_named(name, value)}' for name, value in said[side].items())}" for side in said]


def _named(name: str, value: str | int) -> str:
    return f"{value} ({_LEVELS.get(int(value), '?')})" if name in ("synchronous", "synchronous_by_default") else str(value)


def _scale(folder: Path | None) -> list[Row]:
    from trilogue.bench import scale
    from trilogue.bench.report import Result

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="trilogue-bench-", dir=folder) as place:
        for name, figure in scale.run(Path(place)):
            note(f"measured {name}")
            rows.append(asdict(Result(name, "As the log grows.", _unit(name), figure, None, None, (), {})))
    return rows


def _unit(name: str) -> str:
    return "MB" if name.endswith("_mb") else "µs" if "_us_" in name else "events/s"


def _shown(value: object) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
