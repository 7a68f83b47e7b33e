"""Rows that were no watches: counted, and written down with line number and reason.

file,line,reason,text
ratings.csv,17,time '-3' is negative,"1,50,4.0,-3"
"""

import csv
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trilogue.errors import BadOption

TEXT_CHARS = 1_000


class Rejects:
    """Where bad rows go; the file is made with the first of them.

    path: the file, replaced if it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._file: Any = None

    def add(self, file: str, line: int, reason: str, text: str) -> None:
        """Write down one bad row, cut after 1,000 characters. line: from 1. Raises BadOption if the file cannot be made."""
        if self._file is None:
            self._file = self._open()
            csv.writer(self._file).writerow(("file", "line", "reason", "text"))
        self.count += 1
        csv.writer(self._file).writerow((file, line, reason, text[:TEXT_CHARS]))

    def _open(self) -> Any:
        try:
            return self.path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        except OSError as error:
            raise BadOption(
                f"{self.path} for the rejected rows cannot be written ({error.strerror}): run in another folder, or with --db"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
