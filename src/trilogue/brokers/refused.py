"""What a broker alone cannot do, verb by verb: each is refused with the URLs that can.

read, trim, handled …   what was published is not kept where it could be looked up
append with expected    no versions          schedule, cancel   no timers
transact, state, query  no database          pause, held        nothing that other processes would see
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from trilogue.errors import Rejected
from trilogue.events import Envelope, Record
from trilogue.features import refusal
from trilogue.ports import Feature, Kind, Query, Rows, Scheduled, State, Transaction
from trilogue.stores.append import check_envelope

MOST_BYTES = 1 << 30
T = TypeVar("T")


class Refused:
    """The verbs of a Store that need a database beside the broker."""

    url: str

    def refuse(self, what: str, feature: Feature, mend: str = "") -> NoReturn:
        """Raise Unsupported. what: a sentence without its end."""
        raise refusal(self.url, what, feature, mend)

    # ── what was ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def read(self, query: Query) -> list[Record]:
        """Refused: what was published cannot be looked up."""
        self.refuse("records cannot be read back", Feature.HISTORY)

    async def trim(
        self, *, older_than_us: int | None = None, keep: int | None = None, force: bool = False, streams: bool = False
    ) -> int:
        """Refused: how long records are kept is the broker's own setting."""
        self.refuse("old records cannot be removed from here", Feature.HISTORY)

    async def handled(self, group: str, position: int) -> bool:
        """Refused: nobody could say when one record is done."""
        self.refuse(f"whether group {group!r} has handled one record is not known", Feature.HISTORY)

    async def finished_to(self, group: str) -> int:
        """Refused: there is no one position."""
        self.refuse(f"how far group {group!r} has read is no one position", Feature.HISTORY)

    async def kinds(self) -> list[Kind]:
        """Refused: nobody counts."""
        self.refuse("records are not counted by type", Feature.HISTORY)

    async def held(self, *, after: int = 0, limit: int = 1_000) -> list[Record]:
        """Refused: what is tried again is in the hands of one process."""
        self.refuse("records that are tried again cannot be listed", Feature.RETRY)

    async def publish_in(self, tx: object, envelopes: Sequence[Envelope], due_us: int | None = None) -> None:
        """Refused: there is no database to share a transaction with."""
        self.refuse("events cannot be published in a transaction of yours", Feature.OWN_TRANSACTION)

    # ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def stream_version(self, stream: str) -> int:
        """Refused: there are no streams."""
        self.refuse(f"stream {stream!r} has no version", Feature.EXPECTED)

    async def close_stream(self, stream: str, reason: str) -> int:
        """Refused: there are no streams."""
        self.refuse(f"stream {stream!r} cannot be closed", Feature.EXPECTED)

    async def truncate_stream(self, stream: str, before: int) -> None:
        """Refused: there are no streams."""
        self.refuse(f"stream {stream!r} cannot be truncated", Feature.EXPECTED)

    # ── timers ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def schedule(self, envelopes: Sequence[Envelope], due_us: int) -> None:
        """Refused: nobody would keep it until then."""
        self.refuse("an event cannot be delayed", Feature.TIMERS)

    async def cancel(self, event_id: str) -> bool:
        """Refused: nothing is delayed."""
        self.refuse("there are no delayed events", Feature.TIMERS)

    async def timers(self, *, after: str = "", limit: int = 1_000) -> list[Scheduled]:
        """Refused: nothing is delayed."""
        self.refuse("there are no delayed events", Feature.TIMERS)

    # ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def pause(self, group: str) -> None:
        """Refused: other processes would not hear of it."""
        self.refuse(f"group {group!r} cannot be paused for all its processes", Feature.PAUSE, "stop them")

    async def resume(self, group: str) -> None:
        """Refused: nothing is paused."""
        self.refuse(f"group {group!r} cannot be paused and resumed", Feature.PAUSE, "start its processes")

    # ── the database ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def transact(self, work: Callable[[Transaction], T], *, rows: int = 1_000, limit_us: int | None = None) -> T:
        """Refused: there is no database."""
        self.refuse("there is no database for tables, processes and projections", Feature.EFFECTS)

    async def query(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        """Refused: there is no database."""
        self.refuse("there is no database to ask", Feature.EFFECTS)

    async def state(self, owner: str, id: str) -> bytes | None:
        """Refused: there is no database."""
        self.refuse("no states are kept", Feature.EFFECTS)

    async def states(self, owner: str, *, after: str = "", limit: int = 1_000) -> list[State]:
        """Refused: there is no database."""
        self.refuse("no states are kept", Feature.EFFECTS)

    async def rewrite(self) -> bool:
        """Refused: there is no file."""
        self.refuse("there are no files to write anew", Feature.EFFECTS)


def not_taken(envelope: Envelope) -> Rejected | None:
    """Why no log takes this envelope; how large one may be is the broker's own business."""
    try:
        check_envelope(envelope, MOST_BYTES)
    except Rejected as error:
        return error
    return None


def plain(text: str) -> str:
    """An error's text with everything written out that a server may not take."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
