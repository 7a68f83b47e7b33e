"""The plain model of a log and one ordered group: lists, sets and what follows from the promises.

records   all that was published, in order        done     numbers the group has finished
dead, parked, retried: what became of the others  paused   whether anything may be lent
"""

from dataclasses import dataclass, field


@dataclass
class Model:
    """Numbers are positions of `records`, from 0; positions of the log itself are looked up in `position`."""

    keys: list[str | None] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    parked: set[int] = field(default_factory=set)
    attempt: dict[int, int] = field(default_factory=dict)
    due_us: dict[int, int] = field(default_factory=dict)
    timers: dict[str, tuple[int, str | None]] = field(default_factory=dict)
    effects: list[int] = field(default_factory=list)
    redriven: set[int] = field(default_factory=set)
    start: int = 0
    paused: bool = False

    def publish(self, id_: str, key: str | None, position: int) -> None:
        self.ids.append(id_)
        self.keys.append(key)
        self.position.append(position)

    def open(self) -> list[int]:
        """What the group has still to finish."""
        return [n for n in range(self.start, len(self.keys)) if n not in self.done and n not in self.dead]

    def may_be_lent(self, n: int, now_us: int, out: set[int], together: set[int]) -> bool:
        """Whether the promises allow n to be handed out now. together: what is handed out in the same claim."""
        if self.paused or n not in self.open() or n in self.parked or self.due_us.get(n, 0) > now_us:
            return False
        key = self.keys[n]
        if key is None:
            return True
        # What was dead and is redriven does not hold up what went on meanwhile.
        ahead = {m for m in self.open() if self.keys[m] == key and m < n} - self.redriven
        busy = {m for m in out if self.keys[m] == key}
        return ahead <= together and not busy

    def settle(self, n: int, verdict: str, now_us: int, after_us: int) -> None:
        match verdict:
            case "done":
                self.done.add(n)
                self.parked.discard(n)
            case "retry":
                self.attempt[n] = self.attempt.get(n, 1) + 1
                self.due_us[n] = now_us + after_us
            case "dead":
                self.dead.add(n)
            case "park":
                self.parked.add(n)

    def redrive(self, chosen: set[int]) -> None:
        self.redriven |= chosen & self.dead
        for n in chosen:
            self.dead.discard(n)
            self.parked.discard(n)
            self.attempt[n] = 1
            self.due_us.pop(n, None)

    def drop(self, chosen: set[int]) -> None:
        for n in chosen:
            self.dead.discard(n)
            self.parked.discard(n)
            self.done.add(n)

    def seek(self, start: int) -> None:
        self.start = start
        for held in (self.done, self.dead, self.parked, self.attempt, self.due_us, self.redriven):
            held.clear()
