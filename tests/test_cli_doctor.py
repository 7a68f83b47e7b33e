"""`trilogue doctor`: what it looks at, and that what is wrong is said with its mend and exit code 1."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import services

from trilogue import App, Retry, event
from trilogue.cli import doctor
from trilogue.cli.main import main
from trilogue.events import set_clock

Captured = pytest.CaptureFixture[str]
URL = "sqlite:///trilogue.db"


@event("video.watched", key="user")
@dataclass(frozen=True)
class Watched:
    user: str


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("TRILOGUE_URL", "TRILOGUE_STORE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def log() -> str:
    """A log with a dead letter."""
    app = App(URL)

    @app.on(group="badge", retry=Retry(1), start="beginning")
    async def badge(e: Watched) -> None:
        raise ValueError("no")

    async def go() -> None:
        async with app.running():
            await app.publish(Watched("a"))
            await app.wait_idle(timeout=30)
        async with app:
            await app.publish(Watched("b"))

    asyncio.run(go())
    return URL


def findings(capsys: Captured, *options: str, code: int = 0) -> dict[str, list[dict[str, Any]]]:
    capsys.readouterr()
    assert main(["doctor", "--json", *options]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["wrong"] == len([each for each in told["findings"] if each["verdict"] == "WRONG"])
    found: dict[str, list[dict[str, Any]]] = {}
    for each in told["findings"]:
        found.setdefault(each["what"], []).append(each)
    return found


def test_a_healthy_log(log: str, capsys: Captured) -> None:
    found = findings(capsys, "--url", log)
    assert found["python"][0]["fact"].startswith("3.")
    assert "apsw" in found["drivers"][0]["fact"]
    assert found["log"][0]["fact"] == f"{URL}: one machine, several processes"
    assert found["durability"][0]["fact"].startswith("os-crash")
    assert (found["integrity"][0]["verdict"], found["integrity"][0]["fact"]) == ("ok", "ok")
    assert "free in" in found["disk"][0]["fact"]
    assert found["leases"][0]["fact"] == "0 alive, 0 expired"
    assert {each["fact"]: each["mend"] for each in found["group"]} == {
        "badge: 1 records wait and nobody works for it here": "trilogue run MODULE:APP",
        "badge: 1 dead letters": "trilogue dead list --group badge",
    }
    assert main(["doctor", "--url", log]) == 0
    assert capsys.readouterr().out.endswith("\nnothing is wrong\n")


def test_what_is_wrong_is_exit_code_1_and_says_how_to_mend_it(
    log: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 1 << 60)
    [disk] = findings(capsys, "--url", log, code=1)["disk"]
    assert (disk["verdict"], disk["mend"][:9]) == ("WRONG", "make room")
    assert main(["doctor", "--url", log]) == 1
    out = capsys.readouterr().out
    assert "WRONG  disk" in out
    assert "──▶ make room" in out
    assert out.endswith("\n1 wrong\n")


@pytest.fixture
def clock_an_hour_ago() -> Iterator[None]:
    import time

    set_clock(time.time_ns() // 1_000 - 3_600_000_000)
    yield
    set_clock(None)


def test_a_clock_behind_the_log(log: str, capsys: Captured, clock_an_hour_ago: None) -> None:
    [clock] = findings(capsys, "--url", log, code=1)["clock"]
    assert clock["fact"].startswith("this machine's is 60m behind what the newest record says")
    assert "NTP" in clock["mend"]


def test_a_broken_file(log: str, capsys: Captured, folder: Path) -> None:
    assert doctor._described("integrity", "row 3 missing from index x").verdict == "WRONG"
    (folder / "trilogue.db").write_bytes(b"not a database, but long enough to be looked at" * 100)
    [told] = findings(capsys, "--url", log, code=1)["log"]
    assert told["verdict"] == "WRONG"


def test_a_process_that_died_leaves_a_lease(log: str, capsys: Captured) -> None:
    async def go() -> None:
        async with App(URL) as app:
            row = "(1, 'dead', 'elsewhere', 1, 1, 0, 0)"
            await app.store.transact(lambda tx: tx.sql.rows(f"insert into trilogue_members values {row}"))  # type: ignore[attr-defined]

    asyncio.run(go())
    [leases] = findings(capsys, "--url", log)["leases"]
    assert (leases["verdict"], leases["fact"]) == ("note", "0 alive, 1 expired")


def test_nothing_there(capsys: Captured, folder: Path) -> None:
    [told] = findings(capsys, code=1)["log"]
    assert "there is no log at trilogue.db" in told["fact"]
    assert list(folder.iterdir()) == []
    [told] = findings(capsys, "--url", "amqp://me:sesame@127.0.0.1:1", "--store", "none", code=1)["log"]
    assert told["verdict"] == "WRONG"
    assert "sesame" not in str(told)
    assert main(["doctor", "--url", "nothing://"]) == 2


@pytest.mark.parametrize("name", ["rabbitmq", "kafka"])
def test_brokers(name: str, capsys: Captured) -> None:
    with {"rabbitmq": services.rabbitmq_vhost, "kafka": services.kafka_prefix}[name]() as url:
        _examine(name, url, capsys)


def _examine(name: str, url: str, capsys: Captured) -> None:
    if name == "rabbitmq":
        _is_absent(url, capsys, "--store", "none")
        assert not services.rabbitmq_api("GET", f"/api/queues/{url.rpartition('/')[2]}")
    main(["publish", "a.b", "{}", "--url", url, "--store", "none"])
    found = findings(capsys, "--url", url, "--store", "none")
    assert found["server"][0]["fact"].lower().startswith(name)
    assert found["log"][0]["fact"].endswith("alone: many machines")
    main(["publish", "a.b", "{}"])
    found = findings(capsys, "--url", url, "--store", URL)
    assert found["store integrity"][0]["fact"] == "ok"
    assert found["log"][0]["fact"].endswith(f"with {URL}: one machine, several processes")


def test_postgresql(capsys: Captured) -> None:
    with services.postgresql_database() as url:
        for _ in range(2):  # looking makes nothing
            _is_absent(url, capsys)
        _is_absent(f"{url}?schema=elsewhere", capsys)
        main(["publish", "a.b", "{}", "--url", url])
        found = findings(capsys, "--url", url)
        assert found["database"][0]["fact"].startswith("PostgreSQL")
        assert "the database server's" in found["clock"][0]["fact"]


def _is_absent(url: str, capsys: Captured, *options: str) -> None:
    [told] = findings(capsys, "--url", url, *options)["log"]
    assert told["verdict"] == "note"
    assert told["fact"].startswith("nothing of trilogue is there yet: ")
