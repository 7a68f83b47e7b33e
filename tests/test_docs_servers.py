"""The README on real servers: only the URL changes, in its own programs."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from services import kafka_prefix, postgresql_database, rabbitmq_vhost

README = (Path(__file__).parent.parent / "README.md").read_text()
FIRST, SECOND = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[:2]
SERVERS = {"postgresql": postgresql_database, "amqp": rabbitmq_vhost, "kafka": kafka_prefix}


@pytest.fixture(params=SERVERS)
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A kind of URL, and what stands between the brackets of App(…)."""
    with ExitStack() as stack:
        url = stack.enter_context(SERVERS[request.param]())
        beside = "" if request.param == "postgresql" else ', store="sqlite:///beside.db"'
        yield request.param, f"{url!r}{beside}"


def ran(program: str, folder: Path) -> str:
    """What a program prints."""
    (folder / "program.py").write_text(program)
    done = subprocess.run([sys.executable, "-W", "error", "program.py"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_program(place: tuple[str, str], tmp_path: Path) -> None:
    kind, url = place
    program = FIRST.replace('"sqlite:///video.db"', url)
    if kind != "postgresql":  # what looks back at the log, as the README says
        program = program.replace('app.wait_for(receipt, "views")', "app.wait_idle()")
        program = re.sub(r"^.*app\.history.*\n", "", program, flags=re.MULTILINE)
    assert url in program
    printed = ran(program, tmp_path)
    assert "[('v9', 1)]" in printed
    assert kind != "postgresql" or "['video.watched', 'badge.won']" in printed


def test_the_second_program(place: tuple[str, str], tmp_path: Path) -> None:
    program = SECOND.replace('"sqlite:///bank.db"', place[1])
    assert place[1] in program
    assert ran(program, tmp_path).splitlines() == ["100 70", "[(70,)]"]
