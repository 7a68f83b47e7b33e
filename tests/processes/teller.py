"""Writers that decide: on seats and versions all of them want, and on accounts while they are killed. Run as a script.

python teller.py race FOLDER URL WRITER                append-only FOLDER/race-*.jsonl: what each writer was told it won
python teller.py teller FOLDER URL NUMBER              append-only FOLDER/teller-*.jsonl: each request begun, and its answer

A teller asks again, under the same id, whatever an earlier life of it was not answered; it ends when FOLDER/stop is there.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
from history import History

from trilogue import Aggregate, App, Boundary, Conflict, Db, Decision, Envelope, Snapshot, event, new_id, tag

SEATS = 200
WRITERS_EACH = 4
ACCOUNTS = 50
TASKS = 6
START = 1_000


@event("seat.taken", tags=("seat",))
@dataclass(frozen=True)
class SeatTaken:
    seat: int
    writer: str


class TakeSeat(Decision):
    seat: int
    writer: str
    is_free: bool = True

    def boundary(self) -> Boundary:
        return tag("seat", self.seat)

    def apply(self, e: SeatTaken) -> None:
        self.is_free = False

    def decide(self) -> SeatTaken | None:
        return SeatTaken(self.seat, self.writer) if self.is_free else None


@event("money.moved", key="account")
@dataclass(frozen=True)
class Moved:
    account: str
    amount: int
    request: str
    balance: int  # as whoever decided saw it: another one than the fold of the stream tells of a stale decision


class Account(Aggregate, stream="account-{id}", snapshot=Snapshot(every=10)):
    balance: int = START

    def move(self, amount: int, request: str) -> list[int]:
        """The balance after it, and how many events it took; nothing moves below zero."""
        if self.balance + amount < 0:
            return [self.balance, 0]
        self.emit(Moved(self.id, amount, request, self.balance + amount))
        return [self.balance, 1]

    def apply(self, e: Moved) -> None:
        self.balance += e.amount


def make_app(url: str) -> App:
    app = App(url, name="bank")

    @app.setup
    def tables(db: Db) -> None:
        db.execute("create table if not exists balances (account text primary key, amount integer not null)")
        db.execute("create table if not exists transfers (request text primary key, amount integer not null)")

    @app.on(group="balances", start="beginning")
    def balance(e: Moved, db: Db) -> None:
        add = "insert into balances values (?, ?) on conflict do update set amount = amount + excluded.amount"
        db.execute(add, (e.account, e.amount))

    return app


# ── a race ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def race(folder: Path, url: str, number: str) -> None:
    """Some writers of one process: for every seat and every version of one stream, exactly one of all writers may win."""
    app, history = make_app(url), History(folder, "race")

    async def seats(writer: str) -> None:
        for seat in range(SEATS):
            decided = await app.decide(TakeSeat(seat, writer), attempts=1_000)
            history.write(*[{"seat": seat, "writer": writer}] * len(decided.events))

    async def versions(writer: str) -> None:
        for version in range(SEATS):
            try:
                await app.store.append([Envelope(new_id(), "won", writer.encode())], expected=("race", version))
            except Conflict:
                continue
            history.write({"version": version + 1, "writer": writer})

    async with app:
        (folder / f"ready-{number}").touch()
        while not (folder / "go").exists():
            await asyncio.sleep(0.002)
        for run in (seats, versions):
            await asyncio.gather(*(run(f"{number}-{n}") for n in range(WRITERS_EACH)))


# ── tellers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def request(id_: str) -> tuple[list[str], int]:
    """What a request is about follows from its id: one account and an amount, or two and a transfer."""
    chance = random.Random(id_)
    accounts = chance.sample([f"acc{n}" for n in range(ACCOUNTS)], 1 if chance.random() < 0.6 else 2)
    return accounts, chance.randint(1, 300) * (1 if len(accounts) == 2 else chance.choice((-1, 1)))


async def ask(app: App, id_: str) -> dict[str, Any]:
    """Do one request; what became of it."""
    accounts, amount = request(id_)
    if len(accounts) == 2:
        return {"transferred": await transfer(app, id_, *accounts, amount)}
    decided = await app.decide(Account, accounts[0], lambda a: a.move(amount, id_), once=id_, attempts=1_000)
    return {"answer": decided.answer, "version": decided.version, "repeated": decided.repeated}


async def transfer(app: App, id_: str, source: str, target: str, amount: int) -> bool:
    """Two streams and a table in one transaction; the table's key is what refuses a repetition."""
    while True:
        try:
            async with app.transaction() as tx:
                one, two = await tx.load(Account, source), await tx.load(Account, target)
                if not one.move(-amount, id_)[1]:
                    # Asked again after a kill: what it takes may be gone because it was this very transfer that took it.
                    return bool(await app.db("select 1 from transfers where request = ?", (id_,)))
                two.move(amount, id_)
                tx.effect(lambda db: db.execute("insert into transfers values (?, ?)", (id_, amount)))
            return True
        except Conflict:
            continue
        except apsw.ConstraintError:
            return True


async def teller(folder: Path, url: str, number: str) -> None:
    """Some tasks that ask one request after the other; handlers run beside them."""
    app, history = make_app(url), History(folder, "teller")
    answered = {row["id"]: row for row in rows_of(folder, "teller") if "began" not in row}

    async def task(name: str) -> None:
        n = sum(1 for id_ in answered if id_.startswith(name + "."))
        if n and "answer" in answered[f"{name}.{n - 1}"]:
            history.write({"id": f"{name}.{n - 1}", **await ask(app, f"{name}.{n - 1}")})
        while not (folder / "stop").exists():
            history.write({"id": f"{name}.{n}", "began": time.time()})
            history.write({"id": f"{name}.{n}", **await ask(app, f"{name}.{n}")})
            n += 1
        history.write({"id": f"{name}.{n}", **await ask(app, f"{name}.{n}")})

    async with app.running():
        await asyncio.gather(*(task(f"{number}-{n}") for n in range(TASKS)))


def rows_of(folder: Path, kind: str) -> Iterable[dict[str, Any]]:
    """The rows all processes of a kind have written; a line cut off by a kill is left out."""
    for path in sorted(folder.glob(f"{kind}-*.jsonl")):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                yield json.loads(line)


if __name__ == "__main__":
    role, folder_, url_, number_ = sys.argv[1:]
    asyncio.run({"race": race, "teller": teller}[role](Path(folder_), url_, number_))
