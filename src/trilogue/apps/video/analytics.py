"""Analytics Service: how many watches per title, hour and genre.

    video.* ──> analytics_titles | analytics_hours | analytics_genres: what, watches

Counting needs no order, so none is asked for. It is the service that fails in the demonstration: quick and many attempts, and
nobody else notices.
"""

from collections import Counter
from collections.abc import Iterable

from trilogue import Db, Retry, Router
from trilogue.apps.video.events import WatchStarted
from trilogue.apps.video.handled import create_handled, forget_handled, fresh

HOUR_US = 3_600_000_000
TABLES = {"titles": "text", "hours": "bigint", "genres": "text"}

router = Router()


@router.setup
def tables(db: Db) -> None:
    """The read model, and which watches are in it."""
    create_handled(db, "analytics")
    for name, kind in TABLES.items():
        db.execute(f"create table if not exists analytics_{name} (what {kind} primary key, watches bigint not null)")


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    forget_handled(db, "analytics")
    for name in TABLES:
        db.execute(f"delete from analytics_{name}")


# 25 attempts: with three in ten failing, one watch in 10^13 would be given up.
@router.on("video.*", group="analytics", order=None, retry=Retry(25, "20ms..1s"), batch=500, db_limit="2s", reset=reset)
def count(watches: list[WatchStarted], db: Db) -> None:
    """Count each watch by title, hour (of time, not of the day) and genre."""
    watches = fresh(db, "analytics", watches)
    _add(db, "titles", (watch.title for watch in watches))
    _add(db, "hours", (watch.watched_us // HOUR_US for watch in watches))
    _add(db, "genres", (genre for watch in watches for genre in watch.genres))


def _add(db: Db, table: str, counted: Iterable[str | int]) -> None:
    db.executemany(
        f"insert into analytics_{table} values (?, ?) "
        f"on conflict (what) do update set watches = analytics_{table}.watches + excluded.watches",
        sorted(Counter(counted).items()),  # in one order for everybody, or workers would wait for each other in a circle
    )
