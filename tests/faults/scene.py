"""One run: publishers and workers at one place, what is done to them, and what became of it.

open ─▶ warm up ─▶ the fault, once or several times ─▶ everybody works again? ─▶ calm ─▶ drain ─▶ judge
"""

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from checker import History, check, load, rows
from confluent_kafka import ConsumerGroupState, KafkaException
from confluent_kafka.admin import AdminClient
from crew import Crew, until
from places import IN_FLIGHT, LEASE_S, SESSION_S, Site, broker_of, database_of
from workload import PLAIN, TABLES, is_poison

from trilogue.brokers.kafka.member import SPILL

WORKLOAD = Path(__file__).with_name("workload.py")
RATE = 150  # events a second and publisher
WARM = 150  # handlings of each group before the fault
RECOVERY_S = 60.0  # after which a consumer that does not come back is given up
AFTER_S = 2.0  # of work after everybody is back
GROUPS = (*PLAIN, *TABLES)
# How much of a group may be out at a worker: prefetch; in_flight and what it takes while it is full; a claim.
UNDER_WAY = {"rabbitmq": IN_FLIGHT, "kafka": IN_FLIGHT + SPILL, None: 1_000}


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
    calm_at: int = 0
    silent: list[str] = field(default_factory=list)
    was_idle: bool = True

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
            # On Kafka what happens to one member moves partitions of the others, too.
            self.crew.interrupted(at, *(() if self.broker == "kafka" else pids), settled_s=settled_s)

    def sleep(self, low: float, high: float) -> None:
        """Let some time pass, of the seed's choice."""
        time.sleep(self.chance.uniform(low, high))

    def healed(self) -> None:
        """The fault is over: wait until every group, worker and publisher has worked again, and note how long that took."""
        at, before = time.monotonic_ns(), {path: path.stat().st_size for path in self.folder.glob("*-*.jsonl")}
        told_s = 10.0
        while silent := self._silent(before):
            if time.monotonic_ns() - at > told_s * 1e9:
                print(f"{told_s:.0f} s after the fault, not back: {', '.join(silent)}", flush=True)
                told_s += 5
            if time.monotonic_ns() - at > RECOVERY_S * 1e9:
                self.silent += silent
                break
            time.sleep(0.1)
        self.recoveries.append((time.monotonic_ns() - at) / 1e9)

    def _silent(self, before: dict[Path, int]) -> list[str]:
        """Who has done nothing since the histories were so long: groups, publishers, workers (in the group anybody serves)."""
        said = {path: path.read_bytes()[before.get(path, 0) :].decode() for path in self.folder.glob("*-*.jsonl")}
        everything = "".join(said.values())
        busy = {
            int(path.stem.rpartition("-")[2])
            for path, text in said.items()
            if '"group": "any"' in text or '"outcome": "stored"' in text
        }
        alive = {args: self.crew.running[args].pid for role in ("work", "publish") for args in self.crew.alive(role)}
        return [
            *(f"group {group}" for group in (*PLAIN, "effect") if f'"group": "{group}"' not in everything),
            *(f"{role} {n}" for (role, n), pid in alive.items() if pid not in busy),
        ]

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def end(self) -> list[str]:
        """Let everybody end in the way they like, and a fresh worker finish what is left; what went wrong with that."""
        time.sleep(AFTER_S)
        if self.broker == "kafka":
            self._wait_for_calm()
        (self.folder / "stop").touch()
        wrong = [self._ended(args, None) for args in self.crew.alive("publish")]
        wrong += [self._ended(args, signal.SIGTERM) for args in self.crew.alive("work")]
        finishing = self.crew.start("finish", "0")
        try:
            wrong.append("" if finishing.wait(400) == 0 else f"finish: exit {finishing.returncode}")
        except subprocess.TimeoutExpired:
            wrong.append("finish does not end")
        return [sentence for sentence in wrong if sentence]

    def _wait_for_calm(self) -> None:
        """Kafka gives up a member that was cut off when its session ends, and assigns anew: that is the fault's doing, too."""
        last = max((row["until"] for row in rows(self.folder / "interruptions.jsonl")), default=0)
        time.sleep(max(0.0, (last - time.monotonic_ns()) / 1e9))
        prefix = dict(parse_qsl(urlsplit(self.place["url"]).query))["prefix"]
        admin = AdminClient({"bootstrap.servers": urlsplit(self.site.services["kafka"]["url"]).netloc})

        def is_calm() -> bool:
            try:
                there = admin.list_consumer_groups().result().valid
                names = [group.group_id for group in there if group.group_id.startswith(prefix)]
                found = admin.describe_consumer_groups(names).values() if names else ()
                return all(each.result().state == ConsumerGroupState.STABLE for each in found)
            except KafkaException:  # the coordinator of a group is not there yet
                return False

        until(is_calm, f"the groups have all been assigned ({self.name})")
        self.calm_at = time.monotonic_ns()

    def _ended(self, args: tuple[str, ...], number: int | None) -> str:
        process = self.crew.running[args]
        if number is not None:
            process.send_signal(number)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            self.crew.kill(args)
            return f"{args[0]} does not end"
        del self.crew.running[args]
        return "" if code == 0 else f"{args[0]}: exit {code}"

    def history(self) -> History:
        """Everything that is known, to be judged."""
        history = load(self.folder)
        final = next(rows(self.folder / "final.json"), {"effects": {}, "dead": [], "idle": False})
        self.was_idle = final["idle"]
        history.interruptions = [replace(each, until=max(each.until, self.calm_at)) for each in history.interruptions]
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
    """What a run showed. repeated, bound: handlings more than once, and how many of them the fault explains at most.

    recovery_s: the longest time from the end of a fault until everybody worked again. trouble: sentences, findings by name.
    """

    fault: str
    name: str
    stored: int = 0
    unknown: int = 0
    lost: int = 0
    phantom: int = 0
    repeated: int = 0
    bound: int = 0
    disorder: int = 0
    effects: int = 0
    recovery_s: float | None = None
    rss_mb: int | None = None
    trouble: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        return not self.trouble


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


def judged(s: Scene, fault: str, trouble: list[str]) -> Result:
    """The result of a run that has ended."""
    history = s.history()
    verdict = check(history)
    return Result(
        fault=fault,
        name=s.name,
        stored=len(history.stored),
        unknown=sum(history.unknown.values()),
        lost=verdict.count("lost", "acknowledged unfinished", "dead letter lost"),
        phantom=verdict.count("phantom", "rejected and there", "corrupt"),
        repeated=sum(verdict.repeated.values()),
        bound=history.bound or 0,
        disorder=verdict.count("reordered", "skipped after a failure", "concurrent"),
        effects=verdict.count("effect missing", "effect twice"),
        recovery_s=max(s.recoveries, default=None),
        trouble=(
            *trouble,
            *([] if s.was_idle else ["the end was not told: wait_idle() timed out"]),
            *(f"{who} did not come back within {RECOVERY_S:.0f} s" for who in s.silent),
            *(f"{log} shows a password" for log in s.leaks()),
            *(f"{name}: {count}, as {some}" for name, (count, some) in verdict.summary().items()),
        ),
    )
