"""Generated watches: the same for a seed, in order, and like what people do."""

import random
from collections import Counter
from itertools import islice

from trilogue.apps.video.generator import STARTS_US, generate, make_catalogue

HOUR_US = 3_600_000_000


def test_a_seed_gives_the_same_watches() -> None:
    first, again, other = (list(islice(generate(seed), 500)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_watches_come_in_order_of_time() -> None:
    times = [watch.time_us for watch in islice(generate(3), 5_000)]
    assert times == sorted(times)
    assert times[0] >= STARTS_US


def test_few_titles_are_watched_most_and_evenings_are_busy() -> None:
    watches = list(islice(generate(1), 20_000))
    titles = Counter(watch.video for watch in watches)
    assert sum(n for _, n in titles.most_common(len(titles) // 10)) > len(watches) / 4
    hours = Counter((watch.time_us - STARTS_US) // HOUR_US % 24 for watch in watches)
    assert hours[21] > 3 * hours[4]


def test_the_catalogue_has_no_title_twice_and_series_lead_on() -> None:
    films = make_catalogue(random.Random(1), 400)
    assert len({film.title for film in films}) == len({film.video for film in films}) == 400
    first = next(film for film in films if film.sequel is not None and not film.title.endswith(" II"))
    assert first.sequel is not None
    assert films[first.sequel].title == f"{first.title} II"
    assert films[first.sequel].genres == first.genres
