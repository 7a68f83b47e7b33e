"""What is done to the servers, the connections and the processes; each with the URLs it makes sense for.

Every fault is a function of a Scene under load. It says when it is over (`healed`), and from then on the time counts.
"""

import fcntl
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crew import until
from places import LEASE_S, NAMES, broker_of, database_of
from scene import Result, Scene, judged, scene
from servers import sets

FROZEN_S = 10.0


@dataclass(frozen=True)
class Fault:
    """A fault by name. suits: whether there is anything to hurt at a URL. proxied: through TCP proxies."""

    name: str
    act: Callable[[Scene], None]
    suits: Callable[[str], bool] = lambda name: True
    proxied: bool = False


def nothing(s: Scene) -> None:
    """The control: without a fault there is no repetition at all."""
    s.sleep(3, 4)


# ── servers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def kill_broker(s: Scene) -> None:
    """kill -9 and a start, twice, under load."""
    for _ in range(2):
        _kill(s, s.broker)


def kill_database(s: Scene) -> None:
    """The same with PostgreSQL."""
    for _ in range(2):
        _kill(s, s.database)


def _kill(s: Scene, server: str | None) -> None:
    assert server is not None
    with s.interruption():
        sets.kill(s.site.home, server)
        s.sleep(0.5, 3)
        sets.start(s.site.home, server)
    s.healed()


def freeze_broker(s: Scene) -> None:
    """SIGSTOP: connections stay open and nothing answers."""
    _freeze(s, s.broker)


def freeze_database(s: Scene) -> None:
    """The same with PostgreSQL."""
    _freeze(s, s.database)


def _freeze(s: Scene, server: str | None) -> None:
    assert server is not None
    with s.interruption():
        sets.freeze(s.site.home, server)
        time.sleep(FROZEN_S)
        sets.thaw(s.site.home, server)
    s.healed()


# ── connections ──────────────────────────────────────────────────────────────────────────────────────────────────────


def cut_connections(s: Scene) -> None:
    """All connections to one server at once, at a random byte of one or at a random moment, five times."""
    for _ in range(5):
        proxy = s.site.proxies[s.chance.choice(s.site.names)]
        with s.interruption():
            if s.chance.random() < 0.5:
                proxy.cut_after(s.chance.randint(1, 20_000))
                s.sleep(0.2, 1)
            proxy.cut()
        s.sleep(0.2, 1.5)
    s.healed()


def cut_before_the_answer(s: Scene) -> None:
    """The server hears and does what it is told; its answers are thrown away, and then the connections are cut."""
    for server in [name for name in (s.broker, s.database) if name] * 2:
        proxy = s.site.proxies[server]
        with s.interruption():
            proxy.deafen()
            s.sleep(0.2, 1)
            proxy.cut()
            proxy.mend()
        s.sleep(0.5, 1.5)
    s.healed()


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def kill_processes(s: Scene) -> None:
    """kill -9 of a worker or a publisher each second, and its start."""
    for _ in range(6):
        s.sleep(0.5, 1.5)
        args = s.chance.choice([*s.crew.alive("work"), *s.crew.alive("publish")])
        with s.interruption(s.crew.running[args].pid):
            s.crew.kill(args)
        if args[0] == "work":
            s.start_worker(int(args[1]))
        else:
            s.crew.start(*args)
    s.healed()


def freeze_worker(s: Scene) -> None:
    """A worker sleeps past its lease and wakes as a zombie, while another has taken over."""
    process = s.crew.running[s.chance.choice(s.crew.alive("work"))]
    with s.interruption(process.pid):
        until(lambda: _sleeps(s, process.pid), "the worker is stopped while it holds no lock")
        time.sleep(max(FROZEN_S, LEASE_S * 2))
        process.send_signal(signal.SIGCONT)
    s.healed()


def _sleeps(s: Scene, pid: int) -> bool:
    """A process stopped inside a transaction of SQLite stops everybody who writes: that is how files are, and not looked at."""
    worker = next(process for process in s.crew.running.values() if process.pid == pid)
    worker.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    lock = s.folder / "faults.db-lock"
    if not lock.exists() or _is_free(lock):
        return True
    worker.send_signal(signal.SIGCONT)
    return False


def _is_free(path: Path) -> bool:
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def storm(s: Scene) -> None:
    """Workers join, leave and are killed every second, so that there is always a rebalance."""
    spare = s.workers
    for _ in range(8):
        s.sleep(0.5, 1.5)
        alive = s.crew.alive("work")
        with s.interruption():
            if len(alive) < 2 or (len(alive) < 4 and s.chance.random() < 0.5):
                s.start_worker(spare)
                spare += 1
            else:
                s.crew.kill(s.chance.choice(alive), s.chance.choice((signal.SIGKILL, signal.SIGTERM)))
    if not s.crew.alive("work"):
        s.start_worker(spare)
    s.healed()


FAULTS = (
    Fault("none", nothing),
    Fault("broker killed", kill_broker, lambda name: broker_of(name) is not None),
    Fault("database killed", kill_database, lambda name: database_of(name) is not None),
    Fault("broker frozen 10 s", freeze_broker, lambda name: broker_of(name) is not None),
    Fault("database frozen 10 s", freeze_database, lambda name: database_of(name) is not None),
    Fault("connections cut", cut_connections, lambda name: name != "sqlite", proxied=True),
    Fault("cut before the answer", cut_before_the_answer, lambda name: name != "sqlite", proxied=True),
    Fault("processes killed", kill_processes),
    Fault("worker frozen 10 s", freeze_worker),
    Fault("workers come and go", storm),
)


def run(fault: Fault, name: str, site_of: object, folder: Path, seed: str, **more: object) -> Result:
    """One fault at one URL, from the first publish to the verdict."""
    with scene(site_of, name, folder, f"{seed}/{fault.name}/{name}", proxied=fault.proxied, **more) as s:
        s.begin()
        fault.act(s)
        return judged(s, fault.name, s.end())


def suiting(fault: Fault) -> list[str]:
    """The URLs a fault makes sense for."""
    return [name for name in NAMES if fault.suits(name)]
