"""User Service: a user's taste, as genres whose weight fades.

    watch ──> user_tastes: user | Drama 3.2, Comedy 0.9 | as of
              every genre of a watch counts 1; half of it is left after 30 days

One row per user, bounded by the number of genres.
"""

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

import msgspec

from trilogue import Db, Retry, Router
from trilogue.apps.video.events import WatchStarted
from trilogue.apps.video.handled import create_handled, forget_handled, fresh, rows_of

HALF_LIFE_US = 30 * 86_400_000_000
FADED = 0.001

router = Router()


@router.setup
def tables(db: Db) -> None:
    """The read model, and which watches are in it."""
    create_handled(db, "user")
    db.execute('create table if not exists user_tastes ("user" text primary key, genres text not null, as_of_us bigint not null)')


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    forget_handled(db, "user")
    db.execute("delete from user_tastes")


@router.on(group="user", retry=Retry(25, "20ms..1s"), batch=500, db_limit="2s", reset=reset)
def update_taste(watches: list[WatchStarted], db: Db) -> None:
    """Add the genres of each watch to its user's taste."""
    watches = fresh(db, "user", watches)
    tastes = load(db, {watch.user for watch in watches})
    for watch in watches:
        weights, as_of_us = tastes.get(watch.user, ({}, 0))
        now_us = max(watch.watched_us, as_of_us)
        tastes[watch.user] = _added(weights, watch.genres, now_us - as_of_us), now_us
    db.executemany(
        'insert into user_tastes values (?, ?, ?) on conflict ("user") do update '
        "set genres = excluded.genres, as_of_us = excluded.as_of_us",
        [(user, msgspec.json.encode(weights).decode(), us) for user, (weights, us) in tastes.items()],
    )


def load(db: Db, users: AbstractSet[str]) -> dict[str, tuple[dict[str, float], int]]:
    """Weight per genre of those of these users who have any, and as of when (microseconds since 1970)."""
    rows = rows_of(db, 'select "user", genres, as_of_us from user_tastes where "user" in', sorted(users))
    return {user: (msgspec.json.decode(genres, type=dict[str, float]), as_of_us) for user, genres, as_of_us in rows}


def _added(weights: dict[str, float], genres: Iterable[str], elapsed_us: int) -> dict[str, float]:
    left = 0.5 ** (elapsed_us / HALF_LIFE_US)
    faded = {genre: round(weight * left, 4) for genre, weight in weights.items() if weight * left > FADED}
    return faded | {genre: faded.get(genre, 0.0) + 1.0 for genre in genres}
