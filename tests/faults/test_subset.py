"""Some of the faults, on servers of these tests' own; all of them: `make faults`."""

from pathlib import Path

import pytest
from faults import fault_named, run
from places import Site, broker_of, database_of
from scene import Result

pytestmark = [pytest.mark.faults, pytest.mark.processes, pytest.mark.timeout(240)]
SEED = "ci"


def one(fault: str, name: str, folder: Path, **more: object) -> Result:
    servers = [server for server in (broker_of(name), database_of(name)) if server]
    with Site(folder / "set", *servers) as site:
        result = run(fault_named(fault), name, site, folder / "run", SEED, **more)
    print(result)
    return result


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("broker killed", "amqp+sqlite"),
        ("broker killed", "kafka+sqlite"),
        ("database killed", "postgresql"),
        ("connections cut", "amqp+postgresql"),
        ("cut before the answer", "kafka+postgresql"),
        ("processes killed", "amqp+sqlite"),
    ],
)
def test_what_is_promised_holds(fault: str, name: str, tmp_path: Path) -> None:
    """Nothing lost, invented, out of order or in effect twice, and everybody back: how soon is in docs/faults.md."""
    result = one(fault, name, tmp_path)
    assert result.trouble == ()
    assert result.stored > 500
    assert result.recovery_s is not None


def test_an_adapter_that_acknowledges_early_is_found(tmp_path: Path) -> None:
    """The control of all that: with a bug, the same run does not pass."""
    result = one("processes killed", "sqlite", tmp_path, broken="acknowledges early")
    assert result.lost > 0, result


def test_a_long_queue_is_handled_in_little_memory(tmp_path: Path) -> None:
    assert one("long queue", "sqlite", tmp_path).trouble == ()
