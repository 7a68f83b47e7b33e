"""A PostgreSQL server of its own that is killed, restarted and frozen, and a pooler in front of it."""

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import services
from common import run
from servers import sets
from services import own_servers

from trilogue.conformance import PROMISES
from trilogue.conformance.tools import Bench, answer, drain, envelope, group, numbers
from trilogue.errors import LogError, OutcomeUnknown, Unavailable
from trilogue.ports import Query, Store
from trilogue.stores import open_store, postgresql, postgresql_database

READERS = group()


async def publish(store: Store, outcomes: dict[str, str], ended: asyncio.Event) -> None:
    n = 0
    while not ended.is_set():
        n += 1
        try:
            await store.append([envelope(n, f"k{n % 5}", id=f"id-{n}")])
            outcomes[f"id-{n}"] = "stored"
        except OutcomeUnknown:
            outcomes[f"id-{n}"] = "unknown"
        except Unavailable:
            outcomes[f"id-{n}"] = "refused"
            await asyncio.sleep(0.05)


async def handle(store: Store, handled: list[str], ended: asyncio.Event) -> None:
    while not ended.is_set():
        try:
            deliveries = await store.claim("readers", limit=50, wait_s=0.1)
            handled += [delivery.record.id for delivery in deliveries]  # seen; whether the answer was stored may stay unknown
            await answer(store, deliveries)
        except LogError:
            await asyncio.sleep(0.05)


async def more(outcomes: dict[str, str], count: int) -> None:
    enough = list(outcomes.values()).count("stored") + count
    while list(outcomes.values()).count("stored") < enough:
        await asyncio.sleep(0.01)


@pytest.mark.processes
def test_a_server_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    with own_servers(tmp_path, "postgresql") as mine:
        url = mine["postgresql"]["url"] + "?lease_s=2"

        async def main() -> None:
            async with Bench(lambda: open_store(url)) as bench:
                stores = [await bench.open(READERS) for _ in range(2)]
                outcomes: dict[str, str] = {}
                handled: list[str] = []
                ended, all_handled = asyncio.Event(), asyncio.Event()
                publishing = asyncio.create_task(publish(stores[0], outcomes, ended))
                handling = [asyncio.create_task(handle(store, handled, all_handled)) for store in stores]
                for _ in range(2):
                    await more(outcomes, 30)
                    await asyncio.to_thread(sets.kill, tmp_path, "postgresql")
                    await asyncio.sleep(0.2)
                    await asyncio.to_thread(sets.start, tmp_path, "postgresql")
                    await more(outcomes, 30)
                ended.set()
                await publishing
                kept = {id for id, said in outcomes.items() if said == "stored"}
                while not set(handled) >= kept:
                    await asyncio.sleep(0.01)
                all_handled.set()
                await asyncio.gather(*handling)
                stored = [record.id for record in await stores[0].read(Query(limit=10_000))]
                assert kept <= set(stored)
                assert len(stored) == len(set(stored))
                assert not {id for id, said in outcomes.items() if said == "refused"} & set(stored)

        run(main())


@pytest.mark.processes
def test_a_frozen_server_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql_database, "CLOSE_S", 0.5)
    monkeypatch.setattr(postgresql_database, "GLANCE_S", 0.2)
    monkeypatch.setattr(postgresql, "STATEMENT_S", 0.2)
    monkeypatch.setattr(postgresql, "ANSWER_S", 0.5)
    with own_servers(tmp_path, "postgresql") as mine:
        url = mine["postgresql"]["url"] + "?lease_s=2&connect_timeout_s=2"

        async def main() -> None:
            store, other = open_store(url), open_store(url)
            await store.open()
            await other.open()
            await store.bind([READERS])
            await store.append([envelope(1, "k")])
            await asyncio.to_thread(sets.freeze, tmp_path, "postgresql")
            try:
                with pytest.raises((OutcomeUnknown, Unavailable)):
                    await store.append([envelope(2, "k")])
                with pytest.raises(Unavailable):
                    await open_store(url).open()
                await other.close()
            finally:
                await asyncio.to_thread(sets.thaw, tmp_path, "postgresql")
            await drain(store, "readers", 1)
            await store.close()

        run(main())


# ── a pooler ─────────────────────────────────────────────────────────────────────────────────────────────────────────

POOLED = ["everything_comes_back", "ids_are_idempotent", "effects_happen_with_the_settlement", "zombies_have_no_effect"]


@pytest.fixture
def pooled_url(postgresql_url: str) -> str:
    """A log behind pgbouncer in transaction mode: whoever asks gets any of a few server connections."""
    own = urlsplit(f"{postgresql_url}&prepare=off")
    return own._replace(netloc=urlsplit(services.url("pgbouncer")).netloc).geturl()


@pytest.mark.parametrize("name", POOLED)
def test_promises_behind_a_pooler(pooled_url: str, name: str) -> None:
    [kept] = [promise for promise in PROMISES if promise.name == name]
    asyncio.run(kept.keep(lambda: open_store(pooled_url)))


def test_two_processes_behind_a_pooler_learn_of_each_other(pooled_url: str) -> None:
    """Nothing is told through it: the log is polled."""

    async def main() -> None:
        async with Bench(lambda: open_store(pooled_url)) as bench:
            reader, writer = await bench.open(READERS), await bench.open()
            for n in range(5):
                await writer.append([envelope(n, "k")])
                assert numbers(await drain(reader, "readers", 1)) == [n]

    run(main())
