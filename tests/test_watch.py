"""No silence: a blocked loop is named, a group without progress is reported."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from trilogue import App, Retry, Unavailable, UnknownEvent, event
from trilogue.runner import Runner
from trilogue.watch import LoopWatch, watch_progress


@event("video.watched", key="user")
@dataclass(frozen=True)
class Watched:
    user: str


def block(until: Callable[[], bool]) -> None:
    """Hold the loop until something is so; the watcher is another thread."""
    for _ in range(2_000):
        if until():
            return
        time.sleep(0.005)


async def blocking(e: Watched) -> None:
    block(lambda: any("blocked" in message for message in MESSAGES))


class Service:
    async def handle(self, e: Watched) -> None:
        nested()


def nested() -> None:
    block(lambda: any("blocked" in message for message in MESSAGES))


MESSAGES: list[str] = []


@pytest.fixture
def messages() -> Iterator[list[str]]:
    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            MESSAGES.append(record.getMessage())

    MESSAGES.clear()
    keep = Keep()
    log = logging.getLogger("trilogue")
    log.addHandler(keep)
    yield MESSAGES
    log.removeHandler(keep)


@pytest.mark.parametrize("handler", [blocking, Service().handle])
def test_a_handler_that_blocks_the_loop_is_named(handler: Any, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopWatch.__init__, "__kwdefaults__", {"blocked_s": 0.05})

    async def main() -> None:
        app = App("memory://")
        app.on(group="slow one")(handler)
        async with app.running():
            await app.wait_for(await app.publish(Watched("u")), "slow one")

    asyncio.run(main())
    [message] = [m for m in messages if "blocked" in m]
    assert message.startswith("the event loop has been blocked for over 0.1 s by the handler of group slow one at ")
    assert "test_watch.py:" in message
    assert message.endswith("await something there, or make it a plain function, which runs in a thread")


def test_what_is_no_handler_is_named_by_its_line(messages: list[str]) -> None:
    async def main() -> None:
        watch = LoopWatch([], blocked_s=0.05)
        nested()
        await asyncio.sleep(0)
        watch.stop()

    asyncio.run(main())
    [message] = messages
    assert "by the handler" not in message
    assert "test_watch.py:" in message


def test_a_loop_that_turns_is_not_reported(messages: list[str]) -> None:
    async def main() -> None:
        watch = LoopWatch([], blocked_s=3600)
        for _ in range(50):
            await asyncio.sleep(0.001)
        watch.stop()

    asyncio.run(main())
    assert messages == []


class Quiet:
    """A store that says whether there is work."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def idle(self, names: list[str]) -> bool:
        self.asked += names
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def silent(store: Any, until: Callable[[], bool], in_flight: int = 0) -> None:
    async def main() -> None:
        app = App("memory://")

        @app.on(group="g", retry=Retry(1))
        async def handle(e: Watched) -> None: ...

        with ThreadPoolExecutor(1) as threads:
            runner = Runner(app.store, app.subscriptions[0], threads, "test")
            runner.in_flight = in_flight
            runner.progress_at = -3600.0
            task = asyncio.create_task(watch_progress(store, [runner], silent_s=0.02))
            while not until():
                await asyncio.sleep(0.002)
                runner.progress_at = min(runner.progress_at, time.monotonic() - 60)
            assert not task.done()
            task.cancel()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_group_with_work_and_no_progress_is_reported(messages: list[str]) -> None:
    silent(Quiet(False), lambda: bool(messages))
    assert messages[0].startswith("group g has work and has finished nothing for ")
    assert "`trilogue status`" in messages[0]


def test_a_handler_that_never_returns_is_reported_with_what_is_in_flight(messages: list[str]) -> None:
    silent(Quiet(True), lambda: bool(messages), in_flight=3)
    assert "(3 in flight)" in messages[0]


def test_a_group_without_work_is_not_reported(messages: list[str]) -> None:
    store = Quiet(True)
    silent(store, lambda: len(store.asked) > 3)
    assert messages == []


@pytest.mark.parametrize("error", [Unavailable("locked"), UnknownEvent("dropped")])
def test_a_store_in_trouble_does_not_end_the_watch(messages: list[str], error: Exception) -> None:
    silent(Quiet(error, False), lambda: any("has work" in message for message in messages))
    assert messages[0] == f"the log does not answer: {error}"
