"""`demo`: the options reach the demonstrations, mistakes in them are one sentence."""

import json
from pathlib import Path

import pytest

from trilogue.cli.main import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_queue_reports(capsys: Captured) -> None:
    assert main(["demo", "queue", "--report", "json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_video_reports_what_its_options_asked_for(capsys: Captured, folder: Path) -> None:
    rows = "".join(f"u{n % 5},v{n % 7},{1_600_000_000 + n}\n" for n in range(40))
    (folder / "watches.csv").write_text(f"who,what,at\n{rows}u1,,7\n")
    options = "--input watches.csv --columns user=who,video=what,time=at --limit 30 --fail badge=0.5 --fail user=0 --down ranking"
    line = ["demo", "video", *options.split(), "--chain-sample", "0", "--db", "kept.db", "--seed", "3", "--report", "json"]
    assert main(line) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["watches"] == 30
    assert report["rejected"] == 1
    assert {name: service["handled"] for name, service in report["services"].items()} == dict.fromkeys(
        ("user", "recommendation", "analytics", "notification", "badge", "ranking"), 30
    )
    assert report["services"]["badge"]["failed_attempts"] > 0
    assert report["services"]["analytics"]["failed_attempts"] == 0
    assert (folder / "kept.db").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--fail analitics=0.1", "did you mean 'analytics'?"),
        ("--fail analytics=2", "from 0 to 1"),
        ("--down bagde", "'badge'"),
        ("--input nowhere.csv", "nowhere.csv"),
        ("--speed fast", "60x"),
        ("--limit 0", "--limit"),
        ("--report xml", "json"),
        ("--chain-sample -1", "0 to"),
        ("--db nowhere/x.db", "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(line: str, said: str, capsys: Captured, folder: Path) -> None:
    assert main(["demo", "video", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert list(folder.iterdir()) == []
