"""How far a group is in one partition. Pure: no Kafka, no clock.

    offsets   100  101  102  103  104  105
              done out  done done out  not lent yet
                   └ committed offset: 101          next = 105
                        └ in the commit's metadata: 102 and 103 are finished

The committed offset never passes a record that is out. What is finished above it travels as a bitmap in the commit's metadata,
so that whoever goes on there does not handle it again.
"""

import base64
import binascii
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

METADATA_CHARS = 4_000  # the broker refuses 4,096
SPAN = 20_000  # offsets from the committed one to the newest lent: what surely fits the metadata as a bitmap
_MARK = "t1:"


@dataclass(frozen=True, slots=True)
class Place:
    """Below `next` everything is finished; `finished` are the offsets from there on that are, too, in order."""

    next: int
    finished: tuple[int, ...] = ()


class Lane:
    """What of one partition is out, and what is finished above the first of it."""

    __slots__ = ("_finished", "next", "out")

    def __init__(self, place: Place) -> None:
        self.next = place.next
        self.out: dict[int, None] = {}  # in the order lent
        self._finished = set(place.finished)

    def lend(self, offset: int) -> None:
        """A record goes out; offsets are lent upwards."""
        self.out[offset] = None
        self.next = offset + 1

    def skip_to(self, offset: int) -> None:
        """What lies below this offset and was not lent needs nobody."""
        self.next = max(self.next, offset)

    def finish(self, offset: int) -> None:
        """A record that is out is finished; again or unknown, it changes nothing."""
        if offset in self.out:
            del self.out[offset]
            self._finished.add(offset)

    @property
    def span(self) -> int:
        """How many offsets lie between the first that is out and the next."""
        return self.next - next(iter(self.out), self.next)

    def place(self) -> Place:
        """Where the group goes on if this process dies now."""
        first = next(iter(self.out), self.next)
        if self._finished:
            self._finished = {offset for offset in self._finished if offset >= first}
        return Place(first, tuple(sorted(self._finished)))

    def place_after(self, offsets: Collection[int]) -> Place:
        """The place if these, which are out, were finished; they are not marked."""
        done = set(offsets)
        first = next((offset for offset in self.out if offset not in done), self.next)
        above = {offset for offset in self._finished if offset >= first} | {offset for offset in done if offset >= first}
        return Place(first, tuple(sorted(above)))


def encoded(place: Place) -> str:
    """The finished offsets as a commit's metadata; what does not fit is left out, and comes again."""
    if not place.finished:
        return ""
    most_bits = (METADATA_CHARS - len(_MARK)) // 4 * 3 * 8
    bits = bytearray((min(place.finished[-1] - place.next, most_bits - 1) >> 3) + 1)
    for offset in place.finished:
        bit = offset - place.next
        if bit >= most_bits:
            break
        bits[bit >> 3] |= 1 << (bit & 7)
    return _MARK + base64.b64encode(bits).decode()


def decoded(next_offset: int, metadata: str | None) -> Place:
    """The place in a commit; metadata that is not ours says nothing."""
    if not metadata or not metadata.startswith(_MARK):
        return Place(next_offset)
    try:
        bits = base64.b64decode(metadata[len(_MARK) :], validate=True)
    except (binascii.Error, ValueError):
        return Place(next_offset)
    return Place(next_offset, tuple(next_offset + bit for bit in _set_bits(bits)))


def _set_bits(bits: bytes) -> Iterable[int]:
    return (at * 8 + bit for at, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1)


def lag(place: Place, end: int) -> int:
    """How many records up to the end of the partition are not finished."""
    return max(0, end - place.next - _below(place.finished, end))


def _below(offsets: Sequence[int], end: int) -> int:
    return sum(1 for offset in offsets if offset < end)
