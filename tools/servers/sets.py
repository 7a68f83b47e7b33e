"""A set of servers: brought up, taken down, and hurt one by one for tests of faults.

up ─▶ answers ◀─ start ◀─┬─ stop    the way it likes to end
          │              └─ kill    SIGKILL for all its processes
          └── freeze ─▶ silent ─▶ thaw ─▶ answers
"""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from servers import install, kafka, pgbouncer, postgresql, process, rabbitmq, state
from servers.process import Process, ServiceError
from servers.state import Service, Services

KINDS = {"postgresql": postgresql, "rabbitmq": rabbitmq, "kafka": kafka, "pgbouncer": pgbouncer}
LATER = ("pgbouncer",)  # before another one, whose address it has to know
NAMES = tuple(KINDS)
START = 90  # seconds within which a server has to answer
STOP = 15  # seconds after which one that was asked to end is killed
_noting = Lock()


def up(home: Path, names: Sequence[str] = NAMES) -> Services:
    """Start what does not run yet, all at once; those that came up stay up when another fails.

    Raises ServiceError with the end of the log of each that does not answer.
    """
    with state.locked(home):
        services = state.load(home)
        failed = _install(names)
        possible = [name for name in names if not KINDS[name].missing()]
        for name in possible:
            if name not in services:
                shutil.rmtree(home / name, ignore_errors=True)
        for wave in ([name for name in possible if name not in LATER], [name for name in possible if name in LATER]):
            failed += _each(wave, lambda name: _up(home, name, services))
        _raise(failed)
        return {name: services[name] for name in names}


def down(home: Path, names: Sequence[str] = NAMES) -> None:
    """End what this set started, and remove its files."""
    with state.locked(home):
        services = state.load(home)
        gone = {*names, *(LATER if pgbouncer.BEHIND in names else ())}
        failed = _each([name for name in services if name in gone], lambda name: _down(name, services))
        state.save(home, services)
        _raise(failed)
        if not services:
            (home / "services.json").unlink()
        if not any(home.iterdir()):
            home.rmdir()


def running(home: Path) -> Services:
    """The servers of a set whose processes are there."""
    return {name: service for name, service in state.load(home).items() if all(map(process.alive, service["processes"]))}


def start(home: Path, name: str) -> Service:
    """Start a server of a set again: the same ports, the same data."""
    _server(home, name)
    return up(home, [name])[name]


def stop(home: Path, name: str) -> None:
    """End a server in the way it likes; its data stay."""
    process.end(_server(home, name), KINDS[name].STOP, STOP)


def kill(home: Path, name: str) -> None:
    """End a server as a power cut does; what it wrote stays."""
    process.kill(_server(home, name))


def freeze(home: Path, name: str) -> None:
    """Make a server fall silent while its connections stay open."""
    process.freeze(_server(home, name))


def thaw(home: Path, name: str) -> None:
    """Let a frozen server go on."""
    process.thaw(_server(home, name))


def _server(home: Path, name: str) -> Process:
    services = state.load(home)
    if name not in services:
        raise ServiceError(f"there is no {name} in {home}: `services.py up {name} --home {home}` starts one.")
    return services[name]["processes"][-1]


def _raise(failed: list[str]) -> None:
    if failed:
        raise ServiceError("\n".join(failed))


def _each(names: Sequence[str], act: Callable[[str], None]) -> list[str]:
    """Do something for each server at the same time; the sentences of those that failed."""
    failed = []
    with ThreadPoolExecutor(len(NAMES)) as pool:
        for future in [pool.submit(act, name) for name in names]:
            try:
                future.result()
            except ServiceError as error:
                failed.append(str(error))
    return failed


def _install(names: Sequence[str]) -> list[str]:
    """Install what these servers need; the sentence of why that cannot be."""
    try:
        install.packages([package for name in names for package in KINDS[name].missing()])
    except ServiceError as error:
        return [str(error)]
    return []


def _up(home: Path, name: str, services: Services) -> None:
    service = services.get(name) or KINDS[name].prepare(home / name)
    for one in service["processes"]:
        if not process.alive(one):
            process.spawn(one)
    with _noting:
        services[name] = service
        state.save(home, services)
    if not process.wait_for(lambda: _gone(service) or KINDS[name].answers(service), START) or _gone(service):
        raise ServiceError(_failure(name, service))


def _gone(service: Service) -> bool:
    return not process.alive(service["processes"][-1])


def _failure(name: str, service: Service) -> str:
    log = service["processes"][-1]["log"]
    what = "ended while it started" if _gone(service) else f"runs, but does not answer within {START} s (frozen?)"
    return f"{process.tail(log)}\n{name} {what}; above is the end of {log}."


def _down(name: str, services: Services) -> None:
    service = services[name]
    KINDS[name].discard(service)
    shutil.rmtree(service["home"])
    del services[name]
