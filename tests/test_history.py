"""Looking back through the App: what_if, diff, audit, trace, live folds, tokens, typed rows."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from bank_words import (
    Account,
    CourseOpened,
    Deposited,
    Enrol,
    Enrolled,
    Full,
    InsufficientFunds,
    Kept,
    State,
    Withdrawn,
    accounts,
    withdraw,
)
from common import Sent, Watched, Won
from test_streams import run, with_table

from trilogue import App, BadOption, Db, StreamClosed, TimedOut, UnknownEvent, audited
from trilogue.events import Record


async def three_deposits(app: App) -> list[Record]:
    for n in (1, 10, 100):
        await app.decide(Account, "a", lambda a, n=n: a.deposit(n))
        await asyncio.sleep(0.002)
    return [record async for record in app.history(stream="account-a")]


def test_what_if_decides_on_the_past_and_appends_nothing(url: str) -> None:
    async def test(app: App) -> None:
        records = await three_deposits(app)
        done = await app.what_if(Account, "a", lambda a: a.withdraw(11), version=2)
        assert (done.state.balance, done.events, done.version, done.receipt) == (0, (Withdrawn("a", Decimal(11)),), 3, None)
        with pytest.raises(InsufficientFunds, match="available 1, asked 11"):
            await app.what_if(Account, "a", lambda a: a.withdraw(11), at=records[0].recorded)
        assert (await app.what_if(accounts, "a", withdraw("a", 111))).state == State(Decimal(0))
        assert (await app.what_if(Account, "a", lambda a: a.deposit(1))).answer == {"balance": 112}
        assert len([record async for record in app.history()]) == 3
        with pytest.raises(BadOption, match="needs a rule"):
            await app.what_if(Account, "a")

    run(url, test)


def test_what_if_across_streams(url: str) -> None:
    async def test(app: App) -> None:
        await app.publish(CourseOpened("c", 1))
        await app.decide(Enrol("c", "s"))
        assert (await app.what_if(Enrol("c", "t"), position=1)).events == (Enrolled("c", "t"),)
        with pytest.raises(Full, match="0 seats"):
            await app.what_if(Enrol("c", "t"), position=0)
        with pytest.raises(BadOption, match="many streams"):
            await app.what_if(Enrol("c", "t"), version=1)
        with pytest.raises(Full):
            await app.what_if(Enrol("c", "t"))
        assert len([record async for record in app.history()]) == 2

    run(url, test)


def test_diff_between_versions_and_times(url: str) -> None:
    async def test(app: App) -> None:
        records = await three_deposits(app)
        between = await app.diff(Account, "a", 1, 3)
        assert between.changes == {"balance": (Decimal(1), Decimal(111))}
        assert between.events == (Deposited("a", Decimal(10)), Deposited("a", Decimal(100)))
        assert await app.diff(Account, "a", records[0].recorded, records[2].recorded) == between
        assert (await app.diff(Account, "a", 2, 2)).changes == {}
        assert (await app.diff(accounts, "a", 0, 1)).changes == {"balance": (Decimal(0), Decimal(1))}
        with pytest.raises(BadOption, match="turn them around"):
            await app.diff(Account, "a", 3, 1)

    run(url, test)


def test_the_audit_says_who_why_and_what_changed(url: str) -> None:
    async def test(app: App) -> None:
        with audited(who="alice", why="salary"):
            await app.decide(Account, "a", lambda a: a.deposit(5))
            with audited(why="bonus"):
                await app.decide(Account, "a", lambda a: a.deposit(1))
        await app.decide(Account, "a", lambda a: a.withdraw(2))
        entries = await app.audit(Account, "a")
        assert [(e.record.version, e.who, e.why) for e in entries] == [
            (1, "alice", "salary"),
            (2, "alice", "bonus"),
            (3, None, None),
        ]
        assert [e.changes["balance"] for e in entries] == [(0, 5), (5, 6), (6, 4)]
        assert entries[2].event == Withdrawn("a", Decimal(2))

    run(url, test)


def test_a_trace_is_the_tree_of_what_was_caused(url: str) -> None:
    app = App(url)

    @app.on(group="badge")
    async def badge(e: Watched) -> Won:
        return Won(e.user, "b")

    @app.on(group="mail")
    async def mail(e: Won) -> list[Any]:
        return [Sent(e.user)]

    async def test() -> None:
        async with app.running():
            await app.publish(Watched("other"))
            receipt = await app.publish(Watched("u"))
            await app.wait_idle()
            traced = await app.trace(receipt.id)
            assert [(each.record.type, each.depth) for each in traced] == [
                ("video.watched", 0),
                ("badge.won", 1),
                ("mail.sent", 2),
            ]
            assert {each.record.key for each in traced} == {"u"}
            assert await app.trace(traced[2].record) == traced  # from any of them
            with pytest.raises(UnknownEvent, match="no record has the id"):
                await app.trace("nobody")

    asyncio.run(test())


def test_a_trace_has_each_record_once_whatever_names_its_cause(url: str) -> None:
    async def test(app: App) -> None:
        causes = {"root": None, "child": "root", "self": "self", "a": "b", "b": "a", "tail": "b", "alone": "alone"}
        for id, cause in causes.items():
            envelope = app.envelope(Watched("u"), id=id)
            correlation = "alone" if id == "alone" else "root"
            await app.publish(msgspec.structs.replace(envelope, correlation_id=correlation, causation_id=cause))
        tree = [("root", 0), ("child", 1), ("self", 0), ("a", 0), ("b", 1), ("tail", 2)]
        for id, _ in tree:
            assert [(each.record.id, each.depth) for each in await app.trace(id)] == tree
        assert [(each.record.id, each.depth) for each in await app.trace("alone")] == [("alone", 0)]

    run(url, test)


def test_a_trace_is_found_before_and_after_its_places_are_noted(url: str) -> None:
    async def test(app: App) -> None:
        root = await app.publish(Watched("u"))
        [record] = [record async for record in app.history()]
        caused = [app.envelope(Watched("u")) for _ in range(3)]
        caused = [msgspec.structs.replace(e, correlation_id=root.id, causation_id=root.id) for e in caused]
        await app.publish_many(caused[:2])
        await app.publish_many([Watched(f"x{n}") for n in range(5_000)])
        await app.publish_many(caused[2:])
        assert [each.record.id for each in await app.trace(record)] == [root.id, *(e.id for e in caused)]

    run(url, test)


def test_a_fold_without_a_table(url: str) -> None:
    def total(state: int, e: Deposited) -> int:
        return state + int(e.amount)

    async def test(app: App) -> None:
        await three_deposits(app)
        await app.decide(Account, "b", lambda a: a.deposit(1_000))
        await app.publish(CourseOpened("c", 1))
        assert await app.fold(total, 0) == 1_111
        assert await app.fold(total, 0, stream="account-a") == 111
        assert await app.fold(total, 0, key="b") == 1_000
        assert await app.fold(total, 0, after=2) == 1_100

        def seats(state: list[str], e: CourseOpened) -> list[str]:
            state.append(e.course)
            return state

        start: list[str] = []
        assert await app.fold(seats, start, tags=("course:c",)) == ["c"]
        assert start == []

    run(url, test)


# ── read models ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_token_waits_for_a_read_model(url: str) -> None:
    app = App(url)

    @app.on(group="balances", start="beginning")
    def balances(e: Deposited, db: Db) -> None:
        db.execute("insert into balances values (?, ?) on conflict do update set n = n + excluded.n", (e.account, int(e.amount)))

    @app.setup
    def tables(db: Db) -> None:
        db.execute("create table if not exists balances (account text primary key, n integer)")

    async def test() -> None:
        async with app.running():
            done = await app.decide(Account, "a", lambda a: a.deposit(5))
            assert done.receipt is not None
            header = done.receipt.token
            assert await app.db("select n from balances", after=header, of="balances") == [(5,)]
            assert await app.db("select n from balances", after=done.receipt, of="balances") == [(5,)]
            for token in ("", "x", "-1", "1" * 20, "٣"):
                with pytest.raises(BadOption, match="no token of a receipt"):
                    await app.wait_for(token, "balances")
            for half in ({"after": header}, {"of": "balances"}):
                with pytest.raises(BadOption, match="give both"):
                    await app.db("select 1", **half)
            later = await app.publish(Deposited("a", Decimal(1)), delay="1d")
            with pytest.raises(BadOption, match="is delayed"):
                _ = later.token
            with pytest.raises(BadOption, match="is delayed"):
                await app.wait_for(later, "balances")
            if url == "memory://":
                return
        async with app:  # nobody handles anything
            unseen = await app.decide(Account, "a", lambda a: a.deposit(5))
            assert unseen.receipt is not None
            with pytest.raises(TimedOut):
                await app.wait_for(unseen.receipt, "balances", timeout="10ms")

    asyncio.run(test())


def test_rows_as_objects(url: str) -> None:
    @dataclass
    class Balance:
        account: str
        amount: Decimal

    class Strict(msgspec.Struct, forbid_unknown_fields=True):
        account: str

    async def test(app: App) -> None:
        await with_table(app)
        sql = "select 'a' as account, '1.50' as amount"
        assert await app.find(Balance, sql) == [Balance("a", Decimal("1.50"))]
        assert await app.find(Balance, "select amount, amount as account from moved") == []
        with pytest.raises(BadOption, match=r"the columns account, amount do not make a .*Strict"):
            await app.find(Strict, sql)
        with pytest.raises(BadOption, match="missing required field `amount`"):
            await app.find(Balance, "select 'a' as account")

    run(url, test)


# ── without an event loop ────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_from_a_program_without_an_event_loop(url: str) -> None:
    with App(url).sync() as bus:
        account = bus.load(Account, "a")
        account.deposit(5)
        assert bus.save(account).version == 1
        with bus.edit(Account, "a") as edited:
            edited.deposit(1)
        assert bus.decide(Account, "a", lambda a: a.deposit(1), once="r").version == 3
        assert bus.decide(Account, "a", lambda a: a.deposit(1), once="r").repeated
        with bus.transaction() as tx:
            a, b = tx.load(Account, "a"), tx.load(Account, "b")
            a.withdraw(2)
            b.deposit(2)
            assert tx.decide(accounts, "c", lambda s: [Deposited("c", Decimal(1))]) == State(Decimal(1))
            tx.publish(CourseOpened("x", 1))
            tx.effect(lambda db: db.execute("create table t (n integer)"))
        assert tx.receipt is not None
        assert bus.load_state(accounts, "b").state == State(Decimal(2))
        assert bus.decide(Enrol("x", "s")).events == (Enrolled("x", "s"),)
        assert bus.what_if(Account, "a", lambda a: a.withdraw(5)).state.balance == 0
        assert bus.diff(Account, "a", 1, 4).changes == {}
        assert len(bus.audit(Account, "a")) == 4
        assert len(bus.trace(next(bus.history()))) == 1
        assert bus.fold(lambda_total, 0) == 10
        assert bus.find(Row, "select 1 as n") == [Row(1)]
        assert bus.load(Account, "a", version=1).balance == 5
        first, second = bus.history(stream="account-a", limit=2)
        assert first.recorded <= second.recorded + timedelta(0)


def test_looking_after_streams_without_an_event_loop(url: str) -> None:
    with App(url).sync() as bus:
        for n in range(1, 4):
            bus.decide(Kept, "k", lambda k, n=n: k.deposit(n))
        assert bus.take_snapshot(Kept, "k") == 3
        bus.truncate_stream("kept-k", before=3)
        assert (bus.load(Kept, "k").balance, bus.load(Kept, "k", version=3).balance) == (3, 3)
        assert bus.close_stream("kept-k", reason="moved") == 3
        with pytest.raises(StreamClosed, match="is closed at version 3"):
            bus.decide(Kept, "k", lambda k: k.deposit(1))
        bus.wait_idle(timeout="20s")
        assert bus.trim(keep=1, streams=True) == 2
        assert [record.version for record in bus.history()] == [3]


def lambda_total(state: int, e: Deposited) -> int:
    return state + int(e.amount)


class Row(msgspec.Struct):
    n: int
