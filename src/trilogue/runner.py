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
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

from trilogue.codec import envelope
from trilogue.durations import microseconds, readable
from trilogue.errors import BadOption, Later, LogError, Reject, TrilogueError
from trilogue.events import Delivery, Envelope, InTransaction, Record, Settlement, derived_id
from trilogue.handlers import Context, Effect, Failed, Subscription
from trilogue.ports import Db, Store

CLAIM_RECORDS = 1_000
CLAIM_WAIT_S = 60.0
SETTLES_OPEN = 4
COALESCE_S = 0.005
FAST_S, SLOW_S = 0.05, 0.25
FAST_EFFECTS_S, SLOW_EFFECTS_S = 0.01, 0.03
SWEEP_S = 0.02
BACKOFF_S = 1.0

log = logging.getLogger("trilogue")
cause: contextvars.ContextVar[Record | None] = contextvars.ContextVar("trilogue_cause", default=None)
Answer = Settlement | InTransaction


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
        self.sub = sub
        self.name = sub.group.name
        self.progress_at = time.monotonic()
        self.in_flight = 0
        self._store = store
        self._threads = threads
        self._source = source
        self._runs: deque[list[Delivery]] = deque()
        self._lanes: set[Lane] = set()
        self._answers: list[Answer] = []
        self._settles: set[asyncio.Task[None]] = set()
        self._coalescing: asyncio.TimerHandle | None = None
        self._room = asyncio.Event()
        self._stopping = False
        self._least = max(2 * sub.concurrency, sub.batch or 0)
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
            await self._settle([self._in_transaction(delivery) for delivery in deliveries])
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
                    answer = await self._handle(lane, delivery)
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
        return answer.undone

    async def _handle(self, lane: Lane, delivery: Delivery) -> Answer:
        """Call the handler with one event; its outcome as an answer."""
        sub = self.sub
        record = delivery.record
        cause.set(record)
        ctx = Context(record, delivery.attempt, delivery.replay) if sub.takes_ctx else None
        try:
            event = sub.decode(record)
            if sub.timeout_us is not None:
                lane.deadline = time.monotonic() + sub.timeout_us / 1_000_000
            outcome = await self._call(event) if ctx is None else await self._call(event, ctx=ctx)
            lane.calm()
            return Settlement(delivery) if outcome is None and ctx is None else self._done(delivery, outcome, ctx)
        except Exception as error:
            lane.calm()
            return self._failed(delivery, error)
        except asyncio.CancelledError as error:
            timed_out = lane.timed_out
            lane.calm()
            if lane.task is not None and lane.task.cancelling():
                self._answer(Settlement(delivery, "release"))
                raise
            if not timed_out:
                return self._failed(delivery, error)  # something it waited for was cancelled, not the handler
            limit = readable(sub.timeout_us or 0)
            return self._failed(delivery, TimeoutError(f"the handler took longer than its timeout of {limit}"))

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

    # ── outcomes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _done(self, delivery: Delivery, outcome: Any, ctx: Context | None) -> Answer:
        if outcome is None and (ctx is None or not ctx.emitted):
            return Settlement(delivery)
        events, effects = _sorted_out(outcome)
        emits = self._emits(delivery, [*events, *(ctx.emitted if ctx else ())])
        if not effects:
            return Settlement(delivery, emits=emits)

        def write(db: Db) -> list[Settlement]:
            for effect in effects:
                effect.write(db)
            return [Settlement(delivery, emits=emits)]

        return InTransaction([delivery], write, lambda error: [self._failed(delivery, error)], self.sub.db_limit_us)

    def _emits(self, delivery: Delivery, events: Sequence[object]) -> list[Envelope]:
        """Envelopes with ids that a redelivery makes again, so that it adds nothing."""
        if delivery.replay:
            return []
        record = delivery.record
        emits = [
            envelope(
                event,
                id=derived_id(record.recorded_us, record.id, self.name, n),
                source=self._source,
                cause=record,
            )
            for n, event in enumerate(events)
        ]
        for emitted in emits:
            self._store.check(emitted)
        return emits

    def _failed(self, delivery: Delivery, error: BaseException) -> Settlement:
        if isinstance(error, Later):
            try:
                return Settlement(delivery, "retry", microseconds(error.after), charged=False, error=str(error))
            except BadOption as wrong:
                error = wrong
        wait_us = self.sub.retry.wait_us(error, delivery.attempt)
        text = f"{type(error).__qualname__}: {_said(error)}"
        trace = "" if isinstance(error, Reject) else _storable("".join(traceback.format_exception(error, limit=-20)))
        if wait_us is not None:
            log.debug(
                "group %s: attempt %d at position %d failed: %s",
                self.name,
                delivery.attempt,
                delivery.record.position,
                text,
            )
            return Settlement(delivery, "retry", wait_us, error=text, traceback=trace)
        log.warning(
            "group %s: position %d is a dead letter after %d attempts: %s",
            self.name,
            delivery.record.position,
            delivery.attempt,
            text,
        )
        return Settlement(delivery, "dead", park=self.sub.park, error=text, traceback=trace)

    # ── in the settlement's transaction ──────────────────────────────────────────────────────────────────────────────

    def _in_transaction(self, delivery: Delivery) -> Answer:
        sub = self.sub
        try:
            event = sub.decode(delivery.record)
        except Exception as error:
            return self._failed(delivery, error)

        def run(db: Db) -> list[Settlement]:
            cause.set(delivery.record)
            ctx = Context(delivery.record, delivery.attempt, delivery.replay) if sub.takes_ctx else None
            outcome = sub.handler(event, db=db) if ctx is None else sub.handler(event, db=db, ctx=ctx)
            events, effects = _sorted_out(outcome)
            for effect in effects:
                effect.write(db)
            return [Settlement(delivery, emits=self._emits(delivery, [*events, *(ctx.emitted if ctx else ())]))]

        return InTransaction([delivery], run, lambda error: [self._failed(delivery, error)], sub.db_limit_us)

    # ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _batches(self, deliveries: list[Delivery]) -> None:
        """A record that has failed before goes alone: one bad event must not fail the same batch again and again."""
        again = [[delivery] for delivery in deliveries if delivery.attempt > 1]
        fresh = [delivery for delivery in deliveries if delivery.attempt == 1]
        size = self.sub.batch or len(fresh)
        for batch in [*again, *(fresh[n : n + size] for n in range(0, len(fresh), size))]:
            if self._stopping or batch[0].lease.lost:
                self._release(batch)
            elif self.sub.kind == "db":
                answers, decoded = self._decoded(batch)
                await self._settle([*answers, *self._batch_in_transaction(decoded)])
                self.in_flight -= len(batch)
            else:
                self._answer_all(await self._handle_batch(batch))

    def _decoded(self, batch: list[Delivery]) -> tuple[list[Settlement], list[tuple[Delivery, Any]]]:
        failed: list[Settlement] = []
        decoded: list[tuple[Delivery, Any]] = []
        for delivery in batch:
            try:
                decoded.append((delivery, self.sub.decode(delivery.record)))
            except Exception as error:
                failed.append(self._failed(delivery, error))
        return failed, decoded

    def _batch_in_transaction(self, decoded: list[tuple[Delivery, Any]]) -> list[InTransaction]:
        if not decoded:
            return []
        deliveries = [delivery for delivery, _ in decoded]
        events = [event for _, event in decoded]
        return [
            InTransaction(
                deliveries,
                lambda db: self._batch_done(deliveries, events, self.sub.handler(events, db=db)),
                lambda error: [self._failed(delivery, error) for delivery in deliveries],
                self.sub.db_limit_us,
            )
        ]

    async def _handle_batch(self, batch: list[Delivery]) -> Iterable[Settlement]:
        failed, decoded = self._decoded(batch)
        if not decoded:
            return failed
        deliveries = [delivery for delivery, _ in decoded]
        events = [event for _, event in decoded]
        lane = Lane()
        lane.task = asyncio.ensure_future(self._call(events))
        if self.sub.timeout_us is not None:
            lane.deadline = time.monotonic() + self.sub.timeout_us / 1_000_000
        self._lanes.add(lane)
        try:
            await asyncio.wait([lane.task])
            if lane.timed_out:
                error = TimeoutError(f"the handler took longer than its timeout of {readable(self.sub.timeout_us or 0)}")
                return [*failed, *(self._failed(delivery, error) for delivery in deliveries)]
            return [*failed, *self._batch_done(deliveries, events, lane.task.result())]
        except Exception as error:
            return [*failed, *(self._failed(delivery, error) for delivery in deliveries)]
        except asyncio.CancelledError as error:
            if lane.task.cancelled():  # something it waited for was cancelled, not the handler
                return [*failed, *(self._failed(delivery, error) for delivery in deliveries)]
            lane.task.cancel()
            self._release(batch)
            raise
        finally:
            self._lanes.discard(lane)

    def _batch_done(self, deliveries: list[Delivery], events: list[Any], outcome: Any) -> list[Settlement]:
        """A batch returns events to publish and Failed items; what is published is emitted by the batch's last record."""
        items, effects = _sorted_out(outcome)
        if effects:
            raise BadOption("a handler of a batch returns no Effect: give it a `db` parameter, or take one event at a time")
        failed = {_index(item, events): item.error for item in items if isinstance(item, Failed)}
        emitted = [item for item in items if not isinstance(item, Failed)]
        settlements = [
            self._failed(delivery, _as_error(failed[n])) if n in failed else Settlement(delivery)
            for n, delivery in enumerate(deliveries)
        ]
        if emitted:
            settlements[-1].emits = self._emits(deliveries[-1], emitted)
        return settlements

    # ── answering ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _answer(self, answer: Answer) -> None:
        self._answers.append(answer)
        self.progress_at = time.monotonic()
        if len(self._answers) >= min(self.in_flight, CLAIM_RECORDS):
            self._send()
        elif self._coalescing is None:
            # What finishes within a few milliseconds is settled together: each settlement is a transaction.
            self._coalescing = asyncio.get_running_loop().call_later(COALESCE_S, self._send)

    def _answer_all(self, settlements: Iterable[Settlement]) -> None:
        for settlement in settlements:
            self._answer(settlement)

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
        task.add_done_callback(self._settles.discard)

    async def _settle(self, answers: Sequence[Answer]) -> None:
        try:
            settling = self._store.settle(self.name, answers)
        except LogError as error:
            self._back_off("settling", error)
            return
        await self._settled(settling)

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
    for delivery in deliveries:
        key = delivery.record.key
        by_key.setdefault(delivery.record.position if key is None else key, []).append(delivery)
    return by_key.values()


def _sorted_out(outcome: Any) -> tuple[list[object], list[Effect]]:
    """What a handler returned, as events to publish and effects to write."""
    if outcome is None:
        return [], []
    items = outcome if isinstance(outcome, (list, tuple)) else list(outcome) if inspect.isgenerator(outcome) else [outcome]
    effects = [item for item in items if isinstance(item, Effect)]
    return [item for item in items if item is not None and not isinstance(item, Effect)], effects


def _index(item: Failed, events: list[Any]) -> int:
    if isinstance(item.item, int) and not isinstance(item.item, bool):
        if 0 <= item.item < len(events):
            return item.item
    else:
        for n, event in enumerate(events):
            if event is item.item:
                return n
    raise BadOption(
        f"Failed({item.item!r}, ...) names no event of the batch: give the event itself or its index, 0 to {len(events) - 1}"
    )


def _said(error: BaseException) -> str:
    try:
        return _storable(str(error))
    except Exception as wrong:
        return f"(its message cannot be read: {type(wrong).__qualname__})"


def _storable(text: str) -> str:
    """Text without what is no UTF-8: an undecodable file name in a message must not keep it from being written."""
    return text.encode("utf-8", "backslashreplace").decode()


def _as_error(error: BaseException | str) -> BaseException:
    return error if isinstance(error, BaseException) else TrilogueError(error)
