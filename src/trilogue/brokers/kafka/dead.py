"""Dead letters: a topic for each group, of one partition.

    shop-mailer.dead   0 letter   1 letter   2 letter   3 settled [0, 2]   4 letter
                                  └ these two are left ─────────────────────┘

A letter is the record as it was, with why it died in `trilogue-…` headers. What was given back or dropped is written behind the
letters, and not kept as a group's offset: an empty group's offsets are forgotten after a week. The space of what is settled at
the front is given back. A letter's position is its offset + 1.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
from confluent_kafka import Consumer, Message, TopicPartition

from trilogue.brokers.kafka.admin import Admin, quiet
from trilogue.brokers.kafka.catalog import Catalog
from trilogue.brokers.kafka.producer import Letter, Producer
from trilogue.brokers.kafka.settings import Settings
from trilogue.brokers.kafka.topics import DEAD, dead_topic, redrive_topic
from trilogue.brokers.kafka.wire import headers_of
from trilogue.errors import LogError, Unavailable
from trilogue.events import Delivery, Record, now_us
from trilogue.ports import DeadLetter

SETTLED = "trilogue-settled"
ERROR_CHARS, TRACEBACK_CHARS = 2_000, 20_000
READ_S = 15.0
PAGE = 1_000


@dataclass(frozen=True, slots=True)
class DeadLetters:
    """What reads and writes them."""

    settings: Settings
    admin: Admin
    catalog: Catalog
    producer: Producer
    read: Callable[[Message], Record]

    async def add(self, delivery: Delivery, attempts: int, error: str, traceback: str) -> None:
        """Write a letter; returns when it is confirmed, raises what the broker said otherwise."""
        record, topic = delivery.record, dead_topic(delivery.group)
        await self.catalog.ensure([topic], partitions=1, kept=True)
        headers = [
            *headers_of(record),
            ("trilogue-group", delivery.group.encode()),
            ("trilogue-attempts", b"%d" % attempts),
            ("trilogue-error", error[:ERROR_CHARS].encode()),
            ("trilogue-traceback", traceback[-TRACEBACK_CHARS:].encode()),
            ("trilogue-died", b"%d" % now_us()),
            ("trilogue-from", f"{record.topic}[{record.partition}] offset {record.position}".encode()),
        ]
        key = None if record.key is None else record.key.encode()
        await self._send([(self.settings.prefix + topic, key, record.data, headers)])

    async def listed(self, group: str | None, after: int, limit: int) -> list[DeadLetter]:
        """Letters of a group or of all, by position."""
        await self.catalog.refresh()
        topics = sorted(name for name in self.catalog.there if name.endswith(DEAD)) if group is None else [dead_topic(group)]
        found = [letter for topic in topics for letter in await self._unsettled(topic, after, limit)]
        return sorted(found, key=lambda letter: letter.record.position)[:limit]

    async def redrive(self, group: str, positions: Sequence[int] | None) -> int:
        """Give letters to the group alone; confirmed before they count as settled."""
        await self.catalog.ensure([redrive_topic(group)], kept=True)
        target = self.settings.prefix + redrive_topic(group)

        async def give_back(letters: list[DeadLetter]) -> None:
            records = [letter.record for letter in letters]
            await self._send(
                [(target, each.key.encode() if each.key is not None else None, each.data, headers_of(each)) for each in records]
            )

        return await self._settle(group, positions, give_back)

    async def drop(self, group: str, positions: Sequence[int] | None) -> int:
        """Forget letters."""
        return await self._settle(group, positions, None)

    async def _settle(
        self, group: str, positions: Sequence[int] | None, first: Callable[[list[DeadLetter]], Awaitable[None]] | None
    ) -> int:
        await self.catalog.refresh()
        topic, count, after = dead_topic(group), 0, 0
        chosen = None if positions is None else set(positions)
        while letters := await self._unsettled(topic, after, PAGE):
            after = letters[-1].record.position
            letters = [letter for letter in letters if chosen is None or letter.record.position in chosen]
            if not letters:
                continue
            if first is not None:
                await first(letters)
            marks = msgspec.json.encode([letter.record.position - 1 for letter in letters])
            await self._send([(self.settings.prefix + topic, None, marks, [(SETTLED, b"1")])])
            count += len(letters)
        if count and self.settings.topics == "create":
            await self._give_back_space(topic)
        return count

    async def _give_back_space(self, topic: str) -> None:
        left = await self._unsettled(topic, 0, 1)
        full_name = self.settings.prefix + topic
        end = (await self.admin.ends([(full_name, 0)]))[full_name, 0]
        await self.admin.delete_records(full_name, left[0].record.position - 1 if left else end)

    async def _send(self, letters: Sequence[Letter]) -> None:
        for outcome in await self.producer.send(letters):
            if isinstance(outcome, LogError):
                raise outcome

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _unsettled(self, topic: str, after: int, limit: int) -> list[DeadLetter]:
        if self.catalog.known(topic) is None:
            return []
        partition = (self.settings.prefix + topic, 0)
        first, end = (await self.admin.beginnings([partition]))[partition], (await self.admin.ends([partition]))[partition]
        return await asyncio.to_thread(self._read_unsettled, partition[0], first, end, after, limit)

    def _read_unsettled(self, topic: str, first: int, end: int, after: int, limit: int) -> list[DeadLetter]:
        settled: set[int] = set()
        for _, headers, message in self._messages(topic, first, end):
            if SETTLED in headers:
                settled.update(msgspec.json.decode(message.value() or b"[]", type=list[int]))
        found: list[DeadLetter] = []
        for offset, headers, message in self._messages(topic, max(first, after), end):
            if len(found) == limit:
                break
            if SETTLED not in headers and offset not in settled:
                found.append(self._letter(topic, headers, message))
        return found

    def _messages(self, topic: str, first: int, end: int) -> Iterator[tuple[int, dict[str, bytes], Message]]:
        if first >= end:
            return
        config = self.settings.consumer(f"{self.settings.prefix}trilogue-dead-reader") | {
            "auto.offset.reset": "earliest",
            "enable.partition.eof": True,
            "group.protocol": "classic",
        }
        reader = Consumer(config, logger=quiet)
        try:
            reader.assign([TopicPartition(topic, 0, first)])
            yield from _until(reader, end, self.settings.shown)
        finally:
            reader.close()

    def _letter(self, topic: str, headers: dict[str, bytes], message: Message) -> DeadLetter:
        record = self.read(message)
        said = {
            name: (headers.get(f"trilogue-{name}") or b"").decode(errors="replace") for name in ("group", "error", "traceback")
        }
        return DeadLetter(
            said["group"] or topic.removeprefix(self.settings.prefix).removesuffix(DEAD),
            msgspec.structs.replace(record, position=record.position + 1),
            int(headers.get("trilogue-attempts") or 0),
            said["error"],
            said["traceback"],
            int(headers.get("trilogue-died") or record.recorded_us),
            parked=False,
        )


def _until(reader: Consumer, end: int, shown: str) -> Iterator[tuple[int, dict[str, bytes], Message]]:
    """Messages below an offset; raises Unavailable if they do not come."""
    until = time.monotonic() + READ_S
    while time.monotonic() < until:
        message = reader.poll(0.2)
        if message is None:
            continue
        if (error := message.error()) is not None:
            if error.name() == "_PARTITION_EOF":
                return
            raise Unavailable(f"{shown}: dead letters cannot be read: {error.str()}")
        offset = message.offset() or 0
        if offset >= end:
            return
        pairs = message.headers() or []
        yield offset, dict(pairs), message  # type: ignore[arg-type]
        if offset == end - 1:
            return
        until = time.monotonic() + READ_S
    raise Unavailable(f"{shown}: dead letters did not come within {READ_S:g} s")
