"""`trilogue describe`: what is subscribed, and what a URL cannot do of it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from trilogue.cli.main import main

Captured = pytest.CaptureFixture[str]

APP = """
from dataclasses import dataclass
from trilogue import App, Db, Record, Retry, event

app = App("sqlite:///shop.db", name="shop")

@event("order.placed", key="customer")
@dataclass(frozen=True)
class Placed:
    customer: str

@app.on(group="billing", retry=Retry(10, "1s..1h"), on_dead="park")
async def bill(e: Placed) -> None: ...

@app.on(group="count")
def count(e: Placed, db: Db) -> None: ...

@app.on("order.#", group="audit", order=None, concurrency=4, retry=Retry(1), start="beginning")
def audit(r: Record) -> None: ...

@app.projection(version=2, tables={"totals": "customer text primary key"})
def totals(e: Placed, db: Db) -> None: ...
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("TRILOGUE_URL", "TRILOGUE_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "described_shop.py").write_text(APP)
    return tmp_path


def told(capsys: Captured, *options: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["describe", "described_shop:app", "--json", *options]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_what_is_subscribed(capsys: Captured, folder: Path) -> None:
    said = told(capsys)
    assert (said["name"], said["url"], said["workers"]) == ("shop", "sqlite:///shop.db", "one machine, several processes")
    billing, count, audit = said["groups"]
    assert (billing["order"], billing["attempts"], billing["waits"]) == ("per key", 10, "1s to 1h")
    assert billing["dead_letters"] == "parked: its key waits"
    assert (count["kind"], count["at_once"], count["dead_letters"]) == ("in the settlement", 1, "dead letter of the store")
    assert (audit["order"], audit["at_once"], audit["waits"], audit["reads"]) == ("any", 4, None, ["order.#"])
    assert audit["starts"] == "at the beginning"
    assert said["projections"] == [{"name": "totals", "version": 2, "reads": ["order.placed"], "tables": ["totals"]}]
    assert (said["cannot"], said["remarks"]) == ([], [])
    assert not (folder / "shop.db").exists()


def test_what_a_broker_alone_cannot_do(capsys: Captured) -> None:
    said = told(capsys, "--url", "amqp://me:sesame@localhost", "--store", "none", code=1)
    assert said["url"] == "amqp://me:***@localhost alone"
    text = "\n".join(said["cannot"])
    for words in ("'billing' keeps order per key", "'billing' parks keys", "'billing' waits up to", "'count' writes through `db`",
                  "projection 'totals' writes tables", "give its handler order=None", "postgresql://"):  # fmt: skip
        assert words in text
    assert said["groups"][2]["dead_letters"] == "queue audit.dead"
    assert "audit: a queue has no beginning" in said["remarks"][0]
    kafka = told(capsys, "--url", "kafka://localhost:9092", "--store", "none", code=1)
    assert not any("keeps order" in each for each in kafka["cannot"])
    assert kafka["groups"][2]["dead_letters"] == "topic audit.dead"


@pytest.mark.parametrize(
    ("store", "workers", "remarks"),
    [("sqlite:///x.db", "one machine, several processes", 2), ("postgresql://localhost/x", "many machines", 1)],
)
def test_a_broker_with_a_store_does_all_of_it(capsys: Captured, store: str, workers: str, remarks: int) -> None:
    said = told(capsys, "--url", "kafka://localhost:9092", "--store", store)
    assert (said["url"], said["workers"]) == (f"kafka://localhost:9092 with {store}", workers)
    assert len(said["remarks"]) == remarks
    assert any("projections read the store's log" in each for each in said["remarks"])


def test_text(capsys: Captured) -> None:
    assert main(["describe", "described_shop:app"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shop at sqlite:///shop.db: one machine, several processes (survives os-crash)"
    assert lines[1].split()[:3] == ["group", "handler", "reads"]
    assert " ".join(lines[2].split()) == (
        "billing described_shop.bill (async) order.placed per key 16 10, 1s to 1h - parked: its key waits"
    )
    assert main(["describe", "described_shop:app", "--url", "amqp://localhost", "--store", "none"]) == 1
    assert "\ncannot: group 'billing' keeps order per key" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said", "code"),
    [
        ("described_shop:aap", "did you mean 'app'?", 1),
        ("described_shop", "MODULE:APP", 2),
        ("described_shop:app --store none", "add --url amqp://", 2),
        ("described_shop:app --url nothing://x", "there is no log behind", 2),
        ("described_shop:app --url sqlite:///x.db --store none", "is a store itself", 2),
    ],
)
def test_a_mistake_is_one_sentence(line: str, said: str, code: int, capsys: Captured) -> None:
    assert main(["describe", *line.split()]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
