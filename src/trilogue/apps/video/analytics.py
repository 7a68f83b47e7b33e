"""Analytics Service: how many watches per title, hour and genre.

    video.* ──> analytics_titles | analytics_hours | analytics_genres: what, watches

Counting needs no order, so none is asked for. It is the service that fails in the demonstration: quick and many attempts, and
nobody else notices.
"""

from collections import Counter
from collections.abc import Iterable

from trilogue import Db, Retry, Router
from trilogue.apps.video.events import WatchStarted

HOUR_US = 3_600_000_000
TABLES = ("titles", "hours", "genres")

router = Router()


@router.setup
def tables(db: Db) -> None:
    """The read model, and which watches are in it."""
    db.execute("create table if not exists analytics_handled (watch text primary key) without rowid")
    for name in TABLES:
        db.execute(f"create table if not exists analytics_{name} (what primary key, watches integer not null) without rowid")


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    for name in ("handled", *TABLES):
        db.execute(f"delete from analytics_{name}")


# 25 attempts: with three in ten failing, one watch in 10^13 would be given up.
@router.on("video.*", group="analytics", order=None, retry=Retry(25, "20ms..1s"), batch=500, start="beginning", reset=reset)
def count(watches: list[WatchStarted], db: Db) -> None:
    """Count each watch by title, hour (of time, not of the day) and genre."""
    db.executemany("insert into analytics_handled (watch) values (?)", [(w.session,) for w in watches])
    _add(db, "titles", (watch.title for watch in watches))
    _add(db, "hours", (watch.watched_us // HOUR_US for watch in watches))
    _add(db, "genres", (genre for watch in watches for genre in watch.genres))


def _add(db: Db, table: str, counted: Iterable[str | int]) -> None:
    db.executemany(
        f"insert into analytics_{table} values (?, ?) on conflict do update set watches = watches + excluded.watches",
        list(Counter(counted).items()),
    )
