"""The App end to end: what is published reaches handlers, and what they answer comes true. On memory and on a file."""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from trilogue import (
    App,
    BadOption,
    BadPattern,
    Conflict,
    Context,
    Db,
    DecodeError,
    Effect,
    Envelope,
    Failed,
    HandlerFailed,
    Later,
    OrphanedGroup,
    Record,
    Reject,
    Rejected,
    Retry,
    Router,
    SeekTo,
    TimedOut,
    Unavailable,
    UnknownEvent,
    derived_id,
    event,
)


@event("video.watched", key="user")
@dataclass(frozen=True, slots=True)
class Watched:
    user: str
    video: str = "v"


@event("badge.won", key="user")
@dataclass(frozen=True)
class Won:
    user: str
    badge: str


@event("mail.sent", key="user")
@dataclass(frozen=True)
class Sent:
    user: str


QUICK = Retry(3, "1ms")


@pytest.fixture(params=["memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/app.db"


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/app.db"


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


async def all_of(app: App, **query: Any) -> list[Record]:
    return [record async for record in app.history(**query)]


# ── publishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_publish_and_read_back(url: str) -> None:
    async def main() -> None:
        app = App(url, name="video")
        async with app:
            receipt = await app.publish(Watched("u1"), time=datetime(2020, 1, 2, tzinfo=UTC))
            assert (receipt.position, receipt.due_us) == (1, None)
            assert receipt.durability == ("memory" if url == "memory://" else "os-crash")
            [record] = await all_of(app)
            assert (record.id, record.type, record.key, record.source) == (receipt.id, "video.watched", "u1", "video")
            assert record.time == datetime(2020, 1, 2, tzinfo=UTC)
            assert record.recorded > record.time

    run(main())


def test_the_same_id_again_adds_nothing_and_other_content_is_a_conflict(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            first = await app.publish(Watched("u1"), id="one")
            assert (await app.publish(Watched("u1"), id="one")).position == first.position
            with pytest.raises(Conflict, match="'one' is stored at position 1 .* with other content"):
                await app.publish(Watched("u2"), id="one")
            assert len(await all_of(app)) == 1

    run(main())


def test_publishes_of_one_moment_succeed_and_fail_alone(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            await app.publish(Watched("u0"), id="taken")
            outcomes = await asyncio.gather(
                *(app.publish(Watched(f"u{n}")) for n in range(50)),
                app.publish(Watched("other"), id="taken"),
                app.publish(Watched("u0"), id="taken"),
                app.publish(Watched("x" * 513)),
                app.publish(Watched("u"), id=""),
                app.publish(Watched("u"), id="\ud800"),
                app.publish(Envelope("odd-time", "a.b", b"{}", time_us=2**63)),
                app.publish(Envelope("odd-version", "a.b", b"{}", schema_version=2**63)),
                app.publish(Envelope("odd-key", "a.b", b"{}", key="\ud800")),
                app.publish(Envelope("odd-more", "a.b", b"{}", extensions={"a": object()})),  # type: ignore[dict-item]
                app.publish(Envelope("odd-data", "a.b", "text")),  # type: ignore[arg-type]
                *(app.publish(Watched(f"u{n}")) for n in range(50)),
                return_exceptions=True,
            )
            assert isinstance(outcomes[50], Conflict)
            assert not isinstance(outcomes[51], BaseException)
            assert [type(o).__name__ for o in outcomes[52:60]] == ["Rejected"] * 8
            assert not any(isinstance(o, BaseException) for o in [*outcomes[:50], *outcomes[60:]])
            assert len(await all_of(app)) == 101

    run(main())


def test_publish_many_is_in_order_and_repeatable(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            made = [app.envelope(Watched(f"u{n}"), id=derived_id(n, "w", n), time_us=n) for n in range(2_500)]
            receipts = await app.publish_many(made)
            assert [r.position for r in receipts] == list(range(1, 2_501))
            again = await app.publish_many(made)
            assert [r.position for r in again] == list(range(1, 2_501))
            mixed = await app.publish_many([made[7], Watched("new"), made[8]])
            positions = [r.position for r in mixed]
            assert (positions[0], positions[2]) == (8, 9)
            assert positions[1] is not None
            assert positions[1] > 2_500
            assert len(await all_of(app)) == 2_501
            assert await app.publish_many([]) == []

    run(main())


def test_publish_many_stores_a_thousand_whole_or_not_at_all(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            await app.publish(Watched("u"), id="taken")
            events = [Watched(f"u{n}") for n in range(1_100)]
            bad = app.envelope(Watched("other"), id="taken")
            with pytest.raises(Conflict):
                await app.publish_many([*events, bad])
            assert len(await all_of(app)) == 1_001

    run(main())


def test_limits_are_refused_with_the_mend(tmp_path: Path) -> None:
    async def main() -> None:
        app = App(f"sqlite:///{tmp_path}/a.db?payload_bytes=100")
        async with app:
            with pytest.raises(Rejected, match=r"has 1\d\d bytes, the limit is 100: store the content elsewhere .*payload_bytes="):
                await app.publish(Watched("u", "v" * 100))
            with pytest.raises(Rejected, match="has 1"):
                await app.publish(Watched("u", "v" * 100), delay="1h")
            with pytest.raises(Rejected, match="key of event 'a.b' has 513 characters, the limit is 512"):
                await app.publish(Envelope("i", "a.b", b"{}", key="k" * 513))
            with pytest.raises(Rejected, match="id has 1 to 255 characters, .* has 256"):
                await app.publish(Watched("u"), id="i" * 256)
            assert (await app.publish(Watched("u"), id="i" * 255)).position == 1

    run(main())


def test_what_a_handler_emits_has_the_same_limits(tmp_path: Path) -> None:
    async def main() -> None:
        app = App(f"sqlite:///{tmp_path}/a.db?payload_bytes=100")

        @app.on(group="one", retry=Retry(1))
        async def one(e: Watched) -> Won:
            return Won(e.user, "b" * (200 if e.user == "bad" else 1))

        @app.on(group="db", retry=Retry(1))
        def with_db(e: Watched, db: Db, ctx: Context) -> None:
            ctx.publish(Won("k" * (600 if e.user == "bad" else 1), ""))

        @app.on(group="batch", batch=1, retry=Retry(1))
        def batch(es: list[Watched], db: Db) -> list[Won]:
            return [Won(es[0].user, "b" * (200 if es[0].user == "bad" else 1))]

        async with app.running():
            await app.publish_many([Watched("bad"), Watched("good")])
            await app.wait_idle()
            letters = await app.store.dead(None)
            assert sorted(letter.group for letter in letters) == ["batch", "db", "one"]
            assert {letter.record.key for letter in letters} == {"bad"}
            assert all(letter.error.startswith("Rejected: event 'badge.won' has ") for letter in letters)
            assert len(await all_of(app, types="badge.*")) == 3

    run(main())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"time": datetime(2020, 1, 1)}, "time=2020-01-01 00:00:00 has no time zone: write datetime"),
        ({"at": datetime(2020, 1, 1)}, "at=2020-01-01 00:00:00 has no time zone"),
        ({"delay": "1s", "at": datetime(2020, 1, 1, tzinfo=UTC)}, "delay= and at= say the same thing"),
        ({"delay": "soon"}, "'soon' is not understood"),
        ({"delay": -1}, "out of range"),
        ({"delay": "11y"}, "not understood"),
    ],
)
def test_wrong_times_are_refused(options: dict[str, Any], sentence: str) -> None:
    async def main() -> None:
        app = App("memory://")
        async with app:
            with pytest.raises(BadOption, match=sentence):
                await app.publish(Watched("u"), **options)
            assert await all_of(app) == []

    run(main())


def test_what_is_no_event_is_refused() -> None:
    async def main() -> None:
        app = App("memory://")
        async with app:
            for thing in ({"user": "u"}, None, Watched):
                with pytest.raises(UnknownEvent, match="is not an event: put @event"):
                    await app.publish(thing)

    run(main())


def test_a_closed_app_says_how_it_is_opened(url: str) -> None:
    async def main() -> None:
        app = App(url)
        for call in (app.publish(Watched("u")), app.db("select 1"), app.publish_many([Watched("u")]), all_of(app)):
            with pytest.raises(Unavailable, match=r"is not open: use it inside `async with app:`"):
                await call
        async with app:
            await app.publish(Watched("u"))
        with pytest.raises(Unavailable, match="is not open"):
            await app.publish(Watched("u"))

    run(main())


def test_an_app_is_opened_inside_itself_and_again_later(file_url: str) -> None:
    async def main() -> None:
        app = App(file_url)
        for n in range(3):
            async with app:
                async with app:
                    await app.publish(Watched("u"))
                assert len(await all_of(app)) == n + 1

    run(main())


# ── delayed events ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_delayed_events_enter_when_due_and_can_be_cancelled(url: str) -> None:
    async def main() -> None:
        app, seen = App(url), []

        @app.on(group="g")
        async def handle(e: Watched) -> None:
            seen.append(e.user)

        async with app.running():
            soon = await app.publish(Watched("soon"), delay="20ms")
            past = await app.publish(Watched("past"), at=datetime.now(UTC) - timedelta(days=1))
            never = await app.publish(Watched("never"), delay="30d")
            far = await app.publish(Watched("far"), at=datetime(9999, 1, 1, tzinfo=UTC))
            assert soon.position is None
            assert soon.due_us is not None
            assert await app.cancel(never)
            assert not await app.cancel(never)
            with pytest.raises(BadOption, match="is delayed: it can be waited for once it is on the log"):
                await app.wait_for(soon, "g")
            while len(seen) < 2:
                await asyncio.sleep(0.01)
            assert not await app.cancel(soon)
            assert not await app.cancel(await app.publish(Watched("u")))
            assert sorted(seen[:2]) == ["past", "soon"]
            assert (await app.store.status()).timers == 1
            assert await app.cancel(far)
            [record] = [r for r in await all_of(app) if r.id == soon.id]
            assert app.decode(record) == Watched("soon")
            assert past.id != soon.id

    run(main())


def test_a_delayed_event_with_an_id_is_scheduled_once(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            for _ in range(2):
                await app.publish(Watched("u"), id="reminder", delay="1h")
            assert (await app.store.status()).timers == 1

    run(main())


def test_timers_survive_a_restart(file_url: str) -> None:
    async def main() -> None:
        first = App(file_url)
        async with first:
            await first.publish(Watched("u"), delay="10ms")
        app, seen = App(file_url), asyncio.Event()

        @app.on(group="g", start="beginning")
        async def handle(e: Watched) -> None:
            seen.set()

        async with app.running():
            await seen.wait()

    run(main())


# ── history ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_history_by_everything(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            for n in range(10):
                await app.publish(Watched(f"u{n % 2}"))
                await app.publish(Won(f"u{n % 2}", "b"))
            await app.store.append([app.envelope(Won("s", "1")), app.envelope(Won("s", "2"))], expected=("stream-1", 0))
            everything = await all_of(app)
            assert [r.position for r in everything] == list(range(1, 23))
            assert [r.position for r in await all_of(app, key="u1", types="video.*")] == [3, 7, 11, 15, 19]
            assert {r.type for r in await all_of(app, types="badge.won")} == {"badge.won"}
            assert len(await all_of(app, types=["badge.*", "video.#"])) == 22
            assert await all_of(app, types=[]) == []
            assert await all_of(app, types="nothing.of.that") == []
            assert [(r.stream, r.version) for r in await all_of(app, stream="stream-1")] == [("stream-1", 1), ("stream-1", 2)]
            assert [r.position for r in await all_of(app, after=20)] == [21, 22]
            assert await all_of(app, after=22) == []
            assert [r.position for r in await all_of(app, reverse=True, limit=3)] == [22, 21, 20]
            assert [r.position for r in await all_of(app, reverse=True, after=19)] == [22, 21, 20]
            assert [r.position for r in await all_of(app, limit=3)] == [1, 2, 3]
            assert await all_of(app, limit=0) == []
            middle = everything[10].recorded
            assert all(r.recorded >= middle for r in await all_of(app, since=middle))
            assert all(r.recorded < middle for r in await all_of(app, until=middle))
            assert len(await all_of(app, since=middle)) + len(await all_of(app, until=middle)) == 22
            assert await all_of(app, until=datetime(2000, 1, 1, tzinfo=UTC)) == []
            assert await all_of(app, since=datetime(9999, 1, 1, tzinfo=UTC)) == []

    run(main())


def test_history_goes_over_pages(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilogue.app.HISTORY_PAGE", 7)

    async def main() -> None:
        app = App(url)
        async with app:
            await app.publish_many([Watched(f"u{n % 3}") for n in range(50)])
            assert [r.position for r in await all_of(app)] == list(range(1, 51))
            assert [r.position for r in await all_of(app, reverse=True)] == list(range(50, 0, -1))
            assert [r.position for r in await all_of(app, limit=20)] == list(range(1, 21))
            assert len(await all_of(app, key="u0")) == 17

    run(main())


def test_wrong_histories_are_refused() -> None:
    async def main() -> None:
        app = App("memory://")
        async with app:
            with pytest.raises(BadPattern):
                await all_of(app, types="video.[")
            with pytest.raises(BadPattern):
                await all_of(app, types=["video.*", ""])
            with pytest.raises(BadOption, match="since=.* has no time zone"):
                await all_of(app, since=datetime(2020, 1, 1))

    run(main())


def test_decode_knows_the_classes_of_the_handlers() -> None:
    async def main() -> None:
        app = App("memory://")
        @app.on
        async def handle(e: Watched) -> None: ...

        async with app:
            assert app.decode(app.envelope(Watched("u"))) == Watched("u")
            with pytest.raises(UnknownEvent, match=r"no handler of this app is annotated with a class for 'badge\.won'"):
                app.decode(app.envelope(Won("u", "b")))
            with pytest.raises(DecodeError):
                app.decode(Envelope("i", "video.watched", b"[]"))

    run(main())


# ── handlers of every kind ───────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_handler_is_called_and_its_events_are_published(url: str) -> None:
    """What is returned, yielded, listed or published by ctx, by coroutine, generator, thread and db handlers."""
    app = App(url)

    @app.on(group="returns")
    async def returns(e: Watched) -> Won:
        return Won(e.user, "returned")

    @app.on(group="lists")
    async def lists(e: Watched) -> list[Won | None]:
        return [Won(e.user, "listed-1"), None, Won(e.user, "listed-2")]

    @app.on(group="yields")
    async def yields(e: Watched) -> AsyncIterator[Won]:
        yield Won(e.user, "yielded-1")
        await asyncio.sleep(0)
        yield Won(e.user, "yielded-2")

    @app.on(group="thread")
    def thread(e: Watched, ctx: Context) -> Won:
        ctx.publish(Won(e.user, "thread-ctx"))
        return Won(e.user, "thread-" + ("main" if threading.current_thread() is threading.main_thread() else "other"))

    @app.on(group="thread-yields")
    def thread_yields(e: Watched) -> Iterator[Won]:
        yield Won(e.user, "thread-yielded")

    @app.on(group="ctx")
    async def by_ctx(e: Watched, ctx: Context) -> None:
        ctx.publish(Won(e.user, f"ctx-{ctx.attempt}-{ctx.record.position}-{ctx.replay}"))

    @app.on(group="db")
    def db(e: Watched, db: Db) -> Won:
        return Won(e.user, f"db-{db.execute('select 41 + 1')[0][0]}")

    @app.on(group="db-yields")
    def db_yields(e: Watched, ctx: Context, db: Db) -> Iterator[Won]:
        ctx.publish(Won(e.user, "db-ctx"))
        yield Won(e.user, "db-yielded")

    @app.on("video.*", group="raw")
    async def raw(r: Record) -> Won:
        return Won("u1", f"raw-{r.position}")

    @app.on(group="batch")
    async def batch(es: list[Watched]) -> list[Won]:
        return [Won(e.user, "batch") for e in es]

    @app.on(group="batch-thread")
    def batch_thread(es: list[Watched]) -> Iterator[Won]:
        yield from (Won(e.user, "batch-thread") for e in es)

    @app.on(group="batch-db")
    def batch_db(es: list[Watched], db: Db) -> Iterator[Won]:
        db.execute("select 1")
        yield from (Won(e.user, "batch-db") for e in es)

    @app.on(group="batch-raw", batch=10)
    async def batch_none(es: list[Watched]) -> list[None]:
        return [None for _ in es]

    class Service:
        def __init__(self, mark: str) -> None:
            self.mark = mark

        async def handle(self, e: Watched) -> Won:
            return Won(e.user, self.mark)

    app.on(Service("method-1").handle)
    app.on(group="second")(Service("method-2").handle)

    async def main() -> None:
        async with app.running():
            receipt = await app.publish(Watched("u1"))
            await app.wait_idle()
            won = {app.envelope(Won("u1", "")).type: r async for r in app.history(types="badge.won")}
            assert won["badge.won"].key == "u1"
            records = await all_of(app, types="badge.won")
            badges = [r.data.decode().split('"badge":"')[1][:-2] for r in records]
            assert sorted(badges) == sorted(
                [
                    "returned", "listed-1", "listed-2", "yielded-1", "yielded-2", "thread-ctx", "thread-other", "thread-yielded",
                    "ctx-1-1-False", "db-42", "db-ctx", "db-yielded", "raw-1", "batch", "batch-thread", "batch-db",
                    "method-1", "method-2",
                ]  # fmt: skip
            )
            assert {r.causation_id for r in records} == {receipt.id}
            assert {r.correlation_id for r in records} == {receipt.id}
            assert await app.store.dead(None) == []

    run(main())


def test_causes_flow_through_handlers_and_publish_inside_them(url: str) -> None:
    app = App(url)

    @app.on(group="first")
    async def first(e: Watched) -> Won:
        await app.publish(Sent("direct"))
        return Won(e.user, "b")

    @app.on(group="second")
    def second(e: Won, ctx: Context) -> Sent:
        asyncio.run_coroutine_threadsafe(app.publish(Sent("from-thread")), loop[0]).result()
        return Sent("third")

    loop: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loop.append(asyncio.get_running_loop())
        async with app.running():
            receipt = await app.publish(Watched("u1"))
            await app.wait_idle()
            records = {r.key if r.type == "mail.sent" else r.type: r for r in await all_of(app)}
            won = records["badge.won"]
            assert (won.correlation_id, won.causation_id) == (receipt.id, receipt.id)
            assert (records["direct"].correlation_id, records["direct"].causation_id) == (receipt.id, receipt.id)
            assert (records["third"].correlation_id, records["third"].causation_id) == (receipt.id, won.id)
            assert (records["video.watched"].correlation_id, records["video.watched"].causation_id) == (None, None)

    run(main())


def test_unions_patterns_and_their_intersection(url: str) -> None:
    app, seen = App(url), []

    @app.on(group="union")
    async def union(e: Watched | Won) -> None:
        seen.append(("union", type(e).__name__))

    @app.on("badge.*", group="both")
    async def both(e: Watched | Won) -> None:
        seen.append(("both", type(e).__name__))

    @app.on("#", group="all")
    async def everything(r: Record) -> None:
        seen.append(("all", r.type))

    async def main() -> None:
        async with app.running():
            await app.publish(Watched("u"))
            await app.publish(Won("u", "b"))
            await app.publish(Envelope("i", "never.declared", b"\xff not json"))
            await app.wait_idle()

    run(main())
    assert sorted(seen) == [
        ("all", "badge.won"), ("all", "never.declared"), ("all", "video.watched"),
        ("both", "Won"), ("union", "Watched"), ("union", "Won"),
    ]  # fmt: skip


def test_order_per_key_and_many_keys_at_once(url: str) -> None:
    app = App(url)
    seen: dict[str, list[int]] = {}
    at_once, most = 0, 0

    @app.on(group="g", concurrency=8)
    async def handle(e: Watched) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.001)
        at_once -= 1
        seen.setdefault(e.user, []).append(int(e.video))

    async def main() -> None:
        async with app.running():
            await app.publish_many([Watched(f"u{n % 20}", str(n)) for n in range(400)])
            await app.wait_idle()

    run(main())
    assert {user: list(range(int(user[1:]), 400, 20)) for user in seen} == seen
    assert len(seen) == 20
    assert 1 < most <= 8


def test_order_none_runs_one_key_at_once(url: str) -> None:
    app = App(url)
    inside, done = asyncio.Semaphore(0), asyncio.Event()

    @app.on(group="g", order=None, concurrency=4)
    async def handle(e: Watched) -> None:
        inside.release()
        await done.wait()

    async def main() -> None:
        async with app.running():
            await app.publish_many([Watched("u")] * 4)
            for _ in range(4):  # all four of one key are in the handler together
                await inside.acquire()
            done.set()
            await app.wait_idle()

    run(main())


def test_a_new_group_starts_now_or_at_the_beginning(url: str) -> None:
    async def main() -> None:
        app, seen = App(url), []

        @app.on(group="late")
        async def late(e: Watched) -> None:
            seen.append("late " + e.user)

        @app.on(group="early", start="beginning")
        async def early(e: Watched) -> None:
            seen.append("early " + e.user)

        async with app:
            await app.publish(Watched("before"))
            async with app.running():
                await app.publish(Watched("after"))
                await app.wait_idle()
        assert sorted(seen) == ["early after", "early before", "late after"]

    run(main())


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def failing(app: App, error: Callable[[], BaseException], **options: Any) -> list[int]:
    """A handler that always fails; the attempts it was called with."""
    attempts: list[int] = []

    @app.on(group="g", **options)
    async def handle(e: Watched, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise error()

    return attempts


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "retry", "attempts", "text"),
    [
        (lambda: ValueError("no"), QUICK, [1, 2, 3], "ValueError: no"),
        (lambda: ValueError("no"), Retry(3, "1ms", give_up=ValueError), [1], "ValueError: no"),
        (lambda: Reject("not ours"), QUICK, [1], "Reject: not ours"),
        (lambda: DecodeError("bad"), QUICK, [1], "DecodeError: bad"),
        (lambda: Later("whenever"), QUICK, [1, 2, 3], "BadOption: duration 'whenever' is not understood"),
        (lambda: Mute(), QUICK, [1, 2, 3], "Mute: "),
        (lambda: ValueError("file \udcff"), QUICK, [1, 2, 3], r"ValueError: file \udcff"),
        (lambda: ValueError("\x00" + "x" * 10**6), Retry(1), [1], "ValueError: \x00xxx"),
        (lambda: asyncio.CancelledError("a pool closed"), QUICK, [1, 2, 3], "CancelledError: a pool closed"),
        (lambda: BaseExceptionGroup("many", [ValueError("a")]), QUICK, [1, 2, 3], "ExceptionGroup: many"),
        (lambda: TimeoutError(), QUICK, [1, 2, 3], "TimeoutError"),
        (lambda: StopAsyncIteration(), QUICK, [1, 2, 3], "StopAsyncIteration"),
    ],
    ids=lambda value: None,
)
def test_failures_are_retried_then_dead(url: str, error: Any, retry: Retry, attempts: list[int], text: str) -> None:
    async def main() -> None:
        app = App(url)
        called = failing(app, error, retry=retry)
        async with app.running():
            receipt = await app.publish(Watched("u1"))
            await app.wait_idle()
            assert called == attempts
            [letter] = await app.store.dead("g")
            assert letter.error.startswith(text)
            assert (letter.attempts, letter.parked, letter.record.id) == (attempts[-1], False, receipt.id)
            assert letter.record.data == b'{"user":"u1","video":"v"}'
            with pytest.raises(HandlerFailed, match="gave up on position 1"):
                await app.wait_for(receipt, "g")
            await app.publish(Watched("u1"), id="next")
            await app.wait_idle()
            assert len(called) == 2 * len(attempts)  # the key goes on

    run(main())


def test_a_traceback_leads_to_the_handler() -> None:
    async def main() -> None:
        app = App("memory://")
        failing(app, lambda: ValueError("no"), retry=Retry(1))
        async with app.running():
            await app.publish(Watched("u1"))
            await app.wait_idle()
            [letter] = await app.store.dead("g")
            assert "raise error()" in letter.traceback
            assert len(letter.traceback) < 20_001

    run(main())


def test_later_is_not_charged(url: str) -> None:
    async def main() -> None:
        app, attempts = App(url), []

        @app.on(group="g", retry=Retry(2, "1ms"))
        async def handle(e: Watched, ctx: Context) -> None:
            attempts.append(ctx.attempt)
            if len(attempts) < 5:
                raise Later("1ms")

        async with app.running():
            await app.wait_for(await app.publish(Watched("u1")), "g")
            assert attempts == [1] * 5
            assert await app.store.dead("g") == []

    run(main())


def test_a_key_is_retried_in_order_while_others_go_on(url: str) -> None:
    async def main() -> None:
        app, seen = App(url), []

        @app.on(group="g", retry=Retry(50, "1ms"))
        async def handle(e: Watched, ctx: Context) -> None:
            if e.user == "bad" and e.video == "1" and ctx.attempt < 4:
                raise ValueError
            seen.append((e.user, e.video))

        async with app.running():
            await app.publish_many([Watched(user, str(n)) for n in range(1, 4) for user in ("bad", "good")])
            await app.wait_idle()
        assert [video for user, video in seen if user == "bad"] == ["1", "2", "3"]
        assert [video for user, video in seen if user == "good"] == ["1", "2", "3"]
        assert seen.index(("good", "3")) < seen.index(("bad", "1"))

    run(main())


def test_bytes_that_cannot_be_decoded_are_dead_at_once(url: str) -> None:
    async def main() -> None:
        app = App(url)
        called = []

        @app.on(group="one")
        async def one(e: Watched) -> None:
            called.append(e)

        @app.on(group="db")
        def with_db(e: Watched, db: Db) -> None:
            called.append(e)

        @app.on(group="batch")
        async def batch(es: list[Watched]) -> None:
            called.extend(es)

        @app.on(group="batch-db")
        def batch_db(es: list[Watched], db: Db) -> None:
            called.extend(es)

        async with app.running():
            await app.publish_many([Envelope("bad", "video.watched", b"\x00\xff", "u"), Watched("u")])
            await app.wait_idle()
            letters = await app.store.dead(None)
            assert sorted(letter.group for letter in letters) == ["batch", "batch-db", "db", "one"]
            assert {letter.attempts for letter in letters} == {1}
            assert {letter.record.data for letter in letters} == {b"\x00\xff"}
            assert {letter.error.startswith("DecodeError: not a Watched: ") for letter in letters} == {True}
            assert called == [Watched("u")] * 4

    run(main())


def test_what_a_handler_returns_must_be_events(url: str) -> None:
    async def main() -> None:
        app = App(url)

        @app.on(group="one", retry=Retry(1))
        async def one(e: Watched) -> Any:
            return 5

        @app.on(group="db", retry=Retry(1))
        def with_db(e: Watched, db: Db) -> Any:
            db.execute("create table t (a)")
            return {"user": "u"}

        @app.on(group="batch", retry=Retry(1))
        async def batch(es: list[Watched]) -> Any:
            return [Effect(lambda db: None)]

        @app.on(group="batch-index", retry=Retry(1))
        async def batch_index(es: list[Watched]) -> Any:
            return [Failed(7, "no such")]

        async with app.running():
            await app.publish(Watched("u"))
            await app.wait_idle()
            errors = {letter.group: letter.error for letter in await app.store.dead(None)}
            assert "int is not an event" in errors["one"]
            assert "dict is not an event" in errors["db"]
            assert "a handler of a batch returns no Effect: give it a `db` parameter" in errors["batch"]
            assert "names no event of the batch" in errors["batch-index"]
            assert await app.db("select count(*) from sqlite_master where name = 't'") == [(0,)]

    run(main())


def test_a_timeout_is_a_failed_attempt(url: str) -> None:
    async def main() -> None:
        app, ended = App(url), []

        @app.on(group="g", timeout="30ms", retry=Retry(2, "1ms"))
        async def handle(e: Watched) -> None:
            try:
                if e.user == "slow":
                    await asyncio.Event().wait()
            finally:
                ended.append(e.user)

        @app.on(group="batch", timeout="30ms", retry=Retry(2, "1ms"))
        async def batch(es: list[Watched]) -> None:
            if any(e.user == "slow" for e in es):
                await asyncio.Event().wait()

        async with app.running():
            await app.publish_many([Watched("slow"), Watched("quick"), Watched("slow")])
            await app.wait_idle()
            assert sorted(ended) == ["quick", "slow", "slow", "slow", "slow"]
            letters = await app.store.dead("g")
            assert [letter.error for letter in letters] == ["TimeoutError: the handler took longer than its timeout of 30ms"] * 2
            assert sorted(letter.record.key or "" for letter in await app.store.dead("batch")) == ["slow", "slow"]

    run(main())


def test_a_parked_key_waits_until_it_is_decided(url: str) -> None:
    async def main() -> None:
        app, seen = App(url), []
        broken = True

        @app.on(group="g", retry=Retry(1), on_dead="park")
        async def handle(e: Watched) -> None:
            if e.user == "bad" and e.video in ("1", "2") and broken:
                raise ValueError("not yet")
            seen.append((e.user, e.video))

        async with app.running():
            await app.publish_many([Watched(user, str(n)) for n in range(1, 5) for user in ("bad", "good")])
            await app.wait_idle()
            assert seen == [("good", str(n)) for n in range(1, 5)]
            [letter] = await app.store.dead("g")
            assert (letter.parked, letter.record.position) == (True, 1)
            assert await app.store.drop_dead("g", [1]) == 1
            while (await app.store.dead("g"))[:1] == [] or not await app.store.idle(["g"]):
                await app.store.changed(0.01)
            [letter] = await app.store.dead("g")
            assert letter.record.position == 3
            broken = False
            assert await app.store.redrive("g") == 1
            await app.wait_idle()
            assert [video for user, video in seen if user == "bad"] == ["2", "3", "4"]

    run(main())


# ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def counting(app: App, **options: Any) -> None:
    @app.setup
    def tables(db: Db) -> None:
        db.execute("create table if not exists counts (user text primary key, n integer not null)")


ADD = "insert into counts values (?, 1) on conflict do update set n = n + 1"


def test_an_effect_of_a_failing_handler_is_undone(url: str) -> None:
    async def main() -> None:
        app = App(url)
        counting(app)

        @app.on(group="g", retry=QUICK)
        def handle(e: Watched, db: Db, ctx: Context) -> Won:
            db.execute(ADD, (e.user,))
            ctx.publish(Sent(e.user))
            if ctx.attempt < 3 or e.user == "bad":
                raise ValueError("after the write")
            return Won(e.user, "b")

        @app.on(group="other")
        def other(e: Watched, db: Db) -> None:
            db.executemany(ADD, [("other",), ("other",)])

        async with app.running():
            await app.publish_many([Watched(user) for user in ("good", "bad", "good")])
            await app.wait_idle()
            assert await app.db("select user, n from counts order by 1") == [("good", 2), ("other", 6)]
            assert await app.db("select n from counts where user = ?", ("good",)) == [(2,)]
            assert [r.type for r in await all_of(app, types=["badge.*", "mail.*"])].count("badge.won") == 2
            assert len(await all_of(app, types="mail.sent")) == 2
            assert [letter.record.key for letter in await app.store.dead(None)] == ["bad"]

    run(main())


def test_an_effect_returned_by_a_coroutine_or_a_thread(url: str) -> None:
    async def main() -> None:
        app = App(url)
        counting(app)

        @app.on(group="async", retry=QUICK)
        async def compute(e: Watched, ctx: Context) -> tuple[Won, Effect]:
            await asyncio.sleep(0)

            def write(db: Db) -> None:
                db.execute(ADD, (e.user,))
                if ctx.attempt == 1:
                    raise ValueError("in the effect")

            return Won(e.user, "b"), Effect(write)

        @app.on(group="thread")
        def in_thread(e: Watched) -> Effect:
            return Effect(lambda db: db.execute(ADD, ("thread",)))

        @app.on(group="db")
        def in_db(e: Watched, db: Db) -> Effect:
            return Effect(lambda db: db.execute(ADD, ("db",)))

        async with app.running():
            await app.publish_many([Watched("u"), Watched("u")])
            await app.wait_idle()
            assert await app.db("select user, n from counts order by 1") == [("db", 2), ("thread", 2), ("u", 2)]
            assert len(await all_of(app, types="badge.won")) == 2

    run(main())


ENDLESS = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"


def test_endless_sql_is_interrupted_and_hurts_no_other(url: str) -> None:
    async def main() -> None:
        app = App(url)
        counting(app)

        @app.on(group="endless", retry=Retry(1), db_limit="20ms")
        def endless(e: Watched, db: Db) -> None:
            db.execute(ADD, (e.user,))
            if e.user == "bad":
                db.execute(ENDLESS)

        @app.on(group="batch", retry=Retry(1), db_limit="20ms")
        def batch(es: list[Watched], db: Db) -> None:
            db.executemany(ADD, [("batch",) for _ in es])
            if es[0].user == "bad":
                db.execute(ENDLESS)

        @app.on(group="swallows", retry=Retry(1), db_limit="20ms")
        def swallows(e: Watched, db: Db) -> None:
            db.execute(ADD, ("swallows",))
            if e.user == "bad":
                with contextlib.suppress(Exception):
                    db.execute(f"insert into counts select i, 1 from ({ENDLESS.replace('count(*)', 'i')})")

        async with app.running():
            for user in ("bad", "u1", "u2"):
                await app.publish(Watched(user))
                await app.wait_idle()
            counts = dict(await app.db("select user, n from counts"))
            assert counts == {"u1": 1, "u2": 1, "batch": 2, "swallows": 2}
            letters = {letter.group: letter.error for letter in await app.store.dead(None)}
            assert letters.keys() == {"endless", "batch", "swallows"}
            assert "make it cheaper, or raise db_limit=" in letters["endless"]

    run(main())


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("commit", "COMMIT is not allowed here: trilogue owns the transaction"),
        ("/* x */ commit", "COMMIT is not allowed"),
        ("-- x\nrollback", "ROLLBACK is not allowed"),
        (";; savepoint x", "SAVEPOINT is not allowed"),
        ("select 1; begin", "BEGIN is not allowed"),
        ("pragma synchronous = 0", "PRAGMA is not allowed"),
        ("attach ':memory:' as x", "ATTACH is not allowed"),
        ("delete from trilogue_records", "written by trilogue alone"),
        ('delete from "trilogue_records"', "written by trilogue alone"),
        ("with x as (select 1) delete from trilogue_held", "written by trilogue alone"),
        ("drop table [trilogue_held]", "written by trilogue alone"),
    ],
)
def test_sql_that_would_harm_the_transaction_is_refused(sql: str, sentence: str) -> None:
    async def main() -> None:
        app = App("memory://")
        counting(app)

        @app.on(group="g", retry=Retry(1))
        def handle(e: Watched, db: Db) -> None:
            db.execute(ADD, (e.user,))
            db.execute(sql)

        async with app.running():
            await app.publish(Watched("u"))
            await app.wait_idle()
            [letter] = await app.store.dead("g")
            assert sentence in letter.error
            assert await app.db("select * from counts") == []

    run(main())


def test_sql_that_only_looks_harmful_is_done(url: str) -> None:
    async def main() -> None:
        app = App(url)

        @app.setup
        def tables(db: Db) -> None:
            db.execute("create table if not exists notes (text text); -- ; commit")
            db.execute("create table if not exists copies (text text)")
            db.execute(
                "create trigger if not exists copy after insert on notes begin "
                "insert into copies values (new.text); insert into copies values ('; begin'); end"
            )

        @app.on(group="g")
        def handle(e: Watched, db: Db) -> None:
            db.execute("insert into notes values ('it''s; commit; trilogue_records')")
            db.execute("select /* ; rollback */ count(*) from trilogue_records where 1 = ?", (1,))
            db.execute("with x as (select * from trilogue_records) select * from x")

        async with app.running():
            await app.publish(Watched("u"))
            await app.wait_idle()
            assert await app.store.dead(None) == []
            assert await app.db("select text from copies") == [("it's; commit; trilogue_records",), ("; begin",)]

    run(main())


def test_app_db_only_reads(url: str) -> None:
    async def main() -> None:
        app = App(url)
        counting(app)
        async with app:
            assert await app.db("select 1 as one, 'a' as two") == [(1, "a")]
            assert await app.db("-- nothing\nselect n from counts where user = ?", ("u",)) == []
            for sql in ("insert into counts values ('u', 1)", "drop table counts", "delete from counts", "create table x (a)"):
                with pytest.raises(BadOption, match=r"app.db\(\) only reads: write in a handler with a `db` parameter"):
                    await app.db(sql)
            for sql in ("pragma query_only = 0", "begin", "attach ':memory:' as x"):
                with pytest.raises(BadOption, match="is not allowed here"):
                    await app.db(sql)
            assert await app.db("select count(*) from counts") == [(0,)]

    run(main())


# ── setup, routers, replay ───────────────────────────────────────────────────────────────────────────────────────────


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
            assert await app.db("select user, n from counts order by 1") == [("u1", 2), ("u2", 1)]
            assert replays == [False] * 3 + [True] * 3
            assert len(await all_of(app, types="badge.won")) == 3
            await app.publish(Watched("u3"))
            await app.wait_idle()
            assert len(await all_of(app, types="badge.won")) == 4
            with pytest.raises(UnknownEvent):
                await app.replay("nobody", SeekTo(end="beginning"))

    run(main())


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["async", "thread", "db"])
def test_items_of_a_batch_fail_alone(url: str, kind: str) -> None:
    app = App(url)
    sizes: list[int] = []
    done: list[str] = []

    def work(es: list[Watched]) -> list[Failed]:
        sizes.append(len(es))
        failed = [Failed(n if n % 2 else e, ValueError("bad")) for n, e in enumerate(es) if e.user.startswith("bad")]
        done.extend(e.user for e in es if not e.user.startswith("bad"))
        return failed

    if kind == "async":

        @app.on(group="g", batch=10, retry=Retry(2, "1ms"))
        async def handle(es: list[Watched]) -> list[Failed]:
            return work(es)

    elif kind == "thread":

        @app.on(group="g", batch=10, retry=Retry(2, "1ms"))
        def handle_thread(es: list[Watched]) -> list[Failed]:
            return work(es)

    else:

        @app.on(group="g", batch=10, retry=Retry(2, "1ms"))
        def handle_db(es: list[Watched], db: Db) -> list[Failed]:
            return work(es)

    async def main() -> None:
        async with app.running():
            users = [f"bad{n}" if n % 7 == 0 else f"u{n}" for n in range(100)]
            await app.publish_many([Watched(user) for user in users])
            await app.wait_idle()
            assert sorted(done) == sorted(user for user in users if user.startswith("u"))
            letters = await app.store.dead("g")
            assert sorted(letter.record.key or "" for letter in letters) == sorted(u for u in users if u.startswith("bad"))
            assert {(letter.attempts, letter.error) for letter in letters} == {(2, "ValueError: bad")}
            assert max(sizes) == 10
            assert sum(sizes) == 100 + len(letters)

    run(main())


def test_a_batch_that_raises_is_tried_again_one_by_one(url: str) -> None:
    async def main() -> None:
        app, batches = App(url), []

        @app.on(group="g", batch=10, retry=QUICK)
        async def handle(es: list[Watched]) -> None:
            batches.append(len(es))
            if any(e.user == "bad" for e in es):
                raise ValueError("one of them")

        async with app.running():
            await app.publish_many([Watched("bad" if n == 4 else f"u{n}") for n in range(10)])
            await app.wait_idle()
            assert [letter.record.key for letter in await app.store.dead("g")] == ["bad"]
            assert batches[0] == 10
            assert set(batches[1:]) == {1}

    run(main())


def test_a_cancelled_wait_inside_a_batch_ends_no_group(url: str) -> None:
    async def main() -> None:
        app, calls = App(url), 0

        @app.on(group="g", batch=10, retry=QUICK)
        async def handle(es: list[Watched]) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise asyncio.CancelledError

        async with app.running():
            await app.publish(Watched("u"))
            await app.wait_idle(timeout="10s")
            assert calls == 2

    run(main())


def test_failed_takes_a_text_a_verdict_and_the_event_itself(url: str) -> None:
    async def main() -> None:
        app, seen = App(url), []

        @app.on(group="g", batch=10, retry=Retry(2, "1ms"))
        async def handle(es: list[Watched]) -> list[Failed]:
            seen.extend(e.user for e in es)
            laters = [Failed(e, Later("1ms")) for e in es if e.user == "later" and seen.count("later") < 4]
            return [*laters, *(Failed(e, Reject("never")) for e in es if e.user == "reject"), *(
                Failed(e, "a text") for e in es if e.user == "text"
            )]  # fmt: skip

        async with app.running():
            await app.publish_many([Watched(user) for user in ("later", "reject", "text", "fine")])
            await app.wait_idle()
            assert [seen.count(user) for user in ("later", "reject", "text", "fine")] == [4, 1, 2, 1]
            errors = {letter.record.key: letter.error for letter in await app.store.dead("g")}
            assert errors.keys() == {"reject", "text"}
            assert errors["reject"] == "Reject: never"
            assert errors["text"].endswith("a text")

    run(main())


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── starting and stopping ────────────────────────────────────────────────────────────────────────────────────────────


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
        with pytest.raises(OrphanedGroup, match=r"'old' has 1 records waiting and no handler .* group='old' .* groups drop old"):
            async with new.running():
                pytest.fail("started")
        other = App(file_url, name="other")
        async with other.running():
            await other.store.drop_group("old")
        async with new.running():
            await new.wait_idle()

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


def test_a_handler_error_is_logged_once_it_is_dead(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        app = App("memory://")
        failing(app, lambda: ValueError("no"), retry=QUICK)
        async with app.running():
            await app.publish(Watched("u"))
            await app.wait_idle()

    with caplog.at_level(logging.WARNING, "trilogue"):
        run(main())
    assert [r.message for r in caplog.records] == ["group g: position 1 is a dead letter after 3 attempts: ValueError: no"]


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
