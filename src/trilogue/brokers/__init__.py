"""URLs to logs: a store by itself, or a broker with a store beside it.

sqlite:///video.db                            the store is the log
amqp://…, kafka://…   store="postgresql://…"  the broker is the log; retries, timers, streams in the store (paired.py)
amqp://…, kafka://…   store=None              the broker alone, with what it can do itself (direct.py)
"""

import importlib

from trilogue.errors import BadOption, Unsupported
from trilogue.ports import Broker, Store
from trilogue.stores import open_store
from trilogue.urls import redacted, split

__all__ = ["DEFAULT_STORE", "is_broker", "open_broker", "open_log"]

DEFAULT_STORE = "sqlite:///trilogue.db"
_ADAPTERS = {
    "amqp": ("rabbitmq", "RabbitMQ", "pika"),
    "amqps": ("rabbitmq", "RabbitMQ", "pika"),
    "kafka": ("kafka", "Kafka", "confluent_kafka"),
    "kafka+ssl": ("kafka", "Kafka", "confluent_kafka"),
}


def open_log(url: str, *, store: str | None = DEFAULT_STORE) -> Store:
    """The log behind a URL, not opened yet. store: what stands beside a broker; None for the broker alone.

    Raises UnknownScheme, Unsupported, BadOption; each names what would be right.
    """
    if not is_broker(url):
        if store != DEFAULT_STORE:
            raise BadOption(f"{redacted(url)!r} is a store itself: store= belongs beside amqp:// and kafka:// only")
        return open_store(url)
    broker = open_broker(url)
    if store is None:
        from trilogue.brokers.direct import Direct

        return Direct(broker)
    if is_broker(store):
        raise BadOption(f"store={redacted(store)!r} is a broker: expected sqlite:///file.db, postgresql://… or memory://")
    from trilogue.brokers.paired import Paired

    return Paired(broker, open_store(store))


def is_broker(url: str) -> bool:
    """Whether a URL names a broker, beside which there may be a store; raises BadOption for what is no URL."""
    return split(url).scheme in _ADAPTERS


def open_broker(url: str) -> Broker:
    """The broker behind a URL, not connected yet. Raises Unsupported where its extra is not installed."""
    module, extra, driver = _ADAPTERS[split(url).scheme]
    try:
        adapter = importlib.import_module(f"trilogue.brokers.{module}")
    except ModuleNotFoundError as error:
        if error.name != driver:
            raise
        raise Unsupported(f"{redacted(url)!r} needs the extra: pip install 'trilogue[{module}]' ({extra})") from None
    broker: Broker = adapter.open_broker(url)
    return broker
