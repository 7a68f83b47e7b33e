"""This process at work for its groups: which slots are ours, what may be claimed, what a settlement leads to.

attend   report for work: renew leases, take free slots, give back those beyond a fair share
claim    held rows that are due, what had waited for its key, then the log from the scan on
settle   plan (gate.py) ──▶ one transaction (settling.py) ──▶ the gate learns what is free, held or lost
"""

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from trilogue.errors import LeaseLost, Rejected, TrilogueError, UnknownEvent
from trilogue.events import Delivery, Envelope, Group, InTransaction, Lease, Settlement, now_us
from trilogue.gate import NEVER_US, Gate, Plan
from trilogue.stores import append, claiming, groups, log, members, settling
from trilogue.stores.database import Database
from trilogue.stores.writer import Again, Sql

SCAN_BYTES = 16 << 20


class _Bound:
    """One group this process knows: its definition, its gate, and what wakes its claim."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.gate = Gate(group.name, ordered=group.ordered)
        self.group_id = 0
        self.revision: int | None = -1
        self.paused = False
        self.works = False
        self.kinds: list[int] = []
        self.kinds_of = -1
        self.wake = asyncio.Event()
        self.finished = 0
        self.finished_at = (time.monotonic(), 0)


class Worker:
    """One process's part in its groups, on one Database."""

    def __init__(self, db: Database, *, lease_us: int, payload_bytes: int) -> None:
        self.lease_us = lease_us
        self.attend_now = asyncio.Event()
        self.changed = asyncio.Event()
        self._db = db
        self._payload_bytes = payload_bytes
        self._member = members.Member(uuid.uuid4().hex, _machine(), os.getpid())
        self._bound: dict[str, _Bound] = {}
        self._attending = asyncio.Lock()
        self._effects = settling.Effects(
            db.transaction, db.set_deadline, db.in_transaction, db.connection.translate, self._check, db.writer_types.forget
        )
        db.writer.every(lease_us / 3_000_000, self._renew)

    @property
    def works(self) -> bool:
        """Whether this process takes slots."""
        return any(bound.works for bound in self._bound.values())

    def wake_all(self) -> None:
        """Something on the log may have changed."""
        for bound in self._bound.values():
            bound.wake.set()
        self.changed.set()

    def look_again(self, revisions: dict[str, int]) -> None:
        """Wake everybody; report for work if a group is not as we knew it. revisions: by group."""
        if any(b.works and revisions.get(name) != b.revision for name, b in self._bound.items()):
            self.attend_now.set()
        self.wake_all()

    def pause(self, group: str) -> None:
        """Lend nothing of a group from now on; other processes learn of it within milliseconds."""
        if group in self._bound:
            self._bound[group].paused = True

    async def leave(self) -> None:
        """Hand back what is out, uncharged, and give up all slots."""
        # No report for work may be under way: written after we have left, it would take slots that nobody works.
        async with self._attending:
            if self.works:
                with contextlib.suppress(TrilogueError):
                    await self._hand_back()
            self._bound.clear()

    async def _hand_back(self) -> None:
        for bound in self._bound.values():
            plan = bound.gate.sync()
            if plan is not None:
                await self._flush(bound, plan)
            bound.gate.reset()
        await self._db.writer.submit(lambda sql: members.leave(sql, self._member))

    # ── slots ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def bind(self, bound_groups: Sequence[Group], *, work: bool = True) -> None:
        """Declare groups; with `work`, take a share of their slots."""
        await self._db.write(lambda sql: groups.bind(sql, bound_groups, now_us()))
        self.wake_all()
        for group in bound_groups:
            bound = self._bound.setdefault(group.name, _Bound(group))
            bound.works = bound.works or work
        if work:
            await self.attend()

    def forget(self, group: str) -> None:
        """Know nothing any more of a group that is gone."""
        bound = self._bound.pop(group, None)
        if bound is not None:
            bound.gate.reset()
            bound.wake.set()

    def _renew(self, sql: Sql) -> None:
        """In the writer's thread, so that a blocked loop does not cost the lease."""
        if not self.works:
            return
        until_us = machine_us() + self.lease_us
        ours = members.renew(sql, self._member, until_us)
        for bound in [bound for bound in list(self._bound.values()) if bound.group_id in ours]:
            for lease in list(bound.gate.leases.values()):
                lease.until_us = until_us

    async def attend(self) -> None:
        """Report for all groups: slots that are free come to us, those beyond our share go when nothing of them is out."""
        async with self._attending:
            await self._report()

    async def _report(self) -> None:
        working = [bound for bound in self._bound.values() if bound.works]
        give_up = {bound.group.name: [s for s in bound.gate.leaving if bound.gate.drained(s)] for bound in working}
        for bound in working:
            for slot in give_up[bound.group.name]:
                bound.gate.disown(slot)

        def report(sql: Sql) -> list[members.Attendance | None]:
            return [
                members.attend(
                    sql,
                    b.group.name,
                    self._member,
                    machine_us(),
                    self.lease_us,
                    give_up[b.group.name],
                    b.gate.out,
                    self._rate(b),
                )
                for b in working
            ]

        generations = [bound.gate.generation for bound in working]
        reports = await self._db.writer.submit(report, rows=64 * len(working))
        for bound, generation, attendance in zip(working, generations, reports, strict=True):
            if attendance is None:  # it was dropped: nothing of it is ours any more, and the other groups go on
                bound.gate.reset()
                bound.revision = None
            elif bound.gate.generation is generation:
                self._take_over(bound, attendance)
            else:  # it began anew while the report was written: what the report says may be older than what was undone
                self.attend_now.set()
        self.wake_all()

    def _rate(self, bound: _Bound) -> float:
        at, finished = bound.finished_at
        now = time.monotonic()
        bound.finished_at = (now, bound.finished)
        return (bound.finished - finished) / max(now - at, 0.001)

    def _take_over(self, bound: _Bound, attendance: members.Attendance) -> None:
        """Bring the gate in line with what the store says we own."""
        gate = bound.gate
        owned = {slot: (epoch, cursor, quiet_to) for slot, epoch, cursor, quiet_to in attendance.slots}
        for slot in [s for s, lease in gate.leases.items() if s not in owned or owned[s][0] != lease.epoch]:
            gate.disown(slot)
        fresh = [slot for slot in owned if slot not in gate.leases]
        until_us = machine_us() + self.lease_us
        for slot in fresh:
            epoch, cursor, quiet_to = owned[slot]
            gate.own(Lease(slot, epoch, until_us, machine_us, quiet_to), cursor)
        gate.leave(set(sorted(owned, reverse=True)[: max(0, len(owned) - attendance.share)]))
        stale = attendance.revision != bound.revision
        bound.group_id, bound.revision, bound.paused = attendance.group_id, attendance.revision, attendance.paused
        gate.epoch = attendance.epoch
        if gate.leases and (fresh or stale):
            with self._db.reading():
                gate.learn_held(*claiming.held_index(self._db.sql, bound.group_id, list(gate.leases), ordered=gate.ordered))
        if any(gate.drained(slot) for slot in gate.leaving):
            self.attend_now.set()

    # ── claim ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def claim(self, group: str, *, limit: int, wait_s: float) -> list[Delivery]:
        """Lend up to `limit` deliveries, waiting up to `wait_s` for the first."""
        self._db.check_open()
        bound = self._bound_or_raise(group)
        until = time.monotonic() + wait_s
        while True:
            bound.wake.clear()
            try:
                deliveries = await self._lend(bound, limit)
            except Exception:
                self._begin_anew(bound)  # what was lent on the way to the error is known to nobody
                raise
            due_us = NEVER_US if bound.paused or not bound.gate.leases else bound.gate.next_due_us()
            left = min(until - time.monotonic(), (due_us - now_us()) / 1_000_000)
            if deliveries or until <= time.monotonic() or not self._db.is_open:
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
        with self._db.reading():
            names = gate.due_keys(now, limit)
            for n, name in enumerate(names, 1):
                room = limit - len(lent) - (len(names) - n)  # one at least for each key that was taken
                slot = gate.keys[name].slot
                rows = claiming.held_of_key(self._db.sql, self._db.types, bound.group_id, slot, name, limit=room)
                lent += gate.lend_key(name, rows, now)
            loose = gate.due_loose(now, limit - len(lent))
            if loose:
                lent += gate.lend_loose(claiming.held_at(self._db.sql, self._db.types, bound.group_id, loose, now))
        return lent

    async def _scan(self, bound: _Bound, limit: int) -> tuple[list[Delivery], bool]:
        """Read on in the log; returns what may go out, and whether the end was reached."""
        gate = bound.gate
        generation, after = gate.generation, gate.scan
        with self._db.reading():
            head, newest_type = log.extent(self._db.sql)
            if after >= head:
                return [], True
            records, end = claiming.scan(
                self._db.sql,
                self._db.types,
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
        if newest_type not in self._db.types.by_number:
            self._db.types.load(self._db.sql)
        if bound.kinds_of != len(self._db.types.by_number):
            bound.kinds_of = len(self._db.types.by_number)
            bound.kinds = self._db.types.matching(bound.group.patterns)
        return bound.kinds

    # ── settle ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def settle(self, group: str, answers: Sequence[Settlement | InTransaction]) -> Awaitable[list[Delivery]]:
        """Answer deliveries; the keys of finished ones are free at once, the awaitable returns those whose lease was lost."""
        self._db.check_open()
        bound = self._bound_or_raise(group)
        gate = bound.gate
        live, lost = _live(answers)
        plan = gate.plan([delivery for answer in live for delivery in _deliveries(answer)])
        early: list[Settlement] = []
        rest: list[Settlement | InTransaction] = []
        for answer in live:
            answer = self._storable(answer)
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
                self._check(envelope)
        except Rejected as error:
            return Settlement(answer.delivery, "dead", error=f"what its handler published is refused: {error}")
        return answer

    def _submit(
        self, bound: _Bound, plan: Plan, early: Sequence[Settlement], rest: Sequence[Settlement | InTransaction]
    ) -> "asyncio.Future[Any]":
        def write(sql: Sql) -> settling.Settled:
            try:
                return settling.settle(
                    sql, self._db.writer_types, self._effects, bound.group_id, self._member, plan, early, rest, now_us()
                )
            except Again:
                self._db.writer_types.forget()
                raise

        try:
            return self._db.writer.submit(write, rows=_weight(plan, early, rest), broke=lambda: self._broke(plan))
        except TrilogueError:
            self._broke(plan)  # the gate has moved on already: it begins anew from what is stored
            self._restart(bound, plan)
            raise

    async def _settled(
        self,
        bound: _Bound,
        plan: Plan,
        early: Sequence[Settlement],
        rest: Sequence[Settlement | InTransaction],
        written: "asyncio.Future[settling.Settled]",
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
        self.changed.set()
        bound.wake.set()
        if settled.emitted:
            self.wake_all()
        return lost + settled.lost

    async def _flush(self, bound: _Bound, plan: Plan) -> None:
        """Write rows and cursors without an answer to anything."""
        await self._settled(bound, plan, (), (), self._submit(bound, plan, (), ()), [])

    def _broke(self, plan: Plan) -> None:
        """In the writer's thread: nothing planned on top of a failed settlement may be written."""
        plan.generation.broken = True
        self._db.writer_types.forget()

    def _restart(self, bound: _Bound, plan: Plan) -> None:
        if bound.gate.generation is plan.generation:
            self._begin_anew(bound)

    def _begin_anew(self, bound: _Bound) -> None:
        bound.gate.reset()
        bound.revision = -1
        self.attend_now.set()

    def _check(self, envelope: Envelope) -> None:
        append.check_envelope(envelope, self._payload_bytes)


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
    return 1 + effects + emits + len(early) // 4 + len(rest) + len(plan.rows) + len(plan.followers)


def machine_us() -> int:
    """A clock that all processes of a machine share and nobody sets."""
    return time.monotonic_ns() // 1_000


def _machine() -> str:
    """Where a pid and the monotonic clock mean something: one boot, one process namespace."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return uuid.getnode().to_bytes(8, "big").hex()
