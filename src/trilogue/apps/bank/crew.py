"""The other processes of the bank, as seen by the first one.

this process ──starts──▶ worker 1 … n-1         each handles events and asks for its share of the transfers
             ──closes their input──▶            they finish and leave, and say how many conflicts they met
             ◀──one dies──                      its share is asked for here; the others take over what it handled
"""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec

from trilogue import App
from trilogue.apps.bank.load import ASKED, Load, write
from trilogue.apps.place import Place

LEAVING_S = 30.0


class Crew:
    """The worker processes. conflicts: what those that have left met. lost: how many died."""

    def __init__(self, app: App, where: Place, load: Load) -> None:
        self.app, self.where, self.load = app, where, load
        self.processes: list[Process] = []
        self.conflicts = self.lost = 0

    async def ask(self) -> None:
        """Return when all transfers have been asked for, here and by the others."""
        shares = (self._asked(number, process) for number, process in enumerate(self.processes, 1))
        await asyncio.gather(write(self.app, self.load, 0), *shares)

    async def _start(self) -> None:
        load = msgspec.json.encode(self.load).decode()
        told = {name: value for name, value in os.environ.items() if name != "TRILOGUE_STORE"}
        told |= {"TRILOGUE_URL": self.where.url} | ({"TRILOGUE_STORE": self.where.store} if self.where.store else {})
        for number in range(1, self.load.processes):
            command = (sys.executable, "-m", "trilogue.apps.bank.worker", load, str(number))
            self.processes.append(await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=told))

    async def _asked(self, number: int, process: Process) -> None:
        assert process.stdout is not None
        if (await process.stdout.readline()).rstrip() != ASKED:
            await write(self.app, self.load, number)

    async def _dismiss(self, process: Process) -> None:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(LEAVING_S):
                said, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            said = b""
        lines = said.split()
        if await process.wait() != 0 or not lines:
            self.lost += 1
            return
        self.conflicts += msgspec.json.decode(lines[-1], type=dict[str, int])["conflicts"]

    async def _end(self) -> None:
        await asyncio.gather(*map(self._dismiss, self.processes))
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()


@asynccontextmanager
async def crew(app: App, where: Place, load: Load) -> AsyncIterator[Crew]:
    """Start the other processes; they leave at the end of the block. app: running. where: its log."""
    others = Crew(app, where, load)
    try:
        await others._start()
        yield others
    finally:
        await others._end()
