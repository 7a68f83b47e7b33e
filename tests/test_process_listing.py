"""Which processes there are, which are stuck and why: App.processes() and `trilogue processes`."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from common import run
from transfers import GROUP, MOODS, Deposited, Moody, Prolonged, Requested, handled, transfers

from trilogue import App, Retry, TrilogueError, UnknownEvent
from trilogue.cli.main import main as trilogue
from trilogue.instances import process_instance


def test_what_is_stuck(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            await handled(app, Requested("t1", 5), Requested("t2", 5), Prolonged("t2", ""), Requested("t3", 5))
            assert [each.id for each in await app.processes(stuck="0s")] == ["t2"]
            [t2] = await app.processes(stuck="0s")
            assert t2.problems[0].startswith("nothing has happened for ")
            assert t2.problems[0].endswith(" and no timer is to come")
            assert await app.processes(stuck="1h") == []
            assert [each.problems for each in await app.processes()] == [()] * 3
            assert [each.id for each in await app.processes(limit=2)] == ["t1", "t2"]
            with pytest.raises(UnknownEvent, match="process 'transfr' is not on this log: it has transfer"):
                await app.processes("transfr")
            assert (await process_instance(app.store, "transfer", "t2")).id == "t2"
            with pytest.raises(TrilogueError, match="process 'transfer' has no instance 't9': it has ended, or never began"):
                await process_instance(app.store, "transfer", "t9")

    run(main())


def test_a_timer_that_never_came_is_a_problem(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            await handled(app, Requested("t1", 5, "1h"))
            await app.store.pause(GROUP)
            body = (await app.store.states("process:transfer"))[0].body
            late = msgspec.json.decode(body)
            late["timers"]["stuck"]["due_us"] = late["changed_us"] = 1_000_000
            await app.store.transact(lambda tx: tx.set_state("process:transfer", "t1", msgspec.json.encode(late)))
            [t1] = await app.processes("transfer", stuck="1h")
            assert t1.problems[0].endswith(" and timer stuck is overdue")

    run(main())


def test_a_log_without_processes(url: str) -> None:
    async def main() -> None:
        async with App(url) as app:
            assert await app.processes() == []
            with pytest.raises(UnknownEvent, match="it has none: a program with"):
                await app.processes("transfer")

    run(main())


def test_many_instances_are_listed_in_order(file_url: str) -> None:
    with (app := App(file_url)).sync() as bus:
        state = b'{"version":"","started_us":1,"changed_us":1,"position":1,"events":1,"timers":{},"state":{}}'

        async def fill() -> None:
            def put(tx: Any) -> None:
                tx.set_state("process", "p", b'{"group":"process.p","key":"k"}')
                for n in range(2_500):
                    tx.set_state("process:p", f"{n:04}", state)

            await app.store.transact(put)

        bus._wait(fill())
        assert [each.id for each in bus.processes("p", limit=10_000)] == [f"{n:04}" for n in range(2_500)]


Captured = pytest.CaptureFixture[str]


def shell(capsys: Captured, *args: str, code: int = 0) -> str:
    capsys.readouterr()
    assert trilogue(["processes", *args]) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    return err if code else out


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRILOGUE_URL", raising=False)

    async def main() -> None:
        MOODS["t2\x1b"] = [ValueError("no\nsecond line")]
        async with transfers("sqlite:///trilogue.db", Moody, retry=Retry(1)).running() as app:
            await handled(app, Requested("t1", 5), Requested("t2\x1b", 5), Requested("t3", 5))
            await handled(app, Deposited("t3"))

    assert "there is no log" in shell(capsys, "list", code=1)
    run(main())
    lines = shell(capsys, "list").splitlines()
    assert lines[0].split() == ["process", "id", "started", "changed", "events", "timers", "problem"]
    assert [line.split()[:2] for line in lines[1:]] == [["transfer", "t1"], ["transfer", "t2\\x1b"], ["transfer", "t3"]]
    assert "stuck 20" in lines[1]
    assert lines[2].endswith("is parked: step requested of transfer t2\\x1b: ValueError: no")
    [stuck] = json.loads(shell(capsys, "list", "transfer", "--stuck", "1h", "--json"))
    assert (stuck["id"], stuck["events"], stuck["timers"]) == ("t2\x1b", 0, {})
    shown = shell(capsys, "show", "transfer", "t3")
    assert "\nevents: 2\n" in shown
    assert '\nstate:\n  steps: ["requested","deposited"]\n' in shown
    assert "\ntimers:\n  stuck: 20" in shown
    assert shown.endswith("problems: none\n")
    assert json.loads(shell(capsys, "show", "transfer", "t3", "--json"))["state"] == {"steps": ["requested", "deposited"]}
    assert "\x1b" not in shell(capsys, "show", "transfer", "t2\x1b")
    assert "has no instance 't4'" in shell(capsys, "show", "transfer", "t4", code=1)
    assert "process 'x' is not on this log" in shell(capsys, "list", "x", code=2)
    assert "duration '1x' is not understood" in shell(capsys, "list", "--stuck", "1x", code=2)
    assert shell(capsys, "list", "--limit", "1").count("\n") == 2
    for into in (["--into", "second"], []):  # without the App, neither beside nor in place
        assert trilogue(["replay", GROUP, "--to", "beginning", *into]) == 2
        assert "runs process 'transfer', whose instances are there once" in capsys.readouterr().err
