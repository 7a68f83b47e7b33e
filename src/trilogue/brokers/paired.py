"""A broker with a store beside it as one log."""

from typing import Any

from trilogue.errors import Unsupported
from trilogue.ports import Broker, Store


def Paired(broker: Broker, store: Store) -> Any:  # noqa: N802 - a class soon
    """Not there yet."""
    raise Unsupported(f"{broker.url} with {store.url} is not there yet")
