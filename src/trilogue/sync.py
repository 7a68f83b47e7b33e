"""The App for programs without an event loop: Django, Flask, scripts.

with app.sync() as bus:             one event loop in a thread of its own, for as long as the block
    bus.publish(Watched("u1", "v9"))
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from trilogue.aggregate import Aggregate, Decider
from trilogue.deciding import Decided
from trilogue.durations import Duration
from trilogue.errors import BadOption, Unavailable
from trilogue.events import Receipt, Record
from trilogue.history import Difference, Entry, Place, Traced
from trilogue.instances import LISTED, ProcessInstance
from trilogue.ports import Db
from trilogue.privacy import ErasureReceipt
from trilogue.stream import ATTEMPTS, Loaded, Together

if TYPE_CHECKING:
    from trilogue.app import App

A = TypeVar("A", bound=Aggregate)
S = TypeVar("S")
T = TypeVar("T")


class SyncApp:
    """Blocking twins of the App's methods, callable from any thread while the block lasts."""

    def __init__(self, app: "App") -> None:
        self._app = app
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "SyncApp":
        if self._loop is not None:
            raise Unavailable("this bus is in use already: make another one with app.sync()")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trilogue sync", daemon=True)
        self._thread.start()
        try:
            self._wait(self._app.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._wait(self._app.__aexit__())
        finally:
            self._end()

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(_end_all(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        loop = self._loop
        if loop is None:
            work.close()
            raise Unavailable("the store is not open: use it inside `with app.sync() as bus:`")
        if self._waits_for_this_thread():
            work.close()
            raise BadOption(
                "the bus was called by a rule, an effect or a setup, for whose end the bus itself waits: ask for what it needs "
                "before, as `limit = bus.load(Limits, id)`, and hand it in"
            )
        try:
            return asyncio.run_coroutine_threadsafe(work, loop).result()
        except CancelledError:
            raise Unavailable("the block of `with app.sync() as bus:` ended before this call did") from None

    def _waits_for_this_thread(self) -> bool:
        here = threading.current_thread()  # the loop's runs rules and folds, the writer's effects and setups
        writes = getattr(self._app.store, "store", self._app.store)  # beside a broker
        return here is self._thread or here.name == f"trilogue-writer {writes.url}"

    def publish(
        self,
        event: object,
        *,
        id: str | None = None,
        time: datetime | None = None,
        delay: Duration | None = None,
        at: datetime | None = None,
        tx: object | None = None,
    ) -> Receipt:
        """App.publish()."""
        return self._wait(self._app.publish(event, id=id, time=time, delay=delay, at=at, tx=tx))

    def publish_many(self, events: Sequence[object]) -> list[Receipt]:
        """App.publish_many()."""
        return self._wait(self._app.publish_many(events))

    def erase(self, subject: str, *, reason: str, timeout: Duration = "10s") -> ErasureReceipt:
        """App.erase()."""
        return self._wait(self._app.erase(subject, reason=reason, timeout=timeout))

    def cancel(self, receipt: Receipt) -> bool:
        """App.cancel()."""
        return self._wait(self._app.cancel(receipt))

    def history(self, **query: Any) -> Iterator[Record]:
        """App.history(), as a plain iterator."""
        records = self._app.history(**query)
        while True:
            try:
                yield self._wait(_next(records))
            except StopAsyncIteration:
                return

    def db(
        self, sql: str, values: Sequence[Any] = (), *, after: Receipt | str | None = None, of: str | None = None
    ) -> list[tuple[Any, ...]]:
        """App.db()."""
        return self._wait(self._app.db(sql, values, after=after, of=of))

    def find(
        self,
        model: type[T],
        sql: str,
        values: Sequence[Any] = (),
        *,
        after: Receipt | str | None = None,
        of: str | None = None,
    ) -> list[T]:
        """App.find()."""
        return self._wait(self._app.find(model, sql, values, after=after, of=of))

    def wait_for(self, receipt: Receipt | str, group: str, *, timeout: Duration = "10s") -> None:
        """App.wait_for()."""
        self._wait(self._app.wait_for(receipt, group, timeout=timeout))

    def wait_idle(self, *, timeout: Duration | None = None) -> None:
        """App.wait_idle(): until the program that runs the handlers has nothing left to do."""
        self._wait(self._app.wait_idle(timeout=timeout))

    def trim(
        self,
        *,
        older_than: Duration | None = None,
        keep: int | None = None,
        force: bool = False,
        streams: bool = False,
    ) -> int:
        """App.trim()."""
        return self._wait(self._app.trim(older_than=older_than, keep=keep, force=force, streams=streams))

    def processes(self, name: str | None = None, *, stuck: Duration | None = None, limit: int = LISTED) -> list[ProcessInstance]:
        """App.processes()."""
        return self._wait(self._app.processes(name, stuck=stuck, limit=limit))

    # ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def load(self, model: type[A], id: str, **place: Any) -> A:
        """App.load(), of an Aggregate."""
        return self._wait(self._app.load(model, id, **place))

    def load_state(self, model: Decider[S], id: str, **place: Any) -> Loaded[S]:
        """App.load(), of a Decider."""
        return self._wait(self._app.load(model, id, **place))

    def save(self, aggregate: A) -> Decided[A]:
        """App.save()."""
        return self._wait(self._app.save(aggregate))

    def decide(self, model: Any, *id_and_rule: Any, once: str | None = None, attempts: int = ATTEMPTS) -> Decided[Any]:
        """App.decide(): `decide(Account, id, rule)` or `decide(Enrol(...))`."""
        decided: Decided[Any] = self._wait(self._app.decide(model, *id_and_rule, once=once, attempts=attempts))
        return decided

    @contextlib.contextmanager
    def edit(self, model: type[A], id: str) -> Iterator[A]:
        """App.edit(), as a plain `with`."""
        aggregate = self.load(model, id)
        yield aggregate
        self.save(aggregate)

    @contextlib.contextmanager
    def transaction(self) -> Iterator["SyncTogether"]:
        """App.transaction(), as a plain `with`."""
        together = SyncTogether(self, Together(self._app))
        yield together
        self._wait(together.together.commit())

    def close_stream(self, stream: str, *, reason: str) -> int:
        """App.close_stream()."""
        return self._wait(self._app.close_stream(stream, reason=reason))

    def truncate_stream(self, stream: str, *, before: int) -> None:
        """App.truncate_stream()."""
        self._wait(self._app.truncate_stream(stream, before=before))

    def take_snapshot(self, model: Any, id: str) -> int:
        """App.take_snapshot()."""
        return self._wait(self._app.take_snapshot(model, id))

    def what_if(self, model: Any, *id_and_rule: Any, **place: Any) -> Decided[Any]:
        """App.what_if()."""
        return self._wait(self._app.what_if(model, *id_and_rule, **place))

    def diff(self, model: Any, id: str, before: Place, after: Place) -> Difference[Any]:
        """App.diff()."""
        return self._wait(self._app.diff(model, id, before, after))

    def audit(self, model: Any, id: str) -> list[Entry]:
        """App.audit()."""
        return self._wait(self._app.audit(model, id))

    def trace(self, of: Record | str) -> list[Traced]:
        """App.trace()."""
        return self._wait(self._app.trace(of))

    def fold(self, evolve: Callable[[S, Any], S], initial: S, **query: Any) -> S:
        """App.fold()."""
        return self._wait(self._app.fold(evolve, initial, **query))


class SyncTogether:
    """What a transaction() block collects, without an event loop."""

    def __init__(self, bus: SyncApp, together: Together) -> None:
        self._bus = bus
        self.together = together

    def load(self, model: type[A], id: str) -> A:
        """Together.load()."""
        return self._bus._wait(self.together.load(model, id))

    def decide(self, model: Decider[S], id: str, rule: Callable[[S], Any]) -> S:
        """Together.decide()."""
        return self._bus._wait(self.together.decide(model, id, rule))

    def publish(self, *events: object) -> None:
        """Together.publish()."""
        self.together.publish(*events)

    def effect(self, write: Callable[[Db], object]) -> None:
        """Together.effect()."""
        self.together.effect(write)

    @property
    def receipt(self) -> Receipt | None:
        """Of the last event, once the block has ended."""
        return self.together.receipt


async def _end_all() -> None:
    """End what other threads still wait for, and histories nobody read to the end."""
    loop = asyncio.get_running_loop()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


async def _next(records: Any) -> Record:
    record: Record = await anext(records)
    return record
