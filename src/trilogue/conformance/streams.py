"""The event store side of the log: expected versions, tags, closed and truncated streams, what led to what."""

import asyncio
from collections.abc import Sequence

from trilogue.conformance.tools import (
    Bench,
    MakeStore,
    answer,
    drain,
    envelope,
    expect,
    group,
    numbers,
    promise,
    raises,
    same,
    take,
    until,
)
from trilogue.errors import Conflict, StreamClosed
from trilogue.events import Envelope, Record, new_id, now_us
from trilogue.ports import ANY_VERSION, Feature, Query, Store, Transaction

READERS = group()
NOTED = 4_096


def tagged(n: int, *tags: str, kind: str = "thing.made") -> Envelope:
    """An envelope whose data is the number, with tags."""
    return Envelope(new_id(), kind, str(n).encode(), time_us=now_us(), tags=tags)


def data(records: Sequence[Record]) -> list[int]:
    """The numbers of records."""
    return [int(record.data) for record in records]


async def versions(store: Store, stream: str) -> list[int | None]:
    """The versions a stream shows."""
    return [record.version for record in await store.read(Query(stream=stream))]


async def stores_of(bench: Bench) -> list[Store]:
    """Two stores on the log, where it can be shared; otherwise the same one twice."""
    first = await bench.open()
    return [first, await bench.open() if Feature.SHARED in first.features else first]


# ── expected versions ────────────────────────────────────────────────────────────────────────────────────────────────


@promise(Feature.EXPECTED)
async def promise_a_conflict_says_who(make_store: MakeStore) -> None:
    """A Conflict names the stream, the expected and the actual version, and who wrote: as audited, or the source."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        await store.append([Envelope(new_id(), "a", b"1", source="shop", time_us=now_us())], expected=("s", 0))
        told = await raises(Conflict, store.append([envelope(2)], expected=("s", 0)), "an outdated version")
        _tells(told, 0, 1, "shop")
        await store.append([Envelope(new_id(), "a", b"2", time_us=now_us(), extensions={"who": "alice"})], expected=("s", 1))
        told = await raises(Conflict, store.append([envelope(3)], expected=("s", 7)), "a version that is not there yet")
        _tells(told, 7, 2, "alice")

        def late(tx: Transaction) -> list[int]:
            return tx.append([envelope(4)], stream="s", expected=1)

        _tells(await raises(Conflict, store.transact(late), "an outdated version in a transaction"), 1, 2, "alice")
        told = await raises(Conflict, store.append([envelope(5)], expected=("new", 1)), "a version of a stream that is not there")
        same((getattr(told, "actual", 0), getattr(told, "by", "")), (0, None), "version and writer of a stream without events")
        same(data(await store.read(Query())), [1, 2], "what is stored after all these conflicts")


def _tells(told: object, expected: int, actual: int, by: str) -> None:
    facts = [getattr(told, name) for name in ("stream", "expected", "actual", "by")]
    same(facts, ["s", expected, actual, by], "stream, expected, actual and by of the Conflict")
    expect("'s'" in str(told) and by in str(told), f"its message names the stream and who wrote: {told}")


@promise(Feature.EXPECTED)
async def promise_nothing_is_checked_too(make_store: MakeStore) -> None:
    """An append of nothing stores nothing, and still is a Conflict where the version is another one."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        await store.append([envelope(1)], expected=("s", 0))
        same(await store.append([], expected=("s", 1)), [], "positions of nothing")
        await raises(Conflict, store.append([], expected=("s", 0)), "nothing at an outdated version")
        await raises(Conflict, store.transact(lambda tx: tx.append([], stream="s", expected=5)), "the same in a transaction")
        same(await store.append([]), [], "positions of nothing at all")
        same(await versions(store, "s"), [1], "the stream")


@promise(Feature.EXPECTED)
async def promise_neighbours_of_a_conflict(make_store: MakeStore) -> None:
    """Of appends made at the same moment, one that conflicts or repeats an id harms none of the others."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        known = envelope(0, id="known")
        first = await store.append([known], expected=("a", 0))
        for round_ in range(3):
            version = 1 + 3 * round_
            results = await asyncio.gather(
                store.append([envelope(1), envelope(2)], expected=("a", version)),
                store.append([envelope(90)], expected=("a", version)),
                store.append([envelope(91)], expected=("b", 99)),
                store.append([envelope(3)], expected=("b", round_)),
                *([store.append([known], expected=("a", 0))] if round_ else []),
                store.append([envelope(4)], expected=("a", version + 2)),
                store.append([envelope(5)]),
                return_exceptions=True,
            )
            conflicts = [n for n, result in enumerate(results) if isinstance(result, BaseException)]
            same(conflicts, [1, 2], f"which of these are refused: {results}")
            if round_:
                same(results[4], first, "the position of the repetition")
        same(await versions(store, "a"), list(range(1, 11)), "versions of the stream, without a gap")
        same(data(await store.read(Query(stream="a"))), [0, *[1, 2, 4] * 3], "what it holds")
        same(data(await store.read(Query(stream="b"))), [3] * 3, "what its neighbour holds")


@promise(Feature.EXPECTED, Feature.SHARED)
async def promise_versions_known_are_true(make_store: MakeStore) -> None:
    """Stores that write to one stream in turns never go by a version, or an end, that another has changed."""
    async with Bench(make_store) as bench:
        one, two = await stores_of(bench)
        for version in range(0, 20, 2):
            await one.append([envelope(version)], expected=("s", version))
            await raises(Conflict, two.append([envelope(99)], expected=("s", version)), "what the other has just used")
            await two.append([envelope(version + 1)], expected=("s", version + 1))
        same(data(await one.read(Query(stream="s"))), list(range(20)), "the stream")
        await one.append([envelope(20)], expected=("s", 20))
        same(await two.close_stream("s", "by two"), 21, "version at which it is closed")
        same(await one.close_stream("s", "by one"), 21, "closing what another has closed")
        expect(b"by two" in (await one.state("stream", "s") or b""), "the first reason stays")
        await raises(StreamClosed, one.append([envelope(99)], expected=("s", 21)), "the stream another has closed")
        await one.append([envelope(0)], expected=("t", 0))
        await two.append([envelope(1), envelope(2)], expected=("t", ANY_VERSION))
        same(await one.close_stream("t", "by one"), 3, "version at which a stream is closed that another has written to")
        await two.append([envelope(0)], expected=("u", 0))
        await one.append([envelope(1)], expected=("u", 1))
        await two.truncate_stream("u", 2)
        same(await versions(one, "u"), [2], "what is shown of a stream another has truncated")


# ── closed and truncated ─────────────────────────────────────────────────────────────────────────────────────────────


@promise(Feature.EXPECTED)
async def promise_closed_streams_refuse(make_store: MakeStore) -> None:
    """A closed stream refuses every append, new or merged, and still is read; closing it again changes nothing."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        last = envelope(2)
        at = await store.append([envelope(1), last], expected=("s", 0))
        same(await store.close_stream("s", "account closed"), 2, "version of the closed stream")
        for expected in (0, 2, 3, ANY_VERSION):
            told = await raises(StreamClosed, store.append([envelope(3)], expected=("s", expected)), f"appending at {expected}")
        same([getattr(told, name) for name in ("stream", "actual")], ["s", 2], "stream and version the error names")
        await raises(StreamClosed, store.transact(lambda tx: tx.append([envelope(4)], stream="s")), "in a transaction")
        results = await asyncio.gather(
            store.append([envelope(5)], expected=("s", 2)),
            store.append([envelope(6)], expected=("t", 0)),
            return_exceptions=True,
        )
        same([isinstance(result, StreamClosed) for result in results], [True, False], "which of two are refused")
        same(await store.append([last], expected=("s", 1)), at[1:], "a writer that never got its answer asks again")
        same(await store.append([last], expected=("s", ANY_VERSION)), at[1:], "the same, of one that expected no version")
        same(await store.close_stream("s", "again"), 2, "closing it again")
        body = await store.state("stream", "s") or b""
        expect(b"account closed" in body, f"the first reason stays, there is {body!r}")
        same(data(await store.read(Query(stream="s"))), [1, 2], "the stream is still read")
        same(await store.stream_version("s"), 2, "its version")
        same(await store.close_stream("never", "not wanted"), 0, "a stream without events can be closed")
        await raises(StreamClosed, store.append([envelope(7)], expected=("never", 0)), "and stays empty")


@promise(Feature.EXPECTED)
async def promise_truncated_streams_start_later(make_store: MakeStore) -> None:
    """Reads of a truncated stream start where it was cut, versions count on, what is hidden stays hidden."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        await store.append([envelope(n, "k") for n in range(1, 7)], expected=("s", 0))
        await store.append([envelope(9)], expected=("other", 0))
        for before in (0, 7, -1):
            await raises(Conflict, store.truncate_stream("s", before), f"truncating before {before}")
        await store.truncate_stream("s", 4)
        same(await versions(store, "s"), [4, 5, 6], "what the stream shows")
        same(data(await store.read(Query(stream="s", reverse=True, limit=2))), [6, 5], "backwards")
        same(data(await store.read(Query(stream="s", reverse=True, before=6))), [5, 4], "backwards from within")
        await store.truncate_stream("s", 2)
        same(await versions(store, "s"), [4, 5, 6], "after truncating it less")
        same(await store.transact(lambda tx: data(tx.read(Query(stream="s")))), [4, 5, 6], "in a transaction")
        await raises(Conflict, store.append([envelope(8)], expected=("s", 3)), "as if it were shorter")
        await store.append([envelope(7)], expected=("s", 6))
        same(await versions(store, "s"), [4, 5, 6, 7], "versions count on")
        same(data(await store.read(Query(key="k"))), [1, 2, 3, 4, 5, 6], "by key, what is not trimmed is still there")
        await store.close_stream("s", "done")
        await store.truncate_stream("s", 7)
        same(await versions(store, "s"), [7], "the end of a closed stream, truncated")
        same(await store.stream_version("s"), 7, "its version")
        await raises(StreamClosed, store.append([envelope(8)], expected=("s", 7)), "it is still closed")


@promise(Feature.EXPECTED, Feature.HISTORY)
async def promise_trim_of_streams(make_store: MakeStore) -> None:
    """Retention removes what is hidden of a stream once no group needs it; the newest record of a stream stays, always."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(n) for n in range(1, 6)], expected=("s", 0))
        await store.append([envelope(n) for n in range(11, 14)], expected=("t", 0))
        await store.truncate_stream("s", 4)
        same(await store.trim(keep=1), 0, "trimmed while the group has finished nothing")
        await answer(store, [d for d in await take(store, "readers", 8) if d.record.version != 2])
        same(await store.trim(keep=1), 2, "trimmed while the group holds the second record of each")
        await store.leave()
        await store.bind([READERS])
        same(numbers(await drain(store, "readers", 2)), [2, 12], "what the group still had to do")
        await until(lambda: _trims_to(store, [4, 5, 11, 12, 13]), "nothing hidden is left, all that is shown is")
        same(await store.trim(keep=1, streams=True, force=True), 3, "trimmed by force, streams too")
        same(data(await store.read(Query())), [5, 13], "what is left: the newest of each stream")
        await raises(Conflict, store.append([envelope(99)], expected=("s", 0)), "as if it were new")
        await store.append([envelope(6)], expected=("s", 5))
        same(await versions(store, "s"), [5, 6], "versions count on after trimming")


async def _trims_to(store: Store, left: list[int]) -> bool:
    await store.trim(keep=1)
    return data(await store.read(Query())) == left


# ── tags ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@promise(Feature.EXPECTED)
async def promise_one_decision_wins(make_store: MakeStore) -> None:
    """Of 16 writers that decide on the same tags exactly one wins, whichever store they come through."""
    async with Bench(make_store) as bench:
        stores = await stores_of(bench)
        for seat in range(4):
            query = Query(types=("seat.taken",), tags=(f"seat:{seat}",))

            def take_seat(tx: Transaction, n: int, guard: Query = query) -> list[int]:
                return tx.append([tagged(n, *guard.tags, kind="seat.taken")], unless=[guard])

            tries = (stores[n % 2].transact(lambda tx, n=n: take_seat(tx, n), rows=3) for n in range(16))  # type: ignore[misc]
            results = await asyncio.gather(*tries, return_exceptions=True)
            losers = [result for result in results if isinstance(result, Conflict)]
            same((len(losers), len(await stores[1].read(query))), (15, 1), "writers that lost, and seats taken")


@promise(Feature.EXPECTED, Feature.HISTORY)
async def promise_unless_sees_what_it_says(make_store: MakeStore) -> None:
    """Nothing is stored if a record is there that `unless` describes: all the tags, one of the types, after its position."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        await store.append([tagged(1, "course:c", "student:s")])
        at = (await store.append([tagged(2, "course:c"), tagged(3, "student:s"), tagged(4, "course:c", kind="noted")]))[0]
        both, one = ("course:c", "student:s"), ("course:c",)
        free = [
            Query(tags=both, after=at - 1),
            Query(tags=("course:other",)),
            Query(tags=("course:",)),
            Query(tags=one, types=("noted",), after=at + 2),
            Query(tags=one, types=("nothing.such",)),
            Query(tags=(*both, "third:t")),
        ]
        taken = [Query(tags=both), Query(tags=one, after=at - 1), Query(tags=one, types=("noted",), after=at), Query(stream="s")]
        same(len(await store.transact(lambda tx: tx.append([envelope(5)], unless=free, stream="s", expected=0))), 1, "free")
        for query in taken:
            what = f"a record matching {query}"
            told = await raises(Conflict, store.transact(lambda tx, q=query: tx.append([envelope(9)], unless=[q])), what)  # type: ignore[misc]
            same(getattr(told, "by", None), "trilogue", "who wrote what is in the way")
            await raises(Conflict, store.transact(lambda tx, q=query: tx.append([envelope(9)], unless=[*free[1:3], q])), what)  # type: ignore[misc]
        same(data(await store.read(Query())), [1, 2, 3, 4, 5], "what is stored")

        def twice(tx: Transaction) -> list[int]:
            tx.append([tagged(6, "room:r")])
            return tx.append([tagged(7, "room:r")], unless=[Query(tags=("room:r",))])

        await raises(Conflict, store.transact(twice), "what the same transaction has appended")
        same(await store.read(Query(tags=("room:r",))), [], "nothing of it is left")


@promise(Feature.HISTORY)
async def promise_read_by_tags(make_store: MakeStore) -> None:
    """Records are read by all of some tags, with every other condition beside, forwards and backwards, a page at a time."""
    async with Bench(make_store) as bench:
        store = await bench.open()
        for n in range(24):
            tags = tuple(tag for tag, by in (("two:2", 2), ("three:3", 3), ("ä\x01:ö", 4)) if n % by == 0)
            sent = Envelope(new_id(), "a.b" if n % 2 else "a.c", str(n).encode(), f"k{n % 4}", time_us=now_us(), tags=tags)
            await store.append([sent], expected=("s", ANY_VERSION) if n < 12 else None)
        at = [record.position for record in await store.read(Query())]
        expected: list[tuple[Query, list[int]]] = [
            (Query(tags=("two:2",)), list(range(0, 24, 2))),
            (Query(tags=("two:2", "three:3")), [0, 6, 12, 18]),
            (Query(tags=("three:3", "two:2"), reverse=True, limit=2), [18, 12]),
            (Query(tags=("three:3", "two:2"), reverse=True, before=at[18]), [12, 6, 0]),
            (Query(tags=("three:3",), after=at[3], limit=2), [6, 9]),
            (Query(tags=("three:3",), types=("a.b",)), [3, 9, 15, 21]),
            (Query(tags=("three:3",), stream="s"), [0, 3, 6, 9]),
            (Query(tags=("three:3",), key="k0"), [0, 12]),
            (Query(tags=("three:3", "two:2"), key="k2", reverse=True), [18, 6]),
            (Query(tags=("ä\x01:ö",), before=at[9]), [0, 4, 8]),
            (Query(tags=("two",)), []),
            (Query(tags=("two:2", "no:no")), []),
        ]
        for query, found in expected:
            same(data(await store.read(query)), found, f"records of {query}")
            same(await store.transact(lambda tx, q=query: data(tx.read(q))), found, f"the same in a transaction: {query}")  # type: ignore[misc]
        same((await store.read(Query(tags=("two:2", "three:3"), limit=1)))[0].tags, ("two:2", "three:3", "ä\x01:ö"), "its tags")


@promise(Feature.HISTORY)
async def promise_tags_go_with_their_records(make_store: MakeStore) -> None:
    """What emits and repetitions carry is found by its tags once; what is trimmed is found no more, by tag or correlation."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        sent = Envelope("one", "a", b"1", time_us=now_us(), correlation_id="root", tags=("t:1", "ä\x01:1"))
        await store.append([sent])
        await asyncio.gather(store.append([sent]), store.append([tagged(2, "t:1")]))
        emitted = Envelope("emitted", "a", b"3", time_us=now_us(), correlation_id="root", tags=("t:1",))
        for delivery in await take(store, "readers", 2):
            await answer(store, [delivery], emits=(emitted,))
        await drain(store, "readers", 1)
        same(sorted(data(await store.read(Query(tags=("t:1",))))), [1, 2, 3], "found by tag, each once")
        await store.append([envelope(4)])
        await drain(store, "readers", 1)
        same(await store.trim(keep=1), 0, "trimmed of what carries tags")
        await store.trim(keep=1, streams=True)
        same(data(await store.read(Query())), [4], "what is left")
        for query in (Query(tags=("t:1",)), Query(tags=("ä\x01:1",)), Query(correlation="root")):
            same(await store.read(query), [], f"what is found of {query} after trimming")
        expect(len(await store.transact(lambda tx: tx.append([tagged(5, "t:1")], unless=[Query(tags=("t:1",))]))) == 1, "free")


# ── what led to what ─────────────────────────────────────────────────────────────────────────────────────────────────


@promise(Feature.HISTORY)
async def promise_read_by_correlation(make_store: MakeStore) -> None:
    """What one record led to is found by its id, however much lies between, before and after an index of it is written."""
    async with Bench(make_store) as bench:
        store = await bench.open(group("later"))
        await store.append([_caused(0, None), envelope(99, "k1")])
        for start in (1, 4):
            await store.append([_caused(n, "id-0") for n in range(start, start + 3)])
            await _reads_caused(store, start + 2)
            for _ in range(0, NOTED + 1_000, 1_000):
                await store.append([envelope(99) for _ in range(1_000)])
            await _reads_caused(store, start + 2)
        same(numbers(await take(store, "later", 3)), [0, 99, 1], "a group reads them in order")
        await store.trim(keep=1, force=True)
        same(await store.read(Query(correlation="id-0")), [], "what is found of records that were trimmed")


def _caused(n: int, root: str | None) -> Envelope:
    return Envelope(f"id-{n}", "a.b", str(n).encode(), f"k{n % 2}", time_us=now_us(), correlation_id=root, causation_id=root)


async def _reads_caused(store: Store, last: int) -> None:
    everything = list(range(1, last + 1))
    third = (await store.read(Query(id="id-3")))[0].position
    expected = [
        (Query(correlation="id-0"), everything),
        (Query(correlation="id-0", reverse=True), everything[::-1]),
        (Query(correlation="id-0", limit=2), everything[:2]),
        (Query(correlation="id-0", after=third), everything[3:]),
        (Query(correlation="id-0", before=third, reverse=True), [2, 1]),
        (Query(correlation="id-0", key="k1"), everything[::2]),
        (Query(correlation="id-0", types=("nothing",)), []),
        (Query(correlation="id-9"), []),
        (Query(id="id-3"), [3]),
    ]
    for query, found in expected:
        same(data(await store.read(query)), found, f"records of {query}")
