"""claim → decode → handle → settle, one Runner per subscription, knowing no backend.

    claim ──▶ runs (one key each, in order) ──▶ lanes (at most `concurrency`) ──▶ answers ──▶ settle
                                                    │ handler returns          done + emits
                                                    │ raises                   retry | dead   (retry.py decides)
                                                    └ lease lost, stopping     release

Lanes are tasks made when there is work for them: a handler that never waits is served by a single one, without a switch to
the event loop per event. Handlers with a `db` parameter do not run here but in the settlement (InTransaction).
"""

import asyncio
import contextvars
import inspect
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

from trilogue.durations import readable
from trilogue.errors import LogError
from trilogue.events import Delivery, Settlement
from trilogue.handlers import Subscription
from trilogue.outcomes import Answer, Outcomes, cause
from trilogue.ports import Store

CLAIM_RECORDS = 1_000
CLAIM_WAIT_S = 60.0
SETTLES_OPEN = 4
COALESCE_S = 0.005
FAST_S, SLOW_S = 0.05, 0.25
FAST_EFFECTS_S, SLOW_EFFECTS_S = 0.01, 0.03
SWEEP_S = 0.02
BACKOFF_S = 1.0

log = logging.getLogger("trilogue")
# What a Runner makes of its subscription first; set around App.running() by trilogue.testing, whose faults happen in handlers.
around: contextvars.ContextVar[Callable[[Subscription], Subscription] | None] = contextvars.ContextVar(
    "trilogue_around", default=None
)


class Lane:
    """One task that handles runs; `deadline` is when its handler has taken too long."""

    __slots__ = ("deadline", "task", "timed_out")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.deadline: float | None = None
        self.timed_out = False

    def calm(self) -> None:
        """The handler has ended: its deadline is off, and a cancellation for being late is over, however it took it."""
        self.deadline = None
        if self.timed_out and self.task is not None:
            self.timed_out = False
            self.task.uncancel()


class Runner:
    """Runs one subscription until stop()."""

    def __init__(self, store: Store, sub: Subscription, threads: Executor, source: str) -> None:
        surround = around.get()
        self.sub = sub = sub if surround is None else surround(sub)
        self.name = sub.group.name
        self.progress_at = time.monotonic()
        self.in_flight = 0
        self._store = store
        self._threads = threads
        self._outcomes = Outcomes(sub, source)
        self._runs: deque[list[Delivery]] = deque()
        self._lanes: set[Lane] = set()
        self._answers: list[Answer] = []
        self._settles: set[asyncio.Task[None]] = set()
        self._coalescing: asyncio.TimerHandle | None = None
        self._room = asyncio.Event()
        self._stopping = False
        self._least = min(CLAIM_RECORDS, max(2 * sub.concurrency, sub.batch or 0))
        self._limit = self._least
        self._backoff_until = 0.0
        self._interruptible = False
        self._task: asyncio.Task[None] | None = None
        self._call = self._caller()

    def _caller(self) -> Callable[..., Awaitable[Any]]:
        """The handler as something to await, whatever kind of function it is."""
        handler, loop = self.sub.handler, asyncio.get_running_loop()

        async def in_thread(event: Any, **extra: Any) -> Any:
            # The context is copied, so that publishing from the thread still knows its cause.
            run = contextvars.copy_context().run
            return await loop.run_in_executor(self._threads, lambda: run(_call_now, handler, event, extra))

        async def collected(event: Any, **extra: Any) -> list[Any]:
            return [emitted async for emitted in handler(event, **extra)]

        if self.sub.kind == "thread":
            return in_thread
        return collected if inspect.isasyncgenfunction(handler) else handler

    def start(self) -> None:
        """Begin to claim."""
        self._task = asyncio.create_task(self._run(), name=f"trilogue {self.name}")

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        sweeper = asyncio.create_task(self._sweep()) if self.sub.timeout_us is not None else None
        try:
            while not self._stopping:
                self._interruptible = True
                await self._wait_for_room()
                deliveries = await self._claim()
                self._interruptible = False
                if deliveries:
                    await self._begin(deliveries)
        finally:
            if sweeper is not None:
                sweeper.cancel()

    async def _wait_for_room(self) -> None:
        while self.in_flight > self._limit // 2 or len(self._settles) >= SETTLES_OPEN:
            self._room.clear()
            await self._room.wait()
        if (wait := self._backoff_until - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    async def _claim(self) -> list[Delivery]:
        try:
            return await self._store.claim(self.name, limit=self._limit, wait_s=CLAIM_WAIT_S)
        except Exception as error:  # whatever it is: a group that ends in silence is worse than one that tries again
            self._back_off("claiming", error)
            return []

    def _back_off(self, doing: str, error: Exception) -> None:
        self._backoff_until = time.monotonic() + BACKOFF_S
        log.warning("group %s: %s failed, trying again in %.0f s: %s", self.name, doing, BACKOFF_S, error)

    async def _begin(self, deliveries: list[Delivery]) -> None:
        self.in_flight += len(deliveries)
        began = time.monotonic()
        if self.sub.batch is not None:
            await self._batches(deliveries)
        elif self.sub.kind == "db":
            await self._settle([self._outcomes.in_transaction(delivery) for delivery in deliveries])
            self.in_flight -= len(deliveries)
        else:
            self._runs.extend(_runs(deliveries, ordered=self.sub.group.ordered))
            await self._open_lanes()
        self._pace(time.monotonic() - began)

    def _pace(self, took_s: float) -> None:
        """Claim more while claims are finished quickly, less while they are not: a slow handler needs no long queue."""
        # A claim with effects is one transaction, which everybody who publishes waits for.
        fast_s, slow_s = (FAST_EFFECTS_S, SLOW_EFFECTS_S) if self.sub.kind == "db" else (FAST_S, SLOW_S)
        if took_s < fast_s and not self.in_flight:
            self._limit = min(CLAIM_RECORDS, self._limit * 2)
        elif took_s > slow_s or self.in_flight:
            self._limit = max(self._least, self._limit // 2)

    # ── lanes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _open_lanes(self) -> None:
        """One lane first; if it has to wait for something, as many as are allowed."""
        if not self._lanes:
            self._open_lane()
            await asyncio.sleep(0)
        for _ in range(min(len(self._runs), self.sub.concurrency - len(self._lanes))):
            self._open_lane()

    def _open_lane(self) -> None:
        lane = Lane()
        lane.task = asyncio.create_task(self._work(lane), name=f"trilogue {self.name}")
        self._lanes.add(lane)

    async def _work(self, lane: Lane) -> None:
        try:
            while self._runs:
                run = self._runs.popleft()
                for n, delivery in enumerate(run, 1):
                    if self._stopping or delivery.lease.lost:
                        self._release(run[n - 1 :])
                        break
                    try:
                        answer = await self._handle(lane, delivery)
                    except asyncio.CancelledError:
                        self._release(run[n:])
                        raise
                    self._answer(answer)
                    if n < len(run) and await self._holds_up(answer):
                        self._release(run[n:])
                        break
        finally:
            self._lanes.discard(lane)

    async def _holds_up(self, answer: Answer) -> bool:
        """Whether what follows of the same key must wait for this one."""
        if isinstance(answer, Settlement):
            return answer.holds_key
        await self._sent()  # an effect's outcome is known after the commit
        return any(settlement.holds_key for settlement in answer.settlements)

    async def _handle(self, lane: Lane, delivery: Delivery) -> Answer:
        """Call the handler with one event; its outcome as an answer."""
        sub = self.sub
        record = delivery.record
        cause.set(record)
        ctx = self._outcomes.context(delivery)
        try:
            event = sub.decode(record)
            if sub.timeout_us is not None:
                lane.deadline = time.monotonic() + sub.timeout_us / 1_000_000
            outcome = await self._call(event) if ctx is None else await self._call(event, ctx=ctx)
            lane.calm()
            return Settlement(delivery) if outcome is None and ctx is None else self._outcomes.done(delivery, outcome, ctx)
        except Exception as error:
            lane.calm()
            return self._outcomes.failed(delivery, error)
        except asyncio.CancelledError as error:
            timed_out = lane.timed_out
            lane.calm()
            if lane.task is not None and lane.task.cancelling():
                self._answer(Settlement(delivery, "release"))
                raise
            if not timed_out:
                return self._outcomes.failed(delivery, error)  # something it waited for was cancelled, not the handler
            return self._outcomes.failed(delivery, self._too_long())

    def _too_long(self) -> TimeoutError:
        return TimeoutError(f"the handler took longer than its timeout of {readable(self.sub.timeout_us or 0)}")

    async def _sweep(self) -> None:
        """Cancel handlers past their deadline: one look at all lanes instead of a timer per event."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for lane in self._lanes:
                if lane.deadline is not None and now > lane.deadline and lane.task is not None:
                    lane.deadline = None
                    lane.timed_out = True
                    lane.task.cancel()

    # ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _batches(self, deliveries: list[Delivery]) -> None:
        """Hand out batches one after the other; what follows a failed record of its key is handed back."""
        alone, together = self._outcomes.apart(deliveries)
        singles = [[delivery] for delivery in alone]
        size = self.sub.batch or 1
        # Apart, or what a replayed event emits would be published as caused by one that is no replay. Of a key they come first.
        parts = [d for d in together if d.replay], [d for d in together if not d.replay]
        batches = [part[n : n + size] for part in parts for n in range(0, len(part), size)]
        # With `db`, what goes alone still is one settlement, which itself keeps back what follows a failure.
        rounds = (
            [singles, *([batch] for batch in batches)] if self.sub.kind == "db" else [[batch] for batch in [*singles, *batches]]
        )
        blocked: set[str | None] = set()
        for batches in rounds:
            kept = [kept for batch in batches if (kept := self._kept(batch, blocked))]
            if not kept:
                continue
            settlements = await (self._settle_batches(kept) if self.sub.kind == "db" else self._handle_batch(kept[0]))
            if self.sub.group.ordered:
                blocked |= {s.delivery.record.key for s in settlements if s.holds_key} - {None}

    def _kept(self, batch: list[Delivery], blocked: set[str | None]) -> list[Delivery]:
        """What of a batch may be handled now; the rest is handed back."""
        if self._stopping or batch[0].lease.lost:
            self._release(batch)
            return []
        self._release([delivery for delivery in batch if delivery.record.key in blocked])
        return [delivery for delivery in batch if delivery.record.key not in blocked]

    async def _settle_batches(self, batches: list[list[Delivery]]) -> list[Settlement]:
        answers = [answer for batch in batches for answer in self._outcomes.batch_in_transaction(batch)]
        await self._settle(answers)
        self.in_flight -= sum(map(len, batches))
        return [s for answer in answers for s in ([answer] if isinstance(answer, Settlement) else answer.settlements)]

    async def _handle_batch(self, batch: list[Delivery]) -> list[Settlement]:
        failed, deliveries, events = self._outcomes.decoded(batch)
        settlements = [*failed, *(await self._call_batch(deliveries, events) if deliveries else ())]
        for settlement in settlements:
            self._answer(settlement)
        return settlements

    async def _call_batch(self, deliveries: list[Delivery], events: list[Any]) -> list[Settlement]:
        lane = Lane()
        lane.task = asyncio.ensure_future(self._call(events))
        if self.sub.timeout_us is not None:
            lane.deadline = time.monotonic() + self.sub.timeout_us / 1_000_000
        self._lanes.add(lane)
        try:
            await asyncio.wait([lane.task])
            if lane.timed_out:
                return self._outcomes.batch_failed(deliveries, self._too_long())
            return self._outcomes.batch_done(deliveries, events, lane.task.result())
        except Exception as error:
            return self._outcomes.batch_failed(deliveries, error)
        except asyncio.CancelledError as error:
            if lane.task.cancelled():  # something it waited for was cancelled, not the handler
                return self._outcomes.batch_failed(deliveries, error)
            lane.task.cancel()
            self._release(deliveries)
            raise
        finally:
            self._lanes.discard(lane)

    # ── answering ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _answer(self, answer: Answer) -> None:
        self._answers.append(answer)
        self.progress_at = time.monotonic()
        if len(self._answers) >= min(self.in_flight, CLAIM_RECORDS):
            self._send()
        elif self._coalescing is None:
            # What finishes within a few milliseconds is settled together: each settlement is a transaction.
            self._coalescing = asyncio.get_running_loop().call_later(COALESCE_S, self._send)

    def _release(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._answer(Settlement(delivery, "release"))

    def _send(self) -> None:
        if self._coalescing is not None:
            self._coalescing.cancel()
            self._coalescing = None
        answers, self._answers = self._answers, []
        if not answers:
            return
        self.in_flight -= len(answers)
        self._room.set()
        try:
            settling = self._store.settle(self.name, answers)  # planned now: the keys of finished records are free
        except LogError as error:
            self._back_off("settling", error)
            return
        task = asyncio.ensure_future(self._settled(settling))
        self._settles.add(task)
        task.add_done_callback(self._settle_ended)

    async def _settle(self, answers: Sequence[Answer]) -> None:
        try:
            settling = self._store.settle(self.name, answers)
        except LogError as error:
            self._back_off("settling", error)
            return
        await self._settled(settling)

    def _settle_ended(self, task: "asyncio.Task[None]") -> None:
        # Only now, not at the end of the task itself: there it still counts as open, and who waits for room would sleep on.
        self._settles.discard(task)
        self._room.set()

    async def _settled(self, settling: Awaitable[list[Delivery]]) -> None:
        try:
            lost = await settling
            if lost:
                log.info("group %s: %d deliveries went to another worker", self.name, len(lost))
        except Exception as error:  # whatever it is: the store lends again what was not settled
            self._back_off("settling", error)
        finally:
            self.progress_at = time.monotonic()
            self._room.set()

    async def _sent(self) -> None:
        """Settle what has been answered and wait for the commit."""
        self._send()
        await asyncio.gather(*self._settles, return_exceptions=True)

    # ── stopping ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def stop(self, grace_s: float) -> None:
        """Finish what has begun, hand back the rest uncharged, settle. After `grace_s` handlers are cancelled."""
        self._stopping = True
        while self._runs:
            self._release(self._runs.popleft())
        loop_task = self._task
        if loop_task is not None and self._interruptible:
            loop_task.cancel()
        tasks = [task for task in (loop_task, *(lane.task for lane in self._lanes)) if task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sent()


def _call_now(handler: Callable[..., Any], event: Any, extra: dict[str, Any]) -> Any:
    outcome = handler(event, **extra)
    return list(outcome) if inspect.isgenerator(outcome) else outcome


def _runs(deliveries: list[Delivery], *, ordered: bool) -> Iterable[list[Delivery]]:
    """Deliveries of one key together, in order; each other one alone."""
    if not ordered:
        return [[delivery] for delivery in deliveries]
    by_key: dict[str | int, list[Delivery]] = {}
    for n, delivery in enumerate(deliveries):
        key = delivery.record.key
        by_key.setdefault(n if key is None else key, []).append(delivery)
    return by_key.values()
