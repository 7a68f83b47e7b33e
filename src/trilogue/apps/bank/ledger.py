"""The auditor: folds the whole log again in plain Python, and compares everything else with that.

    log ──fold──▶ Ledger: per account its balance, limit, version, lines; per transfer what was taken, given and returned
                     │
                     └──▶ invariants: {"money_neither_made_nor_lost": True, …}

It shares no code with the accounts and the projections: what is wrong there must not be wrong here too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trilogue import App, Record
from trilogue.apps.bank.events import (
    AccountClosed,
    AccountCreated,
    AccountEvent,
    FeeCharged,
    InterestPaid,
    MoneyDeposited,
    MoneyWithdrawn,
)
from trilogue.apps.bank.money import cents
from trilogue.apps.bank.transfer import TransferCompleted, TransferFailed, TransferRequested

TYPES = ("account.*", "transfer.requested", "transfer.completed", "transfer.failed")
DAY_US = 86_400_000_000


@dataclass(slots=True)
class Book:
    """One account, in cents. gap: its versions did not count 1, 2, 3. wrong: an event said another balance than was there."""

    cents: int = 0
    limit: int = 0
    status: str = "new"
    version: int = 0
    gap: bool = False
    wrong: bool = False
    lowest: int = 0


@dataclass(slots=True)
class Ledger:
    """What the log says. paid_in, paid_out: at the counter. lines, days: as the tables have them. All in cents.

    reasons: why transfers failed.
    """

    books: dict[str, Book] = field(default_factory=dict)
    paid_in: int = 0
    paid_out: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    given: Counter[str] = field(default_factory=Counter)
    requested: dict[str, int] = field(default_factory=dict)
    completed: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    lines: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    days: dict[int, list[int]] = field(default_factory=dict)


async def read_ledger(app: App) -> Ledger:
    """Fold the whole log."""
    ledger = Ledger()
    async for record in app.history(types=TYPES):
        match event := app.decode(record):
            case TransferRequested():
                ledger.requested[event.transfer] = cents(event.amount)
            case TransferCompleted():
                ledger.completed[event.transfer] += 1
            case TransferFailed():
                ledger.failed[event.transfer] += 1
                ledger.reasons.append(event.reason)
            case _ if record.stream is not None:
                enter(ledger, record, event)
    return ledger


def enter(ledger: Ledger, record: Record, event: AccountEvent) -> None:
    """Take down one event of an account."""
    book = ledger.books.setdefault(event.account, Book())
    before = book.cents
    _move(ledger, book, event)
    book.gap = book.gap or record.version != book.version + 1
    book.wrong = book.wrong or _said_before(event) != before
    book.version = record.version or 0
    book.lowest = min(book.lowest, book.cents + book.limit)
    moved = book.cents - before
    ledger.lines.append((event.account, book.version, record.recorded_us, moved, book.cents))
    if getattr(event, "transfer", None) is None:
        day = ledger.days.setdefault(record.recorded_us // DAY_US, [0, 0, 0])
        day[0] += max(moved, 0)
        day[1] += max(-moved, 0)
        day[2] += 1
        ledger.paid_in += max(moved, 0)
        ledger.paid_out += max(-moved, 0)


def _move(ledger: Ledger, book: Book, event: AccountEvent) -> None:
    match event:
        case AccountCreated():
            book.cents, book.limit, book.status = cents(event.initial_deposit), cents(event.overdraft_limit), "open"
        case MoneyDeposited():
            book.cents += cents(event.amount)
            ledger.given[event.transfer or ""] += cents(event.amount)
        case MoneyWithdrawn():
            book.cents -= cents(event.amount)
            ledger.taken[event.transfer or ""] += cents(event.amount)
        case InterestPaid():
            book.cents += cents(event.amount)
        case FeeCharged():
            book.cents -= cents(event.amount)
        case AccountClosed():
            book.cents, book.status = 0, "closed"


def _said_before(event: AccountEvent) -> int:
    match event:
        case AccountCreated():
            return 0
        case AccountClosed():
            return cents(event.final_balance)
        case _:
            return cents(event.before)


# ── what must be true ────────────────────────────────────────────────────────────────────────────────────────────────


async def check(app: App, ledger: Ledger | None = None) -> dict[str, bool]:
    """What must be true of a bank in which nothing is under way, and whether it is. ledger: if it has been read already."""
    ledger = ledger or await read_ledger(app)
    return {
        "money_neither_made_nor_lost": money_is_kept(ledger),
        "no_balance_below_limit": all(book.lowest >= 0 for book in ledger.books.values()),
        "versions_without_gaps": not any(book.gap for book in ledger.books.values()),
        "every_projection_equals_a_fold_of_the_log": await tables_agree(app, ledger),
        "every_transfer_ended": every_transfer_ended(ledger),
    }


def money_is_kept(ledger: Ledger) -> bool:
    """What was paid in and not out is in the accounts; what a transfer took it has given, here or there, once."""
    held = sum(book.cents for book in ledger.books.values())
    legs_are_even = all(
        ledger.taken[transfer] == ledger.given[transfer] == (0 if transfer not in ledger.taken else amount)
        for transfer, amount in ledger.requested.items()
    )
    nothing_else = (ledger.taken.keys() | ledger.given.keys()) - {""} <= ledger.requested.keys()
    told_right = not any(book.wrong for book in ledger.books.values())
    return held == ledger.paid_in - ledger.paid_out and legs_are_even and nothing_else and told_right


def every_transfer_ended(ledger: Ledger) -> bool:
    """Each transfer has completed or failed, one of them, once; nothing else has."""
    ended = ledger.completed + ledger.failed
    return ended.keys() == ledger.requested.keys() and all(count == 1 for count in ended.values())


def _opened(ledger: Ledger) -> list[tuple[str, Book]]:
    return [(account, book) for account, book in sorted(ledger.books.items()) if book.status != "new"]


async def tables_agree(app: App, ledger: Ledger) -> bool:
    """Balances, statements and days are what the log says."""
    balances = [(account, book.cents, book.limit, book.status) for account, book in _opened(ledger)]
    days = [(day, *sums) for day, sums in sorted(ledger.days.items())]
    tables: Sequence[tuple[str, list[Any]]] = (
        ("select account, cents, limit_cents, status from balances", balances),
        ("select account, line, at_us, cents, balance_cents from statements", sorted(ledger.lines)),
        ("select day, deposited_cents, withdrawn_cents, movements from days", days),
    )
    # Sorted here: databases do not agree on the order of texts.
    return all([sorted(await app.db(sql)) == rows for sql, rows in tables])
