"""The two demonstrations: three watches whose story is told (`demo queue`), and a whole watch log (`demo video`).

demo video:  a sample through the chain of calls ─> the same as events while a service is down ─> all watches ─> report
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice

from rich.console import Console

from trilogue import App, Feature
from trilogue.apps.place import KAFKA, Place, place
from trilogue.apps.video.chain import ChainResult, run_chain
from trilogue.apps.video.events import WatchStarted
from trilogue.apps.video.feed import AnswerTimes, Feeder
from trilogue.apps.video.generator import generate
from trilogue.apps.video.handled import marks
from trilogue.apps.video.options import Plan, VideoOptions, checked
from trilogue.apps.video.platform import SERVICES, platform
from trilogue.apps.video.progress import live_progress
from trilogue.apps.video.rejects import Rejects
from trilogue.apps.video.report import Json, collect, show
from trilogue.apps.video.source import read_watches
from trilogue.apps.video.video import VideoService
from trilogue.apps.video.watch import Watch, as_event

LOOK_S = 0.25


async def demo_video(options: VideoOptions) -> Json:
    """Feed a watch log to the six services, print the report and return it.

    Raises BadOption for options that make no sense and inputs that cannot be read, and what the log raises.
    """
    plan = checked(options)
    began = time.monotonic()
    async with place(plan.where, **KAFKA) as where:
        with Rejects(plan.rejects) as rejects:
            report = await _run(plan, where, rejects)
    report["rejected"] = rejects.count
    report["rejects_file"] = str(rejects.path) if rejects.count else None
    report["elapsed_s"] = round(time.monotonic() - began, 2)
    _print(report, as_json=plan.as_json)
    return report


def _print(report: Json, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        show(report, Console())


def _watches(plan: Plan, rejects: Rejects) -> Iterator[Watch]:
    watches = generate(plan.seed) if plan.input is None else read_watches(plan.input, plan.columns, rejects)
    return islice(watches, plan.limit)


async def _run(plan: Plan, where: Place, rejects: Rejects) -> Json:
    watches = _watches(plan, rejects)
    sample = await asyncio.to_thread(lambda: list(islice(watches, plan.chain_sample)))
    events = [as_event(watch) for watch in sample]
    answered = await run_chain(events, seed=plan.seed)
    app = platform(where.url, store=where.store, fail=plan.fail, seed=plan.seed)
    async with app.running():
        return await _feed_all(plan, app, watches, sample, answered)


async def _feed_all(plan: Plan, app: App, watches: Iterator[Watch], sample: list[Watch], answered: ChainResult) -> Json:
    service = VideoService(app)
    one_by_one, feeder = Feeder(service), Feeder(service, plan.speed)
    down = plan.down or ("user",)
    await _take_down(app, down)
    async with live_progress(app, lambda: one_by_one.sent + feeder.sent):
        outage = Outage(app, down[0], [as_event(watch) for watch in sample])
        await outage.begin()
        await one_by_one.feed(iter(sample), at_once=1)
        if not plan.down:
            await app.store.resume(down[0])
            await outage.end()
        refused = asyncio.create_task(run_chain(outage.sample, down=down[0], seed=plan.seed))
        await feeder.feed(watches)
        await _idle(app, [name for name in SERVICES if name not in plan.down])
        brought_back = [await _bring_back(app, name) for name in plan.down]
        await _idle(app, list(SERVICES))  # those brought back may have published something for the others
        await outage.end()
        sent = one_by_one.sent + feeder.sent
        report = await collect(app, sent)
    return {
        **report,
        "sent": sent,
        "conflicts": one_by_one.conflicts + feeder.conflicts if Feature.DEDUP in app.store.features else None,
        "answer_ms": {
            "chain": AnswerTimes(answered.answers_s).summary(),
            "events": feeder.answers.summary() if feeder.sent else one_by_one.answers.summary(),
            "events_one_by_one": one_by_one.answers.summary(),
        },
        "outage": outage.report(one_by_one, await refused),
        "down": brought_back,
    }


class Outage:
    """What the sample looks like to a service that is down while it is published, before and after."""

    def __init__(self, app: App, service: str, sample: list[WatchStarted]) -> None:
        self.app, self.service, self.sample = app, service, sample
        self._before = self._after = 0

    async def begin(self) -> None:
        """Count what the service knows of the sample already (in a database that was kept)."""
        self._before = await self._known()

    async def end(self) -> None:
        """Wait for the service, which is back, and count again."""
        await _idle(self.app, [self.service])
        self._after = await self._known()

    async def _known(self) -> int:
        sessions = [watch.session for watch in self.sample]
        known = f"select count(*) from {self.service}_handled where watch in ({marks(sessions)})"
        return int((await self.app.db(known, sessions))[0][0]) if sessions else 0

    def report(self, fed: Feeder, refused: ChainResult) -> Json:
        """Chain and events beside each other."""
        return {
            "service": self.service,
            "sample": len(self.sample),
            "chain": {
                "accepted": refused.accepted,
                "refused": refused.refused,
                "refused_after_ms": AnswerTimes(refused.refused_after_s).percentile_ms(50),
                "left_behind": refused.left_behind,
            },
            "events": {
                "accepted": fed.sent,
                "refused": len(self.sample) - fed.sent,
                "delivered_when_back": self._after - self._before,
                "delivered_before": self._before,
            },
        }


async def _take_down(app: App, down: Sequence[str]) -> None:
    """Also bring back what a run that was killed has left down."""
    for name in SERVICES:
        await (app.store.pause(name) if name in down else app.store.resume(name))


async def _bring_back(app: App, name: str) -> Json:
    waiting = {group.name: group.lag for group in (await app.store.status()).groups}[name]
    began = time.monotonic()
    await app.store.resume(name)
    await _idle(app, [name])
    return {"service": name, "delivered": waiting, "seconds": round(time.monotonic() - began, 2)}


async def _idle(app: App, names: Sequence[str]) -> None:
    # Not wait_idle(): that waits for all groups, also for those that are down.
    while not await app.store.idle(names):  # noqa: ASYNC110 - there is nothing to wait on, it is a question to the log
        await asyncio.sleep(LOOK_S)
