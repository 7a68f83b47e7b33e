"""A log of each kind, empty, for the demonstrations: what stands behind `--url` and `--store`.

with log("kafka + postgresql", folder) as wanted: …    Wanted("kafka://…?prefix=t1f2e-", "postgresql://…/t3d4c")
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from services import kafka_prefix, postgresql_database, rabbitmq_vhost

from trilogue.apps.place import Wanted

STORES = ("memory", "sqlite", "postgresql")
PAIRS = ("amqp + sqlite", "amqp + postgresql", "kafka + sqlite", "kafka + postgresql")
KINDS = (*STORES, *PAIRS)


@contextmanager
def log(kind: str, folder: Path) -> Iterator[Wanted]:
    """A new log of this kind, gone at the end."""
    first, _, beside = kind.partition(" + ")
    with ExitStack() as stack:
        if not beside:
            yield Wanted(_store(first, folder, stack))
            return
        store = _store(beside, folder, stack)
        yield Wanted(stack.enter_context(rabbitmq_vhost() if first == "amqp" else kafka_prefix()), store)


def _store(kind: str, folder: Path, stack: ExitStack) -> str:
    if kind == "postgresql":
        return stack.enter_context(postgresql_database())
    return "memory://" if kind == "memory" else f"sqlite:///{folder}/demo.db"
