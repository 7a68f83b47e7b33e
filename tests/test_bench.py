"""The benches work and compare like with like; how fast anything is, no test says."""

import asyncio
import json
import math
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from eventsourcing.sqlite import SQLiteConnectionPool

from trilogue.bench import report, scale, store_figures, store_limits, store_peers
from trilogue.bench.measured import Measured, weakest
from trilogue.bench.report import Row
from trilogue.cli.main import main
from trilogue.errors import BadOption, Unavailable, Unsupported

SCALE = 0.000_01
EVENTS = 128
STORE = ["save_one", "save_100", "save_64_tasks", "rehydrate", "project"]
SIDES = ["trilogue", "raw apsw", "eventsourcing"]
FULL = {"synchronous": 2, "journal_mode": "wal", "sqlite": "3.54.1", "wal_autocheckpoint": 4000}


@pytest.mark.parametrize("row", report.rows(SCALE), ids=lambda row: row.name)
def test_every_figure_is_measured(row: Row, tmp_path: Path) -> None:
    [found] = report.run(only=[row.name], rounds=1, scale=SCALE, folder=tmp_path)
    assert found.name == row.name
    rates = [found.rate, found.limit, found.ratio, *([found.peer, found.peer_ratio] if row.peer else [])]
    assert all(rate is not None and math.isfinite(rate) and rate > 0 for rate in rates)
    assert found.peer_name == (None if row.peer is None else "eventsourcing" if row.name in STORE else "huey")
    assert list(tmp_path.iterdir()) == []


def test_only_takes_a_side_or_the_beginning_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_measure", lambda row, folder, rounds: row)

    def names(*only: str) -> list[str]:
        return [row.name for row in report.run(only=only)]

    assert names("store") == STORE
    assert names("save_") == STORE[:3]
    assert names("latency", "project") == ["latency_p50_us", "latency_p99_us", "project"]
    assert names() == names("queue", "store")
    assert names("none") == []


# ── like with like ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_sides_wait_for_the_disk_alike(tmp_path: Path) -> None:
    for found in report.run(only=["store"], rounds=1, scale=SCALE, folder=tmp_path):
        assert list(found.pragmas) == SIDES
        for side, pragmas in found.pragmas.items():
            assert pragmas["synchronous"] == 2, side
            assert pragmas["journal_mode"] == "wal", side
            assert pragmas["wal_autocheckpoint"] == 4_000, side


def test_a_peer_that_would_not_wait_for_the_disk_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = SQLiteConnectionPool._create_connection

    def careless(self: SQLiteConnectionPool) -> Any:
        connection = create(self)
        connection.cursor().execute("pragma synchronous = normal")
        return connection

    monkeypatch.setattr(SQLiteConnectionPool, "_create_connection", careless)
    for measure in (store_peers.save_one, store_peers._save_in_threads, store_peers.project):
        pragmas = measure(tmp_path, EVENTS).pragmas
        assert pragmas is not None
        assert (pragmas["synchronous_by_default"], pragmas["synchronous"]) == (1, 2)


@pytest.mark.parametrize(("pragma", "other"), [("synchronous", 1), ("journal_mode", "delete")])
def test_sides_of_different_durability_are_not_compared(pragma: str, other: str | int, tmp_path: Path) -> None:
    row = Row("save_one", lambda _: Measured(1.0, FULL), lambda _: Measured(1.0, {**FULL, pragma: other}), None, "store")
    with pytest.raises(BadOption, match=f"save_one: {pragma} is .*'raw apsw': {other!r}"):
        report._measure(row, tmp_path, 1)


def test_the_weakest_connection_of_all_rounds_counts(tmp_path: Path) -> None:
    rounds = iter([FULL, {**FULL, "synchronous": 1}, FULL])
    row = Row("save_one", lambda _: Measured(1.0, FULL), lambda _: Measured(1.0, next(rounds)), None, "store")
    with pytest.raises(BadOption, match="synchronous"):
        report._measure(row, tmp_path, 3)
    assert weakest([FULL, {**FULL, "synchronous": 0}])["synchronous"] == 0


def test_every_side_stores_the_same_events(tmp_path: Path) -> None:
    asyncio.run(store_figures.save_100(tmp_path, 200))
    store_limits.save_100(tmp_path, 200)
    store_peers.save_100(tmp_path, 200)
    expected = [(cents, store_figures.TEXT) for _ in range(2) for cents in range(100)]
    found = {path.name.split("-")[0]: _deposits(path)[-200:] for path in tmp_path.glob("*.db")}
    assert found == dict.fromkeys(["trilogue", "raw", "eventsourcing"], expected)


def _deposits(path: Path) -> list[tuple[int, str]]:
    queries = {
        "trilogue": "select data from trilogue_records where stream = 'account-1' order by version",
        "raw": "select data from events where stream = 'account-1' order by version",
        "eventsourcing": "select state from stored_events where topic like '%Deposited' order by originator_version",
    }
    rows = apsw.Connection(str(path)).execute(queries[path.name.split("-")[0]]).fetchall()
    events = [json.loads(data) for (data,) in rows]
    return [(event["cents"], event["text"]) for event in events]


def test_a_side_that_did_not_do_its_work_has_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_limits, "_save", lambda connection, rows: None)
    with pytest.raises(Unavailable, match="raw apsw stored 0 where 192 were expected"):
        store_limits.save_one(tmp_path, EVENTS)


def test_the_peer_saves_in_the_way_that_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for way, rates in {"one after the other": (2.0, 1.0), "64 threads": (1.0, 2.0)}.items():
        monkeypatch.setattr(store_peers, "_save_in_turn", lambda *_, rate=rates[0]: Measured(rate, way="one after the other"))
        monkeypatch.setattr(store_peers, "_save_in_threads", lambda *_, rate=rates[1]: Measured(rate, way="64 threads"))
        assert store_peers.save_64_tasks(tmp_path, EVENTS).way == way


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trilogue.bench.store_peers", None)
    monkeypatch.delattr("trilogue.bench.store_peers")
    with pytest.raises(Unsupported, match=r"pip install 'trilogue\[bench\]'"):
        list(report.run(only=["save_one"], rounds=1, scale=SCALE, folder=tmp_path))


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


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store figure and a queue figure, as if they had been measured."""
    theirs = {**FULL, "sqlite": "3.40.1", "synchronous_by_default": 1}
    pragmas = {"trilogue": FULL, "raw apsw": FULL, "eventsourcing": theirs}
    found = [
        report.Result("save_64_tasks", 30_000.0, 3_000.0, 10.0, 2_000.0, 15.0, "eventsourcing", "64 threads", pragmas),
        report.Result("latency_p50_us", 700.0, 350.0, 2.0, None, None, None, None, {}),
    ]

    def measured(**_: object) -> Iterator[report.Result]:
        return iter(found)

    monkeypatch.setattr(report, "run", measured)


@pytest.mark.usefixtures("results")
def test_the_table_names_the_peer_and_both_sides_durability(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    table = capsys.readouterr().out
    lines = table.splitlines()
    assert "eventsourcing (64 threads)" in lines[1]
    assert lines[2].split() == ["latency_p50_us", "700", "350", "2.00", "-", "-", "-"]
    ours = "trilogue: synchronous=2 (FULL), journal_mode=wal, sqlite=3.54.1, wal_autocheckpoint=4000"
    assert ours in lines
    assert [line.partition(":")[0] for line in lines[3:]] == SIDES
    assert lines[-1].endswith("synchronous_by_default=1 (NORMAL)")


@pytest.mark.usefixtures("results")
def test_the_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--only", "store", "--json"]) == 0
    store, latency = json.loads(capsys.readouterr().out)
    assert store["peer_name"] == "eventsourcing"
    assert store["peer_way"] == "64 threads"
    assert {side: pragmas["synchronous"] for side, pragmas in store["pragmas"].items()} == dict.fromkeys(SIDES, 2)
    assert (latency["name"], latency["rate"], latency["peer"], latency["pragmas"]) == ("latency_p50_us", 700.0, None, {})


def test_a_figure_that_is_not_there_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--only", "nothing"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in [*STORE, "publish_one", "latency_p99_us", "store"])
