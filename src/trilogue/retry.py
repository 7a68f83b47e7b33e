"""What follows a failed attempt: pure, one function of the error and the attempt.

    attempt 1 fails ── wait 1 s ── 2 fails ── 2 s ── 3 fails ── 4 s ── 4 fails ── 8 s ── 5 fails ── dead letter
                       each wait with jitter: evenly between half and the whole of it

The doubling with random spread follows "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015).
"""

import random
from dataclasses import dataclass
from dataclasses import field as dataclass_field

from trilogue.durations import Duration, microseconds
from trilogue.errors import BadOption, DecodeError, Reject

MOST_ATTEMPTS = 1_000


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a handler is tried and how long it waits in between.

    attempts: 1 to 1,000, the first one included.
    waits: `"1s..5m"`: the first wait and the longest; doubled each time. A single duration is a constant wait.
    give_up: exception classes that go straight to the dead letters.
    Raises BadOption.

    >>> Retry(5, "1s..5m", give_up=ValueError).first_us
    1000000
    """

    attempts: int = 5
    waits: "str | Duration" = "1s..5m"
    give_up: type[BaseException] | tuple[type[BaseException], ...] = ()
    first_us: int = dataclass_field(init=False, repr=False)
    longest_us: int = dataclass_field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or not 1 <= self.attempts <= MOST_ATTEMPTS:
            raise BadOption(f"attempts is {self.attempts!r}: expected 1 to {MOST_ATTEMPTS}, the first attempt included")
        classes = self.give_up if isinstance(self.give_up, tuple) else (self.give_up,)
        if not all(isinstance(cls, type) and issubclass(cls, BaseException) for cls in classes):
            raise BadOption(f"give_up is {self.give_up!r}: expected an exception class, or a tuple of them")
        first, longest = _bounds(self.waits)
        object.__setattr__(self, "first_us", first)
        object.__setattr__(self, "longest_us", longest)

    def wait_us(self, error: BaseException, attempt: int) -> int | None:
        """Microseconds until the next attempt, or None: dead.

        attempt: which attempt has just failed, from 1.
        """
        if attempt >= self.attempts or isinstance(error, (Reject, DecodeError)) or self._gives_up(error):
            return None
        # Capped before the shift: 2**1000 would be a large number for nothing.
        whole = min(self.first_us << min(attempt - 1, 40), self.longest_us)
        return round(whole * random.uniform(0.5, 1.0))

    def _gives_up(self, error: BaseException) -> bool:
        return bool(self.give_up) and isinstance(error, self.give_up)


def _bounds(waits: "str | Duration") -> tuple[int, int]:
    if not isinstance(waits, str) or ".." not in waits:
        us = microseconds(waits)
        return us, us
    first, _, longest = waits.partition("..")
    bounds = microseconds(first), microseconds(longest)
    if bounds[0] > bounds[1]:
        raise BadOption(f"waits {waits!r} go down: expected the first wait, two dots, the longest wait, as '1s..5m'")
    return bounds
