"""Faults that were found by reading, each kept from coming back."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trilogue import App, Db, Failed, Retry, Unavailable, event
from trilogue.stores import writer


@event("thing.made", key="key")
class Made(msgspec.Struct, frozen=True):
    key: str
    n: int


@event("thing.seen", key="key")
class Seen(msgspec.Struct, frozen=True):
    key: str
    n: int


def test_repeated_ids_hide_nothing_from_the_history_of_a_key(tmp_path: Path) -> None:
    async def main() -> None:
        app = App(f"sqlite:///{tmp_path}/a.db")
        async with app:
            first = [app.envelope(Made("a", n)) for n in range(4_000)]
            await app.publish_many(first)
            await app.publish_many(first[:1_000])  # plans positions that are then not used
            await app.publish_many([Made("z", n) for n in range(500)])
            await app.publish_many([Made("a", n) for n in range(5_000)])
            assert len([record async for record in app.history(key="z")]) == 500
            assert (await app.store.status()).types == {"thing.made": 9_500}

    asyncio.run(main())


def test_a_settlement_is_never_refused_for_want_of_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        app = App(f"sqlite:///{tmp_path}/a.db")
        calls: list[int] = []

        @app.on(group="g", retry=Retry(3, "10ms"))
        async def handle(e: Made) -> Seen:
            calls.append(e.n)
            if len(calls) == 1:
                monkeypatch.setattr(writer, "QUEUE_ROWS", -1)
                raise ValueError("once")
            return Seen(e.key, e.n)

        async with app.running():
            await app.publish(Made("a", 1))
            while not calls:
                await asyncio.sleep(0.001)
            with pytest.raises(Unavailable, match="publish slower"):
                await app.publish(Made("a", 2))
            monkeypatch.setattr(writer, "QUEUE_ROWS", 100_000)
            await app.publish(Made("a", 2))
            await app.wait_idle(timeout="20s")
        assert calls == [1, 1, 2]

    asyncio.run(main())


@pytest.mark.parametrize("with_db", [False, True])
def test_a_batch_publishes_for_what_it_finished_and_again_for_what_it_did_not(with_db: bool, tmp_path: Path) -> None:
    async def main() -> None:
        app = App(f"sqlite:///{tmp_path}/a.db")
        tried: set[int] = set()

        def outcome(es: list[Made]) -> list[Any]:
            bad = [e for e in es if e.n == 2 and e.n not in tried]
            tried.update(e.n for e in es)
            return [*(Failed(e, "once") for e in bad), *(Seen(e.key, e.n) for e in es if e not in bad)]

        if with_db:

            @app.on(group="g", batch=10, retry=Retry(3, "10ms"))
            def in_db(es: list[Made], db: Db) -> list[Any]:
                return outcome(es)

        else:

            @app.on(group="g", batch=10, retry=Retry(3, "10ms"))
            async def handle(es: list[Made]) -> list[Any]:
                return outcome(es)

        async with app.running():
            await app.publish_many([Made("a", 0), Made("b", 1), Made("c", 2)])
            await app.wait_idle(timeout="20s")
            seen = [msgspec.json.decode(record.data, type=Seen) async for record in app.history(types="thing.seen")]
            assert sorted(s.n for s in seen) == [0, 1, 2]
            causes = {record.key: record.causation_id async for record in app.history(types="thing.seen")}
            assert causes == {record.key: record.id async for record in app.history(types="thing.made")}

    asyncio.run(main())


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, StopIteration])
def test_an_effect_may_raise_anything(error: type[BaseException], tmp_path: Path) -> None:
    async def main() -> None:
        app = App(f"sqlite:///{tmp_path}/a.db")

        @app.on(group="g", retry=Retry(2, "10ms"))
        def handle(e: Made, db: Db) -> None:
            if e.n == 1:
                raise error

        async with app.running():
            await app.publish_many([Made("a", 1), Made("b", 2)])
            await app.wait_idle(timeout="20s")
            [letter] = await app.store.dead("g")
            assert error.__name__ in letter.error

    asyncio.run(main())


def test_slots_are_free_after_running(tmp_path: Path) -> None:
    async def main() -> None:
        url = f"sqlite:///{tmp_path}/a.db?lease_s=60"
        first, second = App(url), App(url)
        got: list[int] = []

        async def handle(e: Made) -> None:
            got.append(e.n)

        first.on(group="g")(handle)
        second.on(group="g")(handle)
        async with first:
            async with first.running():
                await first.publish(Made("a", 1))
                await first.wait_idle(timeout="20s")
            async with second.running():  # while the first one is still open
                await second.publish(Made("a", 2))
                await second.wait_idle(timeout="20s")
            async with first.running():
                await first.publish(Made("a", 3))
                await first.wait_idle(timeout="20s")
        assert got == [1, 2, 3]

    asyncio.run(main())
