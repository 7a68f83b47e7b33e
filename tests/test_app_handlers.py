"""Handlers of every kind: what they read, what they return, what follows from it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

from common import Sent, Watched, Won, all_of, run

from trilogue import (
    App,
    Context,
    Db,
    Envelope,
    Record,
)


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
                    "returned",
                    "listed-1",
                    "listed-2",
                    "yielded-1",
                    "yielded-2",
                    "thread-ctx",
                    "thread-other",
                    "thread-yielded",
                    "ctx-1-1-False",
                    "db-42",
                    "db-ctx",
                    "db-yielded",
                    "raw-1",
                    "batch",
                    "batch-thread",
                    "batch-db",
                    "method-1",
                    "method-2",
                ]
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
