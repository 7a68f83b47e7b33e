"""`demo bank`, `demo levels`: the report is what was promised, a broken invariant is exit code 1, a mistake one sentence."""

import json
from pathlib import Path

import pytest

from trilogue.apps.bank import demo
from trilogue.cli.main import main

Captured = pytest.CaptureFixture[str]
SMALL = ["--accounts", "6", "--transfers", "60", "--writers", "4", "--workers", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_bank_reports(capsys: Captured) -> None:
    assert main(["demo", "bank", *SMALL, "--report", "json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out)
    assert report["scenario"]["balances"] == [1000, 1500, 1300, 500, 800, -400]
    assert report["scenario"]["at_event_3"] == 1300
    assert report["scenario"]["conflict"] is True
    assert '"at_event_3": 1300,' in out  # a whole number, not 1300.0
    load = report["load"]
    assert load["transfers"] == 60 == load["completed"] + load["failed"]
    assert isinstance(load["conflicts"], int)
    assert load["elapsed_s"] > 0
    assert load["invariants"] == {
        "money_neither_made_nor_lost": True,
        "no_balance_below_limit": True,
        "versions_without_gaps": True,
        "every_projection_equals_a_fold_of_the_log": True,
        "every_transfer_ended": True,
    }


def test_bank_goes_on_with_a_file(capsys: Captured, folder: Path) -> None:
    line = ["demo", "bank", *SMALL, "--db", "kept.db", "--report", "json"]
    assert main(line) == 0
    first = json.loads(capsys.readouterr().out)
    line[line.index("60")] = "90"
    assert main(line) == 0
    second = json.loads(capsys.readouterr().out)
    assert (first["load"]["transfers"], second["load"]["transfers"]) == (60, 90)
    assert (folder / "kept.db").exists()
    assert main(line[:-2]) == 0
    said = capsys.readouterr().out.splitlines()
    for command in [line.split()[1:] for line in said if line.startswith("  trilogue ")]:
        assert main(command) == 0
        assert capsys.readouterr().out


def test_bank_tells_it_to_people(capsys: Captured) -> None:
    assert main(["demo", "bank", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "-400" in out
    assert "After its third event it held 1,300" in out
    assert "version 7, expected was 6" in out
    assert "60 transfers between 6 accounts" in out
    assert out.count(": holds") == 5


def test_a_broken_invariant_is_exit_code_1(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(app: object, ledger: object) -> dict[str, bool]:
        return {"money_neither_made_nor_lost": False}

    monkeypatch.setattr(demo, "check", broken)
    assert main(["demo", "bank", *SMALL]) == 1
    assert "money neither made nor lost: BROKEN" in capsys.readouterr().out


def test_levels_report(capsys: Captured) -> None:
    assert main(["demo", "levels", "--report", "json"]) == 0
    assert [level["asked_in_all"] for level in json.loads(capsys.readouterr().out)["levels"]] == [3, 0, 0]
    assert main(["demo", "levels"]) == 0
    assert "Level 3, event sourcing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--accounts 1", "expected 2 to 10,000"),
        ("--transfers -1", "expected 0 to 1,000,000"),
        ("--writers 0", "expected 1 to 1,000"),
        ("--workers 99", "expected 1 to 16"),
        ("--report xml", "json"),
        ("--db nowhere/x.db", "nowhere"),
        ("--db .", "is a folder"),
    ],
)
def test_a_mistake_is_one_sentence(line: str, said: str, capsys: Captured, folder: Path) -> None:
    assert main(["demo", "bank", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert list(folder.iterdir()) == []
