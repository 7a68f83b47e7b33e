"""This process at work for its groups: which slots are ours, what may be claimed, what a settlement leads to.

attend   report for work: renew leases, take free slots, give back those beyond a fair share
claim    held rows that are due, what had waited for its key, then the log from the scan on
settle   plan (gate.py) ──▶ one transaction (settling.py) ──▶ the gate learns what is free, held or lost
"""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Sequence
from pathlib import Path

from trilogue.errors import LeaseLost, Rejected, TrilogueError, UnknownEvent
from trilogue.events import Delivery, Envelope, Group, InTransaction, Lease, Record, Settlement, now_us
from trilogue.gate import NEVER_US, Gate, Generation, Plan
from trilogue.stores import append, claiming, groups, log, members, settling
from trilogue.stores.database import Database
from trilogue.stores.dialect import Sql, clock_us
from trilogue.stores.writer import Again, resolve

SCAN_BYTES = 16 << 20
NOTICE_ROWS = 1_000
logger = logging.getLogger("trilogue")
_Held = tuple[list[tuple[str, int, int]], list[tuple[int, int, int]]]  # as claiming.held_index() tells it
_Report = tuple[members.Attendance, _Held | None]


class _Bound:
    """One group this process knows: its definition, its gate, and what wakes its claim."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.gate = Gate(group.name, ordered=group.ordered)
        self.group_id = 0
        self.revision: int | None = -1
        self.paused = False
        self.works = False
        self.is_aside = False
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
        self.effects = settling.Effects(
            db.transaction, db.set_deadline, db.in_transaction, db.translate, self._check, db.writer_types.forget
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
        await self._db.write(lambda sql: groups.bind(sql, bound_groups, now_us(), work=work))
        self.wake_all()
        for group in bound_groups:
            known = self._bound.get(group.name)
            if known is not None and work and groups.definition(known.group) != groups.definition(group):
                self.forget(group.name)
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

    def _clock_us(self, sql: Sql) -> int:
        """The clock the leases in the store go by."""
        return clock_us(sql) if sql.dialect.clock else machine_us()

    def _renew(self, sql: Sql) -> None:
        """In the writer's thread, so that a blocked loop does not cost the lease."""
        if not self.works:
            return
        until_us = machine_us() + self.lease_us  # before it is asked: here it ends no later than in the store
        ours = members.renew(sql, self._member, self._clock_us(sql) + self.lease_us)
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

        known = [(b.revision, {slot: lease.epoch for slot, lease in b.gate.leases.items()}) for b in working]
        generations = [bound.gate.generation for bound in working]

        def report(sql: Sql) -> list[_Report | None]:
            return [self._reported(sql, b, give_up[b.group.name], *knew) for b, knew in zip(working, known, strict=True)]

        def finish(reports: list[_Report | None] | None, error: Exception | None) -> None:
            # At once, not when whoever waits for it wakes: what was settled later must not be in the gate before it.
            for bound, generation, found in zip(working, generations, reports or (), strict=False):
                self._learn(bound, generation, found)
            self.wake_all()
            resolve(done, error)

        done = self._db.writer.future()
        self._db.writer.post(report, finish, rows=64 * len(working))
        await done

    def _reported(
        self, sql: Sql, bound: _Bound, give_up: Sequence[int], revision: int | None, epochs: dict[int, int]
    ) -> _Report | None:
        """Report for one group, and read what is held if that is not known; revision, epochs: what is known of it."""
        attendance = members.attend(
            sql, bound.group, self._member, self._clock_us(sql), self.lease_us, give_up, bound.gate.out, self._rate(bound)
        )
        if attendance is None:
            return None
        slots = [slot for slot, *_ in attendance.slots]
        is_known = attendance.revision == revision and all(epochs.get(slot) == epoch for slot, epoch, *_ in attendance.slots)
        if is_known or not slots:
            return attendance, None
        return attendance, claiming.held_index(sql, attendance.group_id, slots, ordered=bound.group.ordered)

    def _learn(self, bound: _Bound, generation: Generation, found: _Report | None) -> None:
        if found is None:  # it was dropped: nothing of it is ours any more, and the other groups go on
            bound.gate.reset()
            bound.revision = None
        elif found[0].superseded:
            self._stand_aside(bound, found[0].revision)
        elif bound.gate.generation is generation:
            self._take_over(bound, *found)
        else:  # it began anew while the report was written: what the report says may be older than what was undone
            self.attend_now.set()

    def _stand_aside(self, bound: _Bound, revision: int) -> None:
        bound.gate.reset()
        bound.revision = revision
        if bound.is_aside:
            return
        bound.is_aside = True
        logger.warning(
            "group %s: a program started later reads other events as this group, or reads them otherwise; this one takes nothing "
            "of it until one that reads the same as it is started again, and can be ended",
            bound.group.name,
        )

    def _rate(self, bound: _Bound) -> float:
        at, finished = bound.finished_at
        now = time.monotonic()
        bound.finished_at = (now, bound.finished)
        return (bound.finished - finished) / max(now - at, 0.001)

    def _take_over(self, bound: _Bound, attendance: members.Attendance, held: _Held | None) -> None:
        """Bring the gate in line with what the store says we own."""
        if bound.is_aside:
            bound.is_aside = False
            logger.info("group %s: this program works for it again", bound.group.name)
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
        bound.group_id, bound.revision, bound.paused = attendance.group_id, attendance.revision, attendance.paused
        gate.epoch = attendance.epoch
        if held is not None:
            gate.learn_held(*held)
            gate.scan = gate.scan if attendance.inbox is None else attendance.inbox  # what is known goes so far
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
            deliveries = await self._lend(bound, limit)
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
        lent: list[Delivery] = []
        try:
            if not bound.paused and bound.gate.leases:
                await self._lend_more(bound, limit, lent)
        except BaseException:  # kept for the next claim, whose limit may be smaller, the deliveries of a key could be parted
            self._release(bound, lent)
            raise
        return lent

    def _release(self, bound: _Bound, deliveries: Sequence[Delivery]) -> None:
        """Hand back what a claim had lent when it was cancelled or failed."""
        ours = [delivery for delivery in deliveries if not delivery.lease.revoked]
        if not ours:
            return
        released = [Settlement(delivery, "release") for delivery in ours]
        with contextlib.suppress(TrilogueError):
            # If it fails the gate begins anew, and nobody waits for the answer.
            self._submit(bound, bound.gate.plan(ours), (), released).add_done_callback(asyncio.Future.exception)

    async def _lend_more(self, bound: _Bound, limit: int, lent: list[Delivery]) -> None:
        gate = bound.gate
        if bound.group.inbox:
            while not gate.is_full and await self._notice(bound):
                pass
            await self._lend_held(bound, limit, lent)
            return
        await self._lend_held(bound, -(-limit // 2), lent)
        flush = gate.flush()
        if flush is not None:
            await self._flush(bound, flush)  # and wakes the claim: what it wrote can be lent
        lent += gate.take_ready(limit - len(lent))
        at_end = False
        while len(lent) < limit and not gate.is_full and not at_end:
            at_end = await self._scan(bound, limit - len(lent), lent)
        if gate.lags_behind_scan and (plan := gate.sync()) is not None:
            await self._flush(bound, plan)

    async def _notice(self, bound: _Bound) -> bool:
        """Learn of the held rows that came to a broker's group; returns whether there may be more."""
        gate = bound.gate
        generation, after, group_id = gate.generation, gate.scan, bound.group_id
        rows = await self._db.glance(lambda sql, _: claiming.held_after(sql, group_id, after, limit=NOTICE_ROWS))
        if gate.generation is not generation or gate.scan != after:
            return False
        gate.notice(rows)
        return len(rows) == NOTICE_ROWS

    async def _lend_held(self, bound: _Bound, limit: int, lent: list[Delivery]) -> None:
        gate, now = bound.gate, now_us()
        if gate.next_due_us() > now or limit <= 0:
            return
        knowledge, group_id = gate.knowledge, bound.group_id
        keys = [(name, gate.keys[name]) for name in gate.due_keys(now, limit)]
        try:
            named = [(key.slot, name) for name, key in keys]
            found = await self._db.glance(lambda sql, types: claiming.held_of_keys(sql, types, group_id, named, limit=limit))
        except BaseException:
            gate.still_due((name for name, _ in keys), ())
            raise
        if gate.knowledge is not knowledge:  # it has learnt anew what is held, and takes nothing from what was read before
            return
        for (name, key), rows in zip(keys, found, strict=True):
            if gate.keys.get(name) is key and key.can_load:
                lent += gate.lend_key(name, rows, now)
        await self._lend_loose(bound, limit - len(lent), now, lent)

    async def _lend_loose(self, bound: _Bound, limit: int, now: int, lent: list[Delivery]) -> None:
        gate = bound.gate
        loose = gate.due_loose(now, limit)
        if not loose:
            return
        knowledge, group_id = gate.knowledge, bound.group_id
        try:
            rows = await self._db.glance(
                lambda sql, types: claiming.held_at(sql, types, group_id, [position for _, position, _ in loose], now)
            )
        except BaseException:
            gate.still_due((), loose)
            raise
        if gate.knowledge is knowledge:
            lent += gate.lend_loose(rows)

    async def _scan(self, bound: _Bound, limit: int, lent: list[Delivery]) -> bool:
        """Read on in the log and lend what may go out; returns whether the end was reached."""
        gate = bound.gate
        generation, after, slots = gate.generation, gate.scan, list(gate.leases)

        def look(sql: Sql, types: log.Types) -> tuple[list[tuple[int, Record]], int, int]:
            head, newest_type = log.extent(sql)
            if after >= head:
                return [], after, head
            kinds = self._kinds(bound, sql, types, newest_type)
            most = max(1, min(limit, SCAN_BYTES // gate.record_bytes))
            return *claiming.scan(sql, types, after=after, head=head, limit=most, slots=slots, kinds=kinds), head

        records, end, head = await self._db.glance(look)
        if end == after:
            return True
        if records:
            gate.record_bytes = 1 + sum(len(record.data) for _, record in records) // len(records)
        else:
            await asyncio.sleep(0)  # a long way without a match must not hold up everybody else
        # Of a slot that came meanwhile nothing was read: going on from `end` would leave it out for ever.
        if gate.generation is not generation or gate.scan != after or list(gate.leases) != slots or bound.paused:
            return bound.paused or not gate.leases
        lent += gate.admit(records, end)
        return end >= head

    def _kinds(self, bound: _Bound, sql: Sql, types: log.Types, newest_type: int) -> list[int]:
        if newest_type not in types.by_number:
            types.load(sql)
        if bound.kinds_of != len(types.by_number):
            bound.kinds_of = len(types.by_number)
            bound.kinds = types.matching(bound.group.patterns)
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
        return self._settled(self._submit(bound, plan, early, rest), lost)

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
    ) -> "asyncio.Future[list[Delivery]]":
        done = self._db.writer.future()

        def write(sql: Sql) -> settling.Settled:
            try:
                return settling.settle(
                    sql, self._db.writer_types, self.effects, bound.group_id, self._member, plan, early, rest, now_us()
                )
            except Again:
                self._db.writer_types.forget()
                raise

        def finish(settled: settling.Settled, error: Exception | None) -> None:
            # In the order of the commits, and whether or not somebody still waits for the answer.
            if error is None:
                self._committed(bound, plan, len(early), settled)
                resolve(done, settled.lost)
                return
            self._restart(bound, plan)
            everything = [delivery for answer in (*early, *rest) for delivery in _deliveries(answer)]
            resolve(done, everything if isinstance(error, LeaseLost) else error)

        def at_once(sql: Sql) -> settling.Settled | None:
            return settling.settle_at_once(sql, bound.group_id, self._member, plan, early)

        is_plain = not (rest or plan.rows or plan.followers or any(settlement.emits for settlement in early))
        try:
            self._db.writer.post(
                write,
                finish,
                rows=_weight(plan, early, rest),
                broke=lambda: self._broke(plan),
                at_once=at_once if is_plain and self._db.sql.dialect.move else None,
            )
        except TrilogueError:
            self._broke(plan)  # the gate has moved on already: it begins anew from what is stored
            self._restart(bound, plan)
            raise
        return done

    def _committed(self, bound: _Bound, plan: Plan, early: int, settled: settling.Settled) -> None:
        bound.gate.committed(plan, settled.settlements, now_us())
        bound.finished += early + len(settled.settlements)
        self.changed.set()
        bound.wake.set()
        if settled.emitted:
            self.wake_all()

    async def _settled(self, done: "asyncio.Future[list[Delivery]]", lost: list[Delivery]) -> list[Delivery]:
        return lost + await asyncio.shield(done)

    async def _flush(self, bound: _Bound, plan: Plan) -> None:
        """Write rows and cursors without an answer to anything."""
        await asyncio.shield(self._submit(bound, plan, (), ()))

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
        append.check_envelope(envelope, self._payload_bytes, takes_nul=self._db.sql.dialect.takes_nul)


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
