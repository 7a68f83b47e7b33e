"""Features and URLs: the table says what the adapters say, and what is missing is refused when a program starts."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common import Watched

from trilogue import App, Db, Retry
from trilogue.brokers import open_log
from trilogue.errors import Unsupported
from trilogue.features import KINDS, WAIT_IN_HAND_US, check, longest_us, missing, refusal, table, who_can
from trilogue.ports import Feature

README = Path(__file__).parents[1] / "README.md"
POSTGRESQL = "postgresql://nobody@localhost/none"
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "memory": ("memory://", {}),
    "sqlite": ("sqlite:///x.db", {}),
    "postgresql": (POSTGRESQL, {}),
    "amqp + sqlite": ("amqp://localhost", {"store": "sqlite:///x.db"}),
    "amqp + postgresql": ("amqp://localhost", {"store": POSTGRESQL}),
    "kafka + sqlite": ("kafka://localhost", {"store": "sqlite:///x.db"}),
    "kafka + postgresql": ("kafka://localhost", {"store": POSTGRESQL}),
    "amqp alone": ("amqp://localhost", {"store": None}),
    "kafka alone": ("kafka://localhost", {"store": None}),
}


def test_every_kind_of_url_has_an_example() -> None:
    assert EXAMPLES.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_says_what_the_adapter_says(kind: str) -> None:
    url, options = EXAMPLES[kind]
    assert open_log(url, **options).features == KINDS[kind]


def test_the_readme_has_the_table() -> None:
    text = README.read_text()
    if "<!-- features -->" not in text:
        pytest.skip("the README has no table yet")
    assert re.findall(r"<!-- features -->\n(.*?)\n<!-- /features -->", text, re.DOTALL) == [table()]


def test_who_can_names_what_has_it() -> None:
    for feature in Feature:
        words = who_can(feature)
        assert ("memory://" in words) == (feature in KINDS["memory"])
        assert ("amqp://" in words) == any(feature in KINDS[kind] for kind in KINDS if kind.startswith("amqp"))
    assert who_can(Feature.MACHINES).startswith("postgresql://, ")


# ── what a program asks for ──────────────────────────────────────────────────────────────────────────────────────────


def _parks(app: App) -> None:
    app.on(on_dead="park")(_handle)


def _waits(app: App) -> None:
    app.on(retry=Retry(10, "1s..5m"))(_handle)


def _writes(app: App) -> None:
    @app.on
    def write(e: Watched, db: Db) -> None: ...


def _projects(app: App) -> None:
    @app.projection(tables={"t": "n integer"})
    def project(e: Watched, db: Db) -> None: ...


def _keeps_order(app: App) -> None:
    app.on(order="key")(_handle)


async def _handle(e: Watched) -> None: ...


ASKED: dict[str, tuple[Callable[[App], None], Feature]] = {
    "order": (_keeps_order, Feature.ORDER),
    "park": (_parks, Feature.PARK),
    "retry": (_waits, Feature.RETRY),
    "effects": (_writes, Feature.EFFECTS),
    "projection": (_projects, Feature.EFFECTS),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_missing_is_refused_at_start_with_the_urls_that_can(asked: str) -> None:
    register, feature = ASKED[asked]
    app = App("memory://")
    register(app)
    told = [need.feature for need in missing(frozenset(Feature) - {feature}, app.subscriptions, app.declared)]
    assert set(told) == {feature}
    with pytest.raises(Unsupported, match=re.escape(who_can(feature))):
        check("some://url", frozenset(Feature) - {feature}, app.subscriptions, app.declared)
    check("some://url", frozenset(Feature), app.subscriptions, app.declared)


def test_an_app_is_refused_before_anything_is_opened() -> None:
    app = App("memory://")
    _parks(app)
    app.store.features -= {Feature.PARK}  # type: ignore[misc]

    async def start() -> None:
        async with app.running():
            raise AssertionError("it runs")

    with pytest.raises(Unsupported, match="parks keys"):
        asyncio.run(start())
    assert not app._opened


def test_the_default_policy_may_wait_in_hand() -> None:
    assert longest_us(Retry()) == 15_000_000
    assert longest_us(Retry()) <= WAIT_IN_HAND_US
    assert longest_us(Retry(1_000, "1s..5m")) > 200_000_000_000
    assert longest_us(Retry(1)) == 0


def test_a_refusal_says_what_where_and_how_to_mend_it() -> None:
    said = str(refusal("amqp://h", "group 'g' keeps order per key", Feature.ORDER, "give its handler order=None"))
    assert said.startswith("amqp://h: group 'g' keeps order per key, which this log cannot do (order per key): give its handler")
    assert "kafka:// alone" in said
