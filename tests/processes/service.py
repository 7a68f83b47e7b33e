"""One app for all processes of these tests: an effect, a plain handler, and one that emits. Run as a script with a role.

python service.py publish FOLDER URL PUBLISHER EVENTS     append-only FOLDER/publish-*.jsonl: before and after each publish
python service.py work FOLDER URL [SLEEP_S]               append-only FOLDER/handle-*.jsonl: each entry and exit of `plain`
"""

import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from history import History

from trilogue import App, Db, Envelope, Retry, derived_id, event
from trilogue.errors import LogError

KEYS = 16
EPOCH_US = 1_800_000_000_000_000


@event("step.taken", key="key")
@dataclass(frozen=True)
class Step:
    key: str
    n: int


@event("step.echoed", key="key")
@dataclass(frozen=True)
class Echo:
    key: str
    n: int


def step_id(key: str, n: int) -> str:
    return derived_id(EPOCH_US + n, key, n)


def make_app(url: str, history: History | None, sleep_s: float = 0.0) -> App:
    app = App(url, name="chaos")

    @app.setup
    def tables(db: Db) -> None:
        db.execute("create table if not exists effects (key text, n integer)")
        db.execute("create table if not exists echoes (key text, n integer)")

    @app.on(group="effect", start="beginning")
    def effect(e: Step, db: Db) -> None:
        db.execute("insert into effects values (?, ?)", (e.key, e.n))

    @app.on(group="plain", start="beginning", retry=Retry(3, "10ms"))
    async def plain(e: Step) -> None:
        with history.handling("plain", e.key, e.n) if history else contextlib.nullcontext():
            if sleep_s:
                await asyncio.sleep(sleep_s)

    @app.on(group="emitting", start="beginning")
    async def emitting(e: Step) -> Echo:
        return Echo(e.key, e.n)

    @app.on(group="echo", start="beginning")
    def echo(es: list[Echo], db: Db) -> None:
        db.executemany("insert into echoes values (?, ?)", [(e.key, e.n) for e in es])

    return app


async def publish(folder: Path, url: str, publisher: int, events: int) -> None:
    """64 tasks, one key each; a restarted publisher repeats what it does not know the outcome of, under the same ids."""
    app = make_app(url, None)
    history = History(folder, "publish")
    known = _stored_by(folder, publisher)

    async def one_key(k: int) -> None:
        key = f"p{publisher}-{k}"
        n = known.get(key, -1) + 1
        while n < events // KEYS:
            batch = range(n, min(n + 25, events // KEYS))
            envelopes: list[Envelope] = [app.envelope(Step(key, i), id=step_id(key, i), time_us=EPOCH_US + i) for i in batch]
            history.published(key, n, batch[-1], "begun")
            try:
                await app.publish_many(envelopes)
            except LogError as error:
                history.published(key, n, batch[-1], "unknown" if error.stored is None else "rejected")
                continue
            history.published(key, n, batch[-1], "stored")
            n = batch[-1] + 1

    async with app:
        await asyncio.gather(*(one_key(k) for k in range(KEYS)))
    (folder / f"published-{publisher}").touch()


def _stored_by(folder: Path, publisher: int) -> dict[str, int]:
    """The last number of each key that an earlier life of this publisher knows to be stored."""
    known: dict[str, int] = {}
    for path in folder.glob("publish-*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["outcome"] == "stored" and row["key"].startswith(f"p{publisher}-"):
                known[row["key"]] = max(known.get(row["key"], -1), row["to"])
    return known


async def work(folder: Path, url: str, sleep_s: float) -> None:
    app = make_app(url, History(folder, "handle"), sleep_s)
    await app.run(grace="20s")


def main() -> None:
    role, folder, url, *rest = sys.argv[1:]
    if role == "publish":
        asyncio.run(publish(Path(folder), url, int(rest[0]), int(rest[1])))
    else:
        asyncio.run(work(Path(folder), url, float(rest[0]) if rest else 0.0))


if __name__ == "__main__":
    main()
