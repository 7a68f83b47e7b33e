"""Processes of this machine, known by pid and start time, so that a pid in use again is never taken for ours.

{"argv": [...], "env": {...}, "user": "postgres" or null, "folder": "…", "log": "…", "pid": 4711, "started": 88123}
"""

import os
import pwd
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict


class ServiceError(Exception):
    """A sentence for the person who asked for a server."""


class Process(TypedDict):
    """How a process is started, and which one it is now; pid 0: it was not started yet."""

    argv: list[str]
    env: dict[str, str]
    user: str | None
    folder: str
    log: str
    pid: int
    started: int


# Whoever imports this module is the parent of what it starts and has to reap it.
_children: dict[int, subprocess.Popen[bytes]] = {}


def spawn(process: Process) -> None:
    """Start it in a session of its own, and note which one it is."""
    with open(process["log"], "ab") as log:
        child = subprocess.Popen(
            process["argv"],
            **_surroundings(process),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _children[child.pid] = child
    process["pid"], process["started"] = child.pid, _stat(child.pid)[2]


def alive(process: Process) -> bool:
    """Whether this very process runs."""
    return process["pid"] > 0 and runs(process["pid"], process["started"])


def runs(pid: int, started: int) -> bool:
    """Whether the process with this pid and this start time runs."""
    if pid in _children:
        _children[pid].poll()
    state, _, since = _stat(pid)
    return since == started and state not in "ZX"


def family(process: Process) -> list[tuple[int, int]]:
    """Pid and start time of the process and of all that it started, parents first; nothing when it is gone."""
    if not alive(process):
        return []
    everything = {int(entry.name): _stat(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    pids = [process["pid"]]
    for parent in pids:
        pids += [pid for pid, (_, its_parent, _) in everything.items() if its_parent == parent]
    return [(pid, everything[pid][2]) for pid in pids if pid in everything]


def freeze(process: Process) -> list[tuple[int, int]]:
    """Stop it and its children (SIGSTOP); pid and start time of each. Parents first, so that no child is born unseen."""
    stopped: list[tuple[int, int]] = []
    while fresh := [one for one in family(process) if one not in stopped]:
        _signal_all(fresh, signal.SIGSTOP)
        stopped += fresh
    return stopped


def thaw(process: Process) -> None:
    """Let it and its children go on (SIGCONT)."""
    _signal_all(family(process), signal.SIGCONT)


def kill(process: Process) -> None:
    """SIGKILL for it and its children, all at once as in a power cut; returns when they are gone."""
    members = freeze(process)
    _signal_all(members, signal.SIGKILL)
    if not wait_for(lambda: not any(runs(*one) for one in members), 10):
        raise ServiceError(f"process {process['pid']} is still there 10 s after SIGKILL: {' '.join(process['argv'][:1])}")


def end(process: Process, sign: int, seconds: float) -> None:
    """Ask it to end with a signal; after so many seconds it is killed."""
    if not alive(process):
        return
    members = family(process)
    _signal_all(members[:1], sign)
    thaw(process)
    if not wait_for(lambda: not any(runs(*one) for one in members), seconds):
        kill(process)


def run(command: list[str], failure: str, process: Process | None = None, text: str = "", seconds: float = 120) -> str:
    """Run a program to its end, as the user and in the folder of a process if one is given; what it printed.

    Raises ServiceError, beginning with `failure`, when it fails or takes longer than so many seconds.
    """
    like = _surroundings(process) if process else {}
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds, **like)
    except subprocess.TimeoutExpired:
        raise ServiceError(f"{failure}: no end after {seconds:.0f} s.") from None
    if done.returncode != 0:
        raise ServiceError(f"{failure}:\n{(done.stdout + done.stderr).strip()[-2000:]}")
    return str(done.stdout)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on.

    Below the range that the kernel gives to clients: a client that keeps trying a dead server's port would in the end be
    given that very port, talk to itself, and keep the server from coming back.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        if port not in ports and _is_free(port):
            ports.append(port)
    return ports


def reachable(home: Path) -> Path:
    """A new folder that a server's user can enter: it refuses to run as root, and a checkout may lie in a private folder."""
    if os.geteuid() == 0 and not all(parent.stat().st_mode & 0o001 for parent in home.resolve().parents):
        folder = Path(tempfile.mkdtemp(prefix=f"trilogue-{home.name}-"))
        folder.chmod(0o755)
        return folder
    home.mkdir(parents=True)
    return home


def listens(host: str, port: int) -> bool:
    """Whether somebody accepts connections there within two seconds."""
    try:
        socket.create_connection((host, port), 2).close()
    except OSError:
        return False
    return True


def tail(path: str, lines: int = 20) -> str:
    """The end of a log."""
    try:
        return "\n".join(Path(path).read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"


def _surroundings(process: Process) -> dict[str, Any]:
    around = {"env": process["env"], "cwd": process["folder"]}
    if not process["user"]:
        return around
    return {**around, "user": process["user"], "group": pwd.getpwnam(process["user"]).pw_gid, "extra_groups": []}


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _stat(pid: int) -> tuple[str, int, int]:
    """State, parent and start time; ("X", 0, 0) for a process that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "X", 0, 0
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])


def _signal_all(members: list[tuple[int, int]], sign: int) -> None:
    for pid, started in members:
        if _stat(pid)[2] == started:
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                continue
