"""`trilogue demo bank` with real processes, really killed: the same command again completes, and no cent is missing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(290)]
TRANSFERS = 800
INVARIANTS = {
    "money_neither_made_nor_lost": True,
    "no_balance_below_limit": True,
    "versions_without_gaps": True,
    "every_projection_equals_a_fold_of_the_log": True,
    "every_transfer_ended": True,
}


class Demo:
    """The command, on one file, as often as it is needed."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "bank.db"
        self.running: list[subprocess.Popen[str]] = []

    def start(self, workers: int = 2) -> subprocess.Popen[str]:
        options = f"--accounts 12 --transfers {TRANSFERS} --writers 8 --workers {workers} --db {self.file} --report json"
        command = [sys.executable, "-m", "trilogue", "demo", "bank", *options.split()]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.running.append(process)
        return process

    def finish(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        report: dict[str, Any] = json.loads(out)
        assert report["load"]["invariants"] == INVARIANTS
        assert report["load"]["transfers"] == TRANSFERS
        assert report["load"]["completed"] + report["load"]["failed"] == TRANSFERS
        return report

    def count(self, type: str) -> int:
        # Another library's connection would be refused here, and harmful: this is the store's own.
        try:
            connection = apsw.Connection(str(self.file), flags=apsw.SQLITE_OPEN_READWRITE)
        except apsw.CantOpenError:
            return 0
        connection.set_busy_timeout(10_000)
        try:
            counted = "select count(*) from trilogue_records join trilogue_types t on t.id = type where t.name = ?"
            return int(connection.execute(counted, (type,)).fetchall()[0][0])
        except apsw.SQLError:  # its tables are not there yet
            return 0
        finally:
            connection.close()

    def end(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path)
    yield demo
    demo.end()


def until(look: Callable[[], bool], what: str, within_s: float = 120) -> None:
    end = time.monotonic() + within_s
    while not look():
        assert time.monotonic() < end, f"{what}, within {within_s} s"
        time.sleep(0.02)


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_killed_and_started_again(demo: Demo) -> None:
    for completed in (TRANSFERS // 10, TRANSFERS // 3):
        first = demo.start()
        until(lambda completed=completed: demo.count("transfer.completed") > completed, "transfers complete")
        workers = children(first)
        first.kill()
        assert first.wait(10) == -signal.SIGKILL
        until(lambda workers=workers: not any(map(is_alive, workers)), "a worker leaves when nobody wants it any more")
    demo.finish(demo.start())
    again = demo.finish(demo.start())
    assert again["scenario"]["balances"] == [1000, 1500, 1300, 500, 800, -400]


def test_a_worker_that_dies_is_replaced(demo: Demo) -> None:
    process = demo.start(workers=3)
    until(lambda: demo.count("transfer.requested") > TRANSFERS // 20, "transfers are asked for")
    os.kill(children(process)[0], signal.SIGKILL)
    assert demo.finish(process)["load"]["lost_workers"] == 1


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
