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

from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec

from trilogue import Db, Retry, Router
from trilogue.apps.video.cowatch import RECENT, TOP, Title, Viewer, Weights, best, learn, want
from trilogue.apps.video.events import RecommendationUpdated, WatchStarted
from trilogue.apps.video.handled import create_handled, create_turn, forget_handled, fresh, rows_of, take_turn

ANNOUNCE_EVERY_US = 3_600_000_000
PAGE = 200

router = Router()


@router.setup
def tables(db: Db) -> None:
    """The model, and which watches are in it."""
    create_handled(db, "recommendation")
    create_turn(db, "recommendation")
    # bytea: a name for bytes that PostgreSQL knows, and of which SQLite thinks nothing bad.
    db.execute(
        "create table if not exists recommendation_titles (video text primary key, title text, watches bigint, neighbours bytea)"
    )
    db.execute("create index if not exists recommendation_popular on recommendation_titles (watches, video)")
    db.execute('create table if not exists recommendation_users ("user" text primary key, state bytea, shown text)')
    db.execute('create table if not exists recommendation_seen ("user" text, video text, primary key ("user", video))')
    db.execute("create table if not exists recommendation_judged (what text primary key, n bigint not null)")


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    forget_handled(db, "recommendation")
    for name in ("titles", "users", "seen", "judged"):
        db.execute(f"delete from recommendation_{name}")


@router.on(group="recommendation", retry=Retry(25, "20ms..1s"), batch=200, db_limit="2s", reset=reset)
def recommend(watches: list[WatchStarted], db: Db) -> list[RecommendationUpdated]:
    """Judge, learn and recommend, watch by watch."""
    take_turn(db, "recommendation")
    watches = fresh(db, "recommendation", watches)
    model = Model(db, watches)
    news = [update for watch in watches if (update := model.watched(watch))]
    model.save()
    return news


class Model:
    """The part of the model that one batch needs: read before it, written by save()."""

    def __init__(self, db: Db, watches: Sequence[WatchStarted]) -> None:
        self.db = db
        users = sorted({watch.user for watch in watches})
        self.viewers = _viewers(db, users)
        self.seen = _seen(db, users)
        recent = {video for viewer in self.viewers.values() for video in viewer.recent}
        self.titles = _titles(db, sorted(recent.union(watch.video for watch in watches)))
        self.newly_seen: list[tuple[str, str]] = []
        self.ranking: list[str] = []
        self.walks: dict[str, Iterator[str]] = {}
        self.judged = self.model_hits = self.popularity_hits = 0

    def watched(self, watch: WatchStarted) -> RecommendationUpdated | None:
        """Take in one watch; what to tell the user, if it is new enough."""
        viewer, seen = self.viewers[watch.user], self.seen[watch.user]
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
        return RecommendationUpdated(watch.user, self._names(viewer.shown), watch.watched_at)

    def _names(self, videos: Sequence[str]) -> tuple[str, ...]:
        """What titles are called, also those the batch has not read."""
        others = [video for video in videos if video not in self.titles]
        names = dict(rows_of(self.db, "select video, title from recommendation_titles where video in", others))
        return tuple(self.titles[video].title if video in self.titles else names.get(video, video) for video in videos)

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
        self.db.executemany(
            "insert into recommendation_titles values (?, ?, ?, ?) on conflict (video) do update "
            "set title = excluded.title, watches = excluded.watches, neighbours = excluded.neighbours",
            [(video, t.title, t.watches, msgspec.msgpack.encode(t.neighbours)) for video, t in self.titles.items()],
        )
        self.db.executemany("insert into recommendation_seen values (?, ?)", self.newly_seen)
        self.db.executemany(
            'insert into recommendation_users values (?, ?, ?) on conflict ("user") do update '
            "set state = excluded.state, shown = excluded.shown",
            [(user, msgspec.msgpack.encode(v), msgspec.json.encode(v.shown).decode()) for user, v in self.viewers.items()],
        )
        self.db.executemany(
            "insert into recommendation_judged values (?, ?) "
            "on conflict (what) do update set n = recommendation_judged.n + excluded.n",
            [("watches", self.judged), ("model", self.model_hits), ("popularity", self.popularity_hits)],
        )


def _viewers(db: Db, users: Sequence[str]) -> dict[str, Viewer]:
    rows = rows_of(db, 'select "user", state from recommendation_users where "user" in', users)
    known = {user: msgspec.msgpack.decode(state, type=Viewer) for user, state in rows}
    return {user: known.get(user) or Viewer() for user in users}


def _seen(db: Db, users: Sequence[str]) -> dict[str, set[str]]:
    seen: dict[str, set[str]] = {user: set() for user in users}
    for user, video in rows_of(db, 'select "user", video from recommendation_seen where "user" in', users):
        seen[user].add(video)
    return seen


def _titles(db: Db, videos: Sequence[str]) -> dict[str, Title]:
    rows = rows_of(db, "select video, title, watches, neighbours from recommendation_titles where video in", videos)
    known = {video: Title(title, n, msgspec.msgpack.decode(neighbours, type=Weights)) for video, title, n, neighbours in rows}
    return {video: known.get(video) or Title() for video in videos}
