"""How it was before: one watch, six calls one after the other, and the user waits for all of them.

    start ─ store watch ─ user ─ recommendation ─ analytics ─ notification ─ badge ─ ranking ─ answer
                          0.3 s  0.3 s            …                                            after 1.8 s
                          no answer in 5 s: one more try; none again: the watch is rolled back, the user is refused

The calls are the same services' code on a store of their own, behind real waiting. What the services before the broken one have
written stays: nobody can roll back another service.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from trilogue import App, Db
from trilogue.apps.video.events import WatchStarted
from trilogue.apps.video.platform import SERVICES, platform
from trilogue.errors import TrilogueError

CALL_S = 0.3
TIMEOUT_S = 5.0
TRIES = 2


class ServiceUnavailable(TrilogueError):
    """A service did not answer, twice."""


@dataclass(slots=True)
class ChainResult:
    """What became of a sample. answers_s: of the accepted watches. refused_after_s: of the others. left_behind: effects of
    refused watches that services keep."""

    accepted: int = 0
    refused: int = 0
    answers_s: list[float] = field(default_factory=list)
    refused_after_s: list[float] = field(default_factory=list)
    left_behind: int = 0


class Chain:
    """A Video Service that calls the six others itself.

    app: a platform() on a store of its own, open and not running. down: a service that never answers. call_s: how long a
    call takes, give or take a tenth. timeout_s: how long one may take.
    """

    def __init__(
        self, app: App, *, down: str | None = None, call_s: float = CALL_S, timeout_s: float = TIMEOUT_S, seed: int = 1
    ) -> None:
        self.app, self.down, self.call_s, self.timeout_s = app, down, call_s, timeout_s
        self.watches: dict[str, WatchStarted] = {}
        self._rng = random.Random(seed)

    async def start_watching(self, watch: WatchStarted) -> None:
        """Record the watch, call everybody, answer; raises ServiceUnavailable once the watch is rolled back."""
        self.watches[watch.session] = watch
        try:
            for service in SERVICES:
                await self._call(service, watch)
        except ServiceUnavailable:
            del self.watches[watch.session]
            raise

    async def _call(self, service: str, watch: WatchStarted) -> None:
        for _ in range(TRIES):
            try:
                async with asyncio.timeout(self.timeout_s):
                    return await self._answer(service, watch)
            except TimeoutError:
                continue
        raise ServiceUnavailable(f"service {service!r} did not answer within {self.timeout_s:g} s, {TRIES} times")

    async def _answer(self, service: str, watch: WatchStarted) -> None:
        if service == self.down:
            await asyncio.Event().wait()
        await asyncio.sleep(self.call_s * self._rng.uniform(0.9, 1.1))
        await self.app.store.transact(lambda db: _handle(service, watch, db))


def _handle(service: str, watch: WatchStarted, db: Db) -> None:
    for handler, _, _ in SERVICES[service].handlers:
        handler([watch], db)


async def run_chain(
    watches: Sequence[WatchStarted],
    *,
    down: str | None = None,
    call_s: float = CALL_S,
    timeout_s: float = TIMEOUT_S,
    seed: int = 1,
) -> ChainResult:
    """Send a sample through the chain, all at once, each on its own; returns what became of it.

    down: a service that never answers. call_s, timeout_s: seconds.
    """
    result = ChainResult()
    async with platform("memory://") as app:
        chain = Chain(app, down=down, call_s=call_s, timeout_s=timeout_s, seed=seed)
        await asyncio.gather(*(_measured(chain, watch, result) for watch in watches))
        kept = [(await app.db(f"select count(*) from {service}_handled"))[0][0] for service in SERVICES]
    result.left_behind = sum(count - result.accepted for count in kept if count > result.accepted)
    return result


async def _measured(chain: Chain, watch: WatchStarted, result: ChainResult) -> None:
    began = time.perf_counter()
    try:
        await chain.start_watching(watch)
    except ServiceUnavailable:
        result.refused += 1
        result.refused_after_s.append(time.perf_counter() - began)
        return
    result.accepted += 1
    result.answers_s.append(time.perf_counter() - began)
