"""One run: publishers and workers at one place, what is done to them, and what became of it.

open ─▶ warm up ─▶ the fault, once or several times ─▶ everybody works again? ─▶ quiet ─▶ drain ─▶ judge
"""

import contextlib
import json
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from checker import History, Verdict, check, load, rows
from crew import Crew, until
from places import LEASE_S, SESSION_S, Site, broker_of, database_of
from workload import PLAIN, TABLES, is_poison

WORKLOAD = Path(__file__).with_name("workload.py")
RATE = 150  # events a second and publisher
WARM = 150  # handlings of each group before the fault
RECOVERY_S = 60.0  # after which a consumer that does not come back is given up
AFTER_S = 2.0  # of work after everybody is back
GROUPS = (*PLAIN, *TABLES)
# How much of a group may be out at a worker: prefetch, in_flight, a claim.
UNDER_WAY = {"rabbitmq": 256, "kafka": 2_000, None: 1_000}


@dataclass
class Scene:
    """A run that goes on. chance: of the seed. recoveries: seconds from each healing until everybody worked again."""

    site: Site
    name: str
    folder: Path
    place: dict[str, Any]
    chance: random.Random
    crew: Crew
    workers: int = 2
    publishers: int = 2
    recoveries: list[float] = field(default_factory=list)
    excused_until: int = 0
    silent: list[str] = field(default_factory=list)

    @property
    def broker(self) -> str | None:
        return broker_of(self.name)

    @property
    def database(self) -> str | None:
        return database_of(self.name)

    # ── the load ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """Workers, then publishers; returns when every group has work."""
        for n in range(self.workers):
            self.start_worker(n)
        for n in range(self.publishers):
            self.crew.start("publish", str(n))
        until(lambda: min(self.handled().values()) > WARM, f"every group works ({self.name})")

    def start_worker(self, n: int) -> None:
        """Start a worker and wait until it has joined."""
        ready = self.folder / f"ready-{n}"
        ready.unlink(missing_ok=True)
        process = self.crew.start("work", str(n))
        until(lambda: ready.exists() or process.poll() is not None, f"worker {n} joins ({self.name})")
        assert process.poll() is None, self.crew.log("work")[-3_000:]

    def handled(self) -> dict[str, int]:
        """How many runs each logged group has begun."""
        text = b"".join(path.read_bytes() for path in self.folder.glob("handle-*.jsonl"))
        return {group: text.count(f'"group": "{group}"'.encode()) for group in (*PLAIN, "effect")}

    def worker_pids(self) -> list[int]:
        """The workers that run."""
        return [self.crew.running[args].pid for args in self.crew.alive("work")]

    # ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def interruption(self, *pids: int) -> Iterator[None]:
        """Around a fault: from here on repetitions have a cause, until what follows from it is over."""
        at = time.monotonic_ns()
        try:
            yield
        finally:
            settled_s = {"kafka": SESSION_S, None: LEASE_S}.get(self.broker, 0.0) + 2.0
            self.crew.interrupted(at, *pids, settled_s=settled_s)

    def sleep(self, low: float, high: float) -> None:
        """Let some time pass, of the seed's choice."""
        time.sleep(self.chance.uniform(low, high))

    def healed(self) -> None:
        """The fault is over: wait until every group and every publisher has worked again, and note how long that took."""
        at = time.monotonic_ns()
        while silent := self._silent(at):
            if time.monotonic_ns() - at > RECOVERY_S * 1e9:
                self.silent += silent
                break
            time.sleep(0.1)
        self.recoveries.append((time.monotonic_ns() - at) / 1e9)

    def _silent(self, since: int) -> list[str]:
        """Who has done nothing since a time: groups, workers (in the group any of them may serve), publishers."""
        runs = [row for path in self.folder.glob("handle-*.jsonl") for row in rows(path) if "key" in row and row["at"] > since]
        groups = {row["group"] for row in runs}
        active = {
            int(path.stem.rpartition("-")[2])
            for path in self.folder.glob("handle-*.jsonl")
            if any("key" in row and row["at"] > since and row["group"] == "any" for row in rows(path))
        }
        publishing = {
            int(path.stem.rpartition("-")[2])
            for path in self.folder.glob("publish-*.jsonl")
            if any(row["outcome"] == "stored" and row["at"] > since for row in rows(path))
        }
        publishers = {self.crew.running[args].pid for args in self.crew.alive("publish")}
        return [
            *(f"group {group}" for group in sorted({*PLAIN, "effect"} - groups)),
            *(f"worker {pid}" for pid in sorted(set(self.worker_pids()) - active)),
            *(f"publisher {pid}" for pid in sorted(publishers - publishing)),
        ]

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def end(self) -> list[str]:
        """Let everybody end in the way they like, and a fresh worker finish what is left; what went wrong with that."""
        time.sleep(AFTER_S)
        (self.folder / "stop").touch()
        wrong = [self._ended(args, None) for args in self.crew.alive("publish")]
        wrong += [self._ended(args, signal.SIGTERM) for args in self.crew.alive("work")]
        finishing = self.crew.start("finish", "0")
        try:
            code = finishing.wait(120)
        except Exception:
            code = None
        wrong.append("" if code == 0 else f"finish: exit {code}")
        return [sentence for sentence in wrong if sentence]

    def _ended(self, args: tuple[str, ...], number: int | None) -> str:
        process = self.crew.running[args]
        if number is not None:
            process.send_signal(number)
        try:
            code = process.wait(60)
        except Exception:
            self.crew.kill(args)
            return f"{args[0]} does not end"
        del self.crew.running[args]
        return "" if code == 0 else f"{args[0]}: exit {code}"

    def history(self) -> History:
        """Everything that is known, to be judged."""
        history = load(self.folder)
        final = next(rows(self.folder / "final.json"), {"effects": {}, "dead": [], "idle": False})
        history.groups, history.tables = PLAIN, ("effect",)
        history.effects = {name: [(key, n) for key, n in final["effects"].get(name, ())] for name in TABLES.values()}
        history.poison = {"ordered": {step for step in history.begun if is_poison(*step)}}
        for group, key, n in final["dead"]:
            history.dead.setdefault(group, []).append((key, n))
        history.excused_until = self.excused_until
        published_again = sum((history.begun - history.rejected).values()) - len(history.begun - history.rejected)
        hits = sum(len(i.pids or self.worker_pids() or range(self.workers)) for i in history.interruptions)
        history.bound = len(PLAIN) * (hits * UNDER_WAY[self.broker] + published_again)
        return history

    def leaks(self) -> list[str]:
        """Logs in which a password stands."""
        secrets = {urlsplit(self.place[name]).password for name in ("url", "store") if self.place[name]} - {None}
        return [path.name for path in self.folder.glob("*.log") if any(secret in path.read_text() for secret in secrets)]


@dataclass(frozen=True)
class Result:
    """What a run showed. trouble: processes that did not come back or did not end well, passwords in logs."""

    fault: str
    name: str
    stored: int
    unknown: int
    verdict: Verdict
    bound: int
    recovery_s: float | None
    trouble: list[str]
    rss_mb: int

    @property
    def is_clean(self) -> bool:
        return self.verdict.is_clean and not self.trouble


@contextlib.contextmanager
def scene(site: Site, name: str, folder: Path, seed: str, *, proxied: bool = False, **more: Any) -> Iterator[Scene]:
    """A place with nobody in it yet; at the end nobody is left. more: for the workload, beside the URLs."""
    folder.mkdir(parents=True, exist_ok=True)
    with site.place(name, folder, proxied=proxied) as place:
        place = {**place, "rate": RATE, "broken": "", **more}
        (folder / "place.json").write_text(json.dumps(place))
        crew = Crew(folder, WORKLOAD)
        try:
            yield Scene(site, name, folder, place, random.Random(seed), crew)
        finally:
            crew.end()


def judged(scene: Scene, fault: str, trouble: list[str]) -> Result:
    """The result of a run that has ended."""
    history = scene.history()
    trouble = [*trouble, *(f"{who} did not come back" for who in scene.silent), *(f"password in {log}" for log in scene.leaks())]
    return Result(
        fault=fault,
        name=scene.name,
        stored=len(history.stored),
        unknown=sum(history.unknown.values()),
        verdict=check(history),
        bound=history.bound or 0,
        recovery_s=max(scene.recoveries, default=None),
        trouble=trouble,
        rss_mb=0,
    )
