"""Erasing a person: the key goes, and everything sealed with it is bytes nobody can read.

    1  the key is destroyed            nothing sealed for them opens any more, here or in any copy or backup of the log
    2  the fact goes onto the log      trilogue.subject.erased {"subject", "reason", "erased_at"}: read models forget them
    3  sealed snapshots go             they are made again without them
    4  who reads the fact is awaited
    5  the files are written anew      what read models deleted leaves no bytes behind

The key goes first: whatever happens next, their data is gone, and doing it all again completes it.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import msgspec

from trilogue import builds
from trilogue.durations import Duration, seconds
from trilogue.errors import BadOption, HandlerFailed
from trilogue.events import Envelope, as_datetime, audit, derived_id
from trilogue.patterns import matches_any
from trilogue.ports import GroupStatus, Store, Transaction
from trilogue.projection import ERASED
from trilogue.rehydrate import OWNER
from trilogue.stores.keys import MEMORY, NOWHERE, STATE_PREFIX, Destroyed, Keyring
from trilogue.stores.sqlite_store import SqliteStore

KEYS_VARIABLE = "TRILOGUE_KEYS"
REASON_CHARS = 1_000
PAGE = 1_000
LOOK_S = 0.05
NOBODY_S = 2.0


@dataclass(frozen=True, slots=True)
class ErasureReceipt:
    """What was done to erase a person, as proof to keep.

    erased_us: when the key was destroyed. reason: as given the first time. position, id: of the fact on the log.
    is_repeated: the key was destroyed before. done: what has been done. open: what has not, and how to mend it; empty when
    the erasure is complete.
    """

    subject: str
    erased_us: int
    reason: str
    position: int
    id: str
    is_repeated: bool
    done: tuple[str, ...]
    open: tuple[str, ...]


def keys_path(store: Store) -> str:
    """Where the keys of a log are: FILE-keys beside the file of its store, in memory as that is, or where it was said."""
    behind = getattr(store, "store", store)  # beside a broker
    if isinstance(behind, SqliteStore):
        return MEMORY if behind.in_memory else f"{behind.path}-keys"
    return getattr(behind, "keys_path", None) or os.environ.get(KEYS_VARIABLE) or NOWHERE


async def erase(
    store: Store, keys: Keyring, subject: str, *, reason: str, source: str = "trilogue", timeout: Duration = "10s"
) -> ErasureReceipt:
    """Erase a person: destroy their key, tell everybody, leave no bytes behind. Repeating it completes what was interrupted.

    subject: as the field `subject=` of the events names them. reason: stored as it is, so without personal data. timeout: how
    long to wait for the groups that read the fact.
    Raises BadOption, Rejected if nothing was ever sealed for them.
    """
    until = monotonic() + seconds(timeout)
    if not isinstance(reason, str) or not 0 < len(reason) <= REASON_CHARS:
        raise BadOption(f"reason={reason!r}: expected why they are erased, in 1 to {REASON_CHARS:,} characters")
    destroyed = await asyncio.to_thread(keys.destroy, subject, reason)
    fact = _fact(destroyed, source)
    position = (await store.append([fact]))[0]
    dropped = await _drop_sealed_states(store)
    waiting = await _wait_for_builds(store, position, until)
    finished, behind = await _wait_for_groups(store, position, until)
    waiting += behind
    if not await store.rewrite():
        waiting.append("a reader keeps old pages of the file: end it (a backup, a sqlite3 shell)")
    return ErasureReceipt(
        subject,
        destroyed.erased_us,
        destroyed.reason,
        position,
        fact.id,
        destroyed.is_repeated,
        _done(destroyed, position, dropped, finished),
        tuple(f"{sentence}; then erase again" for sentence in waiting),
    )


def _done(destroyed: Destroyed, position: int, dropped: int, finished: Sequence[str]) -> tuple[str, ...]:
    return (
        f"the key was destroyed at {as_datetime(destroyed.erased_us):%Y-%m-%d %H:%M:%S} UTC",
        f"the fact is at position {position} of the log",
        f"sealed snapshots removed: {dropped}",
        *(f"{name} has read the fact" for name in finished),
    )


def _fact(destroyed: Destroyed, source: str) -> Envelope:
    """The same envelope each time, so that it is stored once."""
    at = as_datetime(destroyed.erased_us).isoformat()
    return Envelope(
        id=derived_id(destroyed.erased_us, ERASED, destroyed.subject),
        type=ERASED,
        data=msgspec.json.encode({"subject": destroyed.subject, "reason": destroyed.reason, "erased_at": at}),
        key=destroyed.subject,
        source=source,
        time_us=destroyed.erased_us,
        extensions=audit(),
    )


async def _drop_sealed_states(store: Store) -> int:
    """Remove snapshots that cannot be opened any more; returns how many."""
    after, count = "", 0
    while states := await store.states(OWNER, after=after, limit=PAGE):
        after = states[-1].id
        sealed = [state.id for state in states if state.body.startswith(STATE_PREFIX)]

        def remove(tx: Transaction, ids: Sequence[str] = sealed) -> None:
            for id in ids:
                tx.set_state(OWNER, id, None)

        if sealed:
            await store.transact(remove, rows=len(sealed))
        count += len(sealed)
    return count


async def _wait_for_builds(store: Store, position: int, until: float) -> list[str]:
    """For each build of a projection that holds personal data and has not read the fact, a sentence."""
    waiting = await _builds_behind(store, position)
    while any(can_wait for _, can_wait in waiting) and monotonic() < until:
        await store.changed(LOOK_S)
        await asyncio.sleep(LOOK_S)
        waiting = await _builds_behind(store, position)
    return [sentence for sentence, _ in waiting]


async def _builds_behind(store: Store, position: int) -> list[tuple[str, bool]]:
    behind: list[tuple[str, bool]] = []
    for state in await store.states(builds.OWNER):
        row, name = builds.row_of(state), state.id
        if any(ERASED in build.types for build in row.old):
            behind.append(
                (f"projection {name} keeps its old build, which is told nothing: `trilogue projections drop {name}`", False)
            )
        if row.next is not None and ERASED in row.next.types and row.next.position < position:
            stands = row.paused or row.next.state == "failed"
            behind.append((f"projection {name} is being built and not yet there: see `trilogue projections list`", not stands))
    return behind


async def _wait_for_groups(store: Store, position: int, until: float) -> tuple[list[str], list[str]]:
    """The groups that have read the fact; and for each that has not, a sentence."""
    groups = [group for group in (await store.status()).groups if matches_any(group.patterns, ERASED)]
    finished: list[str] = []
    waiting: list[str] = []
    for group in groups:
        try:
            if await _has_read(store, group, position, until):
                finished.append(group.name)
            elif group.workers:
                waiting.append(f"{group.name} is still behind")
            else:
                waiting.append(f"{group.name} has not read the fact, because nobody works for it: run it")
        except HandlerFailed:
            waiting.append(f"{group.name} failed to handle the fact: see `trilogue dead list --group {group.name}`")
    return finished, waiting


async def _has_read(store: Store, group: GroupStatus, position: int, until: float) -> bool:
    if not group.workers:  # of a projection that has just switched, one is about to come
        until = min(until, monotonic() + NOBODY_S)
    while not await store.handled(group.name, position):
        if monotonic() > until:
            return False
        await store.changed(LOOK_S)
    return True
