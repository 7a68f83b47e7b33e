"""Every promise, kept by every store; and the runner of the suite itself."""

import asyncio
from pathlib import Path

import pytest

from trilogue.conformance import PROMISES, Outcome, Promise, check
from trilogue.conformance.tools import Bench, MakeStore, expect, group, promise, take
from trilogue.errors import BadOption, UnknownScheme
from trilogue.events import new_id
from trilogue.ports import Feature
from trilogue.stores import open_store

URLS = ("memory://", "sqlite:///{folder}/a folder.db?lease_s=0.5", "postgresql")
by_name = pytest.mark.parametrize("kept", PROMISES, ids=lambda each: each.name)


@pytest.mark.parametrize("kind", URLS, ids=["memory", "sqlite", "postgresql"])
@by_name
def test_promise(kept: Promise, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("postgresql_url") if kind == "postgresql" else kind.format(folder=tmp_path)
    missing = kept.needs - open_store(url).features
    if missing:
        assert missing <= {Feature.SHARED, Feature.PERSISTENT}
        assert url == "memory://"
        pytest.skip(f"memory:// has no {', '.join(missing)}")
    asyncio.run(kept.keep(lambda: open_store(url)))


@by_name
def test_every_promise_is_one_sentence(kept: Promise) -> None:
    assert kept.text.endswith(".")
    assert kept.text[0].isupper() or kept.text.startswith(("status()", "transact()"))
    assert len([each for each in PROMISES if each.name == kept.name]) == 1


def _promises(*proofs: object) -> list[Promise]:
    """Register promises, and take them out of the suite again."""
    before = len(PROMISES)
    for proof in proofs:
        promise()(proof)  # type: ignore[arg-type]
    mine = PROMISES[before:]
    del PROMISES[before:]
    return mine


async def promise_kept(make_store: MakeStore) -> None:
    """It is kept."""


async def promise_broken(make_store: MakeStore) -> None:
    """It is broken."""
    async with Bench(make_store):
        expect(False, "one is two")


async def promise_crashes(make_store: MakeStore) -> None:
    """It never comes to an end."""
    async with Bench(make_store) as bench:
        store = await bench.open(group("readers"))
        await take(store, "readers", 1, within_s=0.1)


async def _outcomes(url: str, promises: list[Promise]) -> list[Outcome]:
    return [outcome async for outcome in check(url, promises)]


def test_check_tells_what_was_kept_broken_and_skipped(tmp_path: Path) -> None:
    mine = _promises(promise_kept, promise_broken, promise_crashes)
    shared = Promise("shared", "It is shared.", frozenset({Feature.SHARED}), promise_kept)
    outcomes = asyncio.run(_outcomes("memory://", [*mine, shared]))
    assert [outcome.verdict for outcome in outcomes] == ["kept", "broken", "broken", "skipped"]
    assert "one is two" in outcomes[1].reason
    assert "1 deliveries within" in outcomes[2].reason
    assert outcomes[3].reason == "several processes"


def test_check_leaves_the_file_of_the_url_alone(tmp_path: Path) -> None:
    outcomes = asyncio.run(_outcomes(f"sqlite:///{tmp_path}/mine.db?payload_bytes=1000", _promises(promise_kept)))
    assert [outcome.verdict for outcome in outcomes] == ["kept"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("url", "error"), [("nothing://", UnknownScheme), ("sqlite:///x.db?lease_s=x", BadOption)])
def test_check_refuses_a_wrong_url(url: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        asyncio.run(_outcomes(url, []))


def test_promises_of_a_store_of_ones_own_may_crash_it_themselves() -> None:
    class Crashing:
        crashed = ""

        async def crash(self) -> None:
            self.crashed = new_id()

    store = Crashing()
    asyncio.run(Bench(lambda: open_store("memory://")).crash(store))
    assert store.crashed
