"""simulated() with aggregates, processes and projections: what happens beside ordinary handlers is waited for, and breaks too."""

from dataclasses import dataclass
from typing import Any

import pytest
from common import run

from trilogue import App, Db, Retry, event
from trilogue.aggregate import Aggregate
from trilogue.process import End, Process, Timer, reacts, starts, timer
from trilogue.testing import ended, given, simulated

TABLES = {"paid": "customer text primary key, cents integer not null"}


@event("order.placed", key="order")
@dataclass(frozen=True)
class Placed:
    order: str
    customer: str
    cents: int


@event("order.paid", key="order")
@dataclass(frozen=True)
class Paid:
    order: str


@event("reminder.sent", key="order")
@dataclass(frozen=True)
class Reminded:
    order: str
    number: int


@event("order.cancelled", key="order")
@dataclass(frozen=True)
class Cancelled:
    order: str


class Payment(Process, key="order", name="payment"):
    reminders: int = 0

    @starts
    def placed(self, e: Placed) -> Timer:
        return Timer("late", after="7d")

    @timer("late")
    def late(self) -> Any:
        self.reminders += 1
        if self.reminders > 2:
            yield Cancelled(self.id)
            yield End()
        else:
            yield Reminded(self.id, self.reminders)
            yield Timer("late", after="7d")

    @reacts
    def paid(self, e: Paid) -> End:
        return End()


class Order(Aggregate, stream="order-{id}"):
    cents: int = 0
    is_paid: bool = False

    def place(self, customer: str, cents: int) -> None:
        self.emit(Placed(self.id, customer, cents))

    def pay(self) -> None:
        if not self.cents or self.is_paid:
            raise ValueError("nothing to pay")
        self.emit(Paid(self.id))

    def apply(self, e: Placed | Paid) -> None:
        match e:
            case Placed():
                self.cents = e.cents
            case Paid():
                self.is_paid = True


def shop(url: str, *, version: int = 1, switch: Any = "auto", batch: bool = False) -> App:
    app = App(url)
    app.process(Payment, retry=Retry(3, "1h"))
    app.knows(Reminded)

    @app.on(group="ledger", retry=Retry(3, "1h"))
    async def ledger(e: Cancelled) -> None:
        pass

    def add(e: Placed, db: Db) -> None:
        db.execute(
            "insert into {paid} values (?, ?) on conflict do update set cents = cents + excluded.cents", (e.customer, e.cents)
        )

    def add_all(es: list[Placed], db: Db) -> None:
        for e in es:
            add(e, db)

    app.projection(tables=TABLES, version=version, switch=switch, name="paid", retry=Retry(3, "1h"))(add_all if batch else add)
    return app


async def rows(app: App) -> list[tuple[Any, ...]]:
    return await app.db("select * from paid order by customer")


@pytest.mark.parametrize("batch", [False, True])
def test_projections_and_processes_are_quiet_too(url: str, batch: bool) -> None:
    app = shop(url, batch=batch)

    async def main() -> None:
        async with simulated(app) as world:
            for n in range(20):
                await world.publish(Placed(f"o{n}", f"c{n % 2}", 100))
            await world.settle()
            assert await rows(app) == [("c0", 1000), ("c1", 1000)]
            assert len(await world.timers()) == 20
            await world.publish(Paid("o0"))
            await world.settle()
            assert len(await world.timers()) == 19
            await world.advance("7d")
            assert len(await world.published(Reminded)) == 19
            await world.advance("14d")
            assert await world.timers() == []
            assert sorted({e.order for e in await world.published(Cancelled)}) == sorted(f"o{n}" for n in range(1, 20))
            assert await app.processes("payment") == []

    run(main())


def test_a_decision_is_followed_by_all_that_comes_of_it(url: str) -> None:
    app = shop(url)

    async def main() -> None:
        async with simulated(app) as world:
            async with app.edit(Order, "o1") as order:
                order.place("c1", 250)
            await world.advance("8d")
            await app.decide(Order, "o1", lambda o: o.pay())
            await world.advance("30d")
            assert await world.published() == [Placed("o1", "c1", 250), Reminded("o1", 1), Paid("o1")]
            assert await rows(app) == [("c1", 250)]

    run(main())


def test_a_process_breaks_like_a_handler(url: str) -> None:
    app = shop(url)

    async def main() -> None:
        async with simulated(app) as world:
            world.fail(Payment, error=OSError("down"))
            world.crash_after(Payment)
            await world.duplicate(Payment)
            world.lose_lease("process.payment")
            await world.publish(Placed("o1", "c1", 1))
            await world.settle()
            assert [held.attempt for held in await world.held(Payment)] == [2]
            await world.advance("1h")
            assert await world.held(Payment) == []
            assert [timer.envelope.key for timer in await world.timers()] == ["o1"]
            await world.advance("7d")
            assert await world.published(Reminded) == [Reminded("o1", 1)]

    run(main())


@pytest.mark.parametrize("batch", [False, True])
def test_a_projection_breaks_like_a_handler_and_counts_once(url: str, batch: bool) -> None:
    app = shop(url, batch=batch)

    async def main() -> None:
        async with simulated(app) as world:
            await world.settle()
            world.fail("paid", error=OSError("down"))
            world.crash_after("paid")
            await world.duplicate("paid")
            world.lose_lease("paid")
            await world.publish(Placed("o1", "c1", 100))
            await world.settle()
            assert await rows(app) == []
            assert ["OSError: down" in held.error for held in await world.held("paid")] == [True]
            await world.advance("1h")
            assert await rows(app) == [("c1", 100)]
            assert await world.held("paid") == []

    run(main())


def test_a_new_version_is_built_and_shown_before_it_is_quiet(file_url: str) -> None:
    async def main() -> None:
        async with simulated(shop(file_url)) as world:
            for n in range(300):
                await world.publish(Placed(f"o{n}", "c1", 1))
            await world.settle()
        app = shop(file_url, version=2)
        async with simulated(app) as world:
            await world.settle()
            [status] = await app.projections()
            assert [(build.state, build.version) for build in status.builds] == [("old", 1), ("live", 2)]
            assert await rows(app) == [("c1", 300)]

    run(main())


def test_a_version_that_waits_behind_a_held_record_is_shown_when_that_is_done(url: str) -> None:
    app = shop(url)

    async def main() -> None:
        async with simulated(app) as world:
            await world.publish(Placed("o0", "c1", 1))
            await world.settle()
            world.fail("paid")
            await world.publish(Placed("o1", "c1", 1))
            await world.settle()
            await app.rebuild("paid")
            await world.settle()  # ready, and waits for switch()
            [status] = await app.projections()
            assert [build.state for build in status.builds] == ["live", "ready"]
            await world.advance("1h")
            [compared] = await app.compare("paid")
            assert (compared.only_live, compared.only_next) == (0, 0)
            await app.switch("paid")
            await world.settle()
            await world.publish(Placed("o2", "c1", 1))
            await world.settle()
            assert await rows(app) == [("c1", 3)]

    run(main())


def test_a_fault_of_a_projection_waits_for_the_next_build_too(url: str) -> None:
    app = shop(url)

    async def main() -> None:
        async with simulated(app) as world:
            await world.settle()
            world.fail("paid")
            await app.rebuild("paid")
            await world.settle()
            await app.switch("paid")
            await world.settle()
            await world.publish(Placed("o1", "c1", 1))
            await world.settle()
            assert len(await world.held("paid")) == 1
            await world.advance("1h")
            assert await rows(app) == [("c1", 1)]

    run(main())


def test_a_paused_projection_has_nothing_to_do(url: str) -> None:
    app = shop(url)

    async def main() -> None:
        async with simulated(app) as world:
            await world.settle()
            await app.pause("paid")
            await world.settle()
            await world.publish(Placed("o1", "c1", 1))
            await world.settle()
            assert await rows(app) == []
            await app.resume("paid")
            await world.settle()
            assert await rows(app) == [("c1", 1)]

    run(main())


def test_the_function_of_a_projection_is_enough_to_begin_with() -> None:
    app = App("memory://")

    @app.projection(tables=TABLES)
    def paid(es: list[Placed], db: Db) -> None:
        db.executemany("insert or replace into {paid} values (?, ?)", [(e.customer, e.cents) for e in es])

    given(paid, Placed("o1", "c1", 5), Placed("o2", "c1", 7)).twice().then(paid=[("c1", 7)])


def test_the_same_process_without_a_log() -> None:
    placed = Placed("o1", "c1", 5)
    given(Payment, placed).waits("late", "7d").after("7d").then(Reminded("o1", 1)).after("7d").then(Reminded("o1", 2)).after(
        "7d"
    ).then(Cancelled("o1"), ended)
    given(Payment, placed).after("8d").when(Paid("o1")).then(ended)
    given(Order, "o1", placed).when(lambda o: o.pay()).then(Paid("o1")).has(is_paid=True)
    given(Order, "o1", placed, Paid("o1")).when(lambda o: o.pay()).rejects(ValueError, "nothing to pay")
