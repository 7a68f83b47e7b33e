"""A money transfer between two accounts, as a process: two legs, a way back, and a time-out.

    TransferRequested ─▶ take ──MoneyTaken──▶ give ──MoneyGiven────────────▶ TransferCompleted
                          │                    └──LegRefused──▶ return ───▶ TransferFailed
                          └──LegRefused──────────────────────────────────▶ TransferFailed
    no answer in 15 min ─▶ RecallMoney: a leg and its recall are one decision, so whichever comes first counts

The process decides what comes next; the Teller moves money, each leg in the stream of its account. Target and source might as
well be kept by two banks: nothing here needs them in one transaction.
"""

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from trilogue import App, Cancel, End, Process, Retry, Timer, event, reacts, starts, timer
from trilogue.apps.bank.account import Account
from trilogue.apps.bank.errors import BankError
from trilogue.apps.bank.money import ZERO

PATIENCE = "15m"
ATTEMPTS = 100  # an account everybody pays at is contended: better to decide again here than to be handled again
UNCLAIMED = "UNCLAIMED"  # the account for money whose owner has closed theirs
RETRY = Retry(25, "20ms..30s")
AT_ONCE = 64
Leg = Literal["take", "give", "return"]


# ── what is asked, what is answered ──────────────────────────────────────────────────────────────────────────────────


@event("transfer.requested", key="transfer")
@dataclass(frozen=True, slots=True)
class TransferRequested:
    """Somebody wants money moved. transfer: its number; the same number is the same transfer."""

    transfer: str
    source: str
    target: str
    amount: Decimal


@event("transfer.take", key="account")
@dataclass(frozen=True, slots=True)
class TakeMoney:
    """Command: withdraw from the source. other: the account at the other end."""

    transfer: str
    account: str
    amount: Decimal
    other: str


@event("transfer.give", key="account")
@dataclass(frozen=True, slots=True)
class GiveMoney:
    """Command: deposit to the target."""

    transfer: str
    account: str
    amount: Decimal
    other: str


@event("transfer.return", key="account")
@dataclass(frozen=True, slots=True)
class ReturnMoney:
    """Command: deposit to the source what was taken."""

    transfer: str
    account: str
    amount: Decimal
    other: str


@event("transfer.recall", key="account")
@dataclass(frozen=True, slots=True)
class RecallMoney:
    """Command: see to it that a leg that has not answered never happens, unless it has."""

    transfer: str
    account: str
    leg: Leg


@event("transfer.taken", key="transfer")
@dataclass(frozen=True, slots=True)
class MoneyTaken:
    """The source has paid."""

    transfer: str


@event("transfer.given", key="transfer")
@dataclass(frozen=True, slots=True)
class MoneyGiven:
    """The target has been paid."""

    transfer: str


@event("transfer.returned", key="transfer")
@dataclass(frozen=True, slots=True)
class MoneyReturned:
    """The source has its money back, or the account for unclaimed money has it."""

    transfer: str
    account: str


@event("transfer.refused", key="transfer")
@dataclass(frozen=True, slots=True)
class LegRefused:
    """A leg will not happen, and why."""

    transfer: str
    leg: Leg
    why: str


@event("transfer.completed", key="transfer")
@dataclass(frozen=True, slots=True)
class TransferCompleted:
    """The money is where it should go."""

    transfer: str
    source: str
    target: str
    amount: Decimal


@event("transfer.failed", key="transfer")
@dataclass(frozen=True, slots=True)
class TransferFailed:
    """The money is where it was."""

    transfer: str
    source: str
    target: str
    amount: Decimal
    reason: str


# ── what comes next ──────────────────────────────────────────────────────────────────────────────────────────────────


class MoneyTransfer(Process, key="transfer", name="transfer"):
    """One transfer. leg: what it waits for. An answer it does not wait for has come twice, or too late: it is passed over."""

    source: str = ""
    target: str = ""
    amount: Decimal = ZERO
    leg: Leg = "take"
    why: str = ""

    @starts
    def requested(self, e: TransferRequested) -> Iterator[object]:
        """Take the money from the source."""
        if self.source:
            return
        self.source, self.target, self.amount = e.source, e.target, e.amount
        yield TakeMoney(self.id, self.source, self.amount, self.target)
        yield Timer("hangs", after=PATIENCE)

    @reacts
    def taken(self, e: MoneyTaken) -> Iterator[object]:
        """Give it to the target."""
        if self.leg != "take":
            return
        self.leg = "give"
        yield GiveMoney(self.id, self.target, self.amount, self.source)
        yield Timer("hangs", after=PATIENCE)

    @reacts
    def given(self, e: MoneyGiven) -> Iterator[object]:
        """That was it."""
        if self.leg == "give":
            yield TransferCompleted(self.id, self.source, self.target, self.amount)
            yield End()

    @reacts
    def refused(self, e: LegRefused) -> Iterator[object]:
        """Give back what was taken; if nothing was, that was it."""
        if e.leg != self.leg:
            return
        self.why = e.why
        if self.leg == "take":
            yield self._failed()
            yield End()
        else:
            self.leg = "return"
            yield ReturnMoney(self.id, self.source, self.amount, self.target)
            yield Cancel("hangs")

    @reacts
    def returned(self, e: MoneyReturned) -> Iterator[object]:
        """Everything is as it was."""
        if self.leg == "return":
            yield self._failed()
            yield End()

    @timer("hangs")
    def hangs(self) -> Iterator[object]:
        """Nobody answers: recall what was asked. The answer to that decides."""
        if self.leg != "return":
            yield RecallMoney(self.id, self.source if self.leg == "take" else self.target, self.leg)

    def _failed(self) -> TransferFailed:
        return TransferFailed(self.id, self.source, self.target, self.amount, self.why)


# ── who moves the money ──────────────────────────────────────────────────────────────────────────────────────────────


class Teller:
    """Carries out the commands, each leg of a transfer once, whatever is delivered again.

    app: where the accounts are; the commands are handled by it. conflicts: how often somebody else was faster at an account.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.conflicts = 0
        commands: dict[str, Callable[..., Coroutine[Any, Any, object]]] = {
            "take": self.take,
            "give": self.give,
            "return": self.give_back,
            "recall": self.recall,
        }
        for name, handler in commands.items():
            app.on(group=f"bank.{name}", retry=RETRY, concurrency=AT_ONCE)(handler)

    async def take(self, e: TakeMoney) -> MoneyTaken | LegRefused:
        """Withdraw from the source."""
        why = await self._once(
            e.transfer, "take", e.account, lambda a: a.withdraw(e.amount, f"to {e.other}", transfer=e.transfer)
        )
        return MoneyTaken(e.transfer) if why is None else LegRefused(e.transfer, "take", why)

    async def give(self, e: GiveMoney) -> MoneyGiven | LegRefused:
        """Deposit to the target."""
        why = await self._once(
            e.transfer, "give", e.account, lambda a: a.deposit(e.amount, f"from {e.other}", transfer=e.transfer)
        )
        return MoneyGiven(e.transfer) if why is None else LegRefused(e.transfer, "give", why)

    async def give_back(self, e: ReturnMoney) -> MoneyReturned:
        """Deposit to the source; if that was closed meanwhile, to the account for unclaimed money."""

        def deposit(account: Account) -> None:
            if account.id == UNCLAIMED and account.status == "new":
                account.create()
            account.deposit(e.amount, f"back from {e.other}", transfer=e.transfer)

        account = e.account
        if await self._once(e.transfer, "return", account, deposit) is not None:
            account = UNCLAIMED
            await self._once(e.transfer, "return", account, deposit)
        return MoneyReturned(e.transfer, account)

    async def recall(self, e: RecallMoney) -> MoneyTaken | MoneyGiven | LegRefused:
        """Decide that the leg does not happen; if it was decided before, say how."""
        why = await self._once(e.transfer, e.leg, e.account, lambda a: a.recall(e.transfer, e.leg))
        if why is not None:
            return LegRefused(e.transfer, e.leg, why)
        return MoneyTaken(e.transfer) if e.leg == "take" else MoneyGiven(e.transfer)

    async def _once(self, transfer: str, leg: Leg, account: str, act: Callable[[Account], None]) -> str | None:
        """Why a leg does not happen, None if it did. The first answer is stored with the account and given ever after."""
        tries, leg_name = 0, f"{transfer} {leg}"

        def decide(loaded: Account) -> str | None:
            nonlocal tries
            tries += 1
            try:
                # Answers are kept for a week, a recall is for good: a command that comes even later finds it here.
                if leg_name not in loaded.recalled:
                    act(loaded)
            except BankError as error:
                return str(error)
            return f"account {account} did not answer within {PATIENCE}" if leg_name in loaded.recalled else None

        try:
            why: str | None = (await self.app.decide(Account, account, decide, once=leg_name, attempts=ATTEMPTS)).answer
        finally:
            self.conflicts += max(0, tries - 1)
        return why


async def request_transfer(app: App, transfer: str, source: str, target: str, amount: Decimal) -> None:
    """Ask for a transfer; durable when it returns.

    transfer: its number. Asking again with the same number and content adds nothing; with other content it raises Conflict.
    """
    # In a transaction it enters the bank's books, its store, first; a broker gets it from there. Auditors read the books.
    async with app.transaction() as books:
        books.publish(app.envelope(TransferRequested(transfer, source, target, amount), id=f"transfer {transfer}"))
