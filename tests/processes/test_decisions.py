"""Real processes that decide: sixteen writers after the same seats, and tellers killed every second."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from crew import Crew, until
from teller import ACCOUNTS, SEATS, START, Account, Moved, make_app, request, rows_of

from trilogue import App, Record

TELLER = Path(__file__).with_name("teller.py")
KILLING_S = 12.0
KILL_EVERY_S = 1.0
pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    crew = Crew(tmp_path, TELLER, f"sqlite:///{tmp_path}/bank.db?lease_s=2")
    yield crew
    crew.end()


async def everything(app: App, **query: Any) -> list[Record]:
    return [record async for record in app.history(**query)]


def test_sixteen_writers_after_the_same_seats(crew: Crew) -> None:
    """Four processes with four writers each: every seat and every version has exactly one winner, the one who was told so."""
    workers = [crew.start("race", str(n)) for n in range(4)]
    until(lambda: len(list(crew.folder.glob("ready-*"))) == 4, "all writers are ready")
    (crew.folder / "go").touch()
    assert [worker.wait(60) for worker in workers] == [0] * 4, crew.log("race")
    told = list(rows_of(crew.folder, "race"))

    async def read() -> tuple[list[Record], list[Record]]:
        async with make_app(crew.given[0]) as app:
            return await everything(app, types="seat.taken"), await everything(app, stream="race")

    taken, versions = asyncio.run(read())
    seats = [(seat["seat"], seat["writer"]) for seat in (msgspec.json.decode(record.data) for record in taken)]
    assert sorted(seats) == sorted((row["seat"], row["writer"]) for row in told if "seat" in row)
    assert sorted(seat for seat, _ in seats) == list(range(SEATS))
    assert [(r.version, r.data.decode()) for r in versions] == sorted(
        (row["version"], row["writer"]) for row in told if "version" in row
    )
    assert [record.version for record in versions] == list(range(1, SEATS + 1))
    print(f"writers that won a seat: {len({writer for _, writer in seats})}")


def test_tellers_killed_every_second(crew: Crew) -> None:
    """Decisions and transfers survive every kill: each request once, every answer true, no money made or lost."""
    chance = random.Random(11)
    tellers = [("teller", "0"), ("teller", "1")]
    for args in tellers:
        crew.start(*args)
    kills, end = 0, time.monotonic() + KILLING_S
    while time.monotonic() < end:
        time.sleep(KILL_EVERY_S)
        args = chance.choice(tellers)
        if crew.running[args].poll() is None:
            crew.kill(args)
            kills += 1
        crew.start(*args)
    (crew.folder / "stop").touch()
    assert [crew.running[args].wait(60) for args in tellers] == [0, 0], crew.log("teller")
    records, facts = asyncio.run(finished(crew.given[0]))
    rows = list(rows_of(crew.folder, "teller"))
    wrong = judge(records, rows, facts)
    print(f"{kills} kills, {len(records)} events, {len({row['id'] for row in rows})} requests")
    assert kills >= 5
    assert len(records) > 200
    assert facts["snapshots"] > 0
    assert wrong == {name: [] for name in wrong}


async def finished(url: str) -> tuple[list[Record], dict[str, Any]]:
    """The log when every handler has come to its end, the tables, and the states as they are loaded."""
    app = make_app(url)
    async with app.running():
        await app.wait_idle(timeout="60s")
        states = [await app.load(Account, f"acc{n}") for n in range(ACCOUNTS)]
        return await everything(app, types="money.moved"), {
            "balances": dict(await app.db("select account, amount from balances")),
            "transfers": dict(await app.db("select request, amount from transfers")),
            "states": {account.id: account.balance for account in states},
            "snapshots": len(await app.store.states("snapshot")),
        }


# ── the checker ──────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(records: list[Record], rows: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, list[Any]]:
    """What was wrong, by name; all of it empty means that every promise was kept."""
    moved = [(record, Moved(**msgspec.json.decode(record.data))) for record in records]
    answers = [row for row in rows if "began" not in row]
    transfers = {id_: _legs(id_) for id_ in facts["transfers"]}
    legs = Counter((e.request, e.account, e.amount) for _, e in moved)
    wanted = Counter({leg: 1 for id_ in transfers for leg in transfers[id_]})
    wanted.update({leg: 1 for row in answers if row.get("answer", [0, 0])[1] and not row["repeated"] for leg in _legs(row["id"])})
    # An answer may have been lost to a kill and come as a repetition: it is wanted all the same, once.
    for row in answers:
        if "answer" in row and row["answer"][1]:
            wanted[_legs(row["id"])[0]] = 1
    balances = _fold(moved)
    return {
        "begun, never answered": sorted({row["id"] for row in rows} - {row["id"] for row in answers}),
        "stored and not wanted, or twice": sorted((legs - wanted).items()),
        "wanted and not stored": sorted((wanted - legs).items()),
        "transferred, not in the table": [r["id"] for r in answers if r.get("transferred") and r["id"] not in transfers],
        "refused, in the table": [r["id"] for r in answers if r.get("transferred") is False and r["id"] in transfers],
        "versions with gaps": _gaps(records),
        "decided on what was not so": _stale(moved),
        "answers that are not true": _untrue(moved, answers),
        "answered in two ways": _two_ways(answers),
        "tables": _differences(balances, facts["balances"], 0) + _differences(balances, facts["states"], START),
        "money": [total for total in [sum(balances.values()) - _paid_in(answers)] if total],
    }


def _legs(id_: str) -> list[tuple[str, str, int]]:
    accounts, amount = request(id_)
    amounts = (amount,) if len(accounts) == 1 else (-amount, amount)
    return [(id_, account, each) for account, each in zip(accounts, amounts, strict=True)]


def _fold(moved: list[tuple[Record, Moved]]) -> dict[str, int]:
    balances: Counter[str] = Counter()
    for _, e in moved:
        balances[e.account] += e.amount
    return dict(balances)


def _gaps(records: list[Record]) -> list[tuple[str | None, list[int | None]]]:
    streams: dict[str | None, list[int | None]] = {}
    for record in records:
        streams.setdefault(record.stream, []).append(record.version)
    return [(name, versions) for name, versions in streams.items() if versions != list(range(1, len(versions) + 1))]


def _stale(moved: list[tuple[Record, Moved]]) -> list[Moved]:
    """Events whose balance is not the one their stream has there, or is below zero."""
    balances: Counter[str] = Counter()
    wrong = []
    for _, e in moved:
        balances[e.account] += e.amount
        if e.balance != START + balances[e.account] or e.balance < 0:
            wrong.append(e)
    return wrong


def _untrue(moved: list[tuple[Record, Moved]], answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers that name another balance than the stream has at that version, or a version that is another request's."""
    at: dict[tuple[str, int], tuple[int, str]] = {}
    balances: Counter[str] = Counter()
    for record, e in moved:
        balances[e.account] += e.amount
        at[e.account, record.version or 0] = (START + balances[e.account], e.request)
    wrong = []
    for row in answers:
        if "answer" in row:
            balance, request_ = at.get((request(row["id"])[0][0], row["version"]), (START, ""))
            balance_told, count = row["answer"]
            if balance != balance_told or (count and request_ != row["id"]):
                wrong.append(row)
    return wrong


def _two_ways(answers: list[dict[str, Any]]) -> list[str]:
    told: dict[str, set[Any]] = {}
    for row in answers:
        if "answer" in row:
            told.setdefault(row["id"], set()).add((*row["answer"], row["version"]))
    return [id_ for id_, ways in told.items() if len(ways) > 1]


def _differences(balances: dict[str, int], table: dict[str, int], start: int) -> list[Any]:
    names = sorted(balances.keys() | table.keys())
    pairs = [(name, balances.get(name, 0) + start, table.get(name, start)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _paid_in(answers: list[dict[str, Any]]) -> int:
    return sum({row["id"]: request(row["id"])[1] for row in answers if row.get("answer", [0, 0])[1]}.values())


# ── the checker finds what it should ─────────────────────────────────────────────────────────────────────────────────


def _clean() -> tuple[list[Record], list[dict[str, Any]], dict[str, Any]]:
    ids = [f"x.{n}" for n in range(40)]
    balances: Counter[str] = Counter()
    versions: Counter[str] = Counter()
    records, rows, transfers = [], [], {}
    for id_ in ids:
        legs = _legs(id_)
        for _, account, amount in legs:
            balances[account] += amount
            versions[account] += 1
            moved = Moved(account, amount, id_, START + balances[account])
            records.append(_record(moved, versions[account], len(records) + 1))
        rows.append({"id": id_, "began": 0})
        if len(legs) == 2:
            transfers[id_] = legs[1][2]
            rows.append({"id": id_, "transferred": True})
        else:
            account = legs[0][1]
            rows.append({"id": id_, "answer": [START + balances[account], 1], "version": versions[account], "repeated": False})
    states = {name: START + balance for name, balance in balances.items()}
    return records, rows, {"balances": dict(balances), "transfers": transfers, "states": states}


def _record(e: Moved, version: int, position: int) -> Record:
    stream = f"account-{e.account}"
    return Record(str(position), "money.moved", msgspec.json.encode(e), position=position, stream=stream, version=version)


def test_the_checker_finds_each_bug() -> None:
    records, rows, facts = _clean()
    assert _wrong(records, rows, facts) == set()
    single = next(row for row in rows if "answer" in row)
    double = next(row for row in rows if "transferred" in row)
    lost = [record for record in records if msgspec.json.decode(record.data)["request"] != single["id"]]
    assert {"wanted and not stored", "money", "tables"} <= _wrong(lost, rows, facts)
    assert {"stored and not wanted, or twice", "versions with gaps"} <= _wrong([*records, records[0]], rows, facts)
    half = [r for r in records if r is not next(x for x in records if msgspec.json.decode(x.data)["request"] == double["id"])]
    assert {"wanted and not stored", "money"} <= _wrong(half, rows, facts)
    untold = {**facts, "transfers": {k: v for k, v in facts["transfers"].items() if k != double["id"]}}
    assert "transferred, not in the table" in _wrong(records, rows, untold)
    assert _wrong(records, [*rows, {"id": "x.99", "began": 0}], facts) == {"begun, never answered"}
    other = {**single, "answer": [single["answer"][0] + 1, 1], "repeated": True}
    assert _wrong(records, [*rows, other], facts) == {"answers that are not true", "answered in two ways"}
    stale = [_record(Moved("acc0", 0, "x.0", 77), 1, 1), *records]
    assert "decided on what was not so" in _wrong(stale, rows, facts)
    moved = {**facts, "balances": {**facts["balances"], "acc0": 77}}
    assert _wrong(records, rows, moved) == {"tables"}


def _wrong(records: list[Record], rows: list[dict[str, Any]], facts: dict[str, Any]) -> set[str]:
    return {name for name, found in judge(records, rows, facts).items() if found}
