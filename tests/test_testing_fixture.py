"""The pytest fixture, used as a program's own tests use it."""

import subprocess
import sys
from pathlib import Path

CONFTEST = 'pytest_plugins = ["trilogue.testing.fixture"]\n'
TESTS = """
import asyncio
from dataclasses import dataclass

import pytest
from trilogue import App, Retry, event


@event("video.watched", key="user")
@dataclass(frozen=True)
class Watched:
    user: str


app = App("sqlite:///production.db")
seen = []


@app.on(group="badge", retry=Retry(5, "1h"))
async def badge(e: Watched) -> None:
    seen.append(e.user)


@pytest.mark.parametrize("user", ["u1", "u2"])
def test_badge(world, user):
    async def main():
        seen.clear()
        async with world(app) as w:
            w.fail(badge, times=3)
            await w.publish(Watched(user))
            await w.advance("3h")
            assert seen == [user]
            assert await w.published(Watched) == [Watched(user)]

    asyncio.run(main())
"""


def test_each_test_has_a_world_of_its_own_and_the_apps_log_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-W", "error", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "production.db").exists()


def test_pytest_is_imported_by_the_fixture_alone() -> None:
    code = "import sys, trilogue.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
