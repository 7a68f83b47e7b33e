"""The three levels: what each receiver asked for is counted, not claimed."""

import asyncio
import json

import pytest

from trilogue.apps.levels.demo import LEVELS, demo_levels, run_level


def test_what_each_level_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    report = asyncio.run(demo_levels("json"))
    assert json.loads(capsys.readouterr().out) == report
    levels = report["levels"]
    assert [level["level"] for level in levels] == [1, 2, 3]
    assert [level["event"] for level in levels] == ["UserCreated", "OrderCreated", "Paid"]
    assert [level["asked"] for level in levels] == [{"user": 3}, {}, {}]
    assert [level["done_while_services_are_down"] for level in levels] == [0, 3, 3]


def test_what_each_level_did() -> None:
    first, second, third = [asyncio.run(run_level(level))["did"] for level in LEVELS]
    assert sorted(first) == [f"welcome mail to {name}@example.org" for name in ("ann", "bob", "cid")]
    assert sorted(second) == [
        "invoice o1: lamp, 40.00 to ann@example.org",
        "invoice o2: chair, 85.50 to bob@example.org",
        "invoice o3: desk, 310.00 to cid@example.org",
    ]
    assert third == [
        "ann has 100.00: +100.00",
        "ann has 70.00: +100.00 -30.00",
        "ann has 120.00: +100.00 -30.00 +50.00",
    ]


def test_the_text_shows_code_and_questions(capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(demo_levels("text"))
    out = capsys.readouterr().out
    assert "asked for 3 events: the user service 3 times" in out
    assert out.count("asked for 3 events: nobody") == 2
    assert "user = await services.user(e.user)" in out
    assert "What the receiver had to ask for" in out
