"""A load for the bank: who pays whom, made from a seed, asked for by many writers in several processes.

    process 0 ─ writers ─▶ TransferRequested …                the first, third, fifth … order
    process 1 ─ writers ─▶ …                                  the others; if it dies, process 0 asks for its share again,
                                                              which adds only what is missing

Of a hundred transfers three go to an account that is closed, three to one that never was, and two ask for more than there is.
"""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice

from trilogue import App
from trilogue.apps.bank.account import Account
from trilogue.apps.bank.money import from_cents
from trilogue.apps.bank.transfer import request_transfer

FIRST = Decimal(1000)
LIMIT = Decimal(200)
CLOSED = ("CLOSED1", "CLOSED2")
ABSENT = ("NOBODY1", "NOBODY2")
NOWHERE = 0.03  # to closed accounts, and as many to absent ones
TOO_MUCH = 0.02
HOT, HOT_SHARE = 4, 0.3  # three transfers in ten go to one of so many accounts, as to a shop, and three come from one
OPENING_AT_ONCE = 64
ASKED = b"asked"  # what a process says when its share is asked for


@dataclass(frozen=True, slots=True)
class Load:
    """How much. accounts, transfers: numbers. writers: in all processes together. processes: how many there are."""

    accounts: int
    transfers: int
    writers: int
    processes: int
    seed: int


@dataclass(frozen=True, slots=True)
class Order:
    """One transfer to ask for."""

    transfer: str
    source: str
    target: str
    amount: Decimal


def orders(load: Load) -> Iterator[Order]:
    """All transfers; the same for the same load."""
    rng = random.Random(f"{load.seed} {load.accounts}")
    for n in range(load.transfers):
        source, target = rng.sample(range(load.accounts), 2)
        hot, dice = rng.randrange(HOT), rng.random()
        if hot < load.accounts and hot not in (source, target):
            source, target = (source, hot) if dice < HOT_SHARE else (hot, target) if dice > 1 - HOT_SHARE else (source, target)
        amount = from_cents(rng.randint(1, 10_000) if rng.random() > TOO_MUCH else rng.randint(200_000, 400_000))
        yield Order(f"{load.seed}-{load.accounts}-{n:07d}", name(source), _target(rng, target), amount)


def _target(rng: random.Random, target: int) -> str:
    dice = rng.random()
    return rng.choice(CLOSED) if dice < NOWHERE else rng.choice(ABSENT) if dice < 2 * NOWHERE else name(target)


def name(number: int) -> str:
    """The account with a number, from 0."""
    return f"A{number + 1:05d}"


async def open_accounts(app: App, accounts: int) -> None:
    """Open those that are not open yet; two more are opened and closed."""
    names = [*map(name, range(accounts)), *CLOSED]
    for start in range(0, len(names), OPENING_AT_ONCE):
        await asyncio.gather(*(_open(app, account) for account in names[start : start + OPENING_AT_ONCE]))


async def _open(app: App, account: str) -> None:
    def decide(a: Account) -> None:
        if a.status == "new":
            a.create(0 if account in CLOSED else FIRST, LIMIT)
        if a.status == "open" and account in CLOSED:
            a.close()

    await app.decide(Account, account, decide)


async def write(app: App, load: Load, process: int) -> None:
    """Ask for this process's share of the transfers. process: its number, from 0."""
    share = islice(orders(load), process, None, load.processes)
    writers = max(1, load.writers // load.processes)
    await asyncio.gather(*(_write(app, share) for _ in range(writers)))


async def _write(app: App, share: Iterator[Order]) -> None:
    """One writer: takes the next order that no other has taken, until there is none."""
    for order in share:
        await request_transfer(app, order.transfer, order.source, order.target, order.amount)
