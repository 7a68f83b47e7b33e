"""What one process knows of what the store holds for a group of a broker; learnt again when the store's marks differ.

marks       inbox  revision  paused       one cheap look: has anything changed?
gate.held   keys that have rows           one too many costs a look, one too few would let a record overtake
quiet       lane ─▶ offset                below it a replay goes on: what is emitted there stays off
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import msgspec

from trilogue.brokers.keyed import KeyedGate
from trilogue.events import KEY_CHARS, Delivery, Group, Record
from trilogue.ports import Inbox, Marks
from trilogue.stores.append import ID_CHARS

HELD_KEYS = 10_000


class Held:
    """Of one group."""

    def __init__(self, inbox: Inbox, group: Group, gate: KeyedGate) -> None:
        self._inbox, self._group, self._gate = inbox, group, gate
        self._marks = Marks(0, -1, paused=False)
        self._quiet: dict[str, int] = {}
        self._most = HELD_KEYS

    @property
    def is_known(self) -> bool:
        """Whether the store was looked at."""
        return self._marks.revision >= 0

    @property
    def is_paused(self) -> bool:
        """Whether the group was paused at the last look."""
        return self._marks.paused

    @property
    def is_superseded(self) -> bool:
        """Whether another program reads something else as this group."""
        return self._marks.superseded

    async def look(self) -> None:
        """Learn what has changed: which keys are held, whether the group is paused or replayed."""
        inbox, known, name = self._inbox, self._marks, self._group.name
        marks = await inbox.marks(self._group)
        if marks != known:
            is_new = marks.revision != known.revision
            if is_new:
                self._quiet = await inbox.replay_ends(name)
            if self._group.ordered and (is_new or marks.inbox != known.inbox):
                self._gate.learn(await inbox.held_keys(name, 0 if is_new else min(known.inbox, self._marks.inbox)))
            self._marks = marks
        if len(self._gate.held) > self._most:
            await self._learn_anew()

    async def _learn_anew(self) -> None:
        """Forget the keys whose rows are gone: most keys that ever failed never come again to be looked up."""
        self._gate.begin_learning_anew()
        self._gate.learn_anew(await self._inbox.held_keys(self._group.name, 0))
        self._most = max(HELD_KEYS, 2 * len(self._gate.held))

    def note(self, before: int, after: int) -> None:
        """Rows were added here, between these marks; what others have added is still to be learnt."""
        if self._marks.inbox == before:
            self._marks = dataclasses.replace(self._marks, inbox=after)

    async def divert(self, deliveries: Sequence[Delivery]) -> list[bool]:
        """Put those whose key is held behind its rows; which of them that were."""
        diverted = await self._inbox.divert(self._group.name, deliveries)
        self.note(diverted.before, diverted.after)
        for delivery, is_held in zip(deliveries, diverted.held, strict=True):
            if not is_held:
                self._gate.not_held(delivery.record.key or "")
        return list(diverted.held)

    def mark_replay(self, deliveries: Iterable[Delivery]) -> None:
        """Mark those that are read again after a seek."""
        if self._quiet:
            for delivery in deliveries:
                record = delivery.record
                offset = (record.extensions or {}).get("offset", record.position) if delivery.is_held else record.position
                delivery.replay = int(offset) < self._quiet.get(lane_of(record), 0)


def lane_of(record: Record) -> str:
    """The lane a record came from, as Progress and LaneStatus name it."""
    return "" if record.topic is None else f"{record.topic}[{record.partition}]"


def make_fit(deliveries: Iterable[Delivery], *, takes_nul: bool) -> None:
    """Give keys and ids of other programs the form in which a store takes them, should it have to hold one.

    takes_nul: whether it takes texts with NUL characters, which PostgreSQL does not.
    """
    for delivery in deliveries:
        record, key = delivery.record, delivery.record.key
        is_long = len(record.id) > ID_CHARS or (key is not None and len(key) > KEY_CHARS)
        if is_long or not (takes_nul or "\x00" not in f"{record.id}{key}"):
            key = None if key is None else _fitting(key, KEY_CHARS)
            delivery.record = msgspec.structs.replace(record, id=_fitting(record.id, ID_CHARS), key=key)


def _fitting(text: str, most: int) -> str:
    """A text without NUL characters, and what is too long as its beginning and a hash of all of it."""
    plain = text.replace("\x00", "\\x00")
    if len(plain) <= most:
        return plain
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    return f"{plain[: most - len(digest) - 1]}~{digest}"
