"""`run`: finding the App, saying what it does, one process or several."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trilogue import App
from trilogue.cli import run as run_module
from trilogue.cli import workers
from trilogue.cli.load import load_app
from trilogue.cli.main import main
from trilogue.errors import TrilogueError

TRILOGUE = [sys.executable, "-m", "trilogue"]

APP = """
import os
from dataclasses import dataclass
from trilogue import App, Db, event

app = App("sqlite:///trilogue.db", name="shop")
open(f"pid.{os.getpid()}", "w").close()

@event("order.placed", key="customer")
@dataclass(frozen=True)
class Placed:
    customer: str

@app.setup
def tables(db: Db) -> None:
    db.execute("create table if not exists handled (id primary key, pid)")

@app.on(group="billing")
def bill(e: Placed, db: Db) -> None:
    db.execute("insert into handled values (?, ?)", (e.customer, os.getpid()))

@app.on("order.*", group="audit", order=None)
async def audit(e: Placed) -> None:
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRILOGUE_URL", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


# ── finding the App ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "text", "spec", "sentence"),
    [
        ("shop1", "import nowhere_to_be_found", "shop1:app", "shop1.py, line 1: ModuleNotFoundError"),
        ("shop2", "x = 1\nraise ValueError('bad\\x1b')", "shop2:app", "shop2.py, line 2: ValueError: bad"),
        ("shop3", "def f(:\n", "shop3:app", "shop3.py, line 1: SyntaxError"),
        ("shop4", "from trilogue import App\nshop = App('memory://')", "shop4:shp", "did you mean 'shop'?"),
        ("shop5", "x = 1", "shop5:x", "has a int and no App under the name 'x'"),
        ("shop6", "from trilogue import Router\nr = Router()", "shop6:r", "is a Router"),
        ("shop7", "import sys\nsys.exit(3)", "shop7:app", "__main__"),
        ("shop8", "\nfrom trilogue import App\n\napp = App('sqlit:///x')", "shop8:app", "line 4: UnknownScheme"),
        ("shop9", "", "shop_9:app", "did you mean 'shop9'?"),
        ("shop11", "raise RuntimeError('asyncio.run() cannot be called from a running event loop')", "shop11:app", "if __name__"),
        ("shop10", "", "shop10.inner:app", "is not found"),
    ],
)
def test_what_is_wrong_with_the_app_is_one_sentence(
    name: str, text: str, spec: str, sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / f"{name}.py").write_text(text)
    assert main(["run", spec]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


def test_an_app_in_a_package_is_found_from_the_current_folder(folder: Path) -> None:
    (folder / "stores_of_us").mkdir()
    (folder / "stores_of_us" / "shop.py").write_text(APP)
    assert load_app("stores_of_us.shop:app").name == "shop"
    with pytest.raises(TrilogueError, match="did you mean 'app'"):
        load_app("stores_of_us.shop:aap")


# ── one process ──────────────────────────────────────────────────────────────────────────────────────────────────────


def until(happened: Callable[[], bool]) -> None:
    """Wait for something another process does."""
    for _ in range(3_000):
        if happened():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen within a minute")


def status() -> dict[str, dict[str, int]]:
    done = subprocess.run([*TRILOGUE, "status", "--json"], capture_output=True, check=False)
    return {group["name"]: group for group in json.loads(done.stdout)["groups"]} if done.returncode == 0 else {}


def place(customer: str) -> None:
    fields = json.dumps({"customer": customer})
    subprocess.run([*TRILOGUE, "publish", "order.placed", fields, "--key", customer], check=True, capture_output=True)


def start(*options: str) -> "subprocess.Popen[str]":
    command = [*TRILOGUE, "run", "shop:app", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers_of(folder: Path, run: "subprocess.Popen[str]") -> set[int]:
    """The processes that have imported the App, without the one that watches them."""
    return {int(path.suffix[1:]) for path in folder.glob("pid.*")} - {run.pid}


@pytest.mark.processes
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_run_until_told_to_stop(signum: signal.Signals, folder: Path) -> None:
    (folder / "shop.py").write_text(APP)
    with start() as run:
        until(lambda: status().get("billing", {}).get("workers") == 1)
        place("c1")
        until(lambda: status()["billing"]["done"] == 1)
        run.send_signal(signum)
        out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (0, "")
    assert out.splitlines()[0] == "shop at sqlite:///trilogue.db (survives os-crash)"
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["group", "pattern", "order"], ["billing", "order.placed", "per", "key"], ["audit", "order.placed", "any"],
    ]  # fmt: skip


# ── several processes ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.processes
def test_several_workers_share_and_a_killed_one_is_replaced(folder: Path) -> None:
    (folder / "shop.py").write_text(APP)
    with start("--workers", "2") as run:
        until(lambda: status().get("billing", {}).get("workers") == 2)
        os.kill(min(workers_of(folder, run)), signal.SIGKILL)
        until(lambda: len(workers_of(folder, run)) == 3)
        for n in range(8):
            place(f"c{n}")
        until(lambda: status()["billing"]["done"] == 8)
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "2 processes" in out
    assert out.count("billing") == 1
    assert "was killed by SIGKILL: starting it again in 0.5 s" in err


@pytest.mark.processes
def test_workers_end_with_the_process_that_watches_them(folder: Path) -> None:
    (folder / "shop.py").write_text(APP)
    with start("--workers", "2") as run:
        until(lambda: status().get("billing", {}).get("workers") == 2)
        run.kill()
    until(lambda: status()["billing"]["workers"] == 0)


def watched(code: str, count: int = 2) -> int:
    return asyncio.run(workers.run_workers([sys.executable, "-c", code], count))


def test_workers_that_end_well_are_not_started_again() -> None:
    assert watched("") == 0


def test_a_worker_whose_wiring_is_wrong_is_not_started_again(folder: Path) -> None:
    assert watched("import sys; open('log', 'a').write('x'); sys.exit(2)") == 2
    assert (folder / "log").read_text() == "xx"


def test_workers_that_only_crash_are_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "FIRST_WAIT_S", 0.001)
    assert watched("import sys; open('log', 'a').write('x'); sys.exit(1)", 1) == 1
    assert len((folder / "log").read_text()) == workers.MOST_QUICK_CRASHES
    assert "worker 1 ended with exit code 1: starting it again in 0.001 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "store", "reach"),
    [
        ("amqp://me:sesame@localhost", "sqlite:///x.db", "with sqlite:///x.db: one machine, several processes"),
        ("kafka://localhost:9092", "postgresql://localhost/app", "with postgresql://localhost/app: many machines"),
        ("amqp://localhost", None, "alone: many machines"),
    ],
)
def test_beside_a_broker_the_store_says_how_far_workers_reach(
    url: str, store: str | None, reach: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_module._say_plan(App(url, store=store, name="shop"), 1)
    said = capsys.readouterr().out.splitlines()[0]
    assert reach in said
    assert "sesame" not in said
