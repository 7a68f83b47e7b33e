"""How durable a log of ours was that was measured, as it says of itself, and whether what was measured is in it."""

from typing import Any

import apsw

from trilogue.app import App
from trilogue.bench.measured import Durability, Measured, check_stored, pragmas_of
from trilogue.bench.place import BROKERS, Place, scheme_of

SIDE = "trilogue"


async def checked(at: Place, app: App, rate: float, stored: int, *, group: str | None = None) -> Measured:
    """The measurement; raises Unavailable if the log does not hold so many records. group: with a queue of that name, where
    each group has one."""
    scheme = scheme_of(at.url)
    if scheme not in BROKERS:
        check_stored(SIDE, (await app.store.status()).head, stored)
        return Measured(rate, _pragmas(app) if scheme == "sqlite" else await _settings(app))
    if scheme == "kafka":
        from trilogue.bench import raw_kafka

        raw_kafka.stored(at, f"{at.name}bench-events", stored)
        return Measured(rate, {"acks": "all", "idempotent": "yes"})
    from trilogue.bench import raw_pika

    return Measured(rate, raw_pika.durability(at, f"{at.name}{group}", stored))


def _pragmas(app: App) -> Durability:
    store: Any = app.store
    return pragmas_of(store._db.connection.apsw.pragma, apsw.sqlite_lib_version())


async def _settings(app: App) -> Durability:
    from trilogue.bench.raw_psycopg import READ_BACK

    return {name: str((await app.db(f"show {name}"))[0][0]) for name in READ_BACK}
