"""No silence: who notices that nothing goes on.

LoopWatch      a thread: the event loop has not turned for a second, and this handler's line is where it stands
watch_progress a task: a group has work and has finished nothing for a minute
"""

import asyncio
import inspect
import logging
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from trilogue.errors import TrilogueError
from trilogue.ports import Store
from trilogue.runner import Runner

BLOCKED_S = 1.0
SILENT_S = 60.0

log = logging.getLogger("trilogue")


class LoopWatch:
    """Warns, naming the handler, when something blocks the event loop it was started on."""

    def __init__(self, runners: Sequence[Runner], *, blocked_s: float = BLOCKED_S) -> None:
        self._blocked_s = blocked_s
        handlers = {r.name: inspect.unwrap(r.sub.handler) for r in runners}
        self._names = {code: name for name, each in handlers.items() if (code := getattr(each, "__code__", None)) is not None}
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._turned = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="trilogue loop watch", daemon=True)
        self._turn()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._handle.cancel()

    def _turn(self) -> None:
        self._turned = time.monotonic()
        self._handle = self._loop.call_later(self._blocked_s / 4, self._turn)

    def _watch(self) -> None:
        warned_for = 0.0
        while not self._stop.wait(self._blocked_s / 4):
            turned = self._turned
            if time.monotonic() - turned > self._blocked_s and turned != warned_for:
                warned_for = turned
                log.warning(
                    "the event loop has been blocked for over %.1f s by %s: await something there, or make it a plain function, "
                    "which runs in a thread",
                    self._blocked_s,
                    self._culprit(),
                )

    def _culprit(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._loop_thread)
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "unknown code"
        while frame is not None:
            if frame.f_code in self._names:
                return f"the handler of group {self._names[frame.f_code]} at {where}"
            frame = frame.f_back
        return where


async def watch_progress(store: Store, runners: Sequence[Runner], *, silent_s: float = SILENT_S) -> None:
    """Warn once per `silent_s` about every group that has work and finishes nothing."""
    while True:
        await asyncio.sleep(silent_s / 4)
        for runner in runners:
            silent = time.monotonic() - runner.progress_at
            if silent < silent_s:
                continue
            runner.progress_at = time.monotonic()
            try:
                has_work = runner.in_flight > 0 or not await store.idle([runner.name])
            except TrilogueError as error:
                log.warning("the log does not answer: %s", error)
                continue
            if has_work:
                log.warning(
                    "group %s has work and has finished nothing for %.0f s (%d in flight): look at its handler, and at "
                    "`trilogue status` for whether it is paused or waits for a retry",
                    runner.name,
                    silent,
                    runner.in_flight,
                )
