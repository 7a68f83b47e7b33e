"""Projections from outside: the command line, and processes that are killed while they build."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trilogue import App
from trilogue.cli.main import main

TRILOGUE = [sys.executable, "-m", "trilogue"]
EVENTS = 30_000
SHOP = """
import os
import time
from dataclasses import dataclass
from trilogue import App, Db, event

app = App("sqlite:///trilogue.db", name="shop")

@event("order.placed", key="customer")
@dataclass(frozen=True)
class Placed:
    customer: str
    cents: int

@event("bonus.given", key="customer")
@dataclass(frozen=True)
class Bonus:
    customer: str

@app.projection(
    version=int(os.environ.get("VERSION", "1")), tables={"sums": "customer text primary key, cents integer not null"},
    batch=100,
)
def sums(es: list[Placed], db: Db) -> list[Bonus]:
    time.sleep(float(os.environ.get("SLOW", "0")))
    rows = [(e.customer, e.cents) for e in es]
    db.executemany("insert into {sums} values (?, ?) on conflict do update set cents = cents + excluded.cents", rows)
    if os.environ.get("BAD") and any(e.cents == 13 for e in es):
        raise ValueError("unlucky")
    return [Bonus(e.customer) for e in es]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("TRILOGUE_URL", "VERSION", "SLOW", "BAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "shop.py").write_text(SHOP)
    sys.modules.pop("shop", None)
    return tmp_path


@pytest.fixture
def shop(folder: Path) -> Iterator[App]:
    from trilogue.cli.load import load_app

    yield load_app("shop:app")
    sys.modules.pop("shop", None)


def place(app: App, *cents: int) -> None:
    """Publish without the App's handlers."""

    async def publish() -> None:
        placed = sys.modules["shop"].Placed
        async with App("sqlite:///trilogue.db", name="shop") as bare:
            await bare.publish_many([placed(f"c{n % 100}", each) for n, each in enumerate(cents)])

    asyncio.run(publish())


def work(app: App) -> None:
    """Run the App until it has nothing left to do."""

    async def once() -> None:
        async with app.running():
            await app.wait_idle(timeout="60s")

    asyncio.run(once())


def ask(sql: str) -> list[tuple[object, ...]]:
    async def query() -> list[tuple[object, ...]]:
        async with App("sqlite:///trilogue.db", name="shop") as bare:
            return await bare.db(sql)

    return asyncio.run(query())


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_from_list_to_drop(shop: App, capsys: pytest.CaptureFixture[str]) -> None:
    place(shop, *range(50))
    assert main(["projections", "list"]) == 0
    assert capsys.readouterr().out == "no projections\n"
    work(shop)
    assert main(["projections", "list"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["name", "build", "version", "state", "position", "lag", "rate", "eta"]
    assert out[1].split()[:6] == ["sums", "1", "1", "live", "50", "0"]
    assert main(["projections", "rebuild", "sums", "--app", "shop:app", "--wait"]) == 0
    assert capsys.readouterr().out == "projection sums: build 2 is ready, up to position 50\n"
    assert main(["projections", "compare", "sums"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["sums", "50", "50", "0", "0"]
    assert main(["projections", "switch", "sums"]) == 0
    assert capsys.readouterr().out == "projection sums: build 2 is live\n"
    assert main(["projections", "drop", "sums"]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert main(["projections", "drop", "sums", "--yes"]) == 0
    assert main(["projections", "drop", "sums", "--yes"]) == 0
    assert capsys.readouterr().out == "projection sums: build 1 dropped\nprojection sums: no old build\n"
    assert main(["projections", "list", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert (found["name"], found["state"], found["position"], found["head"]) == ("sums", "live", 50, 50)
    assert [build["build"] for build in found["builds"]] == [2]


def test_forgetting(shop: App, capsys: pytest.CaptureFixture[str]) -> None:
    place(shop, 1, 2)
    work(shop)
    assert main(["projections", "forget", "sums"]) == 2
    err = capsys.readouterr().err
    assert "projection sums of shop would be removed, with the tables of build 1" in err
    assert "add --yes to forget" in err
    assert main(["projections", "forget", "sums", "--yes"]) == 0
    assert main(["projections", "list"]) == 0
    assert capsys.readouterr().out == "projection sums: forgotten\nno projections\n"
    assert main(["projections", "forget", "sums", "--yes"]) == 2
    assert "there is no projection 'sums'" in capsys.readouterr().err
    work(shop)
    assert ask("select * from sums order by 1") == [("c0", 1), ("c1", 2)]


def test_a_difference_is_exit_code_1_and_shown(shop: App, capsys: pytest.CaptureFixture[str]) -> None:
    place(shop, 1, 2)
    work(shop)
    assert main(["projections", "rebuild", "sums", "--app", "shop:app", "--wait"]) == 0

    async def plant() -> None:
        async with shop:
            await shop.store.transact(lambda tx: tx.execute("update sums_b2 set cents = 99 where customer = 'c0'"))

    asyncio.run(plant())
    capsys.readouterr()
    assert main(["projections", "compare", "sums"]) == 1
    assert "sums, only next: ('c0', 99)" in capsys.readouterr().out
    assert main(["projections", "compare", "sums", "--json"]) == 1
    [found] = json.loads(capsys.readouterr().out)
    assert (found["only_live"], found["sample"]) == (1, [["live", ["c0", 1]], ["next", ["c0", 99]]])


def test_rebuilding_without_waiting_leaves_it_to_the_program(shop: App, capsys: pytest.CaptureFixture[str]) -> None:
    place(shop, 1, 2)
    work(shop)
    assert main(["projections", "rebuild", "sums", "--app", "shop:app"]) == 0
    assert "begins as soon as its App runs" in capsys.readouterr().out
    assert main(["projections", "switch", "sums"]) == 1
    assert "is building, not ready" in capsys.readouterr().err
    work(shop)
    assert main(["projections", "switch", "sums"]) == 0


def test_a_bad_event_is_skipped_with_a_reason(
    shop: App, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(shop, 1, 13, 2)
    work(shop)
    monkeypatch.setenv("BAD", "1")
    rebuild = ["projections", "rebuild", "sums", "--app", "shop:app", "--wait"]
    assert main(rebuild) == 1
    assert "position 2 (order.placed): ValueError: unlucky" in capsys.readouterr().err
    assert main(["projections", "list"]) == 0
    assert "sums, build 2: position 2 (order.placed)" in capsys.readouterr().out
    assert main(["projections", "skip", "sums", "2"]) == 2
    assert main(["projections", "skip", "sums", "2", "--reason", "a test order", "--who", "clerk"]) == 0
    assert main(["projections", "list"]) == 0
    assert "sums: position 2 is skipped by clerk: a test order" in capsys.readouterr().out
    assert main(rebuild) == 0
    assert main(["projections", "switch", "sums"]) == 0
    assert ask("select count(*) from sums") == [(2,)]


def test_pausing(shop: App, capsys: pytest.CaptureFixture[str]) -> None:
    place(shop, 1)
    work(shop)
    assert main(["projections", "pause", "sums"]) == 0
    assert main(["projections", "list"]) == 0
    assert "live (paused)" in capsys.readouterr().out
    assert main(["projections", "rebuild", "sums", "--app", "shop:app", "--wait"]) == 1
    assert "is paused: let it go on with" in capsys.readouterr().err
    assert main(["projections", "resume", "sums"]) == 0
    work(shop)


@pytest.mark.parametrize("command", ["switch", "compare", "pause", "resume", "drop"])
def test_a_name_that_is_not_there(command: str, shop: App, capsys: pytest.CaptureFixture[str]) -> None:
    work(shop)
    assert main(["projections", command, "sum"]) == 2
    assert capsys.readouterr().err == "error: there is no projection 'sum' on this log: did you mean 'sums'?\n"


# ── killed while building ────────────────────────────────────────────────────────────────────────────────────────────


def until(happened: Callable[[], bool]) -> None:
    for _ in range(3_000):
        if happened():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen within a minute")


def run(**environment: str) -> "subprocess.Popen[bytes]":
    command = [*TRILOGUE, "run", "shop:app"]
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ask_position() -> int:
    """How far the next build is."""
    rows = ask("select json_extract(cast(body as text), '$.next.position') from trilogue_state where owner = 'projection'")
    return int(str(rows[0][0])) if rows and rows[0][0] is not None else 0


def is_live(version: int = 1) -> bool:
    rows = ask("select json_extract(cast(body as text), '$.live.version') from trilogue_state where owner = 'projection'")
    return rows == [(version,)]


@pytest.mark.processes
def test_a_build_goes_on_where_a_killed_process_left_it(shop: App) -> None:
    place(shop, *([7] * EVENTS))

    reached = [0]
    for _ in range(3):
        with run(SLOW="0.005") as process:
            until(lambda: ask_position() > reached[-1])
            os.kill(process.pid, signal.SIGKILL)
        reached.append(ask_position())
    assert sorted(set(reached)) == reached
    assert reached[-1] < EVENTS
    work(shop)
    assert ask("select sum(cents), count(*) from sums") == [(7 * EVENTS, 100)]
    assert ask("select count(*) from sqlite_master where name like 'sums_b%' and type = 'table'") == [(1,)]


@pytest.mark.processes
def test_processes_of_two_versions_and_one_is_killed(shop: App) -> None:
    """The old program goes on while the new one builds beside it, dies, and is started again."""
    place(shop, *([1] * EVENTS))
    work(shop)
    old = run()
    try:
        for n in range(2):
            with run(VERSION="2", SLOW="0.005") as process:
                until(lambda: ask_position() > n * EVENTS // 10)  # noqa: B023
                place(shop, *([1] * 100))
                os.kill(process.pid, signal.SIGKILL)
        with run(VERSION="2") as process:
            until(lambda: is_live(2))
            place(shop, *([1] * 100))
            until(lambda: ask("select sum(cents) from sums") == [(EVENTS + 300,)])
            process.terminate()
    finally:
        old.terminate()
        old.wait()
    assert ask("select json_extract(cast(body as text), '$.live.version') from trilogue_state where owner = 'projection'") == [
        (2,)
    ]
    assert len(ask("select 1 from trilogue_records r join trilogue_types t on t.id = r.type where t.name = 'bonus.given'")) == 300
