"""A worker before a long backlog; prints its peak resident size in megabytes: `python -m trilogue.bench.waiting URL`."""

import asyncio
import resource
import sys

from trilogue.app import App
from trilogue.bench.events import Watched

SECONDS = 5
PER_MB = 1_024 if sys.platform != "darwin" else 1_048_576  # Linux counts kilobytes, macOS bytes


async def main(url: str) -> None:
    """Handle what waits, one event a millisecond and lane, for a few seconds."""
    app = App(url, name="waiting")

    @app.on(group="waiting", start="beginning")
    async def handle(_: Watched) -> None:
        await asyncio.sleep(0.001)

    async with app.running():
        await asyncio.sleep(SECONDS)
    sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / PER_MB:.1f}\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
