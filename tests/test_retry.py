"""Retry: one function of the error and the attempt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilogue import BadOption, DecodeError, Reject, Retry


def test_defaults_double_from_a_second_and_end_after_five() -> None:
    retry = Retry()
    bounds = [(500_000, 1_000_000), (1_000_000, 2_000_000), (2_000_000, 4_000_000), (4_000_000, 8_000_000)]
    for attempt, (least, most) in enumerate(bounds, 1):
        wait = retry.wait_us(ValueError(), attempt)
        assert wait is not None
        assert least <= wait <= most
    assert retry.wait_us(ValueError(), 5) is None


@given(st.integers(1, 1_000), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 1_000))
def test_every_wait_is_between_half_and_the_whole_and_capped(attempts: int, one: int, other: int, attempt: int) -> None:
    first, longest = sorted((one, other))
    retry = Retry(attempts, f"{first}us..{longest}us")
    wait = retry.wait_us(RuntimeError(), attempt)
    if attempt >= attempts:
        assert wait is None
    else:
        whole = min(first * 2 ** (attempt - 1), longest)
        assert wait is not None
        assert whole // 2 <= wait <= whole


def test_one_duration_is_a_constant_wait() -> None:
    retry = Retry(10, "10ms")
    assert (retry.first_us, retry.longest_us) == (10_000, 10_000)
    assert all(5_000 <= (retry.wait_us(ValueError(), attempt) or 0) <= 10_000 for attempt in range(1, 10))


def test_a_wait_in_seconds_and_blanks_around_the_dots() -> None:
    assert Retry(2, 0.5).first_us == 500_000
    assert (Retry(2, "1s .. 5m").first_us, Retry(2, "1s .. 5m").longest_us) == (1_000_000, 300_000_000)


def test_jitter_spreads() -> None:
    assert len({Retry(2, "1s").wait_us(ValueError(), 1) for _ in range(50)}) > 10


@pytest.mark.parametrize("error", [Reject("no"), DecodeError("no"), KeyError("k")])
def test_what_gives_up_at_once(error: Exception) -> None:
    assert Retry(9, "1s", give_up=(LookupError, OSError)).wait_us(error, 1) is None


def test_give_up_takes_one_class_and_spares_others() -> None:
    retry = Retry(3, "1s", give_up=ValueError)
    assert retry.wait_us(UnicodeError(), 1) is None  # a subclass
    assert retry.wait_us(TypeError(), 1) is not None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Retry(0), "expected 1 to 1000"),
        (lambda: Retry(1_001), "expected 1 to 1000"),
        (lambda: Retry("5"), "expected 1 to 1000"),  # type: ignore[arg-type]
        (lambda: Retry(2.5), "expected 1 to 1000"),  # type: ignore[arg-type]
        (lambda: Retry(5, "5m..1s"), "go down"),
        (lambda: Retry(5, "1s.."), "not understood"),
        (lambda: Retry(5, "soon"), "not understood"),
        (lambda: Retry(5, None), "not understood"),  # type: ignore[arg-type]
        (lambda: Retry(5, -1), "out of range"),
        (lambda: Retry(5, "1s", give_up=[ValueError]), "exception class"),  # type: ignore[arg-type]
        (lambda: Retry(5, "1s", give_up=ValueError("x")), "exception class"),  # type: ignore[arg-type]
        (lambda: Retry(5, "1s", give_up=int), "exception class"),  # type: ignore[arg-type]
    ],
)
def test_refusals(make: object, sentence: str) -> None:
    with pytest.raises(BadOption, match=sentence):
        make()  # type: ignore[operator]
