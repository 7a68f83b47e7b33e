"""Each service's handler, called directly with a database in memory."""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import apsw
import psycopg
import pytest
from services import postgresql_database

from trilogue.apps.video import analytics, badge, notification, ranking, recommendation, user
from trilogue.apps.video.cowatch import NEIGHBOURS, TOP, WANTS, Title, best, learn, want
from trilogue.apps.video.events import RecommendationUpdated, WatchStarted, as_us, session_id
from trilogue.apps.video.platform import SERVICES

MONDAY = datetime(2026, 1, 5, 12, tzinfo=UTC)


class PostgresDb:
    """What a handler sees as `db`, in a transaction of PostgreSQL."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url)

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        cursor = self.connection.execute(sql.replace("?", "%s"), values)
        return cursor.fetchall() if cursor.description else []

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            self.connection.cursor().executemany(sql.replace("?", "%s"), rows)


class MemoryDb:
    """What a handler sees as `db`, over a connection of its own."""

    def __init__(self) -> None:
        self.connection = apsw.Connection(":memory:")

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, values).fetchall()

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self.connection.executemany(sql, rows)


@pytest.fixture
def db() -> Iterator[MemoryDb]:
    db = MemoryDb()
    for router in SERVICES.values():
        for create in router.setups:
            create(db)
    yield db
    db.connection.close()


def watch(
    who: str = "ana", video: str = "v1", minutes: float = 0, genres: tuple[str, ...] = ("Drama",), title: str = ""
) -> WatchStarted:
    at = MONDAY + timedelta(minutes=minutes)
    return WatchStarted(who, video, title or video.upper(), genres, session_id(who, video, as_us(at)), at)


@pytest.mark.parametrize("name", SERVICES)
def test_a_watch_that_comes_again_counts_once_and_reset_forgets(db: MemoryDb, name: str) -> None:
    [(handler, _, options)] = SERVICES[name].handlers
    handler([watch()], db)
    before = counted(db, name)
    handler([watch(), watch()], db)
    assert db.execute(f"select watch from {name}_repeated") == [(watch().session,)] * 2
    assert {**counted(db, name), f"{name}_repeated": []} == before
    options["reset"](db)
    handler([watch()], db)
    assert counted(db, name) == before


@pytest.mark.parametrize("name", SERVICES)
def test_one_batch_and_many_give_the_same(db: MemoryDb, name: str) -> None:
    [(handler, _, _)] = SERVICES[name].handlers
    watches = [watch(f"u{n % 3}", f"v{n * n % 7}", n * 10, ("A", "B")[: n % 3]) for n in range(60)]
    other = MemoryDb()
    for create in SERVICES[name].setups:
        create(other)
    handler(watches[:], db)
    for each in watches:
        handler([each], other)
    assert counted(db, name) == counted(other, name)
    other.connection.close()


# What was shown, judged or told depends on what a batch has met of the others; what is counted does not.
NOT_COUNTED = {"notification_sent", "notification_rate", "notification_totals", "recommendation_judged", "recommendation_users"}


def counted(db: MemoryDb, name: str) -> dict[str, list[tuple[Any, ...]]]:
    tables = db.execute("select name from sqlite_schema where type = 'table' and name glob ?", (f"{name}_*",))
    counts = [table for (table,) in tables if table not in NOT_COUNTED and not table.endswith("_turn")]
    return {table: sorted(map(rounded, db.execute(f"select * from {table}"))) for table in counts}


def rounded(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(round(value, 6) if isinstance(value, float) else value for value in row)


@pytest.mark.parametrize("name", ["ranking", "recommendation"])
def test_two_workers_on_a_server_do_not_write_over_each_other(name: str) -> None:
    [(handler, _, _)] = SERVICES[name].handlers
    with postgresql_database() as url, ThreadPoolExecutor(1) as second_worker:
        first, second, look = PostgresDb(url), PostgresDb(url), PostgresDb(url)
        look.connection.autocommit = True
        for create in SERVICES[name].setups:
            create(look)
        handler([watch("ana")], first)
        other = second_worker.submit(handler, [watch("bo")], second)
        waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        while look.execute(waiting) == [(0,)] and not other.done():
            time.sleep(0.005)
        first.connection.commit()
        other.result(30)
        second.connection.commit()
        assert look.execute(f"select watches from {name}_titles where video = 'v1'") == [(2,)]
        for db in (first, second, look):
            db.connection.close()


def test_taste_fades_by_half_in_thirty_days(db: MemoryDb) -> None:
    user.update_taste([watch(genres=("Drama", "Crime")), watch(video="v2", minutes=30 * 24 * 60, genres=("Drama",))], db)
    assert user.load(db, {"ana"})["ana"][0] == {"Drama": 1.5, "Crime": 0.5}


def test_analytics_counts_titles_hours_and_genres(db: MemoryDb) -> None:
    analytics.count([watch(), watch("bo"), watch("bo", "v2", 60, ("Crime", "Drama"))], db)
    assert dict(db.execute("select * from analytics_titles")) == {"V1": 2, "V2": 1}
    assert dict(db.execute("select * from analytics_genres")) == {"Drama": 3, "Crime": 1}
    assert sorted(n for _, n in db.execute("select * from analytics_hours")) == [1, 2]


def test_badges(db: MemoryDb) -> None:
    badge.award([watch(video=f"v{n}", minutes=n, genres=(f"g{n}",)) for n in range(5)], db)
    won = {name for (name,) in db.execute("select badge from badge_won where user = 'ana'")}
    assert won == {"first film", "five in a day", "five genres"}


def test_the_same_film_again_earns_nothing(db: MemoryDb) -> None:
    badge.award([watch(minutes=n) for n in range(10)], db)
    assert db.execute("select badge from badge_won") == [("first film",)]


def test_ten_fifty_hundred_films(db: MemoryDb) -> None:
    for n in range(100):
        badge.award([watch(video=f"v{n}", minutes=n * 24 * 60)], db)
    assert [name for (name,) in db.execute("select badge from badge_won order by at_us")] == [
        "first film",
        "10 films",
        "50 films",
        "100 films",
    ]


def test_ranking_trends_and_all_time(db: MemoryDb) -> None:
    old = [watch(f"u{n}", "old", n) for n in range(5)]
    new = [watch(f"u{n}", "new", 30 * 24 * 60 + n) for n in range(2)]
    ranking.rank([*new, *old], db)
    assert db.execute("select video from ranking_titles order by watches desc") == [("old",), ("new",)]
    assert db.execute("select video from ranking_titles order by heat desc") == [("new",), ("old",)]


def test_heat_is_the_sum_of_faded_watches() -> None:
    assert ranking.log2_sum(ranking.log2_sum(float("-inf"), 3), 5) == pytest.approx(math.log2(2**3 + 2**5))
    assert ranking.log2_sum(10_000, 10_000) == 10_001  # 2^10000 is beyond a float


def test_friends_are_told_three_times_an_hour(db: MemoryDb) -> None:
    people = [f"u{n}" for n in range(9)]
    notification.notify([watch(who, minutes=-60) for who in people], db)
    friends = notification.friends_of(db, "u0")
    assert len(friends) == 4
    assert all("u0" in notification.friends_of(db, friend) for friend in friends)
    db.execute("delete from notification_sent")
    notification.notify([watch("u0", f"v{n}", n) for n in range(5)], db)
    sent = db.execute("select user, text from notification_sent where user = ?", (friends[0],))
    assert sent == [(friends[0], f"u0 started watching V{n}") for n in range(3)]
    assert dict(db.execute("select * from notification_totals"))["held back"] >= 2 * len(friends)


def test_users_are_told_of_recommendations_once(db: MemoryDb) -> None:
    news = RecommendationUpdated("ana", ("A", "B", "C", "D"), MONDAY)
    notification.notify([news, news], db)
    notification.notify([news], db)
    assert db.execute("select user, text from notification_sent") == [("ana", "new recommendations: A, B, C")]


def test_recommendations_come_from_those_who_watched_the_same(db: MemoryDb) -> None:
    fans = [watch(f"u{n}", video, 10 * n + m) for n in range(4) for m, video in enumerate(("alien", "aliens", "predator"))]
    others = [watch(f"w{n}", video, 10 * n + m) for n in range(9) for m, video in enumerate(("heat", "ronin"))]
    recommendation.recommend(sorted(fans + others, key=lambda w: w.watched_at), db)
    [news] = recommendation.recommend([watch("ana", "alien", 500)], db)
    assert news.user == "ana"
    assert set(news.titles[:2]) == {"ALIENS", "PREDATOR"}
    assert set(news.titles[2:]) == {"HEAT", "RONIN"}


def test_the_model_is_judged_by_what_it_had_shown_before(db: MemoryDb) -> None:
    recommendation.recommend([watch("u1", "a"), watch("u1", "b", 1), watch("u2", "a", 2)], db)
    before = dict(db.execute("select * from recommendation_judged"))
    recommendation.recommend([watch("u2", "b", 3), watch("u2", "never seen", 4), watch("u2", "b", 5)], db)
    after = dict(db.execute("select * from recommendation_judged"))
    assert {what: after[what] - before[what] for what in after} == {"watches": 2, "model": 1, "popularity": 1}


def test_what_a_user_has_seen_is_not_recommended(db: MemoryDb) -> None:
    recommendation.recommend([watch(f"u{n % 5}", f"v{n * 3 % 17}", n) for n in range(80)], db)
    shown = db.execute(
        "select count(*) from recommendation_users u join json_each(u.shown) s "
        "join recommendation_seen n on n.user = u.user and n.video = s.value"
    )
    assert shown == [(0,)]


def test_the_model_is_bounded() -> None:
    titles = {f"v{n}": Title() for n in range(1_000)}
    wants: dict[str, float] = {}
    for n in range(1, 1_000):
        learn(titles, ["v0", f"v{n - 1}"], f"v{n}")
        wants = want(wants, titles[f"v{n}"], {f"v{n}"})
    assert max(len(title.neighbours) for title in titles.values()) <= NEIGHBOURS
    assert len(wants) <= WANTS
    assert len(best(wants, [])) == TOP
