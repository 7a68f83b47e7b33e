"""`bench`: our figures beside raw apsw and huey, as ratios of one run.

bench                      all, three rounds, about two minutes
bench --only publish --json
bench --full               also whether anything grows up to 10,000,000 records, and the memory before a backlog
"""

import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from trilogue.cli.output import note, say_json, say_table
from trilogue.errors import BadOption

Row = dict[str, str | float | None]


def bench(
    *,
    only: Annotated[tuple[str, ...], Parameter(help="Figures whose names begin so, as publish or latency.")] = (),
    rounds: Annotated[int, Parameter(validator=Number(gte=1, lte=50), help="Of which the median counts.", show_default=True)] = 3,
    scale: Annotated[float, Parameter(validator=Number(gt=0, lte=100), help="Events per figure, as a factor.")] = 1.0,
    full: Annotated[bool, Parameter(help="Also how it scales with the log: some minutes, 4 GB of disk.")] = False,
    folder: Annotated[Path | None, Parameter(help="On the disk to measure; a temporary folder there is removed again.")] = None,
    json: Annotated[bool, Parameter(help="A JSON list of name, rate, limit, ratio, peer, peer_ratio.")] = False,
) -> None:
    """Measure publish, consume and latency on durable SQLite, beside raw apsw (limit) and huey (peer), in alternating rounds."""
    rows = [*_figures(only, rounds, scale, folder), *(_scale(folder) if full else ())]
    if not rows:
        raise BadOption(f"no figure begins with {' or '.join(only)}: there are publish_, consume_ and latency_")
    if json:
        say_json(rows)
    else:
        say_table(
            ("FIGURE", "TRILOGUE", "RAW APSW", "RATIO", "HUEY", "RATIO"),
            [(str(row["name"]), *(_shown(row[key]) for key in ("rate", "limit", "ratio", "peer", "peer_ratio"))) for row in rows],
        )


def _figures(only: tuple[str, ...], rounds: int, scale: float, folder: Path | None) -> list[Row]:
    from trilogue.bench import report  # here: it needs the extra `bench`

    rows: list[Row] = []
    for result in report.run(only=only, rounds=rounds, scale=scale, folder=folder):
        note(f"measured {result.name}")
        rows.append(
            {
                "name": result.name,
                "rate": result.rate,
                "limit": result.limit,
                "ratio": result.ratio,
                "peer": result.peer,
                "peer_ratio": result.peer_ratio,
            }
        )
    return rows


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
