"""The library `eventsourcing` on PostgreSQL: the same events and the same application as on SQLite, by its own defaults."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from eventsourcing.application import Application

from trilogue.bench.measured import Measured, check_stored
from trilogue.bench.place import Place
from trilogue.bench.raw_psycopg import READ_BACK, create_schema, database_of
from trilogue.bench.store_figures import LOADS, PER_SAVE, WRITERS, warm_up
from trilogue.bench.store_peers import Account, deposit, opened

SIDE = "eventsourcing"


@contextmanager
def _bank(at: Place) -> Iterator[Application[UUID]]:
    create_schema(at)
    environment = {f"POSTGRES_{name}": word for name, word in database_of(at).items()}
    environment |= {"PERSISTENCE_MODULE": "eventsourcing.postgres", "POSTGRES_SCHEMA": at.name}
    with Application[UUID](env=environment | {"POSTGRES_POOL_SIZE": "8", "POSTGRES_MAX_OVERFLOW": str(WRITERS)}) as bank:
        yield bank


def save_one(at: Place, events: int) -> Measured:
    """One event per save."""
    return _save(at, events, 1)


def save_100(at: Place, events: int) -> Measured:
    """100 events per save."""
    return _save(at, events, PER_SAVE)


def _save(at: Place, events: int, per_save: int) -> Measured:
    with _bank(at) as bank:
        account, warm = opened(bank), warm_up(events, per_save)
        for _ in range(warm):
            deposit(bank, account, per_save)
        began = time.perf_counter()
        for _ in range(events // per_save):
            deposit(bank, account, per_save)
        rate = events // per_save * per_save / (time.perf_counter() - began)
        return _measured(bank, rate, (events // per_save + warm) * per_save + 1)


def save_64_tasks(at: Place, events: int) -> Measured:
    """64 aggregates in 64 threads: on a server that is the faster way."""
    with _bank(at) as bank, ThreadPoolExecutor(WRITERS) as threads:
        accounts = [opened(bank) for _ in range(WRITERS)]

        def writer(account: Account) -> None:
            for _ in range(events // WRITERS):
                deposit(bank, account, 1)

        began = time.perf_counter()
        list(threads.map(writer, accounts))
        rate = events // WRITERS * WRITERS / (time.perf_counter() - began)
        return _measured(bank, rate, (events // WRITERS + 1) * WRITERS)


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
