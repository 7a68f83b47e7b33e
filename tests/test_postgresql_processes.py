"""Two processes that work for one group on PostgreSQL: a fair share each, what is taken over, and who is fenced off."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from common import run
from test_postgresql import beside

from trilogue.conformance.tools import envelope, group
from trilogue.stores import open_store

pytestmark = pytest.mark.processes
HERE = Path(__file__).parent
RECORDS = 100


class Worker:
    """A process of postgresql_worker.py."""

    def __init__(self, url: str, machine: str) -> None:
        command = [sys.executable, str(HERE / "postgresql_worker.py"), url, machine]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: PT018
        self._in, self._out = self.process.stdin, self.process.stdout
        self._out.readline()

    def tell(self, order: str) -> dict[str, list[str]]:
        """Have it do something, and its answer."""
        self._in.write(order + "\n")
        self._in.flush()
        found: dict[str, list[str]] = json.loads(self._out.readline())
        return found

    def signal(self, sign: int) -> None:
        self.process.send_signal(sign)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self._in.close()
        self._out.close()


@contextmanager
def workers(url: str, *machines: str) -> Iterator[list[Worker]]:
    started: list[Worker] = []
    try:
        started.extend(Worker(url, machine) for machine in machines)
        yield started
    finally:
        for worker in started:
            worker.end()


def until(look: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not look():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def shares(url: str) -> list[int]:
    """How many slots each worker has."""
    with beside(url) as connection:
        return sorted(Counter(owner for (owner,) in connection.execute("select owner from trilogue_slots") if owner).values())


def done(url: str) -> int:
    with beside(url) as connection:
        [(count,)] = connection.execute("select coalesce(sum(done), 0)::integer from trilogue_slots").fetchall()
        return int(count)


def publish(url: str) -> set[str]:
    sent = [envelope(n, f"k{n}", id=f"id-{n}") for n in range(RECORDS)]

    async def append() -> None:
        await on(url, lambda store: store.append(sent))

    run(append())
    return {each.id for each in sent}


async def on(url: str, what: Callable[[Any], Any]) -> None:
    """Do something with a store of this process, which does not work for the group."""
    store = open_store(url)
    await store.open()
    try:
        await store.bind([group()], work=False)
        await what(store)
    finally:
        await store.close()


def all_of(workers: list[Worker], wanted: set[str]) -> list[set[str]]:
    """What each of them is lent until everything is out."""
    got: list[set[str]] = [set() for _ in workers]

    def claim() -> bool:
        for worker, own in zip(workers, got, strict=True):
            own |= set(worker.tell("claim")["ids"])
        return set().union(*got) >= wanted

    until(claim, "not everything was lent")
    return got


@pytest.mark.parametrize("machines", [("one", "one"), ("one", "two")])
def test_two_share_and_one_takes_over_from_one_that_was_killed(postgresql_url: str, machines: tuple[str, str]) -> None:
    """On one machine its pid tells that it is gone, on two the lease does."""
    with workers(postgresql_url, *machines) as (first, second):
        until(lambda: shares(postgresql_url) == [32, 32], "the slots are not shared fairly")
        sent = publish(postgresql_url)
        firsts, seconds = all_of([first, second], sent)
        assert firsts
        assert seconds
        assert not firsts & seconds
        assert second.tell("settle") == {"lost": []}
        first.signal(signal.SIGKILL)
        [again] = all_of([second], firsts)
        assert again == firsts
        assert second.tell("settle") == {"lost": []}
        assert shares(postgresql_url) == [64]
        assert done(postgresql_url) == RECORDS


@pytest.mark.parametrize("what", ["takes over", "rename", "drop"])
def test_one_that_was_frozen_changes_nothing_when_it_wakes(postgresql_url: str, what: str) -> None:
    with workers(postgresql_url, "one") as (frozen,):
        sent = publish(postgresql_url)
        [held] = all_of([frozen], sent)
        assert held == sent
        frozen.signal(signal.SIGSTOP)
        if what == "takes over":
            with workers(postgresql_url, "two") as (other,):
                all_of([other], sent)
                assert other.tell("settle") == {"lost": []}
            settled = RECORDS
        else:
            run(on(postgresql_url, _moved if what == "rename" else lambda store: store.drop_group("readers")))
            settled = 0
        frozen.signal(signal.SIGCONT)
        assert set(frozen.tell("settle")["lost"]) == sent
        assert done(postgresql_url) == settled


async def _moved(store: Any) -> None:
    await store.transact(lambda tx: tx.rename_group("readers", "others"))
