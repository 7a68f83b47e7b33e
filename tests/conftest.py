"""For all tests: Hypothesis asserts no wall times; the two kinds of log."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("here", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


@pytest.fixture(params=["memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A log of each kind."""
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/app.db"


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    """A log in a file."""
    return f"sqlite:///{tmp_path}/app.db"
