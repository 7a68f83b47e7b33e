"""`relay`: what is published to one log comes to another, once, in order."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trilogue.cli.main import main
from trilogue.events import Envelope, Record, new_id
from trilogue.ports import Query
from trilogue.stores import open_store


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fill(url: str, *envelopes: Envelope) -> None:
    async def put() -> None:
        store = open_store(url)
        await store.open()
        await store.append(envelopes)
        await store.close()

    asyncio.run(put())


def held(url: str) -> list[Record]:
    async def get() -> list[Record]:
        store = open_store(url)
        await store.open()
        try:
            return await store.read(Query())
        finally:
            await store.close()

    return asyncio.run(get())


def made(n: int, kind: str = "order.placed") -> Envelope:
    return Envelope(new_id(), kind, json.dumps({"n": n}).encode(), f"k{n % 2}")


ONE, TWO = "sqlite:///one.db", "sqlite:///two.db"


def test_what_is_there_is_passed_on_with_its_ids(capsys: pytest.CaptureFixture[str]) -> None:
    sent = [made(n) for n in range(5)]
    fill(ONE, *sent, made(9, "user.joined"))
    assert main(["relay", ONE, TWO, "--pattern", "order.#", "--existing", "--until-idle"]) == 0
    assert [(r.id, r.key, r.data) for r in held(TWO)] == [(e.id, e.key, e.data) for e in sent]
    assert {(r.extensions or {})["relayedfrom"] for r in held(TWO)} == {ONE}
    assert "order.#" in capsys.readouterr().out


def test_what_stood_in_streams_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    async def decide() -> None:
        store = open_store(ONE)
        await store.open()
        await store.append([made(1), made(2)], expected=("order-1", 0))
        await store.close()

    asyncio.run(decide())
    fill(ONE, made(3))
    assert main(["relay", ONE, TWO, "--existing", "--until-idle"]) == 0
    assert "2 of them stood in streams" in capsys.readouterr().err
    assert [r.stream for r in held(TWO)] == [None] * 3


def test_started_again_it_goes_on_where_it_was() -> None:
    fill(ONE, made(1))
    assert main(["relay", ONE, TWO, "--existing", "--until-idle"]) == 0
    fill(ONE, made(2))
    assert main(["relay", ONE, TWO, "--existing", "--until-idle"]) == 0
    assert [json.loads(r.data)["n"] for r in held(TWO)] == [1, 2]


def test_what_came_from_there_is_not_sent_back() -> None:
    fill(ONE, made(1))
    fill(TWO, made(2))
    for _ in range(2):
        assert main(["relay", ONE, TWO, "--existing", "--until-idle"]) == 0
        assert main(["relay", TWO, ONE, "--existing", "--until-idle"]) == 0
    for url in (ONE, TWO):
        assert sorted(json.loads(r.data)["n"] for r in held(url)) == [1, 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sqlite:///one.db", "sqlite:///one.db"], "cannot be relayed to itself"),
        (["sqlite:///one.db", "sqlite:///two.db", "--pattern", "a..b"], "a..b"),
        (["sqlite:///one.db", "nowhere://x"], "nowhere"),
    ],
)
def test_mistakes_are_sentences(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill(ONE, made(1))
    assert main(["relay", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_log_that_is_not_there_is_not_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["relay", ONE, TWO]) == 1
    assert "there is no log" in capsys.readouterr().err
    assert list(folder.glob("*.db")) == []


def test_it_ends_with_sigterm() -> None:
    fill(ONE, made(1))
    relay = subprocess.Popen(
        [sys.executable, "-m", "trilogue", "relay", ONE, TWO, "--existing"], stdout=subprocess.PIPE, text=True
    )
    assert relay.stdout is not None
    assert "as group" in relay.stdout.readline()
    relay.send_signal(signal.SIGTERM)
    assert relay.wait(30) == 0
    relay.stdout.close()
