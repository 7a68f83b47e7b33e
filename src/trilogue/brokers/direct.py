"""A broker alone as a log: what it can do itself, and a refusal of everything else."""

from typing import Any

from trilogue.errors import Unsupported
from trilogue.ports import Broker


def Direct(broker: Broker) -> Any:  # noqa: N802 - a class soon
    """Not there yet."""
    raise Unsupported(f"{broker.url}: store=None is not there yet")
