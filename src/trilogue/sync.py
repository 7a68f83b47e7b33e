"""The App for programs without an event loop: Django, Flask, scripts.

with app.sync() as bus:             one event loop in a thread of its own, for as long as the block
    bus.publish(Watched("u1", "v9"))
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from trilogue.durations import Duration
from trilogue.errors import Unavailable
from trilogue.events import Receipt, Record

if TYPE_CHECKING:
    from trilogue.app import App

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
        try:
            return asyncio.run_coroutine_threadsafe(work, loop).result()
        except CancelledError:
            raise Unavailable("the block of `with app.sync() as bus:` ended before this call did") from None

    def publish(
        self,
        event: object,
        *,
        id: str | None = None,
        time: datetime | None = None,
        delay: Duration | None = None,
        at: datetime | None = None,
    ) -> Receipt:
        """App.publish()."""
        return self._wait(self._app.publish(event, id=id, time=time, delay=delay, at=at))

    def publish_many(self, events: Sequence[object]) -> list[Receipt]:
        """App.publish_many()."""
        return self._wait(self._app.publish_many(events))

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

    def db(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """App.db()."""
        return self._wait(self._app.db(sql, values))

    def wait_for(self, receipt: Receipt, group: str, *, timeout: Duration = "10s") -> None:
        """App.wait_for()."""
        self._wait(self._app.wait_for(receipt, group, timeout=timeout))


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
