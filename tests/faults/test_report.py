"""The page that a campaign writes."""

from campaign import page_of
from scene import Result


def test_a_page_tells_what_was_broken() -> None:
    good = Result("broker killed", "amqp+sqlite", stored=1_200, unknown=3, repeated=7, bound=90, recovery_s=2.52)
    bad = Result("none", "sqlite", stored=900, lost=2, trouble=("lost: 2, as [('a', 1)]",))
    page = page_of([good, bad], "7", ["rabbitmq 3.10.8"])
    assert "| broker killed | amqp+sqlite | 1,200 | 3 | 0 | 0 | 7 (90) | 0 | 0 | 2.5 s |" in page
    assert page.endswith("* none, sqlite: lost: 2\n")
    assert "Seed 7. rabbitmq 3.10.8." in page
    assert "A part of it only" not in page


def test_a_page_of_a_part_says_so() -> None:
    assert "A part of it only: not run, or not at every URL, were storm." in page_of([], "7", [], ["storm"])


def test_a_page_without_trouble_says_so() -> None:
    quick = Result("wrong password", "postgresql", recovery_s=0.4)
    queue = Result("long queue", "sqlite", stored=50_000, recovery_s=9.0, rss_mb=88)
    page = page_of([quick, queue], "7", [])
    assert "No promise was broken" in page
    assert "| wrong password | postgresql |  |  |  |  |  |  |  | 0.4 s |" in page
    assert "sqlite 88 MB" in page
