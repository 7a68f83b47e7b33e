"""The three levels of event-driven systems, run and counted: what did the receiver have to ask for?

    level 1  UserCreated   ──> Mail Service      asks for every event
    level 2  OrderCreated  ──> Invoice Service   asks nobody
    level 3  Paid          ──> Purse Service     asks nobody, and knows every balance there ever was

Each level runs twice: while everybody answers, and while the services that might be asked are down.
"""

import asyncio
import inspect
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from trilogue import App
from trilogue.apps.levels import notification, sourcing, state_transfer
from trilogue.apps.levels.services import Services
from trilogue.apps.place import Wanted, app_on, place

Json = dict[str, Any]
LOOK_S = 0.005
MEMORY = Wanted("memory://")


@dataclass(frozen=True, slots=True)
class Level:
    """One module, as all three of them are. publish: its events. receiver: registers its handler, returns the list of what it
    does."""

    number: int
    name: str
    events: tuple[object, ...]
    publish: Callable[[App], Awaitable[None]]
    receiver: Callable[[App, Services], list[str]]


LEVELS = tuple(Level(m.NUMBER, m.NAME, m.EVENTS, m.publish, m.receiver) for m in (notification, state_transfer, sourcing))


async def demo_levels(report: Literal["text", "json"] = "text", *, url: str = "memory://", store: str | None = None) -> Json:
    """Run the three levels, print what was counted and return it.

    report: for people or for programs. url, store: the log, as App takes it; on one that is kept the balances go on.
    """
    found = {"levels": [await run_level(level, Wanted(url, store)) for level in LEVELS]}
    if report == "json":
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        _show(found, Console())
    return found


async def run_level(level: Level, wanted: Wanted = MEMORY) -> Json:
    """Publish the level's events to its receiver, twice; what was counted. wanted: the log."""
    asked, did, carried = await _all_answer(level, wanted)
    return {
        "level": level.number,
        "name": level.name,
        "event": type(level.events[0]).__name__,
        "events": len(level.events),
        "carries": carried,
        "asked": asked,
        "asked_in_all": sum(asked.values()),
        "did": did,
        "done_while_services_are_down": await _nobody_answers(level, wanted),
        "code": inspect.getsource(level.receiver),
    }


async def _all_answer(level: Level, wanted: Wanted) -> tuple[dict[str, int], list[str], str]:
    services = Services()
    async with _app(wanted) as app:
        done = level.receiver(app, services)
        async with app.running():
            await level.publish(app)
            await app.wait_idle(timeout="30s")
        return dict(services.asked), done, app.envelope(level.events[0]).data.decode()


async def _nobody_answers(level: Level, wanted: Wanted) -> int:
    """How many events were dealt with before the services came back."""
    services = Services(down=True)
    async with _app(wanted) as app:
        done = level.receiver(app, services)
        async with app.running():
            await level.publish(app)
            count = await _dealt_with(level, done, services)
            services.down = False
            await app.wait_idle(timeout="30s")
    return count


@asynccontextmanager
async def _app(wanted: Wanted) -> AsyncIterator[App]:
    async with place(wanted) as where:
        yield app_on(where.url, where.store, "levels")


async def _dealt_with(level: Level, done: list[str], services: Services) -> int:
    while len(done) + services.refused < len(level.events):  # noqa: ASYNC110 - both only ever grow, within milliseconds
        await asyncio.sleep(LOOK_S)
    return len(done)


# ── for people ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _show(found: Json, console: Console) -> None:
    for level in found["levels"]:
        _say(console, f"Level {level['level']}, {level['name']}", style="bold")
        _say(console, f"  {level['event']} carries {level['carries']}")
        for line in level["did"]:
            _say(console, f"  {line}")
        asked = ", ".join(f"the {name} service {count} times" for name, count in level["asked"].items())
        _say(console, f"  asked for {level['events']} events: {asked or 'nobody'}")
        _say(console, "")
        _say(console, "\n".join(f"    {line}".rstrip() for line in level["code"].splitlines()), style="dim")
        _say(console, "")
    console.print(_table(found))


def _say(console: Console, text: str, *, style: str | None = None) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True, style=style)


def _table(found: Json) -> Table:
    table = Table(title="What the receiver had to ask for", title_justify="left", title_style="bold")
    for name in ("level", "events", "questions", "done with services down"):
        table.add_column(name, justify="left" if name == "level" else "right")
    for level in found["levels"]:
        counts = (level["events"], level["asked_in_all"], level["done_while_services_are_down"])
        table.add_row(f"{level['level']} {level['name']}", *map(str, counts))
    return table
