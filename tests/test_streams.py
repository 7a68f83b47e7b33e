"""Streams through the App: load, save, edit, decide, transactions, snapshots, closed and truncated ones."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

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

from trilogue import (
    Aggregate,
    App,
    BadOption,
    Boundary,
    Conflict,
    Db,
    Decider,
    DecodeError,
    Envelope,
    OutcomeUnknown,
    Rejected,
    Snapshot,
    StreamClosed,
    TimedOut,
    UnknownEvent,
    audited,
    event,
)
from trilogue.rehydrate import OWNER

Test = Callable[[App], Awaitable[None]]


def run(url: str, test: Test) -> None:
    async def whole() -> None:
        async with App(url, name="bank") as app:
            await test(app)

    asyncio.run(whole())


async def types(app: App, stream: str) -> list[str]:
    return [record.type async for record in app.history(stream=stream)]


# ── load and save ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_saved_is_loaded(url: str) -> None:
    async def test(app: App) -> None:
        account = await app.load(Account, "a")
        assert (account.version, account.balance) == (0, 0)
        account.deposit(5)
        account.deposit(2)
        saved = await app.save(account)
        assert (saved.version, account.version, account.uncommitted) == (2, 2, ())
        assert saved.receipt is not None
        assert saved.receipt.position == 2
        again = await app.load(Account, "a")
        assert again == account
        assert again.version == 2
        assert (await app.save(again)).receipt is None
        records = [record async for record in app.history(stream="account-a")]
        assert [(record.version, record.key, record.source) for record in records] == [(1, "a", "bank"), (2, "a", "bank")]

    run(url, test)


def test_the_second_of_two_copies_is_refused(url: str) -> None:
    async def test(app: App) -> None:
        first, second = await app.load(Account, "a"), await app.load(Account, "a")
        first.deposit(5)
        second.deposit(7)
        with audited(who="alice"):
            await app.save(first)
        with pytest.raises(
            Conflict, match=r"'account-a' has version 1, expected was 0; version 1 is 'account.deposited', written by alice"
        ) as e:
            await app.save(second)
        assert (e.value.stream, e.value.expected, e.value.actual, e.value.by) == ("account-a", 0, 1, "alice")
        assert (await app.load(Account, "a")).balance == 5
        assert second.uncommitted == (Deposited("a", Decimal(7)),)

    run(url, test)


def test_saving_again_after_an_unknown_outcome_adds_nothing(url: str) -> None:
    async def test(app: App) -> None:
        account = await app.load(Account, "a")
        account.deposit(5)
        append = app.store.append

        async def answer_lost(*args: Any, **options: Any) -> list[int]:
            await append(*args, **options)
            raise OutcomeUnknown("the answer got lost")

        app.store.append = answer_lost  # type: ignore[method-assign]
        with pytest.raises(OutcomeUnknown):
            await app.save(account)
        app.store.append = append  # type: ignore[method-assign]
        saved = await app.save(account)
        assert saved.receipt is not None
        assert saved.receipt.position == 1
        assert await types(app, "account-a") == ["account.deposited"]

    run(url, test)


def test_edit_saves_at_the_end_or_not_at_all(url: str) -> None:
    async def test(app: App) -> None:
        async with app.edit(Account, "a") as account:
            account.deposit(5)
        with pytest.raises(InsufficientFunds):
            async with app.edit(Account, "a") as account:
                account.deposit(1)
                account.withdraw(100)
        assert (await app.load(Account, "a")).balance == 5
        with pytest.raises(Conflict):
            async with app.edit(Account, "a") as account:
                account.deposit(1)
                async with app.edit(Account, "a") as faster:
                    faster.deposit(10)
        assert (await app.load(Account, "a")).balance == 15

    run(url, test)


def test_a_decider_is_the_same_over_functions(url: str) -> None:
    async def test(app: App) -> None:
        assert (await app.load(accounts, "a")).state == State()
        await app.decide(Account, "a", lambda a: a.deposit(5))
        done = await app.decide(accounts, "a", withdraw("a", 2))
        assert (done.state, done.events, done.version) == (State(Decimal(3)), (Withdrawn("a", Decimal(2)),), 2)
        with pytest.raises(InsufficientFunds):
            await app.decide(accounts, "a", withdraw("a", 4))
        found = await app.load(accounts, "a", version=1)
        assert (found.state, found.version) == (State(Decimal(5)), 1)
        assert (await app.decide(accounts, "a", lambda s: None)).receipt is None

    run(url, test)


def test_an_event_without_a_key_is_ordered_by_its_stream(url: str) -> None:
    @event("note.written")
    @dataclass(frozen=True)
    class Written:
        text: str

    class Note(Aggregate, stream="note-{id}"):
        text: str = ""

        def apply(self, e: Written) -> None:
            self.text = e.text

    async def test(app: App) -> None:
        await app.decide(Note, "n", lambda note: note.emit(Written("x")))
        assert [record.key async for record in app.history()] == ["note-n"]

    run(url, test)


# ── decide ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_racing_deciders_all_succeed_one_after_the_other(url: str) -> None:
    async def test(app: App) -> None:
        await asyncio.gather(*(app.decide(Account, "a", lambda a: a.deposit(1), attempts=200) for _ in range(40)))
        account = await app.load(Account, "a")
        assert (account.balance, account.version) == (40, 40)

    run(url, test)


def test_attempts_are_bounded(url: str) -> None:
    async def test(app: App) -> None:
        calls = 0

        async def beaten(_: Any) -> None:
            async with app.edit(Account, "a") as faster:
                faster.deposit(1)

        load = app.store.read

        async def slow(query: Any) -> Any:
            nonlocal calls
            found = await load(query)
            if query.stream == "account-a" and not query.after and not slow_off:
                calls += 1
                slow_off.append(True)
                await beaten(None)
                slow_off.clear()
            return found

        slow_off: list[bool] = []
        app.store.read = slow  # type: ignore[method-assign]
        with pytest.raises(Conflict):
            await app.decide(Account, "a", lambda a: a.deposit(100), attempts=3)
        assert calls == 3

    run(url, test)


@pytest.mark.parametrize("attempts", [0, -1, 1_001, "x"])
def test_attempts_that_are_none(attempts: Any) -> None:
    async def test(app: App) -> None:
        with pytest.raises(BadOption, match="attempts"):
            await app.decide(Account, "a", lambda a: a.deposit(1), attempts=attempts)

    run("memory://", test)


def test_once_decides_once_and_tells_the_same_answer(url: str) -> None:
    async def test(app: App) -> None:
        first = await app.decide(Account, "a", lambda a: a.deposit(5), once="request-1")
        await app.decide(Account, "a", lambda a: a.deposit(1))
        second = await app.decide(Account, "a", lambda a: a.deposit(5), once="request-1")
        assert (first.repeated, second.repeated) == (False, True)
        assert first.answer == second.answer == {"balance": "5"}  # as JSON keeps it, the first time too
        assert first.receipt == second.receipt
        assert first.events == second.events == (Deposited("a", Decimal(5)),)
        assert (second.version, second.state.balance) == (1, 5)
        other = await app.decide(Account, "b", lambda a: a.deposit(5), once="request-1")  # another stream, another request
        assert not other.repeated
        assert (await app.load(Account, "a")).balance == 6

    run(url, test)


def test_racing_under_one_once(url: str) -> None:
    async def test(app: App) -> None:
        tries = (app.decide(Account, "a", lambda a: a.deposit(5), once="r", attempts=100) for _ in range(10))
        done = await asyncio.gather(*tries)
        assert sorted(each.repeated for each in done) == [False] + [True] * 9
        assert {each.version for each in done} == {1}
        assert (await app.load(Account, "a")).balance == 5

    run(url, test)


def test_once_without_events_is_remembered_and_a_refusal_is_not(url: str) -> None:
    async def test(app: App) -> None:
        assert (await app.decide(Account, "a", lambda a: "nothing", once="r")).answer == "nothing"
        again = await app.decide(Account, "a", lambda a: a.deposit(1), once="r")
        assert (again.answer, again.repeated, again.receipt) == ("nothing", True, None)
        with pytest.raises(InsufficientFunds):
            await app.decide(Account, "a", lambda a: a.withdraw(1), once="s")
        await app.decide(Account, "a", lambda a: a.deposit(1))
        assert not (await app.decide(Account, "a", lambda a: a.withdraw(1), once="s")).repeated

    run(url, test)


def test_an_answer_that_cannot_be_stored_is_refused_before_anything_happens(url: str) -> None:
    async def test(app: App) -> None:
        def rule(a: Account) -> object:
            a.deposit(1)
            return object()

        with pytest.raises(BadOption, match="cannot be stored under once="):
            await app.decide(Account, "a", rule, once="r")
        assert (await app.load(Account, "a")).version == 0
        await app.decide(Account, "a", rule)

    run(url, test)


def test_stored_answers_are_forgotten_after_a_week(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(app: App) -> None:
        for n in range(6):
            await app.decide(Account, "a", lambda a: a.deposit(1), once=f"old-{n}")
        monkeypatch.setattr("trilogue.deciding.ONCE_KEPT_US", -1)
        for n in range(3):
            await app.decide(Account, "a", lambda a: a.deposit(1), once=f"new-{n}")
        assert len(await app.store.states("once")) == 3  # each new one takes two old ones with it

    run(url, test)


@pytest.mark.parametrize("once", ["", "x" * 256])
def test_a_once_that_is_none(once: str) -> None:
    async def test(app: App) -> None:
        with pytest.raises(BadOption, match="once="):
            await app.decide(Account, "a", lambda a: a.deposit(1), once=once)

    run("memory://", test)


def test_a_rule_is_a_plain_function() -> None:
    async def test(app: App) -> None:
        async def rule(a: Account) -> None:
            a.deposit(1)

        with pytest.raises(BadOption, match="plain function"):
            await app.decide(Account, "a", rule)
        with pytest.raises(BadOption, match="expected a rule"):
            await app.decide(Account, "a")  # type: ignore[call-overload]
        with pytest.raises(BadOption, match="expected an event"):
            await app.decide(accounts, "a", lambda s: 5)

    run("memory://", test)


# ── decisions across streams ─────────────────────────────────────────────────────────────────────────────────────────


def test_of_sixteen_racing_decisions_one_wins_the_last_seat(url: str) -> None:
    async def test(app: App) -> None:
        await app.publish(CourseOpened("c", 1))
        tries = (app.decide(Enrol("c", f"s{n}"), attempts=100) for n in range(16))
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(each, Full) for each in results) == 15
        assert [record.type async for record in app.history(types="course.enrolled")] == ["course.enrolled"]

    run(url, test)


def test_without_another_attempt_a_beaten_decision_is_a_conflict(url: str) -> None:
    async def test(app: App) -> None:
        await app.publish(CourseOpened("c", 16))
        tries = (app.decide(Enrol("c", f"s{n}"), attempts=1) for n in range(16))
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(each, Conflict) for each in results) == 15
        conflict = next(each for each in results if isinstance(each, Conflict))
        assert "'course.enrolled' arrived at position 2" in str(conflict)

    run(url, test)


def test_decisions_about_other_things_do_not_conflict(url: str) -> None:
    async def test(app: App) -> None:
        for n in range(8):
            await app.publish(CourseOpened(f"c{n}", 1))
        tries = (app.decide(Enrol(f"c{n}", f"s{n}"), attempts=1) for n in range(8))
        assert len(await asyncio.gather(*tries)) == 8

    run(url, test)


def test_a_decision_reads_all_parts_of_its_boundary(url: str) -> None:
    async def test(app: App) -> None:
        for n in range(4):
            await app.publish(CourseOpened(f"c{n}", 1))
        for n in range(3):
            done = await app.decide(Enrol(f"c{n}", "s"))
            assert done.events == (Enrolled(f"c{n}", "s"),)
        with pytest.raises(Full, match="3 courses"):
            await app.decide(Enrol("c3", "s"))
        template = Enrol("c3", "t")
        await app.decide(template)
        assert (template.taken, template.seats) == (0, 0)  # what was given in is not changed

    run(url, test)


def test_a_boundary_may_guard_what_it_does_not_fold(url: str) -> None:
    class Guarding(Enrol):
        def boundary(self) -> list[Boundary]:
            return [Boundary((f"course:{self.course}",), ("course.opened", "course.enrolled", "course.frozen"))]

    @event("course.frozen", key="course", tags=("course",))
    @dataclass(frozen=True)
    class Frozen:
        course: str

    async def test(app: App) -> None:
        await app.publish_many([CourseOpened("c", 2), Frozen("c")])
        assert (await app.decide(Guarding("c", "s"))).events == (Enrolled("c", "s"),)

    run(url, test)


def test_once_across_streams(url: str) -> None:
    async def test(app: App) -> None:
        await app.publish(CourseOpened("c", 2))
        first = await app.decide(Enrol("c", "s"), once="r")
        second = await app.decide(Enrol("c", "s"), once="r")
        assert (first.receipt, first.events, second.repeated) == (second.receipt, second.events, True)

    run(url, test)


# ── transactions ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def with_table(app: App) -> None:
    await app.store.transact(lambda db: db.execute("create table moved (amount integer)"))


def test_a_transaction_is_one_commit_over_everything(url: str) -> None:
    async def test(app: App) -> None:
        await with_table(app)
        await app.decide(Account, "a", lambda a: a.deposit(9))
        async with app.transaction() as tx:
            a, b = await tx.load(Account, "a"), await tx.load(Account, "b")
            assert await tx.load(Account, "a") is a
            a.withdraw(4)
            b.deposit(4)
            state = await tx.decide(accounts, "c", lambda s: [Deposited("c", Decimal(1))])
            assert state == State(Decimal(1))
            tx.publish(CourseOpened("x", 1))
            tx.effect(lambda db: db.execute("insert into moved values (4)"))
        assert tx.receipt is not None
        assert tx.receipt.position == 5
        assert (a.version, b.version, a.uncommitted) == (2, 1, ())
        assert [(await app.load(Account, id)).balance for id in "abc"] == [5, 4, 1]
        assert await app.db("select amount from moved") == [(4,)]

    run(url, test)


def test_a_beaten_transaction_leaves_nothing(url: str) -> None:
    async def test(app: App) -> None:
        await with_table(app)
        with pytest.raises(Conflict, match="account-b"):
            async with app.transaction() as tx:
                a, b = await tx.load(Account, "a"), await tx.load(Account, "b")
                a.deposit(1)
                b.deposit(1)
                tx.publish(CourseOpened("x", 1))
                tx.effect(lambda db: db.execute("insert into moved values (1)"))
                await app.decide(Account, "b", lambda a: a.deposit(100))
        assert [(await app.load(Account, id)).balance for id in "ab"] == [0, 100]
        assert await app.db("select amount from moved") == []
        await app.save(a)  # its stream still has the version it was loaded with
        assert (await app.load(Account, "a")).balance == 1

    run(url, test)


def test_a_transaction_whose_effect_or_block_fails_leaves_nothing(url: str) -> None:
    async def test(app: App) -> None:
        def fail(db: Db) -> None:
            raise TimedOut("no")

        for fails in (lambda tx: tx.effect(fail), lambda tx: 1 / 0):
            with pytest.raises((TimedOut, ZeroDivisionError)):
                async with app.transaction() as tx:
                    (await tx.load(Account, "a")).deposit(1)
                    fails(tx)
        assert [record async for record in app.history()] == []
        async with app.transaction():
            pass

    run(url, test)


SLOW = "with recursive n(i) as (select 1 union all select i + 1 from n) insert into moved select i from n"


def test_the_sql_of_an_effect_is_bounded(url: str) -> None:
    async def test(app: App) -> None:
        await with_table(app)
        with pytest.raises(TimedOut, match="its SQL took longer"):
            async with app.transaction() as tx:
                tx.publish(CourseOpened("x", 1))
                tx.effect(lambda db: db.execute(SLOW))
        assert [record async for record in app.history()] == []

    run(url, test)


@pytest.mark.parametrize("undoes", [SLOW, "insert or rollback into moved (rowid, amount) values (1, 1)"])
def test_an_effect_that_goes_on_after_its_transaction_was_undone_does_nothing(url: str, undoes: str) -> None:
    async def test(app: App) -> None:
        await with_table(app)
        await app.store.transact(lambda db: db.execute("insert into moved (rowid, amount) values (1, 100)"))

        def goes_on(db: Db) -> None:
            with contextlib.suppress(Exception):
                db.execute(undoes)
            db.execute("insert into moved values (5)")

        async def together() -> None:
            async with app.transaction() as tx:
                (await tx.load(Account, "a")).deposit(1)
                tx.effect(goes_on)

        failed, *others = await asyncio.gather(
            together(), *(app.publish(CourseOpened(f"c{n}", 1)) for n in range(3)), return_exceptions=True
        )
        assert isinstance(failed, TimedOut)
        assert [other for other in others if isinstance(other, BaseException)] == []
        assert await app.db("select amount from moved") == [(100,)]
        assert (await app.load(Account, "a")).version == 0

    run(url, test)


# ── snapshots ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def snapshots(app: App, least: int = 1) -> list[Any]:
    for _ in range(1_000):
        found = await app.store.states(OWNER)
        if len(found) >= least:
            break
        await asyncio.sleep(0.005)
    return found


def test_a_snapshot_is_taken_beside_and_read_from(url: str) -> None:
    async def test(app: App) -> None:
        for _ in range(7):
            await app.decide(Kept, "k", lambda a: a.deposit(1))
        assert len(await snapshots(app)) == 1
        assert (await app.load(Kept, "k")).balance == 7
        queries: list[Any] = []
        read = app.store.read

        async def seen(query: Any) -> Any:
            queries.append(query.after)
            return await read(query)

        app.store.read = seen  # type: ignore[method-assign]
        await app.load(Kept, "k")
        assert queries[0] >= 5  # not from the beginning
        assert (await app.load(Kept, "k", version=2)).balance == 2  # the past is read from the beginning

    run(url, test)


def test_a_state_is_the_same_with_and_without_snapshots(url: str) -> None:
    async def test(app: App) -> None:
        for n in range(1, 23):
            await app.decide(Kept, "k", lambda a: a.deposit(1))
            await app.take_snapshot(Kept, "k")
            assert (await app.load(Kept, "k")).balance == n
        await app.store.transact(lambda tx: tx.clear_states(OWNER))
        assert (await app.load(Kept, "k")).balance == 22

    run(url, test)


def test_a_snapshot_nobody_can_read_is_passed_over(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test(app: App) -> None:
        await app.decide(Kept, "k", lambda a: a.deposit(1))
        await app.take_snapshot(Kept, "k")
        [kept] = await app.store.states(OWNER)
        for body in (b"", b"not json", b'{"version":1,"position":1,"state":{"id":7}}', b'{"version":"x"}'):
            await app.store.transact(lambda tx, body=body: tx.set_state(OWNER, kept.id, body))
            assert (await app.load(Kept, "k")).balance == 1
        assert "cannot be read, so its stream is" in caplog.text

    run(url, test)


def test_another_fold_discards_the_snapshot(url: str) -> None:
    class Changed(Aggregate, stream="kept-{id}", snapshot=Snapshot(every=5)):
        balance: Decimal = Decimal(0)

        def apply(self, e: Deposited) -> None:
            self.balance += 2 * e.amount

    Changed.__qualname__ = Kept.__qualname__  # the same class after a deployment

    async def test(app: App) -> None:
        await app.decide(Kept, "k", lambda a: a.deposit(3))
        await app.take_snapshot(Kept, "k")
        assert (await app.load(Changed, "k")).balance == 6
        await app.take_snapshot(Changed, "k")
        assert len(await app.store.states(OWNER)) == 1  # the old fold's is gone
        assert (await app.load(Kept, "k")).balance == 3

    run(url, test)


def test_two_models_of_one_stream_keep_their_own_snapshots(url: str) -> None:
    class Count(Aggregate, stream="kept-{id}", snapshot=Snapshot(every=5)):
        n: int = 0

        def apply(self, e: Deposited) -> None:
            self.n += 1

    async def test(app: App) -> None:
        await app.decide(Kept, "k", lambda a: a.deposit(3))
        await app.take_snapshot(Kept, "k")
        await app.take_snapshot(Count, "k")
        assert len(await app.store.states(OWNER)) == 2
        assert ((await app.load(Kept, "k")).balance, (await app.load(Count, "k")).n) == (3, 1)

    run(url, test)


@dataclass(frozen=True)
class Empty:
    pass


@dataclass(frozen=True)
class Owned:
    owner: str


def owning(state: Empty | Owned, e: CourseOpened) -> Empty | Owned:
    return Owned(e.course)


def collecting(state: dict[Any, Any], e: CourseOpened) -> dict[Any, Any]:
    state[e.seats] = Decimal(e.seats)  # a fold may change what it was given
    return state


def test_a_state_that_json_makes_another_one_is_not_kept(url: str) -> None:
    async def test(app: App) -> None:
        for evolve, initial, state in ((owning, Empty(), Owned("c")), (collecting, {}, {7: Decimal(7)})):
            decider: Decider[Any] = Decider("odd-{id}", initial, evolve, Snapshot(every=1))
            await app.decide(decider, evolve.__name__, lambda _: CourseOpened("c", 7))
            with pytest.raises((BadOption, TypeError)):
                await app.take_snapshot(decider, evolve.__name__)
            assert (await app.load(decider, evolve.__name__)).state == state
            assert (await app.load(decider, "nobody")).state == type(initial)()  # nothing of another stream
        assert await app.store.states(OWNER) == []

    run(url, test)


def test_what_is_emitted_while_it_is_saved_is_saved_next(url: str) -> None:
    async def test(app: App) -> None:
        account = await app.load(Account, "a")
        account.deposit(1)
        first = asyncio.create_task(app.save(account))
        await asyncio.sleep(0)
        account.deposit(10)
        second = await app.save(account)
        assert ((await first).version, second.version, account.version, account.uncommitted) == (1, 2, 2, ())
        account.deposit(100)
        saving = asyncio.create_task(app.save(account))
        await asyncio.sleep(0)
        saving.cancel()  # nobody knows whether it is stored
        await asyncio.gather(saving, return_exceptions=True)
        account.deposit(1000)
        assert (await app.save(account)).version == 4
        assert (await app.load(Account, "a")) == account
        assert account.balance == 1111

    run(url, test)


def test_who_repeats_a_request_meanwhile_gets_its_answer_and_not_a_refusal(url: str) -> None:
    async def test(app: App) -> None:
        await app.decide(Account, "a", lambda a: a.deposit(5))
        decided = False

        async def late(query: Any) -> Any:
            nonlocal decided
            if not decided:  # the same request, by somebody who was faster
                decided = True
                await app.decide(Account, "a", lambda a: a.withdraw(5), once="r")
            return await read(query)

        read, app.store.read = app.store.read, late  # type: ignore[method-assign]
        done = await app.decide(Account, "a", lambda a: a.withdraw(5), once="r")
        assert (done.repeated, done.version) == (True, 2)

    run(url, test)


def test_a_stream_is_decided_on_twice_in_one_transaction(url: str) -> None:
    async def test(app: App) -> None:
        async with app.transaction() as tx:
            await tx.decide(accounts, "a", lambda s: [Deposited("a", Decimal(5))])
            state = await tx.decide(accounts, "a", withdraw("a", 2))
            assert state == State(Decimal(3))
            with pytest.raises(BadOption, match="as another model"):
                await tx.load(Account, "a")
        assert (await app.load(accounts, "a")).version == 2

    run(url, test)


@pytest.mark.parametrize("stream", ["", "x" * 513, "a\nb"])
def test_names_of_streams_that_are_none(stream: str) -> None:
    async def test(app: App) -> None:
        envelope = app.envelope(CourseOpened("c", 1))
        for attempt in (
            app.store.append([envelope], expected=(stream, 0)),
            app.store.transact(lambda tx: tx.append([envelope], stream=stream)),
        ):
            with pytest.raises(Rejected, match="cannot be a stream"):
                await attempt

    run("memory://", test)


def test_a_slow_load_is_reason_enough(url: str) -> None:
    class Slow(Account, stream="slow-{id}", snapshot=Snapshot(slower_than="0s")):
        pass

    async def test(app: App) -> None:
        await app.decide(Slow, "s", lambda a: a.deposit(1))
        await app.load(Slow, "s")
        assert len(await snapshots(app)) == 1

    run(url, test)


def test_no_policy_no_snapshot() -> None:
    async def test(app: App) -> None:
        with pytest.raises(BadOption, match="no snapshot policy"):
            await app.take_snapshot(Account, "a")

    run("memory://", test)


# ── closed and truncated ─────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_appended_to_a_closed_stream(url: str) -> None:
    async def test(app: App) -> None:
        account = (await app.decide(Account, "a", lambda a: a.deposit(1))).state
        assert await app.close_stream("account-a", reason="moved") == 1
        assert await app.close_stream("account-a", reason="again") == 1
        account.deposit(1)
        with pytest.raises(StreamClosed, match="closed at version 1"):
            await app.save(account)
        with pytest.raises(StreamClosed):
            await app.decide(Account, "a", lambda a: a.deposit(1))
        async with App(app.store.url) if app.store.url.startswith("sqlite") else app as other:
            with pytest.raises(StreamClosed):
                await other.decide(Account, "a", lambda a: a.deposit(1), once="r")
        assert (await app.load(Account, "a")).balance == 1

    run(url, test)


def test_a_truncated_stream_begins_later_and_counts_on(url: str) -> None:
    async def test(app: App) -> None:
        for n in range(1, 6):
            await app.decide(Account, "a", lambda a, n=n: a.deposit(n))
        for before in (0, 6):
            with pytest.raises(Conflict, match="can be truncated before 1 to 5"):
                await app.truncate_stream("account-a", before=before)
        await app.truncate_stream("account-a", before=4)
        await app.truncate_stream("account-a", before=2)  # what is hidden stays hidden
        assert [record.version async for record in app.history(stream="account-a")] == [4, 5]
        account = await app.load(Account, "a")
        assert (account.version, account.balance) == (5, 9)
        await app.decide(Account, "a", lambda a: a.deposit(1))
        assert await app.store.stream_version("account-a") == 6
        assert await app.trim(keep=1) == 3
        assert [record.version async for record in app.history()] == [4, 5, 6]
        assert await app.trim(keep=1, streams=True, force=True) == 2
        assert [record.version async for record in app.history()] == [6]

    run(url, test)


# ── places in the past ───────────────────────────────────────────────────────────────────────────────────────────────


def test_load_at_a_version_a_position_and_a_time(url: str) -> None:
    async def test(app: App) -> None:
        for n in (1, 10, 100):
            await app.decide(Account, "other", lambda a: a.deposit(7))
            await app.decide(Account, "a", lambda a, n=n: a.deposit(n))
            await asyncio.sleep(0.002)
        records = [record async for record in app.history(stream="account-a")]
        for n, balance in enumerate((1, 11, 111)):
            assert (await app.load(Account, "a", version=n + 1)).balance == balance
            assert (await app.load(Account, "a", position=records[n].position)).balance == balance
            assert (await app.load(Account, "a", at=records[n].recorded)).balance == balance
        assert (await app.load(Account, "a", position=1)).version == 0
        assert (await app.load(Account, "a", at=records[0].recorded - timedelta(microseconds=1))).version == 0
        assert (await app.load(Account, "a", version=99)).balance == 111
        with pytest.raises(BadOption, match="give one of them"):
            await app.load(Account, "a", version=1, position=1)
        with pytest.raises(BadOption, match="no time zone"):
            await app.load(Account, "a", at=datetime(2026, 1, 1))
        assert (await app.load(Account, "a", at=datetime(2099, 1, 1, tzinfo=UTC))).balance == 111

    run(url, test)


# ── mistakes that must not end in a stream nobody can read ───────────────────────────────────────────────────────────


def test_an_event_that_is_not_what_its_class_says_is_refused_before_it_is_stored(url: str) -> None:
    async def test(app: App) -> None:
        await app.decide(Account, "a", lambda a: a.deposit(5))
        account = await app.load(Account, "a")
        account.emit(Deposited(7, Decimal(1)))  # type: ignore[arg-type]
        with pytest.raises(BadOption, match="nobody could read it again"):
            await app.save(account)
        for once in (None, "r"):
            with pytest.raises(BadOption, match="nobody could read it again"):
                await app.decide(accounts, "a", lambda s: Deposited(7, Decimal(1)), once=once)  # type: ignore[arg-type]
        assert (await app.load(Account, "a")).balance == 5

    async def unreadable(app: App) -> None:
        await app.store.append([Envelope("x", "account.deposited", b'{"account":7}')], expected=("account-a", 0))
        with pytest.raises(DecodeError, match=r"stream 'account-a', version 1, 'account.deposited': not a Deposited"):
            await app.load(Account, "a")

    run(url, test)
    run("memory://", unreadable)


def test_rules_that_say_nothing_or_the_wrong_thing() -> None:
    def forgetful(state: State, e: Deposited) -> State:
        return None  # type: ignore[return-value]

    class Bare(Aggregate, stream="bare-{id}"):
        pass

    class Demanding(Aggregate, stream="demanding-{id}"):
        name: str

        def apply(self, e: Deposited) -> None:
            pass

    async def test(app: App) -> None:
        with pytest.raises(BadOption, match="an Aggregate emits its events"):
            await app.decide(Account, "a", lambda a: Deposited("a", Decimal(1)))
        with pytest.raises(BadOption, match="returned None for"):
            await app.decide(Decider("f-{id}", State(), forgetful), "a", lambda s: Deposited("a", Decimal(1)))
        with pytest.raises(BadOption, match="returned 'done'"):
            await app.decide(accounts, "a", lambda s: "done")
        with pytest.raises(UnknownEvent, match=r"Bare has no apply\(\): write"):
            await app.load(Bare, "a")
        with pytest.raises(BadOption, match=r"field 'name' of .*Demanding has no default"):
            await app.load(Demanding, "a")
        assert [record async for record in app.history()] == []

    run("memory://", test)


def test_sql_that_cannot_be_run_says_so(url: str) -> None:
    async def test(app: App) -> None:
        for sql, values in (("select * from nowhere", ()), ("selct 1", ()), ("select ?", ())):
            with pytest.raises(BadOption, match="cannot be run"):
                await app.db(sql, values)

    run(url, test)
