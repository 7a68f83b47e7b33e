"""The fixture `world` for pytest: `pytest_plugins = ["trilogue.testing.fixture"]` in your conftest.py.

def test_badge(world):
    async def main():
        async with world(app) as w:       simulated(app, ...) on a log of this test's own, which is gone afterwards
            await w.publish(Watched("u1", "v9"))
            await w.settle()
    asyncio.run(main())
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from trilogue import App
from trilogue.testing.world import World, simulated

MakeWorld = Callable[[App], AbstractAsyncContextManager[World]]


@pytest.fixture
def world(tmp_path: Path) -> MakeWorld:
    """Makes worlds: `async with world(app) as w`, on a file of the test's own instead of the app's log."""

    def make(app: App) -> AbstractAsyncContextManager[World]:
        return simulated(app, f"sqlite:///{tmp_path}/world.db")

    return make
