"""One program at every URL: five groups, publishers that never give up, and histories of both. Run as a script with a role.

    publish FOLDER N     until FOLDER/stop is there; N publishes its own keys, each step in its turn, and repeats what is unknown
    work FOLDER N        until SIGTERM
    finish FOLDER N      works until nothing is left, then writes FOLDER/final.json: effects, dead letters
    hoard FOLDER COUNT   so many small events for one group that nobody works for yet
    drain FOLDER COUNT   one worker handles them; FOLDER/drained.json: how often which, memory, seconds

                  ┌─▶ ordered   fails now and then, and on some steps always: retries and dead letters in order
    step.taken ───┼─▶ any       in no order
                  ├─▶ effect    a row in a table of the store
                  └─▶ emitting ─▶ step.echoed ─▶ echo   a row for each step once more, in batches

FOLDER/place.json: {"url": …, "store": …, "start": "now", "rate": EVENTS_A_SECOND, "broken": ""}
"""

import asyncio
import itertools
import json
import logging
import random
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "processes"))

from checker import rows
from history import History

from trilogue import App, Context, Db, Receipt, Retry, TimedOut, derived_id, event
from trilogue.errors import LogError
from trilogue.events import Settlement

KEYS = 8  # of each publisher
BATCH = 10
MOST_BEHIND = 600  # steps of a publisher that wait for the slowest group
PLAIN = {"ordered": True, "any": False, "emitting": True}
LOGGED = (*PLAIN, "effect")
TABLES = {"effects": "effect", "echoes": "echo"}
DRAIN_S = 900
EPOCH_US = 1_800_000_000_000_000


@event("step.taken", key="key")
@dataclass(frozen=True)
class Step:
    key: str
    n: int
    pad: str


@event("step.echoed", key="key")
@dataclass(frozen=True)
class Echo:
    key: str
    n: int


def step(key: str, n: int) -> Step:
    """The step with this number, of 16 bytes to 4 kB."""
    chance = dice(key, n)
    return Step(key, n, f"{chance:08x}" * (2 if chance % 20 else 500))


def dice(key: str, n: int) -> int:
    """What happens to a step is known from its name: the checker knows it, too."""
    return zlib.crc32(f"{key}/{n}".encode())


def is_poison(key: str, n: int) -> bool:
    """Whether the group `ordered` always fails on this step."""
    return dice(key, n) % 211 == 0


def fails_first(key: str, n: int) -> bool:
    """Whether it fails on the first attempt."""
    return dice(key, n) % 53 == 0


# ── handlers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_app(place: dict[str, Any], history: History) -> App:
    """The program; it is the same at every URL."""
    beside = {"store": place["store"]} if place["store"] else {}
    app, start = App(place["url"], name="faults", **beside), place["start"]

    @app.setup
    def tables(db: Db) -> None:
        for table in TABLES:
            db.execute(f"create table if not exists {table} (step_key text not null, n integer not null)")

    @app.on(group="ordered", start=start, retry=Retry(3, "20ms..100ms"))
    async def ordered(e: Step, ctx: Context) -> None:
        with history.handling("ordered", e.key, e.n, corrupt=e != step(e.key, e.n)):
            await asyncio.sleep(dice(e.key, e.n) % 4 / 1_000)
            if is_poison(e.key, e.n) or (ctx.attempt == 1 and fails_first(e.key, e.n)):
                raise ValueError("as it was meant to")

    @app.on(group="any", start=start, order=None)
    async def any_order(e: Step) -> None:
        with history.handling("any", e.key, e.n):
            await asyncio.sleep(dice(e.key, e.n) % 3 / 1_000)

    @app.on(group="effect", start=start)
    def effect(e: Step, db: Db) -> None:
        with history.handling("effect", e.key, e.n):
            db.execute("insert into effects values (?, ?)", (e.key, e.n))

    @app.on(group="emitting", start=start)
    async def emitting(e: Step) -> Echo:
        with history.handling("emitting", e.key, e.n):
            return Echo(e.key, e.n)

    @app.on(group="echo", start=start)
    def echo(es: list[Echo], db: Db) -> None:
        db.executemany("insert into echoes values (?, ?)", [(e.key, e.n) for e in es])

    if place["broken"]:
        BROKEN[place["broken"]](app)
    return app


def acknowledge_early(app: App) -> None:
    """An adapter with a bug, which the checker has to find: what is lent is finished before it is handled."""
    store: Any = app.store
    claim, settle = store.claim, store.settle

    async def early(group: str, **how: Any) -> Any:
        deliveries = await claim(group, **how)
        if group in PLAIN and deliveries:
            await settle(group, [Settlement(delivery, "done") for delivery in deliveries])
        return deliveries

    def late(group: str, answers: Sequence[Any]) -> Awaitable[Any]:
        return nothing() if group in PLAIN else settle(group, answers)

    async def nothing() -> list[Any]:
        return []

    store.claim, store.settle = early, late


BROKEN: dict[str, Callable[[App], None]] = {"acknowledges early": acknowledge_early}


# ── roles ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def publish(folder: Path, place: dict[str, Any], number: str) -> None:
    """Steps of some keys, in order; and of keys that are published once only, so that a wrong `rejected` shows."""
    history, chance = History(folder, "publish"), random.Random(number)
    app = make_app(place, history)
    known = _stored(folder)

    behind = Behind(folder, number)

    async def one_key(key: str) -> None:
        n = known.get(key, -1) + 1
        while not (folder / "stop").exists():
            if behind.steps > MOST_BEHIND:
                await asyncio.sleep(0.2)
                continue
            size = chance.randint(1, BATCH)
            await say(key, n, size)
            await _publish(app, history, f"{key}-once-{n}", 0, 1)
            n += size
            behind.steps += size + 1
            await asyncio.sleep((size + 1) * KEYS / place["rate"])

    async def say(key: str, first: int, size: int) -> None:
        while not await _publish(app, history, key, first, size):
            await asyncio.sleep(0.1)

    async with app:
        watching = asyncio.create_task(behind.watch())
        await asyncio.gather(*(one_key(f"p{number}-{k}") for k in range(KEYS)))
        watching.cancel()


class Behind:
    """How far the slowest group is behind what a publisher has published: on a slow machine it waits, as no fault is that."""

    def __init__(self, folder: Path, number: str) -> None:
        self.steps = 0
        self._folder, self._mark = folder, f'"key": "p{number}-'
        self._read: dict[Path, int] = {}

    async def watch(self) -> None:
        """Take off what was handled since the last look, in the group that writes most."""
        done: Counter[str] = Counter()
        while True:
            for path in self._folder.glob("handle-*.jsonl"):
                text = path.read_bytes()[self._read.get(path, 0) :]
                self._read[path] = self._read.get(path, 0) + len(text)
                done.update(group for group in LOGGED for line in text.decode().splitlines() if _is_of(line, group, self._mark))
            self.steps -= min(done[group] for group in LOGGED)
            done.subtract(dict.fromkeys(LOGGED, min(done[group] for group in LOGGED)))
            await asyncio.sleep(0.5)


def _is_of(line: str, group: str, mark: str) -> bool:
    return mark in line and f'"group": "{group}"' in line


async def _publish(app: App, history: History, key: str, first: int, size: int) -> bool:
    """Publish steps of a key once, each with its own outcome; whether all of them are stored."""
    envelopes = [
        app.envelope(step(key, n), id=derived_id(EPOCH_US, key, n), time_us=EPOCH_US + n) for n in range(first, first + size)
    ]
    history.published(key, first, first + size - 1, "begun")
    outcomes: Sequence[Receipt | LogError]
    try:
        outcomes = await app.store.publish(envelopes)
    except LogError as error:
        outcomes = [error] * size
    for n, outcome in enumerate(outcomes, first):
        history.published(key, n, n, _word(outcome))
    return all(isinstance(outcome, Receipt) for outcome in outcomes)


def _word(outcome: Receipt | LogError) -> str:
    if isinstance(outcome, Receipt):
        return "stored"
    return "unknown" if outcome.stored is None else "rejected"


def _stored(folder: Path) -> dict[str, int]:
    """By key, up to where all steps are known to be stored by an earlier life of a publisher."""
    there: dict[str, set[int]] = {}
    for row in (row for path in folder.glob("publish-*.jsonl") for row in rows(path)):
        if row["outcome"] == "stored":
            there.setdefault(row["key"], set()).update(range(row["from"], row["to"] + 1))
    return {key: next(n for n in itertools.count() if n not in steps) - 1 for key, steps in there.items()}


async def work(folder: Path, place: dict[str, Any], number: str) -> None:
    """Handle until SIGTERM."""
    stop, app = asyncio.Event(), make_app(place, History(folder, "handle"))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with app.running(grace="5s"):
        (folder / f"ready-{number}").touch()
        await stop.wait()


async def finish(folder: Path, place: dict[str, Any], number: str) -> None:
    """Handle what is left, then tell what the store and the dead letters hold."""
    app = make_app(place, History(folder, "handle"))
    async with app.running(grace="5s"):
        is_idle = await _is_finished(app, folder)
        letters = [letter for group in PLAIN for letter in await _all_dead(app, group)]
        effects = {
            group: [list(row) for row in await app.db(f"select step_key, n from {table}")] for table, group in TABLES.items()
        }
    final = {"idle": is_idle, "dead": letters, "effects": effects}
    (folder / "final.json").write_text(json.dumps(final))


async def _is_finished(app: App, folder: Path) -> bool:
    """Wait until nothing is left; False when nothing moves any more and something is left all the same."""
    before: object = None
    while True:
        try:
            await app.wait_idle(timeout="30s")
            return True
        except TimedOut:
            now = [path.stat().st_size for path in folder.glob("handle-*")], await app.db("select count(*) from echoes")
            if now == before:
                return False
            before = now


async def _all_dead(app: App, group: str) -> list[tuple[str, str, int]]:
    found: list[tuple[str, str, int]] = []
    after = 0
    while letters := await app.store.dead(group, after=after):
        for letter in letters:
            data = json.loads(letter.record.data)
            found.append((group, data["key"], data["n"]))
        after = letters[-1].record.position
    return found


# ── a long queue ─────────────────────────────────────────────────────────────────────────────────────────────────────


def waiting_app(place: dict[str, Any], seen: bytearray) -> App:
    """One plain handler that counts. seen: how often each number was handled."""
    app = App(place["url"], name="waiting", **({"store": place["store"]} if place["store"] else {}))

    @app.on(group="waiting", start=place["start"], concurrency=256)
    async def waiting(e: Echo) -> None:
        seen[e.n] = min(seen[e.n] + 1, 255)

    return app


async def hoard(folder: Path, place: dict[str, Any], count: str) -> None:
    """Publish for a group that is declared and has no worker."""
    app = waiting_app(place, bytearray())
    async with app:
        await app.store.bind([each.group for each in app.subscriptions], work=False)
        for first in range(0, int(count), 1_000):
            await app.publish_many([Echo(f"h{n % 256}", n) for n in range(first, min(first + 1_000, int(count)))])


async def drain(folder: Path, place: dict[str, Any], count: str) -> None:
    """Handle all of it, in one process."""
    seen = bytearray(int(count))
    started = time.monotonic()
    async with waiting_app(place, seen).running():
        while 0 in seen and time.monotonic() - started < DRAIN_S:
            await asyncio.sleep(0.2)
    found = {
        "lost": seen.count(0),
        "repeated": len(seen) - seen.count(0) - seen.count(1),
        "seconds": time.monotonic() - started,
        "rss_mb": _peak_mb(),
    }
    (folder / "drained.json").write_text(json.dumps(found))


def _peak_mb() -> int:
    """The most memory this process ever had; ru_maxrss would count what forked it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1_024


def main() -> None:
    role, folder, *rest = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    place = json.loads((Path(folder) / "place.json").read_text())
    asyncio.run(ROLES[role](Path(folder), place, *rest))


ROLES: dict[str, Callable[..., Any]] = {"publish": publish, "work": work, "finish": finish, "hoard": hoard, "drain": drain}

if __name__ == "__main__":
    main()
