"""The library `eventsourcing` on PostgreSQL: the same events and the same application as on SQLite, by its own defaults."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID

from eventsourcing.application import Application

from trilogue.bench.eventsourcing_sqlite import Account, deposit, opened
from trilogue.bench.measured import Measured, check_stored
from trilogue.bench.place import Place
from trilogue.bench.raw_psycopg import READ_BACK, create_schema, database_of
from trilogue.bench.store_figures import LOADS, PER_SAVE, WRITERS

SIDE = "eventsourcing"


@contextmanager
def _bank(at: Place, *, functions: bool = False) -> Iterator[Application[UUID]]:
    """functions: an insert is a function in the database, one round trip; not so by default."""
    create_schema(at)
    environment = {f"POSTGRES_{name}": word for name, word in database_of(at).items()}
    environment |= {"PERSISTENCE_MODULE": "eventsourcing.postgres", "POSTGRES_SCHEMA": at.name}
    with Application[UUID](env=environment | {"POSTGRES_ENABLE_DB_FUNCTIONS": "y" if functions else "n"}) as bank:
        yield bank


def save_one(at: Place, events: int) -> Measured:
    """One event per save."""
    return _save(at, events, 1)


def save_one_by_functions(at: Place, events: int) -> Measured:
    """One event per save, with POSTGRES_ENABLE_DB_FUNCTIONS."""
    return _save(at, events, 1, functions=True)


def save_100(at: Place, events: int) -> Measured:
    """100 events per save."""
    return _save(at, events, PER_SAVE)


def _save(at: Place, events: int, per_save: int, *, functions: bool = False) -> Measured:
    with _bank(at, functions=functions) as bank:
        account = opened(bank)
        began = time.perf_counter()
        for _ in range(events // per_save):
            deposit(bank, account, per_save)
        rate = events // per_save * per_save / (time.perf_counter() - began)
        return _measured(bank, rate, events // per_save * per_save + 1)


def save_64_tasks(at: Place, events: int) -> Measured:
    """64 aggregates, one save after the other or in 64 threads: whichever is faster."""
    return _faster(at, events, functions=False)


def save_64_tasks_by_functions(at: Place, events: int) -> Measured:
    """64 aggregates in the faster of both ways, with POSTGRES_ENABLE_DB_FUNCTIONS."""
    return _faster(at, events, functions=True)


def _faster(at: Place, events: int, *, functions: bool) -> Measured:
    ways = [_saves(at, events, threads, functions=functions) for threads in (1, WRITERS)]
    return max(ways, key=lambda measured: measured.rate)


def _saves(at: Place, events: int, threads: int, *, functions: bool) -> Measured:
    with _bank(at, functions=functions) as bank, ThreadPoolExecutor(threads) as pool:
        stored = bank.recorder.max_notification_id() or 0
        accounts = [opened(bank) for _ in range(WRITERS)]

        def writer(mine: list[Account]) -> None:
            for _ in range(events // WRITERS):
                for account in mine:
                    deposit(bank, account, 1)

        began = time.perf_counter()
        list(pool.map(writer, [accounts[n::threads] for n in range(threads)]))
        rate = events // WRITERS * WRITERS / (time.perf_counter() - began)
        measured = _measured(bank, rate, stored + (events // WRITERS + 1) * WRITERS)
        return replace(measured, way="one after the other" if threads == 1 else f"{threads} threads")


def rehydrate(at: Place, events: int) -> Measured:
    """Load an aggregate of so many events."""
    with _bank(at) as bank:
        account = opened(bank)
        deposit(bank, account, events)
    with _bank(at) as bank:
        began = time.perf_counter()
        for _ in range(LOADS):
            loaded: Account = bank.repository.get(account.id)
        rate = LOADS * events / (time.perf_counter() - began)
        check_stored(SIDE, loaded.balance, account.balance)
        return _measured(bank, rate, events + 1)


def _measured(bank: Any, rate: float, stored: int) -> Measured:
    check_stored(SIDE, bank.recorder.max_notification_id(), stored)
    with bank.factory.datastore.get_connection() as connection:
        return Measured(rate, {name: connection.execute(f"show {name}").fetchone()[name] for name in READ_BACK})
