"""What a set of servers consists of: FOLDER/services.json, readable by its owner only.

{"postgresql": {"url": "postgresql://…", "admin": null, "version": "15.14", "home": "FOLDER/postgresql",
                "processes": [{"argv": …, "env": …, "pid": …, "started": …}]},  the server is the last one
 "rabbitmq": …}
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from servers.process import Process, ServiceError

ROOT = Path(__file__).resolve().parents[2]


class Service(TypedDict):
    """One server of a set."""

    url: str
    admin: str | None
    version: str
    home: str
    processes: list[Process]


Services = dict[str, Service]


def default_home() -> Path:
    """The folder of the set that is meant when none is named."""
    return Path(os.environ.get("TRILOGUE_SERVICES") or ROOT / ".services").resolve()


def load(home: Path) -> Services:
    """What was written down; nothing for a folder that holds no set."""
    try:
        services: Services = json.loads((home / "services.json").read_text())
    except FileNotFoundError:
        return {}
    return services


def save(home: Path, services: Services) -> None:
    """Write it down, in one step."""
    draft = home / "services.json.new"
    draft.touch(mode=0o600)
    draft.write_text(json.dumps(services, indent=1))
    draft.replace(home / "services.json")


@contextmanager
def locked(home: Path, seconds: float = 600) -> Iterator[None]:
    """One command at a time on a set. The lock is on the folder itself, which `down` removes: then it is made once more."""
    deadline = time.monotonic() + seconds
    while True:
        home.mkdir(parents=True, exist_ok=True)
        folder = os.open(home, os.O_RDONLY)
        try:
            if _taken(folder) and _is_still(home, folder):
                yield
                return
        finally:
            os.close(folder)
        if time.monotonic() > deadline:
            raise ServiceError(
                f"another command holds the servers in {home} for longer than {seconds:.0f} s; see what it waits for."
            )
        time.sleep(0.1)


def _taken(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(home: Path, folder: int) -> bool:
    try:
        return os.path.samestat(os.stat(home), os.fstat(folder))
    except FileNotFoundError:
        return False
