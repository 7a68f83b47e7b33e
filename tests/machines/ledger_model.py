"""What the machine of decisions decides with, and the plain ledger it is compared to."""

from dataclasses import dataclass, field
from typing import Any

from trilogue import Aggregate, Boundary, Decider, Decision, Snapshot, event, tag


@event("machine.moved")
@dataclass(frozen=True)
class Moved:
    amount: int


@event("machine.seat_taken", tags=("seat", "guest"))
@dataclass(frozen=True)
class SeatTaken:
    seat: int
    guest: str


class NotEnough(Exception):
    pass


class Account(Aggregate, stream="account-{id}", snapshot=Snapshot(every=2)):
    entries: list[int] = field(default_factory=list)

    def move(self, amount: int) -> int:
        if sum(self.entries) + amount < 0:
            raise NotEnough
        self.emit(Moved(amount))
        return sum(self.entries)

    def apply(self, e: Moved) -> None:
        self.entries.append(e.amount)


class Mirrored(Aggregate, stream="account-{id}", snapshot=Snapshot(every=1)):
    """Another fold of the same streams into the same fields: snapshots of one must never be taken for those of the other."""

    entries: list[int] = field(default_factory=list)

    def apply(self, e: Moved) -> None:
        self.entries.append(-e.amount)


def evolve(total: tuple[int, ...], e: Moved) -> tuple[int, ...]:
    return (*total, e.amount)


def move(amount: int) -> Any:
    def rule_(entries: tuple[int, ...]) -> Moved | None:
        if sum(entries) + amount < 0:
            raise NotEnough
        return Moved(amount) if amount else None

    return rule_


decider: Decider[tuple[int, ...]] = Decider("account-{id}", (), evolve, snapshot=Snapshot(every=3))


class TakeSeat(Decision):
    seat: int
    guest: str
    is_free: bool = True
    has_seat: bool = False

    def boundary(self) -> list[Boundary]:
        return [tag("seat", self.seat), tag("guest", self.guest)]

    def apply(self, e: SeatTaken) -> None:
        self.is_free = self.is_free and e.seat != self.seat
        self.has_seat = self.has_seat or e.guest == self.guest

    def decide(self) -> SeatTaken | None:
        if self.has_seat:
            raise NotEnough
        return SeatTaken(self.seat, self.guest) if self.is_free else None


@dataclass
class Ledger:
    """One account as it should be: every amount that was ever moved, in order, and the first one that is shown."""

    entries: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    first: int = 1
    is_closed: bool = False

    def at(self, version: int | None = None) -> list[int]:
        return self.entries[self.first - 1 : version]
