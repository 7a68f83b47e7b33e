"""A bar per service while watches are handled; on a terminal only, to standard error."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from trilogue import App
from trilogue.apps.video.platform import SERVICES
from trilogue.apps.video.report import WATCH

LOOK_S = 0.5


@asynccontextmanager
async def live_progress(app: App, total: Callable[[], int]) -> AsyncIterator[None]:
    """Show how far each service is while the block runs. total: how many watches are known of so far."""
    if not sys.stderr.isatty():
        yield
        return
    columns = TextColumn("{task.description:<15}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        looking = asyncio.create_task(_look(app, bars, total))
        try:
            yield
        finally:
            looking.cancel()
            with suppress(asyncio.CancelledError):
                await looking


async def _look(app: App, bars: Progress, total: Callable[[], int]) -> None:
    tasks = {name: bars.add_task(name, note="") for name in ("published", *SERVICES)}
    while True:
        status = await app.store.status()
        # A broker does not count what was published; what was sent is as good.
        published = status.types.get(WATCH, total())
        bars.update(tasks["published"], completed=published, total=max(published, total()))
        for group in status.groups:
            if group.name in tasks:
                note = "down" if group.paused else f"{group.failed:,} failed attempts" if group.failed else ""
                bars.update(tasks[group.name], completed=max(0, published - group.lag), total=max(published, total()), note=note)
        await asyncio.sleep(LOOK_S)
