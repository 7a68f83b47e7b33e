"""`doctor`: versions, durability and why, leases, disk, integrity, clocks; what is wrong, and how to mend it.

ok     python      3.11.7
ok     log         SQLite 3.53.0, file video.db
WRONG  integrity   row 3 missing from index: …  ──▶ stop all programs, then restore the file from a backup
note   groups      badge: 1,200 records wait and nobody works for it: trilogue run MODULE:APP
"""

import importlib.metadata
import platform
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trilogue.cli.log import DEFAULT_LOG, Json, Log, check_reachable, where, workers
from trilogue.cli.output import redacted, safe, say, say_json
from trilogue.cli.show import size
from trilogue.durations import readable
from trilogue.errors import LogError, Unsupported
from trilogue.events import now_us
from trilogue.ports import Feature, GroupStatus, Query, Store
from trilogue.urls import split

DRIVERS = ("apsw", "msgspec", "psycopg", "pika", "confluent-kafka")
LEAST_FREE_BYTES = 500_000_000
MOST_SKEW_S = 2.0
WIDTH = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. mend: what to do where it is wrong, or worth a thought."""

    verdict: Literal["ok", "note", "WRONG"]
    what: str
    fact: str
    mend: str = ""


async def doctor(*, json: Json = False, log: Log = DEFAULT_LOG) -> int:
    """Examine a log and what it stands on: versions, durability, leases, disk, integrity, clocks.

    Exit code 1 if something is wrong.

        trilogue doctor --url sqlite:///video.db
        trilogue doctor --url amqp://localhost --store postgresql://localhost/app
    """
    findings = [*_versions(), *[finding async for finding in _findings(log)]]
    wrong = [finding for finding in findings if finding.verdict == "WRONG"]
    if json:
        say_json({"wrong": len(wrong), "findings": [asdict(finding) for finding in findings]})
        return int(bool(wrong))
    for finding in findings:
        mend = f"  ──▶ {finding.mend}" if finding.mend else ""
        say(f"{finding.verdict:<6} {finding.what:<{WIDTH}} {safe(redacted(finding.fact + mend))}")
    say(f"\n{len(wrong)} wrong" if wrong else "\nnothing is wrong")
    return int(bool(wrong))


def _versions() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("ok", "trilogue", importlib.metadata.version("trilogue"))
    found = []
    for name in DRIVERS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    yield Finding("ok", "drivers", ", ".join(found))


async def _findings(log: Log) -> AsyncIterator[Finding]:
    """What a log says of itself; that it cannot be opened is a finding, too."""
    store = log.open()
    try:
        check_reachable(store, create=False)
        absent: list[str] = await store.absent() if hasattr(store, "absent") else []
        if absent:
            there = " and ".join(absent)
            yield Finding("note", "log", f"nothing of trilogue is there yet: {there}", "trilogue run MODULE:APP makes it")
            return
        await store.open()
    except (LogError, Unsupported) as error:
        yield Finding("WRONG", "log", str(error))
        return
    try:
        yield Finding("ok", "log", f"{where(store)}: {workers(store)}")
        async for finding in _opened(store):
            yield finding
    finally:
        await store.close()


async def _opened(store: Store) -> AsyncIterator[Finding]:
    beside = getattr(store, "store", None)  # of a broker
    for what, fact in (await store.describe()).items():
        yield _described(what, fact)
    if beside is not None:
        for what, fact in (await beside.describe()).items():
            yield _described(f"store {what}", fact)
    for finding in _disk(str(getattr(beside or store, "path", ""))):
        yield finding
    async for finding in _clocks(store, beside or store):
        yield finding
    if Feature.EFFECTS in store.features:
        yield await _leases(beside or store)
    for group in (await store.status()).groups:
        for finding in _group(group):
            yield finding


def _described(what: str, fact: str) -> Finding:
    if what.endswith("integrity") and fact != "ok":
        return Finding("WRONG", what, fact, "stop all programs that use the file, then restore it from a backup")
    if what == "publishing" and fact.startswith("blocked"):
        return Finding("WRONG", what, fact, "the broker takes nothing: give it memory or disk")
    if what.endswith("durability") and fact.startswith(("memory", "process-crash")):
        return Finding("note", what, fact, "what was confirmed does not survive the loss of power")
    return Finding("ok", what, fact)


def _disk(place: str) -> Iterator[Finding]:
    """How much room the file of a store has; nothing for a server's, which only the server sees."""
    path = Path(place)
    if not path.is_absolute() or not path.exists():
        return
    free = shutil.disk_usage(path.parent).free
    fact = f"{size(free)} free in {path.parent}, {size(path.stat().st_size)} used by {path.name}"
    if free < LEAST_FREE_BYTES:
        yield Finding("WRONG", "disk", fact, f"make room: less than {size(LEAST_FREE_BYTES)} is left")
    else:
        yield Finding("ok", "disk", fact)


async def _clocks(store: Store, database: Store) -> AsyncIterator[Finding]:
    """Against the clock of a database server, and against what the log has recorded."""
    if split(database.url).scheme.startswith("postgres"):
        began = time.time()
        rows = await database.query("select extract(epoch from clock_timestamp())")
        yield _skew(float(rows[0][0]) - (began + time.time()) / 2, "the database server's")
    if Feature.EFFECTS not in store.features:
        return
    newest = await database.read(Query(reverse=True, limit=1))
    ahead_s = (newest[0].recorded_us - now_us()) / 1_000_000 if newest else 0.0
    if ahead_s > 0:
        yield _skew(ahead_s, "what the newest record says")


def _skew(ahead_s: float, whose: str) -> Finding:
    fact = f"this machine's is {readable(abs(ahead_s) * 1_000_000)} {'behind' if ahead_s > 0 else 'ahead of'} {whose}"
    if abs(ahead_s) > MOST_SKEW_S:
        return Finding("WRONG", "clock", fact, "let both machines set their clocks by NTP")
    return Finding("ok", "clock", fact)


async def _leases(database: Store) -> Finding:
    """Members of groups whose lease has passed: their process died, and nobody has taken over."""
    members = await database.transact(lambda tx: tx.execute("select count(*) from trilogue_members"))
    alive = sum(group.workers for group in (await database.status()).groups)
    expired = int(members[0][0]) - alive
    fact = f"{alive} alive, {expired} expired"
    if expired > 0:
        return Finding("note", "leases", fact, "processes have died; the next one that starts takes over at once")
    return Finding("ok", "leases", fact)


def _group(group: GroupStatus) -> Iterator[Finding]:
    """What of a group is worth a thought."""
    remarks = []
    if group.lag and not group.workers and not group.paused and not group.name.startswith("trilogue."):
        remarks.append((f"{group.lag:,} records wait and nobody works for it here", "trilogue run MODULE:APP"))
    if group.paused:
        remarks.append((f"paused, {group.lag:,} records wait", f"trilogue resume {group.name}"))
    if group.dead or group.parked:
        letters = f"{group.dead + group.parked:,} dead letters" + (f", {group.parked:,} of them parked" if group.parked else "")
        remarks.append((letters, f"trilogue dead list --group {group.name}"))
    for fact, mend in remarks:
        yield Finding("note", "group", f"{group.name}: {fact}", mend)
