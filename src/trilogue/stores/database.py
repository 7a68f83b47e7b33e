"""What the store needs of a database, whichever it is: sqlite_database.py, postgresql_database.py.

write    through the Writer: many changes to one commit               (writer.py)
glance   looks that take microseconds of the database's time
look     what may take long, all of it at one moment
query    the user's SQL, on a connection made for it
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from trilogue.events import Durability
from trilogue.ports import Rows
from trilogue.stores.dialect import Sql, TransactionSql
from trilogue.stores.log import Types
from trilogue.stores.transaction import SqlTransaction
from trilogue.stores.writer import Writer

T = TypeVar("T")


class Version(NamedTuple):
    """What tells that somebody has committed. log: of records, and rows of brokers' groups. rest: of groups and timers."""

    log: Any
    rest: Any


class Database(Protocol):
    """One open database; made and used on one event loop.

    is_open: set to False by whoever begins to close it, so that nothing new is waited for.
    """

    url: str
    is_open: bool
    durability: Durability
    writer: Writer
    writer_types: Types
    transaction: SqlTransaction

    @property
    def sql(self) -> TransactionSql:
        """The cursor of the write connection."""
        ...

    async def close(self) -> None:
        """Write what waits, then let go."""

    def check_open(self) -> None:
        """Raise Unavailable if it is closed, or this is a fork of the process that opened it."""

    async def write(self, run: Callable[[Sql], T], *, rows: int = 1) -> T:
        """Run a change and commit it. rows: about how many it writes."""
        ...

    async def glance(self, run: Callable[[Sql, Types], T]) -> T:
        """Read what takes microseconds."""
        ...

    async def look(self, run: Callable[[Sql, Types], T]) -> T:
        """Read what may take long, all of it as it was at one moment."""
        ...

    async def query(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        """Read the user's tables."""
        ...

    async def rewrite(self) -> bool:
        """Write anew what is kept, so that nothing of what was deleted is left in it; False if that was not possible."""
        ...

    async def version(self) -> "Version":
        """What is another one after others have changed the log; asked every few milliseconds."""
        ...

    async def describe(self) -> dict[str, str]:
        """What kind of database this is, and what its durability rests on."""
        ...

    def beside_bytes(self) -> int:
        """How much is kept beside the tables."""
        ...

    def in_transaction(self) -> bool:
        """Whether the write connection still has its transaction."""
        ...

    def set_deadline(self, limit_us: int | None) -> None:
        """What the user's SQL may take from now on, in microseconds; None: no limit of its own."""

    def translate(self, error: Exception) -> Exception:
        """The driver's error, on the write connection, as one of ours."""
        ...
