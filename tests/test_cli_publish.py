"""`publish` on a real file: one event, lines of standard input, what is no JSON."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trilogue.cli.main import main

TRILOGUE = [sys.executable, "-m", "trilogue"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRILOGUE_URL", raising=False)
    return tmp_path


def said(capsys: Captured, *args: str, code: int = 0) -> str:
    """What a command printed; its errors where it failed."""
    capsys.readouterr()
    assert main(args) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    return err if code else out


def told(capsys: Captured, *args: str) -> Any:
    return json.loads(said(capsys, *args, "--json"))


def test_publish_and_tail(capsys: Captured) -> None:
    assert "position 1" in said(capsys, "publish", "video.watched", '{"user": "u1"}', "--key", "u1", "--id", "a")
    (record,) = [json.loads(line) for line in said(capsys, "tail", "--no-follow", "--json").splitlines()]
    assert (record["position"], record["type"], record["key"], record["id"]) == (1, "video.watched", "u1", "a")
    assert record["data"] == {"user": "u1"}


def test_publishing_the_same_id_again_adds_nothing(capsys: Captured) -> None:
    for _ in range(2):
        assert "position 1" in said(capsys, "publish", "a", '{"n":1}', "--id", "a")
    assert "error: " in said(capsys, "publish", "a", '{"n":2}', "--id", "a", code=1)


BAD_JSON = ['{"a":1', '{"a":NaN}', "{'a':1}", "5", "null", '"x"', "", "[" * 50_000, '{"a":1e400}', "\udcff"]


@pytest.mark.parametrize("text", BAD_JSON)
def test_bad_json_is_refused_and_makes_no_file(text: str, capsys: Captured, folder: Path) -> None:
    assert "expected one JSON object, as" in said(capsys, "publish", "a", text, code=2)
    assert list(folder.iterdir()) == []


def from_stdin(*args: str, data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*TRILOGUE, *args], input=data, capture_output=True, timeout=60, check=False)


def test_publish_lines(capsys: Captured) -> None:
    lines = b"\xef\xbb\xbf" + b"".join(b'{"n":%d}\r\n' % n for n in range(2_500)) + b'\n{"n":2500}'
    assert from_stdin("publish", "n.counted", "-", data=lines).stdout == b"published 2,501 n.counted\n"
    records = [json.loads(line) for line in said(capsys, "tail", "--after", "0", "--no-follow", "--json").splitlines()]
    assert [record["data"]["n"] for record in records] == list(range(2_501))


def test_a_bad_line_is_named_and_those_before_it_are_there(capsys: Captured) -> None:
    done = from_stdin("publish", "n.counted", "-", data=b'{"n":1}\n\n{"n":2}\n{"n"\n{"n":3}\n')
    assert done.returncode == 1
    assert b"line 4 " in done.stderr
    assert b"the 2 events before it are published" in done.stderr
    assert told(capsys, "status")["head"] == 2


def test_publish_from_a_regular_file_and_from_nothing(folder: Path, capsys: Captured) -> None:
    (folder / "in.jsonl").write_text('{"n":1}\n{"n":2}')
    with open("in.jsonl", "rb") as file:
        subprocess.run([*TRILOGUE, "publish", "a", "-"], stdin=file, check=True)
    done = subprocess.run([*TRILOGUE, "publish", "a", "-"], stdin=subprocess.DEVNULL, check=True, capture_output=True)
    assert done.stdout == b"published 0 a\n"
    assert told(capsys, "status")["types"] == {"a": 2}


def test_a_slow_pipe_is_published_line_by_line() -> None:
    with subprocess.Popen([*TRILOGUE, "publish", "a", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as publisher:
        assert publisher.stdin is not None
        publisher.stdin.write(b'{"n":1}\n')
        publisher.stdin.flush()
        # The pipe stays open: the event has to be on the log all the same.
        subprocess.run([*TRILOGUE, "publish", "b", "{}"], check=True, capture_output=True)
        follow = subprocess.run([*TRILOGUE, "tail", "a", "--limit", "1"], check=True, capture_output=True, timeout=60)
        assert b'{"n":1}' in follow.stdout
        publisher.send_signal(signal.SIGINT)
        assert publisher.wait(60) == 130


def test_a_delayed_event_waits(capsys: Captured) -> None:
    assert "scheduled reminder" in said(capsys, "publish", "reminder", "{}", "--delay", "1h")
    status = told(capsys, "status")
    assert (status["head"], status["timers"]) == (0, 1)


def test_a_new_type_near_a_known_one_is_remarked(capsys: Captured) -> None:
    said(capsys, "publish", "video.watched", "{}")
    assert main(["publish", "video.wached", "{}"]) == 0
    assert "did you mean 'video.watched'?" in capsys.readouterr().err
