"""`bench`: our figures beside raw apsw and a peer (huey, eventsourcing), as ratios of one run.

bench                      all, three rounds, about four minutes
bench --only publish --json
bench --only store         those of the event store: save_one, save_100, save_64_tasks, rehydrate, project
bench --full               also whether anything grows up to 10,000,000 records, and the memory before a backlog
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
_LEVELS = {0: "OFF", 1: "NORMAL", 2: "FULL", 3: "EXTRA"}


def bench(
    *,
    only: Annotated[
        tuple[str, ...], Parameter(help="Figures whose names begin so, as publish; or store, or queue: one side.")
    ] = (),
    rounds: Annotated[int, Parameter(validator=Number(gte=1, lte=50), help="Of which the median counts.", show_default=True)] = 3,
    scale: Annotated[float, Parameter(validator=Number(gt=0, lte=100), help="Events per figure, as a factor.")] = 1.0,
    full: Annotated[bool, Parameter(help="Also how it scales with the log: many minutes, 6 GB of disk.")] = False,
    folder: Annotated[Path | None, Parameter(help="On the disk to measure; a temporary folder there is removed again.")] = None,
    json: Annotated[bool, Parameter(help="A JSON list of name, rate, limit, ratio, peer, peer_ratio and more.")] = False,
) -> int:
    """Measure queue and event store on durable SQLite, beside raw apsw (limit) and a peer, in alternating rounds."""
    rows = [*_figures(only, rounds, scale, folder), *(_scale(folder) if full else ())]
    if not rows:
        raise BadOption(
            f"no figure begins with {' or '.join(only)}: there are {', '.join(_names())}; queue, store: all of one side"
        )
    if json:
        say_json(rows)
        return 0
    columns = ("rate", "limit", "ratio", "peer", "peer_ratio")
    say_table(
        ("FIGURE", "TRILOGUE", "RAW APSW", "RATIO", "PEER", "RATIO", "OF"),
        [(row["name"], *(_shown(row.get(column)) for column in columns), _peer(row)) for row in rows],
    )
    for line in _durability(rows):
        say(line)
    return 0


def _figures(only: tuple[str, ...], rounds: int, scale: float, folder: Path | None) -> list[Row]:
    from trilogue.bench import report  # here: it needs the extra `bench`

    found: list[Row] = []
    for result in report.run(only=only, rounds=rounds, scale=scale, folder=folder):
        note(f"measured {result.name}")
        found.append(asdict(result))
    return found


def _names() -> list[str]:
    from trilogue.bench import report

    return [row.name for row in report.rows()]


def _peer(row: Row) -> str:
    way = f" ({row['peer_way']})" if row.get("peer_way") else ""
    return f"{row.get('peer_name') or '-'}{way}"


def _durability(rows: list[Row]) -> list[str]:
    """What the connections said of themselves, a line for each side."""
    said = {side: pragmas for row in rows for side, pragmas in row.get("pragmas", {}).items()}
    return [f"{side}: {', '.join(f'{name}={_named(name, value)}' for name, value in said[side].items())}" for side in said]


def _named(name: str, value: str | int) -> str:
    return f"{value} ({_LEVELS.get(int(value), '?')})" if name.startswith("synchronous") else str(value)


def _scale(folder: Path | None) -> list[Row]:
    from trilogue.bench import scale

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="trilogue-bench-", dir=folder) as place:
        for name, figure in scale.run(Path(place)):
            note(f"measured {name}")
            rows.append({"name": name, "rate": figure, "limit": None, "ratio": None, "peer": None, "peer_ratio": None})
    return rows


def _shown(value: object) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
