"""All figures of a URL in turn: ours and those beside it, round by round, so that a machine whose speed drifts is fair to all.

    {"name": "publish_many", "unit": "events/s", "what": "Batches of 1,000.", "value": 38300, "aim": null, "met": null,
     "beside": [{"name": "FastStream", "what": "…", "value": 6000, "ratio": 6.4, "aim": 4, "met": true, "way": null}],
     "durability": {"trilogue": {"queue": "quorum", "delivery_mode": 2}, …}}

value: the median of the rounds. ratio: ours by theirs, the median of the rounds' own ratios. aim: what it is meant to be at
least; met: whether it is.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trilogue.bench.measured import Durability, Measured, weakest
from trilogue.bench.place import Place, place, scheme_of
from trilogue.bench.suites import Figure, Side, suite
from trilogue.errors import BadOption, TrilogueError, Unavailable

DEFAULT_URL = "sqlite:///bench.db"
MUST_AGREE = ("synchronous", "journal_mode", "fsync", "synchronous_commit", "full_page_writes", "queue", "delivery_mode", "acks")


@dataclass(frozen=True, slots=True)
class Compared:
    """One side beside ours. way: how it did it, if it has several."""

    name: str
    what: str
    value: float
    ratio: float
    aim: float | None
    met: bool | None
    way: str | None


@dataclass(frozen=True, slots=True)
class Result:
    """A measured Figure. durability: what each side's connection or queue said of itself."""

    name: str
    what: str
    unit: str
    value: float
    aim: float | None
    met: bool | None
    beside: tuple[Compared, ...]
    durability: dict[str, Durability]


def run(
    url: str = DEFAULT_URL,
    *,
    store: str | None = None,
    only: Sequence[str] = (),
    rounds: int = 3,
    scale: float = 1.0,
    folder: Path | None = None,
) -> Iterator[Result]:
    """Measure the figures whose names begin with one of `only`, or whose family it is, each in `rounds` alternating rounds.

    url: whose server, or for SQLite whose options, are used; nothing that is there is touched. store: beside a broker; None: a
    new SQLite file. folder: where files are made and removed; must be on the disk that is to be measured.
    Raises Unsupported where a peer is not installed, Unavailable where a side fails, BadOption.
    """
    for figure in suite(scheme_of(url), scale):
        if only and not any(name == figure.family or figure.name.startswith(name) for name in only):
            continue
        found: dict[Side, list[Measured]] = {side: [] for side in (figure.ours, *figure.beside)}
        for _ in range(rounds):
            for side, measured in found.items():
                with place(url, store, folder) as at:
                    measured.append(_measured(figure, side, at))
        yield result(figure, found)


def _measured(figure: Figure, side: Side, at: Place) -> Measured:
    try:
        return side.measure(at, side.events)
    except TrilogueError:
        raise
    except Exception as error:  # each driver and peer has its own
        raise Unavailable(f"{figure.name}: {side.name} failed: {type(error).__name__}: {error}") from error


def result(figure: Figure, found: dict[Side, list[Measured]]) -> Result:
    """What the rounds of one figure come to. Raises BadOption if the sides were not equally durable."""
    said = {side.name: [one.durability for one in measured if one.durability] for side, measured in found.items()}
    durability = {name: weakest(read) for name, read in said.items() if read}
    _check_same_durability(figure.name, durability)
    ours = found[figure.ours]
    value = statistics.median(one.rate for one in ours)
    beside = tuple(_compared(ours, side, found[side]) for side in figure.beside)
    aim = figure.ours.aim
    return Result(figure.name, figure.ours.what, figure.unit, value, aim, _met(value, aim), beside, durability)


def _compared(ours: Sequence[Measured], side: Side, theirs: Sequence[Measured]) -> Compared:
    ratio = statistics.median(a.rate / b.rate for a, b in zip(ours, theirs, strict=True))
    ways = " or ".join(sorted({one.way for one in theirs if one.way})) or None
    value = statistics.median(one.rate for one in theirs)
    return Compared(side.name, side.what, value, ratio, side.aim, _met(ratio, side.aim), ways)


def _met(value: float, aim: float | None) -> bool | None:
    return None if aim is None else value >= aim


def _check_same_durability(name: str, durability: dict[str, Durability]) -> None:
    """Ratios of sides that wait for the disk differently would say nothing."""
    for what in MUST_AGREE:
        said = {side: read[what] for side, read in durability.items() if what in read}
        if len(set(said.values())) > 1:
            raise BadOption(f"{name}: {what} is {said}: expected the same on every side, there is no figure to compare")
