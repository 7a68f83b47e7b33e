"""What `trilogue demo bank` can be told, and the check that it makes sense."""

from dataclasses import dataclass
from typing import Literal

from trilogue.apps.place import Wanted, check_wanted
from trilogue.errors import BadOption

MOST = {"accounts": 10_000, "transfers": 1_000_000, "writers": 1_000, "workers": 16}
LEAST = {"accounts": 2, "transfers": 0, "writers": 1, "workers": 1}


@dataclass(frozen=True, slots=True)
class BankOptions:
    """Options of demo_bank(), as they are written on the command line.

    accounts: between which money is moved, 2 to 10,000. transfers: up to 1,000,000. writers: ask for transfers at once, up to
    1,000. workers: processes, up to 16; None: two, or one where the log is in one process. db: the file to keep, running again
    goes on where it ended. seed: of who pays whom. report: for people or for programs. url, store: a log instead of a file, as
    App takes them; nothing of the three: a throw-away file.
    """

    accounts: int = 100
    transfers: int = 3_000
    writers: int = 16
    workers: int | None = None
    db: str | None = None
    seed: int = 1
    report: Literal["text", "json"] = "text"
    url: str | None = None
    store: str | None = None


def checked(options: BankOptions) -> Wanted:
    """Where the log is to be; raises BadOption with the first mistake in the options."""
    for name, least in LEAST.items():
        number = getattr(options, name)
        if number is not None and not least <= number <= MOST[name]:
            raise BadOption(f"{name} is {number}: expected {least} to {MOST[name]:,}")
    if options.report not in ("text", "json"):
        raise BadOption(f"report is {options.report!r}: expected text or json")
    wanted = Wanted(options.url, options.store, options.db)
    check_wanted(wanted)
    return wanted


def processes(asked: int | None, shared: bool) -> int:
    """How many processes there are. asked: on the command line. shared: whether the log can be shared; raises BadOption."""
    if asked is None:
        return 2 if shared else 1
    if asked > 1 and not shared:
        raise BadOption(f"workers is {asked}, and this log is in one process: expected 1, or a --url that processes can share")
    return asked
