"""The real bank, with its handlers, timers and tables, against a dictionary: anything a customer may do, in any order.

Plain        per account: status, balance, limit, and every balance it ever had; what is due, and when
the bank     memory://, its clock stands still until it is moved
"""

import asyncio
import heapq
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trilogue.apps.bank.account import Account
from trilogue.apps.bank.bank import Bank, make_bank
from trilogue.apps.bank.errors import BankError
from trilogue.apps.bank.ledger import check
from trilogue.apps.bank.money import cents, from_cents
from trilogue.apps.bank.readmodels import balance_at
from trilogue.apps.bank.transfer import UNCLAIMED, request_transfer
from trilogue.testing import World, simulated

ACCOUNTS = ("a", "b", "c", "d")
FEE = 200


@dataclass
class Book:
    """An account in cents. past: the balance after each event."""

    status: str = "new"
    cents: int = 0
    limit: int = 0
    past: list[int] = field(default_factory=list)

    def move(self, by: int) -> None:
        self.cents += by
        self.past.append(self.cents)


@dataclass
class Plain:
    """What a ledger of paper would say."""

    books: dict[str, Book] = field(default_factory=lambda: {name: Book() for name in (*ACCOUNTS, UNCLAIMED)})
    due: list[tuple[datetime, int, Callable[[], None]]] = field(default_factory=list)
    hanging: dict[int, tuple[str, str, int]] = field(default_factory=dict)
    count: int = 0
    now: datetime = datetime.min

    def at(self, when: datetime, happens: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.due, (when, self.count, happens))

    def passes(self, until: datetime) -> None:
        while self.due and self.due[0][0] <= until:
            self.now, _, happens = heapq.heappop(self.due)
            happens()
        self.now = until

    def create(self, name: str, first: int, limit: int) -> bool:
        book = self.books[name]
        if book.status != "new":
            return False
        book.status, book.limit = "open", limit
        book.move(first)
        self.at(self.now + timedelta(days=30), lambda: self.month(name))
        return True

    def month(self, name: str) -> None:
        book = self.books[name]
        if book.status != "open":
            return
        if book.cents > 0 and (interest := round(Fraction(book.cents, 1000))):
            book.move(interest)
        if fee := min(FEE, book.cents + book.limit):
            book.move(-fee)
        self.at(self.now + timedelta(days=30), lambda: self.month(name))

    def deposit(self, name: str, amount: int) -> bool:
        book = self.books[name]
        if book.status != "open" or amount <= 0:
            return False
        book.move(amount)
        return True

    def withdraw(self, name: str, amount: int) -> bool:
        book = self.books[name]
        if book.status != "open" or not 0 < amount <= book.cents + book.limit:
            return False
        book.move(-amount)
        return True

    def close(self, name: str) -> bool:
        book = self.books[name]
        if book.status != "open" or book.cents < 0:
            return False
        book.status = "closed"
        book.move(-book.cents)
        return True

    def transfer(self, number: int, source: str, target: str, amount: int, hangs: bool) -> None:
        if not self.withdraw(source, amount):
            return
        self.hanging[number] = (source, target, amount)
        if hangs:
            self.at(self.now + timedelta(minutes=15), lambda: self.recall(number))
        else:
            self.give(number)

    def give(self, number: int) -> None:
        _, target, amount = self.hanging[number]
        if self.deposit(target, amount):
            del self.hanging[number]
        else:
            self.give_back(number)

    def recall(self, number: int) -> None:
        if number in self.hanging:
            self.books[self.hanging[number][1]].move(0)  # the recall is an event of the target's
            self.give_back(number)

    def give_back(self, number: int) -> None:
        source, _, amount = self.hanging.pop(number)
        if self.deposit(source, amount):
            return
        self.create(UNCLAIMED, 0, 0)
        self.deposit(UNCLAIMED, amount)


class BankMachine(RuleBasedStateMachine):
    """Whatever is done, the bank and the paper agree."""

    name = st.sampled_from(ACCOUNTS)
    amount = st.one_of(st.integers(-100, 30_000), st.integers(1, 60).map(lambda n: n * 500))  # 5.00 brings half a cent a month

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.plain = Plain()
        self.is_down = False
        self.transfers = 0
        self.seen: list[tuple[datetime, dict[str, int]]] = []

    @initialize()
    def opens(self) -> None:
        self.bank: Bank = make_bank("memory://")
        self.world: World = self.runner.run(self.stack.enter_async_context(simulated(self.bank.app)))
        self.plain.now = self.world.now
        for name, first in (("a", 50_500), ("b", 1_500)):
            self.create(name=name, first=first, limit=10_000)

    def decide(self, name: str, rule: Callable[[Account], object]) -> bool:
        async def decided() -> bool:
            try:
                await self.bank.app.decide(Account, name, rule)
            except BankError:
                return False
            await self.world.settle()
            return True

        return self.runner.run(decided())

    def wait(self, **by: float) -> None:
        self.plain.passes(self.world.now + timedelta(**by))
        self.runner.run(self.world.advance(timedelta(**by).total_seconds()))

    @rule(
        name=name,
        first=st.one_of(st.integers(-1, 200_000), st.integers(0, 99).map(lambda n: n * 500)),
        limit=st.integers(-1, 50_000),
    )
    def create(self, name: str, first: int, limit: int) -> None:
        happened = self.decide(name, lambda a: a.create(from_cents(first), from_cents(limit)))
        assert happened == (first >= 0 and limit >= 0 and self.plain.create(name, first, limit))

    @rule(name=name, amount=amount)
    def deposit(self, name: str, amount: int) -> None:
        assert self.decide(name, lambda a: a.deposit(from_cents(amount))) == self.plain.deposit(name, amount)

    @rule(name=name, amount=amount)
    def withdraw(self, name: str, amount: int) -> None:
        assert self.decide(name, lambda a: a.withdraw(from_cents(amount))) == self.plain.withdraw(name, amount)

    @rule(name=name)
    def close(self, name: str) -> None:
        assert self.decide(name, lambda a: a.close()) == self.plain.close(name)

    @rule(source=name, to=name, amount=amount)
    def transfer(self, source: str, to: str, amount: int) -> None:
        self.transfers += 1
        number = self.transfers

        async def asked() -> None:
            await request_transfer(self.bank.app, f"t{number}", source, to, from_cents(amount))
            await self.world.settle()

        self.runner.run(asked())
        self.plain.transfer(number, source, to, amount, self.is_down)

    @precondition(lambda self: not self.is_down)
    @rule()
    def the_target_side_goes_down(self) -> None:
        async def down() -> None:
            await self.bank.app.store.pause("bank.give")
            await self.world.settle()

        self.is_down = True
        self.runner.run(down())

    @precondition(lambda self: self.is_down)
    @rule()
    def the_target_side_comes_back(self) -> None:
        async def back() -> None:
            await self.bank.app.store.resume("bank.give")
            await self.world.settle()

        self.is_down = False
        self.runner.run(back())
        for number in list(self.plain.hanging):
            self.plain.give(number)

    @precondition(lambda self: not self.is_down)
    @rule(source=name, to=name, amount=amount, minutes=st.sampled_from((5, 16)), leaves=st.booleans())
    def a_transfer_hangs(self, source: str, to: str, amount: int, minutes: int, leaves: bool) -> None:
        self.the_target_side_goes_down()
        self.transfer(source=source, to=to, amount=amount)
        if leaves:
            self.close(name=source)
        self.wait(minutes=minutes)
        self.the_target_side_comes_back()

    @rule(minutes=st.sampled_from((1, 7, 16)))
    def minutes_pass(self, minutes: int) -> None:
        self.wait(minutes=minutes)

    @rule()
    def a_month_passes(self) -> None:
        self.wait(days=30)

    @rule()
    def look_at_the_clock(self) -> None:
        self.seen.append((self.world.now, {name: book.cents for name, book in self.plain.books.items()}))
        self.wait(minutes=1)

    @rule(data=st.data())
    def look_back_to_a_version(self, data: st.DataObject) -> None:
        name = data.draw(self.name)
        past = self.plain.books[name].past
        version = data.draw(st.integers(0, len(past)))
        if version:
            assert cents(self.runner.run(self.bank.app.load(Account, name, version=version)).balance) == past[version - 1]

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def look_back_in_time(self, data: st.DataObject) -> None:
        when, balances = data.draw(st.sampled_from(self.seen))
        name = data.draw(self.name)
        assert cents(self.runner.run(balance_at(self.bank.app, name, when))) == balances[name]

    @invariant()
    def accounts_and_tables_say_the_same(self) -> None:
        if not hasattr(self, "world"):
            return
        rows = self.runner.run(self.bank.app.db("select account, cents, limit_cents, status from balances order by account"))
        books = sorted(self.plain.books.items())
        assert rows == [(name, book.cents, book.limit, book.status) for name, book in books if book.status != "new"]
        for name, book in books:
            account = self.runner.run(self.bank.app.load(Account, name))
            assert (account.status, cents(account.balance), account.version) == (book.status, book.cents, len(book.past))

    def teardown(self) -> None:
        async def audited() -> dict[str, Any]:
            await self.bank.app.store.resume("bank.give")
            await self.world.advance("1h")
            return dict(await check(self.bank.app))

        try:
            if hasattr(self, "world"):
                found = self.runner.run(audited())
                assert found == dict.fromkeys(found, True)
        finally:
            self.runner.run(self.stack.aclose())
            self.runner.close()


TestBank = BankMachine.TestCase
TestBank.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
