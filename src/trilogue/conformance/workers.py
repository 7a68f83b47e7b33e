"""Several stores on one log: crashes, zombies, slots that move, restarts."""

import asyncio
from functools import partial

from trilogue.conformance.tools import (
    Bench,
    MakeStore,
    answer,
    any_group,
    drain,
    effect,
    envelope,
    expect,
    group,
    is_idle,
    none_left,
    number,
    numbers,
    promise,
    same,
    take,
    until,
)
from trilogue.events import Delivery, InTransaction, Settlement, now_us
from trilogue.ports import Db, Feature, SeekTo, Store

READERS = group()
HOUR_US = 3_600_000_000


async def _takes_over(store: Store, name: str, count: int) -> list[Delivery]:
    """Deliveries of a worker that died, once its lease has passed."""
    return await take(store, name, count)


async def _rest(store: Store, wanted: set[int]) -> list[Delivery]:
    """Claim and finish until all of these have come."""
    found: list[Delivery] = []

    async def came() -> bool:
        deliveries = await store.claim("readers", limit=1_000, wait_s=0.1)
        await answer(store, deliveries)
        found.extend(deliveries)
        return wanted <= set(numbers(found))

    await until(came, f"{sorted(wanted)} come again")
    return found


@promise(Feature.SHARED)
async def promise_a_successor_goes_on(make_store: MakeStore) -> None:
    """After an orderly close another process handles exactly what was left, what had been out among it; none of it is charged."""
    async with Bench(make_store) as bench:
        readers = any_group(make_store)
        store = await bench.open(readers)
        await store.append([envelope(n, f"k{n % 7}") for n in range(30)])
        out = await take(store, "readers", 12)
        await answer(store, out[:5])
        done = numbers(out[:5])
        await bench.close(store)
        other = await bench.open(readers)
        rest = await drain(other, "readers", 25)
        same(sorted(numbers(rest)), [n for n in range(30) if n not in done], "what the other process handles")
        await none_left(other, "readers", "after all of it")
        await until(lambda: is_idle(other, "readers"), "everything is finished")
        if readers.ordered:
            same({delivery.attempt for delivery in rest}, {1}, "attempts")
            for key in range(7):
                of_key = [number(delivery) for delivery in rest if number(delivery) % 7 == key]
                same(of_key, sorted(of_key), f"order of key k{key}")


@promise(Feature.SHARED)
async def promise_two_processes_share(make_store: MakeStore) -> None:
    """Two processes work for a group at once: every record is handled, in order per key where it is kept, none by both."""
    async with Bench(make_store) as bench:
        readers = any_group(make_store)
        one, two = await bench.open(readers), await bench.open(readers)
        await one.append([envelope(n, f"k{n % 20}") for n in range(200)])
        handled: list[int] = []

        async def work(store: Store) -> None:
            while len(handled) < 200:
                deliveries = await store.claim("readers", limit=8, wait_s=0.1)
                await asyncio.sleep(0.002)
                lost = await answer(store, deliveries)
                handled.extend(numbers(delivery for delivery in deliveries if delivery not in lost))

        async with asyncio.timeout(60):
            await asyncio.gather(work(one), work(two))
        same(sorted(handled), list(range(200)), "what both of them handled")
        for key in range(20) if readers.ordered else ():
            of_key = [n for n in handled if n % 20 == key]
            same(of_key, sorted(of_key), f"order of key k{key}")


@promise(Feature.PERSISTENT, Feature.SHARED, Feature.ORDER, Feature.RETRY)
async def promise_a_crash_loses_nothing(make_store: MakeStore) -> None:
    """After a crash in the middle of a batch, what was not settled comes again, within the lease, in order; of one log, no more.

    What was acknowledged to a broker may come again, too: the process that died may not have told it yet.
    """
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.append([envelope(n, f"k{n % 5}") for n in range(40)])
        out = await take(store, "readers", 30)
        done = {number(d) for d in out if number(d) % 5 in (0, 1) and number(d) < 20}
        await answer(store, [d for d in out if number(d) in done])
        await answer(store, [d for d in out if number(d) == 2], "retry")
        await bench.crash(store)
        other = await bench.open(READERS)
        first = await _takes_over(other, "readers", 5)
        zombie = [d for d in out if number(d) not in done and number(d) != 2]
        same(sorted(numbers(await answer(store, zombie))), sorted(numbers(zombie)), "settlements of the dead worker, refused")
        same(await answer(other, first), [], "settlements of its successor, lost")
        again = first + await _rest(other, {n for n in range(40) if n not in done} - set(numbers(first)))
        of_one_log = Feature.HISTORY in store.features
        came = numbers(again) if of_one_log else list(dict.fromkeys(n for n in numbers(again) if n not in done))
        same(sorted(came), [n for n in range(40) if n not in done], "what comes again")
        for key in range(5):
            of_key = [n for n in came if n % 5 == key]
            same(of_key, sorted(of_key), "order per key after the crash")
        same(max(d.attempt for d in again if number(d) == 2), 2, "attempts survive")
        await until(lambda: is_idle(other, "readers"), "everything is finished")


@promise(Feature.PERSISTENT, Feature.SHARED, Feature.EFFECTS)
async def promise_zombies_have_no_effect(make_store: MakeStore) -> None:
    """A worker that settles after its lease was taken changes nothing: no effect, no emit, no dead letter, no cursor."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS)
        await store.transact(lambda db: db.execute("create table seen (n integer)"))
        await store.append([envelope(n, f"k{n}") for n in range(5)])
        out = await take(store, "readers", 5)
        await bench.crash(store)
        other = await bench.open(READERS)
        again = await _takes_over(other, "readers", 5)

        def see(n: int, db: Db) -> None:
            db.execute("insert into seen values (?)", (n,))

        late: list[Settlement | InTransaction] = [
            effect(out[0], partial(see, 100)),
            Settlement(out[1], emits=[envelope(200)]),
            Settlement(out[2], "dead"),
            Settlement(out[3], "retry"),
            Settlement(out[4]),
        ]
        same(sorted(numbers(await store.settle("readers", late))), [0, 1, 2, 3, 4], "the zombie's deliveries, all lost")
        same(await other.query("select * from seen"), [], "the zombie's effects")
        same(await other.dead("readers"), [], "the zombie's dead letters")
        expect(not await is_idle(other, "readers"), "the zombie has finished nothing")
        await other.settle("readers", [effect(d, partial(see, number(d))) for d in again])
        same(sorted(await other.query("select * from seen")), [(n,) for n in range(5)], "effects, each once")
        await none_left(other, "readers", "and nothing the zombie emitted")


@promise(Feature.SHARED, Feature.ORDER)
async def promise_slots_move_in_order(make_store: MakeStore) -> None:
    """A second worker gets its share; a key moves only when nothing of it is out, and goes on in order."""
    keys, rounds = 40, 10
    async with Bench(make_store) as bench:
        one = await bench.open(READERS)
        await one.append([envelope(n, f"k{n % keys}") for n in range(keys)])
        out = await take(one, "readers", keys)
        two = await bench.open(READERS)
        for r in range(1, rounds):
            await one.append([envelope(r * keys + n, f"k{n}") for n in range(keys)])
        early = await two.claim("readers", limit=1_000, wait_s=0.3)
        same(numbers(early), [], "what the second worker gets while all keys are out at the first")
        await answer(one, out)
        histories: dict[str, list[int]] = {d.record.key or "": [number(d)] for d in out}
        by_two: set[str] = set()

        async def work(store: Store) -> None:
            while sum(map(len, histories.values())) < keys * rounds:
                deliveries = await store.claim("readers", limit=8, wait_s=0.1)
                await asyncio.sleep(0.002)
                for delivery in deliveries:
                    histories[delivery.record.key or ""].append(number(delivery))
                    if store is two:
                        by_two.add(delivery.record.key or "")
                same(await answer(store, deliveries), [], "deliveries lost while slots move")

        async with asyncio.timeout(60):
            await asyncio.gather(work(one), work(two))
        for n in range(keys):
            same(histories[f"k{n}"], [r * keys + n for r in range(rounds)], f"history of key k{n}")
        # A broker decides by itself how it shares: RabbitMQ gives an ordered group to one worker at a time.
        expect(bool(by_two) or Feature.HISTORY not in one.features, "the second worker got a share")


@promise(Feature.SHARED, Feature.ORDER)
async def promise_a_short_guest_loses_nothing(make_store: MakeStore) -> None:
    """A second worker that comes and goes before it got its share leaves nothing unread."""
    async with Bench(make_store) as bench:
        one = await bench.open(READERS)
        await one.append([envelope(n, f"k{n}") for n in range(100)])
        out = await take(one, "readers", 100)
        guest = await bench.open(READERS)
        await asyncio.sleep(0.05)
        await one.append([envelope(100 + n, f"new{n}") for n in range(100)])
        seen = await one.claim("readers", limit=1_000, wait_s=0.3)
        seen += await one.claim("readers", limit=1_000, wait_s=0.1)
        await answer(one, seen)
        await bench.close(guest)
        await one.append([envelope(200 + n, f"newer{n}") for n in range(100)])
        await answer(one, out)
        rest = await drain(one, "readers", 200 - len(seen))
        same(sorted(numbers([*seen, *rest])), list(range(100, 300)), "records after the guest had gone")
        await until(lambda: is_idle(one, "readers"), "nothing is left")


@promise(Feature.PERSISTENT, Feature.ORDER, Feature.RETRY, Feature.DEAD, Feature.PAUSE)
async def promise_restart_goes_on(make_store: MakeStore) -> None:
    """After an orderly close everything goes on at once: what was out is handed back uncharged, retries and pause remain."""
    async with Bench(make_store) as bench:
        store = await bench.open(READERS, group("paused"))
        await store.append([envelope(n, f"k{n}") for n in range(6)])
        await store.pause("paused")
        out = await take(store, "readers", 5)
        await answer(store, out[:2])
        await answer(store, out[2:3], "retry", after_us=HOUR_US)
        await answer(store, out[3:4], "dead", error="boom")
        await bench.close(store)
        store = await bench.open(READERS, group("paused"))
        again = await take(store, "readers", 2, within_s=5)
        left = sorted(set(range(6)) - set(numbers(out[:4])))
        same(sorted((number(d), d.attempt) for d in again), [(n, 1) for n in left], "what was out, and what had not been")
        await answer(store, again)
        await none_left(store, "readers", "until the retry is due")
        await none_left(store, "paused", "of a group that was paused before the restart")
        status = next(each for each in (await store.status()).groups if each.name == "readers")
        same((status.retrying, status.dead), (1, 1), "retrying, dead after the restart")
        if Feature.HISTORY in store.features:
            same(status.done, 4, "done after the restart")


@promise(Feature.SHARED, Feature.ORDER, Feature.PAUSE)
async def promise_the_newest_definition_decides(make_store: MakeStore) -> None:
    """Of programs that read different events as one group the latest is served: no other passes over what only it reads."""
    async with Bench(make_store) as bench:
        older = await bench.open(group("readers", "thing.old"))
        await older.append([envelope(n, f"k{n % 7}", kind="thing.old") for n in range(20)])
        out = await take(older, "readers", 5)
        newer = await bench.open(group("readers", "thing.old", "thing.new"))
        handled: list[Delivery] = []

        async def go_on() -> None:
            while True:
                deliveries = await older.claim("readers", limit=10, wait_s=0.1)
                lost = await answer(older, deliveries)
                handled.extend(delivery for delivery in deliveries if delivery not in lost)

        going = asyncio.create_task(go_on())
        try:
            for n in range(20, 60):
                await newer.append([envelope(n, f"k{n % 7}", kind="thing.new")])
            lost = await answer(older, out)
            done = set(numbers(out)) - set(numbers(lost)) | set(numbers(handled))
            await _rest(newer, set(range(60)) - done)
        finally:
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)
        await older.append([envelope(60, "a", kind="thing.new"), envelope(61, "a", kind="thing.old")])
        same(numbers(await drain(newer, "readers", 2)), [60, 61], "what the newer one gets, in order")
        await none_left(older, "readers", "for the older one")
        again = await bench.open(group("readers", "thing.old"))
        await bench.close(again)
        await bench.close(newer)
        await older.append([envelope(62, "a", kind="thing.old")])
        same(numbers(await drain(older, "readers", 1)), [62], "for the older one, after a program like it was started again")


@promise(Feature.PERSISTENT, Feature.HISTORY)
async def promise_restart_reads_nothing_twice(make_store: MakeStore) -> None:
    """A group of a rare type does not read again, after a restart, the log it has skipped; and skipping writes little."""
    async with Bench(make_store) as bench:
        rare = group("readers", "rare.thing")
        store = await bench.open(rare)
        for _ in range(45):
            await store.append([envelope(n, f"k{n % 97}", kind="common.thing") for n in range(1_000)])
        await store.append([envelope(1, "a", kind="rare.thing")])
        await answer(store, await take(store, "readers", 1))
        await bench.crash(store)
        cursors = await store.query("select min(cursor) from trilogue_slots") if hasattr(store, "path") else [(45_000,)]
        expect(cursors[0][0] >= 20_000, f"all cursors are far on after a crash: {cursors}")
        store = await bench.open(rare)
        await until(lambda: is_idle(store, "readers"), "the group is idle after the restart")
        await none_left(store, "readers", "after the restart")


@promise(Feature.PERSISTENT, Feature.ORDER, Feature.RETRY, Feature.REPLAY)
async def promise_order_may_change(make_store: MakeStore) -> None:
    """A group that is given order, or loses it, at a restart goes on with what is held: nothing lost, nothing twice."""
    async with Bench(make_store) as bench:
        for n, (before, after) in enumerate(((True, False), (False, True))):
            name = f"group{n}"
            store = await bench.open(group(name, ordered=before))
            if n == 0:
                await store.append([envelope(n, f"k{n % 2}") for n in range(6)])
            await answer(store, await take(store, name, 6), "retry", after_us=0)
            await bench.close(store)
            store = await bench.open(group(name, ordered=after))
            same(sorted(numbers(await drain(store, name, 6))), list(range(6)), "what was held")
            await none_left(store, name, "after all of it was done")
            await until(partial(is_idle, store, name), "everything is finished")
            await bench.close(store)


@promise(Feature.SHARED, Feature.HISTORY)
async def promise_the_other_process_is_heard(make_store: MakeStore) -> None:
    """What one process publishes, redrives, pauses or seeks, a worker in another learns of without asking."""
    async with Bench(make_store) as bench:
        worker = await bench.open(READERS)
        control = await bench.open()
        claiming = asyncio.create_task(worker.claim("readers", limit=10, wait_s=20))
        await asyncio.sleep(0.05)
        began_us = now_us()
        await control.append([envelope(0, "a")])
        out = await claiming
        expect(now_us() - began_us < 10_000_000, "a waiting claim is woken by another process")
        await answer(worker, out, "dead")
        claiming = asyncio.create_task(worker.claim("readers", limit=10, wait_s=20))
        await control.redrive("readers")
        await answer(worker, await claiming)
        claiming = asyncio.create_task(worker.claim("readers", limit=10, wait_s=20))
        await control.seek("readers", SeekTo(end="beginning"))
        same([d.replay for d in await claiming], [True], "a seek from another process")
        await control.schedule([envelope(1, "b")], now_us())
        same(numbers(await take(worker, "readers", 1)), [1], "a timer of another process")
