"""Publishing: one producer, one thread that collects its confirmations, one outcome for each envelope.

    publish ──▶ produce() each, in order ──▶ librdkafka: batches by partition, tries again, keeps order
    Receipt ◀── when all of a call have one ◀── the thread: delivery reports

A message that timed out may be stored: of 474 in a test two were. So a time-out is OutcomeUnknown, never "not stored".
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message
from confluent_kafka import Producer as Client

from trilogue.brokers.kafka.admin import GONE, quiet
from trilogue.brokers.kafka.settings import Settings
from trilogue.brokers.kafka.wire import Headers
from trilogue.errors import LogError, OutcomeUnknown, Rejected, Unavailable

POLL_S = 0.1
FULL_S = 0.002
LOOK_S = 5.0
# One message for librdkafka: topic, key, value, headers.
Letter = tuple[str, bytes | None, bytes | None, Headers]
# Where it stands, or why it does not.
Outcome = tuple[int, int] | LogError

REFUSED = {
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.INVALID_MSG_SIZE,
    KafkaError.RECORD_LIST_TOO_LARGE,
    KafkaError.INVALID_RECORD,
    KafkaError.INVALID_TIMESTAMP,
    KafkaError.POLICY_VIOLATION,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}

log = logging.getLogger("trilogue")


class _Batch:
    """The messages of one call. answered is written by the collecting thread only, expected by the loop only."""

    __slots__ = ("answered", "expected", "future", "outcomes")

    def __init__(self, size: int, future: "asyncio.Future[None]") -> None:
        self.outcomes: list[Any] = [None] * size
        self.future = future
        self.answered = 0
        self.expected = -1


class Producer:
    """Sends messages. gone: told of topics that may not be there any more."""

    def __init__(self, settings: Settings, gone: Callable[[Collection[str]], None]) -> None:
        self._settings, self._gone = settings, gone
        self._loop = asyncio.get_running_loop()
        self._answered: list[_Batch] = []
        self._open: set[_Batch] = set()
        self._doubted: set[str] = set()
        self._fatal = False
        self._stopping = threading.Event()
        self._client = self._new_client()
        self._thread = threading.Thread(target=self._collect, name="trilogue kafka producer", daemon=True)
        self._thread.start()

    def _new_client(self) -> Client:
        return Client(self._settings.producer() | {"error_cb": self._noted}, logger=quiet)

    # ── on the loop ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def send(self, letters: Sequence[Letter]) -> list[Outcome]:
        """Send messages in order; the outcome of each."""
        if not letters:
            return []
        batch = _Batch(len(letters), self._loop.create_future())
        self._open.add(batch)
        try:
            await self._produce(batch, letters)
            if batch.answered < batch.expected:
                await batch.future
        finally:
            self._open.discard(batch)
        return batch.outcomes

    async def _produce(self, batch: _Batch, letters: Sequence[Letter]) -> None:
        until = time.monotonic() + self._settings.timeout_s
        sent = 0
        answer = self._answer
        for n, (topic, key, value, headers) in enumerate(letters):
            report = partial(answer, batch, n)
            while True:
                try:
                    self._client.produce(topic, value, key, on_delivery=report, headers=headers)
                    sent += 1
                except BufferError:
                    # Full: what is on its way has to arrive first. Whoever publishes waits for it.
                    if time.monotonic() < until:
                        await asyncio.sleep(FULL_S)
                        continue
                    batch.outcomes[n] = Unavailable(f"{self._settings.shown}: {self._full()}")
                except KafkaException as error:
                    batch.outcomes[n] = self._error(error.args[0], topic)
                break
        batch.expected = sent

    async def look_again(self, topics: Collection[str]) -> None:
        """Learn of topics that are there again: until then librdkafka refuses them by what it remembers."""
        for topic in topics:
            with contextlib.suppress(KafkaException):
                await asyncio.to_thread(self._client.list_topics, topic, timeout=LOOK_S)

    def _full(self) -> str:
        return f"the buffer of unsent messages stayed full for {self._settings.timeout_s:g} s: nothing of this was sent"

    def _resolve(self, batches: list[_Batch]) -> None:
        for batch in batches:
            if not batch.future.done():
                batch.future.set_result(None)

    async def close(self, limit_s: float) -> int:
        """Wait for what is on its way, at most so long; how many messages' outcome stays unknown."""
        self._stopping.set()
        await asyncio.to_thread(self._thread.join, limit_s)
        if self._thread.is_alive():
            await asyncio.to_thread(self._give_up)
        left = 0
        for batch in list(self._open):
            for n, outcome in enumerate(batch.outcomes):
                if outcome is None:
                    left += 1
                    batch.outcomes[n] = OutcomeUnknown(f"{self._settings.shown}: closed before the broker confirmed it")
        self._resolve(list(self._open))
        return left

    def _give_up(self) -> None:
        self._client.purge(in_queue=True, in_flight=True, blocking=False)
        self._thread.join(1.0)

    # ── on the collecting thread ─────────────────────────────────────────────────────────────────────────────────────

    def _collect(self) -> None:
        while not (self._stopping.is_set() and not len(self._client)):
            if self._fatal:
                self._rebuild()
            self._client.poll(POLL_S)
            if self._doubted:
                topics, self._doubted = self._doubted, set()
                self._call(self._gone, topics)
            if self._answered:
                batches, self._answered = self._answered, []
                self._call(self._resolve, batches)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop was closed without us
            self._stopping.set()

    def _answer(self, batch: _Batch, n: int, error: KafkaError | None, message: Message) -> None:
        if error is None:
            batch.outcomes[n] = (message.partition(), message.offset())
        else:
            batch.outcomes[n] = self._error(error, message.topic() or "")
        batch.answered += 1
        if batch.answered == batch.expected:
            self._answered.append(batch)

    def _error(self, error: KafkaError, topic: str) -> LogError:
        text = f"{self._settings.shown}: topic {topic!r}: {error.str()} ({error.name()})"
        if error.fatal() or error.code() == KafkaError._FATAL:
            self._fatal = True
        if error.code() in REFUSED:
            return Rejected(f"{text}: not stored, and sending it again unchanged will not help")
        self._doubted.add(topic)
        if error.code() in GONE or error.code() == KafkaError._UNKNOWN_PARTITION:
            return Unavailable(f"{text}: not stored; the topic was deleted, and is made anew by the next publish if it is ours")
        return OutcomeUnknown(f"{text}: may or may not be stored; repeating it with the same id is harmless")

    def _noted(self, error: KafkaError) -> None:
        if error.fatal() or error.code() == KafkaError._FATAL:
            self._fatal = True

    def _rebuild(self) -> None:
        """A producer with a fatal error never sends again: what it has is unknown, and a new one takes over."""
        log.error("%s: the producer failed for good and is replaced", self._settings.shown)
        broken, self._client, self._fatal = self._client, self._new_client(), False
        broken.purge(in_queue=True, in_flight=True, blocking=True)
        broken.flush(5)
        self._fatal = False  # the purged ones' reports said it once more
