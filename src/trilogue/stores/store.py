"""The Store port over one writer and one reader: what runs where, who is woken when.

    append, settle, …  ──▶ Writer (one transaction for all that waits) ──▶ wake
    claim              ◀── Gate ◀── reader: held rows due, then the log from the scan on
    every 5 ms         data_version: has another process committed?  every lease/3: report for work, slots move

SQLite only for now in connection and wake-up; the algorithm itself is in log.py, groups.py, dead.py and status.py.
"""

import asyncio
import contextlib
import os
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from trilogue.errors import LeaseLost, Rejected, TrilogueError, Unavailable, UnknownEvent
from trilogue.events import (
    KEY_CHARS,
    Delivery,
    Durability,
    Envelope,
    Group,
    InTransaction,
    Lease,
    Record,
    Settlement,
    now_us,
)
from trilogue.gate import NEVER_US, Gate, Plan
from trilogue.ports import Db, DeadLetter, Feature, Query, SeekTo, Status
from trilogue.stores import dead, groups, log, status
from trilogue.stores.sqlite import (
    ApswSql,
    OpenFiles,
    SqliteConnection,
    check_place,
    connect,
    prepare,
    translate,
    wal_bytes,
)
from trilogue.stores.userdb import UserDb, read_only
from trilogue.stores.writer import Again, Sql, Writer

POLL_S = 0.005
SCAN_BYTES = 16 << 20
QUERY_S = 30.0
QUERY_ROWS = 1_000_000


class _Bound:
    """One group this process knows: its definition, its gate, and what wakes its claim."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.gate = Gate(group.name, ordered=group.ordered)
        self.group_id = 0
        self.revision = -1
        self.paused = False
        self.works = False
        self.kinds: list[int] = []
        self.kinds_of = -1
        self.wake = asyncio.Event()
        self.finished = 0
        self.finished_at = (time.monotonic(), 0)


class SqlStore:
    """A Store on SQLite: a file, or memory."""

    def __init__(
        self,
        path: str,
        url: str,
        *,
        lease_s: float = 10.0,
        payload_bytes: int = log.PAYLOAD_BYTES,
        wal_bytes: int | None = None,
    ) -> None:
        self.path = path
        self.url = url
        self.in_memory = path == ":memory:"
        self.durability: Durability = "memory" if self.in_memory else "os-crash"
        file_only = {Feature.PERSISTENT, Feature.SHARED}
        self.features = frozenset(set(Feature) - file_only if self.in_memory else set(Feature))
        self.lease_us = round(lease_s * 1_000_000)
        self.payload_bytes = payload_bytes
        self._wal_limit = wal_bytes
        self._worker = groups.Worker(uuid.uuid4().hex, _machine(), os.getpid())
        self._bound: dict[str, _Bound] = {}
        self._appends: list[tuple[Sequence[Envelope], asyncio.Future[list[int]]]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._is_open = False

    # ── open and close ───────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Connect, create or check the schema."""
        if self._is_open:
            raise Unavailable(f"{self.url} is open already: one open store per App")
        if not self.in_memory:
            self.path = check_place(self.path)  # absolute: the current folder may become another one
        self._connection = self._connect()
        self._reader = self._connection.apsw if self.in_memory else connect(self.path, read_only=True)
        self._sql: Sql = self._connection.sql if self.in_memory else ApswSql(self._reader)
        self._writer_types, self._types, self._slow_types = log.Types(), log.Types(), log.Types()
        self._types.load(self._sql)
        if not self.in_memory:
            self._slow_lock = threading.Lock()
            self._slow = connect(self.path, read_only=True)
            self._slow_sql = ApswSql(self._slow)
        self._db = UserDb(self._connection.sql)
        self._effects = groups.Effects(self._db, self._set_deadline, self._in_transaction, self._connection.translate, self._check)
        self._writer = Writer(self._connection, name=self.path)
        self._version = self._reader.pragma("data_version")
        self._head = log.newest(self._sql)[0]
        self._next_timer_us: int | None = log.next_timer_us(self._sql)
        # Only now: in memory the writer's thread shares the connection just read from.
        self._writer.every(self.lease_us / 3_000_000, self._renew)
        self._changed = asyncio.Event()
        self._attend_now = asyncio.Event()
        self._attending = asyncio.Lock()
        self._tasks = [asyncio.create_task(self._watch(), name="trilogue watch")]
        self._is_open = True

    def _connect(self) -> SqliteConnection:
        try:
            connection = (
                SqliteConnection(self.path) if self._wal_limit is None else SqliteConnection(self.path, wal_bytes=self._wal_limit)
            )
            prepare(connection)
        except TrilogueError:
            raise
        except Exception as error:
            raise translate(error, self.path) from error
        if not self.in_memory:
            OpenFiles.add(self.path)
            with contextlib.suppress(OSError):
                os.chmod(self.path, 0o600)
        return connection

    async def close(self) -> None:
        """Give back every slot and let go."""
        if not self._is_open:
            return
        self._is_open = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if any(bound.works for bound in self._bound.values()):
            with contextlib.suppress(TrilogueError):
                await self._hand_back()
        self._bound.clear()
        await self._writer.close()
        if not self.in_memory:
            self._reader.close(True)
            self._slow.close(True)
            OpenFiles.remove(self.path)
        self._connection.close()

    async def _hand_back(self) -> None:
        for bound in self._bound.values():
            plan = bound.gate.sync()
            if plan is not None:
                await self._flush(bound, plan)
            bound.gate.reset()
        await self._writer.submit(lambda sql: groups.leave(sql, self._worker))

    # ── append and read ──────────────────────────────────────────────────────────────────────────────────────────────

    async def append(self, envelopes: Sequence[Envelope], *, expected: tuple[str, int] | None = None) -> list[int]:
        """Put envelopes on the log: all or none, in this order, durable on return."""
        self._check_open()
        for envelope in envelopes:
            log.check_envelope(envelope, self.payload_bytes)
        if expected is not None:
            stream, version = expected
            positions: list[int] = await self._write(
                lambda sql: log.append_expected(sql, self._writer_types, envelopes, stream, version, now_us()),
                rows=len(envelopes),
            )
            return positions
        # Publishes of one turn of the loop become one statement: a savepoint each would cost as much as the insert.
        if not self._appends:
            self._writer.merge(self._append_all)
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._appends.append((envelopes, future))
        return await future

    def _append_all(self) -> None:
        appends, self._appends = self._appends, []
        batches = [envelopes for envelopes, _ in appends]

        def finish(outcomes: Any, error: Exception | None) -> None:
            for n, (_, future) in enumerate(appends):
                _resolve(future, error or outcomes[n])
            self._wake_all()

        try:
            self._writer.post(
                lambda sql: log.append_all(sql, self._writer_types, batches, now_us()),
                finish,
                rows=sum(map(len, batches)),
                broke=self._writer_types.forget,
                is_append=True,
            )
        except TrilogueError as error:
            finish(None, error)

    def check(self, envelope: Envelope) -> None:
        """Raise Rejected if an envelope that a handler emits is too large."""
        if len(envelope.data) > self.payload_bytes or (envelope.key is not None and len(envelope.key) > KEY_CHARS):
            log.check_envelope(envelope, self.payload_bytes)

    async def read(self, query: Query) -> list[Record]:
        """One page of records."""
        records: list[Record] = await self._look(lambda sql, types: log.read(sql, types, query))
        return records

    async def _look(self, run: Callable[[Sql, log.Types], Any]) -> Any:
        """Read what may take long, in a thread and on a connection of its own."""
        self._check_open()
        if self.in_memory:
            with self._reading():
                return run(self._sql, self._types)
        return await asyncio.to_thread(self._look_in_thread, run)

    def _look_in_thread(self, run: Callable[[Sql, log.Types], Any]) -> Any:
        with self._slow_lock:
            try:
                return run(self._slow_sql, self._slow_types)
            except TrilogueError:
                raise
            except Exception as error:
                raise translate(error, self.path) from error

    @contextlib.contextmanager
    def _reading(self) -> Any:
        self._connection.check_fork()
        lock = self._connection.exclusively() if self.in_memory else contextlib.nullcontext()
        with lock:
            try:
                yield
            except TrilogueError:
                raise
            except Exception as error:
                raise translate(error, self.path) from error

    async def _write(self, run: Callable[[Sql], Any], *, rows: int = 1) -> Any:
        self._check_open()
        result = await self._writer.submit(run, rows=rows, broke=self._writer_types.forget)
        self._wake_all()
        return result

    def _check_open(self) -> None:
        if not self._is_open:
            raise Unavailable(f"{self.url} is not open: use it inside `async with app:`")
        self._connection.check_fork()  # the writer's thread did not come along: waiting for it would never end

    # ── waking ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wake_all(self) -> None:
        for bound in self._bound.values():
            bound.wake.set()
        self._changed.set()

    async def changed(self, wait_s: float) -> None:
        """Return when something may have changed, at the latest after `wait_s`."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._changed.wait()

    async def _watch(self) -> None:
        """Notice what other processes commit, fire timers, report for work in time."""
        attend_at = 0.0
        while True:
            await asyncio.sleep(POLL_S)
            with contextlib.suppress(TrilogueError):
                with self._reading():
                    version = self._reader.pragma("data_version")
                if version != self._version:
                    self._version = version
                    self._look_again()
                if self._next_timer_us is not None and self._next_timer_us <= now_us() and self._works():
                    await self._fire()
                if self._works() and (self._attend_now.is_set() or time.monotonic() >= attend_at):
                    self._attend_now.clear()
                    attend_at = time.monotonic() + self.lease_us / 3_000_000
                    await self._attend()

    def _works(self) -> bool:
        return any(bound.works for bound in self._bound.values())

    def _look_again(self) -> None:
        with self._reading():
            self._next_timer_us = log.next_timer_us(self._sql)
            revisions = dict(self._sql.rows("select name, revision from trilogue_groups")) if self._works() else {}
        for name, bound in self._bound.items():
            if bound.works and revisions.get(name, bound.revision) != bound.revision:
                self._attend_now.set()
        self._wake_all()

    async def _fire(self) -> None:
        await self._write(lambda sql: log.fire(sql, self._writer_types, now_us()), rows=log.FIRE_TIMERS)
        with self._reading():
            self._next_timer_us = log.next_timer_us(self._sql)

    # ── groups and slots ─────────────────────────────────────────────────────────────────────────────────────────────

    async def bind(self, bound_groups: Sequence[Group], *, work: bool = True) -> None:
        """Declare groups; with `work`, take a share of their slots."""
        await self._write(lambda sql: groups.bind(sql, bound_groups, now_us()))
        for group in bound_groups:
            bound = self._bound.setdefault(group.name, _Bound(group))
            bound.works = bound.works or work
        if work:
            await self._attend()

    def _renew(self, sql: Sql) -> None:
        """In the writer's thread, so that a blocked loop does not cost the lease."""
        if not self._works():
            return
        until_us = _machine_us() + self.lease_us
        ours = groups.renew(sql, self._worker, until_us)
        for bound in [bound for bound in list(self._bound.values()) if bound.group_id in ours]:
            for lease in list(bound.gate.leases.values()):
                lease.until_us = until_us

    async def _attend(self) -> None:
        """Report for all groups: slots that are free come to us, those beyond our share go when nothing of them is out."""
        async with self._attending:
            await self._report()

    async def _report(self) -> None:
        working = [bound for bound in self._bound.values() if bound.works]
        give_up = {bound.group.name: [s for s in bound.gate.leaving if bound.gate.drained(s)] for bound in working}
        for bound in working:
            for slot in give_up[bound.group.name]:
                bound.gate.disown(slot)

        def report(sql: Sql) -> list[groups.Attendance | None]:
            return [
                groups.attend(
                    sql,
                    b.group.name,
                    self._worker,
                    _machine_us(),
                    self.lease_us,
                    give_up[b.group.name],
                    b.gate.out,
                    self._rate(b),
                )
                for b in working
            ]

        generations = [bound.gate.generation for bound in working]
        reports = await self._writer.submit(report, rows=64 * len(working))
        for bound, generation, attendance in zip(working, generations, reports, strict=True):
            if attendance is None:  # it was dropped: nothing of it is ours any more, and the other groups go on
                bound.gate.reset()
            elif bound.gate.generation is generation:
                self._take_over(bound, attendance)
            else:  # it began anew while the report was written: what the report says may be older than what was undone
                self._attend_now.set()
        self._wake_all()

    def _rate(self, bound: _Bound) -> float:
        at, finished = bound.finished_at
        now = time.monotonic()
        bound.finished_at = (now, bound.finished)
        return (bound.finished - finished) / max(now - at, 0.001)

    def _take_over(self, bound: _Bound, attendance: groups.Attendance) -> None:
        """Bring the gate in line with what the store says we own."""
        gate = bound.gate
        owned = {slot: (epoch, cursor, quiet_to) for slot, epoch, cursor, quiet_to in attendance.slots}
        for slot in [s for s, lease in gate.leases.items() if s not in owned or owned[s][0] != lease.epoch]:
            gate.disown(slot)
        fresh = [slot for slot in owned if slot not in gate.leases]
        until_us = _machine_us() + self.lease_us
        for slot in fresh:
            epoch, cursor, quiet_to = owned[slot]
            gate.own(Lease(slot, epoch, until_us, _machine_us, quiet_to), cursor)
        gate.leave(set(sorted(owned, reverse=True)[: max(0, len(owned) - attendance.share)]))
        stale = attendance.revision != bound.revision
        bound.group_id, bound.revision, bound.paused = attendance.group_id, attendance.revision, attendance.paused
        gate.epoch = attendance.epoch
        if gate.leases and (fresh or stale):
            with self._reading():
                gate.learn_held(*groups.held_index(self._sql, bound.group_id, list(gate.leases), ordered=gate.ordered))
        if any(gate.drained(slot) for slot in gate.leaving):
            self._attend_now.set()

    # ── claim ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def claim(self, group: str, *, limit: int, wait_s: float) -> list[Delivery]:
        """Lend up to `limit` deliveries, waiting up to `wait_s` for the first."""
        self._check_open()
        bound = self._bound_or_raise(group)
        until = time.monotonic() + wait_s
        while True:
            bound.wake.clear()
            deliveries = await self._lend(bound, limit)
            due_us = NEVER_US if bound.paused or not bound.gate.leases else bound.gate.next_due_us()
            left = min(until - time.monotonic(), (due_us - now_us()) / 1_000_000)
            if deliveries or until <= time.monotonic() or not self._is_open:
                return deliveries
            # Not wait_for(): in Python 3.11 it swallows a cancellation that comes together with the wake-up.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(left, 0.0005)):
                    await bound.wake.wait()

    def _bound_or_raise(self, group: str) -> _Bound:
        if group not in self._bound:
            raise UnknownEvent(f"group {group!r} was not bound here: call bind() first")
        return self._bound[group]

    async def _lend(self, bound: _Bound, limit: int) -> list[Delivery]:
        gate = bound.gate
        if bound.paused or not gate.leases:
            return []
        deliveries = self._lend_held(bound, -(-limit // 2))
        flush = gate.flush()
        if flush is not None:
            await self._flush(bound, flush)  # and wakes the claim: what it wrote can be lent
        deliveries += gate.take_ready(limit - len(deliveries))
        while len(deliveries) < limit and not gate.is_full:
            found, at_end = await self._scan(bound, limit - len(deliveries))
            deliveries += found
            if at_end:
                break
        if gate.lags_behind_scan and (plan := gate.sync()) is not None:
            await self._flush(bound, plan)
        return deliveries

    def _lend_held(self, bound: _Bound, limit: int) -> list[Delivery]:
        gate, now = bound.gate, now_us()
        if gate.next_due_us() > now:
            return []
        lent: list[Delivery] = []
        with self._reading():
            names = gate.due_keys(now, limit)
            for n, name in enumerate(names, 1):
                room = limit - len(lent) - (len(names) - n)  # one at least for each key that was taken
                rows = groups.held_of_key(self._sql, self._types, bound.group_id, gate.keys[name].slot, name)
                lent += gate.lend_key(name, rows[:room], now)
            loose = gate.due_loose(now, limit - len(lent))
            if loose:
                lent += gate.lend_loose(groups.held_at(self._sql, self._types, bound.group_id, loose))
        return lent

    async def _scan(self, bound: _Bound, limit: int) -> tuple[list[Delivery], bool]:
        """Read on in the log; returns what may go out, and whether the end was reached."""
        gate = bound.gate
        generation, after = gate.generation, gate.scan
        with self._reading():
            head, newest_type = log.extent(self._sql)
            if after >= head:
                return [], True
            records, end = groups.scan(
                self._sql,
                self._types,
                after=after,
                head=head,
                limit=max(1, min(limit, SCAN_BYTES // gate.record_bytes)),
                slots=list(gate.leases),
                kinds=self._kinds(bound, newest_type),
            )
        if records:
            gate.record_bytes = 1 + sum(len(record.data) for _, record in records) // len(records)
        else:
            await asyncio.sleep(0)  # a long way without a match must not hold up everybody else
            if gate.generation is not generation or gate.scan != after:
                return [], False
        return gate.admit(records, end), end >= head

    def _kinds(self, bound: _Bound, newest_type: int) -> list[int]:
        if newest_type not in self._types.by_number:
            self._types.load(self._sql)
        if bound.kinds_of != len(self._types.by_number):
            bound.kinds_of = len(self._types.by_number)
            bound.kinds = self._types.matching(bound.group.patterns)
        return bound.kinds

    # ── settle ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def settle(self, group: str, answers: Sequence[Settlement | InTransaction]) -> Awaitable[list[Delivery]]:
        """Answer deliveries; the keys of finished ones are free at once, the awaitable returns those whose lease was lost."""
        self._check_open()
        bound = self._bound_or_raise(group)
        gate = bound.gate
        live, lost = _live([self._storable(answer) for answer in answers])
        plan = gate.plan(delivery for answer in live for delivery in _deliveries(answer))
        early: list[Settlement] = []
        rest: list[Settlement | InTransaction] = []
        for answer in live:
            if isinstance(answer, Settlement) and gate.finish_early(answer):
                early.append(answer)
            else:
                rest.append(answer)
        return self._settled(bound, plan, early, rest, self._submit(bound, plan, early, rest), lost)

    def _storable(self, answer: Settlement | InTransaction) -> Settlement | InTransaction:
        """The answer itself, or a dead letter if what it emits can never be stored: trying again would not help."""
        if isinstance(answer, InTransaction) or not answer.emits:
            return answer
        try:
            for envelope in answer.emits:
                log.check_envelope(envelope, self.payload_bytes)
        except Rejected as error:
            return Settlement(answer.delivery, "dead", error=f"what its handler published is refused: {error}")
        return answer

    def _submit(
        self, bound: _Bound, plan: Plan, early: Sequence[Settlement], rest: Sequence[Settlement | InTransaction]
    ) -> "asyncio.Future[Any]":
        def write(sql: Sql) -> groups.Settled:
            try:
                return groups.settle(
                    sql, self._writer_types, self._effects, bound.group_id, self._worker, plan, early, rest, now_us()
                )
            except Again:
                self._writer_types.forget()
                raise

        return self._writer.submit(write, rows=_weight(plan, early, rest), broke=lambda: self._broke(plan))

    async def _settled(
        self,
        bound: _Bound,
        plan: Plan,
        early: Sequence[Settlement],
        rest: Sequence[Settlement | InTransaction],
        written: "asyncio.Future[groups.Settled]",
        lost: list[Delivery],
    ) -> list[Delivery]:
        try:
            settled = await asyncio.shield(written)
        except LeaseLost:
            self._restart(bound, plan)
            return [*lost, *(delivery for answer in (*early, *rest) for delivery in _deliveries(answer))]
        except Exception:
            self._restart(bound, plan)
            raise
        bound.gate.committed(plan, settled.settlements, now_us())
        bound.finished += len(early) + len(settled.settlements)
        self._changed.set()
        bound.wake.set()
        if settled.emitted:
            self._wake_all()
        return lost + settled.lost

    async def _flush(self, bound: _Bound, plan: Plan) -> None:
        """Write rows and cursors without an answer to anything."""
        await self._settled(bound, plan, (), (), self._submit(bound, plan, (), ()), [])

    def _broke(self, plan: Plan) -> None:
        """In the writer's thread: nothing planned on top of a failed settlement may be written."""
        plan.generation.broken = True
        self._writer_types.forget()

    def _restart(self, bound: _Bound, plan: Plan) -> None:
        if bound.gate.generation is plan.generation:
            bound.gate.reset()
            bound.revision = -1
            self._attend_now.set()

    def _check(self, envelope: Envelope) -> None:
        log.check_envelope(envelope, self.payload_bytes)

    def _in_transaction(self) -> bool:
        return self._connection.apsw.in_transaction

    def _set_deadline(self, limit_us: int | None) -> None:
        self._connection.deadline_s = None if limit_us is None else time.monotonic() + limit_us / 1_000_000

    # ── timers, seek, dead letters, retention ────────────────────────────────────────────────────────────────────────

    async def schedule(self, envelopes: Sequence[Envelope], due_us: int) -> None:
        """Put envelopes on the log at that time."""
        for envelope in envelopes:
            log.check_envelope(envelope, self.payload_bytes)
        await self._write(lambda sql: log.schedule(sql, self._writer_types, envelopes, due_us), rows=len(envelopes))
        self._next_timer_us = min(due_us, NEVER_US if self._next_timer_us is None else self._next_timer_us)

    async def cancel(self, event_id: str) -> bool:
        """Remove a timer."""
        return bool(await self._write(lambda sql: sql.many("delete from trilogue_timers where id = ?", [(event_id,)])))

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
        position: int = await self._write(
            lambda sql: groups.seek(sql, group, to, into=into, emits=emits, reset=reset, db=self._db, now_us=now_us())
        )
        self._look_again()
        return position

    async def pause(self, group: str) -> None:
        """Lend nothing of this group until resume()."""
        await self._write(lambda sql: groups.set_paused(sql, group, True))
        self._look_again()

    async def resume(self, group: str) -> None:
        """Undo pause()."""
        await self._write(lambda sql: groups.set_paused(sql, group, False))
        self._look_again()

    async def drop_group(self, group: str) -> None:
        """Forget a group."""
        await self._write(lambda sql: groups.drop(sql, group))

    async def dead(self, group: str | None, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        """Dead letters by position."""
        letters: list[DeadLetter] = await self._look(lambda sql, types: dead.listed(sql, types, group, after=after, limit=limit))
        return letters

    async def redrive(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Handle dead letters again."""
        count: int = await self._write(lambda sql: dead.redrive(sql, group, positions))
        self._look_again()
        return count

    async def drop_dead(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Forget dead letters."""
        count: int = await self._write(lambda sql: dead.drop(sql, group, positions))
        self._look_again()
        return count

    async def trim(
        self, *, older_than_us: int | None = None, keep: int | None = None, force: bool = False, streams: bool = False
    ) -> int:
        """Remove old records, a few thousand a transaction, so that publishing goes on meanwhile."""
        before_us = None if older_than_us is None else now_us() - older_than_us
        if before_us is None and keep is None:
            return 0

        def remove(sql: Sql) -> int:
            needed = None if force else status.first_needed(sql, self._writer_types)
            return log.trim(sql, before_us=before_us, keep=keep, needed=needed, force=force, streams=streams)

        removed = 0
        while count := await self._write(remove, rows=log.TRIM_RECORDS):
            removed += count
        return removed

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def handled(self, group: str, position: int) -> bool:
        """Whether a group has finished the record at a position."""
        self._check_open()
        with self._reading():
            return status.handled(self._sql, self._types, group, position)

    async def idle(self, names: Sequence[str]) -> bool:
        """Whether these groups have nothing left to do."""
        return bool(await self._look(lambda sql, types: status.is_idle(sql, types, names)))

    async def status(self) -> Status:
        """The whole log at a glance."""
        counts: dict[str, int] = await self._write(status.count_types)

        def look(sql: Sql, types: log.Types) -> Status:
            timers = sql.rows("select count(*) from trilogue_timers")[0][0]
            size = sql.rows("select page_count * page_size from pragma_page_count(), pragma_page_size()")[0][0]
            wal = 0 if self.in_memory else wal_bytes(self.path)
            head = log.newest(sql)[0]
            return Status(self.url, head, log.oldest(sql) if head else 0, counts, timers, size + wal, status.groups(sql, types))

        found: Status = await self._look(look)
        return found

    async def query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Read the user's tables on a connection of its own, in a thread."""
        self._check_open()
        if self.in_memory:
            with self._reading():
                return read_only(self._reader, sql, values)
        return await asyncio.to_thread(self._query, sql, values)

    def _query(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        connection = connect(self.path, read_only=True)
        deadline = time.monotonic() + QUERY_S
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
        try:
            return read_only(connection, sql, values)
        except Exception as error:
            raise translate(error, self.path) from error
        finally:
            connection.close()

    async def transact(self, work: Callable[[Db], Any]) -> Any:
        """Run `work` with the database in a transaction of its own."""
        return await self._write(lambda _: work(self._db), rows=1_000)


def _resolve(future: "asyncio.Future[Any]", outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _deliveries(answer: Settlement | InTransaction) -> Sequence[Delivery]:
    return (answer.delivery,) if isinstance(answer, Settlement) else answer.deliveries


def _live(answers: Sequence[Settlement | InTransaction]) -> tuple[list[Settlement | InTransaction], list[Delivery]]:
    """Answers whose lease holds as far as this process knows, and the deliveries of the others."""
    live: list[Settlement | InTransaction] = []
    lost: list[Delivery] = []
    for answer in answers:
        if isinstance(answer, Settlement):
            if answer.delivery.lease.revoked:
                lost.append(answer.delivery)
            else:
                live.append(answer)
        elif any(delivery.lease.revoked for delivery in answer.deliveries):
            # A batch can be lost in part: what is still ours of it is handed back.
            lost += [delivery for delivery in answer.deliveries if delivery.lease.revoked]
            live += [Settlement(delivery, "release") for delivery in answer.deliveries if not delivery.lease.revoked]
        else:
            live.append(answer)
    return live, lost


def _weight(plan: Plan, early: Sequence[Settlement], rest: Sequence[Settlement | InTransaction]) -> int:
    """About how many rows; effects always go through the thread, they run the user's code."""
    effects = 1_000 if any(isinstance(answer, InTransaction) for answer in rest) else 0
    emits = sum(len(settlement.emits) for settlement in early)
    return 1 + effects + emits + len(rest) + len(plan.rows) + len(plan.followers)


def _machine_us() -> int:
    """A clock that all processes of a machine share and nobody sets."""
    return time.monotonic_ns() // 1_000


def _machine() -> str:
    """Where a pid and the monotonic clock mean something: one boot, one process namespace."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return uuid.getnode().to_bytes(8, "big").hex()
