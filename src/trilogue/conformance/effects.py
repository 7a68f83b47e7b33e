"""SQL in the settlement: exactly once, undone alone, bounded in time."""

import asyncio
from functools import partial

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
from trilogue.errors import BadOption, TimedOut, TrilogueError, Unsupported
from trilogue.events import Delivery, InTransaction, Settlement
from trilogue.ports import Db, Feature, Query, SeekTo, Store

ENDLESS = "with recursive c(x) as (select 1 union all select x + 1 from c) "


async def _with_table(bench: Bench, *names: str) -> Store:
    store = await bench.open(*(group(name, has_effects=True) for name in names))
    await store.transact(lambda db: db.execute("create table seen (name text, n integer)"))
    return store


def _see(name: str, n: int, db: Db) -> None:
    db.execute("insert into seen values (?, ?)", (name, n))


def _execute(sql: str, db: Db) -> None:
    db.execute(sql)


def _write(name: str, delivery: Delivery) -> InTransaction:
    return effect(delivery, partial(_see, name, number(delivery)))


async def _seen(store: Store, name: str) -> list[int]:
    return [n for (n,) in await store.query("select n from seen where name = ? order by n", (name,))]


@promise(Feature.EFFECTS)
async def promise_effects_happen_with_the_settlement(make_store: MakeStore) -> None:
    """An effect is there when, and only if, its settlement is; a failing one is undone with all it wrote and charged."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench, "a")
        await store.append([envelope(n, f"k{n}") for n in range(4)])
        out = sorted(await take(store, "a", 4), key=number)

        def fail(db: Db) -> None:
            _see("a", 100, db)
            db.execute("insert into nothing values (1)")

        failing = effect(out[1], fail, after_us=20_000)
        same(await store.settle("a", [_write("a", out[0]), failing, *(_write("a", d) for d in out[2:])]), [], "lost")
        same(failing.settlements[0].verdict, "retry", "what became of a failing effect")
        same(await _seen(store, "a"), [0, 2, 3], "effects beside a failing one")
        again = await take(store, "a", 1)
        same((number(again[0]), again[0].attempt), (1, 2), "the failed one comes again")
        await store.settle("a", [_write("a", again[0])])
        same(await _seen(store, "a"), [0, 1, 2, 3], "effects at last")
        expect(await is_idle(store, "a"), "everything is settled")


@promise(Feature.EFFECTS, Feature.ORDER)
async def promise_failing_effect_holds_its_key(make_store: MakeStore) -> None:
    """What follows a failing effect of the same key, even in the same settlement, happens after it."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench, "a")
        await store.append([envelope(n, "k") for n in range(3)])
        out = await take(store, "a", 3)
        failing = effect(out[0], lambda db: db.execute("no sql"), after_us=500_000)
        await store.settle("a", [failing, _write("a", out[1]), _write("a", out[2])])
        same(await _seen(store, "a"), [], "effects behind a failing one of their key")
        await none_left(store, "a", "while the failed one waits")
        for n in range(3):
            again = await take(store, "a", 1)
            same(number(again[0]), n, "the key goes on in order")
            await store.settle("a", [_write("a", again[0])])


@promise(Feature.EFFECTS)
async def promise_one_failing_group_harms_no_other(make_store: MakeStore) -> None:
    """One group's failing or endless SQL touches no other group's settlement, no publish and no other record of its own."""
    others = [f"group{n}" for n in range(6)]
    async with Bench(make_store) as bench:
        store = await _with_table(bench, "bad", *others)
        await store.append([envelope(n, f"k{n}") for n in range(5)])
        endless = {
            1: lambda db: db.execute(ENDLESS + "insert into seen select 'bad', x from c"),
            2: lambda db: db.execute(ENDLESS + "select max(x) from c"),
            3: lambda db: db.execute("insert into seen values (1, 2, 3)"),
        }
        outs = {name: await take(store, name, 5) for name in ("bad", *others)}
        bad = [
            effect(d, endless[number(d)], limit_us=50_000, after_us=60_000_000) if number(d) in endless else _write("bad", d)
            for d in outs["bad"]
        ]
        results = await asyncio.gather(
            *(store.settle(name, [_write(name, d) for d in outs[name]]) for name in others[:3]),
            store.append([envelope(50, kind="new.kind")]),
            store.settle("bad", bad),
            store.append([envelope(51, kind="newer.kind")]),
            *(store.settle(name, [_write(name, d) for d in outs[name]]) for name in others[3:]),
            return_exceptions=True,
        )
        expect(not any(isinstance(each, Exception) for each in results), f"no error anywhere, got {results}")
        for name in others:
            same(await _seen(store, name), [0, 1, 2, 3, 4], f"effects of {name}, each once")
        same(await _seen(store, "bad"), [0, 4], "the good effects of the bad group, each once")
        if Feature.HISTORY in store.features:
            same([r.type for r in await store.read(Query(after=5))], ["new.kind", "newer.kind"], "what was published meanwhile")
        bad_status = next(each for each in (await store.status()).groups if each.name == "bad")
        same(bad_status.retrying, 3, "retrying of the bad group")
        if Feature.HISTORY in store.features:
            same((bad_status.done, bad_status.failed), (2, 3), "done, failed of the bad group")


@promise(Feature.EFFECTS)
async def promise_a_batch_is_one_effect(make_store: MakeStore) -> None:
    """Several deliveries in one effect happen together or not at all, each with its own verdict."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench, "a")
        await store.append([envelope(n, f"k{n}") for n in range(6)])
        out = sorted(await take(store, "a", 6), key=number)

        def run(db: Db) -> list[Settlement]:
            for delivery in out[:3]:
                _see("a", number(delivery), db)
            return [Settlement(out[0]), Settlement(out[1], "dead", error="alone"), Settlement(out[2])]

        def fail(db: Db) -> list[Settlement]:
            _see("a", 100, db)
            raise ValueError("all of it")

        def failed(error: Exception) -> list[Settlement]:
            return [Settlement(delivery, "dead", error=str(error)) for delivery in out[3:]]

        await store.settle("a", [InTransaction(out[:3], run, failed), InTransaction(out[3:], fail, failed)])
        same(await _seen(store, "a"), [0, 1, 2], "effects")
        letters = [(letter.record.position, letter.error) for letter in await store.dead("a")]
        same([error for _, error in letters], ["alone", "all of it", "all of it", "all of it"], "dead letters")


@promise(Feature.EFFECTS)
async def promise_the_log_is_not_the_users(make_store: MakeStore) -> None:
    """The user's SQL can neither end the transaction it runs in nor write the log's own tables; a reader cannot write."""
    forbidden = ("commit", "  Rollback", "begin", "pragma synchronous = 0", "delete from trilogue_records", "vacuum", "end")
    async with Bench(make_store) as bench:
        store = await _with_table(bench, "a")
        for sql in forbidden:
            await raises(BadOption, store.transact(partial(_execute, sql)), sql)
        same(await store.query("select 1, ?", ("x",)), [(1, "x")], "a query")
        try:
            await store.query("insert into seen values ('a', 1)")
        except Exception as error:
            expect(isinstance(error, TrilogueError) or Feature.PERSISTENT in store.features, f"refused with a sentence: {error}")
        same(await _seen(store, "a"), [], "what a query wrote")


@promise(Feature.EFFECTS)
async def promise_transact_is_all_or_nothing(make_store: MakeStore) -> None:
    """transact() happens as a whole or not at all."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench, "a")

        def half(db: Db) -> None:
            _see("a", 1, db)
            raise TimedOut("half way")

        await raises(TimedOut, store.transact(half), "an error in the middle")
        same(await _seen(store, "a"), [], "what was written before the error")
        same(await store.transact(lambda db: db.execute("select count(*) from seen")), [(0,)], "its result")


@promise(Feature.EFFECTS, Feature.REPLAY)
async def promise_replay_in_place_needs_reset(make_store: MakeStore) -> None:
    """A group that writes through `db` is replayed in place only with its reset hook, which runs in the same transaction."""
    async with Bench(make_store) as bench:
        store = await _with_table(bench, "a")
        await store.append([envelope(n) for n in range(3)])
        await store.settle("a", [_write("a", d) for d in await take(store, "a", 3)])
        await raises(Unsupported, store.seek("a", SeekTo(end="beginning")), "a replay in place without reset")

        def fail(db: Db) -> None:
            db.execute("delete from seen")
            raise TimedOut("no")

        await raises(TimedOut, store.seek("a", SeekTo(end="beginning"), reset=fail), "a reset that fails")
        same(await _seen(store, "a"), [0, 1, 2], "effects after a reset that failed")
        await none_left(store, "a", "after a reset that failed")
        await store.seek("a", SeekTo(end="beginning"), reset=partial(_execute, "delete from seen"))
        same(await _seen(store, "a"), [], "effects after the reset")
        out = await take(store, "a", 3)
        same(sorted((d.replay, number(d)) for d in out), [(True, 0), (True, 1), (True, 2)], "what is replayed")
        await store.settle("a", [_write("a", d) for d in out])
        same(await _seen(store, "a"), [0, 1, 2], "effects after the replay, each once")
        await store.append([envelope(3)])
        same([d.replay for d in await take(store, "a", 1)], [False], "what is new is no replay")


@promise(Feature.REPLAY, Feature.HISTORY)
async def promise_replay_while_running(make_store: MakeStore) -> None:
    """A replay in place takes what is out back: its settlement counts for nothing and everything comes again, in order."""
    async with Bench(make_store) as bench:
        store = await bench.open(group("a"), group("b"))
        positions = await store.append([envelope(n, "ab"[n % 2]) for n in range(10)])
        first = await take(store, "a", 10)
        await answer(store, [d for d in first if number(d) < 4])
        await answer(store, [d for d in first if number(d) == 4], "retry", after_us=60_000_000)
        await answer(store, [d for d in first if number(d) == 5], "dead")
        same(await store.seek("a", SeekTo(position=positions[2])), positions[2] - 1, "where it starts")
        late = [d for d in first if number(d) > 5]
        same(sorted(numbers(await answer(store, late))), [6, 7, 8, 9], "late settlements, lost")
        same(await store.dead("a"), [], "dead letters after a replay")
        again = await take(store, "a", 8)
        for key in "ab":
            same([number(d) for d in again if d.record.key == key], [n for n in range(2, 10) if "ab"[n % 2] == key], "in order")
        same({(d.attempt, d.replay) for d in again if number(d) < 4}, {(1, True)}, "attempt and replay")
        await answer(store, again)
        await until(lambda: is_idle(store, "a"), "the replay ends")
        await store.seek("a", SeekTo(time_us=0), emits=True)
        same({d.replay for d in await take(store, "a", 10)}, {False}, "replay with emits")
        await store.seek("b", SeekTo(end="beginning"), into="c")
        await store.bind([group("c")])
        same(sorted(numbers(await take(store, "c", 10))), list(range(10)), "a replay into a new group")
        await raises(Unsupported, store.seek("b", SeekTo(end="now"), into="c"), "into a group that exists")
        await raises(Unsupported, store.seek("b", SeekTo(position=99)), "a position that is not on the log")
        await store.seek("b", SeekTo(end="now"))
        await until(lambda: is_idle(store, "b"), "a group set to now has nothing to do")
