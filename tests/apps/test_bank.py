"""The bank on a log: the repository's ways, transfers with everything that may go wrong with them, months, tables, time."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from trilogue import Conflict, Record
from trilogue.apps.bank import deciders
from trilogue.apps.bank.account import Account
from trilogue.apps.bank.bank import Bank, make_bank
from trilogue.apps.bank.errors import InsufficientFunds
from trilogue.apps.bank.events import AccountClosed, AccountCreated, MoneyDeposited, MoneyWithdrawn
from trilogue.apps.bank.ledger import Ledger, check, enter, money_is_kept, read_ledger
from trilogue.apps.bank.readmodels import balance, balance_at, balances, statement
from trilogue.apps.bank.scenario import play
from trilogue.apps.bank.transfer import (
    UNCLAIMED,
    GiveMoney,
    LegRefused,
    MoneyGiven,
    MoneyTaken,
    MoneyTransfer,
    RecallMoney,
    ReturnMoney,
    TakeMoney,
    TransferCompleted,
    TransferFailed,
    TransferRequested,
    request_transfer,
)
from trilogue.testing import World, ended, given, simulated

D = Decimal
Story = Callable[[Bank, World], Coroutine[Any, Any, None]]


@asynccontextmanager
async def opened(url: str, *accounts: str) -> AsyncIterator[tuple[Bank, World]]:
    """A bank in which each of these accounts holds 100 and may be overdrawn by 50."""
    bank = make_bank(url)
    async with simulated(bank.app) as world:
        for account in accounts:
            await bank.app.decide(Account, account, lambda a: a.create(100, 50))
        yield bank, world


def told(url: str, story: Story, *accounts: str) -> None:
    """Tell a story, then let the auditor look at the books."""

    async def main() -> None:
        async with opened(url, *accounts) as (bank, world):
            await story(bank, world)
            await world.settle()
            ledger = await read_ledger(bank.app)
            assert money_is_kept(ledger)
            assert await check(bank.app) == dict.fromkeys(await check(bank.app), True)

    asyncio.run(asyncio.wait_for(main(), 60))


async def held(bank: Bank, *accounts: str) -> list[Decimal]:
    return [(await bank.app.load(Account, account)).balance for account in accounts]


async def goes_down(bank: Bank, world: World, group: str) -> None:
    """Nobody handles what is asked of this group, until it is resumed."""
    await bank.app.store.pause(group)
    await world.settle()  # a pause has begun once every process has seen it


# ── the repository ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_load_change_save(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        account = await bank.app.load(Account, "a")
        account.deposit(5)
        account.withdraw(3)
        assert (account.version, len(account.uncommitted)) == (1, 2)
        await bank.app.save(account)
        assert (account.version, account.uncommitted) == (3, ())
        again = await bank.app.load(Account, "a")
        assert (again.balance, again.version) == (D("102.00"), 3)

    told(url, story, "a")


def test_the_second_of_two_copies_is_refused(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        first, second = await bank.app.load(Account, "a"), await bank.app.load(Account, "a")
        first.deposit(5)
        second.deposit(7)
        await bank.app.save(first)
        with pytest.raises(Conflict) as refused:
            await bank.app.save(second)
        assert (refused.value.stream, refused.value.expected, refused.value.actual) == ("account-a", 1, 2)
        assert await held(bank, "a") == [D("105.00")]

    told(url, story, "a")


def test_the_class_and_the_functions_share_their_streams(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        await bank.app.decide(deciders.accounts, "a", deciders.withdraw("a", 140))
        assert await held(bank, "a") == [D("-40.00")]
        with pytest.raises(InsufficientFunds):
            await bank.app.decide(deciders.accounts, "a", deciders.withdraw("a", 11))

    told(url, story, "a")


def test_a_snapshot_and_later_events_are_the_whole_history(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        for n in range(1, 250):
            await bank.app.decide(Account, "a", lambda a, n=n: a.deposit(n))
        await bank.app.take_snapshot(Account, "a")
        await bank.app.decide(Account, "a", lambda a: a.withdraw(1))
        rebuilt = Account("a")
        async for record in bank.app.history(stream="account-a"):
            rebuilt.apply(bank.app.decode(record))
        assert await bank.app.load(Account, "a") == rebuilt

    told(url, story, "a")


def test_the_balance_at_a_version_and_at_a_time(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        before = world.now
        for amount in (10, 20, 30):
            await world.advance("1h")
            await bank.app.decide(Account, "a", lambda a, amount=amount: a.deposit(amount))
        assert [(await bank.app.load(Account, "a", version=v)).balance for v in (1, 2, 3, 4)] == [100, 110, 130, 160]
        at = [before + timedelta(minutes=minutes) for minutes in (30, 90, 150, 210)]
        assert [await balance_at(bank.app, "a", when) for when in at] == [100, 110, 130, 160]

    told(url, story, "a")


def test_the_scenario_twice(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        for later in (1, 1):
            found = await play(bank.app)
            assert found["balances"] == [1000, 1500, 1300, 500, 800, -400]
            assert (found["at_event_3"], found["conflict"]) == (1300, True)
            assert found["snapshot"]["same"]
            assert found["snapshot"]["later_events"] == later
            assert "100.00 is available" in found["refused"]
            assert [(line["version"], line["who"]) for line in found["history"]] == [(n, "clerk 7") for n in range(1, 7)]

    told(url, story)


# ── transfers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_transfer(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        await request_transfer(bank.app, "t1", "a", "b", D("150.00"))
        await world.settle()
        assert await held(bank, "a", "b") == [-50, 250]
        assert await world.published(TransferCompleted) == [TransferCompleted("t1", "a", "b", D("150.00"))]
        assert "trilogue.timer.transfer" not in {waiting.envelope.type for waiting in await world.timers()}

    told(url, story, "a", "b")


def test_asking_again_adds_nothing(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        for _ in range(2):
            await request_transfer(bank.app, "t1", "a", "b", D("10.00"))
            await world.settle()
        with pytest.raises(Conflict):
            await request_transfer(bank.app, "t1", "a", "b", D("11.00"))
        # Also as another event with the same number.
        await bank.app.publish(TransferRequested("t1", "a", "b", D("10.00")), id="somebody else's")
        await world.settle()
        assert await held(bank, "a", "b") == [90, 110]

    async def main() -> None:  # not told(): two requests of one number both end
        async with opened(url, "a", "b") as (bank, world):
            await story(bank, world)

    asyncio.run(main())


def test_who_has_not_enough_keeps_it(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        await request_transfer(bank.app, "t1", "a", "b", D("150.01"))
        await world.settle()
        assert await held(bank, "a", "b") == [100, 100]
        [failed] = await world.published(TransferFailed)
        assert failed.reason == "account a cannot pay 150.01: 150.00 is available"

    told(url, story, "a", "b")


@pytest.mark.parametrize("target", ["closed", "absent"])
def test_what_cannot_be_given_is_returned(url: str, target: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        await bank.app.decide(Account, "closed", lambda a: a.close())
        await request_transfer(bank.app, "t1", "a", target, D("30.00"))
        await world.settle()
        assert await held(bank, "a", target) == [100, 0]
        account = await bank.app.load(Account, "a")
        assert account.version == 3  # opened, taken, returned
        [failed] = await world.published(TransferFailed)
        assert target in failed.reason

    told(url, story, "a", "closed")


def test_what_cannot_be_returned_either_is_kept_for_its_owner(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        await goes_down(bank, world, "bank.give")
        await request_transfer(bank.app, "t1", "a", "absent", D("30.00"))
        await world.settle()
        await bank.app.decide(Account, "a", lambda a: a.close())
        await bank.app.store.resume("bank.give")
        await world.settle()
        assert await held(bank, "a", UNCLAIMED) == [0, 30]

    told(url, story, "a")


def test_a_service_that_comes_back_after_months_finds_the_recall(url: str) -> None:
    """Stored answers are long forgotten by then."""

    async def story(bank: Bank, world: World) -> None:
        await goes_down(bank, world, "bank.give")
        await request_transfer(bank.app, "t1", "a", "b", D("30.00"))
        await world.advance("90d")
        before = await held(bank, "a", "b")
        await bank.app.store.resume("bank.give")
        await world.settle()
        assert await held(bank, "a", "b") == before
        assert "transfer t1 recalled" in [line.description for line in await statement(bank.app, "b")]

    told(url, story, "a", "b")


@pytest.mark.parametrize("leg", ["take", "give"])
def test_who_does_not_answer_in_time_is_not_waited_for(url: str, leg: str) -> None:
    """The leg is recalled; when its service is back it finds that out, and does nothing."""

    async def story(bank: Bank, world: World) -> None:
        await goes_down(bank, world, f"bank.{leg}")
        await request_transfer(bank.app, "t1", "a", "b", D("30.00"))
        await world.advance("14m")
        assert await world.published(TransferFailed) == []
        assert await held(bank, "a", "b") == ([100, 100] if leg == "take" else [70, 100])
        await world.advance("2m")
        [failed] = await world.published(TransferFailed)
        assert failed.reason == f"account {'a' if leg == 'take' else 'b'} did not answer within 15m"
        await bank.app.store.resume(f"bank.{leg}")
        await world.advance("1h")
        assert await held(bank, "a", "b") == [100, 100]
        assert await world.published(TransferCompleted) == []

    told(url, story, "a", "b")


def test_an_answer_that_got_lost_counts_when_it_is_asked_for(url: str) -> None:
    """The target was paid, but its answer fails to come: the recall finds the payment, and the transfer completes."""

    async def story(bank: Bank, world: World) -> None:
        await goes_down(bank, world, "bank.give")
        await request_transfer(bank.app, "t1", "a", "b", D("30.00"))
        await world.settle()
        command = (await world.published(GiveMoney))[0]
        await bank.teller.give(command)  # it does its work and dies before it can say so
        await world.advance("15m")
        assert await held(bank, "a", "b") == [70, 130]
        assert len(await world.published(TransferCompleted)) == 1
        await bank.app.store.resume("bank.give")
        await world.settle()
        assert await held(bank, "a", "b") == [70, 130]

    told(url, story, "a", "b")


@pytest.mark.parametrize("leg", ["take", "give", "return"])
@pytest.mark.parametrize("fault", ["crash_after", "lose_lease", "duplicate"])
def test_a_command_that_comes_twice_moves_money_once(url: str, leg: str, fault: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        broken = getattr(world, fault)(f"bank.{leg}")
        if broken is not None:
            await broken
        await request_transfer(bank.app, "t1", "a", "absent" if leg == "return" else "b", D("30.00"))
        await world.settle()
        assert await held(bank, "a", "b") == ([100, 100] if leg == "return" else [70, 130])

    told(url, story, "a", "b")


def test_a_service_that_fails_now_and_then(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        for leg in ("take", "give"):
            world.fail(f"bank.{leg}", times=5)
        for n in range(10):
            await request_transfer(bank.app, f"t{n}", "a", "b", D("1.00"))
        await world.advance("10m")
        assert await held(bank, "a", "b") == [90, 110]

    told(url, story, "a", "b")


# ── the process by itself ────────────────────────────────────────────────────────────────────────────────────────────

ASKED = TransferRequested("t1", "a", "b", D("5.00"))


def test_the_process_step_by_step() -> None:
    given(MoneyTransfer).when(ASKED).then(TakeMoney("t1", "a", D("5.00"), "b"))
    given(MoneyTransfer, ASKED).when(MoneyTaken("t1")).then(GiveMoney("t1", "b", D("5.00"), "a"))
    given(MoneyTransfer, ASKED, MoneyTaken("t1")).when(MoneyGiven("t1")).then(TransferCompleted("t1", "a", "b", D("5.00")), ended)
    given(MoneyTransfer, ASKED).when(LegRefused("t1", "take", "no")).then(TransferFailed("t1", "a", "b", D("5.00"), "no"), ended)
    given(MoneyTransfer, ASKED, MoneyTaken("t1")).when(LegRefused("t1", "give", "no")).then(
        ReturnMoney("t1", "a", D("5.00"), "b")
    )


def test_the_process_when_time_passes() -> None:
    given(MoneyTransfer, ASKED).after("15m").then(RecallMoney("t1", "a", "take"))
    given(MoneyTransfer, ASKED, MoneyTaken("t1")).after("15m").then(RecallMoney("t1", "b", "give"))


@pytest.mark.parametrize("late", [MoneyTaken("t1"), LegRefused("t1", "take", "too late"), ASKED])
def test_the_process_passes_over_what_it_does_not_wait_for(late: object) -> None:
    given(MoneyTransfer, ASKED, MoneyTaken("t1")).when(late).then()


# ── months, tables ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_month_brings_interest_and_a_fee(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        await bank.app.decide(Account, "a", lambda a: a.deposit(900))
        await world.advance("29d")
        assert await held(bank, "a") == [D("1000.00")]
        await world.advance("1d")
        assert await held(bank, "a") == [D("999.00")]  # + 1.00 - 2.00
        await world.advance("60d")
        assert await held(bank, "a") == [D("997.00")]
        await bank.app.decide(Account, "a", lambda a: a.close())
        await world.advance("60d")
        assert (await bank.app.load(Account, "a")).version == 9
        assert await world.timers() == []

    told(url, story, "a")


def test_a_month_that_is_told_twice_is_one(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        world.crash_after("bank.months")
        await world.advance("30d")
        assert await held(bank, "a") == [D("98.10")]  # + 0.10 - 2.00

    told(url, story, "a")


def test_what_was_written_can_be_read(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        done = await bank.app.decide(Account, "a", lambda a: a.withdraw(120, "rent"))
        row = await balance(bank.app, "a", after=done.receipt)
        assert row is not None
        assert (row.amount, row.status) == (D("-20.00"), "open")
        assert await balance(bank.app, "nobody") is None

    told(url, story, "a")


def test_the_statement(url: str) -> None:
    async def story(bank: Bank, world: World) -> None:
        await bank.app.decide(Account, "a", lambda a: a.deposit(1, "found"))
        await request_transfer(bank.app, "t1", "a", "b", D("30.00"))
        await world.settle()
        await bank.app.decide(Account, "a", lambda a: a.close())
        await world.settle()
        lines = await statement(bank.app, "a")
        assert [(line.line, line.description, line.cents, line.balance_cents) for line in lines] == [
            (1, "opened", 10_000, 10_000),
            (2, "found", 100, 10_100),
            (3, "to b", -3_000, 7_100),
            (4, "closed, paid out", -7_100, 0),
        ]
        assert lines[0].at <= world.now

    told(url, story, "a", "b")


def test_the_balances_of_some_events() -> None:
    opened = AccountCreated("a", D("10.00"), D("5.00"))
    paid, gone = MoneyDeposited("a", D("0.50"), "", D("10.00")), AccountClosed("a", D("10.50"))
    given(balances, opened).then(balances=[("a", 1_000, 500, "open")])
    given(balances, opened, paid).then(balances=[("a", 1_050, 500, "open")])
    given(balances, opened, paid, gone).then(balances=[("a", 0, 500, "closed")])


# ── the auditor sees what is wrong ───────────────────────────────────────────────────────────────────────────────────


def test_the_auditor_counts_versions() -> None:
    def gap(*versions: int) -> bool:
        ledger = Ledger()
        for version in versions:
            record = Record("i", "account.deposited", b"", position=version, stream="account-a", version=version)
            enter(ledger, record, MoneyDeposited("a", D("1.00"), "", D(version - 1)))
        return ledger.books["a"].gap

    assert (gap(1, 2, 3), gap(1, 3), gap(2), gap(1, 1)) == (False, True, True, True)


TABLES = "every_projection_equals_a_fold_of_the_log"


async def forged(bank: Bank, event: object, version: int) -> None:
    """Write into a stream what no rule would allow."""
    envelope = bank.app.envelope(event, stream="account-a")
    await bank.app.store.append([envelope], expected=("account-a", version))


@pytest.mark.parametrize(
    ("event", "broken"),
    [
        (MoneyDeposited("a", D("5.00"), "made", D("100.00"), "no such transfer"), "money_neither_made_nor_lost"),
        (MoneyDeposited("a", D("5.00"), "wrong before", D("99.00")), "money_neither_made_nor_lost"),
        (MoneyWithdrawn("a", D("150.01"), "too much", D("100.00")), "no_balance_below_limit"),
        (TransferCompleted("t9", "a", "b", D("1.00")), "every_transfer_ended"),
        (TransferRequested("t9", "a", "b", D("1.00")), "every_transfer_ended"),
    ],
)
def test_the_auditor_is_not_fooled(event: object, broken: str) -> None:
    async def main() -> None:
        async with opened("memory://", "a") as (bank, world):
            assert (await check(bank.app))[broken]
            if isinstance(event, (MoneyDeposited, MoneyWithdrawn)):
                await forged(bank, event, 1)
            else:
                await goes_down(bank, world, "bank.take")
                await bank.app.publish(event)
            await world.settle()
            assert [name for name, holds in (await check(bank.app)).items() if not holds][:1] == [broken]

    asyncio.run(main())


@pytest.mark.parametrize(
    "spoil",
    ["update balances_b1 set cents = cents + 1", "update statements_b1 set line = 7", "delete from days_b1"],
)
def test_the_auditor_compares_the_tables(spoil: str) -> None:
    async def main() -> None:
        async with opened("memory://", "a") as (bank, world):
            await world.settle()
            assert (await check(bank.app))[TABLES]
            async with bank.app.transaction() as tx:
                tx.effect(lambda db: db.execute(spoil))
            assert [name for name, holds in (await check(bank.app)).items() if not holds] == [TABLES]

    asyncio.run(main())
