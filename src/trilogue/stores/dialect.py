"""What SQL databases do differently, as data. Everything else of the algorithm is one text for all of them.

                 SQLite                                 PostgreSQL
writing          one transaction at a time              many: what must not happen twice takes a lock, until the commit
for_update       -                                      " for update"       rows read to be changed
end              pragma data_version tells              the counter row, locked: who appends next waits for the commit
alone            -                                      one transaction at a time does what is done rarely
clock            the machine's monotonic clock          the server's clock: machines share no other
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Sql(Protocol):
    """The narrow cursor the algorithm is written over."""

    dialect: "Dialect"

    def rows(self, sql: str, values: Any = ()) -> list[Any]:
        """Run one statement; all its rows."""
        ...

    def many(self, sql: str, values: Any) -> int:
        """Run one statement once per row of values; how many rows it changed."""
        ...


class TransactionSql(Sql, Protocol):
    """The cursor of a write connection."""

    @property
    def user(self) -> Sql:
        """The same for the user's own SQL, which is bounded in time."""
        ...

    def in_transaction(self) -> bool:
        """Whether there is a transaction, begun and not undone."""
        ...

    def check(self) -> None:
        """Raise TimedOut or Rejected if an error in the transaction, which was caught, lets nothing more happen in it."""
        ...


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one database says it; an empty text: it need not be said.

    leads: a join whose left side is read first. takes_nul: whether texts may have NUL characters.
    timers: in which order those fire that are due.
    kind_of: a select with the kind of a table or view by its name. view: a select that finds a view that shows a table.
    columns: a select with the columns of a table. bytes: a select with the size of the whole log.
    move: a statement that moves slots of a group and returns them, of arrays of slots, epochs, cursors, done and failed, for an
    owner: only slots that are his with that epoch.
    append_all, emit: what append.py does, done by the server in one call. append_at_once: append_all as one statement, where
    nothing else is to be done; None if something is.
    """

    name: str
    for_update: str = ""
    leads: str = "join"
    takes_nul: bool = True
    timers: str = "due_us, id"
    end: str = ""
    alone: str = ""
    state: str = ""
    clock: str = ""
    kind_of: str = ""
    view: str = ""
    columns: str = ""
    bytes: str = ""
    move: str = ""
    append_all: Callable[..., Any] | None = None
    append_at_once: Callable[..., Any] | None = None
    emit: Callable[..., Any] | None = None


SQLITE = Dialect(
    "SQLite",
    leads="cross join",
    kind_of="select type from sqlite_master where name = ? and type in ('table', 'view')",
    view="select 1 from sqlite_master where type = 'view' and name = ? and sql like '%from ' || ?",
    columns="select name from pragma_table_info(?)",
    bytes="select page_count * page_size from pragma_page_count(), pragma_page_size()",
)


def clock_us(sql: Sql) -> int:
    """A clock that all workers share and nobody sets, in microseconds."""
    return int(sql.rows(sql.dialect.clock)[0][0]) if sql.dialect.clock else time.monotonic_ns() // 1_000


def alone(sql: Sql) -> None:
    """Let no other transaction that says this go on until the commit."""
    if sql.dialect.alone:
        sql.rows(sql.dialect.alone)
