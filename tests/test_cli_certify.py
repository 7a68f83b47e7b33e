"""`trilogue certify`: what it prints, its exit codes, and that nothing of it is left."""

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import services

from trilogue.cli.main import main
from trilogue.conformance import PROMISES, MakeStore, Promise, check, places
from trilogue.conformance.tools import expect
from trilogue.errors import Unavailable

# The packages have functions of these names.
check_module, certify_module = sys.modules["trilogue.conformance.check"], sys.modules["trilogue.cli.certify"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("TRILOGUE_URL", "TRILOGUE_STORE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def broken() -> Iterator[None]:
    """One promise that nobody keeps."""

    async def prove(make_store: MakeStore) -> None:
        expect(False, "one is two\x1b[2J")

    PROMISES.append(Promise("nobody_keeps_this", "It is never kept.", frozenset(), prove))
    yield
    PROMISES.pop()


def test_kept_and_skipped(capsys: Captured, folder: Path) -> None:
    assert main(["certify", "memory://", "--only", "retry_waits", "--only", "timers_survive"]) == 0
    out = capsys.readouterr().out
    assert "kept     retry_waits " in out
    assert "needs: survives the process" in out
    assert out.splitlines()[-1] == "memory://: 1 kept, 0 broken, 2 skipped"
    assert list(folder.iterdir()) == []


def test_broken_is_exit_code_1(capsys: Captured, broken: None) -> None:
    assert main(["certify", "sqlite:///mine.db", "--only", "nobody_keeps"]) == 1
    out = capsys.readouterr().out
    assert "broken   nobody_keeps_this" in out
    assert "one is two\\x1b[2J" in out
    assert not Path("mine.db").exists()


def test_one_that_never_ends_says_where_it_waits(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    async def prove(make_store: MakeStore) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(check_module, "PROMISE_S", 0.1)
    monkeypatch.setattr(certify_module, "PROMISES", [Promise("never_ends", "It never ends.", frozenset(), prove)])
    assert main(["certify", "memory://"]) == 1
    assert re.search(r"it waits in Promise.keep:\d+ > .*prove:\d+ > sleep:\d+", capsys.readouterr().out)


def test_json(capsys: Captured, broken: None) -> None:
    assert main(["certify", "sqlite:///mine.db", "--only", "nobody_keeps", "--only", "retry_waits", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["url"], told["store"], told["kept"], told["broken"]) == ("sqlite:///mine.db", None, 1, 1)
    assert {each["verdict"] for each in told["promises"]} == {"kept", "broken"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("memory:// --only retri", "no promise is named like 'retri'"),
        ("sqlite:///x.db --store sqlite:///y.db", "is a store itself"),
        ("amqp://localhost --store kafka://localhost", "is a broker"),
        ("nothing://", "there is no log behind"),
        ("", "URL"),
    ],
)
def test_a_mistake_is_one_sentence(line: str, said: str, capsys: Captured) -> None:
    assert main(["certify", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_a_folder_that_is_not_there(capsys: Captured) -> None:
    assert main(["certify", "sqlite:///nowhere/x.db"]) == 1
    assert "does not exist" in capsys.readouterr().err


# ── real servers ─────────────────────────────────────────────────────────────────────────────────────────────────────

# What a broker alone promises is little; each of it is proved by itself, so that they share the time.
ALONE = [promise for promise in PROMISES if not promise.needs - {*("order per key", "dead letters: list, redrive, drop"),
         "groups without order: any worker takes any record", "several processes", "survives the process"}]  # fmt: skip


def certified(url: str, promise: Promise, store: str | None) -> Any:

    async def outcome() -> Any:
        [only] = [each async for each in check(url, [promise], store=store)]
        return only

    return asyncio.run(outcome())


@pytest.mark.parametrize("promise", ALONE, ids=lambda each: each.name)
def test_rabbitmq_alone(promise: Promise) -> None:
    outcome = certified(services.url("rabbitmq"), promise, None)
    assert outcome.verdict != "broken", outcome.reason
    assert (outcome.verdict == "skipped") == ("order per key" in promise.needs)


@pytest.mark.parametrize("promise", ALONE, ids=lambda each: each.name)
def test_kafka_alone(promise: Promise) -> None:
    outcome = certified(services.url("kafka"), promise, None)
    assert outcome.verdict == "kept", outcome.reason


def schemas(url: str) -> list[str]:
    with psycopg.connect(url) as connection:
        found = connection.execute("select nspname from pg_namespace where nspname like 'certify%'")
        return [name for (name,) in found]


def test_no_schema_is_left(capsys: Captured, postgresql: str, broken: None) -> None:
    """Of promises that are kept, of one that fails, and of one that fails with a transaction open on its tables."""
    held: list[psycopg.Connection[Any]] = []

    async def prove(make_store: MakeStore) -> None:
        store: Any = make_store()
        await store.open()
        [schema] = schemas(postgresql)
        held.append(psycopg.connect(postgresql))
        held[0].execute(f"lock table {schema}.trilogue_records".encode())
        await store.close()
        expect(False, "it goes away and leaves a transaction open")

    PROMISES.append(Promise("holds_on", "It is never kept.", frozenset(), prove))
    try:
        for only in ("retry_waits", "nobody_keeps_this", "holds_on"):
            assert main(["certify", postgresql, "--only", only]) == (only != "retry_waits")
            assert schemas(postgresql) == []
    finally:
        PROMISES.pop()
        for connection in held:
            connection.close()
    assert "leaves a transaction open" in capsys.readouterr().out


def test_a_broker_that_keeps_what_is_its_own_keeps_no_schema(
    capsys: Captured, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise Unavailable("it is away")

    monkeypatch.setattr(places, "_delete_queues", fails)
    with services.rabbitmq_vhost() as url:
        assert main(["certify", url, "--store", postgresql, "--only", "retry_waits"]) == 1
    assert "it is away" in capsys.readouterr().err
    assert schemas(postgresql) == []


def test_a_broker_that_is_not_there_leaves_no_schema(capsys: Captured, postgresql: str) -> None:
    assert main(["certify", "amqp://127.0.0.1:1/", "--store", postgresql, "--only", "retry_waits"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
    assert schemas(postgresql) == []


def test_nothing_is_left_on_the_servers(capsys: Captured) -> None:
    def left() -> tuple[list[str], list[str]]:
        queues: Any = services.rabbitmq_api("GET", "/api/queues/%2f")
        exchanges: Any = services.rabbitmq_api("GET", "/api/exchanges/%2f")
        return [each["name"] for each in queues], [each["name"] for each in exchanges]

    url = services.url("rabbitmq")
    assert main(["certify", url, "--store", "none", "--only", "dead_letters_are"]) == 0
    assert not [name for names in left() for name in names if name.startswith("certify-")]
    capsys.readouterr()
