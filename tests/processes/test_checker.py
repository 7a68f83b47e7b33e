"""The checker finds every seeded bug, under the right name and no other; and a clean history clean."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checker import Handling, History, check, load


def clean() -> History:
    steps = [(key, n) for key in ("a", "b") for n in range(50)]
    handlings = [Handling(key, n, n * 10 + (key == "b"), n * 10 + 9) for key, n in steps]
    # What a kill leaves is allowed: a repetition from an earlier number on, and a publish of unknown outcome.
    handlings += [Handling("a", n, 1_000 + n * 10, 1_000 + n * 10 + 9) for n in range(40, 50)]
    return History({*steps, ("a", 50)}, set(steps), handlings, {"effects": list(steps), "echoes": list(steps)})


def lose(history: History) -> None:
    history.handlings = [h for h in history.handlings if (h.key, h.n) != ("b", 49)]


def lose_effect(history: History) -> None:
    history.effects["echoes"].remove(("a", 7))


def invent(history: History) -> None:
    history.handlings.append(Handling("c", 0, 5_000, 5_001))


def invent_effect(history: History) -> None:
    history.effects["effects"].append(("c", 0))


def repeat_effect(history: History) -> None:
    history.effects["effects"].append(("a", 7))


def swap(history: History) -> None:
    n, m = (next(i for i, h in enumerate(history.handlings) if (h.key, h.n) == ("b", k)) for k in (20, 21))
    one, two = history.handlings[n], history.handlings[m]
    history.handlings[n] = replace(one, entered=two.entered, left=two.left)
    history.handlings[m] = replace(two, entered=one.entered, left=one.left)


def skip(history: History) -> None:
    late = next(i for i, h in enumerate(history.handlings) if (h.key, h.n) == ("b", 20))
    history.handlings[late] = replace(history.handlings[late], entered=9_000, left=9_001)


def overlap(history: History) -> None:
    n = next(i for i, h in enumerate(history.handlings) if (h.key, h.n) == ("b", 20))
    history.handlings[n] = replace(history.handlings[n], left=history.handlings[n].left + 5)


@pytest.mark.parametrize(
    ("bug", "names"),
    [
        (lose, {"lost"}),
        (lose_effect, {"lost"}),
        (invent, {"phantom"}),
        (invent_effect, {"phantom"}),
        (repeat_effect, {"effects"}),
        (swap, {"reordered"}),
        (skip, {"reordered"}),
        (overlap, {"concurrent"}),
    ],
)
def test_each_bug_has_its_name(bug: Callable[[History], None], names: set[str]) -> None:
    history = clean()
    bug(history)
    verdict = check(history)
    found = {name for name in ("lost", "phantom", "reordered", "concurrent") if getattr(verdict, name)}
    found |= {"effects"} if any(verdict.effects.values()) else set()
    assert found == names
    assert not verdict.is_clean


def test_a_clean_history_is_clean() -> None:
    verdict = check(clean())
    assert verdict.is_clean, verdict
    assert verdict.repeated == 10


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "publish-1.jsonl").write_text('{"key": "a", "from": 0, "to": 2, "outcome": "stored"}\n{"key": "a", "fr')
    (tmp_path / "handle-2.jsonl").write_text('{"key": "a", "n": 0, "from": 1, "to": 2, "pid": 3}\n')
    history = load(tmp_path)
    assert history.stored == {("a", 0), ("a", 1), ("a", 2)}
    assert history.handlings == [Handling("a", 0, 1, 2, 3)]
