"""Which deliveries of a broker may be out now: one claim per key, in the order of their lane. Pure: no clock, no I/O.

    receive ──admit──▶ a: [k1 k2 k3]   ──take──▶ k1 out          what follows of a waits until k1 is answered
                       b: [k4]                   k4 out
                       c: [k5]         ──check─▶ c has held rows in the store: is that still so? k5 joins them, or may go

A key is in one of four places: idle (not here), ready (in the queue, its deliveries may go), out (lent, or being looked up in
the store), or waiting for what is out. `held` are the keys that have rows in the store as far as is known: too many of them
cost a look each, one too few would let a record overtake, so whoever adds rows says so here before the key is free.

Deliveries carry their number in `span`: what is given back goes in front of what came after it.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence

from trilogue.events import Delivery

WAITING_PER_KEY = 1_000
WAITING_RECORDS = 8_000
WAITING_BYTES = 32 << 20


class Key:
    """One key that has something here. out: lent or being looked up. queued: in the queue of those that may go."""

    __slots__ = ("out", "queued", "waiting")

    def __init__(self) -> None:
        self.out = 0
        self.queued = False
        self.waiting: list[Delivery] = []


class KeyedGate:
    """The gate for what one group received here.

    held: keys that have rows in the store. out: how many deliveries are lent. waiting: how many are here and not lent.
    """

    def __init__(self, *, ordered: bool) -> None:
        self.ordered = ordered
        self.held: set[str] = set()
        self.out = 0
        self.waiting = 0
        self._bytes = 0
        self._crowded = 0
        self._number = 0
        self._keys: dict[str, Key] = {}
        self._ready: deque[str | Delivery] = deque()
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
                self._ready.append(delivery)
                continue
            key = self._keys.get(name)
            if key is None:
                key = self._keys[name] = Key()
            key.waiting.append(delivery)
            self._crowded += len(key.waiting) == WAITING_PER_KEY
            if not (key.out or key.queued):
                self._queue(name, key)

    def _queue(self, name: str, key: Key) -> None:
        key.queued = True
        (self._to_check if name in self.held else self._ready).append(name)

    @property
    def is_full(self) -> bool:
        """Whether nothing more may be received: what waits for its key, or for a handler, is bounded."""
        return self._crowded > 0 or self.waiting >= WAITING_RECORDS or self._bytes >= WAITING_BYTES

    @property
    def ready(self) -> int:
        """How many keys, and deliveries without order, may go."""
        return len(self._ready)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is here and nothing is lent."""
        return not (self.waiting or self.out)

    # ── lending ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, limit: int) -> list[Delivery]:
        """Lend up to `limit` deliveries, those of a key together."""
        taken: list[Delivery] = []
        while self._ready and len(taken) < limit:
            entry = self._ready.popleft()
            if not isinstance(entry, str):
                self._leaves((entry,))
                if not entry.lease.revoked:
                    self.out += 1
                    taken.append(entry)
            elif entry in self.held:  # learnt since it was queued
                self._to_check.append(entry)
            else:
                run = self._run_of(entry, limit - len(taken))
                self.out += len(run)
                taken += run
        return taken

    def _run_of(self, name: str, limit: int) -> list[Delivery]:
        """The first deliveries of a key that is in the queue; it is out with them."""
        key = self._keys[name]
        key.queued = False
        if key.out:  # a held record of it was lent meanwhile
            return []
        self._drop_revoked_of(key)
        run, rest = key.waiting[:limit], key.waiting[limit:]
        self._keep(key, rest, run)
        key.out = len(run)
        if not run:
            self._settle_down(name, key)
        return run

    def _drop_revoked_of(self, key: Key) -> None:
        gone = [delivery for delivery in key.waiting if delivery.lease.revoked]
        if gone:
            self._keep(key, [delivery for delivery in key.waiting if not delivery.lease.revoked], gone)

    def _keep(self, key: Key, rest: list[Delivery], gone: Sequence[Delivery]) -> None:
        """What waits of a key becomes less."""
        self._crowded -= len(key.waiting) >= WAITING_PER_KEY > len(rest)
        key.waiting = rest
        self._leaves(gone)

    def _leaves(self, deliveries: Sequence[Delivery]) -> None:
        self.waiting -= len(deliveries)
        self._bytes -= sum(len(delivery.record.data) for delivery in deliveries)

    def lend_held(self, delivery: Delivery) -> bool:
        """A held record of the store is to be lent: its key is out with it; False if the key is out already."""
        name = delivery.record.key
        if name is not None and self.ordered:
            key = self._keys.get(name)
            if key is not None and key.out:
                return False
            self.held.add(name)
        return True

    def held_out(self, deliveries: Iterable[Delivery]) -> None:
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
        if name is None or not self.ordered:
            return
        key = self._keys[name]
        key.out -= 1
        if not key.out:
            self._settle_down(name, key)

    def give_back(self, delivery: Delivery) -> None:
        """A lent delivery goes back to where it was, in front of what came after it; nothing, if its lane is lost."""
        if not delivery.lease.revoked:
            self._return(delivery)
        self.finish(delivery)

    def _return(self, delivery: Delivery) -> None:
        self.waiting += 1
        self._bytes += len(delivery.record.data)
        name = delivery.record.key
        if name is None or not self.ordered:
            self._ready.appendleft(delivery)
            return
        key = self._keys[name]
        insort(key.waiting, delivery, key=_number)
        self._crowded += len(key.waiting) == WAITING_PER_KEY

    def _settle_down(self, name: str, key: Key) -> None:
        """Nothing of a key is out: what waits may go, or there is nothing left."""
        if key.queued:
            return
        if key.waiting:
            self._queue(name, key)
        else:
            del self._keys[name]

    # ── what is looked up in the store ───────────────────────────────────────────────────────────────────────────────

    def learn(self, names: Iterable[str]) -> None:
        """These keys have rows in the store."""
        self.held.update(names)

    @property
    def has_checks(self) -> bool:
        """Whether something waits to be looked up."""
        return bool(self._to_check)

    def begin_checks(self, limit: int) -> list[Delivery]:
        """Deliveries whose keys may be held, to be looked up and answered with finish() or give_back(); they count as lent."""
        found: list[Delivery] = []
        while self._to_check and len(found) < limit:
            run = self._run_of(self._to_check.popleft(), limit - len(found))
            self.out += len(run)
            found += run
        return found

    def not_held(self, name: str) -> None:
        """The store has no rows of a key any more."""
        self.held.discard(name)

    def drop_revoked(self) -> None:
        """Forget what came from lanes that are lost: it comes again."""
        for key in self._keys.values():
            self._drop_revoked_of(key)  # one that is in the queue stays there: it is found empty
        loose = [entry for entry in self._ready if not isinstance(entry, str) and entry.lease.revoked]
        if loose:
            self._leaves(loose)
            gone = {entry.span for entry in loose}
            self._ready = deque(entry for entry in self._ready if isinstance(entry, str) or entry.span not in gone)

    def clear(self) -> list[Delivery]:
        """Everything that is here and not lent, in order; nothing of it is here any more."""
        found_loose = [entry for entry in self._ready if not isinstance(entry, str)]
        found = list(found_loose)
        for key in self._keys.values():
            found += key.waiting
            self._keep(key, [], key.waiting)
        self._leaves(found_loose)
        self._ready = deque(entry for entry in self._ready if isinstance(entry, str))
        return sorted(found, key=_number)


def _number(delivery: Delivery) -> int:
    number: int = delivery.span
    return number
