"""A group with one worker: claim, settle, order, retries, dead letters."""

import asyncio
import contextlib
import time
from collections import Counter
from functools import partial

from trilogue.conformance.tools import (
    WITHIN_S,
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
from trilogue.errors import HandlerFailed, UnknownEvent
from trilogue.events import Delivery, Envelope, Group, Settlement, derived_id, now_us
from trilogue.ports import DeadLetter, Feature, Query, SeekTo, Store

READERS = group()
HOUR_US = 3_600_000_000


@promise()
async def promise_claim_is_bounded(make_store: MakeStore) -> None:
    """A claim lends at most `limit`, whatever waits, of what is held too; what is out is not lent again."""
    async with Bench(make_store) as bench:
        store = await bench.open(any_group(make_store))
        await store.append([envelope(n, f"k{n % 20}") for n in range(60)])
        first = await store.claim("readers", limit=7, wait_s=30)
        expect(0 < len(first) <= 7, f"1 to 7 deliveries in a claim with limit=7, got {len(first)}")
        second = await store.claim("readers", limit=7, wait_s=0.1)
        expect(len(second) <= 7, f"at most 7 deliveries in a claim with limit=7, got {len(second)}")
        same(set(numbers(first)) & set(numbers(second)), set(), "what is out and was lent again")
        await answer(store, second, "release")
        await answer(store, first, "retry")  # from here on they come from what is held
        seen: list[int] = []
        end = time.monotonic() + WITHIN_S
        while len(seen) < 60:
            expect(time.monotonic() < end, f"all 60 within {WITHIN_S:.0f} s, got {len(seen)}")
            deliveries = await store.claim("readers", limit=7, wait_s=1)
            expect(len(deliveries) <= 7, f"at most 7 deliveries in a claim with limit=7, got {len(deliveries)}")
            seen += numbers(deliveries)
            await answer(store, deliveries)
        same(sorted(seen), list(range(60)), "what was handled")


@promise(Feature.ORDER)
async def promise_a_cancelled_claim_keeps_nothing(make_store: MakeStore) -> None:
    """What a claim had lent when it was cancelled goes to the next one, whose limit may be smaller: no key is parted."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        for turns in range(30):
            await store.append([envelope(3 * turns + n, "a") for n in range(3)])
            await answer(store, await take(store, "readers", 3), "release")
            await store.append([envelope(-1 - n, f"b{n}") for n in range(3)])
            claim = asyncio.create_task(store.claim("readers", limit=9, wait_s=1))
            for _ in range(turns):
                await asyncio.sleep(0)
            claim.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answer(store, await claim, "release")
            await answer(store, await take(store, "readers", 1), "release")
            came = numbers(await drain(store, "readers", 6))
            same([n for n in came if n >= 0], list(range(3 * turns, 3 * turns + 3)), "one key, after one of it was handed back")


@promise(Feature.ORDER)
async def promise_a_key_is_out_once(make_store: MakeStore) -> None:
    """A key is out in one claim, in order; what follows of it waits, and other keys do not."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(n, "a") for n in range(3)])
        first = await take(store, "readers", 3)
        await store.append([envelope(3, "a"), envelope(4, "b"), envelope(5, "a"), envelope(6)])
        others = await take(store, "readers", 2)
        same((numbers(first), sorted(numbers(others))), ([0, 1, 2], [4, 6]), "a key in one claim, others beside it")
        await answer(store, first[:2])
        await none_left(store, "readers", "while a third record of the key is out")
        await answer(store, first[2:])
        same(numbers(await take(store, "readers", 2)), [3, 5], "what waited for its key")


@promise(Feature.COMPETE, Feature.RETRY)
async def promise_without_order_nothing_waits(make_store: MakeStore) -> None:
    """A group without order lends all records of a key at once, and each is retried for itself."""
    async with Bench(make_store) as bench:
        store = await bench.open(group(ordered=False))
        await store.append([envelope(n, "a") for n in range(4)])
        first = await take(store, "readers", 2)
        second = await take(store, "readers", 2)
        await answer(store, first[:1], "retry", after_us=HOUR_US)
        await answer(store, [*first[1:], *second])
        await store.append([envelope(4, "a")])
        same(numbers(await drain(store, "readers", 1)), [4], "what comes after a record that is retried")
        await none_left(store, "readers", "until the retry is due")


@promise(Feature.ORDER, Feature.COMPETE, Feature.RETRY)
async def promise_retry_waits(make_store: MakeStore) -> None:
    """A retry comes when due, not before, with one attempt more; `charged=False` and release charge none."""
    async with Bench(make_store) as bench:
        store = await bench.open(group("ordered"), group("any order", ordered=False))
        await store.append([envelope(1, "a")])
        for name in ("ordered", "any order"):
            due_us = now_us() + 100_000
            await answer(store, await take(store, name, 1), "retry", after_us=100_000)
            again = await take(store, name, 1)
            expect(now_us() >= due_us, "a retry is not early")
            same(again[0].attempt, 2, "attempt after a failure")
            await answer(store, again, "retry", charged=False)
            again = await take(store, name, 1)
            same(again[0].attempt, 2, "attempt after Later")
            await answer(store, again, "release")
            again = await take(store, name, 1)
            same(again[0].attempt, 2, "attempt after release")
            await answer(store, again)
            await none_left(store, name, "after it was done")


@promise(Feature.ORDER, Feature.RETRY)
async def promise_followers_wait_in_order(make_store: MakeStore) -> None:
    """What follows a key that is retried waits behind it, in order, however much it is; other keys go on."""
    many = 3_000
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(0, "bad")])
        # Long enough for everything to be published meanwhile, which takes a broker longer.
        after_us = 1_500_000 if Feature.HISTORY in store.features else 8_000_000
        await answer(store, await take(store, "readers", 1), "retry", after_us=after_us)
        for start in range(1, many, 500):
            await store.append([envelope(n, "bad") for n in range(start, start + 500)])
        await store.append([envelope(n, f"good{n}") for n in range(100)])
        others = await drain(store, "readers", 100)
        same({delivery.record.key == "bad" for delivery in others}, {False}, "only other keys while the bad one waits")
        await store.append([envelope(many + 1, "bad")])
        await _fail_once(store, await take(store, "readers", 1))
        expected = [*range(many + 1), many + 1]
        same(sorted(numbers(await drain_in_order(store, "bad", many + 2))), expected, "all of the held key")
        await until(lambda: is_idle(store, "readers"), "the group becomes idle")


async def _fail_once(store: Store, deliveries: list[Delivery]) -> None:
    same((numbers(deliveries), deliveries[0].attempt), ([0], 2), "the first of the held key")
    await answer(store, deliveries, "retry", after_us=10_000)


async def drain_in_order(store: Store, key: str, count: int) -> list[Delivery]:
    """Finish records of a key, that must come in order and one claim at a time."""
    finished: list[Delivery] = []
    while len(finished) < count:
        deliveries = await store.claim("readers", limit=100, wait_s=5)
        expect(bool(deliveries), f"more of key {key!r} after {len(finished)} of {count}")
        got = [number(delivery) for delivery in deliveries]
        last = [number(delivery) for delivery in finished[-1:]]
        same(got, sorted(got), "order within a claim")
        expect(last < got[:1], f"order between claims: {got[0]} after {last}")
        await answer(store, deliveries)
        finished += deliveries
    return finished


@promise(Feature.ORDER)
async def promise_a_failure_in_the_middle_holds_what_follows(make_store: MakeStore) -> None:
    """Of several records of a key given back together, the failed one comes again first and the others behind it."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(n, "a") for n in range(4)])
        out = await take(store, "readers", 4)
        await store.append([envelope(4, "a")])
        answers = [Settlement(out[0]), Settlement(out[1], "retry", 100_000), *(Settlement(each, "release") for each in out[2:])]
        await store.settle("readers", answers)
        await none_left(store, "readers", "while the failed record waits")
        again = await take(store, "readers", 1)
        same((number(again[0]), again[0].attempt), (1, 2), "what comes first after the wait")
        rest = again + await _more(store, again, 3)
        same([(number(d), d.attempt) for d in rest], [(1, 2), (2, 1), (3, 1), (4, 1)], "the rest, in order, uncharged")


@promise(Feature.ORDER)
async def promise_a_slow_neighbour_holds_up_nobody(make_store: MakeStore) -> None:
    """A held key goes on when it is due, although handlers of other keys take for ever and more of it has come meanwhile."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(n, f"k{n}") for n in range(3)])
        out = await take(store, "readers", 3)
        await answer(store, out[1:], "retry", after_us=100_000)
        await store.append([envelope(n, f"k{n - 10}") for n in range(10, 13)])
        await none_left(store, "readers", "before the retries are due")
        due = await take(store, "readers", 2, within_s=5)
        same(sorted(numbers(due)), [1, 2], "keys that are due beside a slow one")
        await none_left(store, "readers", "while all keys are out")


async def _more(store: Store, out: list[Delivery], count: int) -> list[Delivery]:
    """What follows, each finished before the next is taken."""
    got: list[Delivery] = []
    await answer(store, out)
    while len(got) < count:
        deliveries = await take(store, "readers", 1)
        got += deliveries
        await answer(store, deliveries)
    return got


@promise(Feature.DEAD, Feature.ORDER)
async def promise_dead_letters_keep_everything(make_store: MakeStore) -> None:
    """A dead letter has the record's raw bytes, the error, the traceback and the attempts; its key goes on."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        record = envelope(0, "a")
        raw = type(record)(record.id, record.type, b"\xff\x00 raw", "a")
        await store.append([raw, envelope(1, "a")])
        out = await take(store, "readers", 2)
        await answer(store, out[:1], "retry", error="first")
        await answer(store, out[1:], "release")
        again = await take(store, "readers", 1)
        await answer(store, again, "dead", error="boom \udcff", traceback="at line 1\x00")
        same(numbers(await drain(store, "readers", 1)), [1], "what follows a dead record")
        letter = (await store.dead("readers"))[0]
        same((letter.group, letter.record.data, letter.attempts), ("readers", b"\xff\x00 raw", 2), "dead letter")
        same((letter.error, letter.traceback, letter.parked), ("boom \\udcff", "at line 1\\x00", False), "why it died")
        same((await store.dead(None))[0].record.id, raw.id, "dead letters of all groups")
        if Feature.HISTORY in store.features:
            await raises(HandlerFailed, store.handled("readers", letter.record.position), "handled() of a dead record")
            expect(await store.handled("readers", letter.record.position + 1), "handled() of a finished record")
        expect(await is_idle(store, "readers"), "dead letters do not keep a group from being idle")


@promise(Feature.DEAD)
async def promise_dead_letters_are_given_back(make_store: MakeStore) -> None:
    """Redrive hands a dead letter to its own group again, from attempt 1; drop forgets it. No other group notices."""
    async with Bench(make_store) as bench:
        store = await bench.open(any_group(make_store), any_group(make_store, "others"))
        await store.append([envelope(n, f"k{n}") for n in range(3)])
        await drain(store, "others", 3)
        await answer(store, await take(store, "readers", 3), "dead", error="boom", traceback="at line 1")
        letters = {int(letter.record.data): letter for letter in await store.dead("readers")}
        same(sorted(letters), [0, 1, 2], "dead letters")
        said = {(each.group, each.error, each.traceback, each.attempts, each.parked) for each in letters.values()}
        same(said, {("readers", "boom", "at line 1", 1, False)}, "what they say")
        same({each.record.key for each in letters.values()}, {"k0", "k1", "k2"}, "their keys")
        same(await store.redrive("readers", [letters[1].record.position]), 1, "redriven of one")
        same([(number(d), d.attempt) for d in await drain(store, "readers", 1)], [(1, 1)], "what comes again")
        await until(partial(_dead_are, store, [0, 2]), "the other dead letters stay")
        two = next(each.record.position for each in await store.dead("readers") if each.record.data == b"2")
        same(await store.drop_dead("readers", [two]), 1, "dropped")
        same(await store.redrive("readers"), 1, "redriven of all that are left")
        same(numbers(await drain(store, "readers", 1)), [0], "what comes again")
        await until(partial(_dead_are, store, []), "no dead letter is left")
        await none_left(store, "others", "of what was given back to another group")


async def _dead_are(store: Store, expected: list[int]) -> bool:
    return sorted(numbers_of_dead(await store.dead("readers"))) == expected


@promise(Feature.DEAD, Feature.ORDER)
async def promise_redrive_in_order(make_store: MakeStore) -> None:
    """Redrive hands dead letters out again from attempt 1, in order per key: all, some, or one; drop forgets them."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(n, "ab"[n % 2]) for n in range(8)])
        await answer(store, await take(store, "readers", 8), "dead", error="boom")
        positions = {int(letter.record.data): letter.record.position for letter in await store.dead("readers")}
        same(await store.redrive("readers", [positions[4]]), 1, "redriven of one")
        same([(number(d), d.attempt) for d in await drain(store, "readers", 1)], [(4, 1)], "the one")
        same(await store.redrive("readers", [positions[5], positions[1], positions[0], 999_999]), 3, "redriven of some")
        some = numbers(await drain(store, "readers", 3))
        same(([n for n in some if n % 2], [n for n in some if not n % 2]), ([1, 5], [0]), "some, in order per key")
        same(await store.drop_dead("readers", [positions[7]]), 1, "dropped")
        same(await store.redrive("readers"), 3, "redriven of all")
        await store.append([envelope(8, "a"), envelope(9, "b")])
        everything = numbers(await drain(store, "readers", 5))
        same(([n for n in everything if n in (2, 6)], sorted(everything)), ([2, 6], [2, 3, 6, 8, 9]), "all, in order per key")
        same(await store.dead("readers"), [], "dead letters left")
        same(await store.redrive("readers"), 0, "redriven of none")


@promise(Feature.ORDER, Feature.PARK)
async def promise_parked_keys_wait(make_store: MakeStore) -> None:
    """A parked record blocks its key, and no other, until it is redriven or dropped."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(n, "ab"[n % 2]) for n in range(6)])
        out = await take(store, "readers", 6)
        await answer(store, [d for d in out if number(d) % 2])
        mine = [d for d in out if not number(d) % 2]
        await store.settle("readers", [Settlement(mine[0], "dead", park=True), *(Settlement(d, "release") for d in mine[1:])])
        await store.append([envelope(6, "a"), envelope(7, "b")])
        same(numbers(await drain(store, "readers", 1)), [7], "what goes on beside a parked key")
        await none_left(store, "readers", "of a parked key")
        await until(partial(is_idle, store, "readers"), "what waits behind a parked record does not count as work")
        expect((await store.dead("readers"))[0].parked, "the dead letter says that it is parked")
        await store.redrive("readers")
        again = await take(store, "readers", 1)
        same((number(again[0]), again[0].attempt), (0, 1), "the parked record, redriven")
        await answer(store, again, "retry")
        await answer(store, await take(store, "readers", 1), "dead", park=True)
        await none_left(store, "readers", "after it was parked again")
        await store.redrive("readers")
        again = await take(store, "readers", 1)
        same((number(again[0]), again[0].attempt), (0, 1), "the parked record, redriven after two attempts")
        await answer(store, again, "dead", park=True)
        same(await store.drop_dead("readers"), 1, "dropped")
        same(numbers(await drain(store, "readers", 3)), [2, 4, 6], "the key goes on, in order, without the dropped record")


@promise(Feature.PAUSE)
async def promise_pause_and_resume(make_store: MakeStore) -> None:
    """A paused group is lent nothing until resume(), and may finish what is out."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(0)])
        out = await take(store, "readers", 1)
        await store.pause("readers")
        await store.append([envelope(1)])
        await until(lambda: _is_paused(store), "status() tells that the group is paused")
        await _until_silent(store)
        same(await answer(store, out), [], "what is out can be settled")
        await none_left(store, "readers", "while paused")
        await store.resume("readers")
        same(numbers(await drain(store, "readers", 1)), [1], "after resume()")


@promise(Feature.PAUSE)
async def promise_a_paused_group_without_work_is_idle(make_store: MakeStore) -> None:
    """What is not for a group does not keep it from being idle, paused or not, also where it was for it once."""
    async with Bench(make_store) as bench:
        await bench.close(await bench.open(group("readers", "thing.*")))
        store = await bench.open(group("readers", "thing.made"))
        await none_left(store, "readers", "before anything was published")
        for turn in range(6):
            await store.append([envelope(n, f"k{n}", kind="thing.seen") for n in range(50)])
            await asyncio.sleep(0.004 * turn)
            await store.pause("readers")
            await until(lambda: is_idle(store, "readers"), "the paused group is idle")
            await store.resume("readers")


async def _is_paused(store: Store) -> bool:
    return (await store.status()).groups[0].paused


async def _until_silent(store: Store) -> None:
    """pause() is learned of within moments, not at once: what is lent until then is handed back."""

    async def is_silent() -> bool:
        deliveries = await store.claim("readers", limit=10, wait_s=0.1)
        await answer(store, deliveries, "release")
        return not deliveries

    await until(is_silent, "a paused group is lent nothing")


@promise(Feature.HISTORY)
async def promise_rare_types_are_found(make_store: MakeStore) -> None:
    """A group of a rare type skips what is not its own, finds what is, and is idle without reading on."""
    async with Bench(make_store) as bench:
        store = await bench.open(group("readers", "rare.*"), group("other", "common.thing"))
        await store.append([envelope(0, "a", kind="rare.thing")])
        for _ in range(25):
            await store.append([envelope(n, f"k{n % 50}", kind="common.thing") for n in range(1_000)])
        await store.append([envelope(1, "a", kind="rare.thing"), envelope(2, "a", kind="rarer.thing")])
        same(numbers(await drain(store, "readers", 2)), [0, 1], "records of the rare type")
        expect(await is_idle(store, "readers"), "the group of the rare type is idle")
        expect(not await is_idle(store, "other"), "the group of the common type is not")
        await raises(UnknownEvent, store.handled("readers", 2), "handled() of a record the group does not read")
        same((await store.status()).groups[1].lag, 0, "lag of the rare group")


@promise()
async def promise_emits_reach_other_groups(make_store: MakeStore) -> None:
    """What a settlement emits is handed to the groups that read it, once for each settlement, with its cause."""
    async with Bench(make_store) as bench:
        makers, buyers = any_group(make_store, "makers", "thing.made"), any_group(make_store, "buyers", "thing.sold")
        store = await bench.open(makers, buyers)
        await store.append([envelope(n, f"k{n}") for n in range(20)])
        for delivery in await take(store, "makers", 20):
            record = delivery.record
            sold = Envelope(
                derived_id(0, record.id, "makers", 0), "thing.sold", record.data, record.key, time_us=1, causation_id=record.id
            )
            await answer(store, [delivery], emits=[sold])
        got = await drain(store, "buyers", 20)
        same(sorted(numbers(got)), list(range(20)), "what was emitted")
        expect(all(delivery.record.causation_id for delivery in got), "each says what caused it")
        await none_left(store, "buyers", "after all of it")
        await none_left(store, "makers", "of what they made themselves")


@promise(Feature.HISTORY, Feature.REPLAY)
async def promise_emits_go_with_the_settlement(make_store: MakeStore) -> None:
    """What a settlement emits is on the log when it is settled; emitted again under the same id it adds nothing."""
    async with Bench(make_store) as bench:
        store = await bench.open(group("readers", "thing.made"))
        await store.append([envelope(0, "a")])
        out = await take(store, "readers", 1)
        emitted = envelope(7, "b", kind="thing.sold", id=derived_id(0, out[0].record.id, "readers", 0))
        await answer(store, out, emits=[emitted, envelope(8, kind="thing.sold")])
        await store.seek("readers", _beginning())
        again = await take(store, "readers", 1)
        await answer(store, again, emits=[emitted])
        sold = [int(record.data) for record in await store.read(Query(types=("thing.sold",)))]
        same(sold, [7, 8], "what was emitted")


@promise(Feature.DEAD)
async def promise_bad_emits_are_dead_letters(make_store: MakeStore) -> None:
    """A record whose handler emits what cannot be stored becomes a dead letter and harms no other."""
    async with Bench(make_store) as bench:
        store = await bench.open(any_group(make_store, "readers", "thing.made"))
        await store.append([envelope(n, f"k{n}") for n in range(3)])
        out = sorted(await take(store, "readers", 3), key=number)
        bad = envelope(9, "x" * 513, kind="thing.sold")
        worse = envelope(9, "\udcff", kind="thing.sold")
        await store.settle("readers", [Settlement(out[0]), Settlement(out[1], emits=[bad]), Settlement(out[2], emits=[worse])])
        same(sorted(numbers_of_dead(await store.dead("readers"))), numbers(out[1:]), "dead letters")
        await until(partial(is_idle, store, "readers"), "all are settled")


def numbers_of_dead(letters: list[DeadLetter]) -> list[int]:
    """The numbers of dead letters."""
    return [int(letter.record.data) for letter in letters]


def _beginning() -> SeekTo:
    return SeekTo(end="beginning")


@promise()
async def promise_groups_are_independent(make_store: MakeStore) -> None:
    """Every group gets every record; a group that is dropped is forgotten and disturbs no other."""
    async with Bench(make_store) as bench:
        ordered = Feature.ORDER in make_store().features
        late, later = (Group(name, ("#",), ordered, "now") for name in ("late", "later"))
        store = await bench.open(any_group(make_store), any_group(make_store, "second"), late)
        await store.append([envelope(n, f"k{n}") for n in range(10)])
        # Only where what was published can be read again may a group begin with what was there before it.
        first = [group("first", ordered=ordered)] if Feature.REPLAY in store.features else []
        await store.bind([later, *first])
        for name in ("readers", "second", "late", *(each.name for each in first)):
            same(sorted(numbers(await drain(store, name, 10))), list(range(10)), f"records of {name}")
        await none_left(store, "later", "for a group that starts now")
        await store.append([envelope(10)])
        await take(store, "second", 1)
        await store.drop_group("second")
        await store.append([envelope(11)])
        if Feature.PAUSE in store.features:
            await store.pause("late")
            await until(lambda: _silent(store, "late"), "a group learns of its pause although another one was dropped")
        same(sorted(numbers(await drain(store, "readers", 2))), [10, 11], "records of a group beside the one dropped")
        names = {each.name for each in (await store.status()).groups if not each.name.startswith("trilogue.")}
        same(names, {"late", "later", "readers", *(each.name for each in first)}, "groups left")


async def _silent(store: Store, name: str) -> bool:
    deliveries = await store.claim(name, limit=10, wait_s=0.05)
    await answer(store, deliveries, "release")
    return not deliveries


@promise()
async def promise_nothing_twice_without_a_fault(make_store: MakeStore) -> None:
    """Without a fault every record is handled exactly once per group, by however many tasks."""
    async with Bench(make_store) as bench:
        store = await bench.open(any_group(make_store))
        done: Counter[int] = Counter()

        async def work() -> None:
            while sum(done.values()) < 2_000:
                deliveries = await store.claim("readers", limit=16, wait_s=0.05)
                await asyncio.sleep(0)
                done.update(numbers(deliveries))
                same(await answer(store, deliveries), [], "deliveries lost")

        appends = (store.append([envelope(n, f"k{n % 30}"), envelope(n + 1)]) for n in range(0, 2_000, 2))
        await asyncio.gather(*(work() for _ in range(4)), *appends)
        same((len(done), max(done.values())), (2_000, 1), "records handled, and how often at most")
