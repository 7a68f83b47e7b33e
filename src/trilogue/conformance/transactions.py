"""What happens in one transaction: appends, states, timers and the user's SQL, all of it or nothing."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, cast

from trilogue.conformance.tools import (
    Bench,
    MakeStore,
    answer,
    effect,
    envelope,
    expect,
    group,
    is_idle,
    none_left,
    number,
    numbers,
    promise,
    raises,
    same,
    take,
    until,
)
from trilogue.errors import Conflict, Rejected, TimedOut, TrilogueError
from trilogue.events import Envelope, new_id, now_us
from trilogue.ports import Db, Feature, Query, SeekTo, Store, Transaction

READERS = group()
DAY_US = 86_400_000_000


async def _with_table(bench: Bench, **options: Any) -> Store:
    store = await bench.open(group(**options))
    await store.transact(lambda tx: tx.execute("create table seen (n integer)"))
    return store


async def _seen(store: Store) -> list[int]:
    return [n for (n,) in await store.query("select n from seen order by n")]


async def _stored(store: Store, **query: Any) -> list[int]:
    return [int(record.data) for record in await store.read(Query(**query))]


def _everything(tx: Transaction, n: int, a: int, b: int) -> list[int]:
    """One of each: two streams that must have the versions a and b, a publish, a state, a timer, a row."""
    tx.append([envelope(n, id=f"a-{n}")], stream="a", expected=a)
    tx.set_state("mine", f"id-{n}", b"kept")
    tx.schedule(envelope(n, id=f"timer-{n}"), now_us() + DAY_US, name=f"name-{n}")
    tx.execute("insert into seen values (?)", (n,))
    published = Envelope(f"p-{n}", "new.kind", str(n).encode(), time_us=now_us(), tags=("t:1",))
    tx.append([published], unless=[Query(tags=("t:1",), types=("never",))])
    tx.append([envelope(n, id=f"b-{n}"), envelope(n, id=f"c-{n}")], stream="b", expected=b)
    return [record.position for record in tx.read(Query())]


async def _has(store: Store, times: list[int]) -> None:
    same(await _stored(store, stream="a"), times, "stream a")
    same(await _stored(store, stream="b"), [n for n in times for _ in "bc"], "stream b")
    same(await _stored(store, tags=("t:1",)), times, "found by tag")
    same([state.id for state in await store.states("mine")], [f"id-{n}" for n in times], "states")
    same([timer.name for timer in await store.timers()], [f"name-{n}" for n in times], "timers")
    same(await _seen(store), times, "rows of the user's table")
    same(len(await store.read(Query())), 4 * len(times), "records")


@promise(Feature.EFFECTS, Feature.EXPECTED, Feature.TIMERS)
async def promise_a_transaction_is_whole(make_store: MakeStore) -> None:
    """Appends to several streams, states, timers and the user's SQL of one transaction are all there, or nothing of it is."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench)

        def fails(tx: Transaction) -> None:
            _everything(tx, 9, 0, 0)
            raise TimedOut("at the end")

        await raises(TimedOut, store.transact(fails), "an error at the end")
        await _has(store, [])
        await raises(Conflict, store.transact(lambda tx: _everything(tx, 9, 0, 7)), "a conflict in the last append")
        await _has(store, [])
        # What was remembered of versions while it ran must be forgotten: 0 is right again.
        same(await store.transact(lambda tx: _everything(tx, 1, 0, 0)), [1, 2, 3, 4], "positions the transaction itself sees")
        await _has(store, [1])
        await raises(Conflict, store.transact(lambda tx: _everything(tx, 9, 1, 0)), "a conflict at version 2")
        await raises(Rejected, store.transact(_too_large), "what can never be stored, in the middle")
        await store.append([envelope(2)], expected=("a", 1))
        await store.append([envelope(3)], expected=("b", 2))
        same((await _stored(store, stream="a"), await _seen(store)), ([1, 2], [1]), "stream a and the user's table")


def _too_large(tx: Transaction) -> None:
    _everything(tx, 9, 1, 2)
    tx.append([envelope(9, "k" * 10_000)])


@promise(Feature.EFFECTS, Feature.EXPECTED, Feature.TIMERS)
async def promise_a_failing_transaction_harms_no_other(make_store: MakeStore) -> None:
    """Of transactions and appends made at the same moment, one that fails takes nothing of the others with it."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench)

        def fails(tx: Transaction) -> None:
            tx.append([envelope(9)], stream="s", expected=2)
            tx.append([Envelope(new_id(), "kind.of.its.own", b"9", time_us=now_us())])
            raise TimedOut("no")

        works: list[Callable[[Transaction], object]] = [
            lambda tx: tx.append([envelope(1), envelope(2)], stream="s", expected=0),
            fails,
            lambda tx: tx.append([envelope(3)], stream="s", expected=2),
            lambda tx: tx.append([Envelope(new_id(), "kind.of.its.own", b"4", time_us=now_us())]),
        ]
        results = await asyncio.gather(
            *(store.transact(work, rows=3) for work in works),  # so few that they may share a commit
            store.append([envelope(5)], expected=("t", 0)),
            return_exceptions=True,
        )
        same([isinstance(result, TimedOut) for result in results], [False, True, False, False, False], "which of them failed")
        same(await _stored(store, stream="s"), [1, 2, 3], "the stream two of them wrote to")
        same(await _stored(store, types=("kind.of.its.own",)), [4], "a type the failing one was the first to use")
        await store.append([envelope(4)], expected=("s", 3))


ENDLESS = "with recursive c(x) as (select 1 union all select x + 1 from c) insert into seen select x from c"


@promise(Feature.EFFECTS, Feature.EXPECTED, Feature.TIMERS)
async def promise_nothing_happens_after_an_undone_transaction(make_store: MakeStore) -> None:
    """Where code goes on after its SQL was interrupted, nothing of it happens: not before, not after, by no verb."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench)
        after: list[Callable[[Transaction], object]] = [
            lambda tx: tx.execute("insert into seen values (1)"),
            lambda tx: tx.executemany("insert into seen values (?)", [(1,)]),
            lambda tx: tx.append([envelope(1)]),
            lambda tx: tx.set_state("mine", "id", b"kept"),
            lambda tx: tx.schedule(envelope(1), now_us() + DAY_US, name="later"),
            lambda tx: None,
        ]
        for then in after:

            def swallows(tx: Transaction, then: Callable[[Transaction], object] = then) -> None:
                _everything(tx, 9, 0, 0)
                with contextlib.suppress(Exception):
                    tx.execute(ENDLESS)
                with contextlib.suppress(Exception):
                    then(tx)

            await raises(TimedOut, store.transact(swallows, limit_us=20_000), "a transaction that goes on regardless")
        same((await _stored(store), await _seen(store)), ([], []), "records and rows")
        same((await store.states("mine"), await store.timers()), ([], []), "states and timers")
        await store.append([envelope(1)], expected=("a", 0))


@promise(Feature.EFFECTS, Feature.EXPECTED)
async def promise_an_interrupted_transaction_harms_no_other(make_store: MakeStore) -> None:
    """A transaction whose SQL is interrupted fails alone, whatever is written at the same moment; its work is not done again."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench)
        calls: list[int] = []

        def stuck(tx: Transaction) -> None:
            calls.append(1)
            tx.append([envelope(9)], stream="s", expected=1)
            tx.execute(ENDLESS)

        results = await asyncio.gather(
            store.transact(lambda tx: tx.append([envelope(1)], stream="s", expected=0), rows=1),
            store.append([envelope(2)], expected=("t", 0)),
            store.transact(stuck, rows=1, limit_us=20_000),
            store.append([envelope(3)], expected=("u", 0)),
            store.transact(lambda tx: tx.append([envelope(4)], stream="s", expected=1), rows=1),
            return_exceptions=True,
        )
        same([isinstance(result, TimedOut) for result in results], [False, False, True, False, False], "which of them failed")
        same((sorted(await _stored(store)), len(calls)), ([1, 2, 3, 4], 1), "what is stored, and how often it was tried")
        await store.append([envelope(5)], expected=("s", 2))


# ── states ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@promise(Feature.EFFECTS)
async def promise_states_are_kept(make_store: MakeStore) -> None:
    """A small state is set, replaced and removed by its owner and id; listed by id, cleared by prefix, forgotten by age."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        names = ["a\x1f1", "a\x1f2", "ab", "b", "ä"]
        for name in reversed(names):
            await store.transact(lambda tx, name=name: tx.set_state("mine", name, name.encode()))  # type: ignore[misc]
        await store.transact(lambda tx: tx.set_state("other", "a\x1f1", b"\x00not mine"))
        same(await _ids(store), names, "listed by id")
        same([s.id for s in await store.states("mine", after="a\x1f1", limit=2)], names[1:3], "a page of them")
        same([(s.owner, s.body) for s in await store.states("other")], [("other", b"\x00not mine")], "of another owner")
        same([await store.state("mine", name) for name in ("b", "none")], [b"b", None], "read one by one")
        await store.transact(lambda tx: tx.set_state("mine", "b", b"other"))
        same((await store.state("mine", "b"), await _ids(store)), (b"other", names), "after replacing one")
        same(await store.transact(_set_and_look), [None, b"now", None], "what a transaction sees of its own")
        same(await store.transact(lambda tx: tx.clear_states("mine", prefix="a\x1f")), 2, "cleared by prefix")
        same(await _ids(store), ["ab", "b", "ä"], "left after clearing by prefix")
        for n in range(3):
            await store.transact(lambda tx, n=n: tx.set_state("old", f"{9 - n}", b""))  # type: ignore[misc]
            await asyncio.sleep(0.002)
        middle_us = (await store.states("old"))[1].at_us
        await store.transact(lambda tx: tx.forget_states("old", middle_us, 5))
        same([s.id for s in await store.states("old")], ["7", "8"], "left after forgetting what is older than the second")
        await store.transact(lambda tx: tx.forget_states("old", now_us() + 1, 1))
        same([s.id for s in await store.states("old")], ["7"], "left after forgetting the oldest one")
        same(await store.transact(lambda tx: tx.clear_states("mine")), 3, "cleared altogether")
        same((await _ids(store), len(await store.states("other"))), ([], 1), "left of each owner")
        await raises(Rejected, store.transact(lambda tx: tx.set_state("mine", "x", bytes(64 << 20))), "a state of 64 MiB")


async def _ids(store: Store) -> list[str]:
    return [state.id for state in await store.states("mine")]


def _set_and_look(tx: Transaction) -> list[bytes | None]:
    seen = [tx.state("mine", "c")]
    tx.set_state("mine", "c", b"now")
    seen.append(tx.state("mine", "c"))
    tx.set_state("mine", "c", None)
    return [*seen, tx.state("mine", "c")]


@promise(Feature.EFFECTS, Feature.PERSISTENT, Feature.EXPECTED)
async def promise_states_survive(make_store: MakeStore) -> None:
    """States, closed streams and where truncated ones begin are there after a crash."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        await store.append([envelope(n) for n in range(3)], expected=("s", 0))
        await store.truncate_stream("s", 2)
        await store.close_stream("s", "enough")
        await store.transact(lambda tx: tx.set_state("mine", "id", b"body"))
        await bench.crash(store)
        store = await bench.open()
        same((await store.state("mine", "id"), await _stored(store, stream="s")), (b"body", [1, 2]), "state and stream")
        await raises(Conflict, store.append([envelope(9)], expected=("s", 3)), "a closed stream")


# ── timers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@promise(Feature.EFFECTS, Feature.TIMERS)
async def promise_named_timers_are_moved(make_store: MakeStore) -> None:
    """A timer with a name is one: set again it is moved, cancelled by name it never fires, and it fires once."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        soon = now_us() + 1_000_000
        await store.transact(lambda tx: tx.schedule(envelope(1, id="one"), soon, name="later"))
        await store.transact(lambda tx: tx.schedule(envelope(2, id="two"), soon + DAY_US, name="later"))
        await store.transact(lambda tx: tx.schedule(envelope(3, id="three"), soon, name="never"))
        await store.transact(lambda tx: tx.schedule(envelope(4, id="four"), soon + DAY_US, name="sooner"))
        await store.transact(lambda tx: tx.schedule(envelope(4, id="four"), soon, name="sooner"))
        same(await store.transact(lambda tx: [tx.cancel("never"), tx.cancel("never")]), [True, False], "cancelled once")
        listed = {timer.name: (timer.envelope.id, timer.due_us) for timer in await store.timers()}
        same(listed, {"later": ("two", soon + DAY_US), "sooner": ("four", soon)}, "timers")
        await store.transact(lambda tx: tx.schedule(envelope(5), soon + 50_000, name="marker"))
        fired = await take(store, "readers", 2)
        same(sorted(numbers(fired)), [4, 5], "what has fired when the marker has")
        await answer(store, fired)
        same(await store.transact(lambda tx: tx.cancel("sooner")), False, "cancelling what has fired")
        await store.transact(lambda tx: tx.schedule(envelope(4, id="four"), 0, name="sooner"))
        await none_left(store, "readers", "after setting a timer again that is on the log")
        await store.transact(lambda tx: tx.schedule(envelope(6), 0, name="later"))
        fired = await take(store, "readers", 1)
        same((numbers(fired), await store.timers()), ([6], []), "one that was moved to the past, and what is left")


@promise(Feature.EFFECTS, Feature.TIMERS, Feature.PERSISTENT)
async def promise_named_timers_survive(make_store: MakeStore) -> None:
    """A timer with a name survives a crash: it fires once, and its name still moves or cancels it."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        due = now_us() + 50_000
        for n, name in enumerate(("fires", "moved", "cancelled"), 1):
            await store.transact(lambda tx, n=n, name=name: tx.schedule(envelope(n), due, name=name))  # type: ignore[misc]
        await bench.crash(store)
        store = await bench.open()
        await store.transact(lambda tx: tx.cancel("cancelled"))
        await store.transact(lambda tx: tx.schedule(envelope(4), due + DAY_US, name="moved"))
        others = [store, *([await bench.open()] if Feature.SHARED in store.features else [])]
        for each in others:
            await bench.bind(each, READERS)
        await until(lambda: _some(store), "the timer that is due fires")
        await store.transact(lambda tx: tx.schedule(envelope(5), 0, name="marker"))
        await until(lambda: _some(store, 2), "the marker fires")
        same(await _stored(store), [1, 5], "what has fired")
        same([(timer.name, timer.due_us) for timer in await store.timers()], [("moved", due + DAY_US)], "timers left")


async def _some(store: Store, count: int = 1) -> bool:
    return len(await store.read(Query())) >= count


# ── in a settlement ──────────────────────────────────────────────────────────────────────────────────────────────────


def _in_effect(write: Callable[[Transaction], object]) -> Callable[[Db], object]:
    return lambda db: write(cast("Transaction", db))


@promise(Feature.EFFECTS, Feature.EXPECTED, Feature.TIMERS)
async def promise_a_failing_effect_leaves_nothing(make_store: MakeStore) -> None:
    """An effect that has appended, set states and timers and then fails leaves nothing, and no wrong version behind."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench, has_effects=True)
        await store.append([envelope(n, f"k{n}", kind="start") for n in range(4)])
        out = await take(store, "readers", 4)

        def fails(tx: Transaction) -> None:
            _everything(tx, 9, 1, 2)
            raise ValueError("at the end")

        writes: list[Callable[[Transaction], object]] = [
            lambda tx: _everything(tx, 1, 0, 0),
            fails,
            lambda tx: _everything(tx, 9, 0, 2),
            lambda tx: _everything(tx, 2, 1, 2),
        ]
        answers = [effect(d, _in_effect(write), after_us=DAY_US) for d, write in zip(out, writes, strict=True)]
        same(await store.settle("readers", answers), [], "lost")
        verdicts = [each.settlements[0].verdict for each in answers]
        same(verdicts, ["done", "retry", "retry", "done"], "what became of each")
        expect("version 1" in answers[2].settlements[0].error, "the conflict is what its error says")
        same(await _stored(store, stream="a"), [1, 2], "stream a")
        same(await _stored(store, stream="b"), [1, 1, 2, 2], "stream b")
        same([state.id for state in await store.states("mine")], ["id-1", "id-2"], "states")
        same([timer.name for timer in await store.timers()], ["name-1", "name-2"], "timers")
        same(await _seen(store), [1, 2], "rows of the user's table")
        await store.append([envelope(3)], expected=("a", 2))
        await store.append([envelope(3)], expected=("b", 4))
        records = await take(store, "readers", 10)
        got = numbers(records) if Feature.HISTORY in store.features else sorted(numbers(records))
        same(got, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3], "what the group reads of what it appended")


@promise(Feature.EFFECTS, Feature.EXPECTED, Feature.TIMERS, Feature.REPLAY)
async def promise_a_lost_lease_writes_nothing(make_store: MakeStore) -> None:
    """What an effect would have appended does not happen when its lease is lost."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench, has_effects=True)
        await store.append([envelope(1, "k", kind="start")])
        late = (await take(store, "readers", 1))[0]
        before = await _stored(store)  # nothing, where a broker is the log
        await store.seek("readers", SeekTo(end="now"), reset=lambda _: None)
        work = effect(late, _in_effect(lambda tx: _everything(tx, 9, 0, 0)))
        same(numbers(await store.settle("readers", [work])), [1], "lost")
        same((await _stored(store), await _seen(store)), (before, []), "records and rows")
        same((await store.states("mine"), await store.timers()), ([], []), "states and timers")
        await until(lambda: is_idle(store, "readers"), "the group has nothing to do")


@promise(Feature.EFFECTS, Feature.EXPECTED, Feature.TIMERS)
async def promise_an_interrupted_effect_is_undone(make_store: MakeStore) -> None:
    """An effect interrupted after it has appended harms none of its settlement, and is forgotten with all it had changed."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench, has_effects=True)
        await store.append([envelope(n, f"k{n}", kind="start") for n in range(3)])
        out = await take(store, "readers", 3)

        def stuck(tx: Transaction) -> None:
            _everything(tx, 9, 1, 2)
            tx.execute(ENDLESS)

        writes: list[Callable[[Transaction], object]] = [
            lambda tx: _everything(tx, 1, 0, 0),
            stuck,
            lambda tx: _everything(tx, 2, 1, 2),
        ]
        answers = [effect(d, _in_effect(write), limit_us=100_000, after_us=DAY_US) for d, write in zip(out, writes, strict=True)]
        await store.settle("readers", answers)
        same([each.settlements[0].verdict for each in answers], ["done", "retry", "done"], "what became of each")
        same((await _stored(store, stream="a"), await _seen(store)), ([1, 2], [1, 2]), "stream a and the user's table")
        same([number(d) for d in out], [0, 1, 2], "what was handled")
        await store.append([envelope(3)], expected=("b", 4))
        try:
            await store.transact(stuck, limit_us=50_000)
        except TrilogueError:
            await store.append([envelope(3)], expected=("a", 2))
        same(await _stored(store, stream="a"), [1, 2, 3], "stream a after a transaction that was interrupted")
