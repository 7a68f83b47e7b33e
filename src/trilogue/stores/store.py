"""The Store port on SQL: each verb handed to the part that does it.

    append, read, timers  ──▶ log.py, timers.py, retention.py       bind, claim, settle  ──▶ worker.py
    seek, pause, drop     ──▶ groups.py                              dead, redrive        ──▶ dead.py
    status, handled, idle ──▶ status.py                              query, transact      ──▶ database.py, userdb.py

every 5 ms: has anybody committed? is a timer due?  every lease/3: report for work, slots move
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from trilogue.errors import LogError, TrilogueError, Unavailable, Unsupported
from trilogue.events import (
    Delivery,
    Durability,
    Envelope,
    Group,
    InTransaction,
    Receipt,
    Record,
    Settlement,
    now_us,
)
from trilogue.gate import NEVER_US
from trilogue.ports import (
    ANY_VERSION,
    Db,
    DeadLetter,
    Feature,
    Kind,
    Query,
    Rows,
    Scheduled,
    SeekTo,
    State,
    Status,
    Transaction,
)
from trilogue.ports import Inbox as InboxPort
from trilogue.stores import append, dead, groups, log, retention, status, streams, timers
from trilogue.stores.database import Database
from trilogue.stores.dialect import Sql, alone
from trilogue.stores.inbox import Inbox
from trilogue.stores.transaction import whole
from trilogue.stores.worker import Worker
from trilogue.stores.writer import resolve

T = TypeVar("T")
INLINE_RECORDS = 200
POLL_S = 0.005
WATCH_BACKOFF_S = 1.0

logger = logging.getLogger("trilogue")


class SqlStore:
    """A Store on SQL; a subclass says on which database."""

    durability: Durability
    inbox: InboxPort
    takes_nul = True

    def __init__(
        self,
        url: str,
        features: frozenset[Feature],
        *,
        lease_s: float = 10.0,
        payload_bytes: int = append.PAYLOAD_BYTES,
    ) -> None:
        self.url = url
        self.features = features
        self.lease_us = round(lease_s * 1_000_000)
        self.payload_bytes = payload_bytes
        self._appends: list[tuple[append.Append, asyncio.Future[list[int]]]] = []
        self._next_timer_us: int | None = None
        self._is_open = False

    # ── open and close ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Connect, create or check the schema."""
        if self._is_open:
            raise Unavailable(f"{self.url} is open already: one open store per App")
        self._db = await self._connect()
        self.durability = self._db.durability
        self._version = await self._db.version()
        self._next_timer_us = await self._db.glance(lambda sql, _: timers.next_us(sql))
        self._worker = Worker(self._db, lease_us=self.lease_us, payload_bytes=self.payload_bytes)
        self.inbox = Inbox(self._db, self._worker.effects, lambda: self._worker.wake_all(), lambda: self._worker.attend())
        self._attend_at = 0.0
        self._watching = asyncio.create_task(self._watch(), name="trilogue watch")
        self._is_open = True

    async def _connect(self) -> Database:
        raise NotImplementedError

    async def close(self) -> None:
        """Give back every slot and let go."""
        if not self._is_open:
            return
        self._is_open = False
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        self._db.is_open = False
        await self._worker.leave()
        await self._db.close()

    def _opened(self) -> Database:
        if not self._is_open:
            raise Unavailable(f"{self.url} is not open: use it inside `async with app:`")
        self._db.check_open()
        return self._db

    async def _write(self, run: Callable[[Sql], Any], *, rows: int = 1) -> Any:
        result = await self._opened().write(run, rows=rows)
        self._worker.wake_all()
        return result

    # ── append and read ────────────────────────────────────────────────────────────────────────────────────────────────

    async def append(self, envelopes: Sequence[Envelope], *, expected: tuple[str, int] | None = None) -> list[int]:
        """Put envelopes on the log: all or none, in this order, durable on return."""
        self._opened()
        for envelope in envelopes:
            append.check_envelope(envelope, self.payload_bytes, takes_nul=self.takes_nul)
        stream, version = expected or (None, ANY_VERSION)
        if stream is not None:
            append.check_stream(stream)
        # Publishes of one turn of the loop become one statement: a savepoint each would cost as much as the insert.
        if not self._appends:
            self._db.writer.merge(self._append_all)
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._appends.append((append.Append(envelopes, stream, version), future))
        return await future

    def _append_all(self) -> None:
        appends, self._appends = self._appends, []
        batches = [each for each, _ in appends]

        def finish(outcomes: Any, error: Exception | None) -> None:
            for n, (_, future) in enumerate(appends):
                resolve(future, error or outcomes[n])
            self._worker.wake_all()

        types, whole_append = self._db.writer_types, self._db.sql.dialect.append_at_once
        try:
            self._db.writer.post(
                lambda sql: append.append_all(sql, types, batches, now_us()),
                finish,
                rows=sum(len(each.envelopes) for each in batches),
                broke=types.forget,
                is_append=True,
                at_once=whole_append and (lambda sql: whole_append(sql, types, batches, now_us())),
            )
        except TrilogueError as error:
            finish(None, error)

    async def publish(self, envelopes: Sequence[Envelope]) -> list[Receipt | LogError]:
        """Put envelopes on the log, all or none."""
        positions = await self.append(envelopes)
        durability = self.durability
        return [Receipt(e.id, position, durability) for e, position in zip(envelopes, positions, strict=True)]

    async def read(self, query: Query) -> list[Record]:
        """One page of records."""
        db = self._opened()
        if query.limit <= INLINE_RECORDS and _is_short(query):
            return await db.glance(lambda sql, types: log.read(sql, types, query))
        return await db.look(lambda sql, types: log.read(sql, types, query))

    # ── noticing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def changed(self, wait_s: float) -> None:
        """Return when something may have changed, at the latest after `wait_s`."""
        changed = self._worker.changed
        changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await changed.wait()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            for step in (self._notice, self._fire_due, self._attend_due):
                try:
                    await step()
                except Exception as error:  # whatever it is: a worker that stops looking says nothing ever after
                    logger.warning("%s: looking after the log failed, trying again: %s", self.url, error)
                    await asyncio.sleep(WATCH_BACKOFF_S)

    async def _notice(self) -> None:
        version = await self._db.version()
        if version.rest != self._version.rest:
            await self._look_again()
        elif version != self._version:
            self._worker.wake_all()
        self._version = version

    async def _fire_due(self) -> None:
        if self._next_timer_us is not None and self._next_timer_us <= now_us() and self._fires:
            await self._fire()

    @property
    def _fires(self) -> bool:
        """Whether timers are looked after here."""
        return self._worker.works

    async def _attend_due(self) -> None:
        worker = self._worker
        if worker.works and (worker.attend_now.is_set() or time.monotonic() >= self._attend_at):
            worker.attend_now.clear()
            self._attend_at = time.monotonic() + self.lease_us / 3_000_000
            await worker.attend()

    async def _look_again(self) -> None:
        self._next_timer_us, revisions = await self._db.glance(lambda sql, _: (timers.next_us(sql), groups.revisions(sql)))
        self._worker.look_again(revisions)

    async def _fire(self) -> None:
        await self._write(lambda sql: timers.fire(sql, self._db.writer_types, now_us()), rows=timers.FIRE_TIMERS)
        self._next_timer_us = await self._db.glance(lambda sql, _: timers.next_us(sql))

    # ── groups ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def bind(self, bound_groups: Sequence[Group], *, work: bool = True) -> None:
        """Declare groups; with `work`, take a share of their slots."""
        self._opened()
        await self._worker.bind(bound_groups, work=work)

    async def unbind(self, group: str) -> None:
        """Stop working for one group that is gone."""
        self._worker.forget(group)

    async def leave(self) -> None:
        """Stop working for all groups."""
        await self._worker.leave()

    async def claim(self, group: str, *, limit: int, wait_s: float) -> list[Delivery]:
        """Lend up to `limit` deliveries, waiting up to `wait_s` for the first."""
        self._opened()
        return await self._worker.claim(group, limit=limit, wait_s=wait_s)

    def settle(self, group: str, answers: Sequence[Settlement | InTransaction]) -> Awaitable[list[Delivery]]:
        """Answer deliveries; the keys of finished ones are free at once, the awaitable returns those whose lease was lost."""
        self._opened()
        return self._worker.settle(group, answers)

    async def seek(
        self,
        group: str,
        to: SeekTo,
        *,
        into: str | None = None,
        emits: bool = False,
        reset: Callable[[Db], None] | None = None,
    ) -> int:
        """Set a group, or a new one, to start again after the returned position."""
        tx = self._opened().transaction
        position = await self.transact(
            lambda db: groups.seek(tx.sql, group, to, into=into, emits=emits, reset=reset, db=db, now_us=now_us()), rows=1
        )
        await self._look_again()
        return position

    async def pause(self, group: str) -> None:
        """Lend nothing of this group until resume()."""
        await self._write(lambda sql: groups.set_paused(sql, group, True))
        self._worker.pause(group)
        await self._look_again()

    async def resume(self, group: str) -> None:
        """Undo pause()."""
        await self._write(lambda sql: groups.set_paused(sql, group, False))
        await self._look_again()

    async def drop_group(self, group: str) -> None:
        """Forget a group."""
        await self._write(lambda sql: groups.drop(sql, group))

    # ── timers, dead letters, retention ────────────────────────────────────────────────────────────────────────────────

    async def schedule(self, envelopes: Sequence[Envelope], due_us: int) -> None:
        """Put envelopes on the log at that time."""
        self._opened()
        for envelope in envelopes:
            append.check_envelope(envelope, self.payload_bytes, takes_nul=self.takes_nul)
        await self._write(lambda sql: timers.schedule(sql, self._db.writer_types, envelopes, due_us), rows=len(envelopes))
        self._scheduled(due_us)

    def _scheduled(self, due_us: int) -> None:
        # Also from the writer's thread. One that was undone is found out when it is due and not there.
        self._next_timer_us = min(due_us, NEVER_US if self._next_timer_us is None else self._next_timer_us)

    async def publish_in(self, tx: object, envelopes: Sequence[Envelope], due_us: int | None = None) -> None:
        """Publish with the commit of the user's own transaction; refused but on PostgreSQL."""
        raise Unsupported(
            f"{self.url} has no transactions of yours to publish in: tx= works on postgresql://; here publish after your "
            "commit, or write through `db` in a handler"
        )

    async def cancel(self, event_id: str) -> bool:
        """Remove a timer."""
        return bool(await self._write(lambda sql: sql.many("delete from trilogue_timers where id = ?", [(event_id,)])))

    async def dead(self, group: str | None, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        """Dead letters by position."""
        letters: list[DeadLetter] = await self._opened().look(
            lambda sql, types: dead.listed(sql, types, group, after=after, limit=limit)
        )
        return letters

    async def held(self, *, after: int = 0, limit: int = 1_000) -> list[Record]:
        """Records that some group holds."""
        records: list[Record] = await self._opened().look(lambda sql, types: dead.held(sql, types, after=after, limit=limit))
        return records

    async def redrive(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Handle dead letters again."""
        count: int = await self._write(lambda sql: dead.redrive(sql, group, positions))
        await self._look_again()
        return count

    async def drop_dead(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Forget dead letters."""
        count: int = await self._write(lambda sql: dead.drop(sql, group, positions))
        await self._look_again()
        return count

    async def trim(
        self, *, older_than_us: int | None = None, keep: int | None = None, force: bool = False, streams: bool = False
    ) -> int:
        """Remove old records, a few thousand a transaction, so that publishing goes on meanwhile."""
        before_us = None if older_than_us is None else now_us() - older_than_us
        if before_us is None and keep is None:
            return 0

        def remove(sql: Sql, start: int) -> tuple[int, int, int]:
            alone(sql)
            log.note_places(sql, self._db.writer_types, log.newest(sql)[0], least=1)  # what goes must have been counted
            needed = None if force else status.first_needed(sql, self._db.writer_types)
            floor = retention.floor_of(sql, before_us=before_us, keep=keep, needed=needed)
            return *retention.trim(sql, max(start, log.oldest(sql)), floor, force=force, streams=streams), floor

        removed, start, floor = 0, 0, 1
        while start < floor:
            count, start, floor = await self._write(partial(remove, start=start), rows=retention.TRIM_RECORDS)
            removed += count
        return removed

    # ── looking ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def handled(self, group: str, position: int) -> bool:
        """Whether a group has finished the record at a position."""
        return await self._opened().glance(lambda sql, types: status.handled(sql, types, group, position))

    async def finished_to(self, group: str) -> int:
        """The position up to which a group has read everything."""
        reached: int = await self._opened().look(lambda sql, types: status.finished_to(sql, types, group))
        return reached

    async def orphans(self, app: str, names: Sequence[str]) -> list[str]:
        """Groups of an app beyond these names that have work and nobody who does it."""
        found: list[str] = await self._opened().look(lambda sql, types: status.orphans(sql, types, app, names))
        return found

    async def idle(self, names: Sequence[str]) -> bool:
        """Whether these groups have nothing left to do."""
        return bool(await self._opened().look(lambda sql, types: status.is_idle(sql, types, names)))

    async def status(self) -> Status:
        """The whole log at a glance."""

        def look(sql: Sql, types: log.Types) -> Status:
            waiting = sql.rows("select count(*) from trilogue_timers")[0][0]
            size = sql.rows(sql.dialect.bytes)[0][0] + self._db.beside_bytes()
            head = log.newest(sql)[0]
            oldest = log.oldest(sql) if head else 0
            return Status(self.url, head, oldest, status.count_types(sql), waiting, size, status.groups(sql, types))

        found: Status = await self._opened().look(look)
        return found

    async def query(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        """Read the user's tables on a connection of its own, in a thread."""
        return await self._opened().query(sql, values)

    async def transact(self, work: Callable[[Transaction], T], *, rows: int = 1_000, limit_us: int | None = None) -> T:
        """Run `work` with the database in a transaction of its own."""

        db = self._opened()

        def timed() -> T:
            alone(db.sql)  # what it reads and decides by must not change until the commit
            db.set_deadline(limit_us)
            try:
                return work(db.transaction)
            finally:
                db.set_deadline(None)

        run = whole(timed, in_transaction=db.in_transaction, check=db.transaction.check, translate=db.translate)
        result: T = await self._write(lambda _: run(), rows=rows)
        if self._db.transaction.regrouped:
            self._db.transaction.regrouped = False
            await self._look_again()
        return result

    async def state(self, owner: str, id: str) -> bytes | None:
        """What an owner keeps under one id."""
        select = "select body from trilogue_state where owner = ? and id = ?"
        rows = await self._opened().glance(lambda sql, _: sql.rows(select, (owner, id)))
        return rows[0][0] if rows else None

    async def states(self, owner: str, *, after: str = "", limit: int = 1_000) -> list[State]:
        """What an owner keeps, by id."""
        select = "select owner, id, at_us, body from trilogue_state where owner = ? and id > ? order by id limit ?"
        rows: list[Any] = await self._opened().look(lambda sql, _: sql.rows(select, (owner, after, limit)))
        return [State(*row) for row in rows]

    async def kinds(self) -> list[Kind]:
        """What was ever accepted, by type and schema version."""
        found: list[Kind] = await self._opened().look(lambda sql, _: status.kinds(sql))
        return found

    async def timers(self, *, after: str = "", limit: int = 1_000) -> list[Scheduled]:
        """What is scheduled, by the id of its envelope."""
        listed: list[Scheduled] = await self._opened().look(lambda sql, _: timers.listed(sql, after=after, limit=limit))
        return listed

    # ── streams ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def stream_version(self, stream: str) -> int:
        """The version of a stream; 0 if there is none."""
        version = "select max(version) from trilogue_records where stream = ?"
        found: int = await self._opened().glance(lambda sql, _: sql.rows(version, (stream,))[0][0] or 0)
        return found

    async def close_stream(self, stream: str, reason: str) -> int:
        """Let nothing be appended to a stream any more; returns its version."""
        types, tx = self._opened().writer_types, self._db.transaction
        version: int = await self._write(lambda sql: streams.close(sql, types, tx, stream, reason))
        return version

    async def truncate_stream(self, stream: str, before: int) -> None:
        """Hide the records of a stream below a version."""
        types, tx = self._opened().writer_types, self._db.transaction
        await self._write(lambda sql: streams.truncate(sql, types, tx, stream, before))

    async def describe(self) -> dict[str, str]:
        """What kind of database this is, and what its durability rests on."""
        return await self._opened().describe()

    async def rewrite(self) -> bool:
        """Write the files anew, so that nothing of what was deleted is left in them."""
        return await self._opened().rewrite()


def _is_short(query: Query) -> bool:
    """Whether an index leads to its records: such a look takes microseconds, less than handing it to a thread."""
    return query.types == ("#",) and query.key is None and query.correlation is None and len(query.tags) < 2
