"""What is asked of the cluster itself: topics, offsets, groups. Everything awaitable, everything with a time limit.

librdkafka's futures belong to a thread of its own; here they become awaitable, and its errors sentences.
"""

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType

from trilogue.brokers.kafka.lane import Place, decoded
from trilogue.brokers.kafka.settings import Settings
from trilogue.errors import Unavailable, Unsupported

T = TypeVar("T")
Partition = tuple[str, int]
REQUEST_S = 15.0
LOOK_S = 0.5
GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC)
REFUSED = (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL)
NOT_ALLOWED = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)

log = logging.getLogger("trilogue")


class Admin:
    """One administrative client."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._refusal: str | None = None
        self._reason = "no answer"
        config = settings.common() | {"error_cb": self._noted}
        self._client = AdminClient(config, logger=quiet)

    def _noted(self, error: KafkaError) -> None:
        self._reason = error.str()
        if error.code() in REFUSED:
            self._refusal = error.str()

    # ── topics ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def reach(self) -> int:
        """Wait until the cluster answers; how many brokers it has. Raises Unavailable, at once if it refuses us."""
        until = time.monotonic() + self._settings.connect_timeout_s
        while True:
            try:
                # The client's own thread delivers what went wrong; a short wait each time, so that a refusal is seen soon.
                return len((await asyncio.to_thread(self._client.list_topics, timeout=LOOK_S)).brokers)
            except KafkaException as error:
                last = error.args[0].str()
            if self._refusal is not None:
                raise Unavailable(f"{self._settings.shown}: the server refuses us: {self._refusal}; check user, password and TLS")
            if time.monotonic() > until:
                raise Unavailable(
                    f"{self._settings.shown}: no Kafka broker answered within {self._settings.connect_timeout_s:g} s "
                    f"({self._reason or last}): is it running, and is this its address?"
                )

    async def topics(self) -> dict[str, tuple[int, int]]:
        """All topics with our prefix: how many partitions, and replicas of each, they have."""
        metadata = await self._blocking(lambda: self._client.list_topics(timeout=REQUEST_S))
        return {
            name: (len(topic.partitions), min(len(each.replicas) for each in topic.partitions.values()))
            for name, topic in metadata.topics.items()
            if name.startswith(self._settings.prefix) and topic.error is None and topic.partitions
        }

    async def create(self, names: Iterable[str], partitions: int, config: Mapping[str, str]) -> None:
        """Create topics; one that somebody else has just created is right, too."""
        new = [NewTopic(name, partitions, self._settings.replication or -1, config=dict(config)) for name in names]
        futures = self._client.create_topics(new, request_timeout=REQUEST_S) if new else {}
        for name, future in futures.items():
            try:
                await self._answer(f"creating topic {name!r}", future)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise self.trouble(f"creating topic {name!r}", error) from error

    async def delete(self, names: Sequence[str]) -> None:
        """Delete topics, those that are there."""
        futures = self._client.delete_topics(list(names), request_timeout=REQUEST_S) if names else {}
        for name, future in futures.items():
            await self._but(GONE, f"deleting topic {name!r}", future)

    async def delete_records(self, topic: str, before: int) -> None:
        """Give back the space of the records of a topic of one partition that lie before an offset."""
        futures = self._client.delete_records([TopicPartition(topic, 0, before)], request_timeout=REQUEST_S)
        for future in futures.values():
            await self._but(GONE, f"deleting records of topic {topic!r}", future)

    async def topic_config(self, topic: str) -> dict[str, str]:
        """The settings of a topic."""
        resource = ConfigResource(ResourceType.TOPIC, topic)
        future = self._client.describe_configs([resource], request_timeout=REQUEST_S)[resource]
        entries: Mapping[str, Any] = await self._done(f"asking for the settings of topic {topic!r}", future)
        return {name: entry.value for name, entry in entries.items()}

    # ── offsets ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def ends(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The offset the next record of each partition gets."""
        return await self._offsets(partitions, OffsetSpec.latest())

    async def beginnings(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The oldest offset each partition holds."""
        return await self._offsets(partitions, OffsetSpec.earliest())

    async def at_time(self, partitions: Iterable[Partition], time_us: int) -> dict[Partition, int]:
        """The first offset of each partition that was recorded at a time or after it; its end if there is none."""
        partitions = list(partitions)
        found = await self._offsets(partitions, OffsetSpec.for_timestamp(max(0, -(-time_us // 1_000))))
        late = await self.ends([each for each, offset in found.items() if offset < 0])
        return found | late

    async def _offsets(self, partitions: Iterable[Partition], spec: OffsetSpec) -> dict[Partition, int]:
        asked = {TopicPartition(topic, number): spec for topic, number in partitions}
        futures = self._client.list_offsets(asked, request_timeout=REQUEST_S) if asked else {}
        return {
            (each.topic, each.partition): (await self._done(f"asking for offsets of {each.topic!r}", future)).offset
            for each, future in futures.items()
        }

    async def committed(self, group_id: str) -> dict[Partition, Place]:
        """Where a group is; empty for one that has never been."""
        request = [ConsumerGroupTopicPartitions(group_id)]
        future = self._client.list_consumer_group_offsets(request, request_timeout=REQUEST_S)[group_id]
        try:
            answer = await self._answer(f"asking for the offsets of group {group_id!r}", future)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return {}
            raise self.trouble(f"asking for the offsets of group {group_id!r}", error) from error
        return {
            (each.topic, each.partition): decoded(each.offset, each.metadata)
            for each in answer.topic_partitions
            if each.error is None and each.offset >= 0
        }

    async def alter(self, group_id: str, offsets: Mapping[Partition, int]) -> bool:
        """Set a group that has no members; False if it has some, and then nothing is changed."""
        places = [TopicPartition(topic, number, offset) for (topic, number), offset in offsets.items()]
        request = [ConsumerGroupTopicPartitions(group_id, places)]
        doing = f"setting the offsets of group {group_id!r}"
        future = self._client.alter_consumer_group_offsets(request, request_timeout=REQUEST_S)[group_id]
        try:
            answer = await self._answer(doing, future)
            errors = [each.error for each in answer.topic_partitions if each.error is not None]  # it raises for none of them
        except KafkaException as error:
            errors = [error.args[0]]
        busy = (KafkaError.UNKNOWN_MEMBER_ID, KafkaError.NON_EMPTY_GROUP, KafkaError.ILLEGAL_GENERATION, KafkaError.STALE_MEMBER_EPOCH)
        if any(error.code() in busy for error in errors):
            return False
        if errors:
            raise self.trouble(doing, KafkaException(errors[0]))
        return True

    # ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def groups(self) -> list[str]:
        """All groups with our prefix."""
        found = await self._done("listing groups", self._client.list_consumer_groups(request_timeout=REQUEST_S))
        return sorted(each.group_id for each in found.valid if each.group_id.startswith(self._settings.prefix))

    async def members(self, group_id: str) -> int:
        """How many members a group has."""
        future = self._client.describe_consumer_groups([group_id], request_timeout=REQUEST_S)[group_id]
        try:
            return len((await self._answer(f"asking who is in group {group_id!r}", future)).members)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return 0
            raise self.trouble(f"asking who is in group {group_id!r}", error) from error

    async def delete_group(self, group_id: str) -> bool:
        """Forget a group; False if there was none."""
        future = self._client.delete_consumer_groups([group_id], request_timeout=REQUEST_S)[group_id]
        try:
            await self._answer(f"deleting group {group_id!r}", future)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return False
            if error.args[0].code() == KafkaError.NON_EMPTY_GROUP:
                raise Unsupported(
                    f"{self._settings.shown}: group {group_id!r} still has members in another process: stop them first"
                ) from error
            raise self.trouble(f"deleting group {group_id!r}", error) from error
        return True

    async def cluster(self) -> dict[str, str]:
        """Id, brokers and version of the cluster, as far as it tells."""
        found = await self._done("asking for the cluster", self._client.describe_cluster(request_timeout=REQUEST_S))
        config = await self._broker_config(str(found.nodes[0].id))
        return {
            "cluster": found.cluster_id,
            "brokers": str(len(found.nodes)),
            "version": config.get("inter.broker.protocol.version") or "not told",
            "default.replication.factor": config.get("default.replication.factor", "?"),
            "min.insync.replicas": config.get("min.insync.replicas", "?"),
        }

    async def _broker_config(self, broker: str) -> dict[str, str]:
        resource = ConfigResource(ResourceType.BROKER, broker)
        future = self._client.describe_configs([resource], request_timeout=REQUEST_S)[resource]
        entries: Mapping[str, Any] = await self._done("asking for the broker's settings", future)
        return {name: entry.value for name, entry in entries.items()}

    # ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _but(self, harmless: Sequence[int], doing: str, future: "concurrent.futures.Future[T]") -> None:
        try:
            await self._answer(doing, future)
        except KafkaException as error:
            if error.args[0].code() not in harmless:
                raise self.trouble(doing, error) from error

    async def _done(self, doing: str, future: "concurrent.futures.Future[T]") -> T:
        try:
            return await self._answer(doing, future)
        except KafkaException as error:
            raise self.trouble(doing, error) from error

    async def _answer(self, doing: str, future: "concurrent.futures.Future[T]") -> T:
        waiting: Awaitable[T] = asyncio.wrap_future(future)
        try:
            return await asyncio.wait_for(waiting, REQUEST_S + 5)
        except TimeoutError:
            raise Unavailable(f"{self._settings.shown}: {doing}: no answer within {REQUEST_S + 5:g} s") from None

    async def _blocking(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(call)
        except KafkaException as error:
            raise self.trouble("asking for topics", error) from error

    def trouble(self, doing: str, error: KafkaException) -> Unavailable:
        """An error of Kafka's as a sentence."""
        what: KafkaError = error.args[0]
        hint = "; the user lacks a permission for it" if what.code() in NOT_ALLOWED else ""
        return Unavailable(f"{self._settings.shown}: {doing} failed: {what.str()} ({what.name()}){hint}")


def _quiet() -> logging.Logger:
    """librdkafka's own log, for who asks for it: what matters of it is said by us."""
    logger = logging.getLogger("trilogue.kafka")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    return logger


quiet = _quiet()
