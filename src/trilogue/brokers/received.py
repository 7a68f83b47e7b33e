"""What one process has received for one group of a broker alone, and not answered yet.

receive ──admit──▶ gate ──▶ lent ──▶ finished
                    ▲        │
                    └─ due ◀─┴─ put_by: in hand, to be tried again
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from trilogue.brokers.keyed import KeyedGate
from trilogue.errors import LogError
from trilogue.events import Delivery, Group, Settlement
from trilogue.ports import GroupStatus, LaneStatus

REMEMBERED = 10_000


@dataclass(slots=True)
class Work:
    """What one settlement comes to. lost: their lane went to another process."""

    done: list[Delivery] = field(default_factory=list)
    emitting: list[Settlement] = field(default_factory=list)
    again: list[Settlement] = field(default_factory=list)
    back: list[Delivery] = field(default_factory=list)
    dead: list[Settlement] = field(default_factory=list)
    lost: list[Delivery] = field(default_factory=list)


class Received:
    """One group this process works for: what it has received and not answered.

    in_hand: what is tried again when due. troubled: how many of a key are. attempts: of what was given back, by id, for a
    broker that does not count. publishing: held while emits of an ordered group go out.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.gate = KeyedGate(ordered=group.ordered)
        self.pump: asyncio.Task[None] | None = None
        self.more, self.room = asyncio.Event(), asyncio.Event()  # to be lent; for what is received
        self.error: LogError | None = None
        self.in_hand: dict[int, tuple[Delivery, asyncio.TimerHandle]] = {}
        self.troubled: Counter[str] = Counter()
        self.attempts: dict[str, int] = {}
        self.publishing = asyncio.Lock()
        self.done = self.failed = 0

    def admit(self, deliveries: Sequence[Delivery]) -> None:
        """These were received."""
        for delivery, due in [entry for entry in self.in_hand.values() if entry[0].lease.revoked]:
            due.cancel()
            self.take_up(delivery)
            self.over(delivery)  # or what has come again would wait behind it
        for delivery in deliveries:
            delivery.attempt = max(delivery.attempt, self.attempts.get(delivery.record.id, 1))
        self.gate.admit(deliveries)
        self.wake()

    def remember(self, delivery: Delivery) -> None:
        """This one will come again, for one attempt more."""
        if len(self.attempts) >= REMEMBERED:
            del self.attempts[next(iter(self.attempts))]
        self.attempts[delivery.record.id] = delivery.attempt + 1

    def put_by(self, delivery: Delivery, due: asyncio.TimerHandle) -> None:
        """This one is kept in hand until it is due; its key is out with it."""
        self.in_hand[id(delivery)] = delivery, due
        if delivery.record.key is not None:
            self.troubled[delivery.record.key] += 1

    def take_up(self, delivery: Delivery) -> None:
        """This one is due."""
        del self.in_hand[id(delivery)]
        if delivery.record.key is not None:
            self.troubled -= Counter((delivery.record.key,))  # leaves no zeros behind

    def wake(self) -> None:
        """Something has changed."""
        self.more.set()
        self.room.set()

    def finished(self, delivery: Delivery) -> None:
        """This one is done or dead, for good."""
        self.done += 1
        self.attempts.pop(delivery.record.id, None)
        self.over(delivery)

    def over(self, delivery: Delivery) -> None:
        """This one is not here any more: what follows of its key may go."""
        self.gate.finish(delivery)
        self.wake()

    def back(self, delivery: Delivery) -> None:
        """This one is to be lent again, before what follows of its key."""
        self.gate.give_back(delivery)
        self.wake()

    def is_behind(self, delivery: Delivery) -> bool:
        """Whether a record before it of the same key is to be tried again first."""
        return self.group.ordered and delivery.record.key is not None and delivery.record.key in self.troubled


def status_of(name: str, received: Received | None, lanes: Sequence[LaneStatus], dead: int) -> GroupStatus:
    """How far a group is, as the broker tells and as this process knows. received: None if it does not work for it."""
    in_hand = len(received.in_hand) if received else 0
    return GroupStatus(
        name=name,
        app=received.group.app if received else "",
        patterns=received.group.patterns if received else (),
        ordered=received.group.ordered if received else False,
        paused=False,
        workers=int(received is not None),
        lag=sum(lane.lag or 0 for lane in lanes),
        lag_at_least=any(lane.lag is None for lane in lanes),
        lag_s=max((lane.stalled_s for lane in lanes), default=0.0),
        in_flight=received.gate.out - in_hand if received else 0,
        retrying=in_hand,
        waiting=0,
        parked=0,
        dead=dead,
        done=received.done if received else 0,
        failed=received.failed if received else 0,
        rate=0.0,
        lanes=lanes,
    )
