"""Recommendation Service: learns from who watches what after what, tells users what is new, and judges itself.

    watch ──> judged     was it among the ten shown to this user before? among the ten most popular ones not seen?
          ──> learned    cowatch.py: the title's neighbours, the user's wants
          ──> shown      the next ten; recommendation.updated when half of them are new,
                        at most once in an hour

    recommendation_titles   video | title, watches, neighbours (msgpack)
    recommendation_users    user  | state (msgpack), shown (JSON, for reading)
    recommendation_seen     user, video
    recommendation_judged   watches | hits of the model | hits of the popularity list

A batch reads each title and user it meets once and writes it once: many watches of a batch share them. Neighbours and states
are one value each, not a row per pair, because a watch always wants all of them.
"""

from collections.abc import Iterator
from itertools import islice

import msgspec

from trilogue import Db, Retry, Router
from trilogue.apps.video.cowatch import RECENT, TOP, Title, Viewer, Weights, best, learn, want
from trilogue.apps.video.events import RecommendationUpdated, WatchStarted

ANNOUNCE_EVERY_US = 3_600_000_000
PAGE = 200

router = Router()


@router.setup
def tables(db: Db) -> None:
    """The model, and which watches are in it."""
    db.execute("create table if not exists recommendation_handled (watch text primary key) without rowid")
    db.execute(
        "create table if not exists recommendation_titles (video text primary key, title text, watches integer, neighbours blob)"
    )
    db.execute("create index if not exists recommendation_popular on recommendation_titles (watches, video)")
    db.execute("create table if not exists recommendation_users (user text primary key, state blob, shown text)")
    db.execute("create table if not exists recommendation_seen (user text, video text, primary key (user, video)) without rowid")
    db.execute("create table if not exists recommendation_judged (what text primary key, n integer not null) without rowid")


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    for name in ("handled", "titles", "users", "seen", "judged"):
        db.execute(f"delete from recommendation_{name}")


@router.on(group="recommendation", retry=Retry(25, "20ms..1s"), batch=200, start="beginning", reset=reset)
def recommend(watches: list[WatchStarted], db: Db) -> list[RecommendationUpdated]:
    """Judge, learn and recommend, watch by watch."""
    db.executemany("insert into recommendation_handled (watch) values (?)", [(w.session,) for w in watches])
    model = Model(db)
    news = [update for watch in watches if (update := model.watched(watch))]
    model.save()
    return news


class Model:
    """The part of the model that one batch needs: read when first asked for, written by save()."""

    def __init__(self, db: Db) -> None:
        self.db = db
        self.titles = _Titles(db)
        self.viewers: dict[str, Viewer] = {}
        self.seen: dict[str, set[str]] = {}
        self.newly_seen: list[tuple[str, str]] = []
        self.ranking: list[str] = []
        self.walks: dict[str, Iterator[str]] = {}
        self.judged = self.model_hits = self.popularity_hits = 0

    def watched(self, watch: WatchStarted) -> RecommendationUpdated | None:
        """Take in one watch; what to tell the user, if it is new enough."""
        viewer, seen = self._viewer(watch.user), self._seen(watch.user)
        if watch.video not in seen:
            self._judge(watch.user, viewer, seen, watch.video)
            seen.add(watch.video)
            self.newly_seen.append((watch.user, watch.video))
        title = self.titles[watch.video]
        title.title = watch.title
        learn(self.titles, viewer.recent, watch.video)
        viewer.recent = [*viewer.recent, watch.video][-RECENT:]
        viewer.wants = want(viewer.wants, title, seen)
        self._show(watch.user, viewer, seen)
        return self._news(viewer, watch)

    def _judge(self, user: str, viewer: Viewer, seen: set[str], video: str) -> None:
        if not viewer.popular:
            self._show(user, viewer, seen)
        self.judged += 1
        self.model_hits += video in viewer.shown
        self.popularity_hits += video in viewer.popular

    def _show(self, user: str, viewer: Viewer, seen: set[str]) -> None:
        if user not in self.walks:
            self.walks[user] = (video for video in self._ranked() if video not in seen)
            viewer.popular = []
        # What is left of the last list, and then on from where its walk down the ranking stopped.
        left = [video for video in viewer.popular if video not in seen]
        viewer.popular = left + list(islice(self.walks[user], TOP - len(left)))
        viewer.shown = best(viewer.wants, viewer.popular)

    def _news(self, viewer: Viewer, watch: WatchStarted) -> RecommendationUpdated | None:
        if not viewer.shown or watch.watched_us - viewer.announced_us < ANNOUNCE_EVERY_US:
            return None
        if viewer.announced and len(set(viewer.shown).difference(viewer.announced)) < TOP // 2:
            return None
        viewer.announced, viewer.announced_us = viewer.shown, watch.watched_us
        return RecommendationUpdated(watch.user, tuple(map(self.titles.name, viewer.shown)), watch.watched_at)

    def _viewer(self, user: str) -> Viewer:
        if user not in self.viewers:
            rows = self.db.execute("select state from recommendation_users where user = ?", (user,))
            self.viewers[user] = msgspec.msgpack.decode(rows[0][0], type=Viewer) if rows else Viewer()
        return self.viewers[user]

    def _seen(self, user: str) -> set[str]:
        if user not in self.seen:
            rows = self.db.execute("select video from recommendation_seen where user = ?", (user,))
            self.seen[user] = {video for (video,) in rows}
        return self.seen[user]

    def _ranked(self) -> Iterator[str]:
        """Titles by watches, as they were when the batch began."""
        place = 0
        while place < len(self.ranking) or self._next_page():
            yield self.ranking[place]
            place += 1

    def _next_page(self) -> bool:
        page = self.db.execute(
            "select video from recommendation_titles order by watches desc, video desc limit ? offset ?",
            (PAGE, len(self.ranking)),
        )
        self.ranking += [video for (video,) in page]
        return bool(page)

    def save(self) -> None:
        """Write what the batch has changed."""
        self.titles.save()
        self.db.executemany("insert into recommendation_seen values (?, ?)", self.newly_seen)
        self.db.executemany(
            "insert or replace into recommendation_users values (?, ?, ?)",
            [(user, msgspec.msgpack.encode(v), msgspec.json.encode(v.shown).decode()) for user, v in self.viewers.items()],
        )
        self.db.executemany(
            "insert into recommendation_judged values (?, ?) on conflict do update set n = n + excluded.n",
            [("watches", self.judged), ("model", self.model_hits), ("popularity", self.popularity_hits)],
        )


class _Titles(dict[str, Title]):
    """Titles by video, read from the table when first asked for."""

    def __init__(self, db: Db) -> None:
        super().__init__()
        self.db = db

    def __missing__(self, video: str) -> Title:
        title = Title()
        for name, watches, neighbours in self.db.execute(
            "select title, watches, neighbours from recommendation_titles where video = ?", (video,)
        ):
            title = Title(name, watches, msgspec.msgpack.decode(neighbours, type=Weights))
        self[video] = title
        return title

    def name(self, video: str) -> str:
        """A title's name, without reading its neighbours."""
        if video in self:
            return self[video].title
        rows = self.db.execute("select title from recommendation_titles where video = ?", (video,))
        return rows[0][0] if rows else video

    def save(self) -> None:
        self.db.executemany(
            "insert into recommendation_titles values (?, ?, ?, ?) on conflict do update "
            "set title = excluded.title, watches = excluded.watches, neighbours = excluded.neighbours",
            [(video, t.title, t.watches, msgspec.msgpack.encode(t.neighbours)) for video, t in self.items()],
        )
