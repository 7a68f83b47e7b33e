"""The App without an event loop: the same names, blocking, from any thread."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from trilogue import App, BadOption, Conflict, Db, Decider, Unavailable, UnknownEvent, event


@event("video.watched", key="user")
@dataclass(frozen=True)
class Watched:
    user: str


def test_the_same_names_blocking(url: str) -> None:
    app = App(url, name="scripts")

    @app.setup
    def tables(db: Db) -> None:
        db.execute("create table if not exists t (a)")

    with app.sync() as bus:
        receipt = bus.publish(Watched("u1"), id="one", time=datetime(2020, 1, 1, tzinfo=UTC))
        assert receipt.position == 1
        assert [r.position for r in bus.publish_many([Watched("u2"), Watched("u1")])] == [2, 3]
        delayed = bus.publish(Watched("u3"), delay="1h")
        assert bus.cancel(delayed)
        assert not bus.cancel(delayed)
        records = list(bus.history(key="u1"))
        assert [r.position for r in records] == [1, 3]
        assert records[0].time == datetime(2020, 1, 1, tzinfo=UTC)
        assert [r.position for r in bus.history(reverse=True, limit=2)] == [3, 2]
        assert bus.db("select count(*) from t where a = ?", ("x",)) == [(0,)]


def test_errors_come_through_as_they_are(url: str) -> None:
    app = App(url)

    @app.on(group="g")
    async def handle(e: Watched) -> None: ...

    with app.sync() as bus:
        receipt = bus.publish(Watched("u1"), id="one")
        with pytest.raises(Conflict):
            bus.publish(Watched("u2"), id="one")
        with pytest.raises(BadOption, match="no time zone"):
            list(bus.history(since=datetime(2020, 1, 1)))
        with pytest.raises(UnknownEvent):
            bus.publish("text")
        with pytest.raises(UnknownEvent, match="'g'"):
            bus.wait_for(receipt, "g", timeout="10ms")


def test_what_another_program_handles_can_be_waited_for(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/app.db"
    worker, ready, stop = App(url), threading.Event(), threading.Event()

    @worker.on(group="g")
    async def handle(e: Watched) -> None: ...

    async def work() -> None:
        async with worker.running():
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    try:
        assert ready.wait(30)
        with App(url).sync() as bus:
            bus.wait_for(bus.publish(Watched("u1")), "g")
    finally:
        stop.set()
        thread.join()


def test_many_threads_share_one_bus(url: str) -> None:
    with App(url).sync() as bus, ThreadPoolExecutor(8) as threads:
        receipts = list(threads.map(lambda n: bus.publish(Watched(f"u{n}")), range(200)))
        assert sorted(r.position or 0 for r in receipts) == list(range(1, 201))
        assert len(list(bus.history())) == 200


def test_before_and_after_the_block_is_refused(url: str) -> None:
    bus = App(url).sync()
    with pytest.raises(Unavailable, match=r"use it inside `with app.sync\(\) as bus:`"):
        bus.publish(Watched("u"))
    with bus:
        left = bus.history()
        bus.publish(Watched("u"))
        next(left)
    for call in (lambda: bus.publish(Watched("u")), lambda: next(left), lambda: bus.db("select 1")):
        with pytest.raises(Unavailable, match="is not open"):
            call()


def test_a_bus_can_be_opened_again_but_not_twice(tmp_path: Path) -> None:
    bus = App(f"sqlite:///{tmp_path}/a.db").sync()
    for n in range(1, 4):
        with bus:
            assert bus.publish(Watched("u")).position == n
            with pytest.raises(Unavailable, match=r"is in use already: make another one with app.sync\(\)"), bus:
                pytest.fail("opened")


def test_a_store_that_cannot_be_opened_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    bus = App(f"sqlite:///{tmp_path}/no/such/folder/a.db").sync()
    with pytest.raises(Unavailable, match="does not exist: create it"), bus:
        pytest.fail("opened")
    assert threading.active_count() == before
    with pytest.raises(Unavailable):
        bus.publish(Watched("u"))


def test_the_end_of_the_block_frees_whoever_still_waits(url: str) -> None:
    app = App(url)
    bus, waiting = app.sync(), threading.Event()
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            waiting.set()
            bus._wait(asyncio.sleep(3600))
        except Unavailable as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    with bus:
        thread.start()
        assert waiting.wait(30)
        bus.publish(Watched("u"))
    thread.join(30)
    assert not thread.is_alive()
    assert "ended before this call did" in str(outcome[0]) or "is not open" in str(outcome[0])


@pytest.mark.parametrize("of", ["rule", "effect", "evolve"])
def test_what_the_bus_waits_for_cannot_call_it(url: str, of: str) -> None:
    app, outcome = App(url), list[BaseException]()

    def call(*_: object) -> None:
        bus.publish(Watched("u"))

    def evolve(state: int, e: Watched) -> int:
        call()
        return state

    def ask() -> None:
        try:
            if of == "rule":
                bus.decide(Decider("watcher-{id}", 0, evolve), "1", call)
            elif of == "evolve":
                bus.fold(evolve, 0)
            else:
                with bus.transaction() as tx:
                    tx.effect(call)
        except BadOption as error:
            outcome.append(error)

    bus = app.sync()
    bus.__enter__()
    bus.publish(Watched("u"))
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()  # otherwise leaving the block would hang, too
    assert "for whose end the bus itself waits" in str(outcome[0])
    assert len(list(bus.history())) == 1
    bus.__exit__()


def test_an_error_inside_the_block_closes_too(url: str) -> None:
    app = App(url)
    with pytest.raises(ZeroDivisionError), app.sync():
        _ = 1 / 0
    with app.sync() as bus:
        bus.publish(Watched("u"))
