"""A PostgreSQL server of its own that is killed, restarted and frozen, and a pooler in front of it."""

import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from common import run
from servers import sets
from services import own_servers

from trilogue.conformance import PROMISES
from trilogue.conformance.tools import Bench, answer, drain, envelope, group
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

PGBOUNCER = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin")
POOLED = ["everything_comes_back", "ids_are_idempotent", "effects_happen_with_the_settlement", "zombies_have_no_effect"]


@contextmanager
def pooler(url: str, folder: Path) -> Iterator[str]:
    """The URL of pgbouncer in transaction mode before a database: whoever asks gets any of two server connections."""
    if PGBOUNCER is None:
        pytest.skip("no pgbouncer is installed: apt-get install pgbouncer")
    parts = urlsplit(url)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (folder / "users.txt").write_text(f'"{parts.username}" "{parts.password}"\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={parts.hostname} port={parts.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
        f"auth_type = scram-sha-256\nauth_file = {folder}/users.txt\npool_mode = transaction\ndefault_pool_size = 4\n"
        f"unix_socket_dir =\nmax_client_conn = 100\n"
    )
    folder.chmod(0o755)
    process = subprocess.Popen([PGBOUNCER, "-q", "-u", "nobody", str(folder / "pgbouncer.ini")], stderr=subprocess.PIPE)
    try:
        _until_it_listens(port)
        yield parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}").geturl()
    finally:
        process.terminate()
        process.communicate(timeout=10)


def _until_it_listens(port: int) -> None:
    end = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < end, "pgbouncer does not listen"
            time.sleep(0.02)


@pytest.mark.parametrize("name", POOLED)
def test_promises_behind_a_pooler(postgresql_url: str, tmp_path: Path, name: str) -> None:
    [kept] = [promise for promise in PROMISES if promise.name == name]
    with pooler(f"{postgresql_url}&prepare=off", tmp_path) as url:
        asyncio.run(kept.keep(lambda: open_store(url)))
