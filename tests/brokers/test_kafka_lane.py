"""A lane: what may be committed, and what of it survives as metadata. Against a model in sets."""

from hypothesis import given
from hypothesis import strategies as st

from trilogue.brokers.kafka.lane import METADATA_CHARS, SPAN, Lane, Place, decoded, encoded, lag


def lane(*lent: int, start: int = 0) -> Lane:
    made = Lane(Place(start))
    for offset in lent:
        made.lend(offset)
    return made


def test_nothing_lent_stays_where_it_began() -> None:
    assert Lane(Place(7)).place() == Place(7)


def test_the_place_never_passes_what_is_out() -> None:
    made = lane(100, 101, 102, 103, start=100)
    for offset in (100, 102, 103):
        made.finish(offset)
    assert made.place() == Place(101, (102, 103))
    assert made.span == 3
    made.finish(101)
    assert made.place() == Place(104)


def test_gaps_of_compaction_are_passed() -> None:
    made = lane(100, 250, 900, start=100)
    for offset in (900, 100, 250):
        made.finish(offset)
    assert made.place() == Place(901)


def test_what_is_skipped_is_passed() -> None:
    made = lane(5, start=5)
    made.skip_to(20)
    assert made.place() == Place(5)
    made.finish(5)
    assert made.place() == Place(20)


def test_finishing_twice_or_what_was_never_lent_changes_nothing() -> None:
    made = lane(1, 2, start=1)
    for offset in (2, 2, 77):
        made.finish(offset)
    assert made.place() == Place(1, (2,))


def test_what_was_finished_before_the_assignment_stays_finished() -> None:
    made = Lane(Place(10, (12, 14)))
    made.lend(10)
    made.lend(11)
    made.finish(11)
    assert made.place() == Place(10, (11, 12, 14))


def test_a_place_after_marks_nothing() -> None:
    made = lane(1, 2, 3, start=1)
    made.finish(2)
    assert made.place_after([1]) == Place(3)
    assert made.place_after([3]) == Place(1, (2, 3))
    assert made.place() == Place(1, (2,))


def test_lag_leaves_out_what_is_finished() -> None:
    assert lag(Place(10, (12, 14)), 20) == 8
    assert lag(Place(10), 10) == 0
    assert lag(Place(10), 3) == 0


@given(st.sets(st.integers(1, SPAN - 1), max_size=300), st.integers(0, 2**40))
def test_metadata_says_what_is_finished_and_fits(above: set[int], start: int) -> None:
    place = Place(start, tuple(sorted(start + each for each in above)))
    assert len(encoded(place)) <= METADATA_CHARS
    assert decoded(start, encoded(place)) == place


def test_a_whole_span_fits() -> None:
    place = Place(5, tuple(range(6, 5 + SPAN)))
    assert len(encoded(place)) <= METADATA_CHARS
    assert decoded(5, encoded(place)) == place


@given(st.sets(st.integers(1, 10 * SPAN), min_size=1, max_size=50))
def test_what_does_not_fit_is_left_out_and_never_made_up(above: set[int]) -> None:
    place = Place(0, tuple(sorted(above)))
    text = encoded(place)
    assert len(text) <= METADATA_CHARS
    read = decoded(0, text).finished
    assert set(read) <= above
    assert {each for each in above if each < SPAN} <= set(read)


@given(st.text())
def test_metadata_of_others_says_nothing(text: str) -> None:
    assert decoded(3, text).next == 3
    assert decoded(3, None) == Place(3)
    assert decoded(3, "t1:not base64!") == Place(3)


@given(st.data())
def test_random_lives_of_a_lane(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 5))
    before = data.draw(st.sets(st.integers(start + 1, start + 6)))
    made = Lane(Place(start, tuple(sorted(before))))
    out: set[int] = set()
    done: set[int] = set(before)
    offset = start
    for _ in range(data.draw(st.integers(0, 40))):
        if data.draw(st.booleans()) or not out:
            offset += data.draw(st.integers(0, 3))
            if offset in before:
                made.skip_to(offset + 1)
            else:
                made.lend(offset)
                out.add(offset)
            offset += 1
        else:
            finished = data.draw(st.sampled_from(sorted(out)))
            assert made.place_after([finished]).next >= made.place().next
            made.finish(finished)
            out.discard(finished)
            done.add(finished)
        place = made.place()
        assert all(each >= place.next for each in out)
        assert place.next == min(out, default=made.next)
        assert set(place.finished) == {each for each in done if each >= place.next}
