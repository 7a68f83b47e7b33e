"""`run MODULE:APP`: the handlers of an App at work, in this process or in several.

video at sqlite:///video.db (survives os-crash)
group      pattern              order
badge      video.watch_started  per key
analytics  video.*              any
"""

import asyncio
import logging
import signal
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from trilogue import App
from trilogue.brokers import is_broker
from trilogue.cli.load import load_app
from trilogue.cli.log import where
from trilogue.cli.log import workers as workers_of
from trilogue.cli.output import flush, safe, safe_lines, say, say_table
from trilogue.cli.workers import MOST_WORKERS, is_worker, parent_gone, run_workers, worker_command

Workers = Annotated[int, Parameter(validator=Number(gte=1, lte=MOST_WORKERS), help="How many processes.", show_default=True)]
Spec = Annotated[str, Parameter(name="MODULE:APP", help="As video:app for the `app` in video.py.")]


async def run(app: Spec, /, *, workers: Workers = 1) -> int:
    """Run an App's handlers until SIGTERM or Ctrl-C."""
    loaded = load_app(app)
    _log_to_stderr()
    if is_worker():
        await _run_watched(loaded)
        return 0
    _say_plan(loaded, workers)
    if workers > 1:
        return await run_workers(worker_command(app), workers)
    await loaded.run()
    return 0


class _SafeFormatter(logging.Formatter):
    """What handlers raise may quote what they were sent."""

    def format(self, record: logging.LogRecord) -> str:
        return safe_lines(super().format(record))


def _log_to_stderr() -> None:
    """Unless the App's module has set logging up."""
    handler = logging.StreamHandler()
    handler.setFormatter(_SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


async def _run_watched(app: App) -> None:
    """Run as one of several workers: end also when the process that watches us is gone."""
    running = asyncio.ensure_future(app.run())
    watching = asyncio.ensure_future(parent_gone())
    await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        signal.raise_signal(signal.SIGTERM)  # the way out App.run() knows: finish, settle, give back
    watching.cancel()
    await running


def _say_plan(app: App, workers: int) -> None:
    several = f", {workers} processes" if workers > 1 else ""
    # Beside a broker the store decides how far the workers reach.
    reach = f": {workers_of(app.store)}" if is_broker(app.store.url) else ""
    say(f"{safe(app.name)} at {safe(where(app.store))}{reach} (survives {app.store.durability}{several})")
    groups = [each.group for each in app.subscriptions]
    rows = [(each.name, ", ".join(each.patterns), "per key" if each.ordered else "any") for each in groups]
    say_table(("group", "pattern", "order"), rows)
    flush()
