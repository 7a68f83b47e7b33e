"""Two bars while transfers are made; on a terminal only, to standard error."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from trilogue import App

LOOK_S = 0.5
REQUESTED, COMPLETED, FAILED = "transfer.requested", "transfer.completed", "transfer.failed"


@asynccontextmanager
async def live_progress(app: App, transfers: int) -> AsyncIterator[None]:
    """Show how many transfers are asked for and have ended while the block runs. transfers: how many there will be."""
    if not sys.stderr.isatty():
        yield
        return
    columns = TextColumn("{task.description:<15}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        looking = asyncio.create_task(_look(app, bars, transfers))
        try:
            yield
        finally:
            looking.cancel()
            with suppress(asyncio.CancelledError):
                await looking


async def _look(app: App, bars: Progress, transfers: int) -> None:
    requested, ended = (bars.add_task(name, total=transfers, note="") for name in ("requested", "ended"))
    while True:
        types = (await app.store.status()).types
        total = max(transfers, types.get(REQUESTED, 0))
        failed = types.get(FAILED, 0)
        bars.update(requested, completed=types.get(REQUESTED, 0), total=total)
        note = f"{failed:,} sent back or refused" if failed else ""
        bars.update(ended, completed=types.get(COMPLETED, 0) + failed, total=total, note=note)
        await asyncio.sleep(LOOK_S)
