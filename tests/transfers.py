"""What the tests of processes share: a transfer that withdraws, deposits, and goes back when it cannot or hangs."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from common import all_of

from trilogue import App, Cancel, End, Process, ProcessInstance, Query, Timer, event, reacts, starts, timer

GROUP = "process.transfer"


@event("transfer.requested", key="transfer")
@dataclass(frozen=True)
class Requested:
    transfer: str
    amount: int
    patience: str = "1h"


@event("transfer.withdraw", key="transfer")
@dataclass(frozen=True)
class Withdraw:
    transfer: str
    amount: int


@event("transfer.withdrawn", key="account")
@dataclass(frozen=True)
class Withdrawn:
    """Keyed by the account it happened to; many a withdrawal belongs to no transfer."""

    transfer: str | None
    account: str = "a"


@event("transfer.deposit", key="transfer")
@dataclass(frozen=True)
class Deposit:
    transfer: str
    amount: int


@event("transfer.deposited", key="transfer")
@dataclass(frozen=True)
class Deposited:
    transfer: str


@event("transfer.refused", key="transfer")
@dataclass(frozen=True)
class Refused:
    transfer: str
    why: str


@event("transfer.prolonged", key="transfer")
@dataclass(frozen=True)
class Prolonged:
    transfer: str
    patience: str


@event("transfer.refund", key="transfer")
@dataclass(frozen=True)
class Refund:
    transfer: str
    amount: int
    why: str


TAKEN = Requested | Withdrawn | Deposited | Refused | Prolonged


class Transfer(Process, key="transfer", name="transfer"):
    amount: int = 0
    asked: int = 0
    seen: list[str] = field(default_factory=list)

    @starts
    def requested(self, e: Requested) -> Iterator[object]:
        self.amount = e.amount
        self.asked += 1
        yield Withdraw(self.id, e.amount)
        yield Timer("stuck", after=e.patience)

    @reacts
    def withdrawn(self, e: Withdrawn) -> Deposit:
        self.seen.append(e.account)
        return Deposit(self.id, self.amount)

    @reacts
    def prolonged(self, e: Prolonged) -> Timer | Cancel:
        return Timer("stuck", after=e.patience) if e.patience else Cancel("stuck")

    @reacts
    def over(self, e: Deposited | Refused) -> list[object]:
        if isinstance(e, Deposited):
            return [End()]
        return [Refund(self.id, self.amount, e.why), End()]

    @timer("stuck")
    def hangs(self) -> Iterator[object]:
        self.seen.append("stuck")
        yield Refund(self.id, self.amount, "stuck")
        yield None if self.seen.count("stuck") > 2 else Timer("stuck", after="2h")


MOODS: dict[str, list[BaseException]] = {}


class Moody(Process, key="transfer", name="transfer"):
    """Fails as MOODS says, after it has changed its state and said things."""

    steps: list[str] = field(default_factory=list)

    @starts
    def requested(self, e: Requested) -> Iterator[object]:
        self.steps.append("requested")
        yield Timer("stuck", after="1h")
        yield Withdraw(self.id, e.amount)
        if MOODS.get(self.id):
            raise MOODS[self.id].pop()

    @reacts
    def deposited(self, e: Deposited) -> None:
        self.steps.append("deposited")

    @timer("stuck")
    def hangs(self) -> End:
        return End()


def transfers(url: str, model: type[Process] = Transfer, **options: Any) -> App:
    app = App(url)
    app.process(model, **options)
    return app


async def handled(app: App, *events: object) -> list[ProcessInstance]:
    """The instances after these events."""
    await app.publish_many(events)
    await app.wait_idle(timeout="20s")
    return await app.processes()


async def types(app: App) -> list[str]:
    return [record.type.removeprefix("transfer.") for record in await all_of(app)]


async def said(app: App, kind: str) -> bool:
    return bool(await app.store.read(Query(types=(f"transfer.{kind}",), limit=1)))


async def until(happened: Callable[[], Awaitable[bool]]) -> None:
    while not await happened():
        await asyncio.sleep(0.005)


async def fire(app: App) -> None:
    """Let every timer of the log be due now."""
    for each in await app.store.timers():
        await app.publish(each.envelope)
    await app.wait_idle(timeout="20s")
