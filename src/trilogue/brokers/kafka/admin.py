"""What is asked of the cluster itself: topics, offsets, groups. Everything awaitable, everything with a time limit.

librdkafka's futures belong to a thread of its own; here they become awaitable, and its errors sentences.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType  # type: ignore[attr-defined]

from trilogue.brokers.kafka.lane import Place, decoded
from trilogue.brokers.kafka.settings import Settings
from trilogue.errors import Unavailable

Partition = tuple[str, int]
REQUEST_S = 15.0
LOOK_S = 0.5
RETRY_S = 0.05
# Said while a topic has just been made, a leader is elected or a coordinator starts: asked again until it has an answer.
PASSING = {
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.NOT_CONTROLLER,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError._TRANSPORT,
    KafkaError._WAIT_COORD,
}
GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC)
REFUSED = (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL)
BUSY = {
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.NON_EMPTY_GROUP,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.STALE_MEMBER_EPOCH,
}
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
        self._reason = ""
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
                # A short wait each time, so that a refusal is seen soon: it is told by poll().
                return len((await asyncio.to_thread(self._client.list_topics, timeout=LOOK_S)).brokers)
            except KafkaException as error:
                last = error.args[0].str()
            self._client.poll(0)
            if self._refusal is not None:
                raise Unavailable(f"{self._settings.shown}: the server refuses us: {self._refusal}; check user, password and TLS")
            if time.monotonic() > until:
                raise Unavailable(
                    f"{self._settings.shown}: no Kafka broker answered within {self._settings.connect_timeout_s:g} s "
                    f"({self._reason or last}): is it running, and is this its address?"
                )

    async def topics(self) -> dict[str, tuple[int, int]]:
        """All topics with our prefix: how many partitions, and replicas of each, they have."""
        try:
            metadata = await asyncio.to_thread(self._client.list_topics, timeout=REQUEST_S)
        except KafkaException as error:
            raise self._trouble("asking for topics", error.args[0]) from error
        return {
            name: (len(topic.partitions), min(len(each.replicas) for each in topic.partitions.values()))
            for name, topic in metadata.topics.items()
            if name.startswith(self._settings.prefix) and topic.error is None and topic.partitions
        }

    async def create(self, names: Iterable[str], partitions: int, config: Mapping[str, str]) -> None:
        """Create topics; one that somebody else has just created is right, too."""
        for name in names:
            new = NewTopic(name, partitions, self._settings.replication or -1, config=dict(config))
            request = partial(self._client.create_topics, [new], request_timeout=REQUEST_S)
            await self._ask(f"creating topic {name!r}", partial(_only, request), harmless={KafkaError.TOPIC_ALREADY_EXISTS})

    async def delete(self, names: Iterable[str]) -> None:
        """Delete topics, those that are there."""
        for name in names:
            request = partial(self._client.delete_topics, [name], request_timeout=REQUEST_S)
            await self._ask(f"deleting topic {name!r}", partial(_only, request), harmless=GONE)

    async def delete_records(self, topic: str, before: int) -> None:
        """Give back the space of the records of a topic of one partition that lie before an offset."""
        upto = TopicPartition(topic, 0, before)
        request = partial(self._client.delete_records, [upto], request_timeout=REQUEST_S)
        await self._ask(f"deleting records of topic {topic!r}", partial(_only, request), harmless=GONE)

    async def topic_config(self, topic: str) -> dict[str, str]:
        """The settings of a topic."""
        return await self._config(ConfigResource(ResourceType.TOPIC, topic))

    async def _config(self, resource: Any) -> dict[str, str]:
        entries = await self._ask(
            f"asking for the settings of {resource}",
            lambda: self._client.describe_configs([resource], request_timeout=REQUEST_S)[resource],
        )
        return {name: entry.value for name, entry in entries.items()}

    # ── offsets ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def ends(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The offset the next record of each partition gets."""
        return await self._offsets(partitions, OffsetSpec.latest())  # type: ignore[no-untyped-call]

    async def beginnings(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The oldest offset each partition holds."""
        return await self._offsets(partitions, OffsetSpec.earliest())  # type: ignore[no-untyped-call]

    async def at_time(self, partitions: Iterable[Partition], time_us: int) -> dict[Partition, int]:
        """The first offset of each partition that was recorded at a time or after it; its end if there is none."""
        found = await self._offsets(partitions, OffsetSpec.for_timestamp(max(0, -(-time_us // 1_000))))
        late = await self.ends([each for each, offset in found.items() if offset < 0])
        return found | late

    async def _offsets(self, partitions: Iterable[Partition], spec: Any) -> dict[Partition, int]:
        asked = [TopicPartition(topic, number) for topic, number in partitions]
        if not asked:
            return {}
        results = await self._ask(
            f"asking for the offsets of {sorted({each.topic for each in asked})}",
            lambda: _all(list(self._client.list_offsets(dict.fromkeys(asked, spec), request_timeout=REQUEST_S).values())),
        )
        return {(each.topic, each.partition): result.offset for each, result in zip(asked, results, strict=True)}

    async def committed(self, group_id: str, partitions: Iterable[Partition]) -> dict[Partition, Place]:
        """Where a group is in those of these partitions that it has committed an offset for."""
        asked = [TopicPartition(topic, number) for topic, number in partitions]
        return await asyncio.to_thread(self._committed, group_id, asked) if asked else {}

    def _committed(self, group_id: str, asked: list[TopicPartition]) -> dict[Partition, Place]:
        # Asked by a consumer that never joins. The administrative client's own request takes the whole process down (librdkafka
        # 2.16: a null pointer) if the group's coordinator has just moved or is not there yet, as in a new cluster.
        reader = Consumer(self._settings.consumer(group_id), logger=quiet)
        until = time.monotonic() + REQUEST_S
        try:
            while (found := self._committed_to(reader, group_id, asked, until)) is None:
                time.sleep(RETRY_S)
        finally:
            reader.close()
        return {(each.topic, each.partition): decoded(each.offset, each.metadata) for each in found if each.offset >= 0}

    def _committed_to(
        self, reader: Consumer, group_id: str, asked: list[TopicPartition], until: float
    ) -> list[TopicPartition] | None:
        """What the coordinator says; None after an error that passes."""
        try:
            return reader.committed(asked, timeout=REQUEST_S)
        except KafkaException as error:
            what: KafkaError = error.args[0]
            if what.code() in PASSING and time.monotonic() < until:
                return None
            raise self._trouble(f"asking for the offsets of group {group_id!r}", what) from error

    async def alter(self, group_id: str, offsets: Mapping[Partition, int]) -> bool:
        """Set a group that has no members; False if it has some, and then nothing is changed."""
        request = [ConsumerGroupTopicPartitions(group_id, [TopicPartition(*partition, at) for partition, at in offsets.items()])]
        doing = f"setting the offsets of group {group_id!r}"
        answer = await self._ask(
            doing,
            lambda: self._client.alter_consumer_group_offsets(request, request_timeout=REQUEST_S)[group_id],
            harmless=BUSY,
        )
        if answer is None:
            return False
        # It raises for none of the partitions.
        errors = [each.error for each in answer.topic_partitions if each.error is not None]
        if any(error.code() in BUSY for error in errors):
            return False
        if errors:
            raise self._trouble(doing, errors[0])
        return True

    # ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def groups(self) -> list[str]:
        """All groups with our prefix."""
        found = await self._ask("listing groups", lambda: self._client.list_consumer_groups(request_timeout=REQUEST_S))
        return sorted(each.group_id for each in found.valid if each.group_id.startswith(self._settings.prefix))

    async def members(self, group_id: str) -> int:
        """How many members a group has."""
        found = await self._ask(
            f"asking who is in group {group_id!r}",
            lambda: self._client.describe_consumer_groups([group_id], request_timeout=REQUEST_S)[group_id],
            harmless={KafkaError.GROUP_ID_NOT_FOUND},
        )
        return 0 if found is None else len(found.members)

    async def delete_group(self, group_id: str) -> bool:
        """Forget a group; False if there was none, or if it has members."""
        gone = await self._ask(
            f"deleting group {group_id!r}",
            lambda: _true(self._client.delete_consumer_groups([group_id], request_timeout=REQUEST_S)[group_id]),
            harmless={KafkaError.GROUP_ID_NOT_FOUND, KafkaError.NON_EMPTY_GROUP},
        )
        return gone is not None

    async def cluster(self) -> dict[str, str]:
        """Id, brokers and version of the cluster, as far as it tells."""
        found = await self._ask("asking for the cluster", lambda: self._client.describe_cluster(request_timeout=REQUEST_S))
        config = await self._config(ConfigResource(ResourceType.BROKER, str(found.nodes[0].id)))
        return {
            "cluster": found.cluster_id,
            "brokers": str(len(found.nodes)),
            # Brokers tell their version by this setting, which 4.0 has not got any more.
            "version": config.get("inter.broker.protocol.version") or "4.0 or newer",
            "default.replication.factor": config.get("default.replication.factor", "1"),
            "min.insync.replicas": config.get("min.insync.replicas", "1"),
        }

    # ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, doing: str, request: Callable[[], "Future[Any]"], *, harmless: Collection[int] = ()) -> Any:
        """The answer to a request, made again after errors that pass; None after one that is harmless."""
        until = time.monotonic() + REQUEST_S
        while True:
            try:
                async with asyncio.timeout(REQUEST_S + 5):
                    return await asyncio.wrap_future(request())
            except TimeoutError:
                raise Unavailable(f"{self._settings.shown}: {doing}: no answer within {REQUEST_S + 5:g} s") from None
            except KafkaException as error:
                what: KafkaError = error.args[0]
            if what.code() in harmless:
                return None
            if what.code() not in PASSING or time.monotonic() > until:
                raise self._trouble(doing, what)
            await asyncio.sleep(RETRY_S)

    def _trouble(self, doing: str, error: KafkaError) -> Unavailable:
        hint = "; the user lacks a permission for it" if error.code() in NOT_ALLOWED else ""
        return Unavailable(f"{self._settings.shown}: {doing} failed: {error.str()} ({error.name()}){hint}")


def _only(request: "Callable[[], Mapping[Any, Future[Any]]]") -> "Future[Any]":
    """The future of a request about one thing."""
    return next(iter(request().values()))


def _all(futures: "list[Future[Any]]") -> "Future[list[Any]]":
    """One future for several of a request, which have the same answer."""
    whole: Future[list[Any]] = Future()
    left = len(futures)

    def answered(_: "Future[Any]") -> None:
        nonlocal left
        left -= 1
        if left:
            return
        try:
            whole.set_result([future.result() for future in futures])
        except KafkaException as error:
            whole.set_exception(error)

    for future in futures:
        future.add_done_callback(answered)
    return whole


def _true(future: "Future[None]") -> "Future[bool]":
    """The answer to a request that has no other answer than that it was done."""
    done: Future[bool] = Future()

    def answered(_: "Future[None]") -> None:
        error = future.exception()
        done.set_result(True) if error is None else done.set_exception(error)

    future.add_done_callback(answered)
    return done


def _quiet() -> logging.Logger:
    """librdkafka's own log, for who asks for it: what matters of it is said by us."""
    logger = logging.getLogger("trilogue.kafka")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    return logger


quiet = _quiet()
