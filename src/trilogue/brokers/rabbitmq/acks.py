"""Which deliveries of one channel are finished, and how to say so in few words.

delivery tags of one channel:   1  2  3  4  5  6  7  8 …
finished so far                 ■  ■  ■     ■
finished now                             ■     ■          ─▶ up to 4, and 6
next                                              ▲ low = 7: everything below is finished

"Up to" names the newest tag of the prefix that is finished *now*: one that names a tag which is acknowledged already closes the
channel.
"""

from collections.abc import Collection


class Acks:
    """The tags of one channel. last: the newest that was delivered."""

    def __init__(self) -> None:
        self.last = 0
        self._low = 1
        self._done: set[int] = set()  # finished, above low

    def is_out(self, tag: int) -> bool:
        """Whether this delivery is not finished."""
        return self._low <= tag <= self.last and tag not in self._done

    @property
    def out(self) -> int:
        """How many are not finished."""
        return self.last + 1 - self._low - len(self._done)

    def finish(self, tags: Collection[int]) -> tuple[int, list[int]]:
        """These are finished; returns up to which tag (0: none), and those beyond. What is finished already is left out."""
        fresh = {tag for tag in tags if self.is_out(tag)}
        prefix, low, done = 0, self._low, self._done
        while low in fresh or low in done:
            if low in fresh:
                fresh.discard(low)
                prefix = low
            else:
                done.discard(low)
            low += 1
        self._low = low
        done |= fresh
        return prefix, sorted(fresh)
