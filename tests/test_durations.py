"""Durations: what people write, in whole microseconds."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilogue.durations import LONGEST_US, UNITS_US, microseconds, readable, seconds
from trilogue.errors import BadOption


@pytest.mark.parametrize(
    ("written", "us"),
    [
        ("250ms", 250_000),
        ("5m", 300_000_000),
        ("1h30m", 5_400_000_000),
        ("1.5s", 1_500_000),
        (" 7us ", 7),
        ("2d", 172_800_000_000),
        (0, 0),
        (2, 2_000_000),
        (0.25, 250_000),
        (timedelta(minutes=1, microseconds=1), 60_000_001),
        ("3650d", LONGEST_US),
        (timedelta(days=3650), LONGEST_US),
    ],
)
def test_understood(written: str | float | timedelta, us: int) -> None:
    assert microseconds(written) == us
    assert seconds(written) == us / 1_000_000


@pytest.mark.parametrize(
    "text", ["", " ", "5", "m", "5 m", "5M", "-5m", "1e3s", "5min", "\u0665s", "5s,", "..", "5..6s", "s5", "5s\n6m"]
)
def test_text_that_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadOption, match=r"write a number and a unit .* as '5m'"):
        microseconds(text)


@pytest.mark.parametrize(
    "value",
    [-1, -0.001, float("nan"), float("inf"), 1e300, "3651d", "9" * 400 + "s", timedelta(days=-1), timedelta.max],
)
def test_out_of_range_is_refused(value: str | float | timedelta) -> None:
    with pytest.raises(BadOption, match="0 to 10 years"):
        microseconds(value)


@pytest.mark.parametrize("value", [None, True, [], b"5m"])
def test_what_is_no_duration_at_all_is_refused(value: object) -> None:
    with pytest.raises(BadOption, match="expected '5m', a timedelta, or seconds"):
        microseconds(value)  # type: ignore[arg-type]


@given(st.integers(0, LONGEST_US // 2 - 1), st.integers(0, LONGEST_US // 2))
def test_texts_add_up(first: int, second: int) -> None:
    assert abs(microseconds(f"{first}us{second}us") - (first + second)) <= 1


@given(st.integers(0, LONGEST_US))
def test_a_timedelta_is_exact(us: int) -> None:
    assert microseconds(timedelta(microseconds=us)) == us


@pytest.mark.parametrize(
    ("us", "text"),
    [(0, "0us"), (999, "999us"), (1_000, "1ms"), (90_000_000, "1.5m"), (1_234_000, "1.23s"), (LONGEST_US, "3650d")],
)
def test_readable(us: int, text: str) -> None:
    assert readable(us) == text


@given(st.integers(0, LONGEST_US))
def test_readable_can_be_read_again(us: int) -> None:
    assert microseconds(readable(us)) == pytest.approx(us, rel=0.01)


def test_units_are_ordered() -> None:
    assert list(UNITS_US.values()) == sorted(UNITS_US.values())
