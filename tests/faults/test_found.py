"""What the faults have found, each in its smallest form."""

import asyncio
from collections.abc import Sequence

from trilogue.brokers.kafka import lane
from trilogue.brokers.kafka.lanes import Lanes
from trilogue.events import Delivery, Group, InTransaction, Record, Settlement, caused_id, derived_id, new_id
from trilogue.ports import Db, Place
from trilogue.stores import open_store


def record(offset: int, id: str | None = None, key: str = "k") -> Record:
    return Record(id or str(offset), "step.taken", b"{}", key, position=offset, topic="t", partition=0)


def test_a_lane_that_is_about_to_go_does_not_get_past_what_is_dropped() -> None:
    """Records that waited were dropped while a partition was drained, and one nobody wanted behind them moved its place on."""
    lanes = Lanes("g")
    lanes.add({("t", 0): lane.Place(10)}, lambda: 0)
    (ours,) = lanes.all()
    lanes.put([Delivery(record(10), "g", ours.lease), (ours, 12)])
    lanes.drain([ours], 0.0, lambda: False)
    assert lanes.take(10) == []
    assert ours.place() == lane.Place(10)


def test_what_an_event_led_to_has_one_id_wherever_it_is_delivered() -> None:
    """RabbitMQ does not tell when it took a message: ids made from that differed with every delivery."""
    id = new_id()
    assert caused_id(id, "g", 0) == caused_id(id, "g", 0)
    assert caused_id(id, "g", 0)[:13] == id[:13]  # of the same millisecond, so that an index of ids grows at its end
    assert caused_id("order-7", "g", 0) == derived_id(0, "order-7", "g", 0)
    assert caused_id("order-7", "g", 0) != caused_id("order-7", "g", 1)


def test_one_event_twice_in_one_settlement_has_one_effect() -> None:
    """An event that was published again stands beside itself: in the next settlement of the key, or in the same batch."""

    async def main() -> None:
        store = open_store("memory://")
        await store.open()
        await store.bind([Group("g", ("#",), inbox=True, has_effects=True)], work=False)
        await store.transact(lambda tx: tx.execute("create table seen (id text)"))
        one, again, other = (Delivery(record(n, id), "g", None) for n, id in ((1, "a"), (2, "a"), (3, "b")))

        finished: list[Delivery] = []

        def placed(deliveries: Sequence[Delivery]) -> list[Place]:
            finished.extend(deliveries)
            return []

        def effect(*deliveries: Delivery) -> InTransaction:
            def run(db: Db) -> list[Settlement]:
                db.executemany("insert into seen values (?)", [(each.record.id,) for each in deliveries])
                return [Settlement(each) for each in deliveries]

            return InTransaction(deliveries, run, lambda error: [Settlement(each, "dead") for each in deliveries])

        taken = await store.inbox.settle("g", [effect(one), effect(again)], seen=True)
        assert [each.verdict for each in taken.settlements] == ["done", "done"]
        third, fourth = Delivery(record(4, "c", "x"), "g", None), Delivery(record(5, "c", "x"), "g", None)
        taken = await store.inbox.settle("g", [effect(other, third, fourth)], seen=True, places=placed)
        assert ([each.delivery for each in taken.settlements], taken.again) == ([fourth], [other, third])
        assert finished == [fourth]  # a place beyond what comes again would lose it
        await store.inbox.settle("g", [effect(other, third)], seen=True)
        assert [id for (id,) in await store.query("select id from seen order by id")] == ["a", "b", "c"]
        await store.close()

    asyncio.run(main())
