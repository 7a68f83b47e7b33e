"""Real processes of a test: started, killed, started again, and ended with it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Crew:
    """Processes by what they were started with. given: what every one of them gets behind its role."""

    def __init__(self, folder: Path, script: Path, *given: str) -> None:
        self.script = str(script)
        self.folder = folder
        self.given = given
        self.running: dict[tuple[str, ...], subprocess.Popen[bytes]] = {}

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        """Start one; its output goes to FOLDER/role.log."""
        role, *rest = args
        with (self.folder / f"{role}.log").open("ab") as log:
            command = [sys.executable, self.script, role, str(self.folder), *self.given, *rest]
            process = subprocess.Popen(command, stdout=log, stderr=log)
        self.running[args] = process
        return process

    def kill(self, args: tuple[str, ...], number: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end; the exit code."""
        process = self.running.pop(args)
        at = time.monotonic_ns()
        process.send_signal(number)
        code = process.wait(60)
        if number == signal.SIGKILL:
            self.interrupted(at, process.pid)
        return code

    def interrupted(self, at: int, *pids: int, settled_s: float = 0.0) -> None:
        """Note that something was done to processes, or to all if none is named, and is over now or so many seconds later."""
        row = {"at": at, "until": time.monotonic_ns() + round(settled_s * 1e9), "pids": pids or None}
        with (self.folder / "interruptions.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def alive(self, role: str) -> list[tuple[str, ...]]:
        """Those of a role that run."""
        return [args for args, process in self.running.items() if args[0] == role and process.poll() is None]

    def log(self, role: str) -> str:
        """What all of a role have printed."""
        path = self.folder / f"{role}.log"
        return path.read_text() if path.exists() else ""

    def end(self) -> None:
        """Kill whoever is left."""
        for args in list(self.running):
            self.kill(args)


def until(look: Callable[[], bool], what: str, within_s: float = 60) -> None:
    """Wait for something; it fails, saying what, when it does not come in time."""
    end = time.monotonic() + within_s
    while not look():
        assert time.monotonic() < end, f"{what}, within {within_s} s"
        time.sleep(0.02)
