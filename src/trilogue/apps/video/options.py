"""What `trilogue demo video` can be told, and the check that it makes sense."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from trilogue.apps.place import Wanted, check_wanted
from trilogue.apps.video.platform import SERVICES
from trilogue.apps.video.source import Columns, check_source, parse_columns
from trilogue.errors import BadOption

SAMPLE = 20_000
MOST_CHAIN_SAMPLE = 1_000
FAIL = {"analytics": 0.3}
_SPEED = re.compile(r"(\d+(?:\.\d+)?)x")


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """Options of demo_video(), as they are written on the command line.

    input: a watch log: MovieLens folder, CSV, TSV, JSON Lines (all as .gz too) or - (standard input); None: 20,000 generated
    watches. columns: `user=…,video=…,time=…`. limit: only the first so many watches, in order of time. speed: "max", or how many
    times as fast as recorded ("60x"). fail: "SERVICE=RATE" each, rate 0 to 1; none: analytics=0.3. down: services that are
    down until all others are done. db: the file to keep. report: for people or for programs.
    chain_sample: how many watches also go through the synchronous chain. seed: of generated watches and of what fails.
    url, store: a log instead of a file, as App takes them; nothing of the three: a throw-away file.
    """

    input: str | None = None
    columns: str | None = None
    limit: int | None = None
    speed: str = "max"
    fail: Sequence[str] = ()
    down: Sequence[str] = ()
    db: str | None = None
    report: Literal["text", "json"] = "text"
    chain_sample: int = 20
    seed: int = 1
    url: str | None = None
    store: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The options, checked. speed: None is as fast as it goes."""

    input: str | None
    columns: Columns | None
    limit: int | None
    speed: float | None
    fail: dict[str, float]
    down: tuple[str, ...]
    where: Wanted
    rejects: Path
    as_json: bool
    chain_sample: int
    seed: int


def checked(options: VideoOptions) -> Plan:
    """The options as a Plan; raises BadOption with the first mistake."""
    if options.input is not None:
        check_source(options.input)
    if options.columns is not None and options.input is None:
        raise BadOption("columns were named but there is no input: give --input PATH too")
    if options.limit is not None and options.limit < 1:
        raise BadOption(f"limit is {options.limit}: expected 1 or more")
    if not 0 <= options.chain_sample <= MOST_CHAIN_SAMPLE:
        raise BadOption(f"chain sample is {options.chain_sample}: expected 0 to {MOST_CHAIN_SAMPLE:,}")
    if options.report not in ("text", "json"):
        raise BadOption(f"report is {options.report!r}: expected text or json")
    return Plan(
        input=options.input,
        columns=parse_columns(options.columns),
        limit=options.limit or (SAMPLE if options.input is None else None),
        speed=_speed(options.speed),
        fail=dict(map(_fail, options.fail)) if options.fail else FAIL,
        down=tuple(map(_service, options.down)),
        where=_where(options),
        rejects=_rejects(options),
        as_json=options.report == "json",
        chain_sample=options.chain_sample,
        seed=options.seed,
    )


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    match = _SPEED.fullmatch(text)
    if match is None or not float(match[1]):
        raise BadOption(f"speed {text!r} is not understood: expected max, or how many times as fast, as 60x or 1x")
    return float(match[1])


def _fail(text: str) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    try:
        share = float(rate)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise BadOption(f"fail {text!r} is not understood: expected SERVICE=RATE with a rate from 0 to 1, as analytics=0.3")
    return _service(name), share


def _service(name: str) -> str:
    if name in SERVICES:
        return name
    near = get_close_matches(name, SERVICES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise BadOption(f"there is no service {name!r}, only {', '.join(SERVICES)}{hint}")


def _where(options: VideoOptions) -> Wanted:
    wanted = Wanted(options.url, options.store, options.db)
    check_wanted(wanted)
    return wanted


def _rejects(options: VideoOptions) -> Path:
    """Beside the database if there is one to keep, otherwise here, named after the input (whose folder may be read-only)."""
    if options.db is not None:
        return Path(f"{options.db}.rejects.csv").expanduser().absolute()
    stem = "stdin" if options.input in (None, "-") else Path(str(options.input)).resolve().name
    return Path(f"{stem}.rejects.csv").absolute()
