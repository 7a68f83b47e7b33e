"""Held records of a broker's group on PostgreSQL, where two processes write at the same moment; interleaved by hand."""

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from common import run
from fake_broker import FakeBroker, FakeServer
from test_postgresql import beside

from trilogue import App
from trilogue.brokers.paired import Paired
from trilogue.conformance.tools import Bench, answer, envelope, group, numbers, take
from trilogue.errors import BadOption, Rejected
from trilogue.events import Delivery, Lease, Receipt, Record, Settlement, now_us
from trilogue.stores import inbox, open_store
from trilogue.stores.log import slot_of

RECEIVED = dataclasses.replace(group(), inbox=True)


def received(n: int, key: str) -> Delivery:
    """A record as a broker delivers it."""
    sent = envelope(n, key)
    record = Record(sent.id, sent.type, sent.data, key, sent.source, sent.time_us, position=n, recorded_us=now_us())
    return Delivery(record, RECEIVED.name, Lease(slot_of(key), 0, now_us() + 10**9, now_us))


def meanwhile(monkeypatch: pytest.MonkeyPatch, before: str, what: Callable[[], None]) -> None:
    """Do something once, in the middle of a transaction: before a step of inbox.py, in the writer's thread."""
    original: Any = getattr(inbox, before)

    def step(*values: Any, **options: Any) -> Any:
        monkeypatch.setattr(inbox, before, original)
        what()
        return original(*values, **options)

    monkeypatch.setattr(inbox, before, step)


@pytest.mark.parametrize("through", ["divert", "settle"])
def test_rows_that_others_add_meanwhile_are_not_taken_for_ours(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    """Whoever believes to know all rows up to a position would let what follows of their keys overtake them."""

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            mine, other = await bench.open(), await bench.open()
            for store in (mine, other):
                await store.bind([RECEIVED], work=False)
            await mine.inbox.settle(RECEIVED.name, [Settlement(received(1, "k"), "retry")])
            loop = asyncio.get_running_loop()

            def adds() -> None:
                held = other.inbox.settle(RECEIVED.name, [Settlement(received(2, "other"), "retry")])
                asyncio.run_coroutine_threadsafe(held, loop).result(30)

            meanwhile(monkeypatch, "hold", adds)
            if through == "divert":
                found: Any = await mine.inbox.divert(RECEIVED.name, [received(3, "k")])
                assert found.held == [True]
            else:
                found = await mine.inbox.settle(RECEIVED.name, [Settlement(received(3, "k"), "retry")])
            assert (found.before, found.after) == (2, 3)

    run(main())


@pytest.mark.parametrize("step", ["_held_among", "hold"])
def test_a_key_whose_last_row_is_finished_while_more_of_it_comes(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Before or after the look: the record goes to its handler at once, or is lent from its row: never both, never neither."""

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            worker, receiver = await bench.open(), await bench.open()
            await worker.bind([RECEIVED])
            await receiver.bind([RECEIVED], work=False)
            await receiver.inbox.settle(RECEIVED.name, [Settlement(received(1, "k"), "retry")])
            [last] = await take(worker, RECEIVED.name, 1)
            loop = asyncio.get_running_loop()

            def finishes() -> None:
                asyncio.run_coroutine_threadsafe(answer(worker, [last]), loop).result(30)

            meanwhile(monkeypatch, step, finishes)
            found = await receiver.inbox.divert(RECEIVED.name, [received(2, "k")])
            assert found.held == [step == "hold"]
            if found.held == [True]:
                assert numbers(await take(worker, RECEIVED.name, 1)) == [2]
            with beside(postgresql_url) as other:
                assert other.execute("select count(*) from trilogue_held").fetchone() == (sum(found.held),)

    run(main())


def test_rows_of_many_receivers_have_positions_in_the_order_of_their_commits(postgresql_url: str) -> None:
    """Each learns of the others' rows by the position reached: none may appear below it later."""

    async def hold(store: Any, own: int) -> Sequence[tuple[int, int]]:
        marks = []
        for n in range(15):
            taken = await store.inbox.settle(RECEIVED.name, [Settlement(received(own * 100 + n, f"k{own}"), "retry")])
            marks.append((taken.before, taken.after))
        return marks

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            stores = [await bench.open() for _ in range(4)]
            for store in stores:
                await store.bind([RECEIVED], work=False)
            marks = await asyncio.gather(*(hold(store, n) for n, store in enumerate(stores)))
            given = sorted(mark for each in marks for mark in each)
            assert given == [(n, n + 1) for n in range(60)]

    run(main())


@pytest.mark.parametrize("field", ["id", "key", "correlation_id"])
def test_beside_a_broker_a_nul_character_is_refused_before_it_is_sent(postgresql_url: str, field: str) -> None:
    """Its handler may fail, and then there is no row that could hold it."""

    async def main() -> None:
        server = FakeServer()
        log = Paired(FakeBroker(server), open_store(postgresql_url))
        await log.open()
        try:
            given: Any = {field: "a\x00b"}
            sent = [envelope(1, "k"), msgspec.structs.replace(envelope(2, "k"), **given)]
            with pytest.raises(Rejected, match="stores no NUL character: leave it out"):
                await log.append(sent)
            first, second = await log.publish(sent)
            assert isinstance(first, Receipt)
            assert isinstance(second, Rejected)
        finally:
            await log.close()

    run(main())


def test_an_effect_beside_a_broker_cannot_call_the_bus_that_waits_for_it(postgresql_url: str) -> None:
    """It runs in the thread of the store's writer, whose URL is not that of the log."""
    app, outcome = App("memory://"), list[BaseException]()
    app.store = Paired(FakeBroker(FakeServer()), open_store(postgresql_url))

    def ask() -> None:
        with pytest.raises(BadOption) as refused, bus.transaction() as tx:
            tx.effect(lambda _: bus.history().__next__())
        outcome.append(refused.value)

    bus = app.sync()
    bus.__enter__()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()  # otherwise leaving the block would hang, too
    assert "for whose end the bus itself waits" in str(outcome[0])
    bus.__exit__()
