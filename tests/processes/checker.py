"""From histories to verdicts: what was published, what was handled, what had an effect.

lost        known to be stored and never handled        phantom    handled or in effect, and never begun to be published
effects     keys and numbers whose effect is not once   reordered  a first handling before that of an earlier number of its key
concurrent  two handlers of one key at the same time    repeated   handled more than once (allowed after a kill; counted)
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

Step = tuple[str, int]


@dataclass(frozen=True)
class Handling:
    """One handler's run to its end. Times are nanoseconds of the machine's clock."""

    key: str
    n: int
    entered: int
    left: int
    pid: int = 0


@dataclass
class History:
    """begun, stored: published. handlings: by the plain handler. effects: rows of the tables, as they are."""

    begun: set[Step] = field(default_factory=set)
    stored: set[Step] = field(default_factory=set)
    handlings: list[Handling] = field(default_factory=list)
    effects: dict[str, list[Step]] = field(default_factory=dict)


@dataclass
class Verdict:
    """What was wrong; all of it empty but `repeated` means that every promise was kept."""

    lost: set[Step]
    phantom: set[Step]
    effects: dict[str, dict[Step, int]]
    reordered: list[tuple[Step, int]]
    concurrent: list[tuple[Handling, Handling]]
    repeated: int

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.phantom or any(self.effects.values()) or self.reordered or self.concurrent)


def load(folder: Path) -> History:
    """Read the histories of all processes; a line cut off by a kill at the end of a file is left out."""
    history = History()
    for row in _rows(folder.glob("publish-*.jsonl")):
        steps = {(row["key"], n) for n in range(row["from"], row["to"] + 1)}
        history.begun |= steps
        if row["outcome"] == "stored":
            history.stored |= steps
    for row in _rows(folder.glob("handle-*.jsonl")):
        history.handlings.append(Handling(row["key"], row["n"], row["from"], row["to"], row["pid"]))
    return history


def _rows(paths: Iterable[Path]) -> Iterable[dict]:  # type: ignore[type-arg]
    for path in paths:
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                yield json.loads(line)


def check(history: History) -> Verdict:
    """Judge a history that has come to its end: everything published was given the time to be handled."""
    handled = {(h.key, h.n) for h in history.handlings}
    phantom = handled - history.begun
    lost = history.stored - handled
    effects: dict[str, dict[Step, int]] = {}
    for name, rows in history.effects.items():
        counts = Counter(rows)
        wrong = {step: counts[step] for step in history.stored | set(counts) if counts[step] != 1}
        phantom |= set(counts) - history.begun
        lost |= {step for step, count in wrong.items() if count == 0}
        effects[name] = {step: count for step, count in wrong.items() if count > 1}
    repeated = len(history.handlings) - len(handled)
    return Verdict(lost, phantom, effects, _reordered(history.handlings), _concurrent(history.handlings), repeated)


def _by_key(handlings: Iterable[Handling]) -> Iterable[list[Handling]]:
    keys: dict[str, list[Handling]] = {}
    for handling in handlings:
        keys.setdefault(handling.key, []).append(handling)
    return keys.values()


def _reordered(handlings: Iterable[Handling]) -> list[tuple[Step, int]]:
    """First handlings that came before an earlier number's, or skipped it; with the number that was expected."""
    wrong: list[tuple[Step, int]] = []
    for of_key in _by_key(handlings):
        highest = -1
        for handling in sorted(of_key, key=lambda h: h.entered):
            if handling.n > highest + 1:
                wrong.append(((handling.key, handling.n), highest + 1))
            highest = max(highest, handling.n)
    return wrong


def _concurrent(handlings: Iterable[Handling]) -> list[tuple[Handling, Handling]]:
    wrong: list[tuple[Handling, Handling]] = []
    for of_key in _by_key(handlings):
        last: Handling | None = None
        for handling in sorted(of_key, key=lambda h: (h.entered, h.left)):
            if last is not None and handling.entered < last.left:
                wrong.append((last, handling))
            last = handling if last is None or handling.left > last.left else last
    return wrong
