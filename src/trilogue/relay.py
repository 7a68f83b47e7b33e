"""From one log to another: claim ──▶ publish, confirmed ──▶ settle. Order per key is kept whatever fails on the way.

FROM  k1 k2 k3 ──publish──▶ k1 ✓  k2 ?  k3 ✓          again from the first of a key that is not known to be there:
                            k2 ✓  k3 ✓                 k3 comes once more, after k2
      settled: done; what the other log refuses for good is a dead letter

A store beside a broker is relayed to it so: what aggregates, timers and settlements put on the store's log is for handlers on
the broker (brokers/paired.py). `trilogue relay FROM TO` does it between any two logs.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from trilogue.errors import Conflict, LogError, Rejected, StorageFull, TrilogueError, Unavailable
from trilogue.events import Delivery, Envelope, Receipt, Settlement
from trilogue.ports import Store

RELAY = "trilogue.relay"
RELAY_RECORDS = 1_000
CLAIM_WAIT_S = 60.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 2.0
GIVE_UP_S = 30.0
BACKOFF_S = 1.0
VIA = "relayedfrom"

log = logging.getLogger("trilogue")
Outcome = Receipt | TrilogueError
Publish = Callable[[Sequence[Envelope]], Awaitable[Sequence[Outcome]]]


async def confirmed(publish: Publish, envelopes: Sequence[Envelope], *, lost: Callable[[int], bool]) -> list[Outcome]:
    """Publish until each is there or refused for good; one outcome each. Of a key, the last that comes is in order.

    lost: whether the nth is no longer ours to publish. What is not there after 30 s, or lost, has the error it had last.
    """
    outcomes: list[Outcome] = [LogError("not published")] * len(envelopes)
    left, wait_s, until = list(range(len(envelopes))), FIRST_WAIT_S, time.monotonic() + GIVE_UP_S
    while left:
        for n, outcome in zip(left, await _outcomes(publish, [envelopes[n] for n in left]), strict=True):
            outcomes[n] = outcome
        left = [n for n in _again(envelopes, left, outcomes) if not lost(n)]
        if not left or time.monotonic() > until:
            break
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 2, LONGEST_WAIT_S)
    return outcomes


async def _outcomes(publish: Publish, envelopes: Sequence[Envelope]) -> Sequence[Outcome]:
    """One outcome each, also of a log that takes all or none."""
    try:
        return await publish(envelopes)
    except (Conflict, Rejected) as error:
        if len(envelopes) == 1:
            return [error]
        return [outcome for envelope in envelopes for outcome in await _outcomes(publish, [envelope])]
    except LogError as error:
        return [error] * len(envelopes)
    except Exception as error:  # whatever it is: deliveries that nobody settles would be out for ever
        return [Unavailable(f"{type(error).__qualname__}: {error}")] * len(envelopes)


def is_refused(outcome: Outcome) -> bool:
    """Whether publishing it again would be refused again."""
    return isinstance(outcome, (Rejected, Conflict)) and not isinstance(outcome, StorageFull)


def _again(envelopes: Sequence[Envelope], tried: Sequence[int], outcomes: Sequence[Outcome]) -> list[int]:
    """What has to be published again: what is not there, and what came after that of its key."""
    again: list[int] = []
    keys: set[str] = set()
    for n in tried:
        key = envelopes[n].key
        if is_refused(outcomes[n]) or (isinstance(outcomes[n], Receipt) and key not in keys):
            continue
        again.append(n)
        if key is not None:
            keys.add(key)
    return again


class Relay:
    """Passes on what a group of one log reads, until stopped. publish: puts it on the other one.

    name: of where it comes from, marked on what is passed on, and what came from `back` is not passed on: two relays in
    opposite directions end. Without a name nothing is marked. passed: how many so far; of_streams: how many of them stood in
    a stream, which they do not on the other log.
    """

    def __init__(self, source: Store, group: str, publish: Publish, *, name: str = "", back: str = "") -> None:
        self._source, self._group, self._publish = source, group, publish
        self._name, self._back = name, back
        self.passed = self.of_streams = 0

    async def run(self) -> None:
        """Relay, until cancelled; what is in hand then is handed back by the source's leave()."""
        while True:
            try:
                await self.once(wait_s=CLAIM_WAIT_S)
            except Exception as error:  # whatever it is: a relay that ends in silence is worse than one that tries again
                log.warning("relay %s: trying again in %.0f s: %s", self._group, BACKOFF_S, error)
                await asyncio.sleep(BACKOFF_S)

    async def once(self, *, wait_s: float) -> int:
        """Pass on what can be claimed within `wait_s`; returns how many it was."""
        deliveries = await self._source.claim(self._group, limit=RELAY_RECORDS, wait_s=wait_s)
        if not deliveries:
            return 0
        onward = [delivery for delivery in deliveries if not self._came_back(delivery)]
        envelopes = [self._marked(delivery.record) for delivery in onward]
        outcomes = await confirmed(self._publish, envelopes, lost=lambda n: onward[n].lease.lost)
        settlements = [_settlement(delivery, outcome) for delivery, outcome in zip(onward, outcomes, strict=True)]
        settlements += [Settlement(delivery) for delivery in deliveries if self._came_back(delivery)]
        await self._source.settle(self._group, settlements)
        there = [delivery.record for delivery, outcome in zip(onward, outcomes, strict=True) if isinstance(outcome, Receipt)]
        self.passed += len(there)
        self.of_streams += sum(record.stream is not None for record in there)
        return len(deliveries)

    def _came_back(self, delivery: Delivery) -> bool:
        return bool(self._back) and self._back in _via(delivery.record)

    def _marked(self, envelope: Envelope) -> Envelope:
        """The envelope alone, with where it has been."""
        values = {name: getattr(envelope, name) for name in Envelope.__struct_fields__}
        if self._name:
            values["extensions"] = {**(envelope.extensions or {}), VIA: " ".join([*_via(envelope), self._name])}
        return Envelope(**values)


def _via(envelope: Envelope) -> list[str]:
    return str((envelope.extensions or {}).get(VIA, "")).split()


def _settlement(delivery: Delivery, outcome: Outcome) -> Settlement:
    if isinstance(outcome, Receipt):
        return Settlement(delivery)
    if is_refused(outcome):
        return Settlement(delivery, "dead", error=f"it could not be relayed: {outcome}")
    return Settlement(delivery, "retry", round(BACKOFF_S * 1_000_000), charged=False, error=f"it is not relayed yet: {outcome}")
