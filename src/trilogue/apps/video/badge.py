"""Badge Service: what a user has earned by watching.

    first film · 10 films · 50 films · 100 films · five in a day · five genres

A film counts once, however often it is watched. Days are days of UTC.
"""

from dataclasses import dataclass

import msgspec

from trilogue import Db, Retry, Router
from trilogue.apps.video.events import WatchStarted
from trilogue.apps.video.handled import create_handled, forget_handled, fresh, rows_of

DAY_US = 86_400_000_000
BY_FILMS = {1: "first film", 10: "10 films", 50: "50 films", 100: "100 films"}
IN_A_DAY = 5
GENRES = 5

router = Router()


@dataclass(slots=True)
class Progress:
    """How far a user is. today: films on the day `day` (days since 1970). genres: the first five different ones."""

    films: int = 0
    day: int = -1
    today: int = 0
    genres: tuple[str, ...] = ()


@router.setup
def tables(db: Db) -> None:
    """The read model, and which watches are in it."""
    create_handled(db, "badge")
    db.execute('create table if not exists badge_films ("user" text, video text, primary key ("user", video))')
    db.execute(
        'create table if not exists badge_progress ("user" text primary key, films bigint, day bigint, today bigint, genres text)'
    )
    db.execute('create table if not exists badge_won ("user" text, badge text, at_us bigint, primary key ("user", badge))')


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    forget_handled(db, "badge")
    for name in ("films", "progress", "won"):
        db.execute(f"delete from badge_{name}")


@router.on(group="badge", retry=Retry(25, "20ms..1s"), batch=500, db_limit="2s", reset=reset)
def award(watches: list[WatchStarted], db: Db) -> None:
    """Count each new film of a user and award what it earns."""
    films = _first_seen(db, fresh(db, "badge", watches))
    users = _load(db, {watch.user for watch in films})
    won = [(watch.user, badge, watch.watched_us) for watch in films for badge in advance(users[watch.user], watch)]
    db.executemany("insert into badge_won values (?, ?, ?) on conflict do nothing", won)
    db.executemany(
        'insert into badge_progress values (?, ?, ?, ?, ?) on conflict ("user") do update '
        "set films = excluded.films, day = excluded.day, today = excluded.today, genres = excluded.genres",
        [(user, p.films, p.day, p.today, msgspec.json.encode(p.genres).decode()) for user, p in users.items()],
    )


def _first_seen(db: Db, watches: list[WatchStarted]) -> list[WatchStarted]:
    """Of these watches those of a film that is new to its user, who has seen it from now on."""
    films: dict[tuple[str, str], WatchStarted] = {}
    for watch in watches:
        films.setdefault((watch.user, watch.video), watch)
    if not films:
        return []
    rows, values = ", ".join(["(?, ?)"] * len(films)), [value for film in films for value in film]
    new = set(db.execute(f'insert into badge_films values {rows} on conflict do nothing returning "user", video', values))
    return [watch for film, watch in films.items() if film in new]


def _load(db: Db, users: set[str]) -> dict[str, Progress]:
    """The progress of these users so far."""
    found = {user: Progress() for user in sorted(users)}
    select = 'select "user", films, day, today, genres from badge_progress where "user" in'
    for user, films, day, today, genres in rows_of(db, select, list(found)):
        found[user] = Progress(films, day, today, msgspec.json.decode(genres, type=tuple[str, ...]))
    return found


def advance(progress: Progress, watch: WatchStarted) -> list[str]:
    """Move progress on by a film not seen before; the badges it earns."""
    day = watch.watched_us // DAY_US
    progress.films += 1
    progress.today = progress.today + 1 if day == progress.day else 1
    progress.day = day
    had = len(progress.genres)
    progress.genres = tuple(dict.fromkeys(progress.genres + watch.genres))[:GENRES]
    earned = [BY_FILMS[progress.films]] if progress.films in BY_FILMS else []
    if progress.today == IN_A_DAY:
        earned.append("five in a day")
    if had < GENRES == len(progress.genres):
        earned.append("five genres")
    return earned
