"""What fails: retries, dead letters, verdicts, time-outs, parked keys."""

import asyncio
from typing import Any

import pytest
from common import QUICK, Watched, failing, run

from trilogue import (
    App,
    Context,
    Db,
    DecodeError,
    Effect,
    Envelope,
    Failed,
    HandlerFailed,
    Later,
    Reject,
    Retry,
)


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
        (lambda: ValueError("\x00" + "x" * 10**6), Retry(1), [1], "ValueError: \\x00xxx"),
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


def test_a_handler_that_takes_its_time_out_badly_harms_nobody(url: str) -> None:
    """It may swallow it or raise something else; then it is over, and a stop is no time-out."""

    async def main() -> None:
        app, attempts = App(url), []
        hang = True

        @app.on(group="g", timeout="20ms", retry=Retry(2, "1ms"), concurrency=1, start="beginning")
        async def handle(e: Watched, ctx: Context) -> None:
            attempts.append((e.user, ctx.attempt))
            try:
                if e.user in ("swallows", "raises"):
                    await asyncio.Event().wait()
            except asyncio.CancelledError:
                if e.user == "raises":
                    raise ValueError("instead") from None
            if e.user == "cancelled":
                raise asyncio.CancelledError("something else")

        @app.on(group="stopped", concurrency=1, start="beginning")
        async def stopped(e: Watched, ctx: Context) -> None:
            attempts.append(("stopped", ctx.attempt))
            if hang:
                await asyncio.Event().wait()

        async with app.running(grace="1ms"):
            for user in ("swallows", "raises", "cancelled", "fine"):
                await app.publish(Watched(user))
            while (await app.store.status()).groups[0].lag:
                await app.store.changed(0.01)
            letters = {letter.record.key: letter.error for letter in await app.store.dead("g")}
            assert letters == {"raises": "ValueError: instead", "cancelled": "CancelledError: something else"}
            assert sorted(a for a in attempts if a[0] != "stopped") == [
                ("cancelled", 1), ("cancelled", 2), ("fine", 1), ("raises", 1), ("raises", 2), ("swallows", 1),
            ]  # fmt: skip

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
