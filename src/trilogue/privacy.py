"""Erasing a person: the key goes, and everything sealed with it is bytes nobody can read.

    1  the key is destroyed            nothing sealed for them opens any more, here or in any copy or backup of the log
    2  the fact goes onto the log      trilogue.subject.erased {"subject", "reason", "erased_at"}: read models forget them
    3  sealed snapshots go             they are made again without them
    4  who reads the fact is awaited
    5  the files are written anew      what read models deleted leaves no bytes behind

The key goes first: whatever happens next, their data is gone, and doing it all again completes it.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import msgspec

from trilogue.durations import Duration, seconds
from trilogue.errors import BadOption, HandlerFailed
from trilogue.events import Envelope, as_datetime, audit, derived_id
from trilogue.patterns import matches_any
from trilogue.ports import Store, Transaction
from trilogue.rehydrate import OWNER
from trilogue.stores.keys import MEMORY, STATE_PREFIX, Destroyed, Keyring
from trilogue.stores.store import SqlStore

ERASED_TYPE = "trilogue.subject.erased"
REASON_CHARS = 1_000
PAGE = 1_000
LOOK_S = 0.05


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
    """Where the keys of a store are: FILE-keys beside its file, or in memory as the store itself is."""
    return f"{store.path}-keys" if isinstance(store, SqlStore) and not store.in_memory else MEMORY


async def erase(
    store: Store, keys: Keyring, subject: str, *, reason: str, source: str = "trilogue", timeout: Duration = "10s"
) -> ErasureReceipt:
    """Erase a person: destroy their key, tell everybody, leave no bytes behind. Repeating it completes what was interrupted.

    subject: as the field `subject=` of the events names them. reason: stored as it is, so without personal data. timeout: how
    long to wait for the groups that read the fact.
    Raises BadOption, Rejected if nothing was ever sealed for them.
    """
    wait_s = seconds(timeout)
    if not isinstance(reason, str) or not 0 < len(reason) <= REASON_CHARS:
        raise BadOption(f"reason={reason!r}: expected why they are erased, in 1 to {REASON_CHARS:,} characters")
    destroyed = await asyncio.to_thread(keys.destroy, subject, reason)
    fact = _fact(destroyed, source)
    position = (await store.append([fact]))[0]
    dropped = await _drop_sealed_states(store)
    finished, waiting = await _wait_for_readers(store, position, wait_s)
    is_clean = await store.rewrite()
    done = [
        f"the key was destroyed {as_datetime(destroyed.erased_us):%Y-%m-%d %H:%M:%S} UTC",
        f"the fact is at position {position} of the log",
        f"{dropped} snapshots that may have held their data were removed",
        *(f"{name} has read the fact" for name in finished),
    ]
    if is_clean:
        done.append("the files hold no bytes of what was deleted")
    else:
        waiting.append("a reader keeps old pages in the write-ahead log: end it (a backup, a sqlite3 shell), then erase again")
    return ErasureReceipt(
        subject, destroyed.erased_us, destroyed.reason, position, fact.id, destroyed.is_repeated, tuple(done), tuple(waiting)
    )


def _fact(destroyed: Destroyed, source: str) -> Envelope:
    """The same envelope each time, so that it is stored once."""
    at = as_datetime(destroyed.erased_us).isoformat()
    return Envelope(
        id=derived_id(destroyed.erased_us, ERASED_TYPE, destroyed.subject),
        type=ERASED_TYPE,
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


async def _wait_for_readers(store: Store, position: int, wait_s: float) -> tuple[list[str], list[str]]:
    """The groups that have read the fact; and for each that has not, a sentence."""
    groups = {group.name: group for group in (await store.status()).groups if matches_any(group.patterns, ERASED_TYPE)}
    finished: list[str] = []
    waiting: list[str] = []
    until = monotonic() + wait_s
    for name, group in groups.items():
        try:
            while not await store.handled(name, position) and group.workers and monotonic() < until:
                await store.changed(LOOK_S)
            if await store.handled(name, position):
                finished.append(name)
            elif group.workers:
                waiting.append(f"{name} is still behind: erase again when it has caught up")
            else:
                waiting.append(f"{name} has not read the fact, because nobody works for it: run it, then erase again")
        except HandlerFailed:
            waiting.append(f"{name} failed to handle the fact: see `trilogue dead list --group {name}`, then erase again")
    return finished, waiting
