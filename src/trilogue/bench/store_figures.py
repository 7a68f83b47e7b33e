"""What trilogue does as an event store, in events per second; each figure on a fresh log.

account-7   Deposited("7", 1, "salary"), Deposited("7", 2, "salary"), …      versions 1, 2, …; every side stores the same
"""

import asyncio
import time

import msgspec

from trilogue.aggregate import Aggregate
from trilogue.app import App
from trilogue.bench.durable import checked
from trilogue.bench.measured import Measured, check_stored
from trilogue.bench.place import Place
from trilogue.events import event
from trilogue.ports import Db

WRITERS = 64
PER_SAVE = 100
LOADS = 3
ACCOUNTS = 1_000  # of the read model
PER_ACCOUNT = 200
FILL = 20
TEXT = "salary"


@event("bench.deposited", key="account")
class Deposited(msgspec.Struct, frozen=True):
    """A typical small event."""

    account: str
    cents: int
    text: str


class Account(Aggregate, stream="account-{id}"):
    """A stream with one number for its state."""

    balance: int = 0

    def deposit(self, cents: int, text: str) -> None:
        """Emit one event."""
        self.emit(Deposited(self.id, cents, text))

    def apply(self, e: Deposited) -> None:
        """Fold one event."""
        self.balance += e.cents


def spread(events: int) -> tuple[int, int]:
    """How many accounts, and how many events each, make about so many events."""
    accounts = min(ACCOUNTS, max(1, events // PER_ACCOUNT))
    return accounts, events // accounts


def warm_up(events: int, per_save: int) -> int:
    """How many saves go before those that are measured: the write-ahead log grows until its first checkpoint, at 16 MB, and an
    fsync of a growing file takes up to three times as long as one of a file that is written again. A service is past that."""
    return min(400 if per_save == PER_SAVE else 2_100, events // per_save // 2)


async def save_one(at: Place, events: int) -> Measured:
    """An aggregate in hand: one event emitted and saved, one after the other."""
    return await _save(at, events, 1)


async def save_100(at: Place, events: int) -> Measured:
    """An aggregate in hand: 100 events emitted and saved, one save after the other."""
    return await _save(at, events, PER_SAVE)


async def _save(at: Place, events: int, per_save: int) -> Measured:
    async with at.app() as app:
        account, warm = Account("1"), warm_up(events, per_save)
        for _ in range(warm):
            await _deposit(app, account, per_save)
        began = time.perf_counter()
        for _ in range(events // per_save):
            await _deposit(app, account, per_save)
        rate = events // per_save * per_save / (time.perf_counter() - began)
        return await checked(at, app, rate, (events // per_save + warm) * per_save)


async def _deposit(app: App, account: Account, events: int) -> None:
    for n in range(events):
        account.deposit(n, TEXT)
    await app.save(account)


async def save_64_tasks(at: Place, events: int) -> Measured:
    """64 tasks, each saving one event after the other of its own aggregate."""
    each = events // WRITERS
    async with at.app() as app:
        accounts = [Account(str(n)) for n in range(WRITERS)]
        for account in accounts:
            await _deposit(app, account, 1)

        async def writer(account: Account) -> None:
            for _ in range(each):
                await _deposit(app, account, 1)

        began = time.perf_counter()
        await asyncio.gather(*map(writer, accounts))
        rate = each * WRITERS / (time.perf_counter() - began)
        return await checked(at, app, rate, (each + 1) * WRITERS)


async def rehydrate(at: Place, events: int) -> Measured:
    """Load an aggregate of so many events from the first one on, without a snapshot."""
    app = at.app()
    async with app:
        account = Account("1")
        for start in range(0, events, ACCOUNTS):
            await _deposit(app, account, min(ACCOUNTS, events - start))
    async with app:  # opened again: nothing of it is in a cache of ours or of SQLite's
        began = time.perf_counter()
        for _ in range(LOADS):
            loaded = await app.load(Account, "1")
        rate = LOADS * events / (time.perf_counter() - began)
        check_stored("trilogue", loaded.balance, account.balance)
        return await checked(at, app, rate, events)


async def project(at: Place, events: int) -> Measured:
    """Build a read model anew, a table of balances, from all events of many streams, beside the one that is there."""
    app = at.app()
    accounts, each = spread(events)
    async with app:
        await _fill(app, [Account(str(n)) for n in range(accounts)], each)
    async with _reader(at, 1).running() as reader:
        await reader.wait_idle()
    reader = _reader(at, 2)
    async with reader:
        began = time.perf_counter()
        async with reader.running():
            await reader.wait_idle()  # built, and switched to
            rate = accounts * each / (time.perf_counter() - began)
            [status] = await reader.projections()
        total = await reader.db("select sum(cents) from balances")
        check_stored("trilogue", total[0][0], accounts * each)
        check_stored("trilogue (its live version)", status.version if status.state == "live" else 0, 2)
        return await checked(at, reader, rate, accounts * each)


def _reader(at: Place, version: int) -> App:
    """A program with the read model in one version."""
    reader = at.app()

    @reader.projection(version=version, tables={"balances": "account text primary key, cents bigint not null"})
    def balances(es: list[Deposited], db: Db) -> None:
        db.executemany(
            "insert into {balances} values (?, ?) on conflict (account) do update set cents = {balances}.cents + excluded.cents",
            [(e.account, e.cents) for e in es],
        )

    return reader


async def _fill(app: App, accounts: list[Account], each: int) -> None:
    """A cent per event, the streams mixed as they would be."""
    for start in range(0, each, FILL):
        for account in accounts:
            for _ in range(min(FILL, each - start)):
                account.deposit(1, TEXT)
        await asyncio.gather(*map(app.save, accounts))
