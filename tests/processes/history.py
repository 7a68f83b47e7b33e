"""What a process writes down of itself, so that it can be judged afterwards: append-only files of JSON lines.

publish-PID.jsonl   {"key": "p0-1", "from": 0, "to": 9, "outcome": "begun" | "stored" | "unknown" | "rejected", "at": NANOSECONDS}
handle-PID.jsonl    {"run": 7, "group": "plain", "key": "p0-1", "n": 3, "at": …}   entered
                    {"run": 7, "ok": true, "at": …}                                left
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class History:
    """One such file. A line is one write, so that a kill -9 cuts at most the last."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._file = os.open(folder / f"{kind}-{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._runs = itertools.count(time.monotonic_ns())  # two of one process must not share numbers

    def write(self, *rows: dict[str, Any]) -> None:
        """Add lines."""
        os.write(self._file, b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    def published(self, key: str, first: int, last: int, outcome: str) -> None:
        """A publish of steps has begun, or how it ended."""
        self.write({"key": key, "from": first, "to": last, "outcome": outcome, "at": time.monotonic_ns()})

    @contextlib.contextmanager
    def handling(self, group: str, key: str, n: int, **more: Any) -> Iterator[None]:
        """One run of a handler, around its body."""
        run, ok = next(self._runs), False
        self.write({"run": run, "group": group, "key": key, "n": n, **more, "at": time.monotonic_ns()})
        try:
            yield
            ok = True
        finally:
            self.write({"run": run, "ok": ok, "at": time.monotonic_ns()})
