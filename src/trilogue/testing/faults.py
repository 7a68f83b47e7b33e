"""What goes wrong on purpose, and where it is put in.

    handler ──raises, loses its lease, comes again──▶ answer ──▶ settle ──the worker dies──▶ the real store

Faults of a group are a queue: each call takes the first, in the order in which they were asked for.
"""

import asyncio
import dataclasses
import functools
import inspect
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trilogue.builds import projection_of
from trilogue.errors import Later, TrilogueError
from trilogue.events import Delivery, Group, InTransaction, Settlement
from trilogue.handlers import Subscription
from trilogue.ports import Store
from trilogue.testing import inside

Answer = Settlement | InTransaction
Kind = Literal["fail", "lose", "again", "crash"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that will go wrong. error: what the handler raises, for kind "fail"."""

    kind: Kind
    error: BaseException | type[BaseException] | None = None


def fault_key(group: str) -> str:
    """Whose faults a group takes: those of a projection go from one build to the next."""
    name = projection_of(group)
    return group if name is None else f"projection.{name}"


class Died(TrilogueError):
    """The worker died inside a transaction: nothing of it happens."""


class FaultyStore:
    """A store that counts what is out at its worker and breaks what it was told to break; the rest is the real one's.

    is_dead: its worker has died; it lends and settles nothing until rise(). over: set when it died, or is to end.
    """

    def __init__(self, real: Store) -> None:
        self.real = real
        self.groups: set[str] = set()
        self.out: Counter[str] = Counter()
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.is_dead = False
        self.over = asyncio.Event()
        self._stays_open = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    # ── the faults ───────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, group: str, *kinds: Kind) -> Fault | None:
        """The next fault of a group, if it is of one of these kinds."""
        waiting = self.faults[fault_key(group)]
        return waiting.popleft() if waiting and waiting[0].kind in kinds else None

    async def rise(self) -> None:
        """A new worker comes in the place of the one that died."""
        await inside.bury(self.real)
        self.out = Counter()
        self.over.clear()
        self.is_dead, self._stays_open = False, True

    # ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Open it, unless it was left open by a worker that died."""
        if not self._stays_open:
            await self.real.open()
        self._stays_open = False

    async def close(self) -> None:
        """Close it, unless its worker died: the dead close nothing."""
        if not self.is_dead:
            await self.real.close()

    async def leave(self) -> None:
        """Hand back what is out, unless its worker died: the dead hand back nothing."""
        if not self.is_dead:
            await self.real.leave()

    async def bind(self, groups: Sequence[Group], *, work: bool = True) -> None:
        """Declare groups."""
        await self.real.bind(groups, work=work)
        self.groups |= {group.name for group in groups if work}

    async def unbind(self, group: str) -> None:
        """Stop working for one group."""
        await self.real.unbind(group)
        self.groups.discard(group)

    async def claim(self, group: str, *, limit: int, wait_s: float) -> list[Delivery]:
        """Lend deliveries, and count them."""
        deliveries = [] if self.is_dead else await self.real.claim(group, limit=limit, wait_s=wait_s)
        if self.is_dead:
            await asyncio.Event().wait()  # until its task is cancelled
        self.out[group] += len(deliveries)
        return deliveries

    def settle(self, group: str, answers: Sequence[Answer]) -> Awaitable[list[Delivery]]:
        """Answer deliveries, as the faults say."""
        if self.is_dead or any(self._crashes(group, answer) for answer in answers):
            return _lost(answers)
        count = len(_deliveries(answers))
        if any(isinstance(answer, InTransaction) for answer in answers) and self.take(group, "lose"):
            return self._counted(group, count, self._robbed(group, answers), answers)
        try:
            settling = self.real.settle(group, answers)
        except BaseException:
            self.out[group] -= count
            raise
        return self._counted(group, count, settling, answers)

    def _counted(
        self, group: str, count: int, settling: Awaitable[list[Delivery]], answers: Sequence[Answer]
    ) -> Awaitable[list[Delivery]]:
        # A task of its own: who waits for it may be cancelled, and an error that nobody looks at is logged.
        task = asyncio.create_task(self._settled(group, count, self.out, settling, answers))
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        return asyncio.shield(task)

    async def _robbed(self, group: str, answers: Sequence[Answer]) -> list[Delivery]:
        await inside.take_slots(self.real, group)
        return await self.real.settle(group, answers)

    async def _settled(
        self, group: str, count: int, out: Counter[str], settling: Awaitable[list[Delivery]], answers: Sequence[Answer]
    ) -> list[Delivery]:
        try:
            return await settling
        except Died:
            self.over.set()
            return _deliveries(answers)
        finally:
            out[group] -= count

    def _crashes(self, group: str, answer: Answer) -> bool:
        """Whether the worker dies now: the work was done, and the log does not learn of it."""
        if isinstance(answer, InTransaction):
            self._crash_inside(group, answer)
        elif answer.verdict == "done" and self.take(group, "crash"):
            self.is_dead = True
            self.over.set()
        return self.is_dead

    def _crash_inside(self, group: str, work: InTransaction) -> None:
        """Let the effect happen; then, if the worker dies, undo it with everything else of its settlement."""
        run, failed = work.run, work.failed

        def run_then_die(db: Any) -> Sequence[Settlement]:
            settlements = run(db)
            if self.take(group, "crash"):
                self.is_dead = True
                raise Died
            return settlements

        def died(error: Exception) -> Sequence[Settlement]:
            if isinstance(error, Died):
                raise error
            return failed(error)

        work.run, work.failed = run_then_die, died

    # ── the handlers ─────────────────────────────────────────────────────────────────────────────────────────────────

    def surround(self, sub: Subscription) -> Subscription:
        """The subscription, with faults before and after its handler."""
        # In a transaction no lease can be lost, the write lock is held: it is taken away before, in settle().
        kinds: tuple[Kind, ...] = ("fail",) if sub.kind == "db" else ("fail", "lose")
        before = functools.partial(self._before, sub.group.name, kinds)
        after = functools.partial(self._after, sub.group.name)
        return dataclasses.replace(sub, handler=_surrounded(sub, before, after))

    def _before(self, group: str, kinds: Sequence[Kind]) -> Awaitable[None] | None:
        """Raise what the next fault says, or take the slots away: something to wait for."""
        fault = self.take(group, *kinds)
        if fault is None:
            return None
        if fault.error is not None:
            raise fault.error
        return inside.take_slots(self.real, group)

    def _after(self, group: str) -> None:
        """The work is done; if the next fault says so, what comes of it is dropped and the record comes again, uncharged."""
        if self.take(group, "again"):
            raise Later("0s")


def _surrounded(sub: Subscription, before: Callable[[], Awaitable[None] | None], after: Callable[[], None]) -> Callable[..., Any]:
    handler = sub.handler
    loop = asyncio.get_running_loop()

    @functools.wraps(handler)
    async def collected(event: Any, **extra: Any) -> Any:
        if (first := before()) is not None:
            await first
        async for emitted in handler(event, **extra):
            yield emitted
        after()

    @functools.wraps(handler)
    async def awaited(event: Any, **extra: Any) -> Any:
        if (first := before()) is not None:
            await first
        outcome = await handler(event, **extra)
        after()
        return outcome

    @functools.wraps(handler)
    def called(event: Any, **extra: Any) -> Any:
        if (first := before()) is not None:
            asyncio.run_coroutine_threadsafe(_all_of(first), loop).result()
        outcome = handler(event, **extra)
        outcome = list(outcome) if inspect.isgenerator(outcome) else outcome
        after()
        return outcome

    if inspect.isasyncgenfunction(handler):
        return collected
    return awaited if sub.kind == "async" else called


async def _all_of(first: Awaitable[None]) -> None:
    await first


def _deliveries(answers: Sequence[Answer]) -> list[Delivery]:
    return [d for a in answers for d in ((a.delivery,) if isinstance(a, Settlement) else a.deliveries)]


async def _lost(answers: Sequence[Answer]) -> list[Delivery]:
    return _deliveries(answers)
