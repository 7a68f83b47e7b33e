"""The topics that are there, and making those that are not.

A topic that a producer or consumer brings about by naming it has the broker's number of partitions, and then keys are spread in
a way nobody chose. So topics are made here, on purpose, before anything is sent to them or read from them.
"""

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from trilogue.brokers.kafka.admin import Admin, Partition
from trilogue.brokers.kafka.settings import OVERHEAD_BYTES, Settings
from trilogue.errors import BadOption, Unavailable
from trilogue.events import Durability

PARTITIONS = 4
REPLICAS = 2  # so many in sync, at least, before a record survives the loss of a machine
KEPT_FOR_EVER = {"retention.ms": "-1"}


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic, with its prefix. durability: what a record in it survives."""

    name: str
    partitions: int
    durability: Durability


class Catalog:
    """What is known of topics with our prefix. version: grows with each one that is found."""

    def __init__(self, settings: Settings, admin: Admin) -> None:
        self._settings, self._admin = settings, admin
        self._topics: dict[str, Topic] = {}
        self._led: set[str] = set()
        self._turn = asyncio.Lock()
        self.version = 0

    @property
    def there(self) -> Collection[str]:
        """The topics that are known, without prefix."""
        return self._topics.keys()

    def known(self, name: str) -> Topic | None:
        """A topic by its name without prefix, None if it is not known."""
        return self._topics.get(name)

    def checked(self, name: str) -> Topic:
        """A topic that was there a moment ago; raises BadOption as ensure() does, Unavailable if it is gone."""
        topic = self._topics.get(name)
        if topic is None:
            raise Unavailable(f"{self._settings.shown}: topic {self._settings.prefix + name!r} was just deleted: publish again")
        self._check([name])
        return topic

    def partitions(self, names: Iterable[str]) -> list[Partition]:
        """All partitions of those of these topics that are known."""
        topics = [self._topics[name] for name in sorted(names) if name in self._topics]
        return [(topic.name, number) for topic in topics for number in range(topic.partitions)]

    def forget(self, full_name: str) -> None:
        """A topic is not there any more."""
        name = full_name.removeprefix(self._settings.prefix)
        self._led.discard(name)
        if self._topics.pop(name, None):
            self.version += 1

    async def refresh(self) -> None:
        """Look which topics are there."""
        found = await self._admin.topics()
        prefix = self._settings.prefix
        for name in [name for name in self._topics if prefix + name not in found]:
            self.forget(prefix + name)
        for full_name, (partitions, replicas) in found.items():
            known = self._topics.get(full_name.removeprefix(prefix))
            if known is None or known.partitions != partitions:
                self._note(Topic(full_name, partitions, await self._durability(full_name, replicas)))

    async def ensure(self, names: Collection[str], *, partitions: int | None = None, kept: bool = False) -> None:
        """Make the topics that are missing; returns when they take records. Raises Unavailable where ?topics=expect forbids it,
        BadOption for another number of partitions than the URL says.

        partitions: how many, where it is not the URL's number. kept: their records are never removed by age.
        """
        if any(name not in self._topics for name in names):
            async with self._turn:
                await self._make(names, partitions, self._config(kept))
        if any(name not in self._led for name in names):
            async with self._turn:  # of many that publish at once, one asks
                await self._wait_for_leaders([name for name in names if name not in self._led])
        if partitions is None:
            self._check(names)

    async def _wait_for_leaders(self, names: Collection[str]) -> None:
        """Return when the leader of each partition answers.

        A topic shows a moment before its brokers serve it. Of several requests sent then, the first is refused and the second
        taken, and the first one's records are confirmed later and never stored (KAFKA-15591).
        """
        if names:
            await self._admin.ends(self.partitions(names))  # asked again while there is no leader
            self._led.update(name for name in names if name in self._topics)

    async def _make(self, names: Collection[str], partitions: int | None, config: Mapping[str, str]) -> None:
        await self.refresh()
        missing = [self._settings.prefix + name for name in names if name not in self._topics]
        if missing and self._settings.topics == "expect":
            raise Unavailable(
                f"{self._settings.shown}: topic {missing[0]!r} is not there, and ?topics=expect lets nobody make it: create it "
                "with as many partitions as the busiest key order may ever need, or leave topics= out"
            )
        await self._admin.create(missing, partitions or self._settings.partitions or PARTITIONS, config)
        if missing:
            await self._seen(missing)

    async def _seen(self, full_names: Collection[str]) -> None:
        """Wait until new topics show, a moment after they were made."""
        for _ in range(50):
            await self.refresh()
            if all(name.removeprefix(self._settings.prefix) in self._topics for name in full_names):
                return
            await asyncio.sleep(0.02)
        raise Unavailable(f"{self._settings.shown}: topics {sorted(full_names)} were made and do not show; try again")

    def _config(self, kept: bool) -> dict[str, str]:
        # The broker's clock: it never falls with the offset, and a time can be looked up whoever published.
        config = {"message.timestamp.type": "LogAppendTime", "max.message.bytes": str(self._settings.max_bytes + OVERHEAD_BYTES)}
        return config | KEPT_FOR_EVER if kept else config

    def _check(self, names: Iterable[str]) -> None:
        wanted = self._settings.partitions
        for name in names:
            topic = self._topics.get(name)
            if topic is not None and wanted is not None and topic.partitions != wanted:
                raise BadOption(
                    f"{self._settings.shown}: topic {topic.name!r} has {topic.partitions} partitions: another number would send "
                    f"keys elsewhere and break their order; write partitions={topic.partitions}, or leave it out"
                )

    def _note(self, topic: Topic) -> None:
        self._topics[topic.name.removeprefix(self._settings.prefix)] = topic
        self.version += 1

    async def _durability(self, full_name: str, replicas: int) -> Durability:
        if replicas < REPLICAS:
            return "process-crash"
        config = await self._admin.topic_config(full_name)
        return "replicated" if int(config.get("min.insync.replicas") or 1) >= REPLICAS else "process-crash"
