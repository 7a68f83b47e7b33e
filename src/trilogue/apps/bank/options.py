"""What `trilogue demo bank` can be told, and the check that it makes sense."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trilogue.errors import BadOption

MOST = {"accounts": 10_000, "transfers": 1_000_000, "writers": 1_000, "workers": 16}
LEAST = {"accounts": 2, "transfers": 0, "writers": 1, "workers": 1}


@dataclass(frozen=True, slots=True)
class BankOptions:
    """Options of demo_bank(), as they are written on the command line.

    accounts: between which money is moved, 2 to 10,000. transfers: up to 1,000,000. writers: ask for transfers at once, up to
    1,000. workers: processes, up to 16. db: the file to keep, running again goes on where it ended; None: a throw-away one.
    seed: of who pays whom. report: for people or for programs.
    """

    accounts: int = 100
    transfers: int = 3_000
    writers: int = 16
    workers: int = 2
    db: str | None = None
    seed: int = 1
    report: Literal["text", "json"] = "text"


def checked(options: BankOptions) -> Path | None:
    """The file to keep, None for a throw-away one; raises BadOption with the first mistake in the options."""
    for name, least in LEAST.items():
        if not least <= (number := getattr(options, name)) <= MOST[name]:
            raise BadOption(f"{name} is {number}: expected {least} to {MOST[name]:,}")
    if options.report not in ("text", "json"):
        raise BadOption(f"report is {options.report!r}: expected text or json")
    return None if options.db is None else _file(options.db)


def _file(db: str) -> Path:
    path = Path(db).expanduser().absolute()
    if path.is_dir():
        raise BadOption(f"db {db!r} is a folder: expected the file to keep the log in")
    if not path.parent.is_dir():
        raise BadOption(f"db {db!r} cannot be made: there is no folder '{path.parent}'")
    return path
