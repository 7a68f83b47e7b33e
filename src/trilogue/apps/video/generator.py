"""Invented watches, the same for the same seed, without end and in order of time.

    users     log-normal activity (sigma 1.2), two or three favourite genres each
    titles    popularity by Zipf's law (s = 0.9); a third of the names are series of three parts; each day one title comes to
              the front and the others slide down
    arrivals  sessions as a Poisson process under a daily curve (trough 04:00, peak 21:00, 6 : 1), weekends x 1.3
    session   one to six titles, mostly of the user's genres or the next part of a series; log-normal time between them
              (median 22 minutes, sigma 1.1), and 25 % left after a minute

Titles and users are made up; nothing is taken from any data set.
"""

import heapq
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import accumulate, count
from typing import NamedTuple

from trilogue.apps.video.events import as_us
from trilogue.apps.video.watch import Watch

STARTS_US = as_us(datetime(2026, 1, 5, tzinfo=UTC))  # a Monday
SECOND_US = 1_000_000
DAY_S = 86_400
DAY_US = DAY_S * SECOND_US
ZIPF = 0.9
FRONT = 5
SESSIONS_PER_USER_DAY = 0.6
LONGEST_TITLE_S = 3 * 3_600
# Relative arrivals by hour of the day.
DAILY = (2.6, 1.9, 1.4, 1.1, 1.0, 1.1, 1.3, 1.6, 1.9, 2.1, 2.3, 2.5, 2.8, 2.9, 2.9, 3.0, 3.3, 3.8, 4.5, 5.2, 5.8, 6.0, 5.0, 3.7)
WEEKEND = 1.3

GENRES = (
    "Action", "Adventure", "Animation", "Comedy", "Crime", "Documentary", "Drama", "Family",
    "Fantasy", "History", "Horror", "Music", "Mystery", "Romance", "Science Fiction", "Western",
)  # fmt: skip
FIRST = (
    "Amber", "Broken", "Crimson", "Distant", "Electric", "Forgotten", "Golden", "Hidden", "Iron", "Jade", "Last", "Lonely",
    "Midnight", "Northern", "Paper", "Quiet", "Restless", "Silver", "Twelfth", "Velvet", "Wandering", "Winter", "Young", "Zero",
)  # fmt: skip
SECOND = (
    "Alphabet", "Bridge", "Cartographer", "Detective", "Echo", "Ferry", "Garden", "Harbour", "Island", "Jury", "Kingdom",
    "Lighthouse", "Meridian", "Nomad", "Orchard", "Parade", "Quarry", "River", "Signal", "Theorem", "Umbrella", "Voyage",
    "Whisper", "Zeppelin",
)  # fmt: skip


Shelf = tuple[list[int], list[float]]  # places in the catalogue, cumulated weights


class Film(NamedTuple):
    """A title of the catalogue. sequel: the place of its next part, or None."""

    video: str
    title: str
    genres: tuple[str, ...]
    sequel: int | None


class Viewer(NamedTuple):
    """A user and the favourite genres, the dearest first."""

    user: str
    favourites: tuple[str, ...]


def generate(seed: int, *, users: int = 300, titles: int = 400) -> Iterator[Watch]:
    """Invented watches without end, sorted by time.

    seed: the same seed gives the same watches. users: how many people. titles: how many films.

    >>> from itertools import islice
    >>> [watch.user for watch in islice(generate(1), 3)] == [watch.user for watch in islice(generate(1), 3)]
    True
    """
    rng = random.Random(seed)
    films = make_catalogue(rng, titles)
    shelves = _Shelves(films)
    viewers = [Viewer(f"user{n:04d}", tuple(rng.sample(GENRES, rng.choice((2, 2, 3))))) for n in range(1, users + 1)]
    activity = list(accumulate(rng.lognormvariate(0, 1.2) for _ in viewers))
    coming: list[tuple[int, int, Watch]] = []
    serial = count()
    day = 0
    for start_us in _arrivals(rng, users * SESSIONS_PER_USER_DAY / DAY_S):
        while coming and coming[0][0] <= start_us:
            yield heapq.heappop(coming)[2]
        if (start_us - STARTS_US) // DAY_US > day:
            day += 1
            shelves.premiere(rng)
        viewer = rng.choices(viewers, cum_weights=activity)[0]
        for watch in _session(rng, viewer, shelves, start_us):
            heapq.heappush(coming, (watch.time_us, next(serial), watch))


def make_catalogue(rng: random.Random, titles: int) -> list[Film]:
    """Invented films, the most popular first; every third name is a series of three parts."""
    names: dict[str, None] = {}
    while len(names) < titles:
        stem = f"The {rng.choice(FIRST)} {rng.choice(SECOND)}"
        if stem in names:
            stem = f"{stem}: {rng.choice(FIRST)} {rng.choice(SECOND)}"
        parts = (stem, f"{stem} II", f"{stem} III") if rng.random() < 1 / 3 else (stem,)
        names.update(dict.fromkeys(parts))
    order = list(names)[:titles]
    genres = {name: tuple(sorted(rng.sample(GENRES, rng.choice((1, 1, 2, 2, 3))))) for name in order}
    # Shuffled, so that popularity has nothing to do with the order the names were found in.
    rng.shuffle(order)
    place = {name: n for n, name in enumerate(order)}
    return [Film(f"v{n + 1:04d}", name, genres[_stem(name)], _sequel(name, place)) for n, name in enumerate(order)]


def _stem(name: str) -> str:
    return name.removesuffix(" III").removesuffix(" II")


def _sequel(name: str, place: dict[str, int]) -> int | None:
    following = f"{name}I" if name.endswith(" II") else f"{name} II"
    return place.get(following)


class _Shelves:
    """The catalogue, all of it and by genre, ready to be drawn from by popularity."""

    def __init__(self, films: Sequence[Film]) -> None:
        self.films = films
        self.ranking = list(range(len(films)))
        self._weigh()

    def _weigh(self) -> None:
        weights = [(rank + 1) ** -ZIPF for rank in range(len(self.ranking))]
        self.all = self.ranking[:], list(accumulate(weights))
        self.by_genre: dict[str, Shelf] = {}
        for genre in GENRES:
            ranks = [rank for rank, n in enumerate(self.ranking) if genre in self.films[n].genres]
            self.by_genre[genre] = [self.ranking[rank] for rank in ranks], list(accumulate(weights[rank] for rank in ranks))

    def premiere(self, rng: random.Random) -> None:
        """One title comes to the front; those behind it slide down."""
        n = self.ranking.pop(rng.randrange(len(self.ranking)))
        self.ranking.insert(rng.randrange(FRONT), n)
        self._weigh()

    def draw(self, rng: random.Random, viewer: Viewer) -> Film:
        """Three in four times from a favourite genre, otherwise from everything."""
        shelf = self.all
        if rng.random() < 0.75:
            shelf = self.by_genre[rng.choices(viewer.favourites, weights=(4, 2, 1)[: len(viewer.favourites)])[0]]
        places, weights = shelf if shelf[0] else self.all
        return self.films[rng.choices(places, cum_weights=weights)[0]]


def _arrivals(rng: random.Random, per_second: float) -> Iterator[int]:
    """Starts of sessions: a Poisson process at the highest rate, thinned to the curve of the day."""
    mean = sum(DAILY) / len(DAILY)
    highest = max(DAILY) * WEEKEND
    elapsed_s = 0.0
    while True:
        elapsed_s += rng.expovariate(per_second * highest / mean)
        rate = DAILY[int(elapsed_s // 3_600) % 24] * (WEEKEND if int(elapsed_s // DAY_S) % 7 >= 5 else 1)
        if rng.random() < rate / highest:
            yield STARTS_US + int(elapsed_s) * SECOND_US


def _session(rng: random.Random, viewer: Viewer, shelves: _Shelves, start_us: int) -> Iterator[Watch]:
    at_us, film = start_us, shelves.draw(rng, viewer)
    for _ in range(6):
        yield Watch(at_us, viewer.user, film.video, film.title, film.genres)
        if rng.random() < 0.4:
            return
        at_us += _watched_s(rng) * SECOND_US
        film = shelves.films[film.sequel] if film.sequel is not None and rng.random() < 0.7 else shelves.draw(rng, viewer)


def _watched_s(rng: random.Random) -> int:
    if rng.random() < 0.25:
        return 1 + int(rng.expovariate(1 / 60))
    return 1 + int(min(rng.lognormvariate(7.185, 1.1), LONGEST_TITLE_S))  # e^7.185 s = 22 minutes
