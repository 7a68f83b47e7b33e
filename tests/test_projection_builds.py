"""Building a projection anew beside the one that readers see."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from common import QUICK, Sent, Watched, Won, all_of, run

from trilogue import (
    App,
    BadOption,
    Db,
    Failed,
    Group,
    HandlerFailed,
    OrphanedGroup,
    ProjectionStatus,
    SeekTo,
    TrilogueError,
    TwiceNamed,
    UnknownEvent,
    Unsupported,
    audited,
    builds,
    projections,
)

COUNTS = {"counts": "name text primary key, n integer not null"}
ADD_ONE = "insert into {counts} as c values (?, 1) on conflict (name) do update set n = c.n + 1"
BY_TEN = ADD_ONE.replace("(?, 1)", "(?, 10)").replace("n + 1", "n + 10")


Bad = Callable[[str], bool]


def counts_of(app: App, *, version: int = 1, sql: str = ADD_ONE, bad: Bad | None = None, **options: Any) -> None:
    """A projection that counts views, and publishes a badge for each."""

    options = {"tables": COUNTS, "retry": QUICK, **options}

    @app.projection(version=version, name="counts", **options)
    def counts(es: list[Watched], db: Db) -> list[Won]:
        db.executemany(sql, [(e.user,) for e in es])
        if bad is not None and any(bad(e.user) for e in es):
            raise ValueError("cannot fold this")
        return [Won(e.user, "b") for e in es]


def app_with(url: str, **options: Any) -> App:
    app = App(url)
    counts_of(app, **options)
    return app


async def status_of(app: App) -> ProjectionStatus:
    [status] = await app.projections()
    return status


async def until(happens: Callable[[ProjectionStatus], bool], app: App) -> ProjectionStatus:
    while not happens(status := await status_of(app)):
        await asyncio.sleep(0.01)
    return status


async def badges(app: App) -> list[str]:
    return sorted(str(record.key) for record in await all_of(app, types="badge.*"))


async def watched(app: App) -> list[str]:
    return sorted(str(record.key) for record in await all_of(app, types="video.*"))


# ── the first build ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_projection_folds_the_log_from_its_beginning_without_publishing(file_url: str) -> None:
    async def main() -> None:
        async with App(file_url) as before:
            await before.publish_many([Watched(f"u{n % 3}") for n in range(30)])
        app = app_with(file_url)
        async with app.running():
            await app.publish(Watched("later"))
            await app.wait_idle()
            assert await app.db("select sum(n) from counts") == [(31,)]
            assert await badges(app) == ["later"]

    run(main())


def test_until_it_is_live_readers_see_it_grow(file_url: str) -> None:
    async def main() -> None:
        async with App(file_url) as before:
            await before.publish_many([Watched("a"), Watched("bad"), Watched("b")])
        app = app_with(file_url, bad=lambda user: user == "bad")
        async with app:
            assert await app.db("select * from counts") == []
            assert (await status_of(app)).state == "building"
        async with app.running():
            status = await until(lambda s: s.state == "failed", app)
            assert "position 2 (video.watched): ValueError: cannot fold this" in status.error
            assert "trilogue projections skip counts 2 --reason" in status.error
            assert await app.db("select * from counts") == [("a", 1)]
            await app.wait_idle()  # what has failed is not waited for
            receipt = await app.publish(Watched("c"))
            with pytest.raises(HandlerFailed, match="is not live yet"):
                await app.wait_for(receipt, "counts")

    run(main())


def test_a_view_survives_a_restart(file_url: str) -> None:
    async def main() -> None:
        for n in range(1, 4):
            app = app_with(file_url)
            async with app.running():
                await app.publish(Watched("a"))
                await app.wait_idle()
                assert await app.db("select * from counts") == [("a", n)]
        async with App(file_url) as reader:
            assert await reader.db("select * from counts") == [("a", 3)]
            assert (await status_of(reader)).builds[0].build == 1

    run(main())


# ── a newer version ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_newer_version_is_built_and_shown_by_itself(file_url: str) -> None:
    async def main() -> None:
        app = app_with(file_url)
        async with app.running():
            await app.publish_many([Watched(f"u{n % 2}") for n in range(20)])
            await app.wait_idle()
        async with App(file_url) as other:  # what comes while no program runs
            await other.publish(Watched("u0"))
        app = app_with(file_url, version=2, sql=BY_TEN)
        async with app:
            assert await app.db("select sum(n) from counts") == [(20,)]  # opening alone builds nothing
        async with app.running():
            await app.wait_idle()
            assert await app.db("select * from counts order by 1") == [("u0", 110), ("u1", 100)]
            status = await status_of(app)
            assert [(b.build, b.version, b.state) for b in status.builds] == [(1, 1, "old"), (2, 2, "live")]
            assert await badges(app) == await watched(app)
            assert [group.name for group in (await app.store.status()).groups] == ["projection.counts.b2"]

    run(main())


def test_tables_that_change_without_the_version_are_refused(file_url: str) -> None:
    async def main() -> None:
        async with app_with(file_url):
            pass
        for options in ({"tables": {"counts": "name text primary key, n integer"}}, {"indexes": ("counts(n)",)}):
            with pytest.raises(BadOption, match="raise it to version=2"):
                async with app_with(file_url, **options):
                    pass
        async with app_with(file_url, version=2, indexes=("counts(n)",)).running() as app:
            await app.wait_idle()
            assert await app.db("select name from sqlite_master where type = 'index' and name like 'counts%'") == [
                ("counts_b2_i1",)
            ]

    run(main())


def test_an_older_program_waits_and_is_no_orphan(file_url: str) -> None:
    async def main() -> None:
        async with app_with(file_url, version=2).running() as app:
            await app.publish(Watched("a"))
            await app.wait_idle()
        async with app_with(file_url, version=1).running() as old:
            await old.publish(Watched("b"))
            await old.wait_idle()
            assert await old.db("select * from counts") == [("a", 1)]
            assert [build.version for build in (await status_of(old)).builds] == [2]
        with pytest.raises(OrphanedGroup):
            async with App(file_url).running():
                pass
        async with app_with(file_url, version=2).running() as app:
            await app.wait_idle()
            assert await app.db("select count(*) from counts") == [(2,)]

    run(main())


def test_a_table_that_is_gone_in_the_newer_version_is_not_shown_any_more(file_url: str) -> None:
    async def main() -> None:
        async with app_with(file_url, tables={**COUNTS, "extra": "x"}).running() as app:
            await app.wait_idle()
            assert await app.db("select * from extra") == []
        async with app_with(file_url, version=2).running() as app:
            await app.wait_idle()
            with pytest.raises(Exception, match="no such table: extra"):
                await app.db("select * from extra")
            assert await app.drop_old("counts") == [1]
            assert await app.db("select name from sqlite_master where name like '%\\_b1%' escape '\\'") == []

    run(main())


# ── rebuild, compare, switch ─────────────────────────────────────────────────────────────────────────────────────────


def test_rebuilding_while_it_runs_gives_equal_tables_and_publishes_once(url: str) -> None:
    async def main() -> None:
        app = app_with(url)
        async with app.running():
            stop = asyncio.Event()

            async def publish() -> None:
                n = 0
                while not stop.is_set():
                    await app.publish_many([Watched(f"u{(n + i) % 50}") for i in range(20)])
                    n += 20

            publishing = asyncio.create_task(publish())
            for build in (2, 3, 4):
                assert await app.rebuild("counts") == build
                await until(lambda s: s.state == "ready", app)
                assert await app.switch("counts") == build
            stop.set()
            await publishing
            assert await app.rebuild("counts") == 5
            await app.wait_idle()
            [same] = await app.compare("counts")
            assert (same.only_live, same.only_next, same.live, same.next) == (0, 0, 50, 50)
            assert await badges(app) == await watched(app)
            assert [build.state for build in (await status_of(app)).builds] == ["old", "live", "ready"]
            assert await app.db("select count(*) from sqlite_master where name like 'counts_b%' and type = 'table'") == [(3,)]

    run(main())


def test_a_build_never_gets_ahead_of_who_publishes(file_url: str) -> None:
    """While the live one is paused nothing of it is published: a build that folded it would swallow that for good."""

    async def main() -> None:
        app = app_with(file_url)
        async with app.running():
            await app.publish_many([Watched("a"), Watched("b")])
            await app.wait_idle()
            await app.store.pause("projection.counts.b1")
            await asyncio.sleep(0.2)  # workers look a moment later
            await app.publish(Watched("c"))
            await app.rebuild("counts")
            await until(lambda s: s.state == "ready", app)
            await app.switch("counts")
            await app.wait_idle()
            assert await app.db("select count(*) from counts") == [(3,)]
            assert await badges(app) == await watched(app)

    run(main())


def test_comparing_finds_what_differs(url: str) -> None:
    async def main() -> None:
        app = app_with(url)
        async with app.running():
            await app.publish_many([Watched("a"), Watched("b"), Watched("b")])
            await app.wait_idle()
            with pytest.raises(TrilogueError, match="no two builds to compare"):
                await app.compare("counts")
            await app.rebuild("counts")
            await app.wait_idle()
            await app.store.transact(lambda tx: tx.execute("update counts_b2 set n = 7 where name = 'b'"))
            [found] = await app.compare("counts", sample=1)
            assert (found.only_live, found.only_next) == (1, 1)
            assert found.sample == [("live", ("b", 2)), ("next", ("b", 7))]

    run(main())


def test_other_columns_are_compared_where_both_have_them(file_url: str) -> None:
    async def main() -> None:
        async with app_with(file_url).running() as app:
            await app.publish_many([Watched("a"), Watched("b")])
            await app.wait_idle()
        wider = {"counts": "name text primary key, n integer not null, more text default 'x'"}
        sql = ADD_ONE.replace("values", "(name, n) values")
        async with app_with(file_url, version=2, tables=wider, sql=sql, switch="manual").running() as app:
            await app.wait_idle()
            [same] = await app.compare("counts")
            assert (same.only_live, same.only_next, same.next) == (0, 0, 2)
            assert (await status_of(app)).state == "ready"
            assert await app.switch("counts") == 2
            assert await app.db("select * from counts order by 1") == [("a", 1, "x"), ("b", 1, "x")]

    run(main())


def test_readers_see_the_one_or_the_other_and_never_a_gap(url: str) -> None:
    async def main() -> None:
        app = app_with(url)
        async with app.running():
            await app.publish_many([Watched(f"u{n}") for n in range(200)])
            await app.wait_idle()
            seen: list[Any] = []
            stop = asyncio.Event()

            async def read() -> None:
                while not stop.is_set():
                    seen.append(await app.db("select count(*), sum(n) from counts"))
                    await asyncio.sleep(0)

            readers = [asyncio.create_task(read()) for _ in range(4)]
            for _ in range(5):
                await app.rebuild("counts")
                await until(lambda s: s.state == "ready", app)
                await app.switch("counts")
                await app.drop_old("counts")
            stop.set()
            await asyncio.gather(*readers)
            assert len(seen) > 20
            assert all(rows == [(200, 200)] for rows in seen)

    run(main())


def test_what_is_not_ready_is_not_shown(url: str) -> None:
    async def main() -> None:
        app = app_with(url, bad=lambda user: user == "bad")
        async with app.running():
            with pytest.raises(TrilogueError, match="has no other build"):
                await app.switch("counts")
            with pytest.raises(UnknownEvent, match="this app has no projection 'other': it has counts"):
                await app.rebuild("other")
            with pytest.raises(UnknownEvent, match="there is no projection 'other'"):
                await app.switch("other")
            bad = await app.publish(Watched("bad"))
            await app.wait_idle()
            await app.rebuild("counts")
            await until(lambda s: s.state == "failed", app)
            with pytest.raises(TrilogueError, match="is failed, not ready: position 1"):
                await app.switch("counts")
            assert bad.position == 1

    run(main())


def test_parked_records_hold_up_a_switch_unless_it_is_forced(url: str) -> None:
    async def main() -> None:
        is_bad = True
        app = app_with(url, bad=lambda user: is_bad and user == "bad")
        async with app.running():
            await app.publish_many([Watched("a"), Watched("bad")])
            await until(lambda s: "parked" in s.error, app)
            is_bad = False
            await app.rebuild("counts")
            await until(lambda s: s.state == "ready", app)
            with pytest.raises(TrilogueError, match="1 parked records, of which nothing was published"):
                await app.switch("counts")
            await app.switch("counts", force=True)
            await app.wait_idle()
            assert await app.db("select * from counts order by 1") == [("a", 1), ("bad", 1)]
            assert len(await badges(app)) == 1

    run(main())


def test_a_newer_version_waits_for_parked_records_and_says_so(file_url: str) -> None:
    async def main() -> None:
        async with app_with(file_url, bad=lambda user: user == "bad").running() as app:
            await app.publish_many([Watched("a"), Watched("bad")])
            await until(lambda s: "parked" in s.error, app)
        async with app_with(file_url, version=2).running() as app:
            await app.wait_idle()
            status = await status_of(app)
            assert (status.state, "1 parked records" in status.builds[-1].note) == ("ready", True)
            await app.store.drop_dead("projection.counts.b1")
            await app.wait_idle()
            await until(lambda s: s.state == "live", app)

    run(main())


def test_a_trimmed_log_does_not_replace_what_it_can_not_make_again(file_url: str) -> None:
    async def main() -> None:
        async with app_with(file_url).running() as app:
            await app.publish_many([Watched(f"u{n}") for n in range(10)])
            await app.wait_idle()
            await app.trim(keep=4)
        async with app_with(file_url, version=2).running() as app:
            await app.wait_idle()
            status = await until(lambda s: s.state == "ready", app)
            assert "were removed from the log: they are missing here" in status.builds[-1].note
            assert await app.db("select count(*) from counts") == [(10,)]
            await app.switch("counts")
            assert len(await app.db("select * from counts")) < 10

    run(main())


async def on_a_stream(app: App, *events: object) -> None:
    await app.store.append([app.envelope(each, stream="s") for each in events], expected=("s", 0))


def test_records_of_a_stream_that_stay_do_not_make_a_log_whole(file_url: str) -> None:
    async def main() -> None:
        async with app_with(file_url).running() as app:
            await on_a_stream(app, Watched("s"))
            await app.publish_many([Watched(f"u{n}") for n in range(10)])
            await app.wait_idle()
            assert await app.trim(keep=1) == 20
        async with app_with(file_url, version=2).running() as app:
            await app.wait_idle()
            status = await until(lambda s: s.state == "ready", app)
            assert "records up to position 21 were removed from the log: they are missing here" in status.builds[-1].note
            assert await app.db("select count(*) from counts") == [(11,)]
            await app.switch("counts")
            assert await app.db("select * from counts") == [("s", 1)]
        async with app_with(file_url, version=3).running() as app:  # what it can not make again, version 2 has not either
            status = await until(lambda s: s.version == 3 and s.state == "live" and len(s.builds) == 2, app)
            assert [(build.build, build.state) for build in status.builds] == [(2, "old"), (3, "live")]

    run(main())


def test_what_is_removed_before_a_build_has_folded_it_is_missing_there(file_url: str) -> None:
    async def main() -> None:
        async with app_with(file_url).running() as app:
            await on_a_stream(app, Watched("s"))
            await app.publish_many([Watched(f"u{n}") for n in range(10)])
            await app.wait_idle()
        async with app_with(file_url, version=2, bad=lambda user: user == "u3").running() as app:
            await until(lambda s: s.state == "failed", app)
            await app.trim(keep=1, force=True)
        async with app_with(file_url, version=2).running() as app:
            status = await until(lambda s: s.state == "ready", app)
            assert "records up to position 21 were removed" in status.builds[-1].note
            assert await app.db("select count(*) from counts") == [(11,)]
        async with app_with(file_url, version=2).running() as app:
            await app.wait_idle()
            assert (await status_of(app)).state == "ready"

    run(main())


def test_what_is_removed_after_a_build_has_folded_it_is_not_missing(file_url: str) -> None:
    async def main() -> None:
        async with app_with(file_url).running() as app:
            await app.publish_many([Watched(f"u{n}") for n in range(10)])
            await app.wait_idle()
        async with app_with(file_url, version=2, bad=lambda user: user == "u6").running() as app:
            await until(lambda s: s.state == "failed", app)
            assert await app.trim(keep=1) == 6
        async with app_with(file_url, version=2).running() as app:
            await app.wait_idle()
            assert (await status_of(app)).state == "live"
            assert await app.db("select count(*) from counts") == [(10,)]

    run(main())


def test_what_a_build_still_needs_is_not_trimmed(file_url: str) -> None:
    async def main() -> None:
        async with App(file_url) as before:
            await before.publish_many([Watched(f"u{n}") for n in range(10)])
        async with app_with(file_url) as app:
            assert await app.trim(keep=1) == 0
        async with app.running():
            await app.wait_idle()
            assert await app.trim(keep=1) == 9
            assert await app.db("select count(*) from counts") == [(10,)]

    run(main())


# ── readers never see less than before ──


def test_a_build_that_is_behind_is_shown_only_by_force(file_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "BUSY_S", 0.2)

    async def main() -> None:
        async with app_with(file_url).running() as app:
            await app.publish_many([Watched("a")] * 3)
            await app.wait_idle()
            async with app_with(file_url, version=2, switch="manual").running() as newer:
                await until(lambda s: s.state == "ready", newer)
            await app.publish_many([Watched("b")] * 100)
            await app.wait_idle()
            with pytest.raises(
                TrilogueError, match="up to position 6, and readers see up to 206: let the program of version 2 run"
            ):
                await app.switch("counts")
            assert await app.db("select sum(n) from counts") == [(103,)]
            async with app_with(file_url, version=2, switch="manual").running() as newer:
                await newer.wait_idle()
                assert (await status_of(newer)).state == "ready"  # nobody asks any more
            await app.publish(Watched("c"))
            await app.wait_idle()
            assert await app.switch("counts", force=True) == 2
            assert await app.db("select sum(n) from counts") == [(103,)]
        async with app_with(file_url, version=2).running() as app:
            await app.wait_idle()
            assert await app.db("select sum(n) from counts") == [(104,)]
            assert await badges(app) == await watched(app)

    run(main())


def test_a_build_is_not_shown_as_long_as_it_is_behind(file_url: str) -> None:
    async def main() -> None:
        async with app_with(file_url).running() as app:
            await app.publish_many([Watched("a")] * 3)
            await app.wait_idle()
        newer = app_with(file_url, version=2)
        async with newer:
            await newer.store.transact(projections.declare_all(newer.declared, newer.name, work=True))
            assert await newer.store.transact(lambda tx: builds.arrive(tx, "counts", 2, 0)) == "building"
            assert await newer.db("select sum(n) from counts") == [(3,)]

    run(main())


@pytest.mark.parametrize("switch", ["auto", "manual"])
def test_the_last_few_are_folded_with_the_switch(file_url: str, switch: str) -> None:
    """While one publishes on and on: of one key, so that the old build has nothing beyond where it has read everything."""

    async def main() -> None:
        seen, stop = [0], asyncio.Event()
        async with app_with(file_url).running() as app:

            async def publish() -> None:
                while not stop.is_set():
                    await app.publish_many([Watched("a")] * 10)

            async def look() -> None:
                while not stop.is_set():
                    seen.append((await app.db("select coalesce(sum(n), 0) from counts"))[0][0])

            tasks = [asyncio.create_task(publish()), asyncio.create_task(look())]
            await until(lambda s: s.position > 100, app)
            async with app_with(file_url, version=2, switch=switch).running() as newer:
                if switch == "manual":
                    await until(lambda s: s.state == "ready", newer)
                    assert await newer.switch("counts") == 2
                await until(lambda s: s.state == "live" and s.version == 2, newer)
                stop.set()
                await asyncio.gather(*tasks)
                await newer.wait_idle()
                assert seen == sorted(seen)
                count = len(await watched(newer))
                assert await newer.db("select sum(n) from counts") == [(count,)]
                assert len(await badges(newer)) == count

    run(main())


# ── an event that cannot be folded ───────────────────────────────────────────────────────────────────────────────────


def test_a_build_stops_at_a_bad_event_with_all_before_it_folded(url: str) -> None:
    async def main() -> None:
        bad: set[str] = set()
        app = app_with(url, bad=lambda user: user in bad, batch=7)
        async with app.running():
            receipts = await app.publish_many([Watched(f"u{n}") for n in range(20)])
            await app.wait_idle()
            bad.add("u11")
            await app.rebuild("counts")
            status = await until(lambda s: s.state == "failed", app)
            assert (status.position, f"position {receipts[11].position}" in status.error) == (receipts[10].position, True)
            assert await app.db("select count(*) from counts_b2") == [(11,)]
            assert await app.db("select count(*) from counts") == [(20,)]  # readers are not touched

    run(main())


def test_a_batch_that_says_what_failed_stops_a_build_too(url: str) -> None:
    async def main() -> None:
        bad: set[str] = set()
        app = App(url)

        @app.projection(tables=COUNTS)
        def counts(es: list[Watched], db: Db) -> list[Failed]:
            db.executemany(ADD_ONE, [(e.user,) for e in es if e.user not in bad])
            return [Failed(e, "no") for e in es if e.user in bad]

        async with app.running():
            await app.publish_many([Watched(f"u{n}") for n in range(5)])
            await app.wait_idle()
            bad.add("u3")
            await app.rebuild("counts")
            status = await until(lambda s: s.state == "failed", app)
            assert (status.position, "TrilogueError: no" in status.error) == (3, True)

    run(main())


ENDLESS = "with recursive n(i) as (select 1 union all select i + 1 from n) insert into {counts} select i, 1 from n where i < 0"


def test_endless_sql_stops_a_build_and_nothing_else(url: str) -> None:
    async def main() -> None:
        endless: set[str] = set()
        app = App(url)

        @app.projection(tables=COUNTS, db_limit="50ms")
        def counts(e: Watched, db: Db) -> None:
            db.execute(ADD_ONE, (e.user,))
            if e.user in endless:
                db.execute(ENDLESS)

        async with app.running():
            await app.publish_many([Watched("a"), Watched("b"), Watched("c")])
            await app.wait_idle()
            endless.add("b")
            await app.rebuild("counts")
            status = await until(lambda s: s.state == "failed", app)
            assert (status.position, "TimedOut: its SQL took longer" in status.error) == (1, True)
            await app.publish(Watched("d"))
            await app.wait_idle()
            assert await app.db("select count(*) from counts") == [(4,)]

    run(main())


def test_slow_sql_of_a_build_fails_nobody_else(url: str) -> None:
    async def main() -> None:
        is_slow = False
        app = App(url)

        @app.projection(tables=COUNTS, db_limit="50ms")
        def counts(e: Watched, db: Db) -> None:
            db.execute(ENDLESS if is_slow else ADD_ONE, () if is_slow else (e.user,))

        async with app.running():
            await app.publish(Watched("a"))
            await app.wait_idle()
            is_slow = True

            async def publish() -> None:
                while (await status_of(app)).state != "failed":
                    await app.publish(Sent("b"))

            publishing = [asyncio.create_task(publish()) for _ in range(8)]
            await app.rebuild("counts")
            await asyncio.gather(*publishing)

    run(main())


def test_a_handler_that_goes_on_after_its_sql_was_undone_folds_nothing(file_url: str) -> None:
    async def main() -> None:
        def app_that(swallows: bool) -> App:
            app = App(file_url)

            @app.projection(version=1 + swallows, tables=COUNTS, db_limit="50ms")
            def counts(e: Watched, db: Db) -> None:
                if swallows and e.user == "u5":
                    with contextlib.suppress(Exception):
                        db.execute(ENDLESS)
                db.execute(ADD_ONE, (e.user,))

            return app

        async with app_that(swallows=False).running() as app:
            await app.publish_many([Watched(f"u{n}") for n in range(10)])
            await app.wait_idle()
        async with app_that(swallows=True).running() as app:
            status = await until(lambda s: s.state == "failed", app)
            assert (status.position, "let the error of that statement through" in status.error) == (5, True)
            assert await app.db("select name, n from counts_b2 order by 1") == [(f"u{n}", 1) for n in range(5)]
        async with app_with(file_url, version=2).running() as app:
            await app.wait_idle()
            assert await app.db("select name, n from counts order by 1") == [(f"u{n}", 1) for n in range(10)]

    run(main())


def test_a_skipped_event_is_passed_over_in_builds_and_live(url: str) -> None:
    async def main() -> None:
        app = app_with(url, bad=lambda user: user == "bad")
        async with app.running():
            receipts = await app.publish_many([Watched("a"), Watched("bad"), Watched("b")])
            await until(lambda s: "parked" in s.error, app)
            position = receipts[1].position or 0
            await app.rebuild("counts")
            await until(lambda s: s.state == "failed", app)
            with pytest.raises(BadOption, match="wants a reason"):
                await app.skip("counts", position, " ")
            with pytest.raises(UnknownEvent, match="no record at position 999"):
                await app.skip("counts", 999, "x")
            with audited(who="clerk"):
                await app.skip("counts", position, "a test event")
            await until(lambda s: s.state == "ready", app)
            assert await app.store.dead(None) == []
            await app.wait_idle()
            [same] = await app.compare("counts")
            assert (same.only_live, same.only_next, same.next) == (0, 0, 2)
            await app.switch("counts")
            [skipped] = (await status_of(app)).skipped
            assert (skipped.position, skipped.reason, skipped.who) == (position, "a test event", "clerk")

    run(main())


def test_an_event_skipped_before_it_is_handled_is_never_folded(url: str) -> None:
    async def main() -> None:
        app = app_with(url)
        async with app.running():
            await app.pause("counts")
            await asyncio.sleep(0.2)  # workers look a moment later
            receipts = await app.publish_many([Watched("a"), Watched("b"), Watched("a")])
            await app.skip("counts", receipts[0].position or 0, "published twice")
            await app.resume("counts")
            await app.wait_idle()
            assert await app.db("select * from counts order by 1") == [("a", 1), ("b", 1)]
            assert len(await badges(app)) == 2

    run(main())


def test_a_failed_build_is_tried_again_by_the_next_start(file_url: str) -> None:
    async def main() -> None:
        async with App(file_url) as before:
            await before.publish_many([Watched("a"), Watched("bad"), Watched("b")])
        async with app_with(file_url, bad=lambda user: user == "bad").running() as app:
            await until(lambda s: s.state == "failed", app)
        async with app_with(file_url).running() as app:
            await app.wait_idle()
            assert await app.db("select count(*) from counts") == [(3,)]

    run(main())


# ── pause, effects, several ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_paused_projection_folds_nothing_anywhere(url: str) -> None:
    async def main() -> None:
        app = app_with(url)
        async with app.running():
            await app.publish(Watched("a"))
            await app.wait_idle()
            await app.pause("counts")
            await asyncio.sleep(0.2)  # workers look a moment later
            await app.publish(Watched("b"))
            await app.rebuild("counts")
            await asyncio.sleep(0.2)
            status = await status_of(app)
            assert (status.state, status.paused, status.position) == ("paused", True, 0)
            assert await app.db("select * from counts") == [("a", 1)]
            await app.resume("counts")
            await app.wait_idle()
            await until(lambda s: s.state == "ready", app)
            assert await app.db("select count(*) from counts") == [(2,)]

    run(main())


def test_it_is_not_replayed_in_place(url: str) -> None:
    async def main() -> None:
        app = app_with(url)
        async with app.running():
            with pytest.raises(Unsupported, match="trilogue projections rebuild counts"):
                await app.replay("projection.counts.b1", SeekTo(end="beginning"))

    run(main())


def test_pausing_stays_over_a_switch(url: str) -> None:
    async def main() -> None:
        app = app_with(url)
        async with app.running():
            await app.rebuild("counts")
            await until(lambda s: s.state == "ready", app)
            await app.pause("counts")
            await asyncio.sleep(0.2)  # workers look a moment later
            await app.switch("counts")
            await app.publish(Watched("a"))
            await asyncio.sleep(0.1)
            assert await app.db("select * from counts") == []
            await app.resume("counts")
            await app.wait_idle()
            assert await app.db("select * from counts") == [("a", 1)]

    run(main())


def test_tables_and_position_move_in_one_transaction(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transactions of the build that fail at their very end leave no trace, and are done again."""

    async def main() -> None:
        app = app_with(url)
        async with app.running():
            await app.publish_many([Watched(f"u{n % 10}") for n in range(3_000)])
            await app.wait_idle()
            store, failures = app.store, iter([True, False, True, True, False] + [False] * 10_000)
            transact = store.transact

            async def failing(work: Any, **options: Any) -> Any:
                def broken(tx: Any) -> Any:
                    result = work(tx)
                    if options.get("rows", 0) > 1 and next(failures):
                        from trilogue import Unavailable

                        raise Unavailable("the disk is away")
                    return result

                return await transact(broken, **options)

            monkeypatch.setattr(store, "transact", failing)
            with contextlib.suppress(TrilogueError):
                await app.rebuild("counts")
            if (await status_of(app)).state == "live":
                await app.rebuild("counts")
            await until(lambda s: s.state == "ready", app)
            assert await app.db("select sum(n) from counts_b2") == [(3_000,)]
            [same] = await app.compare("counts")
            assert (same.only_live, same.only_next) == (0, 0)

    run(main())


def test_two_programs_build_one(file_url: str) -> None:
    async def main() -> None:
        async with App(file_url) as before:
            await before.publish_many([Watched(f"u{n % 10}") for n in range(20_000)])
        one, other = app_with(file_url), app_with(file_url)
        async with one.running(), other.running():
            await asyncio.gather(one.wait_idle(), other.wait_idle())
            assert await one.db("select sum(n) from counts") == [(20_000,)]
            await one.rebuild("counts")
            await one.publish_many([Watched(f"u{n % 10}") for n in range(100)])
            await asyncio.gather(one.wait_idle(), other.wait_idle())
            await until(lambda s: s.state == "ready", one)
            await other.switch("counts")
            await other.publish(Watched("u1"))
            await asyncio.gather(one.wait_idle(), other.wait_idle())
            assert await one.db("select sum(n) from counts") == [(20_101,)]
            assert len(await badges(one)) == 101

    run(main())


def test_a_worker_that_is_late_makes_no_group(url: str) -> None:
    async def main() -> None:
        async with App(url) as app:
            group = Group("projection.counts.b1", ("video.#",), start="existing")
            await app.store.bind([group])
            await app.publish(Watched("a"))
            assert await app.store.claim(group.name, limit=10, wait_s=0.05) == []
            assert (await app.store.status()).groups == []
            await app.store.unbind(group.name)
            with pytest.raises(UnknownEvent, match="was not bound here"):
                await app.store.claim(group.name, limit=10, wait_s=0.05)

    run(main())


def test_a_group_that_somebody_dropped_is_built_again(file_url: str) -> None:
    async def main() -> None:
        async with app_with(file_url).running() as app:
            await app.publish(Watched("a"))
            await app.wait_idle()
        async with App(file_url) as other:
            await other.store.drop_group("projection.counts.b1")
            await other.publish(Watched("b"))
        async with app_with(file_url).running() as app:
            await app.wait_idle()
            assert await app.db("select count(*) from counts") == [(2,)]

    run(main())


def test_a_handler_may_follow_what_a_projection_publishes(url: str) -> None:
    async def main() -> None:
        app = app_with(url)
        sent: list[str] = []

        @app.on(group="mail", start="beginning")
        async def mail(e: Won) -> Sent:
            sent.append(e.user)
            return Sent(e.user)

        async with app.running():
            await app.publish_many([Watched("a"), Watched("b")])
            await app.wait_idle()
            await app.rebuild("counts")
            await until(lambda s: s.state == "ready", app)
            await app.switch("counts")
            await app.wait_idle()
            assert sorted(sent) == ["a", "b"]

    run(main())


# ── a table belongs to one projection ────────────────────────────────────────────────────────────────────────────────


def named(url: str, name: str, *, app: str = "trilogue", **options: Any) -> App:
    """An app with a projection of this name over the table counts."""
    found = App(url, name=app)

    @found.projection(name=name, **{"tables": COUNTS, **options})
    def fold(e: Watched, db: Db) -> None:
        db.execute(ADD_ONE.replace("counts", next(iter(options.get("tables", COUNTS)))), (e.user,))

    return found


def test_a_table_of_another_projection_is_refused(file_url: str) -> None:
    async def main() -> None:
        async with named(file_url, "counts", app="first").running() as app:
            await app.publish(Watched("a"))
            await app.wait_idle()
            await app.rebuild("counts")
            await until(lambda s: s.state == "ready", app)
            await app.switch("counts")
            await app.drop_old("counts")  # its tables have another number now than those of a new projection
        for other in (named(file_url, "renamed", app="first"), named(file_url, "other", tables={"Counts": "user"})):
            with pytest.raises(TwiceNamed, match=r"'counts' of program 'first' has .* with name='counts', or remove"):
                async with other:
                    pass
        async with App(file_url) as reader:
            assert [each.name for each in await reader.projections()] == ["counts"]
            assert await reader.db("select * from counts") == [("a", 1)]
        async with named(file_url, "other", tables={"others": COUNTS["counts"]}).running() as app:
            await app.wait_idle()
            assert await app.db("select * from others") == [("a", 1)]

    run(main())


def test_a_projection_that_was_renamed_is_forgotten(file_url: str) -> None:
    async def main() -> None:
        async with named(file_url, "counts").running() as app:
            await app.publish(Watched("a"))
            await app.wait_idle()
            await app.rebuild("counts")
            await app.skip("counts", 1, "a test")
            with pytest.raises(TrilogueError, match="is kept up to date by a program that runs: stop it"):
                await projections.forget(app.store, "counts")
        async with App(file_url) as other:
            await projections.forget(other.store, "counts")
            assert await other.db("select name from sqlite_master where name like 'counts%'") == []
            assert (await other.projections(), list((await other.store.status()).groups)) == ([], [])
            assert await other.store.states(builds.skip_owner("counts")) == []
            with pytest.raises(UnknownEvent, match="there is no projection 'counts'"):
                await projections.forget(other.store, "counts")
        async with named(file_url, "renamed").running() as app:
            await app.wait_idle()
            assert await app.db("select * from counts") == [("a", 1)]

    run(main())
