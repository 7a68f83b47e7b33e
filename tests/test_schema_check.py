"""`trilogue schema`: against the lock file, and against what a real log holds."""

import asyncio
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trilogue import App, Envelope
from trilogue.cli.main import main
from trilogue.events import now_us
from trilogue.ports import ANY_VERSION, Kind, Query, Settlement
from trilogue.schema.stored import PAGE, read_stored

Captured = pytest.CaptureFixture[str]
URL = "sqlite:///log.db"
HEAD = """
from dataclasses import dataclass
from trilogue import App, event
app = App("sqlite:///log.db")
def fill(data): return {**data, "b": data["a"]}
def fail(data): raise LookupError("no a")
"""
ONE = '@event("x.one", key="a")\n@dataclass\nclass One:\n    a: str\n'
TWO = '@event("x.two", version=2, upcast={1: fill})\n@dataclass\nclass Two:\n    b: str\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRILOGUE_URL", raising=False)
    return tmp_path


@pytest.fixture
def program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a program with these classes; its MODULE:APP."""
    names: list[str] = []

    def write(*classes: str) -> str:
        name = f"program_{len(names)}"
        names.append(name)
        known = ", ".join(
            line.split()[1].rstrip(":") for each in classes for line in each.splitlines() if line.startswith("class")
        )
        (folder / f"{name}.py").write_text(HEAD + "".join(classes) + f"app.knows({known})\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return f"{name}:app"

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(folder))
    return write


def said(capsys: Captured, *args: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["schema", *args]) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    return out + err


def envelope(type: str, data: Any, version: int = 1, **more: Any) -> Envelope:
    return Envelope(more.pop("id", f"{type}-{version}-{now_us()}-{len(str(data))}"), type, json.dumps(data).encode(),
                    time_us=now_us(), schema_version=version, **more)  # fmt: skip


def store(*envelopes: Envelope, timers: Sequence[Envelope] = ()) -> None:
    async def go() -> None:
        async with App(URL) as app:
            await app.publish_many(envelopes)
            await app.store.schedule(timers, now_us() + 10**12)

    asyncio.run(go())


# ── list, show ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_list(program: Callable[..., str], capsys: Captured) -> None:
    lines = said(capsys, "list", "--app", program(ONE, TWO)).splitlines()
    assert [line.split() for line in lines] == [
        ["type", "version", "key", "reads", "fields"],
        ["x.one", "1", "a", "-", "a"],
        ["x.two", "2", "-", "1", "b"],
    ]
    listed = json.loads(said(capsys, "list", "--app", program(TWO), "--json"))
    assert listed == [{"type": "x.two", "version": 2, "key": None, "reads": [1], "fields": ["b"]}]
    assert "knows no events" in said(capsys, "list", "--app", program())


def test_show(program: Callable[..., str], capsys: Captured) -> None:
    app = program(ONE)
    shown = json.loads(said(capsys, "show", "x.one", "--app", app))
    assert shown["schema"] == {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    assert (shown["type"], shown["version"], shown["key"]) == ("x.one", 1, "a")
    assert "knows no event 'x.onee': did you mean 'x.one'?" in said(capsys, "show", "x.onee", "--app", app, code=2)


@pytest.mark.parametrize(
    ("line", "what"),
    [("check", "--app"), ("check --app a:b --sample 0", "--sample"), ("check --app a:b --sample x", "a number from 1, or all"),
     ("check --app a:b --force", "--update"), ("list --app x", "MODULE:APP"), ("show --app a:b", "TYPE")],
)  # fmt: skip
def test_mistakes(line: str, what: str, capsys: Captured) -> None:
    assert what in said(capsys, *line.split(), code=2)


# ── the lock file ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_lock_file_everything_is_new(program: Callable[..., str], capsys: Captured, folder: Path) -> None:
    app = program(ONE)
    text = said(capsys, "check", "--app", app)
    assert "new: x.one version 1: is new" in text
    assert "add --update" in text
    assert "no log was read" in text
    assert not (folder / "schemas.lock.json").exists()
    assert "there is no lock file my.json: make it with --update" in said(
        capsys, "check", "--app", app, "--lock", "my.json", code=1
    )


def test_the_lock_is_written_and_holds(program: Callable[..., str], capsys: Captured, folder: Path) -> None:
    app = program(ONE, TWO)
    assert "commit it" in said(capsys, "check", "--app", app, "--update")
    text = (folder / "schemas.lock.json").read_text()
    assert json.loads(text)["types"].keys() == {"x.one", "x.two"}
    assert "new" not in said(capsys, "check", "--app", app)
    said(capsys, "check", "--app", app, "--update")
    assert (folder / "schemas.lock.json").read_text() == text
    assert [path.name for path in folder.glob("*lock*")] == ["schemas.lock.json"]


def test_a_breaking_change_is_told_and_not_written(program: Callable[..., str], capsys: Captured, folder: Path) -> None:
    said(capsys, "check", "--app", program(ONE), "--update")
    before = (folder / "schemas.lock.json").read_text()
    changed = program(ONE.replace("a: str", "a: int"))
    text = said(capsys, "check", "--app", changed, code=1)
    assert (
        "breaking: x.one version 1: field 'a' was string, is integer; put it back, or declare version=2 with upcast={1:" in text
    )
    assert "not to be deployed" in text
    assert "was not written" in said(capsys, "check", "--app", changed, "--update", code=1)
    assert (folder / "schemas.lock.json").read_text() == before
    said(capsys, "check", "--app", changed, "--update", "--force")
    assert (folder / "schemas.lock.json").read_text() != before
    said(capsys, "check", "--app", changed)


def test_every_released_version_stays_in_the_lock(program: Callable[..., str], capsys: Captured, folder: Path) -> None:
    said(
        capsys, "check", "--app", program(TWO.replace("version=2, upcast={1: fill}", "").replace("b: str", "a: str")), "--update"
    )
    said(capsys, "check", "--app", program(TWO), "--update")
    lock = json.loads((folder / "schemas.lock.json").read_text())["types"]["x.two"]
    assert [(form["version"], list(form["schema"]["properties"])) for form in lock] == [(1, ["a"]), (2, ["b"])]


def test_a_type_that_is_gone(program: Callable[..., str], capsys: Captured) -> None:
    said(capsys, "check", "--app", program(ONE, TWO), "--update")
    assert "breaking: x.two version 2: has no class any more; keep" in said(capsys, "check", "--app", program(ONE), code=1)


def test_a_broken_lock_file_is_not_written_over(program: Callable[..., str], capsys: Captured, folder: Path) -> None:
    (folder / "schemas.lock.json").write_text("<<<<<<< HEAD")
    assert "is no lock file" in said(capsys, "check", "--app", program(ONE), "--update", code=1)
    assert (folder / "schemas.lock.json").read_text() == "<<<<<<< HEAD"


# ── a real log ───────────────────────────────────────────────────────────────────────────────────────────────────────


def checked(capsys: Captured, app: str, *more: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["schema", "check", "--app", app, "--json", *more]) == code, capsys.readouterr()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_what_is_stored_is_read(program: Callable[..., str], capsys: Captured) -> None:
    store(envelope("x.one", {"a": "1"}), envelope("x.two", {"a": "1"}), envelope("x.two", {"b": "1"}, 2))
    found = checked(capsys, program(ONE, TWO))
    assert found["ok"] is True
    assert [(t["name"], t["schema_version"], t["stored"], t["looked"], t["failed"]) for t in found["stored"]] == [
        ("x.one", 1, 1, 1, 0),
        ("x.two", 1, 1, 1, 0),
        ("x.two", 2, 1, 1, 0),
        ("held records", None, None, 0, 0),
        ("timers", None, None, 0, 0),
    ]


PLAIN = TWO.replace(", upcast={1: fill}", "")
TELLING: list[tuple[str, str, Envelope, str]] = [
    ("an error", ONE, envelope("x.one", {"a": 5}), "x.one version 1, position 2: not a One: Expected `str`, got `int`"),
    ("an upcaster fails", TWO.replace("fill", "fail"), envelope("x.two", {"a": "1"}), "become version 2: LookupError: no a"),
    ("an upcaster is missing", PLAIN, envelope("x.two", {}), "there is no upcast= from version 1 to 2: not a Two"),
    (
        "what would be lost",
        PLAIN.replace("b: str", "b: str = ''"),
        envelope("x.two", {"a": "1", "z": 2}),
        "there is no upcast= from version 1 to 2: what it holds in a, z would be dropped",
    ),
    ("newer code", ONE, envelope("x.one", {"a": 7}, 3), "newer code wrote version 3, this is version 1: not a One"),
]


@pytest.mark.parametrize(("classes", "bad", "why"), [case[1:] for case in TELLING], ids=[case[0] for case in TELLING])
def test_what_cannot_be_read(classes: str, bad: Envelope, why: str, program: Callable[..., str], capsys: Captured) -> None:
    store(envelope("z.first", {}), bad)
    app = program(classes)
    text = said(capsys, "check", "--app", app, code=1)
    assert f"unreadable: {bad.type} version {bad.schema_version}, position 2: " in text
    assert why in text
    assert "not to be deployed" in text


def test_timers_and_held_records_are_read_too(program: Callable[..., str], capsys: Captured) -> None:
    bad = envelope("x.one", {"a": 5}, id="late")
    store(*(envelope("x.one", {"a": "1"}, id=f"{n}") for n in range(5)), timers=[bad])
    found = checked(capsys, program(ONE), code=1)
    assert [t["failed"] for t in found["stored"]] == [0, 0, 1]
    assert found["stored"][2]["unread"][0]["place"] == "timer late"


async def held(app: App, position: int) -> None:
    """Have a group give up on one record in the middle."""
    from trilogue import Group

    await app.store.bind([Group("g", ("x.one",), start="beginning")])
    deliveries = await app.store.claim("g", limit=100, wait_s=5)
    answers = [Settlement(d, "dead" if d.record.position == position else "done") for d in deliveries]
    await app.store.settle("g", answers)
    await app.store.leave()


def test_a_held_record_is_read_wherever_it_is(program: Callable[..., str], capsys: Captured) -> None:
    envelopes = [envelope("x.one", {"a": 5 if n == 5 else "1"}, id=f"{n}") for n in range(1, 11)]
    store(*envelopes)
    app = program(ONE)
    assert checked(capsys, app, "--sample", "2")["stored"][0]["looked"] == 4

    async def go() -> None:
        async with App(URL) as opened:
            await held(opened, 5)

    asyncio.run(go())
    found = checked(capsys, app, "--sample", "2", code=1)
    assert [(t["name"], t["looked"], t["failed"]) for t in found["stored"]] == [
        ("x.one", 4, 0),
        ("held records", 1, 1),
        ("timers", 0, 0),
    ]


@pytest.mark.parametrize(("sample", "looked"), [("1", 2), ("4", 8), ("5", 10), ("6", 10), ("100", 10), ("all", 10)])
def test_a_sample_is_the_oldest_and_the_newest(sample: str, looked: int, program: Callable[..., str], capsys: Captured) -> None:
    store(*(envelope("x.one", {"a": "1"}, id=f"{n}") for n in range(10)))
    assert checked(capsys, program(ONE), "--sample", sample)["stored"][0]["looked"] == looked


def test_a_version_in_the_middle_is_sampled_by_itself(program: Callable[..., str], capsys: Captured) -> None:
    versions = [2] * 5 + [1] + [2] * 5
    store(*(envelope("x.two", {"b": "1"}, version, id=f"{n}") for n, version in enumerate(versions)))
    found = checked(capsys, program(TWO.replace("fill", "fail")), "--sample", "1", code=1)
    assert [(t["schema_version"], t["stored"], t["looked"], t["failed"]) for t in found["stored"][:2]] == [
        (1, 1, 1, 1),
        (2, 10, 2, 0),
    ]


def test_unknown_types_are_told_and_count_when_strict(program: Callable[..., str], capsys: Captured) -> None:
    store(envelope("y.other", {}), envelope("y.other", {}, 2), envelope("trilogue.timer.x", {}))
    app = program(ONE)
    text = said(capsys, "check", "--app", app)
    assert "warning: no class for y.other version 1, 1 stored" in text
    assert "no class for y.other version 2" in text
    assert "trilogue.timer" not in text
    assert "unknown: no class for y.other" in said(capsys, "check", "--app", app, "--strict", code=1)


def test_newer_versions_that_can_be_read_are_a_warning(program: Callable[..., str], capsys: Captured) -> None:
    store(envelope("x.one", {"a": "1", "more": 1}, 2))
    assert "warning: x.one was written as version 2 by newer code" in said(capsys, "check", "--app", program(ONE))


def test_a_log_that_is_named_has_to_be_there(program: Callable[..., str], capsys: Captured) -> None:
    assert "there is no log at" in said(capsys, "check", "--app", program(ONE), "--url", "sqlite:///other.db", code=1)


def test_many_failures_are_counted_and_a_few_shown(program: Callable[..., str], capsys: Captured) -> None:
    store(*(envelope("x.one", {"a": 5}, id=f"{n}") for n in range(20)))
    tally = checked(capsys, program(ONE), code=1)["stored"][0]
    assert (tally["failed"], len(tally["unread"])) == (20, 5)


# ── personal data ────────────────────────────────────────────────────────────────────────────────────────────────────

PERSONAL = """@event("x.mail", subject="who", personal=("mail", "age"), version=2, upcast={1: fill})
@dataclass
class Mail:
    who: str
    mail: str
    age: int | None
    b: str = ""
"""
OLDER = PERSONAL.replace(", version=2, upcast={1: fill}", "").replace("b: str", "a: str")


@pytest.fixture
def sealed(program: Callable[..., str], folder: Path) -> str:
    """A log with a sealed event of version 1; the MODULE:APP of version 2."""
    old = importlib.import_module(program(OLDER).partition(":")[0])

    async def go() -> None:
        async with old.app:
            await old.app.publish(old.Mail("u1", "a@example.org", 33, "a"))

    asyncio.run(go())
    return program(PERSONAL)


def test_personal_data_is_checked_without_its_keys(sealed: str, folder: Path, capsys: Captured) -> None:
    for path in folder.glob("log.db-keys*"):
        path.unlink()
    assert checked(capsys, sealed)["stored"][0]["looked"] == 1
    failing = folder / f"{sealed.partition(':')[0]}.py"
    failing.write_text(failing.read_text().replace("age: int | None", "age: int | None\n    must: int"))
    sys.modules.pop(failing.stem)
    found = checked(capsys, sealed, code=1)
    assert "example.org" not in json.dumps(found)


def test_what_is_sealed_is_exported_sealed(sealed: str, capsys: Captured) -> None:
    assert main(["tail", "--no-follow", "--url", URL, "--app", sealed, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schemaversion"] == 2
    assert document["data"]["b"] == "a"
    assert document["data"]["mail"].startswith("sealed:1:")


# ── tail ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tail_tells_what_it_cannot_bring_into_todays_form(program: Callable[..., str], capsys: Captured) -> None:
    store(envelope("x.two", {"a": "\u202e😀"}), envelope("y.other", {"n": 1e30}))
    app = program(TWO.replace("fill", "fail"))
    assert main(["tail", "--no-follow", "--url", URL, "--app", app, "--json"]) == 1
    out, err = capsys.readouterr()
    assert out.isascii()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["schemaversion"], line["data"]) for line in lines] == [(1, {"a": "\u202e😀"}), (1, {"n": 1e30})]
    assert "position 1 is shown as stored: event 'x.two' of schema version 1 does not become version 2" in err


# ── the store's part ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_kinds_and_their_records(url: str) -> None:
    async def go() -> None:
        async with App(url) as app:
            envelopes = [envelope("x.one", n, 1 + n % 3, id=f"{n}", source=f"s{n % 2}") for n in range(9)]
            await app.publish_many(envelopes)
            await app.store.append([envelope("x.two", 1, 2, id="s")], expected=("stream", ANY_VERSION))
            assert await app.store.kinds() == [Kind("x.one", 1, 3), Kind("x.one", 2, 3), Kind("x.one", 3, 3), Kind("x.two", 2, 1)]
            assert (await app.store.status()).types == {"x.one": 9, "x.two": 1}
            read = app.store.read
            assert [r.position for r in await read(Query(schema_version=2))] == [2, 5, 8, 10]
            assert [r.position for r in await read(Query(types=("x.one",), schema_version=2, reverse=True, limit=2))] == [8, 5]
            assert await read(Query(schema_version=9)) == []
            assert await app.store.held() == []

    asyncio.run(go())


def test_a_large_log_is_read_in_pages(url: str) -> None:
    async def go() -> None:
        async with App(url) as app:
            count = 2 * PAGE + 10
            await app.publish_many([envelope("x.one", {"n": n}, id=f"{n}") for n in range(count)])
            told: list[int] = []
            for sample, looked in ((None, count), (PAGE + 1, 2 * PAGE + 2), (PAGE - 1, 2 * PAGE - 2)):
                report = await read_stored(app.store, {"x.one": known()}, sample=sample, advance=told.append)
                assert report.tallies[0].looked == looked
                assert report.unread == []
            assert sum(told) == count + 4 * PAGE

    asyncio.run(go())


def known() -> Any:
    from dataclasses import make_dataclass

    from trilogue import event
    from trilogue.codec import coder

    return coder(event("x.one")(make_dataclass("One", [("n", int)])))
