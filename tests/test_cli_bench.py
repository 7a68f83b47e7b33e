"""`trilogue bench`: its table, its JSON, and what it refuses."""

import json
from collections.abc import Iterator

import pytest

from trilogue.bench import report
from trilogue.cli.main import main

SQLITE = "sqlite:///bench.db"
STORE = ["save_one", "save_100", "save_64_tasks", "rehydrate", "project"]
SIDES = ["trilogue", "raw apsw", "eventsourcing"]
FULL = {"synchronous": 2, "journal_mode": "wal", "sqlite": "3.54.1", "wal_autocheckpoint": 4000}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store figure and a queue figure, as if they had been measured."""
    theirs = {**FULL, "sqlite": "3.40.1", "synchronous_by_default": 1}
    durability = {"trilogue": FULL, "raw apsw": FULL, "eventsourcing": theirs}
    raw = report.Compared("raw apsw", "One by one.", 3_000.0, 10.0, None, None, None)
    peer = report.Compared("eventsourcing", "Threads.", 2_000.0, 15.0, 16.0, False, "64 threads")
    limit = report.Compared("raw apsw", "Commit and read.", 350.0, 2.0, None, None, None)
    found = [
        report.Result("save_64_tasks", "64 tasks.", "events/s", 30_000.0, 20_000.0, True, (raw, peer), durability),
        report.Result("latency_p50_us", "Seconds.", "µs", 700.0, None, None, (limit,), {}),
    ]

    def measured(*_: object, **__: object) -> Iterator[report.Result]:
        return iter(found)

    monkeypatch.setattr(report, "run", measured)


@pytest.mark.usefixtures("results")
def test_the_table_has_a_line_for_each_side_and_says_what_of_its_durability(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["save_64_tasks", "30,000", "raw", "apsw", "3,000", "10.00", "-", "-"]
    assert lines[2].split() == ["eventsourcing", "(64", "threads)", "2,000", "15.00", "16.00", "no"]
    assert lines[3].split() == ["-", "-", "-", "20,000", "yes"]
    assert lines[4].split() == ["latency_p50_us", "700", "raw", "apsw", "350", "2.00", "-", "-"]
    assert "trilogue: synchronous=2 (FULL), journal_mode=wal, sqlite=3.54.1, wal_autocheckpoint=4000" in lines
    assert [line.partition(":")[0] for line in lines[5:8]] == SIDES
    assert lines[7].endswith("synchronous_by_default=1 (NORMAL)")
    assert "python 3." in lines[8]


@pytest.mark.usefixtures("results")
def test_the_json_has_the_same_and_what_it_was_measured_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--only", "store", "--rounds", "5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    store, latency = document["figures"]
    assert (store["unit"], store["value"], store["aim"], store["met"]) == ("events/s", 30_000.0, 20_000.0, True)
    peer = store["beside"][1]
    assert (peer["name"], peer["ratio"], peer["met"], peer["way"]) == ("eventsourcing", 15.0, False, "64 threads")
    assert {name: said["synchronous"] for name, said in store["durability"].items()} == dict.fromkeys(SIDES, 2)
    assert (latency["name"], latency["value"], latency["durability"]) == ("latency_p50_us", 700.0, {})
    assert (document["environment"]["url"], document["environment"]["rounds"]) == (SQLITE, 5)
    assert {"python", "cpu", "cores", "apsw", "huey"} <= document["environment"].keys()


def test_a_figure_that_is_not_there_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--only", "nothing"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in [*STORE, "publish_one", "latency_p99_us", "store"])


def test_growth_is_measured_on_a_file_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--full", "--url", "kafka://127.0.0.1:1"]) == 2
    assert "--full" in capsys.readouterr().err
