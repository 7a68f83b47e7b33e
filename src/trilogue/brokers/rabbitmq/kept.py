"""A connection that is made again whenever it is lost, and what lives on it.

         ┌── lost ── wait 0.1 s, 0.2 s, … 3 s ──┐                  everything is built anew: connection, channel,
         ▼                                      │                  exchanges and queues, prefetch, consumer
      connect ──▶ link ──▶ resident.start(link) ┴─▶ ended? start it again on the link that is there

There is no state in between that could be thought to be alive: a resident runs on a channel that has not ended, or it is being
started. `restarts` are counted, so that a fault that is mended over and over again can be seen.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

from trilogue.brokers.rabbitmq.link import Denied, Ended, Link, connect
from trilogue.brokers.rabbitmq.options import Options
from trilogue.errors import Unavailable

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 3.0
log = logging.getLogger("trilogue")


class Resident(Protocol):
    """Something that lives on a channel."""

    async def start(self, link: Link) -> asyncio.Future[Unavailable]:
        """Begin on this connection; returns what is done when that has ended. Raises Unavailable."""


class Kept:
    """One connection for one purpose, for as long as it is wanted. restarts: how often it or a resident began again."""

    def __init__(self, options: Options, purpose: str, prepare: Callable[[Link], Awaitable[None]] | None = None) -> None:
        self._options, self._purpose, self._prepare = options, purpose, prepare
        self.restarts = 0
        self.link: Link | None = None
        self._up: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self._tasks: dict[object, asyncio.Task[None]] = {}

    async def open(self) -> None:
        """Connect, trying for a bounded time; from then on it is kept. Raises Unavailable."""
        deadline = asyncio.get_running_loop().time() + self._options.connect_timeout_s
        waits = _Waits()
        while True:
            try:
                await self._connect()
                break
            except Denied:
                raise
            except Unavailable:
                if asyncio.get_running_loop().time() + waits.next_s > deadline:
                    raise
            await waits.wait()
        self._tasks[self] = asyncio.create_task(self._keep_link())

    async def current(self, wait_s: float) -> Link:
        """The connection, once there is one; raises Unavailable if that takes longer than `wait_s`."""
        await asyncio.wait([self._up], timeout=wait_s)
        if not self._up.done():
            raise Unavailable(f"{self._options.url} is not connected; it is tried again and again")
        return self._up.result()

    async def keep(self, resident: Resident) -> None:
        """Start a resident, and again whenever it ends; raises what the first start raises."""
        link = await self.current(self._options.connect_timeout_s)
        ended = await resident.start(link)
        self._tasks[resident] = asyncio.create_task(self._keep_resident(resident, link, ended))

    async def forget(self, resident: Resident) -> None:
        """Do not start a resident again."""
        await _end(self._tasks.pop(resident, None))

    async def stop(self) -> Link | None:
        """Keep nothing any more; returns the connection if there is one, for whoever ends it."""
        for task in [self._tasks.pop(key) for key in list(self._tasks)]:
            await _end(task)
        return self.link

    # ── the loops ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _connect(self) -> None:
        link = await connect(self._options, self._purpose)
        try:
            if self._prepare is not None:
                await self._prepare(link)
        except BaseException:
            await link.fin()
            raise
        self.link = link
        self._up.set_result(link)

    async def _keep_link(self) -> None:
        while True:
            assert self.link is not None
            why = await asyncio.shield(self.link.lost)
            self.link, self._up = None, asyncio.get_running_loop().create_future()
            if not isinstance(why, Ended):
                self.restarts += 1
                log.warning("%s, %s: %s; connecting again", self._options.url, self._purpose, why)
            await self._reconnect()
            log.info("%s, %s: connected again", self._options.url, self._purpose)

    async def _reconnect(self) -> None:
        waits = _Waits()
        said = ""
        while True:
            await waits.wait()
            try:
                return await self._connect()
            except Unavailable as error:
                if str(error) != said:
                    log.warning("%s, %s: %s; trying again", self._options.url, self._purpose, error)
                said = str(error)

    async def _keep_resident(self, resident: Resident, link: Link, ended: asyncio.Future[Unavailable]) -> None:
        while True:
            why = await asyncio.shield(ended)
            if not link.lost.done():
                self.restarts += 1
                log.warning("%s, %s: %s; beginning again", self._options.url, self._purpose, why)
            link, ended = await self._restart(resident)

    async def _restart(self, resident: Resident) -> tuple[Link, asyncio.Future[Unavailable]]:
        waits = _Waits()
        while True:
            link = await asyncio.shield(self._up)
            try:
                if not link.lost.done():
                    return link, await resident.start(link)
            except Unavailable as error:
                if not link.lost.done():
                    log.warning("%s, %s: %s; trying again", self._options.url, self._purpose, error)
            await waits.wait()


class _Waits:
    """Longer and longer waits, none of them twice the same, so that many programs do not come back at one moment."""

    def __init__(self) -> None:
        self.next_s = FIRST_WAIT_S

    async def wait(self) -> None:
        """Wait once."""
        await asyncio.sleep(self.next_s * random.uniform(0.5, 1.0))
        self.next_s = min(self.next_s * 2, LONGEST_WAIT_S)


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
