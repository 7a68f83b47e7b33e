"""RabbitMQ killed, stopped, frozen and out of memory while programs publish and handle: a server of the tests' own."""

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from amqp import envelope, opened, published, taken, until
from services import own_servers, sets

from trilogue import OutcomeUnknown, Unavailable
from trilogue.brokers.rabbitmq import RabbitMQ
from trilogue.events import Envelope, Group, Receipt

GROUPS = [Group(f"readers{n}", ("video.#",)) for n in range(3)]
KEYS = 5
AGAIN_S = 15

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("rabbitmq")
    with own_servers(folder, "rabbitmq"):
        yield folder


def url(folder: Path) -> str:
    return sets.running(folder)["rabbitmq"]["url"] + "?timeout_s=20"


def control(folder: Path, *command: str) -> None:
    process = sets.running(folder)["rabbitmq"]["processes"][-1]
    program = Path(process["argv"][0]).with_name("rabbitmqctl")
    subprocess.run([program, *command], env=process["env"], check=True, capture_output=True, timeout=60)


class Load:
    """Publishes without pause and handles everything, until it is told to stop; remembers what became of each event."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.sure: dict[str, int] = {}
        self.unknown: set[str] = set()
        self.absent: set[str] = set()
        self.seen: dict[str, list[str]] = {group.name: [] for group in GROUPS}
        self.sequence: dict[tuple[str, str], list[int]] = {}
        self.number = 0
        self.is_over = False

    async def publish(self, broker: RabbitMQ) -> None:
        while not self.is_over:
            batch = []
            for _ in range(20):
                self.number += 1
                batch.append(envelope(self.number, key=f"k{self.number % KEYS}"))
            for one, outcome in zip(batch, await broker.publish(batch), strict=True):
                self.note(one, outcome)
            await asyncio.sleep(0.005)

    def note(self, one: Envelope, outcome: object) -> None:
        if isinstance(outcome, Receipt):
            self.sure[one.id] = int(one.data[5:-1])
        elif isinstance(outcome, OutcomeUnknown):
            self.unknown.add(one.id)
        else:
            assert isinstance(outcome, Unavailable)
            self.absent.add(one.id)

    async def handle(self, broker: RabbitMQ, group: str) -> None:
        while group in broker._consumers:
            for delivery in (got := await broker.receive(group, limit=50, wait_s=1)):
                self.seen[group].append(delivery.record.id)
                self.sequence.setdefault((group, delivery.record.key or ""), []).append(int(delivery.record.data[5:-1]))
            await broker.acknowledge(group, got)

    def check(self) -> None:
        for group in GROUPS:
            seen = set(self.seen[group.name])
            assert self.sure.keys() <= seen, "lost"
            assert not self.absent & seen, "certainly not there, and yet there"
        for where, numbers in self.sequence.items():
            first = list(dict.fromkeys(numbers))
            assert first == sorted(first), f"reordered: {where}"


async def _under_load(folder: Path, prefix: str, hurt: str) -> Load:
    load = Load(prefix)
    async with opened(url(folder) + f"&prefix={prefix}", *GROUPS, restarts=None) as broker:
        publishing = asyncio.create_task(load.publish(broker))
        handling = [asyncio.create_task(load.handle(broker, group.name)) for group in GROUPS]
        # RabbitMQ 3.10.8 killed within a second of declaring a quorum queue can leave it without a leader for good.
        old_enough = time.monotonic() + 3
        await until(lambda: len(load.sure) > 500 and time.monotonic() > old_enough)
        await asyncio.to_thread(getattr(sets, hurt), folder, "rabbitmq")
        await asyncio.sleep(0.5)
        await asyncio.to_thread(sets.start, folder, "rabbitmq")
        back = time.monotonic()
        before = {group.name: len(load.seen[group.name]) for group in GROUPS}
        await until(lambda: all(len(load.seen[name]) > count for name, count in before.items()))
        took_s = time.monotonic() - back
        enough = len(load.sure) + 500
        await until(lambda: len(load.sure) > enough)
        load.is_over = True
        await publishing
        last = envelope(-1, "video.last", key=None)
        await published(broker, [last])
        await until(lambda: all(last.id in seen for seen in load.seen.values()))
        for task in handling:
            task.cancel()
        await asyncio.gather(*handling, return_exceptions=True)
    print(f"{hurt}: consuming again after {took_s:.1f} s")
    assert took_s < AGAIN_S
    return load


@pytest.mark.parametrize("hurt", ["kill", "stop"])
def test_every_consumer_consumes_again_and_nothing_confirmed_is_lost(server: Path, hurt: str) -> None:
    load = asyncio.run(asyncio.wait_for(_under_load(server, f"{hurt}-", hurt), 120))
    load.check()


def test_a_frozen_server_is_given_up_and_found_again(server: Path) -> None:
    async def main() -> None:
        async with opened(url(server) + "&prefix=frozen-&heartbeat_s=1&connect_timeout_s=2", GROUPS[0], restarts=None) as broker:
            await published(broker, [envelope(1)])
            first = await taken(broker, "readers0", 1)
            sets.freeze(server, "rabbitmq")
            try:
                # The silence is noticed, although nobody closes a connection.
                await until(lambda: first[0].lease.lost)
            finally:
                sets.thaw(server, "rabbitmq")
            [outcome] = await broker.publish([envelope(2)])
            assert isinstance(outcome, Receipt)
            again = await taken(broker, "readers0", 2)
            assert [d.record.data for d in again] == [b'{"n":1}', b'{"n":2}']

    asyncio.run(asyncio.wait_for(main(), 100))


def test_without_memory_nothing_is_published_and_handling_goes_on(server: Path) -> None:
    async def main() -> None:
        address = sets.running(server)["rabbitmq"]["url"] + "?prefix=memory-"
        async with opened(address, GROUPS[0]) as reader, opened(address + "&timeout_s=1", restarts=None) as broker:
            await published(broker, [envelope(n) for n in range(10)])
            await asyncio.to_thread(control, server, "set_vm_memory_high_watermark", "0.0000001")
            try:
                # One that was on its way when it began may be there or not; then none is sent any more.
                await until(lambda: refused(broker))
                said = (await broker.describe())["publishing"]
                assert "memory" in said
                got = await taken(reader, "readers0", 10)
                assert await reader.acknowledge("readers0", got) == []
                assert (await reader.lanes("readers0"))[0].in_flight == 0
            finally:
                await asyncio.to_thread(control, server, "set_vm_memory_high_watermark", "0.4")
            await until(lambda: stored(broker))
            assert broker._writing.restarts == 0

    async def refused(broker: RabbitMQ) -> bool:
        [outcome] = await broker.publish([envelope(99)])
        if isinstance(outcome, Unavailable) and "takes none at present" in str(outcome):
            return True
        assert isinstance(outcome, (Receipt, OutcomeUnknown))
        return False

    async def stored(broker: RabbitMQ) -> bool:
        return isinstance((await broker.publish([envelope(100)]))[0], Receipt)

    asyncio.run(asyncio.wait_for(main(), 100))
