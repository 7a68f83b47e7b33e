"""From histories to verdicts: what was published, what was handled, what had an effect, and what was done to whom.

lost                      stored, and never handled             acknowledged unfinished   begun, never finished, and gone
phantom                   handled, and never published          rejected and there        handled, and told to be not stored
duplicated without cause  again, and nothing had happened       duplicated beyond bound   more often than was under way
reordered                 before an earlier number of its key   skipped after a failure   while an earlier number had failed
concurrent                two handlers of one key at once       corrupt                   other bytes than were published
effect missing            stored, and no row of its effect      effect twice              more rows than one
dead letter lost          fails always, and is not kept         dead without cause        given up, and never failed by itself
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Step = tuple[str, int]


@dataclass(frozen=True)
class Handling:
    """One run of a handler. Times are nanoseconds of the machine's clock; left: None if it never came to its end."""

    key: str
    n: int
    entered: int
    left: int | None
    pid: int = 0
    group: str = "plain"
    ok: bool = True
    corrupt: bool = False

    @property
    def step(self) -> Step:
        return self.key, self.n

    @property
    def is_done(self) -> bool:
        return self.ok and self.left is not None


@dataclass(frozen=True)
class Interruption:
    """Something was done to processes. pids: to whose work; None: everybody's. until: when its consequences were over."""

    at: int
    until: int
    pids: frozenset[int] | None = None

    def is_between(self, one: Handling, other: Handling, *, since: int | None = None) -> bool:
        """Whether it can be why a run was followed by another. since: when the first began, if not when it was entered."""
        hit = self.pids is None or bool(self.pids & {one.pid, other.pid})
        return hit and self.at <= other.entered and self.until >= (one.entered if since is None else since)


@dataclass
class History:
    """What the processes wrote down.

    begun, unknown, rejected: how often a step was published, and how often it ended so; stored: when that was known first.
    groups: the plain handlers and whether they keep order. tables: groups whose effects are rows; their runs only show order.
    effects: rows of the tables, as they are. poison: what the group of that name always fails on. dead: its dead letters.
    excused_until: what was stored before may be gone (its queue was deleted). bound: repetitions that were under way at most.
    """

    begun: Counter[Step] = field(default_factory=Counter)
    stored: dict[Step, int] = field(default_factory=dict)
    unknown: Counter[Step] = field(default_factory=Counter)
    rejected: Counter[Step] = field(default_factory=Counter)
    handlings: list[Handling] = field(default_factory=list)
    groups: dict[str, bool] = field(default_factory=lambda: {"plain": True})
    tables: tuple[str, ...] = ()
    effects: dict[str, list[Step]] = field(default_factory=dict)
    poison: dict[str, set[Step]] = field(default_factory=dict)
    dead: dict[str, list[Step]] = field(default_factory=dict)
    interruptions: list[Interruption] = field(default_factory=list)
    excused_until: int = 0
    bound: int | None = None

    def excuses(self, step: Step) -> bool:
        """Whether this step may be gone."""
        return self.stored.get(step, 0) < self.excused_until

    def wanted(self) -> list[Step]:
        """What has to be handled."""
        return [step for step in self.stored if not self.excuses(step)]


@dataclass
class Verdict:
    """found: what was wrong, by name; empty means that every promise was kept. repeated: by group, allowed or not."""

    found: dict[str, list[Any]]
    repeated: dict[str, int]

    @property
    def is_clean(self) -> bool:
        return not self.found

    def count(self, *names: str) -> int:
        """How many findings have one of these names."""
        return sum(len(self.found.get(name, ())) for name in names)

    def summary(self) -> dict[str, Any]:
        """How many of each, and the first three."""
        return {name: (len(found), found[:3]) for name, found in self.found.items()}


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load(folder: Path) -> History:
    """Read the histories of all processes; a line cut off by a kill at the end of a file is left out."""
    history = History()
    for path in folder.glob("publish-*.jsonl"):
        for row in rows(path):
            _published(history, row)
    for path in folder.glob("handle-*.jsonl"):
        history.handlings += _handlings(path)
    for row in rows(folder / "interruptions.jsonl"):
        pids = None if row["pids"] is None else frozenset(row["pids"])
        history.interruptions.append(Interruption(row["at"], row["until"], pids))
    return history


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON lines; nothing if there is no such file."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        if line.endswith("}"):
            yield json.loads(line)


def _published(history: History, row: dict[str, Any]) -> None:
    steps = [(row["key"], n) for n in range(row["from"], row["to"] + 1)]
    if row["outcome"] == "stored":
        for step in steps:
            history.stored.setdefault(step, row.get("at", 0))
    else:
        counter: Counter[Step] = getattr(history, row["outcome"])
        counter.update(steps)


def _handlings(path: Path) -> Iterable[Handling]:
    """A run is a line when it was entered and one when it was left, which repeats the number of the first."""
    pid = int(path.stem.rpartition("-")[2])
    entered: dict[int, dict[str, Any]] = {}
    left: dict[int, dict[str, Any]] = {}
    for row in rows(path):
        (entered if "key" in row else left)[row["run"]] = row
    for run, row in entered.items():
        end = left.get(run, {"at": None, "ok": False})
        yield Handling(row["key"], row["n"], row["at"], end["at"], pid, row["group"], end["ok"], row.get("corrupt", False))


# ── judging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def check(history: History) -> Verdict:
    """Judge a history that has come to its end: everything published was given the time to be handled."""
    found: dict[str, list[Any]] = {}
    repeated: dict[str, int] = {}
    there = {h.step for h in history.handlings} | {step for rows_ in history.effects.values() for step in rows_}
    found["phantom"] = sorted(there - set(history.begun))
    found["rejected and there"] = sorted(
        step for step in there if step in history.begun and history.begun[step] == history.rejected[step]
    )
    found["corrupt"] = [h for h in history.handlings if h.corrupt]
    for group, is_ordered in (*history.groups.items(), *((table, True) for table in history.tables)):
        runs = [h for h in history.handlings if h.group == group]
        if group in history.groups:
            _add(found, _missing(history, group, runs))
            repeated[group] = _repeated(runs)
            _add(found, {"duplicated without cause": _without_cause(history, runs)})
        if is_ordered:
            _add(found, _order(history, group, runs))
    _add(found, _effects(history))
    _add(found, _dead(history))
    if history.bound is not None and sum(repeated.values()) > history.bound:
        found["duplicated beyond bound"] = [(sum(repeated.values()), history.bound)]
    return Verdict({name: wrong for name, wrong in found.items() if wrong}, repeated)


def _add(found: dict[str, list[Any]], more: dict[str, list[Any]]) -> None:
    for name, wrong in more.items():
        found.setdefault(name, []).extend(wrong)


def _missing(history: History, group: str, runs: list[Handling]) -> dict[str, list[Any]]:
    entered, done = {h.step for h in runs}, {h.step for h in runs if h.is_done}
    dead = set(history.dead.get(group, ()))
    poison = history.poison.get(group, set())
    gone = [step for step in history.wanted() if step not in done and step not in dead]
    return {
        "lost": [(group, step) for step in gone if step not in entered],
        "acknowledged unfinished": [(group, step) for step in gone if step in entered and step not in poison],
    }


def _repeated(runs: list[Handling]) -> int:
    done = [h.step for h in runs if h.is_done]
    return len(done) - len(set(done))


def _without_cause(history: History, runs: list[Handling]) -> list[tuple[Handling, Handling]]:
    """Runs that repeat a finished one, although it was published once and nothing happened in between."""
    done: dict[Step, list[Handling]] = {}
    for run in sorted(runs, key=lambda h: h.entered):
        if run.is_done:
            done.setdefault(run.step, []).append(run)
    wrong = []
    for step, of_step in done.items():
        pairs = list(itertools.pairwise(of_step))
        # From the publish on: it may have been under way when something happened, and both times be handled much later.
        since = min(history.stored.get(step, of_step[0].entered), of_step[0].entered)
        unexplained = [pair for pair in pairs if not any(i.is_between(*pair, since=since) for i in history.interruptions)]
        # What was published again is on the log more than once, and each time that is delivered again all of it is.
        published_again = max(history.begun[step] - history.rejected[step] - 1, 0)
        wrong += unexplained[published_again * (1 + len(pairs) - len(unexplained)) :]
    return wrong


def _order(history: History, group: str, runs: list[Handling]) -> dict[str, list[Any]]:
    dead = set(history.dead.get(group, ()))
    found: dict[str, list[Any]] = {"reordered": [], "skipped after a failure": [], "concurrent": []}
    for of_key in _by_key(runs):
        of_key.sort(key=lambda h: (h.entered, h.left or h.entered))
        found["reordered"] += _reordered(history, of_key)
        found["skipped after a failure"] += _skipped(history, of_key, dead)
        found["concurrent"] += _concurrent(history, of_key)
    return found


def _by_key(runs: Iterable[Handling]) -> Iterable[list[Handling]]:
    keys: dict[str, list[Handling]] = {}
    for run in runs:
        keys.setdefault(run.key, []).append(run)
    return keys.values()


def _reordered(history: History, of_key: list[Handling]) -> list[tuple[Handling, int]]:
    """First runs that came before an earlier number's; with the number that was expected."""
    wrong: list[tuple[Handling, int]] = []
    highest = -1
    for run in of_key:
        missing = [n for n in range(highest + 1, run.n) if not history.excuses((run.key, n))]
        if missing:
            wrong.append((run, missing[0]))
        highest = max(highest, run.n)
    return wrong


def _skipped(history: History, of_key: list[Handling], dead: set[Step]) -> list[tuple[Handling, Handling]]:
    """First runs that began after a run of the number before had failed, or had been cut off, and was not done again."""
    wrong: list[tuple[Handling, Handling]] = []
    earlier: dict[int, list[Handling]] = {}
    for run in of_key:
        before = earlier.get(run.n - 1, [])
        if run.n not in earlier and before and not _is_settled(before, run, dead) and not history.excuses(before[0].step):
            wrong.append((before[-1], run))
        earlier.setdefault(run.n, []).append(run)
    return wrong


def _is_settled(before: list[Handling], run: Handling, dead: set[Step]) -> bool:
    """Whether one of these runs was finished or still goes on (which is `concurrent`), or all of them ended as a dead letter."""
    return before[0].step in dead or any(h.left is not None and (h.is_done or h.left > run.entered) for h in before)


def _concurrent(history: History, of_key: list[Handling]) -> list[tuple[Handling, Handling]]:
    """Runs that overlap. A process that was cut off or put to sleep cannot know of its successor: that is allowed."""
    wrong: list[tuple[Handling, Handling]] = []
    last: Handling | None = None
    for run in of_key:
        if last is not None and last.left is not None and run.entered < last.left and not _is_excused(history, last, run):
            wrong.append((last, run))
        if last is None or (run.left or run.entered) > (last.left or last.entered):
            last = run
    return wrong


def _is_excused(history: History, one: Handling, other: Handling) -> bool:
    return one.pid != other.pid and any(i.is_between(one, other) for i in history.interruptions)


def _effects(history: History) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"effect missing": [], "effect twice": []}
    for name, steps in history.effects.items():
        counts = Counter(steps)
        found["effect missing"] += [(name, step) for step in history.wanted() if not counts[step]]
        found["effect twice"] += [(name, step, count) for step, count in counts.items() if count > 1]
    return found


def _dead(history: History) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"dead letter lost": [], "dead without cause": []}
    wanted = set(history.wanted())
    for group, poison in history.poison.items():
        dead = set(history.dead.get(group, ()))
        found["dead letter lost"] += [(group, step) for step in sorted(poison & wanted - dead)]
    for group, steps in history.dead.items():
        found["dead without cause"] += [(group, step) for step in steps if step not in history.poison.get(group, ())]
    return found
