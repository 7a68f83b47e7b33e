"""Which log a command works on, and which of its groups: the part all commands share.

--url sqlite:///video.db   or   TRILOGUE_URL    or   sqlite:///trilogue.db
--store postgresql://…     or   TRILOGUE_STORE  or   sqlite:///trilogue.db        beside a broker; `none`: the broker alone
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trilogue.brokers import DEFAULT_STORE, is_broker, open_log
from trilogue.brokers.direct import Direct
from trilogue.errors import BadOption, Unavailable, UnknownEvent, Unsupported
from trilogue.ports import Feature, GroupStatus, Query, Status, Store
from trilogue.urls import redacted, split

DEFAULT_URL = "sqlite:///trilogue.db"

Json = Annotated[bool, Parameter(name="--json", help="Print JSON for programs.")]
GroupName = Annotated[str | None, Parameter(name="--group", help="Only this group.")]
_URL = Parameter(env_var="TRILOGUE_URL", help="Where the log is.", show_default=True)
STORE = Parameter(
    env_var="TRILOGUE_STORE", help=f"The store beside amqp:// or kafka://, {DEFAULT_STORE} if not given; none: without one."
)
NO_STORE = "none"


@Parameter(name="*")
@dataclass(frozen=True)
class Log:
    """Where the log is. store: what stands beside a broker; not given: the default, "none": nothing."""

    url: Annotated[str, _URL] = DEFAULT_URL
    store: Annotated[str | None, STORE] = None

    def open(self) -> Store:
        """The Store behind the URL, not opened yet; raises a WiringError."""
        return open_log(self.url, store=self.beside)

    @property
    def beside(self) -> str | None:
        """The URL of the store beside a broker, as open_log() takes it."""
        if self.store is None:
            return DEFAULT_STORE
        return None if self.store == NO_STORE else self.store


DEFAULT_LOG = Log()


@asynccontextmanager
async def opened(log: Log, *, create: bool = False) -> AsyncIterator[Store]:
    """The Store behind the URL, open while the block runs.

    create: whether a file that is not there is made; otherwise Unavailable is raised and nothing is left behind.
    """
    store = log.open()
    check_reachable(store, create=create)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def check_reachable(store: Store, *, create: bool) -> None:
    """Raise Unsupported for a log that no other process can reach, Unavailable for a file that is not there and is not made."""
    if Feature.SHARED not in store.features:
        raise Unsupported(f"{store.url} lives inside one process and cannot be reached from another: use sqlite:///FILE")
    behind: Any = getattr(store, "store", store)  # of a broker
    if not create and split(behind.url).scheme == "sqlite" and not Path(behind.path).exists():
        options = "--url or TRILOGUE_URL" if behind is store else "--store or TRILOGUE_STORE"
        raise Unavailable(f"there is no log at {behind.path}: publish something, or say where it is with {options}")


def where(log: Store) -> str:
    """The URL of a log as it may be shown, with the store beside it."""
    if not is_broker(log.url):
        return redacted(log.url)
    beside = getattr(log, "store", None)
    return f"{redacted(log.url)} alone" if beside is None else f"{redacted(log.url)} with {redacted(beside.url)}"


def workers(log: Store) -> str:
    """Where the processes of a program may run."""
    if Feature.MACHINES in log.features:
        return "many machines"
    return "one machine, several processes" if Feature.SHARED in log.features else "one process"


def near(name: str, names: Iterable[str], *, likeness: float = 0.6) -> str:
    """` did you mean 'x'?` for the nearest of the names, or nothing. likeness: how near it must be, up to 1.

    >>> near("analitics", ["analytics", "badge"])
    " did you mean 'analytics'?"
    """
    # Lower case on both sides: a wrong capital is the nearest mistake of all.
    lowered = {each.lower(): each for each in names}
    found = get_close_matches(name.lower(), lowered, n=1, cutoff=likeness)
    return f" did you mean {lowered[found[0]]!r}?" if found else ""


async def type_question(store: Store, type: str) -> str | None:
    """None for a type the log has, or if it cannot be asked; otherwise ` did you mean 'x'?` for a near one, or nothing."""
    if Feature.HISTORY not in store.features:
        return None
    # The newest record of a type is found at once, or there is none at all; status() would count every group's lag.
    if await store.read(Query(types=(type,), reverse=True, limit=1)):
        return None
    return near(type, (await store.status()).types, likeness=0.8)


async def find_group(store: Store, name: str) -> GroupStatus:
    """The group of that name; raises UnknownEvent. Asked for by its name, because RabbitMQ alone lists none."""
    return await store.group(name) if isinstance(store, Direct) else group_status(await store.status(), name)


def check_lists_groups(store: Store) -> None:
    """Raise BadOption where nobody can tell which groups there are, so that one has to be named."""
    if isinstance(store, Direct) and not store.lists_groups:
        raise BadOption(f"{store.url} alone does not list its groups: name one with --group")


def group_status(status: Status, name: str) -> GroupStatus:
    """The group of that name; raises UnknownEvent with the nearest name and those there are."""
    for group in status.groups:
        if group.name == name:
            return group
    names = [group.name for group in status.groups]
    known = f"known: {', '.join(names)}" if names else "the log has no groups yet"
    raise UnknownEvent(f"group {name!r} is not on {status.url}:{near(name, names)} {known}")
