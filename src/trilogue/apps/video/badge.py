"""Badge Service: what a user has earned by watching.

    first film · 10 films · 50 films · 100 films · five in a day · five genres

A film counts once, however often it is watched. Days are days of UTC.
"""

from dataclasses import dataclass

import msgspec

from trilogue import Db, Retry, Router
from trilogue.apps.video.events import WatchStarted

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
    db.execute("create table if not exists badge_handled (watch text primary key) without rowid")
    db.execute("create table if not exists badge_films (user text, video text, primary key (user, video)) without rowid")
    db.execute(
        "create table if not exists badge_progress "
        "(user text primary key, films integer, day integer, today integer, genres text)"
    )
    db.execute(
        "create table if not exists badge_won (user text, badge text, at_us integer, primary key (user, badge)) without rowid"
    )


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    for name in ("handled", "films", "progress", "won"):
        db.execute(f"delete from badge_{name}")


@router.on(group="badge", retry=Retry(25, "20ms..1s"), batch=500, start="beginning", reset=reset)
def award(watches: list[WatchStarted], db: Db) -> None:
    """Count each new film of a user and award what it earns."""
    db.executemany("insert into badge_handled (watch) values (?)", [(w.session,) for w in watches])
    users: dict[str, Progress] = {}
    won: list[tuple[str, str, int]] = []
    for watch in watches:
        if not db.execute("insert or ignore into badge_films values (?, ?) returning 1", (watch.user, watch.video)):
            continue
        if watch.user not in users:
            users[watch.user] = load(db, watch.user)
        won += [(watch.user, badge, watch.watched_us) for badge in advance(users[watch.user], watch)]
    db.executemany("insert or ignore into badge_won values (?, ?, ?)", won)
    db.executemany(
        "insert or replace into badge_progress values (?, ?, ?, ?, ?)",
        [(user, p.films, p.day, p.today, msgspec.json.encode(p.genres).decode()) for user, p in users.items()],
    )


def load(db: Db, user: str) -> Progress:
    """A user's progress so far."""
    for films, day, today, genres in db.execute("select films, day, today, genres from badge_progress where user = ?", (user,)):
        return Progress(films, day, today, msgspec.json.decode(genres, type=tuple[str, ...]))
    return Progress()


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
