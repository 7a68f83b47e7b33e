"""The benches work and compare like with like; how fast anything is, no test says."""

import asyncio
import json
import math
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import pika
import psycopg
import pytest
import services
from confluent_kafka.admin import AdminClient
from eventsourcing.sqlite import SQLiteConnectionPool

from trilogue.bench import (
    environment,
    eventsourcing_sqlite,
    faststream_kafka,
    faststream_rabbit,
    raw_apsw_store,
    raw_kafka,
    raw_pika,
    report,
    scale,
    store_figures,
    suites,
)
from trilogue.bench.figures import SIDE
from trilogue.bench.measured import Measured, Stretch, check_stored, weakest
from trilogue.bench.place import Place, place
from trilogue.bench.suites import Figure, Side
from trilogue.errors import BadOption, Unavailable, Unsupported

SCALE = 0.000_01
EVENTS = 128
SQLITE = "sqlite:///bench.db"
SCHEMES = ("sqlite", "postgresql", "amqp", "kafka")
STORE = ["save_one", "save_100", "save_64_tasks", "rehydrate", "project"]
SIDES = ["trilogue", "raw apsw", "eventsourcing"]
FULL = {"synchronous": 2, "journal_mode": "wal", "sqlite": "3.54.1", "wal_autocheckpoint": 4000}
FIGURES = [(scheme, figure.name) for scheme in SCHEMES for figure in suites.suite(scheme)]


@contextmanager
def server(scheme: str) -> Iterator[str]:
    """A URL of this kind where nothing else is; at the end nothing may be left there."""
    if scheme == "postgresql":
        with services.postgresql_database() as url:
            yield url
            with psycopg.connect(url) as connection:
                left = connection.execute("select nspname from pg_namespace where nspname like 'bench%'").fetchall()
    elif scheme == "amqp":
        with services.rabbitmq_vhost() as url:
            yield url
            vhost = url.rpartition("/")[2]
            found = [
                *services.rabbitmq_api("GET", f"/api/queues/{vhost}"),
                *services.rabbitmq_api("GET", f"/api/exchanges/{vhost}"),
            ]
            left = [one["name"] for one in found if one["name"] and not one["name"].startswith("amq.")]
    elif scheme == "kafka":
        with services.kafka_prefix() as url:
            yield url
            admin = AdminClient({"bootstrap.servers": url.partition("://")[2].partition("?")[0]})
            prefix = url.partition("prefix=")[2]
            left = [topic for topic in admin.list_topics(timeout=30).topics if topic.startswith(prefix)]
    else:
        yield SQLITE
        left = []
    assert left == []


@pytest.mark.parametrize(("scheme", "name"), FIGURES)
def test_every_figure_is_measured(scheme: str, name: str, tmp_path: Path) -> None:
    [figure] = [figure for figure in suites.suite(scheme) if figure.name == name]
    with server(scheme) as url:
        found = [one for one in report.run(url, only=[name], rounds=1, scale=SCALE, folder=tmp_path) if one.name == name]
    [result] = found
    assert result.what
    assert [(side.name, side.aim) for side in result.beside] == [(side.name, side.aim) for side in figure.beside]
    values = [result.value, *(value for side in result.beside for value in (side.value, side.ratio))]
    assert all(math.isfinite(value) and value > 0 for value in values)
    assert list(tmp_path.iterdir()) == []


def test_only_takes_a_side_or_the_beginning_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "result", lambda figure, found: figure)
    monkeypatch.setattr(report, "suite", lambda scheme, scale: [untimed(figure) for figure in suites.suite(scheme)])

    def names(*only: str) -> list[str]:
        return [figure.name for figure in report.run(only=only, rounds=1)]

    assert names("store") == STORE
    assert names("save_") == STORE[:3]
    assert names("latency", "project") == ["latency_p50_us", "latency_p99_us", "project"]
    assert names() == names("queue", "store")
    assert names("none") == []


def untimed(figure: Figure) -> Figure:
    """The figure, of sides that do nothing."""
    ours, *beside = (replace(side, measure=lambda at, events: Measured(1.0)) for side in (figure.ours, *figure.beside))
    return replace(figure, ours=ours, beside=tuple(beside))


def test_the_aims_are_those_we_gave_ourselves() -> None:
    def aims(scheme: str) -> dict[str, list[tuple[str, float]]]:
        sides = {figure.name: [figure.ours, *figure.beside] for figure in suites.suite(scheme)}
        found = {name: [(side.name, side.aim) for side in every if side.aim] for name, every in sides.items()}
        return {name: every for name, every in found.items() if every}

    assert aims("sqlite") == {}
    assert aims("amqp") == {
        "publish_64": [("FastStream", 4)],
        "publish_many": [("raw pika", 0.9), ("FastStream", 4)],
        "consume_ordered": [("FastStream", 7)],
        "consume_emit": [("FastStream", 3)],
    }
    assert aims("kafka") == {
        "publish_64": [("FastStream", 2.5)],
        "publish_many": [("FastStream", 2.5)],
        "consume_ordered": [("FastStream", 20), ("FastStream, batches of 500", 1.2)],
        "consume_emit": [("FastStream", 10)],
    }
    assert aims("postgresql") == {
        "publish_many": [("raw psycopg", 0.5)],
        "consume_ordered": [("trilogue", 30_000)],
        "save_one": [("eventsourcing", 1.4)],
        "save_64_tasks": [("eventsourcing", 15)],
    }


def test_an_aim_is_met_by_the_median_of_the_rounds_own_ratios() -> None:
    ours, theirs = side(SIDE, aim=20.0), side("peer", aim=2.0)
    figure = Figure("publish_one", "queue", "events/s", ours, (theirs,))

    def result(*rounds: tuple[float, float]) -> report.Result:
        return report.result(figure, {ours: [Measured(a) for a, _ in rounds], theirs: [Measured(b) for _, b in rounds]})

    found = result((10, 1), (20, 10), (90, 100))
    assert (found.value, found.aim, found.met) == (20, 20, True)
    [beside] = found.beside
    assert (beside.value, beside.ratio, beside.aim, beside.met) == (10, 2, 2, True)
    missed = result((19, 10))
    assert (missed.met, missed.beside[0].met) == (False, False)


def side(name: str, aim: float | None = None) -> Side:
    """One that is never measured."""
    return Side(name, "", lambda at, events: Measured(1.0), EVENTS, aim)


# ── like with like ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_sides_wait_for_the_disk_alike(tmp_path: Path) -> None:
    for found in report.run(only=["store"], rounds=1, scale=SCALE, folder=tmp_path):
        assert list(found.durability) == SIDES
        for name, durability in found.durability.items():
            assert durability["synchronous"] == 2, name
            assert durability["journal_mode"] == "wal", name
            assert durability["wal_autocheckpoint"] == 4_000, name


def test_a_peer_that_would_not_wait_for_the_disk_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = SQLiteConnectionPool._create_connection

    def careless(self: SQLiteConnectionPool) -> Any:
        connection = create(self)
        connection.cursor().execute("pragma synchronous = normal")
        return connection

    monkeypatch.setattr(SQLiteConnectionPool, "_create_connection", careless)
    for measure in (eventsourcing_sqlite.save_one, eventsourcing_sqlite._save_in_threads, eventsourcing_sqlite.project):
        with place(SQLITE, None, tmp_path) as at:
            durability = measure(at, EVENTS).durability
        assert durability is not None
        assert (durability["synchronous_by_default"], durability["synchronous"]) == (1, 2)


@pytest.mark.parametrize(
    ("what", "other"), [("synchronous", 1), ("journal_mode", "delete"), ("synchronous_commit", "off"), ("delivery_mode", 1)]
)
def test_sides_of_different_durability_are_not_compared(what: str, other: str | int) -> None:
    ours, theirs = side(SIDE), side("raw apsw")
    alike = {**FULL, "synchronous_commit": "on", "delivery_mode": 2}
    found = {ours: [Measured(1.0, alike)], theirs: [Measured(1.0, {**alike, what: other})]}
    with pytest.raises(BadOption, match=f"save_one: {what} is .*'raw apsw': {other!r}"):
        report.result(Figure("save_one", "store", "events/s", ours, (theirs,)), found)


def test_the_weakest_connection_of_all_rounds_counts() -> None:
    ours, theirs = side(SIDE), side("raw apsw")
    rounds = [Measured(1.0, FULL), Measured(1.0, {**FULL, "synchronous": 1}), Measured(1.0, FULL)]
    with pytest.raises(BadOption, match="synchronous"):
        report.result(Figure("save_one", "store", "events/s", ours, (theirs,)), {ours: [Measured(1.0, FULL)] * 3, theirs: rounds})
    assert weakest([FULL, {**FULL, "synchronous": 0}])["synchronous"] == 0


def test_a_side_that_did_less_has_no_figure() -> None:
    stretch = Stretch(3)
    assert [stretch.passed(), stretch.passed()] == [False, False]
    with pytest.raises(Unavailable, match="2 where 3"):
        stretch.rate("a peer")
    with pytest.raises(Unavailable, match="a peer stored 4 where 3"):
        check_stored("a peer", 4, 3)
    with services.rabbitmq_vhost() as url, place(url, None, None) as at:
        raw_pika.declare(at)
        raw_pika.fill(at, 3)
        with pytest.raises(Unavailable, match="3 where 2"):
            raw_pika.durability(at, raw_pika.queue_of(at, raw_pika.WATCHED), 2)
    with services.kafka_prefix() as url, place(url, None, None) as at:
        raw_kafka.declare(at)
        raw_kafka.fill(at, 3)
        with pytest.raises(Unavailable, match="3 where 4"):
            raw_kafka.stored(at, raw_kafka.events_topic(at), 4)


def test_every_side_stores_the_same_events(tmp_path: Path) -> None:
    with place(SQLITE, None, tmp_path) as at:
        asyncio.run(store_figures.save_100(at, 200))
        raw_apsw_store.save_100(at, 200)
        eventsourcing_sqlite.save_100(at, 200)
        expected = [(cents, store_figures.TEXT) for _ in range(2) for cents in range(100)]
        found = {path.name.split("-")[0]: _deposits(path)[-200:] for path in at.folder.glob("*.db") if "keys" not in path.name}
    assert found == dict.fromkeys(["trilogue.db", "raw", "eventsourcing"], expected)


def _deposits(path: Path) -> list[tuple[int, str]]:
    queries = {
        "trilogue.db": "select data from trilogue_records where stream = 'account-1' order by version",
        "raw": "select data from events where stream = 'account-1' order by version",
        "eventsourcing": "select state from stored_events where topic like '%Deposited' order by originator_version",
    }
    rows = apsw.Connection(str(path)).execute(queries[path.name.split("-")[0]]).fetchall()
    events = [json.loads(data) for (data,) in rows]
    return [(event["cents"], event["text"]) for event in events]


def test_raw_pika_and_faststream_leave_the_same_messages() -> None:
    def bodies(at: Place) -> list[dict[str, Any]]:
        with raw_pika.channel_of(at) as channel:
            got = (channel.basic_get(raw_pika.queue_of(at, raw_pika.WATCHED)) for _ in range(5))
            return [persistent(properties, body) for _, properties, body in got]

    def persistent(properties: pika.BasicProperties, body: bytes) -> dict[str, Any]:
        assert properties.delivery_mode == 2
        found: dict[str, Any] = json.loads(body)
        return found

    with services.rabbitmq_vhost() as url:
        with place(url, None, None) as at:
            raw_pika.publish_one(at, 5)
            raw = bodies(at)
        with place(url, None, None) as at:
            faststream_rabbit.publish_one(at, 5)
            assert bodies(at) == raw


def test_raw_kafka_and_faststream_put_the_same_keys_into_the_same_partitions() -> None:
    def partitions(at: Place) -> set[tuple[bytes, int]]:
        found: set[tuple[bytes, int]] = set()
        with raw_kafka._consumer(at, raw_kafka.events_topic(at)) as consumer:
            for _ in range(40):
                while (message := consumer.poll(1)) is None:
                    pass
                found.add((message.key() or b"", message.partition() or 0))
        return found

    with services.kafka_prefix() as url:
        with place(url, None, None) as at:
            raw_kafka.publish_many(at, 40)
            raw = partitions(at)
        with place(url, None, None) as at:
            faststream_kafka.publish_many(at, 40)
            assert partitions(at) == raw


def test_the_peer_saves_in_the_way_that_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for way, rates in {"one after the other": (2.0, 1.0), "64 threads": (1.0, 2.0)}.items():
        in_turn, threads = Measured(rates[0], way="one after the other"), Measured(rates[1], way="64 threads")
        monkeypatch.setattr(eventsourcing_sqlite, "_save_in_turn", lambda *_, in_turn=in_turn: in_turn)
        monkeypatch.setattr(eventsourcing_sqlite, "_save_in_threads", lambda *_, threads=threads: threads)
        with place(SQLITE, None, tmp_path) as at:
            assert eventsourcing_sqlite.save_64_tasks(at, EVENTS).way == way


@pytest.mark.parametrize(
    ("scheme", "module"), [("sqlite", "huey_sqlite"), ("amqp", "faststream_rabbit"), ("postgresql", "raw_psycopg")]
)
def test_what_is_not_installed_is_named(scheme: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"trilogue.bench.{module}", None)
    with pytest.raises(Unsupported, match=r"pip install 'trilogue\[all,bench\]'"):
        suites.suite(scheme)


def test_a_url_without_figures_is_refused_without_its_password() -> None:
    with pytest.raises(BadOption, match=r"there are figures for sqlite://, postgresql://, amqp://, kafka://") as refused:
        list(report.run("redis://user:secret@host"))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["amqp://user:secret@127.0.0.1:1", "postgresql://user:secret@127.0.0.1:1/x"])
def test_a_server_that_does_not_answer_is_named_without_its_password(url: str) -> None:
    with pytest.raises(Unavailable, match=r"user:\*\*\*@127.0.0.1:1.* does not answer .*is it running") as said:
        environment.around(url, None, rounds=1, scale=1)
    assert "secret" not in str(said.value)


def test_a_side_that_fails_is_named_and_what_it_made_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(at: Place, events: int) -> Measured:
        (at.folder / "half").touch()
        raise OSError("no room")

    figures = [replace(figure, beside=(Side("peer", "", fails, 1),)) for figure in suites.suite("sqlite", SCALE)]
    monkeypatch.setattr(report, "suite", lambda scheme, scale: figures)
    with pytest.raises(Unavailable, match="publish_one: peer failed: OSError: no room"):
        list(report.run(only=["publish_one"], rounds=1, folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("scheme", "server_version"), [("postgresql", "postgresql"), ("amqp", "rabbitmq"), ("kafka", "kafka_brokers")]
)
def test_the_environment_has_the_servers_version_and_no_password(scheme: str, server_version: str) -> None:
    with server(scheme) as url:
        around = environment.around(url, None, rounds=1, scale=1)
    assert around[server_version]
    assert "not installed" not in around.values()
    assert url.rpartition("@")[0].rpartition(":")[2] not in str(around) or scheme == "kafka"


# ── the log grows ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_growing_log_is_measured_at_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "BATCHES", 1)
    monkeypatch.setattr(scale, "APPENDS", 20)
    figures = dict(scale.run(tmp_path, (500, 1_000)))
    kinds = ["append_at", "claim_at", "append_p50_us_at", "append_p99_us_at"]
    assert sorted(figures) == sorted(f"{kind}_{size}" for kind in kinds for size in (500, 1_000))
    assert all(figure > 0 for figure in figures.values())
    assert not (tmp_path / "scale.db").exists()  # two logs of ten million records are not on the disk at once
    connection = sqlite3.connect(tmp_path / "streams.db")
    rows = connection.execute("select count(distinct stream), count(*), max(version) > 100 from trilogue_records").fetchall()
    connection.close()
    assert rows == [(10, 1_000 + 2 * 20, 1)]
