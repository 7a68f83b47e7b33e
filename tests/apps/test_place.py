"""Where a demonstration keeps its log: one place at most, names of its own on a broker, nothing left of what was thrown away."""

import asyncio
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from services import rabbitmq_api, rabbitmq_vhost

from trilogue import BadOption
from trilogue.apps.place import KAFKA, Place, Wanted, place, shown
from trilogue.apps.video.stream_demo import streaming

BROKER = "kafka://localhost:9092?partitions=2"


def given(wanted: Wanted, **options: str) -> Place:
    async def run() -> Place:
        async with place(wanted, **options) as found:
            return found

    return asyncio.run(run())


def options_of(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))


def test_a_file_a_url_or_nothing(tmp_path: Path) -> None:
    assert given(Wanted(db=f"{tmp_path}/a b.db")) == Place(f"sqlite:///{tmp_path}/a%20b.db")
    assert given(Wanted("postgresql://host/db")) == Place("postgresql://host/db")
    assert given(Wanted("memory://")) == Place("memory://", kept=False)
    thrown = given(Wanted())
    assert thrown.url.startswith("sqlite:///")
    assert not thrown.kept


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted("memory://", db="a.db"),
        Wanted("memory://", "memory://"),
        Wanted(store="memory://"),
        Wanted(db="no/such/folder/a.db"),
    ],
)
def test_two_places_are_one_too_many(wanted: Wanted) -> None:
    with pytest.raises(BadOption):
        given(wanted)


def test_a_store_keeps_its_names_on_a_broker(tmp_path: Path) -> None:
    stores = [f"sqlite:///{tmp_path}/{name}.db" for name in ("a", "a", "b")]
    first, again, other = [options_of(given(Wanted(BROKER, store), **KAFKA).url) for store in stores]
    assert first == again
    assert first["prefix"] != other["prefix"]
    assert first["prefix"].startswith("demo-")
    assert {name: first[name] for name in ("partitions", *KAFKA)} == {"partitions": "2", **KAFKA}


def test_what_the_url_names_stays(tmp_path: Path) -> None:
    url = f"{BROKER}&prefix=mine-&linger=3ms"
    found = options_of(given(Wanted(url, f"sqlite:///{tmp_path}/a.db"), **KAFKA).url)
    assert found == {**KAFKA, "partitions": "2", "prefix": "mine-", "linger": "3ms"}
    rabbit = options_of(given(Wanted("amqp://localhost?prefix=mine-", f"sqlite:///{tmp_path}/a.db"), **KAFKA).url)
    assert rabbit == {"prefix": "mine-"}


def test_no_password_is_shown() -> None:
    assert shown("amqp://me:ses@me@host:5672/%2f") == "amqp://me:***@host:5672/%2f"
    assert shown("kafka://host:9092") == "kafka://host:9092"


def test_nothing_is_left_on_a_broker_of_what_was_thrown_away() -> None:
    async def left(url: str) -> str:
        async with place(Wanted(url)) as found:
            async with streaming(found.url, store=found.store).running():
                pass
            return options_of(found.url)["prefix"]

    with rabbitmq_vhost() as url:
        prefix = asyncio.run(left(url))
        names = [each["name"] for kind in ("queues", "exchanges") for each in _listed(kind, urlsplit(url).path)]
        assert [name for name in names if name.startswith(prefix)] == []


def _listed(kind: str, vhost: str) -> list[dict[str, str]]:
    found = rabbitmq_api("GET", f"/api/{kind}{vhost}")
    assert isinstance(found, list)
    return found
