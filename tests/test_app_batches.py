"""Batches: items fail alone, batches never for long."""

import asyncio

import pytest
from common import QUICK, Watched, Won, all_of, run

from trilogue import (
    App,
    Db,
    Failed,
    Later,
    Reject,
    Retry,
    SeekTo,
)


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


def test_what_a_replay_emits_is_not_published_by_a_batch_with_something_new_in_it(url: str) -> None:
    async def main() -> None:
        app = App(url)
        seen: list[str] = []

        @app.on(group="badge", batch=100)
        async def badge(es: list[Watched]) -> list[Won]:
            seen.extend(e.video for e in es)
            return [Won(e.user, e.video) for e in es]

        async with app.running():
            await app.publish_many([Watched("u", "old1"), Watched("u", "old2")])
            await app.wait_idle()
            await app.store.pause("badge")
            await asyncio.sleep(0.2)  # workers look a moment later
            await app.replay("badge", SeekTo(end="beginning"))
            await app.publish(Watched("u", "new"))
            await app.store.resume("badge")
            await app.wait_idle()
            assert seen == ["old1", "old2"] * 2 + ["new"]
            assert [app.decode(r).badge for r in await all_of(app, types="badge.*")] == ["old1", "old2", "new"]

    run(main())
