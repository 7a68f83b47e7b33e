"""A process at work on a PostgreSQL log, told line by line what to do; answers each line with JSON.

claim    lends what there is, and keeps it     {"ids": ["id-1", …]}
settle   answers all it keeps as done          {"lost": ["id-1", …]}
"""

import asyncio
import json
import sys

from trilogue.conformance.tools import group
from trilogue.events import Delivery, Settlement
from trilogue.ports import Store
from trilogue.stores import open_store, worker


async def obey(store: Store, out: list[Delivery], order: str) -> dict[str, list[str]]:
    if order == "claim":
        lent = await store.claim("readers", limit=1_000, wait_s=0.2)
        out += lent
        return {"ids": [delivery.record.id for delivery in lent]}
    lost = await store.settle("readers", [Settlement(delivery) for delivery in out])
    out.clear()
    return {"lost": [delivery.record.id for delivery in lost]}


async def main(url: str, machine: str) -> None:
    worker._machine = lambda: machine  # where pids mean something
    store = open_store(url)
    await store.open()
    await store.bind([group()])
    out: list[Delivery] = []
    print(json.dumps({}), flush=True)
    while order := (await asyncio.to_thread(sys.stdin.readline)).strip():
        print(json.dumps(await obey(store, out, order)), flush=True)
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
