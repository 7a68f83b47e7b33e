"""One group in the place of another, as a projection's new build takes over: nothing twice, nothing left out."""

from dataclasses import replace

from trilogue.conformance.tools import (
    Bench,
    MakeStore,
    answer,
    drain,
    envelope,
    expect,
    group,
    none_left,
    number,
    promise,
    raises,
    same,
    take,
    until,
)
from trilogue.errors import UnknownEvent
from trilogue.ports import Feature, Store


@promise(Feature.PROJECTIONS)
async def promise_a_successor_is_quiet_where_the_other_was(make_store: MakeStore) -> None:
    """A group in the place of another replays what that one had finished beyond its start; what was still out there is lost."""
    async with Bench(make_store) as bench:
        store = await bench.open(group("old", has_effects=True))
        await store.append([envelope(n, f"k{n % 3}") for n in range(6)])
        await drain(store, "old", 6)
        same(await store.finished_to("old"), 6, "up to where the old group has read")
        await store.append([envelope(n, f"k{n % 3}") for n in range(6, 9)])
        out = await take(store, "old", 3)
        same(await store.finished_to("old"), 6, "the same while records are out")
        same(await store.transact(lambda tx: tx.group_reached("old")), 6, "the same in a transaction")
        young = group("young", has_effects=True)
        await store.transact(lambda tx: tx.start_group(young, 4, instead_of="old"))
        lost = await answer(store, out)
        same(sorted(number(delivery) for delivery in lost), [6, 7, 8], "what was out of the old group")
        await store.bind([replace(young, start="existing")])
        found = {number(d): d.replay for d in await drain(store, "young", 5)}
        same(found, {4: True, 5: True, 6: False, 7: False, 8: False}, "what the young group reads, and whether quietly")
        same([each.name for each in (await store.status()).groups], ["young"], "groups")
        await raises(UnknownEvent, store.finished_to("old"), "the old group is gone")
        await raises(UnknownEvent, store.transact(lambda tx: tx.group_reached("old")), "the same in a transaction")
        await store.transact(lambda tx: tx.drop_group("young"))
        same(list((await store.status()).groups), [], "groups after the last one was dropped")
        await raises(UnknownEvent, store.transact(lambda tx: tx.drop_group("young")), "dropping it again")


@promise(Feature.PROJECTIONS)
async def promise_binding_an_existing_group_makes_none(make_store: MakeStore) -> None:
    """A worker that binds a group which has gone makes no new one; where it is there, it is paused and held for as usual."""
    async with Bench(make_store) as bench:
        readers = replace(group("readers", has_effects=True), start="existing")
        store = await bench.open(readers)
        await store.append([envelope(0, "k")])
        await none_left(store, "readers", "nothing is lent of a group that is not there")
        same(await store.transact(lambda tx: tx.group_held("readers")), None, "what is held for no group")
        await store.transact(lambda tx: tx.start_group(readers, 0, paused=True))
        await store.bind([readers])
        await none_left(store, "readers", "nothing is lent of a group that begins paused")
        await store.transact(lambda tx: tx.pause_group("readers", False))
        await answer(store, await take(store, "readers", 1), "dead", park=True)
        same(await store.transact(lambda tx: tx.group_held("readers")), (0, 1), "what is held: ready and parked")
        await store.transact(lambda tx: tx.drop_held("readers", 1))
        await until(lambda: _is_free(store), "a dropped record holds nothing up")
        expect(not await store.dead("readers"), "and is no dead letter")


async def _is_free(store: Store) -> bool:
    return await store.transact(lambda tx: tx.group_held("readers")) == (0, 0)
