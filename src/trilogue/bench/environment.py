"""What a figure was measured with: only ratios travel from machine to machine, and these only with what is said here."""

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trilogue.bench.place import at_server, scheme_of
from trilogue.bench.suites import suite
from trilogue.errors import Unavailable
from trilogue.urls import redacted

_PACKAGES = {
    "sqlite": ("apsw", "huey", "eventsourcing"),
    "postgresql": ("psycopg", "eventsourcing"),
    "amqp": ("pika", "aio-pika", "faststream", "pydantic"),
    "kafka": ("confluent-kafka", "faststream", "pydantic"),
}
_DRIVERS = {"postgresql": "raw_psycopg", "amqp": "raw_pika", "kafka": "raw_kafka"}


def around(url: str, store: str | None, *, rounds: int, scale: float) -> dict[str, Any]:
    """Machine, Python, versions of the packages and of the server, and how it was measured. Raises Unavailable."""
    scheme = scheme_of(url)
    packages = ("trilogue", *_PACKAGES[scheme], "msgspec")
    return {
        "url": redacted(url),
        **({"store": redacted(store or "a new SQLite file")} if scheme in ("amqp", "kafka") else {}),
        **_server(scheme, url),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "rounds": rounds,
        "scale": scale,
    }


def _server(scheme: str, url: str) -> dict[str, Any]:
    if scheme == "sqlite":
        return {}
    suite(scheme)  # says what is not installed
    module = importlib.import_module(f"trilogue.bench.{_DRIVERS[scheme]}")
    try:
        found: dict[str, Any] = module.versions(at_server(url))
    except Exception as error:  # each driver has its own
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise Unavailable(f"{redacted(url)} does not answer ({said}): is it running, and may this user connect?") from error
    return found


def _cpu() -> str:
    """The processor's name where the system tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
