"""What the promises are written with.

make_store ──▶ Bench.open() ──▶ stores on one log, all closed at the end
               Bench.crash()    a kill -9: nothing is handed back, nothing renewed
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

from trilogue.errors import TrilogueError
from trilogue.events import Delivery, Envelope, Group, InTransaction, Settlement, new_id, now_us
from trilogue.ports import Db, Feature, Store

WITHIN_S = 30.0
TOGETHER_S = 1.0
MakeStore = Callable[[], Store]
Verdict = Literal["done", "retry", "dead", "release"]


class Broken(AssertionError):
    """A promise was not kept; the message says which fact was expected."""


class Skipped(Exception):
    """The store does not list a Feature the promise needs."""


@dataclass(frozen=True, slots=True)
class Promise:
    """One promise: its sentence, what a store must list for it to hold, and its proof."""

    name: str
    text: str
    needs: frozenset[Feature]
    prove: Callable[[MakeStore], Awaitable[None]]

    async def keep(self, make_store: MakeStore) -> None:
        """Prove it on an empty log; raises Broken, or Skipped naming the Features that are missing."""
        missing = self.needs - make_store().features
        if missing:
            raise Skipped(", ".join(sorted(missing)))
        await self.prove(make_store)


PROMISES: list[Promise] = []


def promise(*needs: Feature) -> Callable[[Callable[[MakeStore], Awaitable[None]]], Callable[[MakeStore], Awaitable[None]]]:
    """Add an async function of make_store to PROMISES; the first line of its docstring is the promise."""

    def add(prove: Callable[[MakeStore], Awaitable[None]]) -> Callable[[MakeStore], Awaitable[None]]:
        text = (prove.__doc__ or "").strip().partition("\n")[0]
        PROMISES.append(Promise(prove.__name__.removeprefix("promise_"), text, frozenset(needs), prove))
        return prove

    return add


def expect(holds: bool, fact: str) -> None:
    """Raise Broken with the expected fact; not an `assert`, which python -O removes."""
    if not holds:
        raise Broken(fact)


def same(got: object, expected: object, what: str) -> None:
    """Raise Broken, showing both, unless they are equal."""
    expect(got == expected, f"{what}: expected {expected!r}, got {got!r}")


async def raises(error: type[TrilogueError], doing: Awaitable[Any], what: str) -> TrilogueError:
    """Await something that must fail with this error."""
    try:
        await doing
    except error as raised:
        return raised
    raise Broken(f"{what}: expected {error.__name__}, nothing was raised")


async def until(look: Callable[[], Awaitable[bool]], what: str, *, within_s: float = WITHIN_S) -> None:
    """Ask again and again until the answer is yes."""
    end = time.monotonic() + within_s
    while not await look():
        expect(time.monotonic() < end, f"{what}, within {within_s:.0f} s")
        await asyncio.sleep(0.01)


class Bench:
    """The stores of one proof, all on one log.

    async with Bench(make_store) as bench:
        store = await bench.open(GROUP)
    """

    def __init__(self, make_store: MakeStore) -> None:
        self._make = make_store
        self._open: list[Store] = []

    async def __aenter__(self) -> "Bench":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for store in reversed(self._open):
            with contextlib.suppress(TrilogueError):
                await store.close()

    async def open(self, *groups: Group, work: bool = True) -> Store:
        """A store, opened, working for these groups."""
        store = self._make()
        await store.open()
        self._open.append(store)
        if groups:
            await self.bind(store, *groups, work=work)
        return store

    async def bind(self, store: Store, *groups: Group, work: bool = True) -> None:
        """Let a store work for groups, from the beginning where there is one: a queue has none before it is declared."""
        if Feature.REPLAY not in store.features:
            groups = tuple(replace(each, start="now") if each.start == "beginning" else each for each in groups)
        await store.bind(groups, work=work)

    async def close(self, store: Store) -> None:
        """Close one in an orderly way."""
        self._open.remove(store)
        await store.close()

    async def crash(self, store: Any) -> None:
        """What a kill -9 leaves of a store: nothing is handed back and its lease is not renewed. The object stays, as a zombie.

        An adapter of its own offers this as a coroutine method `crash`.
        """
        if hasattr(store, "crash"):
            await store.crash()
            return
        # Reached into, because a product with a method that kills its store would be a loaded gun.
        if hasattr(store, "broker"):
            await _cancelled(*store._tasks, *(task for reader in store._readers.values() for task in reader._loops))
            await _cut_off(store.broker)
            store = store.store
        await _cancelled(store._watching)
        store._db.writer._tick = None


async def _cut_off(broker: Any) -> None:
    """What a broker sees of a client that was killed: nothing more is acknowledged or committed, nothing is said."""
    if hasattr(broker, "_members"):
        for member in broker._members.values():
            member._lanes.forget(member._lanes.all())
            await member.stop()
        return
    for kept in (broker._writing, broker._reading):
        link = await kept.stop()
        if link is not None:
            link._transport.abort()


async def _cancelled(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def group(name: str = "readers", *patterns: str, ordered: bool = True, has_effects: bool = False) -> Group:
    """A group that reads from the beginning."""
    return Group(name, patterns or ("#",), ordered, "beginning", has_effects=has_effects)


def any_group(make_store: MakeStore, name: str = "readers", *patterns: str) -> Group:
    """A group that reads from the beginning, in order where the store keeps it: for what does not depend on it."""
    return group(name, *patterns, ordered=Feature.ORDER in make_store().features)


def envelope(n: int = 0, key: str | None = None, *, kind: str = "thing.made", id: str | None = None) -> Envelope:
    """An envelope whose data is the number."""
    return Envelope(id or new_id(), kind, str(n).encode(), key, time_us=now_us())


def number(delivery: Delivery) -> int:
    """The number an envelope was made with."""
    return int(delivery.record.data)


def numbers(deliveries: Iterable[Delivery]) -> list[int]:
    """The numbers, in order of delivery."""
    return [number(delivery) for delivery in deliveries]


async def take(store: Store, name: str, count: int, *, within_s: float = WITHIN_S) -> list[Delivery]:
    """Claim until so many deliveries are out; none of them is answered."""
    taken: list[Delivery] = []
    end = time.monotonic() + within_s
    more_until = time.monotonic() + TOGETHER_S
    while len(taken) < count:
        expect(time.monotonic() < end, f"group {name!r}: {count} deliveries within {within_s:.0f} s, got {numbers(taken)}")
        claimed = await store.claim(name, limit=count - len(taken), wait_s=0.1)
        taken += claimed
        if claimed:
            more_until = time.monotonic() + TOGETHER_S
        elif taken and time.monotonic() > more_until:
            # A server delivers bit by bit, and the rest of a key waits for its beginning: handed back, they come as one.
            await answer(store, taken, "release")
            taken = []
    return taken


async def none_left(store: Store, name: str, what: str) -> None:
    """A claim now lends nothing."""
    same(numbers(await store.claim(name, limit=100, wait_s=0.05)), [], what)


async def answer(store: Store, deliveries: Sequence[Delivery], verdict: Verdict = "done", **more: Any) -> list[Delivery]:
    """Settle all of them alike; those whose lease was lost come back."""
    if not deliveries:
        return []
    return await store.settle(deliveries[0].group, [Settlement(delivery, verdict, **more) for delivery in deliveries])


async def drain(store: Store, name: str, count: int, *, within_s: float = WITHIN_S) -> list[Delivery]:
    """Claim and finish, one claim after the other, until so many are done."""
    finished: list[Delivery] = []
    end = time.monotonic() + within_s
    while len(finished) < count:
        expect(time.monotonic() < end, f"group {name!r}: {count} deliveries in {within_s:.0f} s, got {len(finished)}")
        deliveries = await store.claim(name, limit=1_000, wait_s=0.1)
        lost = await answer(store, deliveries)
        finished += [delivery for delivery in deliveries if delivery not in lost]
    return finished


def effect(delivery: Delivery, write: Callable[[Db], object], *, limit_us: int = 250_000, after_us: int = 0) -> InTransaction:
    """A delivery handled inside its settlement; if that fails it is retried after `after_us`."""

    def run(db: Db) -> list[Settlement]:
        write(db)
        return [Settlement(delivery)]

    return InTransaction([delivery], run, lambda error: [Settlement(delivery, "retry", after_us, error=str(error))], limit_us)


async def is_idle(store: Store, *names: str) -> bool:
    """Whether these groups have nothing left to do."""
    return await store.idle(names)
