"""Does anything grow with the log? Append and claim on a log of 10,000 to 10,000,000 records, memory before a long backlog.

append_at_10000      events per second of batches of 1,000, at that size of the log
claim_at_10000       events per second of a group that starts at the end of the log and reads 20,000
waiting_1000000_mb   megabytes of a worker process with a million records waiting
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from trilogue.app import App
from trilogue.bench.figures import Watched, sample

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
BATCHES = 40
FILL = 20_000


def run(folder: Path, sizes: tuple[int, ...] = SIZES) -> Iterator[tuple[str, float]]:
    """(name, figure) pairs, one log growing through the sizes."""
    url = f"sqlite:///{folder}/scale.db"
    for size in sizes:
        append, claim = asyncio.run(_at(url, size))
        yield f"append_at_{size}", append
        yield f"claim_at_{size}", claim
        if size == 1_000_000:
            yield "waiting_1000000_mb", _memory_mb(url)


async def _at(url: str, size: int) -> tuple[float, float]:
    app = App(url, name="bench")

    @app.on(group=f"claim-{size}")
    async def handle(_: Watched) -> None:
        return None

    async with app:
        head = (await app.store.status()).head
        for start in range(head, size, FILL):
            await app.publish_many([sample(n) for n in range(start, min(start + FILL, size))])
        await app.store.bind([sub.group for sub in app.subscriptions], work=False)  # the group begins here
        batches = [[sample(n) for n in range(1_000)] for _ in range(BATCHES)]
        began = time.perf_counter()
        for batch in batches:
            await app.publish_many(batch)
        append = BATCHES * 1_000 / (time.perf_counter() - began)
        began = time.perf_counter()
        async with app.running():
            await app.wait_idle()
            claim = BATCHES * 1_000 / (time.perf_counter() - began)
        await app.store.drop_group(f"claim-{size}")
    return append, claim


def _memory_mb(url: str) -> float:
    """Peak resident size of a process that works through the backlog for a few seconds."""
    done = subprocess.run([sys.executable, "-m", "trilogue.bench.waiting", url], check=True, capture_output=True, text=True)
    return float(done.stdout)
