"""`relay FROM TO`: pass on what is published, from one log to another.

trilogue relay sqlite:///shop.db kafka://kafka:9092 --pattern 'order.#'
trilogue relay amqp://localhost/ postgresql://db/all --store sqlite:///relay.db --existing
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Annotated

from cyclopts import Parameter

from trilogue.brokers import is_broker, open_broker
from trilogue.cli.log import STORE, Log, opened
from trilogue.cli.output import flush, note, safe, say
from trilogue.errors import BadOption
from trilogue.events import Group
from trilogue.patterns import check_pattern
from trilogue.ports import Broker, Store
from trilogue.relay import Publish, Relay
from trilogue.stores import open_store
from trilogue.urls import redacted

IDLE_S = 0.1


async def relay(
    source: Annotated[str, Parameter(name="FROM", help="The URL of the log to read.")],
    target: Annotated[str, Parameter(name="TO", help="The URL of the log to publish to.")],
    /,
    *,
    pattern: Annotated[tuple[str, ...], Parameter(help="Only these types, as 'order.#'; may be given several times.")] = ("#",),
    group: Annotated[str | None, Parameter(help="The group that reads FROM; 'relay:' and TO if not given.")] = None,
    existing: Annotated[bool, Parameter(help="A new group begins with what is there, and not with what comes.")] = False,
    until_idle: Annotated[bool, Parameter(help="Stop when nothing is left to pass on.")] = False,
    store: Annotated[str | None, STORE] = None,
) -> None:
    """Pass on what is published to one log to another, in order per key, with the same ids.

    Runs until SIGTERM or Ctrl-C; started again it goes on where it was. What came from TO is not sent back there.
    """
    for each in pattern:
        check_pattern(each)
    here, there = _name(source), _name(target)
    if here == there:
        raise BadOption(f"FROM and TO are both {here}: a log cannot be relayed to itself")
    reads = Group(group or f"relay:{there}", pattern, start="beginning" if existing else "now", app="")
    async with opened(Log(source, store)) as log, _published_to(target) as publish:
        await log.bind([reads])
        passing = Relay(log, reads.name, publish, name=here, back=there)
        said = f"{safe(here)} to {safe(there)}: {', '.join(map(safe, pattern))}, as group {safe(reads.name)}"
        await _run(passing, log, reads.name, said, until_idle=until_idle)
        note(f"{passing.passed:,} passed on")
        if passing.of_streams and not is_broker(target):
            note(f"{passing.of_streams:,} of them stood in streams and do not there: aggregates begin at version 0")


def _name(url: str) -> str:
    """A log as it is marked on what comes from it."""
    return redacted(url.strip()).replace(" ", "%20")


@contextlib.asynccontextmanager
async def _published_to(url: str) -> AsyncIterator[Publish]:
    """What publishes to a log, open while the block runs. A broker needs no store for that."""
    log: Broker | Store = open_broker(url) if is_broker(url) else open_store(url)
    await log.open()
    try:
        yield log.publish
    finally:
        await log.close()


async def _run(passing: Relay, log: Store, group: str, said: str, *, until_idle: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    say(said)
    flush()
    tasks = [asyncio.create_task(passing.run()), asyncio.create_task(stop.wait())]
    if until_idle:
        tasks.append(asyncio.create_task(_idle(log, group)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await log.leave()


async def _idle(log: Store, group: str) -> None:
    while not await log.idle([group]):
        await log.changed(IDLE_S)
