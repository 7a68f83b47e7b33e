"""The log: append, read, timers, retention."""

import asyncio
import time
from typing import Any

from trilogue.conformance.tools import (
    Bench,
    MakeStore,
    answer,
    any_group,
    drain,
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
from trilogue.errors import Conflict, LogError, Rejected, TrilogueError, UnknownEvent
from trilogue.events import Envelope, Receipt, now_us
from trilogue.ports import ANY_VERSION, Feature, Query, Store

READERS = group()


@promise(Feature.HISTORY)
async def promise_positions_increase(make_store: MakeStore) -> None:
    """Positions only ever grow: in an append, between appends, and recorded time with them."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        appends = [store.append([envelope(n), envelope(n)]) for n in range(50)]
        positions = await asyncio.gather(*appends, store.append([envelope(99)]))
        flat = [position for both in positions for position in both]
        same(flat, sorted(set(flat)), "positions in order of publishing, none twice")
        records = await store.read(Query())
        same([record.position for record in records], flat, "positions read")
        times = [record.recorded_us for record in records]
        same(times, sorted(times), "recorded times in order of position")


@promise(Feature.HISTORY, Feature.PERSISTENT)
async def promise_appended_is_durable(make_store: MakeStore) -> None:
    """What append() returned is there after a crash."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        expect(store.durability != "memory", "a persistent store does not say `memory`")
        position = (await store.append([envelope(7, "k")]))[0]
        await bench.crash(store)
        after = await (await bench.open()).read(Query())
        same([(record.position, record.data, record.key) for record in after], [(position, b"7", "k")], "records after the crash")


FULL = Envelope(
    "id-1", "a.b-c.d_e", b"\x00\xff not json", "kéy\x01", "shop", 12_345, 7, "cor", "cau", "subject", "00-ab-cd-01",
    {"n": 1, "flag": True, "text": "ä"}, ("course:c1", "student:ä"),
)  # fmt: skip


@promise()
async def promise_everything_is_delivered(make_store: MakeStore) -> None:
    """A handler gets an envelope as it was published, with every attribute, and the time it was recorded."""
    async with Bench(make_store) as bench:
        store = await bench.open(any_group(make_store))
        await store.append([FULL])
        [delivery] = await take(store, "readers", 1)
        for field in set(Envelope.__struct_fields__) - {"extensions"}:
            same(getattr(delivery.record, field), getattr(FULL, field), f"{field} delivered")
        # A wire that knows texts only carries CloudEvents attributes as their canonical texts.
        texts = {"n": "1", "flag": "true", "text": "ä"}
        got = delivery.record.extensions
        expect(got in (FULL.extensions, texts), f"extensions delivered: expected {FULL.extensions}, got {got}")
        same((delivery.attempt, delivery.replay), (1, False), "attempt, and whether it is a replay")
        expect(delivery.record.recorded_us > 0, "it says when it was recorded")


@promise(Feature.HISTORY)
async def promise_everything_comes_back(make_store: MakeStore) -> None:
    """An envelope is read back as it was published, with every attribute."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        await store.append([FULL])
        record = (await store.read(Query()))[0]
        for field in Envelope.__struct_fields__:
            same(getattr(record, field), getattr(FULL, field), f"{field} read back")


@promise(Feature.HISTORY)
async def promise_a_nul_harms_nobody(make_store: MakeStore) -> None:
    """A key with a NUL character comes back as it was, or is refused alone; so is an id, and its neighbours do not suffer."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        odd = [envelope(1, "a\x00b"), envelope(2, id="i\x00d")]
        outcomes = await asyncio.gather(*(store.append([each]) for each in (*odd, envelope(3, "k"))), return_exceptions=True)
        expect(not isinstance(outcomes[2], BaseException), f"what is published beside it is stored, got {outcomes[2]}")
        stored = {record.id: record.key for record in await store.read(Query())}
        for sent, outcome in zip(odd, outcomes, strict=False):
            expect(
                not isinstance(outcome, BaseException) or isinstance(outcome, Rejected), f"stored or Rejected, got {outcome!r}"
            )
            same(stored.get(sent.id, "(none)"), "(none)" if isinstance(outcome, Rejected) else sent.key, "key of a stored one")


@promise(Feature.DEDUP)
async def promise_ids_are_idempotent(make_store: MakeStore) -> None:
    """Publishing the same id with the same content again adds nothing and tells the same position."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        one, two = envelope(1, id="one"), envelope(2, id="two")
        first = await store.append([one])
        same(await store.append([one]), first, "position of a repetition")
        again = await asyncio.gather(store.append([one, two]), store.append([two, one]))
        same(again, [[first[0], again[0][1]], [again[0][1], first[0]]], "positions of repetitions among new ones")
        same(numbers(await drain(store, "readers", 2)), [1, 2], "what is handled")
        await none_left(store, "readers", "after both were handled")


@promise(Feature.DEDUP)
async def promise_other_content_is_a_conflict(make_store: MakeStore) -> None:
    """The same id with other content is a Conflict: nothing of that append is stored, everything of its neighbours is."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(1, id="one")])
        results = await asyncio.gather(
            store.append([envelope(2)]),
            store.append([envelope(3), envelope(4, id="one")]),
            store.append([envelope(5)]),
            return_exceptions=True,
        )
        expect(isinstance(results[1], Conflict), f"a Conflict, got {results[1]!r}")
        same(numbers(await drain(store, "readers", 3)), [1, 2, 5], "what is stored")
        await none_left(store, "readers", "after the neighbours")


def _bad() -> list[Envelope]:
    return [
        Envelope("", "thing.made", b"1"),
        Envelope("x" * 256, "thing.made", b"1"),
        envelope(1, "k" * 513),
        envelope(1, "no utf-8 \udcff"),
        envelope(1, id="no utf-8 \udcff"),
        Envelope("source", "thing.made", b"1", source="no utf-8 \udcff"),
        Envelope("large", "thing.made", b"1" * (2 << 20)),
    ]


@promise()
async def promise_rejected_is_not_stored(make_store: MakeStore) -> None:
    """What cannot be stored is Rejected and never handled; what comes with it is, and its receipt says how safely."""
    async with Bench(make_store) as bench:
        store = await bench.open(any_group(make_store))
        publishes = [store.publish([each]) for each in (envelope(1), *_bad(), envelope(2))]
        results = await asyncio.gather(*publishes, return_exceptions=True)
        for result in results[1:-1]:
            error = result if isinstance(result, BaseException) else result[0]
            expect(isinstance(error, Rejected) and error.stored is False, f"it is Rejected, got {error!r}")
        stored = [result[0] for result in (results[0], results[-1]) if not isinstance(result, BaseException)]
        expect(all(isinstance(each, Receipt) and each.durability == store.durability for each in stored), f"receipts: {stored}")
        same(sorted(numbers(await drain(store, "readers", 2))), [1, 2], "what is handled")
        await none_left(store, "readers", "after the good ones")


@promise(Feature.EXPECTED)
async def promise_rejected_alone(make_store: MakeStore) -> None:
    """What cannot be stored is Rejected alone, and nothing of its append is stored; others of the same moment are."""
    bad = _bad()
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        appends = [store.append([envelope(10), each]) for each in bad]
        results = await asyncio.gather(*appends, store.append([envelope(2)]), return_exceptions=True)
        for sent, result in zip(bad, results, strict=False):
            expect(isinstance(result, Rejected) and result.stored is False, f"{sent!r} is Rejected, got {result!r}")
        same(numbers(await drain(store, "readers", 1)), [2], "what is stored")
        await none_left(store, "readers", "after the good one")


@promise(Feature.EXPECTED)
async def promise_one_writer_wins(make_store: MakeStore) -> None:
    """Of 16 writers that expect the same version of a stream exactly one wins; versions have no gap."""
    async with Bench(make_store) as bench:
        stores = [await bench.open()]
        if Feature.SHARED in stores[0].features:
            stores.append(await bench.open())
        for version in range(4):
            tries = (stores[n % len(stores)].append([envelope(n)], expected=("s", version)) for n in range(16))
            results = await asyncio.gather(*tries, return_exceptions=True)
            losers = [result for result in results if isinstance(result, Conflict)]
            same(len(losers), 15, "writers that lost")
        records = await stores[0].read(Query(stream="s"))
        same([record.version for record in records], [1, 2, 3, 4], "versions of the stream")


@promise(Feature.EXPECTED)
async def promise_versions_are_contiguous(make_store: MakeStore) -> None:
    """Repeating an append to a stream tells the same positions; one that is partly there leaves no gap in the versions."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        a, b, c, d = (envelope(n, id=f"id-{n}") for n in range(4))
        first = await store.append([a, b], expected=("s", 0))
        same(await store.append([a, b], expected=("s", 0)), first, "positions of the repetition")
        await raises(Conflict, store.append([a, c], expected=("s", 0)), "another append with an outdated version")
        await raises(Conflict, store.append([c], expected=("s", 5)), "a version that is not there yet")
        await store.append([b, c], expected=("s", 2))
        await store.append([c, d], expected=("s", ANY_VERSION))
        records = await store.read(Query(stream="s"))
        same([(record.id, record.version) for record in records], [(f"id-{n}", n + 1) for n in range(4)], "the stream")
        await raises(Conflict, store.append([a], expected=("other", 0)), "an id that is in another stream")


@promise(Feature.HISTORY)
async def promise_read_in_all_directions(make_store: MakeStore) -> None:
    """Records are read by key, stream, type, position and time, forwards and backwards, a page at a time."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        kinds = ("video.watched", "video.quality.changed", "user.born")
        for n in range(12):
            await store.append([envelope(n, f"k{n % 2}", kind=kinds[n % 3])])
        await store.append([envelope(12, "k0"), envelope(13)], expected=("s", 0))
        everything = await store.read(Query())
        at = [record.position for record in everything]
        middle_us = everything[6].recorded_us
        expected: list[tuple[Query, list[int]]] = [
            (Query(), list(range(14))),
            (Query(reverse=True), list(reversed(range(14)))),
            (Query(limit=3), [0, 1, 2]),
            (Query(reverse=True, limit=3), [13, 12, 11]),
            (Query(limit=0), []),
            (Query(key="k0"), [0, 2, 4, 6, 8, 10, 12]),
            (Query(key="k1", reverse=True, limit=2), [11, 9]),
            (Query(key="nobody"), []),
            (Query(stream="s"), [12, 13]),
            (Query(types=("video.*",)), [0, 3, 6, 9]),
            (Query(types=("video.#", "user.born"), after=at[9]), [10, 11]),
            (Query(types=("nothing.like.it",)), []),
            (Query(after=at[3], before=at[6]), [4, 5]),
            (Query(before=at[3], reverse=True), [2, 1, 0]),
            (Query(since_us=0, until_us=now_us() + 10**9), list(range(14))),
            (Query(since_us=now_us() + 10**9), []),
            (Query(since_us=middle_us), [n for n in range(14) if everything[n].recorded_us >= middle_us]),
            (Query(until_us=middle_us, key="k0"), [n for n in (0, 2, 4, 6) if everything[n].recorded_us < middle_us]),
        ]
        for query, found in expected:
            same([int(record.data) for record in await store.read(query)], found, f"records of {query}")


@promise(Feature.TIMERS)
async def promise_timers_are_never_early(make_store: MakeStore) -> None:
    """A delayed event enters the log when due, once, in order of due time; one that was cancelled never does."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        due_us = now_us() + 300_000
        await store.schedule([envelope(2, "k", id="two")], due_us + 50_000)
        await store.schedule([envelope(1, "j", id="one"), envelope(3, "k", id="never")], due_us)
        await store.schedule([envelope(1, "j", id="one")], due_us)
        await none_left(store, "readers", "before anything is due")
        expect(await store.cancel("never"), "cancel() of a timer tells True")
        expect(not await store.cancel("never"), "cancel() of none tells False")
        deliveries = await take(store, "readers", 2)
        expect(now_us() >= due_us, "a timer fires when it is due, not before")
        # Where keys have partitions of their own, there is no order between them.
        got = numbers(deliveries) if Feature.HISTORY in store.features else sorted(numbers(deliveries))
        same(got, [1, 2], "what was delayed")
        await answer(store, deliveries)
        await none_left(store, "readers", "after all timers fired")
        if Feature.DEDUP in store.features:
            await store.schedule([envelope(1, "j", id="one")], 0)
            await none_left(store, "readers", "after scheduling an id that is on the log")


@promise(Feature.TIMERS, Feature.PERSISTENT)
async def promise_timers_survive(make_store: MakeStore) -> None:
    """Timers survive a restart; those that came due meanwhile fire at once."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        await store.schedule([envelope(1)], now_us() + 50_000)
        await store.schedule([envelope(2)], now_us() + 86_400_000_000)
        await bench.crash(store)
        await asyncio.sleep(0.06)
        store = await bench.open(READERS)
        same(numbers(await take(store, "readers", 1)), [1], "what came due while nothing ran")
        same((await store.status()).timers, 1, "timers left")


@promise(Feature.HISTORY)
async def promise_trim_keeps_what_is_needed(make_store: MakeStore) -> None:
    """Retention never removes the newest record, one of a stream, or one a group still needs, unless told."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(n, f"k{n}") for n in range(10)])
        await store.append([envelope(10)], expected=("s", 0))
        same(await store.trim(keep=1), 0, "trimmed while the group has finished nothing")
        same(await store.transact(lambda tx: tx.removed()), (0, 0), "the newest that was removed")
        times = {record.position: record.recorded_us for record in await store.read(Query())}
        deliveries = await take(store, "readers", 11)
        await answer(store, deliveries[3:4], "dead")
        await answer(store, deliveries[5:6], "retry", after_us=3_600_000_000)
        await answer(store, [*deliveries[:3], deliveries[4], *deliveries[6:]])
        await store.append([envelope(11)])
        await until(lambda: _trims_to(store, [3, 5, 10, 11]), "all but what is held, of a stream or newest is trimmed")
        same(await _stored(store), [3, 5, 10, 11], "records after trim(keep=1)")
        newest = (10, times[10])  # of value 9: what is held, and of a stream, stays before and after it
        same(await store.transact(lambda tx: tx.removed()), newest, "the newest that was removed")
        await store.trim(older_than_us=0, keep=1, force=True, streams=True)
        same(await _stored(store), [10, 11], "records after a forced trim: the newest, and the newest of the stream")
        same(await store.transact(lambda tx: tx.removed()), newest, "the newest that was removed, after older ones went")
        same([letter.record.position for letter in await store.dead("readers")], [], "dead letters of records that are gone")
        same(numbers(await drain(store, "readers", 1)), [11], "what is left to do")
        expect(await is_idle(store, "readers"), "a group whose held records were trimmed by force becomes idle")
        position = (await store.append([envelope(12)]))[0]
        same(position, 13, "position after trimming: it counts on")


async def _trims_to(store: Store, left: list[int]) -> bool:
    await store.trim(keep=1)
    return await _stored(store) == left


async def _stored(store: Store) -> list[int]:
    return [int(record.data) for record in await store.read(Query())]


@promise()
async def promise_errors_are_sentences(make_store: MakeStore) -> None:
    """A store that is not open, and a group nobody declared, are refused with an error of ours that names them."""
    store = make_store()
    for doing in _uses(store):
        await raises(LogError, doing, "using a store before open()")
    async with Bench(make_store) as bench:
        store = await bench.open(any_group(make_store))
        for name, doing in _of_nobody(store).items():
            error = await raises(UnknownEvent, doing, f"{name}() of a group that is not there")
            expect("nobody" in str(error), f"the error of {name}() names the group: {error}")
        await raises(TrilogueError, store.open(), "opening twice")
        await bench.close(store)
        for doing in _uses(store):
            await raises(LogError, doing, "using a store after close()")
        await store.close()


def _uses(store: Store) -> list[Any]:
    uses: list[Any] = [store.append([envelope()]), store.status(), store.claim("readers", limit=1, wait_s=0)]
    if Feature.TIMERS in store.features:
        uses += [store.schedule([envelope()], 0)]
    if Feature.EXPECTED in store.features:
        uses += [store.read(Query()), store.query("select 1")]
    return uses


def _of_nobody(store: Store) -> dict[str, Any]:
    uses: dict[str, Any] = {
        "claim": store.claim("nobody", limit=1, wait_s=0),
        "redrive": store.redrive("nobody"),
        "dead": store.dead("nobody"),
        "drop_group": store.drop_group("nobody"),
    }
    if Feature.PAUSE in store.features:
        uses["pause"] = store.pause("nobody")
    if Feature.HISTORY in store.features:
        uses["handled"] = store.handled("nobody", 1)
    return uses


@promise(Feature.ORDER, Feature.DEAD, Feature.PARK, Feature.RETRY)
async def promise_status_tells_what_is_held(make_store: MakeStore) -> None:
    """status() tells per group what is dead, parked and to be tried again, and who works for it."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(n, f"k{n}") for n in range(6)])
        deliveries = await take(store, "readers", 6)
        await answer(store, deliveries[:2])
        await answer(store, deliveries[2:4], "dead")
        await answer(store, deliveries[4:5], "dead", park=True)
        await answer(store, deliveries[5:], "retry", after_us=3_600_000_000)
        [readers] = [each for each in (await store.status()).groups if each.name == "readers"]
        same((readers.dead, readers.parked, readers.retrying), (2, 1, 1), "dead, parked, retrying")
        same((readers.patterns, readers.ordered, readers.paused), (("#",), True, False), "what the group reads, and how")
        expect(not await is_idle(store, "readers"), "a group that will try again is not idle")


@promise(Feature.HISTORY)
async def promise_status_counts(make_store: MakeStore) -> None:
    """status() tells the head, types, timers and, per group, what is left, held, dead and done."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(n, f"k{n}", kind="a.b" if n % 2 else "a.c") for n in range(10)])
        deliveries = await take(store, "readers", 9)
        await answer(store, deliveries[:4])
        await answer(store, deliveries[4:6], "dead")
        await answer(store, deliveries[6:7], "dead", park=True)
        await answer(store, deliveries[7:8], "retry", after_us=3_600_000_000)
        status = await store.status()
        same((status.head, dict(status.types)), (10, {"a.b": 5, "a.c": 5}), "head and types")
        readers = status.groups[0]
        same((readers.done, readers.dead, readers.parked, readers.retrying), (4, 2, 1, 1), "done, dead, parked, retrying")
        same((readers.lag, readers.failed, readers.workers), (3, 4, 1), "lag, failed, workers")
        expect(readers.lag_s >= 0 and number(deliveries[0]) == 0, "lag in seconds is not negative")
        began = time.monotonic()
        await store.changed(0.05)
        expect(time.monotonic() - began < 10, "changed() returns")
