"""A primary that is lost and a standby that takes its place: one URL names both, and nothing that had a receipt is missing."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from common import run
from servers import process, sets
from services import own_servers
from test_postgresql_faults import READERS, handle, more, publish

from trilogue.conformance.tools import Bench
from trilogue.ports import Query
from trilogue.stores import open_store

WITHIN_S = 30


@contextmanager
def standby_of(primary: dict[str, Any]) -> Iterator[str]:
    """The URL of a synchronous standby, streaming from a primary."""
    (of_primary,) = primary["processes"]
    (port,) = process.free_ports(1)
    old, data = f"{primary['home']}/data", f"{primary['home']}/standby"
    programs = Path(next(word for word in of_primary["argv"] if word.endswith("/postgres"))).parent
    process.run([f"{programs}/pg_basebackup", "-d", primary["url"], "-D", data, "-R", "-X", "stream"], "no backup", of_primary)
    argv = [f"port={port}" if word.startswith("port=") else word.replace(old, data) for word in of_primary["argv"]]
    mine = process.Process(**(of_primary | {"argv": argv, "log": f"{primary['home']}/standby.log", "pid": 0, "started": 0}))
    process.spawn(mine)
    try:
        with psycopg.connect(primary["url"], autocommit=True) as connection:
            connection.execute("alter system set synchronous_standby_names = '*'")
            connection.execute("select pg_reload_conf()")
            follows = "select count(*) from pg_stat_replication where sync_state = 'sync'"
            assert process.wait_for(lambda: connection.execute(follows).fetchone() == (1,), WITHIN_S)
        yield primary["url"].replace(f":{urlsplit(primary['url']).port}/", f":{port}/")
    finally:
        process.end(mine, 2, 15)


@pytest.mark.processes
def test_a_standby_takes_over(tmp_path: Path) -> None:
    with own_servers(tmp_path, "postgresql") as mine, standby_of(dict(mine["postgresql"])) as standby:
        primary = mine["postgresql"]["url"]
        hosts = [urlsplit(url).netloc.rpartition("@")[2] for url in (primary, standby)]
        both = primary.replace(hosts[0], ",".join(hosts))

        async def main() -> None:
            async with Bench(lambda: open_store(f"{both}?lease_s=2")) as bench:
                stores = [await bench.open(READERS) for _ in range(2)]
                assert stores[0].durability == "replicated"
                outcomes: dict[str, str] = {}
                handled: list[str] = []
                ended = asyncio.Event()
                working = [publish(stores[0], outcomes, ended), *(handle(store, handled, ended) for store in stores)]
                tasks = [asyncio.create_task(each) for each in working]
                async with asyncio.timeout(WITHIN_S * 3):
                    await more(outcomes, 20)
                    await asyncio.to_thread(sets.kill, tmp_path, "postgresql")
                    with psycopg.connect(standby, autocommit=True) as connection:
                        connection.execute("select pg_promote()")
                    await more(outcomes, 20)
                    stored = {id for id, outcome in outcomes.items() if outcome == "stored"}
                    while not stored <= set(handled):
                        await asyncio.sleep(0.05)
                ended.set()
                await asyncio.gather(*tasks)
                there = {record.id for record in await stores[1].read(Query(limit=10_000))}
                assert {id for id, outcome in outcomes.items() if outcome == "stored"} <= there

        run(main())
