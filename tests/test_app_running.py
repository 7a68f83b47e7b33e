"""Starting, waiting, replaying, stopping."""

import asyncio
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from common import ADD, QUICK, Sent, Watched, Won, all_of, counting, failing, run

from trilogue import (
    App,
    BadOption,
    Context,
    Db,
    OrphanedGroup,
    Record,
    Router,
    SeekTo,
    TimedOut,
    UnknownEvent,
)

# ── setup, routers, replay ──────────────────────────────────────────────────────────────────────────────────────────


def test_setup_runs_at_every_start_in_one_transaction(file_url: str) -> None:
    async def main() -> None:
        app, router = App(file_url), Router()

        @router.setup
        def tables(db: Db) -> None:
            db.execute("create table if not exists starts (at integer)")
            db.execute("insert into starts values (1)")

        @app.setup
        def more(db: Db) -> None:
            if fails:
                db.execute("insert into nowhere values (1)")

        app.include(router)
        for fails, count in ((False, 1), (False, 2), (True, 2), (False, 3)):
            if fails:
                with pytest.raises(Exception, match="nowhere"):
                    async with app:
                        pytest.fail("opened")
            else:
                async with app:
                    assert await app.db("select count(*) from starts") == [(count,)]

    run(main())


def test_services_are_routers(url: str) -> None:
    badges, mails = Router(), Router()

    @badges.on(group="badges")
    async def badge(e: Watched) -> Won:
        return Won(e.user, "first")

    @mails.on("badge.#", group="mails")
    async def mail(e: Won) -> Sent:
        return Sent(e.user)

    async def main() -> None:
        app = App(url)
        app.include(badges, mails)
        async with app.running():
            await app.publish(Watched("u"))
            await app.wait_idle()
            assert [r.type for r in await all_of(app)] == ["video.watched", "badge.won", "mail.sent"]

    run(main())


def test_a_replay_runs_again_and_emits_only_if_asked(url: str) -> None:
    async def main() -> None:
        app, replays = App(url), []
        counting(app)

        @app.on(group="g", reset=lambda db: db.execute("delete from counts"))
        def handle(e: Watched, db: Db, ctx: Context) -> Won:
            replays.append(ctx.replay)
            db.execute(ADD, (e.user,))
            return Won(e.user, "b")

        async with app.running():
            await app.publish_many([Watched("u1"), Watched("u2"), Watched("u1")])
            await app.wait_idle()
            assert await app.replay("g", SeekTo(end="beginning")) == 0
            await app.wait_idle()
            assert await app.db("select name, n from counts order by 1") == [("u1", 2), ("u2", 1)]
            assert replays == [False] * 3 + [True] * 3
            assert len(await all_of(app, types="badge.won")) == 3
            await app.publish(Watched("u3"))
            await app.wait_idle()
            assert len(await all_of(app, types="badge.won")) == 4
            with pytest.raises(UnknownEvent):
                await app.replay("nobody", SeekTo(end="beginning"))

    run(main())


# ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_wait_for_returns_when_the_effect_can_be_read(url: str) -> None:
    async def main() -> None:
        app = App(url)
        counting(app)

        @app.on(group="g")
        def handle(e: Watched, db: Db) -> None:
            db.execute(ADD, (e.user,))

        async with app.running():
            for n in range(1, 30):
                await app.wait_for(await app.publish(Watched("u")), "g")
                assert await app.db("select n from counts") == [(n,)]

    run(main())


def test_wait_for_says_why_it_cannot(url: str) -> None:
    async def main() -> None:
        app = App(url)

        @app.on(group="g")
        async def handle(e: Watched) -> None:
            await asyncio.Event().wait()

        async with app.running(grace="1ms"):
            receipt = await app.publish(Watched("u"))
            with pytest.raises(TimedOut, match="'g' has not finished position 1 within 20ms"):
                await app.wait_for(receipt, "g", timeout="20ms")
            with pytest.raises(TimedOut, match="still have work after 20ms"):
                await app.wait_idle(timeout="20ms")
            with pytest.raises(UnknownEvent, match="nobody"):
                await app.wait_for(receipt, "nobody")
            with pytest.raises(UnknownEvent, match=r"does not read 'badge\.won' \(it reads video\.watched\)"):
                await app.wait_for(await app.publish(Won("u", "b")), "g")

    run(main())


def test_idle_at_once_without_work(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app.running():
            await app.wait_idle(timeout="5s")
        failing(app, lambda: ValueError())
        async with app.running():
            await app.publish(Won("u", "not for g"))
            await app.wait_idle(timeout="5s")

    run(main())


# ── starting and stopping ───────────────────────────────────────────────────────────────────────────────────────────


def test_stopping_finishes_what_has_begun_and_hands_back_the_rest(file_url: str) -> None:
    async def main() -> None:
        app, begun, finished = App(file_url), [], []

        @app.on(group="g", concurrency=2, start="beginning")
        async def handle(e: Watched, ctx: Context) -> None:
            begun.append((e.user, ctx.attempt))
            await asyncio.sleep(0.02)
            finished.append(e.user)

        async with app.running():
            await app.publish_many([Watched(f"u{n}") for n in range(20)])
            while len(begun) < 3:
                await asyncio.sleep(0.001)
        assert len(begun) == len(finished) < 20
        async with app.running():
            await app.wait_idle()
        assert sorted(finished) == sorted(f"u{n}" for n in range(20))
        assert {attempt for _, attempt in begun} == {1}

    run(main())


def test_what_outlasts_the_grace_is_cancelled_and_not_charged(file_url: str) -> None:
    async def main() -> None:
        app, attempts = App(file_url), []
        hang = True

        @app.on(group="g", start="beginning")
        async def handle(e: Watched, ctx: Context) -> None:
            attempts.append(ctx.attempt)
            if hang:
                await asyncio.Event().wait()

        async with app.running(grace="10ms"):
            await app.publish(Watched("u"))
            while not attempts:
                await asyncio.sleep(0.001)
        hang = False
        async with app.running():
            await app.wait_idle()
        assert attempts == [1, 1]

    run(main())


@pytest.mark.parametrize(
    "where", [{}, {"position": 1, "end": "now"}, {"position": 1, "time_us": 1}, {"end": "middle"}, {"end": ""}]
)
def test_a_seek_goes_to_exactly_one_place(where: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=r"expected exactly one of position=|expected 'beginning' or 'now'"):
        SeekTo(**where)


def test_an_orphaned_group_is_refused_with_the_way_out(file_url: str) -> None:
    async def main() -> None:
        old, new = App(file_url), App(file_url)

        @old.on(group="old")
        async def handle(e: Watched) -> None: ...

        @new.on(group="new")
        async def handle_too(e: Watched) -> None: ...

        async with old.running():
            await old.wait_idle()
        async with new.running():  # nothing waits for it yet
            await new.publish(Watched("u"))
            await new.wait_idle()
        with pytest.raises(OrphanedGroup, match=r"'old' has records waiting and no handler .* group='old' .* groups drop old"):
            async with new.running():
                pytest.fail("started")
        other = App(file_url, name="other")
        async with other.running():
            await other.store.drop_group("old")
        async with new.running():
            await new.wait_idle()

    run(main())


def test_the_program_started_last_decides_what_a_group_reads(file_url: str, caplog: pytest.LogCaptureFixture) -> None:
    def program(pattern: str) -> tuple[App, list[str]]:
        app, seen = App(file_url), list[str]()

        @app.on(pattern, group="one", start="beginning")
        async def one(record: Record) -> None:
            seen.append(record.type)

        return app, seen

    async def main() -> None:
        (older, by_older), (newer, by_newer) = program("video.watched"), program("*.*")
        async with older.running():
            await older.publish(Watched("a"))
            await older.wait_idle()
            async with newer.running():
                for n in range(20):
                    await newer.publish_many([Watched(f"u{n}"), Won(f"u{n}", "first")])
                await newer.wait_idle()
        assert by_older == ["video.watched"]
        assert sorted(by_newer) == ["badge.won"] * 20 + ["video.watched"] * 20
        assert [r.getMessage()[:10] for r in caplog.records if "started later" in r.getMessage()] == ["group one:"]
        async with older.running():  # gone back to
            await older.publish(Watched("b"))
            await older.wait_idle()
        assert by_older == ["video.watched"] * 2

    run(main())


def test_wiring_errors_come_before_anything_happens(tmp_path: Path) -> None:
    async def main() -> None:
        app = App(f"sqlite:///{tmp_path}/never.db")

        @app.on
        async def handle(e: str) -> None: ...

        with pytest.raises(UnknownEvent):
            async with app:
                pytest.fail("opened")
        assert os.listdir(tmp_path) == []

    run(main())


def test_a_handler_error_is_said_when_it_begins_and_when_it_is_dead(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        app = App("memory://")
        failing(app, lambda: ValueError("no"), retry=QUICK)
        async with app.running():
            await app.publish(Watched("u"))
            await app.wait_idle()

    with caplog.at_level(logging.WARNING, "trilogue"):
        run(main())
    assert [r.message for r in caplog.records] == [
        "group g: position 1 failed at attempt 1, retrying: ValueError: no",
        "group g: position 1 is a dead letter after 3 attempts: ValueError: no",
    ]


def test_plain_handlers_do_not_hold_up_the_loop(url: str) -> None:
    async def main() -> None:
        app, turns = App(url), 0
        free = threading.Event()

        @app.on(group="g", concurrency=4)
        def handle(e: Watched) -> None:
            assert free.wait(30)

        async with app.running():
            await app.publish_many([Watched(f"u{n}") for n in range(8)])
            for _ in range(20):
                await asyncio.sleep(0.001)
                turns += 1
            free.set()
            await app.wait_idle()
            assert turns == 20

    run(main())


def test_the_clock_of_a_time_out_is_not_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        app = App("memory://")

        @app.on(group="g")
        async def handle(e: Watched) -> None:
            await asyncio.Event().wait()

        async with app.running(grace="1ms"):
            receipt = await app.publish(Watched("u"))
            real = time.time_ns
            monkeypatch.setattr(time, "time_ns", lambda: real() - 10**15)  # somebody sets the clock back
            with pytest.raises(TimedOut):
                await app.wait_for(receipt, "g", timeout="20ms")

    run(main())
