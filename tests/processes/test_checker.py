"""The checker finds every seeded bug, under the right name and no other; and a clean history clean."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checker import Handling, History, Interruption, check, load

STEPS = [(key, n) for key in ("a", "b") for n in range(50)]
POISON = ("b", 30)
KILLED = Interruption(600, 601, frozenset({7}))


def clean() -> History:
    """Two keys handled in order by process 8; a step that always fails; and one worker, 7, that was killed once."""
    handlings = [Handling(key, n, n * 10 + (key == "b"), n * 10 + 9, 8) for key, n in STEPS]
    effects = [replace(h, group="effect") for h in handlings]
    handlings = [h for h in handlings if h.step != POISON] + effects
    handlings += [Handling(*POISON, 301 + attempt, 302 + attempt, 8, ok=False) for attempt in range(0, 6, 2)]
    # What a kill leaves is allowed: a repetition from an earlier number on, and a publish of unknown outcome.
    handlings = [replace(h, pid=7) if h.key == "a" and h.n >= 40 else h for h in handlings]
    handlings += [Handling("a", n, 1_000 + n * 10, 1_000 + n * 10 + 9, 8) for n in range(40, 50)]
    return History(
        begun=Counter([*STEPS, ("a", 50), ("r", 0)]),
        stored=dict.fromkeys(STEPS, 1),
        unknown=Counter([("a", 50)]),
        rejected=Counter([("r", 0)]),
        handlings=handlings,
        tables=("effect",),
        effects={"effects": list(STEPS), "echoes": list(STEPS)},
        poison={"plain": {POISON}},
        dead={"plain": [POISON]},
        interruptions=[KILLED],
        bound=10,
    )


def at(history: History, key: str, n: int, group: str = "plain") -> int:
    return next(i for i, h in enumerate(history.handlings) if (h.group, h.key, h.n) == (group, key, n))


def change(history: History, key: str, n: int, **changes: object) -> None:
    i = at(history, key, n)
    history.handlings[i] = replace(history.handlings[i], **changes)


def lose(history: History) -> None:
    del history.handlings[at(history, "b", 49)]


def acknowledge_before_the_end(history: History) -> None:
    change(history, "b", 49, left=None, ok=False)


def invent(history: History) -> None:
    history.handlings.append(Handling("c", 0, 5_000, 5_001))


def invent_an_effect(history: History) -> None:
    history.effects["effects"].append(("c", 0))


def call_stored_rejected(history: History) -> None:
    history.handlings.append(Handling("r", 0, 5_000, 5_001))


def handle_twice(history: History) -> None:
    history.handlings.append(Handling("b", 49, 5_000, 5_001, 8))
    history.bound = None


def handle_twice_after_a_kill_elsewhere(history: History) -> None:
    history.interruptions.append(Interruption(2_000, 2_001, frozenset({9})))
    handle_twice(history)


def repeat_too_much(history: History) -> None:
    history.bound = 9


def swap(history: History) -> None:
    one, two = (history.handlings[at(history, "b", n)] for n in (20, 21))
    change(history, "b", 20, entered=two.entered, left=two.left)
    change(history, "b", 21, entered=one.entered, left=one.left)


def swap_effects(history: History) -> None:
    i, j = (at(history, "b", n, "effect") for n in (20, 21))
    one, two = history.handlings[i], history.handlings[j]
    history.handlings[i], history.handlings[j] = replace(one, n=two.n), replace(two, n=one.n)


def overtake(history: History) -> None:
    change(history, "b", 20, entered=9_000, left=9_001)


def go_on_after_a_failure(history: History) -> None:
    change(history, "b", 20, ok=False)
    history.handlings.append(Handling("b", 20, 9_000, 9_001, 8))


def overlap(history: History) -> None:
    change(history, "b", 20, left=history.handlings[at(history, "b", 20)].left + 5)


def overlap_in_one_process(history: History) -> None:
    history.interruptions.append(Interruption(0, 1_000_000))
    overlap(history)


def corrupt(history: History) -> None:
    change(history, "b", 20, corrupt=True)


def lose_an_effect(history: History) -> None:
    history.effects["echoes"].remove(("a", 7))


def repeat_an_effect(history: History) -> None:
    history.effects["effects"].append(("a", 7))


def lose_a_dead_letter(history: History) -> None:
    history.dead = {}
    history.handlings = [h for h in history.handlings if h.key != "b" or h.n <= POISON[1]]
    for step in [step for step in history.stored if step[0] == "b" and step[1] > POISON[1]]:
        del history.stored[step]
        history.effects = {name: [s for s in steps if s != step] for name, steps in history.effects.items()}


def give_up(history: History) -> None:
    history.dead["plain"].append(("a", 3))


@pytest.mark.parametrize(
    ("bug", "name"),
    [
        (lose, "lost"),
        (acknowledge_before_the_end, "acknowledged unfinished"),
        (invent, "phantom"),
        (invent_an_effect, "phantom"),
        (call_stored_rejected, "rejected and there"),
        (handle_twice, "duplicated without cause"),
        (handle_twice_after_a_kill_elsewhere, "duplicated without cause"),
        (repeat_too_much, "duplicated beyond bound"),
        (swap, "reordered"),
        (swap_effects, "reordered"),
        (overtake, "reordered"),
        (go_on_after_a_failure, "skipped after a failure"),
        (overlap, "concurrent"),
        (overlap_in_one_process, "concurrent"),
        (corrupt, "corrupt"),
        (lose_an_effect, "effect missing"),
        (repeat_an_effect, "effect twice"),
        (lose_a_dead_letter, "dead letter lost"),
        (give_up, "dead without cause"),
    ],
)
def test_each_bug_has_its_name(bug: Callable[[History], None], name: str) -> None:
    history = clean()
    bug(history)
    verdict = check(history)
    # A step that is forgotten as a dead letter was never finished either.
    also = {"lost"} if bug is lose_a_dead_letter else set()
    assert set(verdict.found) - also == {name}, verdict.summary()
    assert not verdict.is_clean


def test_a_clean_history_is_clean() -> None:
    verdict = check(clean())
    assert verdict.is_clean, verdict.summary()
    assert verdict.repeated == {"plain": 10}


def test_what_an_interruption_explains_is_allowed() -> None:
    """A cut connection: the server gives a record to another process while the first one, which cannot know, goes on."""
    history = clean()
    history.handlings.append(Handling("b", 20, 205, 207, 9))
    assert set(check(history).found) == {"duplicated without cause", "duplicated beyond bound", "concurrent"}
    history.interruptions.append(Interruption(203, 204, frozenset({8})))
    history.bound = 11
    assert check(history).is_clean


def test_a_step_published_again_may_be_handled_again() -> None:
    history = clean()
    handle_twice(history)
    history.begun[("b", 49)] += 1
    assert check(history).is_clean
    history.rejected[("b", 49)] += 1  # certainly not stored: that explains nothing
    assert set(check(history).found) == {"duplicated without cause"}


def test_what_was_in_a_queue_that_was_deleted_may_be_gone() -> None:
    history = clean()
    gone = [("b", n) for n in range(10, 14)]
    history.handlings = [h for h in history.handlings if (h.key, h.n) not in gone]
    history.effects = {name: [step for step in steps if step not in gone] for name, steps in history.effects.items()}
    assert set(check(history).found) == {"lost", "reordered", "effect missing"}
    history.stored |= {step: 3 for step in STEPS if step not in gone}
    history.excused_until = 2
    assert check(history).is_clean


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    publish = '{"key": "a", "from": 0, "to": 2, "outcome": "stored", "at": 5}\n{"key": "a", "fr'
    entered = (
        '{"run": 1, "group": "plain", "key": "a", "n": 0, "at": 1}\n{"run": 2, "group": "plain", "key": "a", "n": 1, "at": 3}\n'
    )
    (tmp_path / "publish-1.jsonl").write_text(publish)
    (tmp_path / "handle-2.jsonl").write_text(entered + '{"run": 1, "ok": true, "at": 2}\n{"run": 2, "o')
    (tmp_path / "interruptions.jsonl").write_text('{"at": 4, "until": 5, "pids": [2]}\n')
    history = load(tmp_path)
    assert history.stored == {("a", 0): 5, ("a", 1): 5, ("a", 2): 5}
    assert history.handlings == [Handling("a", 0, 1, 2, 2), Handling("a", 1, 3, None, 2, ok=False)]
    assert history.interruptions == [Interruption(4, 5, frozenset({2}))]
