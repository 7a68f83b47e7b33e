"""Partitions that move: members join and leave, are killed, stand still. Nothing is lost, nothing overtakes within a key."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from confluent_kafka import Message, TopicPartition
from kafka_tools import happened, kafka, numbers, publish, readers, receive, run, until, url

from trilogue import App, event
from trilogue.brokers.kafka.lane import Place
from trilogue.brokers.kafka.lanes import Lanes, lane_of
from trilogue.brokers.kafka.member import Member
from trilogue.brokers.kafka.settings import read
from trilogue.events import Delivery, Record

__all__ = ["url"]

KEYS = 40
WORKER = Path(__file__).with_name("kafka_worker.py")


class Handled:
    """What was handled of each key, in order. duplicates: how often something was handled again."""

    def __init__(self) -> None:
        self.by_key: dict[str, list[int]] = defaultdict(list)

    def add(self, key: str, number: int) -> None:
        self.by_key[key].append(number)

    def check(self, count: int, keys: int) -> int:
        """All of it, each key in order: going back is a redelivery, skipping ahead is a loss. How many came twice."""
        for key in range(keys):
            seen = self.by_key[f"k{key}"]
            assert sorted(set(seen)) == list(range(key, count, keys)), f"k{key}: lost {set(range(key, count, keys)) - set(seen)}"
            newest = key - keys
            for number in seen:
                assert number <= newest + keys, f"k{key}: {number} overtook {newest + keys}"
                newest = max(newest, number)
        return sum(len(seen) - len(set(seen)) for seen in self.by_key.values())


# ── join and leave, in one process ───────────────────────────────────────────────────────────────────────────────────


async def work(broker: object, handled: Handled, stop: asyncio.Event) -> None:
    """Handle what comes, key by key, a few keys at once."""
    while not stop.is_set():
        deliveries = await broker.receive("readers", limit=100, wait_s=0.2)  # type: ignore[attr-defined]
        by_key: dict[str, list[Delivery]] = defaultdict(list)
        for delivery in deliveries:
            by_key[delivery.record.key or ""].append(delivery)
        await asyncio.gather(*(one_key(broker, handled, run, stop) for run in by_key.values()))


async def one_key(broker: object, handled: Handled, run: list[Delivery], stop: asyncio.Event) -> None:
    for delivery in run:
        if delivery.lease.lost or stop.is_set():
            return
        handled.add(delivery.record.key or "", numbers([delivery])[0])
        await asyncio.sleep(0.001)
        await broker.acknowledge("readers", [delivery])  # type: ignore[attr-defined]


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_members_come_and_go(url: str, protocol: str) -> None:
    count = 6_000

    async def main() -> None:
        handled = Handled()
        at = f"{url}&session_s=4&protocol={protocol}"

        async def member(steps: int) -> None:
            async with kafka(at, readers()) as broker:
                stop = asyncio.Event()
                task = asyncio.create_task(work(broker, handled, stop))
                for _ in range(steps):
                    goal = sum(map(len, handled.by_key.values())) + count // 8
                    while sum(map(len, handled.by_key.values())) < min(goal, count):
                        await asyncio.sleep(0.02)
                stop.set()
                await task

        async with kafka(at, readers(), work=False) as publisher:
            await asyncio.gather(
                publish(publisher, (happened(n, keys=KEYS) for n in range(count))), member(8), member(2), member(3), member(5)
            )
            async with kafka(at, readers()) as last:
                stop = asyncio.Event()
                task = asyncio.create_task(work(last, handled, stop))

                async def is_done() -> bool:
                    return sum(lane.lag or 0 for lane in await publisher.lanes("readers")) == 0

                await until(is_done, "no lag")
                stop.set()
                await task
        # Whoever leaves waits for what is out, and says what is finished; a commit that meets a rebalance may be refused.
        assert handled.check(count, KEYS) < count // 12

    run(main())


def test_a_partition_that_goes_waits_for_what_is_out(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&partitions=2&drain_s=20", readers()) as first:
            await publish(first, (happened(n) for n in range(20)))
            out = await receive(first, 20)
            async with kafka(f"{url}&partitions=2", readers()) as second:

                async def is_asked() -> bool:
                    return any(lane_of(each).lease.ending for each in out)

                await until(is_asked, "one of the two partitions is asked back")
                moving = [each for each in out if lane_of(each).lease.ending]
                assert not any(each.lease.revoked for each in moving)
                assert all(each.lease.lost for each in moving), "no handler begins with them any more"
                assert await second.receive("readers", limit=10, wait_s=0.5) == []
                assert await first.acknowledge("readers", moving) == []
                await publish(second, (happened(n) for n in range(20, 40)))
                fresh = await receive(second, 1)
                assert numbers(fresh)[0] >= 20  # what was finished while it waited does not come again
                assert all(each.lease.revoked for each in moving)
                assert not any(each.lease.lost for each in out if each not in moving)

    run(main())


def test_a_partition_that_goes_waits_no_longer_than_it_may(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&partitions=2&drain_s=0.3", readers()) as first:
            await publish(first, (happened(n) for n in range(20)))
            out = await receive(first, 20)
            async with kafka(f"{url}&partitions=2", readers()) as second:
                again = await receive(second, 1)
                lost = [each for each in out if each.lease.lost]
                assert await first.acknowledge("readers", out) == lost
                again += await receive(second, len(lost) - 1)
                assert sorted(numbers(again)) == sorted(numbers(lost))

    run(main())


def test_drains_are_bounded_and_end_early() -> None:
    lanes = Lanes("g")
    lanes.add({("t", 0): Place(0)}, lambda: 0)
    lane = lanes.all()[0]
    deliveries = [Delivery(Record("1", "a", b"", position=n, topic="t", partition=0), "g", lane.lease) for n in range(3)]
    lanes.put(deliveries)
    assert lanes.take(2) == deliveries[:2]
    lanes.drain([lane], 0.05, lambda: False)  # returns although two are out
    assert lanes.take(10) == []  # nothing more of it is lent
    lanes.release(deliveries[:1])
    threading.Timer(0.05, lanes.finish, [deliveries[1:2]]).start()
    lanes.drain([lane], 60, lambda: False)
    lanes.revoke([lane])
    assert lanes.finish(deliveries[:1]) == deliveries[:1]
    assert lane.place() == Place(0, (1,))


def test_what_is_for_nobody_is_passed_over_when_it_is_asked_again() -> None:
    lanes = Lanes("g")
    lanes.add({("t", 0): Place(0)}, lambda: 0)
    lane = lanes.all()[0]
    wanted = Delivery(Record("1", "a", b"", position=4, topic="t", partition=0), "g", lane.lease)
    lanes.put([(lane, 0, 4), wanted, (lane, 5, 9)])
    assert lanes.take(10) == [wanted]
    assert lanes.finish([wanted]) == []
    assert (lane.place(), lanes.has_passed) == (Place(0, (4,)), True)
    lanes.drain([lane], 60, lambda: False)  # does not wait for them
    assert lanes.take(10) == []
    assert (lane.place(), lanes.has_passed, lane.out, lane.back) == (Place(9), False, {}, set())


class Recording:
    """Stands where the consumer stands when librdkafka tells that partitions are lost."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def commit(self, **_: object) -> None:
        self.calls.append("commit")

    def incremental_unassign(self, _: object) -> None:
        self.calls.append("unassign")


def test_what_was_lost_is_never_committed(url: str) -> None:
    async def main() -> None:
        async with kafka(f"{url}&partitions=1", readers()) as broker:
            await publish(broker, (happened(n) for n in range(5)))
            out = await receive(broker, 5)
            await broker.pause("readers")
            member = broker._members["readers"]
            lane = lane_of(out[0])
            member._commit_at_s = time.monotonic() + 3_600  # nothing is committed but by what follows
            assert await broker.acknowledge("readers", out[:2]) == []
            recording = Recording()
            member._on_lost(recording, [TopicPartition(lane.topic, lane.partition)])  # type: ignore[arg-type]
            assert recording.calls == ["unassign"]
            assert all(each.lease.lost for each in out)
            assert await broker.acknowledge("readers", out[2:]) == out[2:]
        async with kafka(url, readers()) as broker:
            assert numbers(await receive(broker, 5)) == list(range(5))

    run(main())


# ── killed and frozen, in processes of their own ─────────────────────────────────────────────────────────────────────


@contextmanager
def worker(url: str, file: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, str(WORKER), url, str(file), "0.002"])
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


async def handled_more(file: Path, more: int) -> None:
    goal = len(lines(file)) + more

    async def is_there() -> bool:
        return len(lines(file)) >= goal

    await until(is_there, f"{more} more events are handled")


def checked(file: Path, count: int) -> int:
    handled = Handled()
    for line in lines(file):
        key, number = line.split()
        handled.add(key, int(number))
    return handled.check(count, KEYS)


async def finished(url: str, file: Path, count: int) -> None:
    async with kafka(url) as looking:

        async def is_done() -> bool:
            return len(set(lines(file))) == count and sum(lane.lag or 0 for lane in await looking.lanes("readers")) == 0

        await until(is_done, f"all {count} are handled; {len(set(lines(file)))} were")


@pytest.mark.processes
def test_killed_workers_lose_nothing_and_repeat_little(url: str, tmp_path: Path) -> None:
    count, at, file = 12_000, f"{url}&session_s=2", tmp_path / "handled"

    async def main() -> None:
        async with kafka(at, readers(), work=False) as publisher:
            await publish(publisher, (happened(n, keys=KEYS) for n in range(count)))
        with ExitStack() as stack:
            stack.enter_context(worker(at, file))
            for _ in range(2):
                victim = stack.enter_context(worker(at, file))
                await handled_more(file, 2_500)
                victim.kill()
            await finished(at, file, count)
        # Each was killed with at most 8 in hand, and 0.2 s of commits not yet made.
        assert checked(file, count) < 1_500

    run(main())


@pytest.mark.processes
def test_a_worker_that_stood_still_finds_its_partitions_gone(url: str, tmp_path: Path) -> None:
    count, at, file = 6_000, f"{url}&session_s=2", tmp_path / "handled"

    async def main() -> None:
        async with kafka(at, readers(), work=False) as publisher:
            await publish(publisher, (happened(n, keys=KEYS) for n in range(count)))
        with worker(at, file) as frozen, worker(at, file):
            await handled_more(file, 1_000)
            os.kill(frozen.pid, signal.SIGSTOP)
            began = time.monotonic()
            while time.monotonic() - began < 4:  # twice a session
                await asyncio.sleep(0.1)
            os.kill(frozen.pid, signal.SIGCONT)
            await finished(at, file, count)
        checked(file, count)

    run(main())


# ── without a fault nothing comes twice ──────────────────────────────────────────────────────────────────────────────


@event("thing.done", key="k")
@dataclass(frozen=True)
class Done:
    k: str
    n: int


@pytest.mark.parametrize("beside", ["sqlite", None])
def test_a_worker_that_joins_makes_nobody_repeat(url: str, tmp_path: Path, beside: str | None) -> None:
    handled: Counter[int] = Counter()
    many = 800

    def worker() -> App:
        app = App(url, store=beside and f"sqlite:///{tmp_path}/a.db")

        @app.on(group="slow", concurrency=16, start="beginning")
        async def slow(e: Done) -> None:
            await asyncio.sleep(0.1)
            handled[e.n] += 1

        return app

    async def main() -> None:
        one, two = worker(), worker()
        async with one.running():
            await one.publish_many([Done(f"k{n % 40}", n) for n in range(many)])
            await as_soon_as(lambda: len(handled) > 50)
            async with two.running():
                await as_soon_as(lambda: len(handled) == many)
                await asyncio.sleep(0.5)
        assert handled == Counter(range(many))

    async def as_soon_as(holds: Callable[[], bool]) -> None:
        while not holds():
            await asyncio.sleep(0.02)

    run(main())


# ── in the middle of receiving ───────────────────────────────────────────────────────────────────────────────────────


class Moving:
    """A consumer whose partition goes and comes again, from offset 5, between two of its calls."""

    def __init__(self, lanes: Lanes, *, moves: bool) -> None:
        self.lanes, self.moves = lanes, moves

    def poll(self, _: float) -> Message:
        return self._message(9)

    def consume(self, *_: float) -> list[Message]:
        if self.moves:
            self.lanes.forget(self.lanes.all())
            self.lanes.add({("t", 0): Place(5)}, lambda: 0)
            return [self._message(5), self._message(6)]
        return [self._message(10)]

    def _message(self, offset: int) -> Message:
        return Message(topic="t", partition=0, offset=offset, value=b"{}")


@pytest.mark.parametrize(("moves", "offsets"), [(False, [9, 10]), (True, [5, 6])])
def test_a_message_of_an_assignment_that_is_over_is_not_taken_for_one_of_the_next(moves: bool, offsets: list[int]) -> None:
    member = object.__new__(Member)  # without its thread
    member._settings, member._lanes, member._halted = read("kafka://nowhere"), Lanes("readers"), False
    member._lanes.add({("t", 0): Place(9)}, lambda: 0)
    messages = member._poll(Moving(member._lanes, moves=moves))  # type: ignore[arg-type]
    assert [message.offset() for message in messages] == offsets
