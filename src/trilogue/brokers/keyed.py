"""Which deliveries of a broker may be out now: one claim per key, in the order of their lane. Pure: no clock, no I/O.

    receive ──admit──▶ ready    k1(a) k2(b) k4(c)   ──take──▶ out      in the order in which they came
                       waiting  a: k3                                  until what is out of a is answered
                       check    d: k5               ──────▶ store      d has held rows there: is that still so?

`held` are the keys that have rows in the store as far as is known: too many of them cost a look each, one too few would let a
record overtake, so whoever adds rows says so here before the key is free.

Deliveries carry their number in `span`: what is given back goes in front of what came after it.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush

from trilogue.events import Delivery

WAITING_PER_KEY = 1_000
WAITING_RECORDS = 8_000
WAITING_BYTES = 32 << 20


class Key:
    """One key that has something here. out: lent or looked up. ready: of it in the queue. checking: to be looked up."""

    __slots__ = ("checking", "out", "ready", "waiting")

    def __init__(self) -> None:
        self.out = 0
        self.ready = 0
        self.checking = False
        self.waiting: list[Delivery] = []


class KeyedGate:
    """The gate for what one group received here.

    held: keys that have rows in the store. out: how many deliveries are lent. waiting: how many are here and not lent.
    """

    def __init__(self, *, ordered: bool) -> None:
        self.ordered = ordered
        self.held: set[str] = set()
        self._learnt: set[str] = set()
        self.out = 0
        self.waiting = 0
        self._bytes = 0
        self._crowded = 0
        self._number = 0
        self._most = 1
        self._keys: dict[str, Key] = {}
        self._ready: list[tuple[int, Delivery]] = []  # a heap
        self._to_check: deque[str] = deque()

    # ── what came ────────────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, deliveries: Iterable[Delivery]) -> None:
        """Take deliveries in the order of their lanes."""
        for delivery in deliveries:
            self._number += 1
            delivery.span = self._number
            self.waiting += 1
            self._bytes += len(delivery.record.data)
            name = delivery.record.key
            if name is None or not self.ordered:
                heappush(self._ready, (self._number, delivery))
                continue
            key = self._keys.get(name)
            if key is None:
                key = self._keys[name] = Key()
            if key.out or key.waiting or name in self.held:
                self._wait(key, delivery)
                self._move_on(name, key)
            else:
                key.ready += 1
                heappush(self._ready, (self._number, delivery))

    def _wait(self, key: Key, delivery: Delivery) -> None:
        insort(key.waiting, delivery, key=_number)
        self._crowded += len(key.waiting) == WAITING_PER_KEY

    def _move_on(self, name: str, key: Key) -> None:
        """What waits of a key that is not out may go, or has to be looked up; or there is nothing left of it."""
        if key.out or key.checking or (key.ready and name in self.held):
            return
        if not (key.waiting or key.ready):
            del self._keys[name]
        elif name in self.held:
            key.checking = True
            self._to_check.append(name)
        elif key.waiting:
            # Not more than any claim took so far: what is not taken with the first of its key comes back to wait. But all of it
            # where some is in the queue already, which may be newer than what was given back.
            run = self._cut(key, len(key.waiting) if key.ready else self._most)
            key.ready += len(run)
            for delivery in run:
                heappush(self._ready, (delivery.span, delivery))

    def _cut(self, key: Key, count: int) -> list[Delivery]:
        """The first that wait of a key; they wait no more."""
        run, rest = key.waiting[:count], key.waiting[count:]
        self._crowded -= len(key.waiting) >= WAITING_PER_KEY > len(rest)
        key.waiting = rest
        return run

    @property
    def is_full(self) -> bool:
        """Whether nothing more may be received: what waits for its key, or for a handler, is bounded."""
        return self._crowded > 0 or self.waiting >= WAITING_RECORDS or self._bytes >= WAITING_BYTES

    @property
    def ready(self) -> int:
        """How many deliveries may go."""
        return len(self._ready)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is here and nothing is lent."""
        return not (self.waiting or self.out)

    # ── lending ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, limit: int) -> list[Delivery]:
        """Lend up to `limit` deliveries, in the order in which they came."""
        self._most = max(self._most, limit)
        taken: list[Delivery] = []
        fresh: set[str] = set()
        back: dict[str, Key] = {}
        left = left_bytes = 0
        while self._ready and len(taken) < limit:
            delivery = heappop(self._ready)[1]
            name, revoked = delivery.record.key, delivery.lease.revoked
            if name is not None and self.ordered:
                key = self._keys[name]
                key.ready -= 1
                if revoked or name in self.held or (key.out and name not in fresh):
                    back[name] = key
                    if not revoked:
                        self._wait(key, delivery)
                        continue
                else:
                    fresh.add(name)
                    key.out += 1
            left += 1
            left_bytes += len(delivery.record.data)
            if not revoked:
                taken.append(delivery)
        self.waiting -= left
        self._bytes -= left_bytes
        self.out += len(taken)
        for name, key in back.items():
            self._move_on(name, key)
        return taken

    def _leaves(self, deliveries: Sequence[Delivery]) -> None:
        self.waiting -= len(deliveries)
        self._bytes -= sum(len(delivery.record.data) for delivery in deliveries)

    def may_lend(self, delivery: Delivery) -> bool:
        """Whether a held record of the store may be lent now: not while something else of its key is out here."""
        name = delivery.record.key
        if name is None or not self.ordered:
            return True
        self.learn((name,))
        key = self._keys.get(name)
        return key is None or not key.out

    def lend_held(self, deliveries: Iterable[Delivery]) -> None:
        """These held records are lent."""
        for delivery in deliveries:
            self.out += 1
            name = delivery.record.key
            if name is not None and self.ordered:
                self._keys.setdefault(name, Key()).out += 1

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, delivery: Delivery) -> None:
        """A lent delivery is over: it was done, or is held in the store, whose key then is in `held`."""
        self.out -= 1
        name = delivery.record.key
        if name is not None and self.ordered:
            key = self._keys[name]
            key.out -= 1
            self._move_on(name, key)

    def give_back(self, delivery: Delivery) -> None:
        """A lent delivery goes back to where it was, in front of what came after it; nothing, if its lane is lost."""
        if not delivery.lease.revoked:
            self.waiting += 1
            self._bytes += len(delivery.record.data)
            name = delivery.record.key
            if name is None or not self.ordered:
                heappush(self._ready, (delivery.span, delivery))
            else:
                self._wait(self._keys[name], delivery)
        self.finish(delivery)

    # ── what is looked up in the store ───────────────────────────────────────────────────────────────────────────────

    def learn(self, names: Iterable[str]) -> None:
        """These keys have rows in the store."""
        new = set(names)
        self.held |= new
        self._learnt |= new

    def begin_learning_anew(self) -> None:
        """From now on it is asked which keys have rows: what is learnt meanwhile counts beside the answer."""
        self._learnt.clear()

    def learn_anew(self, names: Iterable[str]) -> None:
        """The answer: these keys have rows, and no others but those learnt since it was asked."""
        self.held = self._learnt | set(names)
        self._learnt.clear()

    @property
    def has_checks(self) -> bool:
        """Whether something waits to be looked up."""
        return bool(self._to_check)

    def begin_checks(self, limit: int) -> list[Delivery]:
        """Deliveries whose keys may be held, to be looked up and answered with finish() or give_back(); they count as lent."""
        found: list[Delivery] = []
        while self._to_check and len(found) < limit:
            name = self._to_check.popleft()
            key = self._keys[name]
            key.checking = False
            if key.out:  # a held record of it was lent meanwhile
                continue
            run = self._cut(key, limit - len(found))
            self._leaves(run)
            key.out = len(run)
            found += run
            self._move_on(name, key)
        self.out += len(found)
        return found

    def not_held(self, name: str) -> None:
        """The store has no rows of a key any more."""
        self.held.discard(name)
        self._learnt.discard(name)

    def drop_lost(self) -> list[Delivery]:
        """Forget what waits here of lanes that are lost; returns what is of lanes only about to go, to be handed back."""
        found = self._remove(lambda delivery: delivery.lease.lost)
        self._leaves(found)
        return [delivery for delivery in found if not delivery.lease.revoked]

    def clear(self) -> list[Delivery]:
        """Everything that is here and not lent, in order; nothing of it is here any more."""
        found = self._remove(lambda _: True)
        self._leaves(found)
        return sorted(found, key=_number)

    def _remove(self, goes: Callable[[Delivery], bool]) -> list[Delivery]:
        found = [delivery for _, delivery in self._ready if goes(delivery)]
        if found:
            self._ready = [entry for entry in self._ready if not goes(entry[1])]
            heapify(self._ready)
        for delivery in found:
            if delivery.record.key is not None and self.ordered:
                self._keys[delivery.record.key].ready -= 1
        for name, key in list(self._keys.items()):
            gone = [delivery for delivery in key.waiting if goes(delivery)]
            if gone:
                rest = [delivery for delivery in key.waiting if not goes(delivery)]
                self._crowded -= len(key.waiting) >= WAITING_PER_KEY > len(rest)
                key.waiting = rest
                found += gone
            self._move_on(name, key)
        return found


def _number(delivery: Delivery) -> int:
    number: int = delivery.span
    return number
