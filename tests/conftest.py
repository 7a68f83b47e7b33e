"""For all tests: Hypothesis asserts no wall times; the two kinds of log."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from services import postgresql_database

settings.register_profile("here", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


@pytest.fixture(params=["memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A log of each kind."""
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/app.db"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A database for the tests of this process."""
    with postgresql_database() as database:
        yield database


@pytest.fixture
def postgresql_url(postgresql: str) -> str:
    """A log on PostgreSQL, with a short lease."""
    return f"{postgresql}?schema=t{secrets.token_hex(6)}&lease_s=1"


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    """A log in a file."""
    return f"sqlite:///{tmp_path}/app.db"
