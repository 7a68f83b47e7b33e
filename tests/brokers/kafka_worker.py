"""A worker of its own process, to be killed and frozen: writes `key number` of every event it handles to a shared file.

python kafka_worker.py URL FILE SECONDS_PER_EVENT
"""

import asyncio
import os
import random
import sys

from trilogue.brokers import open_broker
from trilogue.events import Delivery, Group

HANDS = 8


async def main(url: str, path: str, seconds: float) -> None:
    broker = open_broker(url)
    await broker.open()
    await broker.bind([Group("readers", ("video.*",), start="beginning")])
    # Appended line by line: what all the workers wrote is in the order in which they wrote it.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        deliveries = await broker.receive("readers", limit=200, wait_s=1.0)
        by_key: dict[str, list[Delivery]] = {}
        for delivery in deliveries:
            by_key.setdefault(delivery.record.key or "", []).append(delivery)
        runs = list(by_key.values())
        random.shuffle(runs)  # keys go on independently, so finished offsets lie above what is out
        hands = asyncio.Semaphore(HANDS)

        async def handle(run: list[Delivery], hands: asyncio.Semaphore = hands) -> None:
            async with hands:
                for delivery in run:
                    if delivery.lease.lost:
                        return
                    os.write(file, f"{delivery.record.key} {delivery.record.data[5:-1].decode()}\n".encode())
                    await asyncio.sleep(seconds)
                    await broker.acknowledge("readers", [delivery])

        await asyncio.gather(*(handle(run) for run in runs))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
