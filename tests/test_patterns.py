"""Patterns against a model that is too slow and too simple to be wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilogue import BadPattern
from trilogue.patterns import check_pattern, check_type, is_wild, matches, matches_any

WORDS = st.sampled_from(["a", "b", "video", "Ab-_9"])
TYPES = st.lists(WORDS, min_size=1, max_size=6)
PATTERNS = st.lists(st.one_of(WORDS, st.sampled_from(["*", "#"])), min_size=1, max_size=6)


def naive(pattern: list[str], words: list[str]) -> bool:
    """AMQP 0-9-1: `*` is one word, `#` none or more."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(naive(pattern[1:], words[n:]) for n in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and naive(pattern[1:], words[1:])


@given(PATTERNS, TYPES)
def test_matches_as_the_model(pattern: list[str], words: list[str]) -> None:
    assert matches(".".join(pattern), ".".join(words)) == naive(pattern, words)


@given(PATTERNS)
def test_what_is_built_of_words_is_a_pattern(pattern: list[str]) -> None:
    text = ".".join(pattern)
    assert check_pattern(text) == text
    assert is_wild(text) == any(word in "*#" for word in pattern)


@given(TYPES)
def test_a_type_is_a_pattern_that_means_itself_alone(words: list[str]) -> None:
    name = ".".join(words)
    assert matches(check_pattern(check_type(name)), name)
    assert not matches(name, name + ".more")
    assert not matches(name, "other")


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("video.watched", ["video.watched"], ["video", "video.watched.twice", "Video.watched", "video_watched"]),
        ("video.*", ["video.watched"], ["video", "video.quality.changed"]),
        ("video.#", ["video", "video.watched", "video.quality.changed"], ["videos", "a.video"]),
        ("#", ["a", "a.b.c"], []),
        ("*", ["a"], ["a.b"]),
        ("#.b", ["b", "a.b", "a.a.b"], ["b.a"]),
        ("a.#.#.b", ["a.b", "a.c.b"], ["a", "b"]),
        ("*.#", ["a", "a.b"], []),
    ],
)
def test_examples(pattern: str, yes: list[str], no: list[str]) -> None:
    assert [name for name in yes if not matches(pattern, name)] == []
    assert [name for name in no if matches(pattern, name)] == []


def test_many_hashes_do_not_take_long() -> None:
    assert not matches(".".join(["#", "a"] * 16), ".".join(["a"] * 31 + ["b"]))


def test_matches_any() -> None:
    assert matches_any(["a.*", "b"], "b")
    assert not matches_any(["a.*", "b"], "c")
    assert not matches_any([], "c")


BAD = ["", ".", "a.", ".a", "a..b", "a b", "a\n", "\x00", "vidéo", "a/b", "a:b", "x" * 256, ".".join("a" * 33), "a'b", 5, None]


@pytest.mark.parametrize("name", [*BAD, "a.*", "#", "a*"])
def test_no_type(name: str) -> None:
    with pytest.raises(BadPattern, match=r"as 'video.watched'"):
        check_type(name)


@pytest.mark.parametrize("pattern", [*BAD, "a*", "#a", "**", "a.##"])
def test_no_pattern(pattern: str) -> None:
    with pytest.raises(BadPattern, match=r"as 'video\.\*' or 'video\.#'"):
        check_pattern(pattern)


def test_the_longest_are_allowed() -> None:
    assert check_type("x" * 255)
    assert check_type(".".join(["abcdefg"] * 31 + ["abcdefg"]))
