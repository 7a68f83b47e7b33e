"""Which watches a service has handled, so that each of them counts once, however often it is published or delivered.

badge_handled    watch      those that count
badge_repeated   watch      what came again and was passed over: nothing, unless somebody has published a watch twice
ranking_turn     a row that a batch locks before it reads what other batches change too

Here and in the services: SQL that SQLite and PostgreSQL both understand, and one statement for many values (`in (?, ?, …)`)
where one for each of them would be a way to a server and back.
"""

from collections.abc import Sequence
from typing import Any

from trilogue import Db
from trilogue.apps.video.events import WatchStarted


def create_handled(db: Db, service: str) -> None:
    """Make the tables of a service's watches."""
    db.execute(f"create table if not exists {service}_handled (watch text primary key)")
    db.execute(f"create table if not exists {service}_repeated (watch text not null)")


def forget_handled(db: Db, service: str) -> None:
    """Forget all watches, before a replay."""
    db.execute(f"delete from {service}_handled")
    db.execute(f"delete from {service}_repeated")


def fresh(db: Db, service: str, watches: Sequence[WatchStarted]) -> list[WatchStarted]:
    """The watches the service has not handled before, each once and in order; from now on it has."""
    new = fresh_ids(db, service, [watch.session for watch in watches])
    return [watches[n] for n in new]


def fresh_ids(db: Db, service: str, ids: Sequence[str]) -> list[int]:
    """The places of the ids that were not handled before, of each the first one; from now on they are."""
    met = {watch for (watch,) in rows_of(db, f"select watch from {service}_handled where watch in", ids)}
    new: dict[str, int] = {}
    again: list[tuple[str]] = []
    for n, id in enumerate(ids):
        if id in met or id in new:
            again.append((id,))
        else:
            new[id] = n
    # Plain inserts: of two workers that handle one watch at the same time one fails, and finds it handled when it tries again.
    db.executemany(f"insert into {service}_handled (watch) values (?)", [(id,) for id in new])
    db.executemany(f"insert into {service}_repeated (watch) values (?)", again)
    return list(new.values())


def rows_of(db: Db, select: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The rows of a select that ends with `in`, for these values; none for no values."""
    return db.execute(f"{select} ({marks(values)})", values) if values else []


def marks(values: Sequence[Any]) -> str:
    """A question mark for each value.

    >>> marks("abc")
    '?, ?, ?'
    """
    return ", ".join("?" * len(values))


def create_turn(db: Db, service: str) -> None:
    """Make the row that take_turn() locks."""
    db.execute(f"create table if not exists {service}_turn (one bigint primary key, taken bigint not null)")
    db.execute(f"insert into {service}_turn values (1, 0) on conflict do nothing")


def take_turn(db: Db, service: str) -> None:
    """Wait until no other worker's batch of this service is under way.

    A file has one writer anyway; on a server two would read the same row, and the later one write over what the other added.
    """
    db.execute(f"update {service}_turn set taken = taken + 1")
