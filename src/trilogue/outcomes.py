"""What a handler's outcome means, as Settlements: pure, no store and no event loop.

returned   None | event | [events] | Effect      done, + emits, + what the effect writes
raised     Later | Reject | anything else        retry uncharged | dead | retry or dead, as the policy says
batch      [events and Failed(item, why)]        each of the batch on its own
"""

import contextvars
import inspect
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from trilogue.codec import coder, envelope
from trilogue.durations import microseconds
from trilogue.errors import BadOption, Later, Reject, TrilogueError
from trilogue.events import Delivery, Envelope, InTransaction, Record, Settlement, caused_id, is_event
from trilogue.handlers import Context, Effect, Failed, Subscription
from trilogue.ports import Db
from trilogue.sealing import holds_sealed

TRACEBACK_FRAMES = 20
SAID_S = 60.0
WITHHELD = "(withheld: this event holds personal data)"

log = logging.getLogger("trilogue")
cause: contextvars.ContextVar[Record | None] = contextvars.ContextVar("trilogue_cause", default=None)
Answer = Settlement | InTransaction


class Outcomes:
    """Outcomes of one subscription. source: of what it emits."""

    def __init__(self, sub: Subscription, source: str) -> None:
        self._sub = sub
        self._source = source
        self._said_at = float("-inf")
        self._is_personal = any(code.sealing is not None for code in sub.coders.values())

    def context(self, delivery: Delivery) -> Context | None:
        """The Context a handler asks for, if it does."""
        return Context(delivery.record, delivery.attempt, delivery.replay) if self._sub.takes_ctx else None

    # ── one event ────────────────────────────────────────────────────────────────────────────────────────────────────

    def done(self, delivery: Delivery, outcome: Any, ctx: Context | None) -> Answer:
        """The handler returned."""
        events, effects = _sorted_out(outcome)
        emits = self._emits(delivery, [*events, *(ctx.emitted if ctx else ())])
        if not effects:
            return Settlement(delivery, emits=emits)

        def write(db: Db) -> list[Settlement]:
            for effect in effects:
                effect.write(db)
            return [Settlement(delivery, emits=emits)]

        return self._transaction([delivery], write)

    def failed(self, delivery: Delivery, error: BaseException) -> Settlement:
        """The handler raised, or the event could not be decoded."""
        if isinstance(error, Later):
            try:
                text = self._told(delivery.record, error)[0]
                return Settlement(delivery, "retry", microseconds(error.after), charged=False, error=text)
            except BadOption as wrong:
                error = wrong
        wait_us = self._sub.retry.wait_us(error, delivery.attempt)
        text, trace = self._told(delivery.record, error)
        where = (self._sub.group.name, delivery.record.position, delivery.attempt, text)
        if wait_us is not None:
            self._say_retried(where)
            return Settlement(delivery, "retry", wait_us, error=text, traceback=trace)
        log.warning("group %s: position %d is a dead letter after %d attempts: %s", *where)
        return Settlement(delivery, "dead", park=self._sub.park, error=text, traceback=trace)

    def _told(self, record: Record, error: BaseException) -> tuple[str, str]:
        """What is kept and logged of an error."""
        code = self._sub.coders.get(record.type)
        return told(error, is_personal=(code is not None and code.sealing is not None) or holds_sealed(record.data))

    def _say_retried(self, where: tuple[str, int, int, str]) -> None:
        """One failure a minute is said aloud: a handler that always fails must not be silent until its last attempt."""
        is_due = time.monotonic() - self._said_at > SAID_S
        if is_due:
            self._said_at = time.monotonic()
        log.log(logging.WARNING if is_due else logging.DEBUG, "group %s: position %d failed at attempt %d, retrying: %s", *where)

    def in_transaction(self, delivery: Delivery) -> Answer:
        """A handler with `db`, to be run by the settlement."""
        sub = self._sub
        decode = partial(sub.decode, delivery.record)
        if not self._is_personal:  # else in the transaction: what is written then is erased by what comes later on the log
            try:
                event = decode()
            except Exception as error:
                return self.failed(delivery, error)
            decode = partial(_itself, event)

        def run(db: Db) -> list[Settlement]:
            token = cause.set(delivery.record)
            try:
                event = decode()
                ctx = self.context(delivery)
                outcome = sub.handler(event, db=db) if ctx is None else sub.handler(event, db=db, ctx=ctx)
                events, effects = _sorted_out(outcome)
                for effect in effects:
                    effect.write(db)
            finally:
                cause.reset(token)
            return [Settlement(delivery, emits=self._emits(delivery, [*events, *(ctx.emitted if ctx else ())]))]

        return self._transaction([delivery], run)

    def _transaction(self, deliveries: Sequence[Delivery], run: Callable[[Db], Sequence[Settlement]]) -> InTransaction:
        return InTransaction(
            deliveries,
            run,
            lambda error: [self.failed(delivery, error) for delivery in deliveries],
            self._sub.db_limit_us,
        )

    # ── a batch ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def apart(self, deliveries: Sequence[Delivery]) -> tuple[list[Delivery], list[Delivery]]:
        """Those that go alone, and those that go together.

        A record that has failed goes alone, or one bad event would fail the same batch again and again; what follows it of
        its key stays behind it.
        """
        again = {d.record.position for d in deliveries if d.attempt > 1}
        keys = {d.record.key for d in deliveries if d.attempt > 1} - {None} if self._sub.group.ordered else set()
        alone = [d for d in deliveries if d.record.position in again or d.record.key in keys]
        together = [d for d in deliveries if d.record.position not in again and d.record.key not in keys]
        return alone, together

    def decoded(self, batch: Sequence[Delivery]) -> tuple[list[Settlement], list[Delivery], list[Any]]:
        """Settlements of what cannot be decoded and of what waits behind that; the other deliveries, and their events."""
        failed: list[Settlement] = []
        deliveries: list[Delivery] = []
        events: list[Any] = []
        held: set[str | None] = set()
        for delivery in batch:
            if delivery.record.key in held:
                failed.append(Settlement(delivery, "release"))
                continue
            try:
                events.append(self._sub.decode(delivery.record))
                deliveries.append(delivery)
            except Exception as error:
                failed.append(self.failed(delivery, error))
                if self._sub.group.ordered and failed[-1].holds_key and delivery.record.key is not None:
                    held.add(delivery.record.key)
        return failed, deliveries, events

    def batch_in_transaction(self, batch: Sequence[Delivery]) -> list[Answer]:
        """A batch for a handler with `db`."""
        if self._is_personal:
            return [self._transaction(batch, lambda db: self._run_late(batch, db))]
        failed, deliveries, events = self.decoded(batch)
        if not deliveries:
            return [*failed]

        def run(db: Db) -> list[Settlement]:
            return self.batch_done(deliveries, events, self._called(deliveries[-1].record, events, db))

        return [*failed, self._transaction(deliveries, run)]

    def _run_late(self, batch: Sequence[Delivery], db: Db) -> list[Settlement]:
        failed, deliveries, events = self.decoded(batch)
        if not deliveries:
            return failed
        return [*failed, *self.batch_done(deliveries, events, self._called(deliveries[-1].record, events, db))]

    def _called(self, record: Record, events: Sequence[Any], db: Db) -> Any:
        token = cause.set(record)
        try:
            return self._sub.handler(events, db=db)
        finally:
            cause.reset(token)

    def batch_done(self, deliveries: Sequence[Delivery], events: Sequence[Any], outcome: Any) -> list[Settlement]:
        """The handler of a batch returned: events to publish, and what of the batch failed."""
        items, effects = _sorted_out(outcome)
        if effects:
            raise BadOption("a handler of a batch returns no Effect: give it a `db` parameter, or take one event at a time")
        failed = {_index(item, events): item.error for item in items if isinstance(item, Failed)}
        settlements = [
            self.failed(delivery, _as_error(failed[n])) if n in failed else Settlement(delivery)
            for n, delivery in enumerate(deliveries)
        ]
        emitted = [item for item in items if not isinstance(item, Failed)]
        if emitted and len(failed) == len(deliveries):
            raise BadOption("the handler says that all of its batch failed, and returns events to publish: it cannot be both")
        done = [n for n in range(len(deliveries)) if n not in failed]
        for n, caused in _by_cause(deliveries, done, emitted).items():
            settlements[n].emits = self._emits(deliveries[n], caused)
        return settlements

    def batch_failed(self, deliveries: Sequence[Delivery], error: BaseException) -> list[Settlement]:
        """The handler of a batch raised."""
        return [self.failed(delivery, error) for delivery in deliveries]

    # ── what is emitted ──────────────────────────────────────────────────────────────────────────────────────────────

    def _emits(self, delivery: Delivery, events: Sequence[object]) -> list[Envelope]:
        """Envelopes with ids that a redelivery makes again, so that it adds nothing."""
        if delivery.replay or not events:
            return []
        record, group, keys = delivery.record, self._sub.group.name, self._sub.keys
        return [
            envelope(event, id=caused_id(record.id, group, n), source=self._source, cause=record, keys=keys)
            for n, event in enumerate(events)
        ]


def _by_cause(deliveries: Sequence[Delivery], done: Sequence[int], emitted: Sequence[object]) -> dict[int, list[object]]:
    """Which of those done caused what was emitted: the last event with the same key, or else the last of all."""
    last = {deliveries[n].record.key: n for n in done}
    causes: dict[int, list[object]] = {}
    for event in emitted:
        cls: Any = type(event)
        key = coder(cls).key(event) if is_event(cls) else None
        n = last[key] if key is not None and key in last else done[-1]
        causes.setdefault(n, []).append(event)
    return causes


def _sorted_out(outcome: Any) -> tuple[list[object], list[Effect]]:
    """What a handler returned, as events to publish and effects to write."""
    if outcome is None:
        return [], []
    items = outcome if isinstance(outcome, (list, tuple)) else list(outcome) if inspect.isgenerator(outcome) else [outcome]
    effects = [item for item in items if isinstance(item, Effect)]
    return [item for item in items if item is not None and not isinstance(item, Effect)], effects


def _index(item: Failed, events: Sequence[Any]) -> int:
    if isinstance(item.item, int) and not isinstance(item.item, bool):
        if 0 <= item.item < len(events):
            return item.item
    else:
        for n, event in enumerate(events):
            if event is item.item:
                return n
    raise BadOption(
        f"Failed({item.item!r}, ...) names no event of the batch: give the event itself or its index, 0 to {len(events) - 1}"
    )


def told(error: BaseException, *, is_personal: bool) -> tuple[str, str]:
    """An error as a text and a traceback to keep and to log.

    is_personal: of an event with personal data, which may be quoted in it: then only its class and where it was raised.
    """
    if is_personal:
        frames = traceback.format_tb(error.__traceback__, -TRACEBACK_FRAMES)
        return f"{type(error).__qualname__}: {WITHHELD}", _storable("".join(frames))
    if isinstance(error, Later):
        return _said(error), ""
    text = "".join(f"{note}: " for note in _notes(error)) + f"{type(error).__qualname__}: {_said(error)}"
    if isinstance(error, Reject):
        return text, ""
    return text, _storable("".join(traceback.format_exception(error, limit=-TRACEBACK_FRAMES)))


def _itself(event: Any) -> Any:
    return event


def _said(error: BaseException) -> str:
    try:
        return _storable(str(error))
    except Exception as wrong:
        return f"(its message cannot be read: {type(wrong).__qualname__})"


def _notes(error: BaseException) -> list[str]:
    """What was added to it on its way, as the step of a process it was raised in."""
    return [_storable(str(note)) for note in getattr(error, "__notes__", ())]


def _storable(text: str) -> str:
    """Text without what is no UTF-8: an undecodable file name in a message must not keep it from being written."""
    return text.encode("utf-8", "backslashreplace").decode()


def _as_error(error: BaseException | str) -> BaseException:
    return error if isinstance(error, BaseException) else TrilogueError(error)
