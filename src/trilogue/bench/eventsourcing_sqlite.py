"""The library `eventsourcing` on SQLite, the best-known of Python: the same events through its public API.

Its defaults, which are no snapshots and no cache; events are classes, which is faster there than decorated methods. Every
connection it makes is told to be as durable as ours, and to write back as often.
"""

import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from uuid import UUID

from eventsourcing.application import Application, ProcessingEvent
from eventsourcing.domain import Aggregate
from eventsourcing.persistence import InfrastructureFactory, ProcessRecorder
from eventsourcing.sqlite import SQLiteCursor, SQLiteFactory, SQLiteProcessRecorder
from eventsourcing.system import Follower
from eventsourcing.utils import Environment

from trilogue.bench.measured import CHECKPOINT_PAGES, Measured, check_stored, pragmas_of, weakest
from trilogue.bench.place import Place
from trilogue.bench.store_figures import FILL, LOADS, PER_SAVE, TEXT, WRITERS, spread, warm_up

SIDE = "eventsourcing"
_UPSERT = "insert into balances values (?, ?) on conflict (account) do update set cents = cents + excluded.cents"


class Account(Aggregate):
    """A stream with one number for its state."""

    class Deposited(Aggregate.Event):
        """A typical small event."""

        cents: int
        text: str

        def apply(self, aggregate: Any) -> None:
            """Fold one event."""
            aggregate.balance += self.cents

    def __init__(self) -> None:
        self.balance = 0

    def deposit(self, cents: int, text: str) -> None:
        """Emit one event."""
        self.trigger_event(self.Deposited, cents=cents, text=text)


class _Durable:
    """Mixed into an application: whatever its default is, its connections wait for the disk."""

    synchronous_by_default = 0

    def construct_factory(self, env: Environment) -> Any:
        factory: Any = InfrastructureFactory.construct(env)
        pool = factory.datastore.pool
        create = pool._create_connection

        def durable() -> Any:
            connection = create()
            self.synchronous_by_default = _pragma(connection, "synchronous")
            _pragma(connection, "synchronous = full")
            _pragma(connection, f"wal_autocheckpoint = {CHECKPOINT_PAGES}")
            return connection

        pool._create_connection = durable
        return factory


class Bank(_Durable, Application[UUID]):
    """Saves and loads accounts."""


class BalancesRecorder(SQLiteProcessRecorder):
    """Writes the read model in the transaction that notes how far it has got."""

    def construct_create_table_statements(self) -> list[str]:
        """Its own tables and the read model."""
        read_model = "create table if not exists balances (account text primary key, cents integer not null)"
        return [*super().construct_create_table_statements(), read_model]

    def _insert_events(self, c: SQLiteCursor, stored_events: Sequence[Any], **kwargs: Any) -> Sequence[int] | None:
        if "deposited" in kwargs:
            c.execute(_UPSERT, kwargs["deposited"])
        return super()._insert_events(c, stored_events, **kwargs)


class Balances(_Durable, Follower[UUID]):
    """Follows the bank. Its projections proper need a subscription, which it does not have on SQLite."""

    def construct_recorder(self) -> ProcessRecorder:
        """One that keeps balances."""
        assert isinstance(self.factory, SQLiteFactory)
        recorder = BalancesRecorder(datastore=self.factory.datastore)
        recorder.create_table()
        return recorder

    def policy(self, domain_event: Any, processing_event: ProcessingEvent[UUID]) -> None:
        """Hand the change to the recorder."""
        if isinstance(domain_event, Account.Deposited):
            processing_event.collect_events(deposited=(domain_event.originator_id.hex, domain_event.cents))


def _environment(at: Place) -> dict[str, str]:
    return {
        "PERSISTENCE_MODULE": "eventsourcing.sqlite",
        "SQLITE_DBNAME": f"{at.folder}/eventsourcing-{time.monotonic_ns()}.db",
    }


def opened(bank: Application[UUID]) -> Account:
    """A new account."""
    account = Account()
    bank.save(account)
    return account


def deposit(bank: Application[UUID], account: Account, events: int) -> None:
    """So many events in one save."""
    for n in range(events):
        account.deposit(n, TEXT)
    bank.save(account)


def save_one(at: Place, events: int) -> Measured:
    """One event per save."""
    return _save(at, events, 1)


def save_100(at: Place, events: int) -> Measured:
    """100 events per save."""
    return _save(at, events, PER_SAVE)


def _save(at: Place, events: int, per_save: int) -> Measured:
    with Bank(env=_environment(at)) as bank:
        account, warm = opened(bank), warm_up(events, per_save)
        for _ in range(warm):
            deposit(bank, account, per_save)
        began = time.perf_counter()
        for _ in range(events // per_save):
            deposit(bank, account, per_save)
        rate = events // per_save * per_save / (time.perf_counter() - began)
        return _measured(bank, rate, (events // per_save + warm) * per_save + 1)


def save_64_tasks(at: Place, events: int) -> Measured:
    """64 aggregates, one save after the other or in 64 threads: whichever is faster."""
    return max(_save_in_turn(at, events), _save_in_threads(at, events), key=lambda measured: measured.rate)


def _save_in_turn(at: Place, events: int) -> Measured:
    with Bank(env=_environment(at)) as bank:
        accounts = [opened(bank) for _ in range(WRITERS)]
        began = time.perf_counter()
        for _ in range(events // WRITERS):
            for account in accounts:
                deposit(bank, account, 1)
        rate = events // WRITERS * WRITERS / (time.perf_counter() - began)
        return _measured(bank, rate, (events // WRITERS + 1) * WRITERS, "one after the other")


def _save_in_threads(at: Place, events: int) -> Measured:
    with Bank(env=_environment(at)) as bank, ThreadPoolExecutor(WRITERS) as threads:
        accounts = [opened(bank) for _ in range(WRITERS)]

        def writer(account: Account) -> None:
            for _ in range(events // WRITERS):
                deposit(bank, account, 1)

        began = time.perf_counter()
        list(threads.map(writer, accounts))
        rate = events // WRITERS * WRITERS / (time.perf_counter() - began)
        return _measured(bank, rate, (events // WRITERS + 1) * WRITERS, "64 threads")


def rehydrate(at: Place, events: int) -> Measured:
    """Load an aggregate of so many events."""
    environment = _environment(at)
    with Bank(env=environment) as bank:
        account = opened(bank)
        deposit(bank, account, events)
    with Bank(env=environment) as bank:
        began = time.perf_counter()
        for _ in range(LOADS):
            loaded: Account = bank.repository.get(account.id)
        rate = LOADS * events / (time.perf_counter() - began)
        check_stored(SIDE, loaded.balance, account.balance)
        return _measured(bank, rate, events + 1)


def project(at: Place, events: int) -> Measured:
    """Build a table of balances with a Follower, which handles and commits one event after the other."""
    accounts, each = spread(events)
    with Bank(env=_environment(at)) as bank, Balances(env=_environment(at)) as balances:
        _fill(bank, [opened(bank) for _ in range(accounts)], each)
        balances.follow(bank.name, bank.notification_log)
        began = time.perf_counter()
        balances.pull_and_process(bank.name)
        rate = accounts * each / (time.perf_counter() - began)
        check_stored(SIDE, _one(balances, "select sum(cents) from balances"), accounts * each)
        return _measured(balances, rate, 0, "a Follower")


def _fill(bank: Bank, accounts: list[Account], each: int) -> None:
    for start in range(0, each, FILL):
        for account in accounts:
            for _ in range(min(FILL, each - start)):
                account.deposit(1, TEXT)
        bank.save(*accounts)


def _one(application: Any, query: str) -> Any:
    with application.factory.datastore.transaction(commit=False) as cursor:
        cursor.execute(query)
        return cursor.fetchone()[0]


def _pragma(connection: Any, pragma: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(f"pragma {pragma}")
        row = cursor.fetchone()
        return row and row[0]


def _measured(application: Any, rate: float, stored: int, way: str = "") -> Measured:
    check_stored(SIDE, _one(application, "select count(*) from stored_events"), stored)
    connections = list(application.factory.datastore.pool._pool)
    found = [pragmas_of(partial(_pragma, connection), sqlite3.sqlite_version) for connection in connections]
    return Measured(rate, weakest(found) | {"synchronous_by_default": application.synchronous_by_default}, way)
