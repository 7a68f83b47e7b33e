"""`run --workers N`: N processes of our own interpreter, watched by this one.

    this process ──starts──> worker 1 … worker N       each runs every group of the App; they share the log's slots
                 ──SIGTERM, SIGINT──> all of them      the first: finish and settle; the second: at once
                 <──a crash── one of them              started again after 0.5 s, 1 s, 2 s … 30 s

A worker that ended by itself (0) or whose wiring is wrong (2) is not started again; five crashes in a row, each within
ten seconds of a start, end the others too.
"""

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Sequence
from dataclasses import dataclass, field

from trilogue.cli.output import note

MOST_WORKERS = 256
WORKER = "TRILOGUE_WORKER"  # the pid of the watching process; tells a worker not to repeat what that one has printed
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
QUICK_S = 10.0
MOST_QUICK_CRASHES = 5
PARENT_CHECK_S = 1.0
_FINAL = (0, 2)
_STOPPED = (-signal.SIGTERM, -signal.SIGINT)  # told to stop before it could listen


@dataclass
class _Workers:
    """The processes that run now, and whether they have been told to stop."""

    command: Sequence[str]
    processes: dict[int, Process] = field(default_factory=dict)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def forward(self, signum: int) -> None:
        self.stopping.set()
        for process in self.processes.values():
            if process.returncode is None:
                process.send_signal(signum)


async def run_workers(command: Sequence[str], count: int) -> int:
    """Run `count` processes of a command until all have ended; returns the exit code: 0 if every one ended well."""
    workers = _Workers(command)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, workers.forward, signum)
    codes = await asyncio.gather(*(_keep_running(workers, number) for number in range(1, count + 1)))
    return max(codes)


async def _keep_running(workers: _Workers, number: int) -> int:
    crashes = 0
    while True:
        started = time.monotonic()
        code = await _run_once(workers, number)
        if code in _FINAL:
            return code
        if workers.stopping.is_set():
            return int(code not in _STOPPED)
        crashes = crashes + 1 if time.monotonic() - started < QUICK_S else 1
        if crashes >= MOST_QUICK_CRASHES:
            note(f"worker {number} crashed {crashes} times in a row: stopping the others")
            workers.forward(signal.SIGTERM)
            return 1
        wait_s = min(FIRST_WAIT_S * 2 ** (crashes - 1), LONGEST_WAIT_S)
        note(f"worker {number} {_ending(code)}: starting it again in {wait_s:g} s")
        if await _stopped_within(workers.stopping, wait_s):
            return 0


async def _run_once(workers: _Workers, number: int) -> int:
    # A process group of its own: Ctrl-C at a terminal goes to the whole foreground group, and a worker that got it
    # twice, once from there and once from us, would take that for "at once".
    environment = os.environ | {WORKER: str(os.getpid())}
    process = await asyncio.create_subprocess_exec(*workers.command, stdin=DEVNULL, env=environment, process_group=0)
    workers.processes[number] = process
    if workers.stopping.is_set():  # told so while it was being started
        process.send_signal(signal.SIGTERM)
    return await process.wait()


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


async def _stopped_within(stopping: asyncio.Event, wait_s: float) -> bool:
    try:
        async with asyncio.timeout(wait_s):
            await stopping.wait()
    except TimeoutError:
        return False
    return True


def is_worker() -> bool:
    """Whether this process was started by run_workers()."""
    return WORKER in os.environ


async def parent_gone() -> None:
    """Return when the process that watches this worker has ended: nobody would start or stop it any more."""
    parent = int(os.environ[WORKER])
    while os.getppid() == parent:  # noqa: ASYNC110 (no event tells it)
        await asyncio.sleep(PARENT_CHECK_S)
    note("the process that watched this worker is gone: stopping")


def worker_command(spec: str) -> list[str]:
    """The command line of one worker."""
    return [sys.executable, "-m", "trilogue", "run", spec]
