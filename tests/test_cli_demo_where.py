"""`demo …`: where the log is. One place at most, a mistake is one sentence, a password is never shown."""

from pathlib import Path

import pytest

from trilogue.cli.main import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("demo", ["video", "bank"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--url sqlite:///a.db --db b.db", "--url and --db both name a log"),
        ("--store sqlite:///a.db", "--store belongs beside amqp:// and kafka:// only"),
        ("--url memory:// --store sqlite:///a.db", "--store belongs beside amqp:// and kafka:// only"),
        ("--url nonsense://x", "nonsense"),
        ("--url kafka://localhost --store amqp://me:sesame@localhost", "amqp"),
    ],
)
def test_a_mistake_is_one_sentence(demo: str, line: str, said: str, capsys: Captured, folder: Path) -> None:
    assert main(["demo", demo, *line.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert "sesame" not in err
    assert list(folder.iterdir()) == []


def test_memory_is_one_process(capsys: Captured) -> None:
    line = ["demo", "bank", "--url", "memory://", "--accounts", "4", "--transfers", "5"]
    assert main([*line, "--workers", "2"]) == 2
    assert "this log is in one process" in capsys.readouterr().err
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "in 1 process:" in out
    assert "Look around" not in out


@pytest.mark.parametrize("demo", ["queue", "stream", "levels"])
def test_the_small_ones_keep_their_log_where_they_are_told(demo: str, capsys: Captured, folder: Path) -> None:
    assert main(["demo", demo, "--url", "sqlite:///kept.db", "--report", "json"]) == 0
    assert (folder / "kept.db").exists()
    assert capsys.readouterr().out.startswith("{")
