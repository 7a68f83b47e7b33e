"""trilogue.testing.simulated: the app as it is, time as the test says, and what goes wrong on request."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from common import ADD, Sent, Watched, Won, counting, run

from trilogue import (
    App,
    BadOption,
    Context,
    Db,
    DeadLetter,
    Effect,
    Failed,
    Later,
    Reject,
    Retry,
    TimedOut,
    Unavailable,
    Unsupported,
)
from trilogue.events import now_us
from trilogue.testing import World, simulated

HOURLY = Retry(5, "1h")


def seen_by(app: App, **options: Any) -> list[str]:
    """An async handler, group g: the videos it was given."""
    seen: list[str] = []

    @app.on(group="g", **options)
    async def handle(e: Watched) -> Won:
        seen.append(e.video)
        return Won(e.user, e.video)

    return seen


# ── quiet ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_settle_returns_when_everything_is_done_that_follows_from_what_was_published(url: str) -> None:
    app = App(url)
    seen = seen_by(app)

    @app.on(group="mail")
    def mail(e: Won) -> Sent:
        time.sleep(0.02)
        return Sent(e.user)

    async def main() -> None:
        async with simulated(app) as world:
            for n in range(3):
                await world.publish(Watched(f"u{n}", f"v{n}"))
            await world.settle()
            assert sorted(seen) == ["v0", "v1", "v2"]
            assert sorted(e.user for e in await world.published(Sent)) == ["u0", "u1", "u2"]
            assert len(await world.published()) == 9

    run(main())


def test_settle_waits_for_a_handler_that_is_still_running(url: str) -> None:
    app = App(url)
    ended: list[str] = []

    @app.on(group="g")
    async def slow(e: Watched) -> None:
        for _ in range(50):
            await asyncio.sleep(0.001)
        ended.append(e.video)

    async def main() -> None:
        async with simulated(app) as world:
            await world.publish(Watched("u1"))
            await world.settle()
            assert ended == ["v"]

    run(main())


def test_settle_gives_up_and_names_who_still_has_work(url: str) -> None:
    app = App(url)

    @app.on(group="stuck")
    async def never(e: Watched) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with simulated(app) as world:
            await world.publish(Watched("u1"))
            with pytest.raises(TimedOut, match=r"after 50ms .* in groups stuck; in the hands of handlers: \{'stuck': 1\}"):
                await world.settle(within="50ms")

    run(main())


def test_a_paused_group_and_a_parked_key_have_nothing_to_do(url: str) -> None:
    app = App(url)
    seen = seen_by(app, retry=Retry(1), on_dead="park")

    async def main() -> None:
        async with simulated(app) as world:
            world.fail("g")
            await world.publish(Watched("u1", "a"))
            await world.publish(Watched("u1", "b"))
            await world.settle()
            assert [letter.parked for letter in await world.dead("g")] == [True]
            for n in range(10):
                await app.store.pause("g")
                await world.settle()
                await world.publish(Watched("u2", str(n)))
                await world.settle()
                assert len(seen) == n
                await app.store.resume("g")
                await world.settle()
                assert len(seen) == n + 1

    run(main())


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_time_stands_still_until_it_is_moved_and_goes_on_afterwards(url: str) -> None:
    app = App(url)
    seen_by(app)

    async def main() -> None:
        before = now_us()
        async with simulated(app) as world:
            now = world.now
            await world.publish(Watched("u1"))
            await world.settle()
            assert world.now == now
            await world.advance("3d")
            assert world.now - now == timedelta(days=3)
        assert before <= now_us() < before + 3_600_000_000

    run(main())


def test_an_hour_of_retries_passes_at_once(url: str) -> None:
    app = App(url)
    attempts: list[int] = []

    @app.on(group="g", retry=Retry(4, "10m..40m"))
    async def handle(e: Watched, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise ValueError("no")

    async def main() -> None:
        async with simulated(app) as world:
            await world.publish(Watched("u1"))
            await world.settle()
            assert attempts == [1]
            held = (await world.held("g"))[0]
            assert (held.event, held.attempt) == (Watched("u1"), 2)
            assert "ValueError: no" in held.error
            assert timedelta(minutes=5) <= held.due - world.now <= timedelta(minutes=10)
            await world.advance("70m")
            assert attempts == [1, 2, 3, 4]
            assert await world.held("g") == []
            letter: DeadLetter = (await world.dead(handle))[0]
            assert (letter.attempts, letter.record.key) == (4, "u1")

    run(main())


def test_what_is_due_happens_in_the_order_of_due_times(url: str) -> None:
    app = App(url)
    order: list[tuple[str, timedelta]] = []
    began: list[Any] = []

    @app.on(group="g", retry=HOURLY)
    async def handle(e: Watched, ctx: Context) -> None:
        order.append((e.video, ctx.record.recorded - began[0]))

    async def main() -> None:
        async with simulated(app) as world:
            began.append(world.now)
            await world.publish(Watched("a", "late"), delay="3h")
            await world.publish(Watched("b", "soon"), delay="1h")
            await world.publish(Watched("c", "at once"))
            assert [timer.due_us - now_us() for timer in await world.timers()] == [3_600_000_000, 3 * 3_600_000_000]
            await world.advance("59m59s")
            assert order == [("at once", timedelta(0))]
            await world.advance("1s")
            assert order[1:] == [("soon", timedelta(hours=1))]
            await world.advance("1d")
            assert order[2:] == [("late", timedelta(hours=3))]
            assert await world.timers() == []

    run(main())


def test_a_record_of_the_key_waits_behind_a_failed_one_and_others_do_not(url: str) -> None:
    app = App(url)
    seen = seen_by(app, retry=HOURLY)

    async def main() -> None:
        async with simulated(app) as world:
            world.fail("g", error=OSError("down"))
            await world.publish(Watched("u1", "a"))
            await world.settle()
            await world.publish(Watched("u1", "b"))
            await world.publish(Watched("u2", "c"))
            await world.settle()
            assert seen == ["c"]
            assert [held.event.video for held in await world.held("g")] == ["a", "b"]
            await world.advance("1h")
            assert seen == ["c", "a", "b"]

    run(main())


def test_later_is_a_wait_of_virtual_time(url: str) -> None:
    app = App(url)
    seen: list[int] = []

    @app.on(group="g")
    async def handle(e: Watched, ctx: Context) -> None:
        seen.append(ctx.attempt)
        if len(seen) < 3:
            raise Later("12h")

    async def main() -> None:
        async with simulated(app) as world:
            await world.publish(Watched("u1"))
            await world.advance("23h")
            assert seen == [1, 1]
            await world.advance("1h")
            assert seen == [1, 1, 1]

    run(main())


def test_a_chain_of_timers_runs_a_whole_year(url: str) -> None:
    app = App(url)
    months: list[int] = []

    @app.on(group="g")
    async def handle(e: Watched) -> None:
        months.append(int(e.video))
        await app.publish(Watched(e.user, str(len(months))), delay="30d")

    async def main() -> None:
        async with simulated(app) as world:
            await world.publish(Watched("u1", "0"), delay="30d")
            await world.advance("365d")
            assert months == list(range(12))

    run(main())


def test_a_batch_that_failed_is_tried_again_when_its_first_record_is_due(url: str) -> None:
    """Each record has a wait of its own; the key must not wait for the longest of them."""
    app = App(url)
    batches: list[list[str]] = []

    @app.on(group="g", retry=HOURLY)
    def handle(es: list[Watched], db: Db) -> None:
        batches.append([e.video for e in es])
        if len(batches) == 1:
            raise ValueError

    async def main() -> None:
        async with simulated(app) as world:
            await app.publish_many([Watched("u1", str(n)) for n in range(12)])
            await world.settle()
            held = await world.held("g")
            assert len(held) == 12
            await world.advance(held[0].due - world.now)
            assert batches[1][0] == "0"
            await world.advance("1h")
            assert [video for batch in batches[1:] for video in batch] == [str(n) for n in range(12)]

    run(main())


def test_a_record_is_tried_again_although_what_follows_of_its_key_is_parked(url: str) -> None:
    app = App(url)
    seen: list[str] = []

    @app.on(group="g", retry=HOURLY, on_dead="park")
    def handle(es: list[Watched], db: Db) -> list[Failed]:
        seen.extend(e.video for e in es)
        return [Failed(0, ValueError()), Failed(1, Reject("never"))] if len(es) == 2 else []

    async def main() -> None:
        async with simulated(app) as world:
            await app.publish_many([Watched("u1", "a"), Watched("u1", "b")])
            await world.settle()
            assert seen == ["a", "b"]
            await world.advance("1h")
            assert seen == ["a", "b", "a"]
            assert [letter.record.position for letter in await world.dead("g")] == [2]

    run(main())


def test_where_nobody_works_timers_do_not_fire(url: str) -> None:
    app = App(url)

    async def main() -> None:
        async with simulated(app) as world:
            await world.publish(Watched("u1"), delay="1h")
            await world.advance("2h")
            assert len(await world.timers()) == 1
            assert await world.published() == []

    run(main())


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def kinds(app: App) -> dict[str, tuple[Callable[..., Any], list[str]]]:
    """One handler of every kind, by group, and the videos each was called with."""
    counting(app)
    calls: dict[str, list[str]] = {name: [] for name in ("async", "gen", "thread", "db", "effect", "batch", "db batch")}

    @app.on(group="async", retry=HOURLY)
    async def a(e: Watched) -> Won:
        calls["async"].append(e.video)
        return Won(e.user, "async")

    @app.on(group="gen", retry=HOURLY)
    async def g(e: Watched) -> AsyncIterator[Won]:
        calls["gen"].append(e.video)
        yield Won(e.user, "gen")

    @app.on(group="thread", retry=HOURLY)
    def t(e: Watched) -> Won:
        calls["thread"].append(e.video)
        return Won(e.user, "thread")

    @app.on(group="db", retry=HOURLY)
    def d(e: Watched, db: Db) -> Won:
        calls["db"].append(e.video)
        db.execute(ADD, ("db",))
        return Won(e.user, "db")

    @app.on(group="effect", retry=HOURLY)
    async def f(e: Watched) -> list[Any]:
        calls["effect"].append(e.video)
        return [Won(e.user, "effect"), Effect(lambda db: db.execute(ADD, ("effect",)))]

    @app.on(group="batch", retry=HOURLY)
    async def b(es: list[Watched]) -> list[Won]:
        calls["batch"] += [e.video for e in es]
        return [Won(e.user, "batch") for e in es]

    @app.on(group="db batch", retry=HOURLY)
    def x(es: list[Watched], db: Db) -> list[Won]:
        calls["db batch"] += [e.video for e in es]
        db.executemany(ADD, [("db batch",) for _ in es])
        return [Won(e.user, "db batch") for e in es]

    functions = {"async": a, "gen": g, "thread": t, "db": d, "effect": f, "batch": b, "db batch": x}
    return {name: (functions[name], calls[name]) for name in calls}


KINDS = ["async", "gen", "thread", "db", "effect", "batch", "db batch"]
WITH_DB = {"db", "effect", "db batch"}


async def once_each(world: World, app: App, kind: str) -> None:
    """Whatever happened on the way: one badge on the log, one effect in the database, nothing held or dead."""
    assert [won for won in await world.published(Won) if won.badge == kind] == [Won("u1", kind)]
    if kind in WITH_DB:
        assert await app.db("select n from counts where name = ?", (kind,)) == [(1,)]
    assert await world.held(kind) == []
    assert await world.dead(kind) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_fails_as_often_as_it_is_told_and_then_works(url: str, kind: str) -> None:
    app = App(url)
    handler, calls = kinds(app)[kind]

    async def main() -> None:
        async with simulated(app) as world:
            world.fail(handler, times=3, error=OSError("down"))
            await world.publish(Watched("u1", "a"))
            await world.settle()
            assert calls == []
            assert [(held.attempt, "OSError: down" in held.error) for held in await world.held(kind)] == [(2, True)]
            await world.advance("3h")
            assert calls == ["a"]
            await once_each(world, app, kind)

    run(main())


def test_a_handler_made_to_fail_for_good_ends_as_a_dead_letter(url: str) -> None:
    app = App(url)
    seen = seen_by(app, retry=Retry(2, "1h"))

    async def main() -> None:
        async with simulated(app) as world:
            world.fail("g", times=2, error=ValueError)
            await world.publish(Watched("u1", "a"))
            await world.advance("1h")
            assert [letter.error for letter in await world.dead("g")] == ["ValueError: "]
            assert seen == []
            await app.store.redrive("g")
            await world.settle()
            assert seen == ["a"]

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_duplicate_is_the_same_work_twice_and_one_outcome(url: str, kind: str) -> None:
    app = App(url)
    handler, calls = kinds(app)[kind]

    async def main() -> None:
        async with simulated(app) as world:
            await world.duplicate(handler)
            await world.publish(Watched("u1", "a"))
            await world.settle()
            assert calls == ["a", "a"]
            await once_each(world, app, kind)

    run(main())


@pytest.mark.parametrize("kind", ["async", "gen", "thread", "batch"])
def test_a_record_that_was_finished_can_be_delivered_once_more(url: str, kind: str) -> None:
    app = App(url)
    handler, calls = kinds(app)[kind]

    async def main() -> None:
        async with simulated(app) as world:
            receipt = await world.publish(Watched("u1", "a"))
            await world.publish(Watched("u2", "b"))
            await world.duplicate(handler, receipt)
            await world.settle()
            assert sorted(calls) == ["a", "a", "b"]
            assert len([won for won in await world.published(Won) if won == Won("u1", kind)]) == 1

    run(main())


def test_what_was_settled_with_its_effect_is_never_delivered_again(url: str) -> None:
    app = App(url)
    handler, _ = kinds(app)["db"]

    async def main() -> None:
        async with simulated(app) as world:
            receipt = await world.publish(Watched("u1", "a"))
            with pytest.raises(Unsupported, match="never delivered again"):
                await world.duplicate(handler, receipt)

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_crash_the_work_is_done_again_and_has_one_outcome(url: str, kind: str) -> None:
    app = App(url)
    handler, calls = kinds(app)[kind]

    async def main() -> None:
        async with simulated(app) as world:
            world.crash_after(handler)
            await world.publish(Watched("u1", "a"))
            await world.settle()
            assert calls == ["a", "a"]
            for each in KINDS:
                await once_each(world, app, each)

    run(main())


def test_a_crash_loses_everything_in_flight_charges_nothing_and_goes_on(url: str) -> None:
    app = App(url)
    attempts: list[int] = []
    begun: list[str] = []
    setups: list[int] = []
    hang = True

    @app.setup
    def set_up(db: Db) -> None:
        setups.append(1)

    @app.on(group="waits", retry=HOURLY)
    async def waits(e: Watched, ctx: Context) -> None:
        begun.append(e.video)
        attempts.append(ctx.attempt)
        while hang:
            await asyncio.sleep(0.001)

    @app.on(group="dies")
    async def dies(e: Watched) -> None:
        nonlocal hang
        while not begun:
            await asyncio.sleep(0.001)
        if len(setups) == 2:
            hang = False

    async def main() -> None:
        async with simulated(app) as world:
            world.crash_after(dies)
            await world.publish(Watched("u1", "a"))
            await world.settle()
            assert begun == ["a", "a"]
            assert attempts == [1, 1]  # a dead process charges no attempt
            assert len(setups) == 2
            await world.publish(Watched("u1", "b"))
            await world.settle()
            assert begun == ["a", "a", "b"]

    run(main())


def test_what_a_dead_worker_had_is_taken_over_at_once(url: str) -> None:
    """Without waiting for its lease to pass: its process is gone."""
    app = App(f"{url}?lease_s=3600")
    seen = seen_by(app)

    async def main() -> None:
        async with simulated(app) as world:
            world.crash_after("g")
            await world.publish(Watched("u1", "a"))
            await world.settle(within="10s")
            assert seen == ["a", "a"]

    run(main())


def test_timers_and_held_records_survive_a_crash(url: str) -> None:
    app = App(url)
    seen = seen_by(app, retry=HOURLY)

    async def main() -> None:
        async with simulated(app) as world:
            world.fail("g")
            await world.publish(Watched("u1", "held"))
            await world.publish(Watched("u2", "timed"), delay="2h")
            await world.settle()
            world.crash_after("g")
            await world.publish(Watched("u3", "crash"))
            await world.settle()
            assert seen == ["crash", "crash"]
            await world.advance("2h")
            assert seen == ["crash", "crash", "held", "timed"]

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_lease_is_work_done_again_and_one_outcome(url: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    app = App(url)
    caplog.set_level("INFO", "trilogue")
    handler, calls = kinds(app)[kind]

    async def main() -> None:
        async with simulated(app) as world:
            world.lose_lease(handler)
            await world.publish(Watched("u1", "a"))
            await world.settle()
            # With `db` the lease is lost before the work: nobody else can write while it is done.
            assert calls == (["a"] if kind in ("db", "db batch") else ["a", "a"])
            await once_each(world, app, kind)
        assert f"group {kind}: 1 deliveries went to another worker" in caplog.text

    run(main())


def test_a_worker_that_lost_its_lease_still_runs_while_the_other_has_begun(url: str) -> None:
    app = App(url)
    begun: list[int] = []
    at_once: list[int] = []

    @app.on(group="g")
    async def handle(e: Watched) -> Won:
        begun.append(1)
        mine = len(begun)
        while len(begun) < 2 or (mine == 1 and not at_once):
            await asyncio.sleep(0.001)
        for _ in range(20 if mine == 1 else 0):
            await asyncio.sleep(0.001)
        at_once.append(mine)
        return Won(e.user, str(mine))

    async def main() -> None:
        async with simulated(app) as world:
            world.lose_lease(handle)
            await world.publish(Watched("u1"))
            await world.settle()
            assert at_once == [2, 1]
            assert [won.badge for won in await world.published(Won)] == ["2"]  # what the first one said is refused

    run(main())


def test_faults_happen_in_the_order_they_were_asked_for(url: str) -> None:
    app = App(url)
    seen = seen_by(app, retry=HOURLY)

    async def main() -> None:
        async with simulated(app) as world:
            world.fail("g")
            await world.duplicate("g")
            world.crash_after("g")
            world.lose_lease("g")
            await world.publish(Watched("u1", "a"))
            await world.settle()
            assert seen == []
            await world.advance("1h")
            assert seen == ["a", "a", "a", "a"]
            assert await world.published(Won) == [Won("u1", "a")]

    run(main())


def test_a_world_can_end_in_the_middle_of_a_crash(url: str) -> None:
    app = App(url)
    done = asyncio.Event

    async def main() -> None:
        crashed = done()

        @app.on(group="g")
        async def handle(e: Watched) -> None:
            crashed.set()

        async with simulated(app) as world:
            world.crash_after("g")
            await world.publish(Watched("u1"))
            await crashed.wait()
        async with app:  # it is closed, and can be opened
            pass

    run(main())


def test_what_blocks_the_loop_is_named_although_it_is_surrounded(url: str, caplog: pytest.LogCaptureFixture) -> None:
    app = App(url)
    blocks = True
    seen_by(app)

    @app.on(group="blocks")
    async def handle(e: Watched) -> None:
        while blocks and "blocked" not in caplog.text:
            time.sleep(0.01)

    @app.on(group="other")
    async def other(e: Watched) -> None:
        pass

    async def main() -> None:
        async with simulated(app) as world:
            await world.publish(Watched("u1"))
            await world.settle()
            assert "the handler of group blocks at" in caplog.text

    run(main())


# ── wiring ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_handler_that_is_not_there_is_named_with_those_that_are(url: str) -> None:
    app = App(url)
    seen_by(app)

    async def main() -> None:
        async with simulated(app) as world:
            with pytest.raises(BadOption, match=r"'gg' is no handler of this app: it has the groups g"):
                world.fail("gg")
            with pytest.raises(BadOption, match="is no handler"):
                await world.held(print)

    run(main())


def test_another_log_can_stand_in_for_the_apps_own(tmp_path: Path) -> None:
    app = App(f"sqlite:///{tmp_path}/real.db")
    seen = seen_by(app)
    real = app.store

    async def main() -> None:
        async with simulated(app, "memory://") as world:
            await world.publish(Watched("u1", "a"))
            await world.settle()
        assert seen == ["a"]
        assert app.store is real
        assert list(tmp_path.iterdir()) == []

    run(main())


def test_a_log_that_has_history_begins_where_it_is(file_url: str) -> None:
    app = App(file_url)
    seen_by(app)

    async def main() -> None:
        for n in range(2):
            async with simulated(app) as world:
                await world.publish(Watched("u1", str(n)))
                await world.settle()
                assert await world.published() == [Watched("u1", str(n)), Won("u1", str(n))]

    run(main())


def test_what_the_app_does_not_know_comes_as_its_class_or_as_a_record(url: str) -> None:
    app = App(url)
    seen_by(app)

    async def main() -> None:
        async with simulated(app) as world:
            await world.publish(Sent("u1"))
            assert await world.published(Sent) == [Sent("u1")]
            assert [record.type for record in await world.published()] == ["mail.sent"]

    run(main())


def test_an_app_that_is_open_is_refused(url: str) -> None:
    app = App(url)

    async def main() -> None:
        async with app:
            with pytest.raises(Unavailable, match="open already"):
                async with simulated(app):
                    raise AssertionError("not reached")

    run(main())


def test_an_app_that_cannot_start_says_why_and_the_clock_goes_on(url: str) -> None:
    app = App(url)

    @app.setup
    def broken(db: Db) -> None:
        raise KeyError("no table")

    async def main() -> None:
        with pytest.raises(KeyError, match="no table"):
            async with simulated(app):
                raise AssertionError("not reached")
        before = now_us()
        await asyncio.sleep(0.002)
        assert now_us() > before

    run(main())


def test_an_error_of_the_test_comes_out_and_everything_is_put_back(url: str) -> None:
    app = App(url)
    seen_by(app)
    real = app.store

    async def main() -> None:
        async def fails() -> None:
            async with simulated(app) as world:
                await world.publish(Watched("u1"))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fails()
        assert app.store is real
        async with app.running():  # and can be used again
            pass

    run(main())


def test_after_its_block_a_world_is_over(url: str) -> None:
    app = App(url)
    seen_by(app)

    async def main() -> None:
        async with simulated(app) as world:
            pass
        with pytest.raises(Unavailable, match="this world is over"):
            await world.settle()

    run(main())


# ── on a broker ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("store", ["sqlite:///x.db", None])
@pytest.mark.parametrize("broker", ["amqp://127.0.0.1:1", "kafka://127.0.0.1:1"])
def test_an_app_on_a_broker_is_tested_without_one(broker: str, store: str | None) -> None:
    app = App(broker, store=store)
    seen = seen_by(app, order=None, retry=HOURLY)
    real = app.store

    async def main() -> None:
        async with simulated(app) as world:
            world.fail("g")
            await world.publish(Watched("u1", "v1"))
            await world.settle()
            assert (seen, len(await world.held("g"))) == ([], 1)
            await world.advance("1h")
            assert (seen, await world.published(Won)) == (["v1"], [Won("u1", "v1")])
        assert app.store is real
        with pytest.raises(BadOption, match="keeps its own time"):
            async with simulated(app, broker):
                pass

    run(main())


def test_an_app_on_postgresql_is_tested_there_or_in_memory(postgresql_url: str) -> None:
    app = App(postgresql_url)
    seen = seen_by(app, retry=HOURLY)

    async def main() -> None:
        for url in (None, "memory://"):
            async with simulated(app, url) as world:
                world.fail("g")
                await world.publish(Watched("u1", "v1"))
                await world.settle()
                assert seen == []
                world.crash_after("g")
                await world.advance("1h")
                assert seen == ["v1", "v1"]
                seen.clear()

    run(main())
