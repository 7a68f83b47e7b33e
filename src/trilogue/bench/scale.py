"""Does anything grow with the log? Append and claim on a log of 10,000 to 10,000,000 records, memory before a long backlog.

append_at_10000          events per second of batches of 1,000, at that size of the log
claim_at_10000           events per second of a group that starts at the end of the log and reads 20,000
waiting_1000000_mb       megabytes of a worker process with a million records waiting
append_p50_us_at_10000   microseconds of one append with an expected version, to any of the streams of a log of streams only;
append_p99_us_at_10000   the store was just opened and remembers no stream
"""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from trilogue.app import App
from trilogue.bench.events import WRITERS, Watched, sample
from trilogue.bench.store_figures import TEXT, Deposited
from trilogue.events import Envelope

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
BATCHES = 40
FILL = 20_000
PER_STREAM = 100
APPENDS = 2_000


def run(folder: Path, sizes: tuple[int, ...] = SIZES) -> Iterator[tuple[str, float]]:
    """(name, figure) pairs, one log growing through the sizes, then one of streams."""
    yield from _published(folder, sizes)
    for file in folder.glob("scale.db*"):  # room on the disk for the other one
        file.unlink()
    versions: list[int] = []
    for size in sizes:
        took = asyncio.run(_append_at(f"sqlite:///{folder}/streams.db", size, versions))
        for name, at in (("p50", 0.50), ("p99", 0.99)):
            yield f"append_{name}_us_at_{size}", took[int(at * (len(took) - 1))] * 1_000_000


def _published(folder: Path, sizes: tuple[int, ...]) -> Iterator[tuple[str, float]]:
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


async def _append_at(url: str, size: int, versions: list[int]) -> list[float]:
    """Seconds of single appends, sorted, once so many records are in streams; versions: of each stream, kept up to date."""
    app = App(url, name="bench")
    async with app:
        for start in range(len(versions), size // PER_STREAM, WRITERS):
            streams = range(start, min(start + WRITERS, size // PER_STREAM))
            await asyncio.gather(*(app.store.append(_events(app, n, PER_STREAM), expected=(_name(n), 0)) for n in streams))
            versions += [PER_STREAM] * len(streams)
    picked = random.Random(size)
    took = []
    async with app:
        for _ in range(APPENDS):
            n = picked.randrange(len(versions))
            began = time.perf_counter()
            await app.store.append(_events(app, n, 1), expected=(_name(n), versions[n]))
            took.append(time.perf_counter() - began)
            versions[n] += 1
    return sorted(took)


def _name(stream: int) -> str:
    return f"account-{stream}"


def _events(app: App, stream: int, count: int) -> list[Envelope]:
    return [app.envelope(Deposited(str(stream), n, TEXT)) for n in range(count)]
