"""Erasing: the key, the fact, the snapshots, who reacts, and no byte of it left in any file."""

import asyncio
import base64
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import pytest
from common import all_of, run

from trilogue import Aggregate, App, BadOption, Db, ErasureReceipt, Record, Rejected, Retry, Snapshot, audited, event, privacy
from trilogue.cli.main import main as cli
from trilogue.events import as_datetime


@event("customer.registered", key="customer", subject="customer", personal=("email", "note"))
@dataclass(frozen=True)
class Registered:
    customer: str
    email: str
    note: str | None = None


@event("customer.moved", key="customer", subject="customer", personal=("address",))
@dataclass(frozen=True)
class Moved:
    customer: str
    address: str


class Customer(Aggregate, stream="customer-{id}", snapshot=Snapshot(every=1)):
    address: str = ""

    def move(self, address: str) -> None:
        self.emit(Moved(self.id, address))

    def apply(self, e: Moved) -> None:
        self.address = e.address


MAIL = "anna.k@example.org"
FACT = "trilogue.subject.erased"


def mails(app: App) -> None:
    """A read model that forgets."""

    @app.setup
    def tables(db: Db) -> None:
        db.execute("create table if not exists mails (customer text not null, mail text not null, note text)")
        db.execute("create index if not exists mails_by_mail on mails (mail, customer)")

    @app.on(group="mails")
    def mails(e: Registered, db: Db) -> None:
        oldest = "(select min(rowid) from mails where customer = ?)"
        if e.note:  # rows that grow and shrink move between pages
            db.execute(f"update mails set mail = ?, note = ? where rowid = {oldest}", (e.note, e.email, e.customer))
            if len(e.note) > 5_000:
                db.execute(f"delete from mails where rowid = {oldest}", (e.customer,))
        db.execute("insert into mails values (?, ?, ?)", (e.customer, e.email, e.note))

    @app.on(FACT, group="forget")
    def forget(r: Record, db: Db) -> None:
        db.execute("delete from mails where customer = ?", (json.loads(r.data)["subject"],))


# ── the receipt ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_receipt_and_the_fact(url: str) -> None:
    app = App(url, name="shop")
    mails(app)

    async def main() -> None:
        async with app.running():
            await app.publish(Registered("u1", MAIL))
            await app.wait_idle()
            with audited(who="clerk 7"):
                receipt = await app.erase("u1", reason="asked on 3 May")
            (fact,) = await all_of(app, types=FACT)
            assert (receipt.subject, receipt.reason, receipt.is_repeated) == ("u1", "asked on 3 May", False)
            assert (receipt.position, receipt.id, receipt.erased_us) == (fact.position, fact.id, fact.time_us)
            assert json.loads(fact.data) == {
                "subject": "u1", "reason": "asked on 3 May", "erased_at": as_datetime(receipt.erased_us).isoformat(),
            }  # fmt: skip
            assert (fact.key, fact.source, fact.extensions) == ("u1", "shop", {"who": "clerk 7"})
            assert receipt.open == ()
            assert "forget has read the fact" in receipt.done
            assert await app.db("select count(*) from mails") == [(0,)]

    run(main())


def test_erasing_again_says_when_it_was(url: str) -> None:
    app = App(url)

    async def main() -> None:
        async with app:
            await app.publish(Registered("u1", MAIL))
            first = await app.erase("u1", reason="asked")
            again = await app.erase("u1", reason="another")
            assert again.is_repeated
            assert (again.erased_us, again.reason, again.position) == (first.erased_us, "asked", first.position)
            assert len(await all_of(app, types=FACT)) == 1

    run(main())


def test_who_is_unknown_is_not_erased(url: str) -> None:
    app = App(url)

    async def main() -> None:
        async with app:
            for _ in range(2):
                with pytest.raises(Rejected, match="nothing was ever sealed for 'u9'"):
                    await app.erase("u9", reason="asked")
                await app.publish(Registered("u1", MAIL))
            for reason in ("", "x" * 1_001):
                with pytest.raises(BadOption, match="expected why they are erased"):
                    await app.erase("u1", reason=reason)
            assert await all_of(app, types=FACT) == []

    run(main())


STEPS = ["append", "_drop_sealed_states", "_wait_for_builds", "_wait_for_groups", "rewrite"]


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_leaves_nothing_readable_and_repeating_completes_it(
    file_url: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    async def erase_and_crash() -> None:
        app = App(file_url)
        async with app:
            await app.publish(Registered("u1", MAIL))
            owner: Any = app.store if hasattr(app.store, step) else privacy
            monkeypatch.setattr(owner, step, crash)
            await app.erase("u1", reason="asked")

    with pytest.raises(KeyboardInterrupt):
        run(erase_and_crash())
    monkeypatch.undo()
    app = App(file_url)
    mails(app)

    async def again() -> None:
        async with app.running():
            app.knows(Registered)
            record = (await all_of(app, types="customer.#"))[0]
            assert app.decode(record) == Registered("u1", "[erased]")
            receipt = await app.erase("u1", reason="asked")
            assert (receipt.is_repeated, receipt.open) == (True, ())
            assert len(await all_of(app, types=FACT)) == 1

    run(again())


# ── who has not finished ─────────────────────────────────────────────────────────────────────────────────────────────


def test_groups_nobody_works_for_are_named(file_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "NOBODY_S", 0.1)
    app = App(file_url)
    mails(app)

    async def main() -> None:
        async with app.running():
            await app.publish(Registered("u1", MAIL))
            await app.wait_idle()
        async with app:
            receipt = await app.erase("u1", reason="asked")
            assert receipt.open == ("forget has not read the fact, because nobody works for it: run it; then erase again",)
            assert await app.db("select count(*) from mails") == [(1,)]
        async with app.running():
            await app.wait_idle()
            assert (await app.erase("u1", reason="asked")).open == ()

    run(main())


def test_groups_that_fail_or_are_late_are_named(url: str) -> None:
    app = App(url)
    wait = asyncio.Event()

    @app.on(FACT, group="fails", retry=Retry(1))
    async def fails(r: Record) -> None:
        raise ValueError("no")

    @app.on(FACT, group="late")
    async def late(r: Record) -> None:
        await wait.wait()

    async def main() -> None:
        async with app.running():
            await app.publish(Registered("u1", MAIL))
            receipt = await app.erase("u1", reason="asked", timeout="200ms")
            assert sorted(receipt.open) == [
                "fails failed to handle the fact: see `trilogue dead list --group fails`; then erase again",
                "late is still behind; then erase again",
            ]
            wait.set()
            await app.store.drop_dead("fails")
            await app.wait_idle()
            assert (await app.erase("u1", reason="asked")).open == ()

    run(main())


def balances(app: App, version: int) -> None:
    """A projection that forgets."""

    @app.projection(
        version=version,
        tables={"addresses": "customer text primary key, address text not null"},
        erased=lambda subject, db: db.execute("delete from {addresses} where customer = ?", (subject,)),
    )
    def addresses(e: Moved, db: Db) -> None:
        db.execute("insert or replace into {addresses} values (?, ?)", (e.customer, e.address))


def test_projections_forget_and_their_old_builds_are_named(file_url: str) -> None:
    async def begin() -> None:
        app = App(file_url)
        balances(app, 1)
        async with app.running():
            for who in ("u1", "u2"):
                await app.publish(Moved(who, f"street of {who}"))
            await app.wait_idle()
            assert await app.db("select count(*) from addresses") == [(2,)]

    async def then() -> None:
        app = App(file_url)
        balances(app, 2)
        async with app.running():
            await app.wait_idle()
            receipt = await app.erase("u1", reason="asked")
            assert await app.db("select customer, address from addresses") == [("u2", "street of u2")]
            (still_open,) = receipt.open
            assert "projection addresses keeps its old build" in still_open
            assert b"street of u1" in raw(Path(app.store.path).parent)
            await app.drop_old("addresses")
            assert (await app.erase("u1", reason="asked")).open == ()
            assert b"street of u1" not in raw(Path(app.store.path).parent)

    run(begin())
    run(then())


def test_a_reader_that_keeps_old_pages_is_named(file_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilogue.stores.rewrite.CHECKPOINT_MS", 10)
    app = App(file_url)

    async def main() -> None:
        async with app:
            await app.publish(Registered("u1", MAIL))
            reader = apsw.Connection(str(tmp_path / "app.db"))
            reader.execute("begin").fetchall()
            reader.execute("select count(*) from trilogue_records").fetchall()
            receipt = await app.erase("u1", reason="asked")
            assert receipt.open == ("a reader keeps old pages of the file: end it (a backup, a sqlite3 shell); then erase again",)
            await app.publish(Registered("u2", MAIL))  # and everybody goes on
            reader.close()
            assert (await app.erase("u1", reason="asked")).open == ()

    run(main())


# ── raw bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def raw(folder: Path) -> bytes:
    """Everything in the files of a log: the database, its write-ahead log, the keys, their journal."""
    return b"\0".join(file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file())


def forms(token: str) -> Iterator[bytes]:
    """How a text may be written."""
    data = token.encode()
    yield data
    yield json.dumps(token)[1:-1].encode()
    yield token.encode("utf-16-le")
    yield data.hex().encode()
    for shift in range(3):
        yield base64.b64encode(b"x" * shift + data)[(4 if shift else 0) : -4]
        yield base64.urlsafe_b64encode(b"x" * shift + data)[(4 if shift else 0) : -4]


def found(token: str, data: bytes) -> bool:
    return any(form in data for form in forms(token))


def token(who: int) -> str:
    """Nothing else looks like it, in any form."""
    return f"Zürich-{who:03d}-{random.Random(who).getrandbits(80):020x}"


def text(who: int, chance: random.Random) -> str:
    """The token in a text of any length, up to several pages."""
    return token(who) + "." * chance.choice([0, 3, 40, 200, 900, 3_000, 9_000]) + token(who)


async def load(app: App, chance: random.Random, *, customers: int, events: int) -> None:
    """Customers who register again and again, and move."""
    for _ in range(events // 20):
        made = [chance.randrange(customers) for _ in range(20)]
        await app.publish_many([Registered(f"u{who}", text(who, chance), text(who, chance)) for who in made])
        who = chance.randrange(customers)
        await app.decide(Customer, f"u{who}", lambda c, who=who: c.move(text(who, chance)), once=f"{chance.random()}")


def failing(app: App) -> None:
    app.knows(Customer)

    @app.on(group="fails", retry=Retry(2, "1ms"))
    async def fails(e: Registered) -> None:
        raise ValueError(f"no mailbox {e.email}")

    @app.on(group="fails-too", retry=Retry(1))
    def fails_too(es: list[Registered], db: Db) -> None:
        raise ValueError(f"no mailbox {es[0].email}")


def test_the_log_itself_never_holds_a_byte_of_it(file_url: str, tmp_path: Path) -> None:
    app = App(file_url)
    failing(app)

    async def main() -> None:
        async with app.running():
            await load(app, random.Random(1), customers=10, events=200)
            await app.publish(Registered("u1", text(1, random.Random(1))), delay="1d")
            await app.take_snapshot(Customer, "u1")
            await app.wait_idle()
            assert [who for who in range(10) if found(token(who), raw(tmp_path))] == []
        assert [who for who in range(10) if found(token(who), raw(tmp_path))] == []

    run(main())


@pytest.mark.parametrize("seed", [1, 2])
def test_after_an_erasure_no_file_holds_a_byte_of_it(file_url: str, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    customers, erased = 24, set(range(0, 24, 2))

    def app_again() -> App:
        app = App(file_url)
        mails(app)
        failing(app)
        balances(app, 1)
        return app

    def left() -> tuple[set[int], set[int]]:
        """Of whom something is found: of those to be erased, of the others."""
        data = raw(tmp_path)
        there = {who for who in range(customers) if found(token(who), data)}
        return there & erased, there - erased

    async def before() -> None:
        app = app_again()
        async with app.running():
            await load(app, chance, customers=customers, events=800)
            await app.wait_idle()
            assert left() == (erased, set(range(customers)) - erased), "the search finds what is there"
            for who in sorted(erased)[:-1]:
                assert (await app.erase(f"u{who}", reason="asked")).open == ()
            assert left()[0] == {max(erased)}
            await load_others(app)
            assert left()[0] == {max(erased)}
        assert left()[0] == {max(erased)}

    async def load_others(app: App) -> None:
        others = [who for who in range(customers) if who not in erased]
        made = [chance.choice(others) for _ in range(100)]
        await app.publish_many([Registered(f"u{who}", text(who, chance)) for who in made])
        await app.wait_idle()

    async def reopened() -> None:
        app = app_again()
        async with app.running():
            assert (await app.erase(f"u{max(erased)}", reason="asked")).open == ()
            assert left() == (set(), set(range(customers)) - erased)
        assert left() == (set(), set(range(customers)) - erased)

    asyncio.run(before())
    asyncio.run(reopened())


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def stored(file_url: str) -> str:
    """A log with one customer."""

    async def main() -> None:
        async with App(file_url) as app:
            await app.publish(Registered("u1", MAIL))

    run(main())
    return file_url


def test_the_command_erases_and_says_what_it_did(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["erase", "u1", "--reason", "asked on 3 May", "--yes", "--url", stored]) == 0
    out = capsys.readouterr().out
    assert "u1: erased 20" in out
    assert "because: asked on 3 May" in out
    assert "done  the fact is at position 2 of the log" in out
    assert cli(["erase", "u1", "--reason", "x", "--yes", "--url", stored]) == 0
    assert "u1: erased before, erased 20" in capsys.readouterr().out

    async def main() -> None:
        app = App(stored)
        app.knows(Registered)
        async with app:
            assert [app.decode(record) for record in await all_of(app, types="customer.#")] == [Registered("u1", "[erased]")]

    run(main())


def test_the_command_as_json(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["erase", "u1", "--reason", "asked", "--yes", "--json", "--url", stored]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(ErasureReceipt.__dataclass_fields__) < set(document)
    assert (document["subject"], document["open"]) == ("u1", [])


def test_the_command_fails_with_a_code(stored: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli(["erase", "u9", "--reason", "asked", "--yes", "--url", stored]) == 1
    assert "nothing was ever sealed for 'u9'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    assert cli(["erase", "u1", "--reason", "asked", "--url", stored]) == 2
    assert "add --yes to erase without being asked" in capsys.readouterr().err
    assert cli(["erase", "u1", "--reason", "asked", "--yes", "--timeout", "soon", "--url", stored]) == 2
    assert cli(["erase", "u1", "--yes", "--url", stored]) == 2


def test_the_command_says_what_is_open(
    file_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy, "NOBODY_S", 0.1)
    app = App(file_url)
    mails(app)

    async def main() -> None:
        async with app.running():
            await app.publish(Registered("u1", MAIL))
            await app.wait_idle()

    run(main())
    assert cli(["erase", "u1", "--reason", "asked", "--yes", "--url", file_url]) == 1
    assert "open  forget has not read the fact" in capsys.readouterr().out


OTHER = """
import asyncio, random, sys
sys.path.insert(0, "tests")
from test_privacy_erase import App, Registered, Rejected, mails, text
app = App(sys.argv[1])
mails(app)

async def main():
    chance, erased = random.Random(3), 0
    async with app.running():
        ended = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
        n = 0
        while not ended.done():
            who = chance.randrange(6)
            try:
                await app.publish(Registered(f"u{who}", text(who, chance), text(who, chance)))
            except Rejected:
                erased += 1
            n += 1
            if n == 300:
                print("ready", flush=True)
        await app.wait_idle()
    print("erased" if erased else "none was refused")

asyncio.run(main())
"""


@pytest.mark.processes
def test_another_process_goes_on_meanwhile(file_url: str, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, file_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        for who in (1, 4):
            assert cli(["erase", f"u{who}", "--reason", "asked", "--yes", "--timeout", "60s", "--url", file_url]) == 0
            assert not found(token(who), raw(tmp_path))
        out, _ = other.communicate("end\n")
        assert (other.returncode, out) == (0, "erased\n")
    data = raw(tmp_path)
    assert [who for who in range(6) if found(token(who), data)] == [0, 2, 3, 5]
