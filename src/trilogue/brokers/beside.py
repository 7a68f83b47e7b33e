"""What the store beside a broker does alone: timers, dead letters, tables, states, streams. The counterpart is refused.py.

schedule, publish_in, transact ──▶ STORE's log ──relay──▶ BROKER
dead, held, query, state, timers … ◀── STORE
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from trilogue.events import Envelope, Record
from trilogue.ports import DeadLetter, InboxStore, Kind, Rows, Scheduled, State, Transaction

T = TypeVar("T")


class Beside:
    """The verbs of a Store that only concern the store beside the broker."""

    store: InboxStore

    async def schedule(self, envelopes: Sequence[Envelope], due_us: int) -> None:
        """Put envelopes on the store's log at that time, from where they are relayed."""
        await self.store.schedule(envelopes, due_us)

    async def publish_in(self, tx: object, envelopes: Sequence[Envelope], due_us: int | None = None) -> None:
        """Put envelopes on the store's log with the commit of the user's own transaction, from where they are relayed."""
        await self.store.publish_in(tx, envelopes, due_us)

    async def cancel(self, event_id: str) -> bool:
        """Remove a timer."""
        return await self.store.cancel(event_id)

    async def dead(self, group: str | None, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        """Dead letters of a group or of all; their positions are those of the store."""
        return await self.store.dead(group, after=after, limit=limit)

    async def held(self, *, after: int = 0, limit: int = 1_000) -> list[Record]:
        """Records that some group holds."""
        return await self.store.held(after=after, limit=limit)

    async def drop_dead(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Forget dead letters."""
        return await self.store.drop_dead(group, positions)

    async def trim(
        self, *, older_than_us: int | None = None, keep: int | None = None, force: bool = False, streams: bool = False
    ) -> int:
        """Remove old records from the store's log; the broker has its own retention."""
        return await self.store.trim(older_than_us=older_than_us, keep=keep, force=force, streams=streams)

    async def query(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        """Read the user's own tables."""
        return await self.store.query(sql, values)

    async def transact(self, work: Callable[[Transaction], T], *, rows: int = 1_000, limit_us: int | None = None) -> T:
        """Run `work` in a transaction of the store; what it appends is relayed."""
        return await self.store.transact(work, rows=rows, limit_us=limit_us)

    async def state(self, owner: str, id: str) -> bytes | None:
        """What an owner keeps under one id."""
        return await self.store.state(owner, id)

    async def states(self, owner: str, *, after: str = "", limit: int = 1_000) -> list[State]:
        """What an owner keeps, by id."""
        return await self.store.states(owner, after=after, limit=limit)

    async def kinds(self) -> list[Kind]:
        """What the store's log ever accepted."""
        return await self.store.kinds()

    async def timers(self, *, after: str = "", limit: int = 1_000) -> list[Scheduled]:
        """What is scheduled."""
        return await self.store.timers(after=after, limit=limit)

    async def stream_version(self, stream: str) -> int:
        """The version of a stream."""
        return await self.store.stream_version(stream)

    async def close_stream(self, stream: str, reason: str) -> int:
        """Let nothing be appended to a stream any more."""
        return await self.store.close_stream(stream, reason)

    async def truncate_stream(self, stream: str, before: int) -> None:
        """Hide the records of a stream below a version."""
        await self.store.truncate_stream(stream, before)

    async def rewrite(self) -> bool:
        """Write the store's files anew."""
        return await self.store.rewrite()
