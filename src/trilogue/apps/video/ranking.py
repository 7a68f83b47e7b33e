"""Ranking Service: what is watched most, of all time and at the moment.

    all time   watches
    trending   the sum of 2^(-age / 3 days) over all watches of a title

Ages change with the clock, but sums do not have to: 2^(-(now - t) / h) = 2^(t / h) / 2^(now / h), and the divisor is the same for
all titles. So a title keeps log2 of the sum of 2^(t / h), its heat; nothing is ever rescaled, late watches fit in, and
2^(heat - now / h) is its trend.
"""

from math import log2

from trilogue import Db, Retry, Router
from trilogue.apps.video.events import WatchStarted
from trilogue.apps.video.handled import create_handled, create_turn, forget_handled, fresh, rows_of, take_turn

HALF_LIFE_US = 3 * 86_400_000_000
NEVER = ("", 0, float("-inf"))  # a title nobody has watched: title, watches, heat

router = Router()


@router.setup
def tables(db: Db) -> None:
    """The read model, and which watches are in it."""
    create_handled(db, "ranking")
    create_turn(db, "ranking")
    db.execute(
        "create table if not exists ranking_titles (video text primary key, title text, watches bigint, heat double precision)"
    )


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    forget_handled(db, "ranking")
    db.execute("delete from ranking_titles")


# No order asked for: sums do not care.
@router.on(group="ranking", order=None, retry=Retry(25, "20ms..1s"), batch=500, db_limit="2s", reset=reset)
def rank(watches: list[WatchStarted], db: Db) -> None:
    """Add each watch to its title."""
    take_turn(db, "ranking")
    watches = fresh(db, "ranking", watches)
    titles = _load(db, {watch.video for watch in watches})
    for watch in watches:
        _, seen, heat = titles.get(watch.video, NEVER)
        titles[watch.video] = watch.title, seen + 1, log2_sum(heat, watch.watched_us / HALF_LIFE_US)
    db.executemany(
        "insert into ranking_titles values (?, ?, ?, ?) on conflict (video) do update "
        "set title = excluded.title, watches = excluded.watches, heat = excluded.heat",
        [(video, *row) for video, row in titles.items()],
    )


def _load(db: Db, videos: set[str]) -> dict[str, tuple[str, int, float]]:
    select = "select video, title, watches, heat from ranking_titles where video in"
    return {video: (title, watches, heat) for video, title, watches, heat in rows_of(db, select, sorted(videos))}


def log2_sum(a: float, b: float) -> float:
    """log2(2^a + 2^b) without leaving the range of a float."""
    high, low = max(a, b), min(a, b)
    return high + log2(1 + 2 ** (low - high))
