"""A broker with a store beside it, on a broker in memory that can be hurt: what a handler sees, and what is left behind."""

import asyncio
import contextlib
import dataclasses
import functools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_broker import FakeBroker, FakeServer
from services import postgresql_database

from trilogue import App, Db, Later, Retry, SeekTo, event
from trilogue.brokers import held as held_module
from trilogue.brokers.paired import Paired
from trilogue.errors import Conflict, LeaseLost, Rejected, Unavailable, Unsupported
from trilogue.events import KEY_CHARS, Delivery, Envelope, Group, InTransaction, Settlement, new_id, now_us, set_clock
from trilogue.ports import Feature, Place, Progress, Query
from trilogue.relay import RELAY, Relay
from trilogue.stores import open_store
from trilogue.stores.append import ID_CHARS

WITHIN_S = 20
AT_ONCE = Retry(5, "1ms..1ms")
NEVER = Retry(1)


def ran(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine, run within a minute."""

    @functools.wraps(test)
    def run(**given: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**given), 60))

    return run


@event("thing.made", key="k")
@dataclass(frozen=True)
class Made:
    k: str
    n: int


@event("thing.seen", key="k")
@dataclass(frozen=True)
class Seen:
    k: str
    n: int


@pytest.fixture(params=["kafka-like", "rabbitmq-like"])
def server(request: pytest.FixtureRequest) -> FakeServer:
    return FakeServer(positions=request.param == "kafka-like")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/x.db?lease_s=0.5"


def paired(server: FakeServer, url: str = "memory://") -> Any:
    return Paired(FakeBroker(server), open_store(url))


def app_on(server: FakeServer, url: str = "memory://") -> App:
    app = App("memory://")
    app.store = paired(server, url)
    return app


def _broker(app: App) -> Any:
    log: Any = app.store
    return log.broker


@contextlib.asynccontextmanager
async def opened(server: FakeServer, url: str, *groups: Group, work: bool = True) -> AsyncIterator[Any]:
    log = paired(server, url)
    await log.open()
    try:
        await log.bind(groups, work=work)
        yield log
    finally:
        await log.close()


def group(name: str = "g", *, ordered: bool = True, has_effects: bool = False) -> Group:
    return Group(name, ("#",), ordered, "beginning", has_effects=has_effects)


def envelope(n: int, key: str | None = "a", *, id: str | None = None) -> Envelope:
    return Envelope(id or new_id(), "thing.made", b"%d" % n, key)


def numbers(deliveries: Sequence[Delivery]) -> list[int]:
    return [int(delivery.record.data) for delivery in deliveries]


async def take(log: Any, count: int, name: str = "g") -> list[Delivery]:
    taken: list[Delivery] = []
    async with asyncio.timeout(WITHIN_S):
        while len(taken) < count:
            taken += await log.claim(name, limit=count - len(taken), wait_s=1)
    return taken


async def answer(log: Any, deliveries: Sequence[Delivery], verdict: Any = "done", **more: Any) -> list[Delivery]:
    lost: list[Delivery] = await log.settle("g", [Settlement(delivery, verdict, **more) for delivery in deliveries])
    return lost


async def rest(log: Any, name: str = "g") -> list[int]:
    """What a claim lends now, given what is on its way the time it needs."""
    found: list[int] = []
    async with asyncio.timeout(WITHIN_S):
        while deliveries := await log.claim(name, limit=100, wait_s=0.3):
            found += numbers(deliveries)
            await log.settle(name, [Settlement(delivery) for delivery in deliveries])
    return found


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while True:
            found = holds()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.01)


def in_order(seen: Sequence[tuple[str, int]]) -> bool:
    by_key = defaultdict(list)
    for key, n in seen:
        by_key[key].append(n)
    return all(found == sorted(found) for found in by_key.values())


# ── a program ────────────────────────────────────────────────────────────────────────────────────────────────────────


@ran
async def test_handlers_retries_emits_and_order(server: FakeServer, url: str) -> None:
    app, seen, got, fails = app_on(server, url), [], [], {("a", 1): 2, ("b", 3): 1}

    @app.on(group="g", retry=AT_ONCE)
    async def handle(e: Made) -> Seen:
        if fails.get((e.k, e.n)):
            fails[e.k, e.n] -= 1
            raise ValueError("not yet")
        seen.append((e.k, e.n))
        return Seen(e.k, e.n)

    @app.on(group="h")
    async def follow(e: Seen) -> None:
        got.append((e.k, e.n))

    async with app.running():
        for n in range(10):
            for key in "abc":
                await app.publish(Made(key, n))
        await app.wait_idle(timeout=f"{WITHIN_S}s")
        assert (len(seen), in_order(seen)) == (30, True)
        assert (len(got), in_order(got)) == (30, True)
        status = {each.name: each for each in (await app.store.status()).groups}
        assert (status["g"].done, status["g"].failed, status["g"].lag) == (30, 3, 0)
        assert await app.store.query("select count(*) from trilogue_held") == [(0,)]


@ran
async def test_what_goes_well_costs_the_store_nothing(server: FakeServer) -> None:
    app, seen = app_on(server), []

    @app.on(group="g")
    async def handle(e: Made) -> Seen | None:
        seen.append(e.n)
        return Seen(e.k, e.n) if e.n % 2 else None

    async with app.running():
        await app.wait_idle(timeout="10s")
        changes = "select total_changes()"
        before = await app.store.query(changes)
        for n in range(100):
            await app.publish(Made("a", n))
        await app.wait_idle(timeout="10s")
        assert len(seen) == 100
        # A report for work and a renewal of the lease may fall into it.
        assert (await app.store.query(changes))[0][0] - before[0][0] < 50


@ran
async def test_effects_happen_once_whatever_is_delivered_again(server: FakeServer, url: str) -> None:
    app = app_on(server, url)

    @app.on(group="g", retry=AT_ONCE)
    def handle(e: Made, db: Any) -> Seen:
        db.execute("insert into seen values (?, ?)", (e.k, e.n))
        return Seen(e.k, e.n)

    async with app:
        await app.store.transact(lambda db: db.execute("create table seen (k text, n integer)"))
        async with app.running():
            for n in range(40):
                await app.publish(Made("abcd"[n % 4], n))
                if n % 10 == 5:
                    await _broker(app).reconnect()
            await app.wait_idle(timeout=f"{WITHIN_S}s")
            assert await app.db("select k, n from seen order by n") == [("abcd"[n % 4], n) for n in range(40)]
            relayed = [r for lane in server.log for r in lane if r.type == "thing.seen"]
            assert sorted({r.id for r in relayed}) == sorted(r.id for r in relayed)
            assert len(relayed) == 40


@ran
async def test_a_batch_with_effects_of_which_a_part_has_happened(url: str) -> None:
    """A broker without places delivers again: what has happened is recognised one by one, the rest is handled."""
    server = FakeServer(positions=False, lanes=1)
    async with opened(server, url, group(has_effects=True)) as log:
        await log.transact(lambda db: db.execute("create table seen (n integer)"))
        await log.publish([envelope(n) for n in range(3)])
        out = await take(log, 3)

        def together(deliveries: Sequence[Delivery]) -> InTransaction:
            def run(db: Any) -> list[Settlement]:
                db.executemany("insert into seen values (?)", [(n,) for n in numbers(deliveries)])
                return [Settlement(delivery) for delivery in deliveries]

            return InTransaction(deliveries, run, lambda _: [Settlement(delivery, "dead") for delivery in deliveries])

        taken = await log.store.inbox.settle("g", [together(out[:2])], seen=True)  # committed, and not acknowledged
        assert len(taken.settlements) == 2
        await log.broker.reconnect()
        assert len(await log.settle("g", [together(out)])) == 3
        again = await take(log, 3)
        work = together(again)
        await log.settle("g", [work])
        assert [settlement.verdict for settlement in work.settlements] == ["done", "done", "release"]
        last = await take(log, 1)
        await log.settle("g", [together(last)])
        assert await log.query("select n from seen order by n") == [(0,), (1,), (2,)]
        await until(lambda: log.idle(["g"]))


@ran
async def test_decisions_timers_and_transactions_reach_handlers_on_the_broker(server: FakeServer, url: str) -> None:
    app, seen = app_on(server, url), []

    @app.on(group="g")
    async def handle(e: Made) -> None:
        seen.append(e.n)

    async with app.running():
        await app.publish(Made("later", 9), delay="10ms")
        stored = [app.envelope(Made("s", n)) for n in range(3)]
        await app.store.append(stored, expected=("s", 0))
        with pytest.raises(Conflict):
            await app.store.append([app.envelope(Made("s", 4))], expected=("s", 0))
        await app.store.transact(lambda tx: tx.append([app.envelope(Made("t", 3))]))
        await until(lambda: len(seen) == 5)
        assert sorted(seen) == [0, 1, 2, 3, 9]
        assert [n for n in seen if n < 3] == [0, 1, 2]
        assert [r.version for r in await app.store.read(Query(stream="s"))] == [1, 2, 3]
        await app.wait_idle(timeout="10s")


@ran
async def test_projections_fold_the_stores_log(url: str) -> None:
    app = app_on(FakeServer(), url)

    @app.projection(tables={"counts": "k text, n integer"})
    def counts(e: Made, db: Db) -> None:
        db.execute("insert into {counts} values (?, ?)", (e.k, e.n))

    async with app.running():
        await app.store.append([app.envelope(Made("s", n)) for n in range(3)], expected=("s", 0))
        await app.wait_idle(timeout="10s")
        assert await app.db("select n from counts order by n") == [(0,), (1,), (2,)]


# ── failed records ───────────────────────────────────────────────────────────────────────────────────────────────────


@ran
async def test_what_a_projection_does_not_see_is_said(server: FakeServer, url: str, caplog: pytest.LogCaptureFixture) -> None:
    folding = Group("fold", ("thing.*",), start="existing")
    async with opened(server, url, group()) as log:
        await log.store.bind([dataclasses.replace(folding, start="now")], work=False)
        await log.bind([folding], work=False)
        await log.append([envelope(0)], expected=("s", 0))
        await until(lambda: log.idle([RELAY]))
        assert "reads the log of the store" not in caplog.text
        for n in range(3):
            await log.publish([envelope(n), Envelope(new_id(), "other.made", b"1")])
    assert caplog.text.count("event 'thing.made' is published to") == 1
    assert "other.made" not in caplog.text


@ran
async def test_a_parked_key_waits_and_others_go_on(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(n, "ab"[n % 2]) for n in range(6)])
        out = await take(log, 6)
        await answer(log, [d for d in out if d.record.key == "b"])
        first, *behind = [d for d in out if d.record.key == "a"]
        await log.settle("g", [Settlement(first, "dead", park=True, error="boom"), *(Settlement(d, "release") for d in behind)])
        await log.publish([envelope(6, "a"), envelope(7, "b")])
        assert await rest(log) == [7]
        (letter,) = await log.dead("g")
        assert (letter.parked, letter.error, letter.record.data, letter.attempts) == (True, "boom", b"0", 1)
        assert await log.redrive("g", [letter.record.position]) == 1
        assert await rest(log) == [0, 2, 4, 6]
        await until(lambda: log.idle(["g"]))


@ran
async def test_a_dropped_parked_record_lets_its_key_go_on(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(n) for n in range(2)])
        await answer(log, await take(log, 1), "dead", park=True)
        assert await rest(log) == []
        assert await log.drop_dead("g") == 1
        assert await rest(log) == [1]
        await log.publish([envelope(2)])
        assert await rest(log) == [2]


@ran
async def test_later_is_not_charged(server: FakeServer, url: str) -> None:
    app, attempts = app_on(server, url), []

    @app.on(group="g")
    async def handle(e: Made, ctx: Any) -> None:
        attempts.append(ctx.attempt)
        if len(attempts) < 3:
            raise Later("1ms")

    async with app.running():
        await app.publish(Made("a", 1))
        await app.wait_idle(timeout="10s")
    assert attempts == [1, 1, 1]


@ran
async def test_ten_thousand_behind_a_bad_key_hold_up_nobody(server: FakeServer, url: str) -> None:
    app, seen = app_on(server, url), []

    @app.on(group="g", retry=NEVER, on_dead="park")
    async def handle(e: Made) -> None:
        if (e.k, e.n) == ("bad", 0):
            raise ValueError("never")
        seen.append((e.k, e.n))

    async with app.running():
        for start in range(0, 10_000, 1_000):
            await app.publish_many([Made("bad", n) for n in range(start, start + 1_000)])
        await app.publish_many([Made(f"good{n}", n) for n in range(100)])
        await app.wait_idle(timeout=f"{WITHIN_S}s")
        assert len(seen) == 100
        status = next(each for each in (await app.store.status()).groups if each.name == "g")
        assert (status.parked, status.waiting) == (1, 9_999)
        assert await app.store.drop_dead("g") == 1
        await app.wait_idle(timeout=f"{WITHIN_S}s")
        assert (len(seen), in_order(seen)) == (10_099, True)


@ran
@pytest.mark.parametrize("some", [None, [1]])
async def test_what_was_dropped_and_is_sent_again_can_fail_again(server: FakeServer, url: str, some: list[int] | None) -> None:
    async with opened(server, url, group()) as log:
        for _ in range(2):
            await log.publish([envelope(0, id="one")])
            await answer(log, await take(log, 1), "dead", error="boom")
            (letter,) = await log.dead("g")
            assert letter.record.id == "one"
            assert await log.drop_dead("g", some and [letter.record.position]) == 1


@ran
async def test_what_ends_while_its_reader_stands_aside_is_done(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as older:
        await older.publish([envelope(n, f"k{n}") for n in range(10)])
        out = await take(older, 5)
        newer = open_store(url)
        await newer.open()
        await newer.bind([dataclasses.replace(group(ordered=False), inbox=True)])
        await until(lambda: older._readers["g"]._aside is not None)
        assert await answer(older, out) == []
        await until(lambda: older._readers["g"].is_idle)
        await newer.bind([dataclasses.replace(group(), inbox=True)])
        assert sorted(await rest(older) + numbers(out)) == list(range(10))
        await newer.close()


@ran
async def test_a_program_the_broker_refuses_takes_nothing_over(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as older:
        newer = paired(server, url)
        await newer.open()

        async def refuse(*_: Any, **__: Any) -> None:
            raise Unavailable("its queue is another one")

        newer.broker.bind = refuse
        with pytest.raises(Unavailable):
            await newer.bind([group(ordered=False)])
        await newer.close()
        await older.publish([envelope(0)])
        assert await rest(older) == [0]


@ran
async def test_dead_letters_say_where_they_came_from(url: str) -> None:
    async with opened(FakeServer(lanes=1), url, group()) as log:
        await log.publish([envelope(n) for n in range(3)])
        out = await take(log, 3)
        await answer(log, out[:2])
        await answer(log, out[2:], "dead", error="boom", traceback="line 1")
        (letter,) = await log.dead("g")
        record = letter.record
        assert (record.position, record.topic, record.partition, record.extensions) == (1, "events", 0, {"offset": 2})
        assert (record.id, record.data, letter.error, letter.traceback) == (out[2].record.id, b"2", "boom", "line 1")
        assert [r.id for r in await log.held()] == [record.id]


@ran
async def test_what_a_handler_emits_and_no_log_takes_is_a_dead_letter(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(0)])
        out = await take(log, 1)
        huge = Envelope(new_id(), "x.y", b"x" * (1 << 21))
        await log.settle("g", [Settlement(out[0], emits=[huge])])
        (letter,) = await log.dead("g")
        assert "what its handler published is refused" in letter.error
        assert await rest(log) == []


# ── order, whatever happens ──────────────────────────────────────────────────────────────────────────────────────────


@ran
async def test_a_key_is_out_in_one_claim(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(0), envelope(1, "b"), envelope(2)])
        one = await take(log, 1)
        assert numbers(one) == [0]
        two = await log.claim("g", limit=10, wait_s=0.5)
        assert numbers(two) == [1]
        assert await log.claim("g", limit=10, wait_s=0.1) == []
        await answer(log, one)
        assert numbers(await take(log, 1)) == [2]


@ran
async def test_what_was_lent_behind_a_failure_follows_it(server: FakeServer, url: str) -> None:
    """Also if it is answered later, when the failed one may already have been handled again."""
    async with opened(server, url, group()) as log:
        await log.publish([envelope(n) for n in range(4)])
        out = await take(log, 3)
        await answer(log, out[:1], "retry")
        await answer(log, [out[2]], "release")
        await answer(log, [out[1]], "release")
        assert await rest(log) == [0, 1, 2, 3]


@ran
async def test_a_lane_lost_while_a_handler_runs(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(n) for n in range(3)])
        out = await take(log, 1)
        await log.broker.reconnect()
        assert await log.claim("g", limit=10, wait_s=0.2) == [], "the first of the key is still out here"
        assert await answer(log, out) == out
        assert await rest(log) == [0, 1, 2]


@ran
async def test_a_failure_under_a_lost_lane_leaves_nothing(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(0)])
        out = await take(log, 1)
        await log.broker.reconnect()
        assert await answer(log, out, "dead", park=True) == out
        assert await log.dead("g") == []
        assert await rest(log) == [0]


@ran
async def test_held_and_not_acknowledged_is_held_once(server: FakeServer, url: str) -> None:
    """The worker dies between the commit and the acknowledgement: whoever gets the record then puts it nowhere twice."""
    async with opened(server, url, group()) as log:
        await log.publish([envelope(n) for n in range(2)])
        out = await take(log, 1)
        await log.store.inbox.settle("g", [Settlement(out[0], "retry", 300_000)])  # and dies
        async with opened(server, url, group()) as other:
            await log.leave()
            assert await rest(other) == [0, 1]
            await until(lambda: other.idle(["g"]))


@ran
async def test_held_worked_off_and_never_acknowledged_does_not_come_behind_the_others(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(n) for n in range(3)])
        out = await take(log, 3)
        inbox = log.store.inbox
        await inbox.settle("g", [Settlement(out[0], "retry")])
        await inbox.divert("g", out[1:])  # and dies, before any of it is acknowledged
        async with opened(server, url, group()) as other:
            await log.leave()
            (first,) = await take(other, 1)
            assert numbers([first]) == [0]
            await answer(other, [first])
            assert (await inbox.divert("g", [out[0]])).held == [True]
            assert await rest(other) == [1, 2]


@ran
async def test_keys_and_ids_of_others_that_no_store_takes_are_made_to_fit(server: FakeServer) -> None:
    with postgresql_database() as url:
        async with opened(server, url, group()) as log:
            for key, id in (("a\x00b", "1"), ("c", "i\x002"), ("d" * 9_000, "3"), ("e", "4" * 9_000)):
                server.store(Envelope(id, "thing.made", b"0", key))
            await answer(log, await take(log, 4), "dead", error="boom")
            records = {letter.record.id[:3]: letter.record for letter in await log.dead("g")}
    assert (records["1"].key, records["i\\x"].id) == ("a\\x00b", "i\\x002")
    assert len(records["444"].id) == ID_CHARS
    assert len(records["3"].key or "") == KEY_CHARS


@ran
async def test_keys_that_are_held_no_more_are_forgotten(server: FakeServer, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_module, "HELD_KEYS", 10)
    async with opened(server, url, group()) as log:
        held = log._readers["g"]._gate
        for start in range(0, 100, 20):
            await log.publish([envelope(n, f"k{n}") for n in range(start, start + 20)])
            await answer(log, await take(log, 20), "retry", after_us=0)
            await answer(log, await take(log, 20))
        await until(lambda: log.idle(["g"]))
        await log._readers["g"].look()
        assert len(held.held) <= 40


@ran
async def test_keys_another_process_holds_are_not_overtaken(server: FakeServer, url: str) -> None:
    """The process that gets a lane learns what its former owner had put into the store."""
    async with opened(server, url, group()) as one, opened(server, url, group(), work=False) as two:
        await one.publish([envelope(0)])
        await answer(one, await take(one, 1), "dead", park=True)
        await two.bind([group()])
        await one.leave()
        await two.publish([envelope(1), envelope(2, "b")])
        assert await rest(two) == [2]
        await answer(two, [], "done")
        await two.redrive("g")
        assert await rest(two) == [0, 1]


@ran
async def test_a_key_held_after_this_process_has_looked(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as one:
        await one.publish([envelope(0, "z")])
        assert await rest(one) == [0]
        async with opened(server, url, group()) as two:
            await one.leave()
            await two.publish([envelope(1)])
            await answer(two, await take(two, 1), "dead", park=True)
            await two.leave()
            await one.bind([group()])
            await one.publish([envelope(2), envelope(3, "z")])
            assert await rest(one) == [3], "what was held meanwhile is not overtaken"


@ran
async def test_held_records_are_worked_off_by_another_process(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as one:
        await one.publish([envelope(n) for n in range(5)])
        out = await take(one, 5)
        await one.settle("g", [Settlement(out[0], "retry", 200_000), *(Settlement(d, "release") for d in out[1:])])
        async with opened(server, url, group()) as two:
            await one.leave()
            assert await rest(two) == [0, 1, 2, 3, 4]


@ran
async def test_workers_share_and_keep_the_order(server: FakeServer, url: str) -> None:
    seen: list[tuple[str, int]] = []
    fails = {(f"k{n}", n) for n in range(0, 20, 3)}

    async def work(log: Any) -> None:
        while len(seen) < 400:
            deliveries = await log.claim("g", limit=7, wait_s=0.1)
            answers, held = [], set()
            for delivery in deliveries:
                at = (str(delivery.record.key), int(delivery.record.data))
                if at[0] in held:
                    answers.append(Settlement(delivery, "release"))
                elif at in fails:
                    fails.discard(at)
                    held.add(at[0])
                    answers.append(Settlement(delivery, "retry", 5_000))
                else:
                    seen.append(at)
                    answers.append(Settlement(delivery))
            await log.settle("g", answers)

    async with opened(server, url, group()) as one, opened(server, url, group()) as two:
        for n in range(20):
            await one.publish([envelope(n, f"k{k}") for k in range(20)])
        async with asyncio.timeout(WITHIN_S):
            await asyncio.gather(work(one), work(two))
        assert sorted(seen) == sorted((f"k{k}", n) for k in range(20) for n in range(20))
        assert in_order(seen)


@ran
async def test_cancelling_a_claim_loses_nothing(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        found: list[int] = []
        for n in range(30):
            claim = asyncio.create_task(log.claim("g", limit=5, wait_s=5))
            await log.publish([envelope(n)])
            for _ in range(n % 5):
                await asyncio.sleep(0)
            claim.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                deliveries = await claim
                found += numbers(deliveries)
                await answer(log, deliveries)
        assert found + await rest(log) == list(range(30))


@ran
async def test_leaving_hands_back_what_is_out(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(n) for n in range(4)])
        out = await take(log, 2)
        await answer(log, out[:1])
        await answer(log, out[1:], "release")
        await log.leave()
        async with opened(server, url, group()) as other:
            again = await take(other, 3)
            assert [(int(d.record.data), d.attempt) for d in again] == [(1, 1), (2, 1), (3, 1)]


@ran
async def test_a_failure_that_cannot_be_kept_is_not_acknowledged(server: FakeServer, url: str) -> None:
    """The store is away when a record fails: it stays the broker's, and is handled again before what follows."""
    async with opened(server, url, group()) as log:
        await log.publish([envelope(n) for n in range(2)])
        out = await take(log, 1)
        settle, seen = log.store.inbox.settle, []

        async def away(*_: Any, **__: Any) -> Any:
            seen.append(log.broker.acknowledgements)
            raise Unavailable("the store is away")

        log.store.inbox.settle = away
        with pytest.raises(Unavailable):
            await answer(log, out, "retry")
        log.store.inbox.settle = settle
        assert seen == [0]
        assert await rest(log) == [0, 1]


# ── publishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@ran
async def test_emits_are_there_before_the_record_is_acknowledged(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(0)])
        out = await take(log, 1)
        server.blocked = True
        settling = asyncio.ensure_future(log.settle("g", [Settlement(out[0], emits=[envelope(1, "b")])]))
        await asyncio.sleep(0.2)
        assert (settling.done(), log.broker.acknowledgements) == (False, 0)
        server.blocked = False
        assert await settling == []
        assert (log.broker.acknowledgements, await rest(log)) == (1, [1])


@ran
async def test_emits_of_a_key_keep_their_order_when_publishing_fails(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(n) for n in range(3)])
        out = await take(log, 3)
        server.trouble = ["", "unavailable", ""]
        await log.settle("g", [Settlement(d, emits=[envelope(10 + n, "e", id=f"e{n}")]) for n, d in enumerate(out)])
        stored = [int(r.data) for lane in server.log for r in lane if r.key == "e"]
        assert list(dict.fromkeys(reversed(stored))) == [12, 11, 10], "the last of each are in order"
        assert stored.index(10) < stored.index(11)


@ran
async def test_a_lost_confirm_is_published_again_with_the_same_id(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(0)])
        out = await take(log, 1)
        server.trouble = ["unknown"]
        await log.settle("g", [Settlement(out[0], emits=[envelope(1, "b", id="once")])])
        assert [r.id for lane in server.log for r in lane if r.key == "b"] == ["once", "once"]


@ran
async def test_what_is_refused_is_not_sent(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        huge = Envelope(new_id(), "x.y", b"x" * (1 << 21))
        outcomes = await log.publish([envelope(0), huge, envelope(1)])
        assert [isinstance(outcome, Rejected) for outcome in outcomes] == [False, True, False]
        with pytest.raises(Rejected):
            await log.append([envelope(2), huge])
        assert await rest(log) == [0, 1]


# ── the relay ────────────────────────────────────────────────────────────────────────────────────────────────────────


@ran
async def test_the_relay_keeps_the_order_over_failures_and_restarts(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        server.blocked = True
        for n in range(20):
            await log.append([envelope(n)], expected=("a", n))
        await asyncio.sleep(0.1)
        assert await log.query("select count(*) from trilogue_held") == [(0,)], "a broker that is away costs no rows"
        await log.leave()
    async with opened(server, url, group()) as log:
        server.blocked = False
        server.trouble = ["", "unknown", *["unavailable"] * 18]  # the connection breaks
        await until(lambda: log.idle([RELAY]) if server.published >= 20 else False)
    stored = [int(r.data) for lane in server.log for r in lane]
    assert [n for k, n in enumerate(stored) if n not in stored[:k]] == list(range(20)), "first deliveries are in order"


@ran
async def test_several_processes_relay_in_order(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as one, opened(server, url, group()) as two:
        for n in range(60):
            await (one, two)[n % 2].append([envelope(n, f"k{n % 5}")], expected=(f"k{n % 5}", n // 5))
        await until(lambda: one.idle([RELAY]) if server.published >= 60 else False)
    stored = [(str(r.key), int(r.data)) for lane in server.log for r in lane]
    assert len(stored) == 60
    assert in_order(stored)


@ran
async def test_two_relays_in_opposite_directions_end() -> None:
    one, two = open_store("memory://"), open_store("memory://")
    await one.open()
    await two.open()
    try:
        await one.bind([group("to-two")])
        await two.bind([group("to-one")])
        there = Relay(one, "to-two", two.publish, name="one", back="two")
        back = Relay(two, "to-one", one.publish, name="two", back="one")
        await one.append([envelope(1)])
        await two.append([envelope(2)])
        for _ in range(3):
            await there.once(wait_s=0.05)
            await back.once(wait_s=0.05)
        assert sorted(r.data for r in await one.read(Query())) == [b"1", b"2"]
        assert sorted(r.data for r in await two.read(Query())) == [b"1", b"2"]
    finally:
        await one.close()
        await two.close()


# ── moving groups ────────────────────────────────────────────────────────────────────────────────────────────────────


@ran
async def test_pause_holds_for_everybody_and_over_restarts(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as one, opened(server, url, group(), work=False) as two:
        await two.pause("g")
        await until(lambda: _paused(one))
        await one.publish([envelope(n) for n in range(3)])
        assert await rest(one) == []
        await one.leave()
        await one.bind([group()])
        assert await rest(one) == []
        await two.resume("g")
        await until(lambda: _lends(one))


async def _paused(log: Any) -> bool:
    return bool(log._readers["g"]._held.is_paused)


async def _lends(log: Any) -> bool:
    return await rest(log) == [0, 1, 2]


@ran
async def test_replay_in_place_publishes_nothing_and_new_records_do(url: str) -> None:
    server = FakeServer(lanes=2)
    app, seen = app_on(server, url), []

    @app.on(group="g", retry=AT_ONCE)
    async def handle(e: Made, ctx: Any) -> Seen:
        seen.append((e.k, e.n, ctx.replay))
        if ctx.replay and ctx.attempt == 1 and e.n == 1:
            raise ValueError("again")
        return Seen(e.k, e.n)

    async with app.running():
        for n in range(3):
            await app.publish(Made("a", n))
        await app.wait_idle(timeout="10s")
        await app.replay("g", SeekTo(end="beginning"))
        await until(lambda: len(seen) >= 7)
        await app.wait_idle(timeout="10s")
        await app.publish(Made("a", 3))
        await app.wait_idle(timeout="10s")
        assert [(n, replay) for _, n, replay in seen] == [
            *[(0, False), (1, False), (2, False)],
            *[(0, True), (1, True), (1, True), (2, True)],
            (3, False),
        ]
        emitted = [r for lane in server.log for r in lane if r.type == "thing.seen"]
        assert len(emitted) == 4


@ran
async def test_replay_of_effects_needs_a_reset_and_applies_each_once(url: str) -> None:
    server = FakeServer(lanes=1)
    async with opened(server, url, group(has_effects=True)) as log:
        await log.transact(lambda db: db.execute("create table seen (n integer)"))
        await log.publish([envelope(n) for n in range(3)])

        def effect(delivery: Delivery) -> InTransaction:
            def run(db: Any) -> list[Settlement]:
                db.execute("insert into seen values (?)", (int(delivery.record.data),))
                return [Settlement(delivery)]

            return InTransaction([delivery], run, lambda _: [Settlement(delivery, "dead")])

        out = await take(log, 3)
        await log.settle("g", [effect(d) for d in out[:2]])
        with pytest.raises(Unsupported, match="apply every effect twice"):
            await log.seek("g", SeekTo(end="beginning"))
        await log.seek("g", SeekTo(end="beginning"), reset=lambda db: db.execute("delete from seen"))
        assert await log.settle("g", [effect(out[2])]) == [out[2]], "what was out before the replay happens no more"
        again = await take(log, 3)
        await log.settle("g", [effect(d) for d in again])
        assert await log.query("select n from seen order by n") == [(0,), (1,), (2,)]


@ran
async def test_a_group_whose_place_the_broker_has_forgotten_leaves_nothing_out(url: str) -> None:
    server = FakeServer()
    late = Group("g", ("#",), True, "now")
    async with opened(server, url, late) as log:
        await log.publish([envelope(0)])
        await answer(log, await take(log, 1))
    async with opened(server, url, work=False) as log:
        await log.publish([envelope(1)])
    server.groups.clear()
    async with opened(server, url, late, Group("new", ("#",), True, "now")) as log:
        assert await rest(log) == [0, 1]
        assert await rest(log, "new") == []


@ran
async def test_a_refused_replay_forgets_nothing(url: str) -> None:
    server = FakeServer(lanes=1)
    async with opened(server, url, group()) as worker, opened(server, url, group(), work=False) as other:
        await worker.publish([envelope(n) for n in range(2)])
        await answer(worker, await take(worker, 2), "dead", error="boom")
        with pytest.raises(Unsupported, match="members elsewhere"):
            await other.seek("g", SeekTo(end="beginning"), emits=True, reset=lambda db: db.execute("no sql"))
        assert len(await other.dead("g")) == 2


@ran
async def test_without_positions_nothing_is_replayed(url: str) -> None:
    async with opened(FakeServer(positions=False), url, group()) as log:
        assert Feature.REPLAY not in log.features
        with pytest.raises(Unsupported, match="kafka://"):
            await log.seek("g", SeekTo(end="beginning"))


@ran
async def test_places_of_effects_outlive_the_brokers_own(url: str) -> None:
    """What was committed and never acknowledged is not delivered again: the store knows the place."""
    server = FakeServer(lanes=1)
    async with opened(server, url, group(has_effects=True)) as log:
        await log.publish([envelope(n) for n in range(3)])
        out = await take(log, 2)
        place = log._readers["g"]._places_after(out[1:])
        work = InTransaction(out[1:], lambda db: [Settlement(out[1])], lambda _: [])
        await log.store.inbox.settle("g", [work], places=lambda _: place)  # and dies
        await log.broker.reconnect()
        assert await log.settle("g", [Settlement(out[0])]) == out[:1]
        assert await answer(log, out[1:]) == out[1:]
        assert await rest(log) == [0, 2]


@ran
async def test_who_has_lost_a_lane_writes_no_effect(url: str) -> None:
    """Frozen while the lane went to somebody else, and not told yet: the store refuses, and nothing of it happened."""
    async with opened(FakeServer(lanes=1), url, group(has_effects=True)) as log:
        await log.transact(lambda db: db.execute("create table seen (n integer)"))
        await log.publish([envelope(0)])
        out = await take(log, 1)
        inbox, lane = log.store.inbox, "events[0]"
        place = log._readers["g"]._places_after(out)
        assert (await inbox.assigned("g", lane)).progress is None

        def run(db: Any) -> list[Settlement]:
            db.execute("insert into seen values (1)")
            return [Settlement(out[0])]

        work = InTransaction(out, run, lambda _: [])
        with pytest.raises(LeaseLost):
            await inbox.settle("g", [work], places=lambda _: place)
        assert await log.query("select n from seen") == []


@ran
async def test_the_later_assignment_wins_whatever_the_clocks_say(url: str) -> None:
    """A lane goes to and fro between two processes, one of them an hour behind: each can settle once it has come, none after."""
    server = FakeServer(lanes=1)
    async with opened(server, url, group(has_effects=True)) as one, opened(server, url) as two:
        for log in (two, one) * 2:
            epoch = (await log.store.inbox.assigned("g", "events[0]")).epoch
            behind = one if log is two else two
            set_clock(now_us() - 3_600_000_000 if behind is two else None)
            later = (await behind.store.inbox.assigned("g", "events[0]")).epoch
            assert later > epoch
            places = [Place(Progress("events[0]", 0), each) for each in (epoch, later)]
            with pytest.raises(LeaseLost):
                await log.store.inbox.settle("g", [], places=lambda _, place=places[0]: [place])
            await behind.store.inbox.settle("g", [], places=lambda _, place=places[1]: [place])
    set_clock(None)


@ran
async def test_who_is_refused_and_still_has_its_lane_is_assigned_it_anew(url: str) -> None:
    """Somebody who had the lane before asked late: the store refuses the one whom the broker gives it, until it asks again."""
    async with opened(FakeServer(lanes=1), url, group(has_effects=True)) as log:
        await log.publish([envelope(0)])
        out = await take(log, 1)
        await log.store.inbox.assigned("g", "events[0]")  # by the one who was slow
        work = InTransaction(out, lambda _: [Settlement(out[0])], lambda _: [])
        assert await log.settle("g", [work]) == out
        again = await take(log, 1)
        assert await log.settle("g", [InTransaction(again, lambda _: [Settlement(again[0])], lambda _: [])]) == []
        await until(lambda: log.idle(["g"]))


@ran
async def test_a_group_is_dropped_on_both_sides(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(0)])
        await answer(log, await take(log, 1), "dead")
        await log.drop_group("g")
        assert (await log.broker.groups(), await log.dead(None)) == ([], [])


# ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@ran
async def test_a_group_left_behind_is_an_orphan(server: FakeServer, url: str) -> None:
    async with opened(server, url, group("left"), group("kept")) as log:
        await log.leave()
        await log.publish([envelope(0)])
        assert await log.orphans("trilogue", ["kept"]) == ["left"]


@ran
async def test_status_counts_both_sides(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(n, f"k{n}") for n in range(6)])
        out = await take(log, 6)
        await answer(log, out[:2])
        await answer(log, out[2:3], "retry", after_us=60_000_000)
        await answer(log, out[3:4], "dead")
        status = next(each for each in (await log.status()).groups if each.name == "g")
        assert (status.lag, status.in_flight, status.retrying, status.dead, status.done) == (3, 2, 1, 1, 2)


@ran
async def test_positions_of_a_brokers_group_are_refused(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        for asking in (log.handled("g", 1), log.finished_to("g")):
            with pytest.raises(Unsupported, match="no one position"):
                await asking


@ran
async def test_a_group_does_not_change_its_log_in_silence(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()):
        pass
    store = open_store(url)
    await store.open()
    with pytest.raises(Unsupported, match="groups drop g"):
        await store.bind([group()])
    await store.close()


@ran
async def test_trimming_the_store_leaves_held_records_of_the_broker(server: FakeServer, url: str) -> None:
    async with opened(server, url, group()) as log:
        await log.publish([envelope(0)])
        await answer(log, await take(log, 1), "dead")
        await log.append([envelope(n, "s") for n in range(1, 4)], expected=("s", 0))
        await until(lambda: log.idle([RELAY]))
        await log.trim(keep=1, force=True, streams=True)
        assert [letter.record.data for letter in await log.dead("g")] == [b"0"]


@ran
async def test_a_store_says_how_far_it_reaches(server: FakeServer, url: str) -> None:
    async with opened(server, url) as log:
        assert "one machine" in (await log.describe())["store"]
        assert Feature.MACHINES not in log.features
