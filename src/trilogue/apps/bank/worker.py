"""A further process of the bank: `python -m trilogue.apps.bank.worker LOAD NUMBER`.

environment      TRILOGUE_URL, TRILOGUE_STORE: a command line is read by everybody on the machine, and URLs hold passwords
standard input   open as long as the process that started it lives and wants it; at its end it finishes and leaves
standard output  one line when its share of the transfers is asked for, one with what it counted when it leaves
"""

import asyncio
import os
import signal
import sys
import threading

import msgspec

from trilogue.apps.bank.bank import make_bank
from trilogue.apps.bank.load import ASKED, Load, write


async def work(url: str, store: str | None, load: Load, process: int) -> None:
    """Ask for a share of the transfers, and handle what there is to handle until nobody wants it any more."""
    bank = make_bank(url, store=store)
    async with bank.app.running():
        leave = _end_of_input(asyncio.get_running_loop())
        await write(bank.app, load, process)
        _say(ASKED)
        await leave.wait()
    _say(msgspec.json.encode({"conflicts": bank.teller.conflicts}))


def _end_of_input(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """Set when nobody holds the other end any more: also when that process was killed."""
    ended = asyncio.Event()

    def wait() -> None:
        sys.stdin.buffer.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait, daemon=True).start()
    return ended


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; this one is told by its input
    _load = msgspec.json.decode(sys.argv[1], type=Load)
    asyncio.run(work(os.environ["TRILOGUE_URL"], os.environ.get("TRILOGUE_STORE"), _load, int(sys.argv[2])))
