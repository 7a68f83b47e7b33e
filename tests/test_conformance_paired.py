"""Every promise, kept by every broker with a store beside it, on the real servers."""

import asyncio
from pathlib import Path

import pytest
import services

from trilogue.conformance import PROMISES, Outcome, Promise, check
from trilogue.features import KINDS

PAIRS = [f"{broker} + {store}" for broker in ("amqp", "kafka") for store in ("sqlite", "postgresql")]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("kept", PROMISES, ids=lambda each: each.name)
def test_promise(kept: Promise, kind: str, tmp_path: Path) -> None:
    broker, _, store = kind.partition(" + ")
    url = services.url("rabbitmq" if broker == "amqp" else broker)
    beside = f"sqlite:///{tmp_path}/beside.db" if store == "sqlite" else services.url(store)

    async def outcome() -> Outcome:
        [only] = [each async for each in check(url, [kept], store=beside)]
        return only

    found = asyncio.run(outcome())
    missing = kept.needs - KINDS[kind]
    assert found.verdict == ("skipped" if missing else "kept"), found.reason
    if missing:
        pytest.skip(f"{kind} has no {', '.join(sorted(missing))}")
