"""One group that a broker delivers to and a store stands beside: what it received, lends, and what becomes of the answers.

broker ──receive──▶ KeyedGate ──┬─▶ claim            fresh: nothing of it is in the store
store  ──claim────▶ held ───────┘                    held: rows of the store, lent by its own machinery
                        │ key held in the store
                        └──▶ divert ──▶ row, acknowledged

done                   acknowledge
done, with emits       publish, confirmed, then acknowledge; the key is out until then
retry, dead            a row in the store, committed, then acknowledge; then the key is the store's
release                back to the gate, as if never lent
InTransaction          effects, emits, rows and place in one transaction of the store, then acknowledge
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from trilogue.brokers.answers import Answers, after_publish, dead_of, deliveries_of
from trilogue.brokers.held import Held, make_fit
from trilogue.brokers.keyed import KeyedGate
from trilogue.errors import LeaseLost
from trilogue.events import Delivery, Group, InTransaction, Receipt, Settlement
from trilogue.outcomes import Answer
from trilogue.ports import Broker, InboxStore, Place
from trilogue.relay import Outcome, Publish, confirmed, is_refused

WAIT_S = 60.0
PAUSED_LOOK_S = 0.25
NOTHING_S = 0.01
DIVERT_RECORDS = 1_000
LANE_RECORDS = 200
BACKOFF_S = 1.0
STOP_S = 5.0

log = logging.getLogger("trilogue")


class Reader:
    """One group of one process. places: whether its place is kept in the store; epochs: of its lanes, by name.

    publish: puts what handlers emit on the broker, one outcome each. rejoin: has its lanes assigned anew.
    """

    def __init__(
        self,
        broker: Broker,
        store: InboxStore,
        group: Group,
        publish: Publish,
        *,
        places: bool,
        epochs: dict[str, int],
        rejoin: Callable[[Group], Awaitable[None]],
    ) -> None:
        self.group = group
        self.name = group.name
        self.finished = 0
        self._broker, self._store, self._publish = broker, store, publish
        self._places, self._epochs = places, epochs
        self._rejoin, self._joining = rejoin, asyncio.Lock()
        self._gate = KeyedGate(ordered=group.ordered)
        self._held = Held(store.inbox, group, self._gate)
        self._rows: list[Delivery] = []
        self._limit = 0
        self._held_first = False
        self._wake, self._room, self._check = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._open: set[asyncio.Future[list[Delivery]]] = set()
        self._emitting = asyncio.Lock()
        self._loops: list[asyncio.Task[None]] = []
        self._aside: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Begin to receive, once somebody claims; also again, after it stood aside."""
        self._aside = None
        self._loops.clear()
        for step in (self._receive, self._claim_held, self._divert):
            self._loops.append(asyncio.create_task(self._forever(step), name=f"trilogue {self.name} {step.__name__[1:]}"))

    async def stop(self) -> None:
        """Receive no more, and let what is being settled end; what is here then is the broker's and the store's again."""
        self._stopping = True
        self._room.set()
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, *filter(None, [self._aside]), return_exceptions=True)
        if self._open:
            await asyncio.wait(self._open, timeout=STOP_S)
        self._gate.clear()
        self._rows.clear()

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except Exception as error:  # whatever it is: a group that ends in silence is worse than one that tries again
                log.warning("group %s: %s failed, trying again in %.0f s: %s", self.name, step.__name__[1:], BACKOFF_S, error)
                await asyncio.sleep(BACKOFF_S)

    @property
    def may_come_back(self) -> bool:
        """Whether it stood aside for a program that read something else as this group, and none does any more."""
        return self._aside is not None and self._aside.done() and not self._held.is_superseded

    @property
    def is_idle(self) -> bool:
        """Whether nothing is here, lent or being settled."""
        return self._gate.is_idle and not (self._open or self._rows)

    @property
    def out(self) -> int:
        """How many deliveries are lent."""
        return self._gate.out

    # ── claim ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def claim(self, limit: int, wait_s: float) -> list[Delivery]:
        """Lend up to `limit` deliveries, all fresh or all held, waiting up to `wait_s` for the first."""
        self._limit = limit
        self._room.set()
        until = time.monotonic() + wait_s
        while True:
            self._wake.clear()
            deliveries = self._lend(limit)
            left_s = until - time.monotonic()
            if deliveries or left_s <= 0 or self._stopping:
                return deliveries
            # Nothing is lost to a cancellation here: what is received and not lent stays in the gate.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._wake.wait()

    def _lend(self, limit: int) -> list[Delivery]:
        if self._held.is_paused or self._held.is_superseded:
            return []
        self._held_first = not self._held_first  # in turn, so that neither side starves the other
        if self._held_first:
            lent = self._lend_held(limit) or self._gate.take(limit)
        else:
            lent = self._gate.take(limit) or self._lend_held(limit)
        self._room.set()
        if self._gate.has_checks:
            self._check.set()
        return lent

    def _lend_held(self, limit: int) -> list[Delivery]:
        self._rows = [delivery for delivery in self._rows if not delivery.lease.revoked]
        may = [delivery for delivery in self._rows if self._gate.may_lend(delivery)]
        if not may:
            return []
        lent = _first_of_each(may, limit) if self.group.ordered else may[:limit]
        self._gate.lend_held(lent)
        # What follows of a key that is lent goes back: how the first of it ends decides about it.
        keys = {delivery.record.key for delivery in lent} - {None} if self.group.ordered else set()
        gone = set(map(id, lent))
        rest = [delivery for delivery in self._rows if id(delivery) not in gone]
        self._return_held([delivery for delivery in rest if delivery.record.key in keys])
        self._rows = [delivery for delivery in rest if delivery.record.key not in keys]
        return lent

    def _return_held(self, deliveries: Sequence[Delivery]) -> None:
        if deliveries:
            settling = self._store.settle(self.name, [Settlement(delivery, "release") for delivery in deliveries])
            self._begin(settling)

    # ── what comes in ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _receive(self) -> None:
        """Receive what there is room for."""
        while not (0 < self._limit > self._gate.ready and not self._gate.is_full):
            await self._hand_over()
            self._room.clear()
            await self._room.wait()
        if not self._held.is_known:  # it may have been paused before
            await self._held.look()
        if self._held.is_paused:
            await self._rest()
        # A lane that is ours alone is received in larger parts: each is one look, and maybe one transaction, of the store.
        limit = max(self._limit, LANE_RECORDS if self.group.ordered else 1) - self._gate.ready
        deliveries = await self._ask(limit, WAIT_S)
        await self._look_surely()  # after it was received, so that what a former owner of its lane has held before is known
        if self._held.is_superseded:  # not lent: it goes to whom the group belongs to
            return
        if deliveries:
            self._admit(deliveries)
        else:
            await self._hand_over()
            await asyncio.sleep(NOTHING_S)  # a broker that answers "nothing" at once must not stop the event loop

    async def _ask(self, limit: int, wait_s: float) -> list[Delivery]:
        """Receive. What was passed over before is finished by this, so not once another program reads more as this group."""
        if self._held.is_superseded:
            await asyncio.get_running_loop().create_future()  # until this is cancelled
        return await self._broker.receive(self.name, limit=limit, wait_s=wait_s)

    async def _hand_over(self) -> None:
        """Hand back what waits here of lanes that are about to go: what is begun now would be handled elsewhere once more."""
        if going := self._gate.drop_lost():
            await self._broker.release(self.name, going)

    async def _rest(self) -> None:
        """Receive nothing while the group is paused."""
        await self._broker.pause(self.name)
        try:
            while self._held.is_paused:
                await asyncio.sleep(PAUSED_LOOK_S)
                await self.look()
                await self._ask(0, 0)  # what it passes over
        finally:
            await self._broker.resume(self.name)
        self._wake.set()

    async def _look_surely(self) -> None:
        said = ""
        while True:
            try:
                return await self.look()
            except Exception as error:  # what was received cannot be received again: who is held must be known before it goes on
                if str(error) != said:
                    log.warning("group %s: looking into the store beside it failed, trying again: %s", self.name, error)
                said = str(error)
                await asyncio.sleep(BACKOFF_S)

    def _admit(self, deliveries: list[Delivery]) -> None:
        make_fit(deliveries, takes_nul=self._store.takes_nul)
        self._held.mark_replay(deliveries)
        self._gate.admit(deliveries)
        if self._gate.has_checks:
            self._check.set()
        self._wake.set()

    async def look(self) -> None:
        """Something may have changed in the store."""
        await self._held.look()
        if self._held.is_superseded and self._aside is None:
            self._aside = asyncio.create_task(self._stand_aside(), name=f"trilogue {self.name} stand aside")
        self._free()

    async def _stand_aside(self) -> None:
        """Receive no more: what a newer program reads as this group would be passed over here."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._gate.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                while (self._gate.out or self._open) and not self._stopping:
                    self._room.clear()
                    await self._room.wait()
        async with self._joining:
            await self._broker.unbind(self.name)
        self._gate.clear()
        self._rows.clear()

    async def _claim_held(self) -> None:
        """Have a few held records at hand."""
        while not self._limit or self._rows:
            self._room.clear()
            await self._room.wait()
        deliveries = await self._store.claim(self.name, limit=self._limit, wait_s=WAIT_S)
        self._held.mark_replay(deliveries)
        self._rows += deliveries
        self._wake.set()

    async def _divert(self) -> None:
        """Look up keys that may be held, and put what follows of them behind their rows."""
        await self._check.wait()
        self._check.clear()
        while checks := self._gate.begin_checks(DIVERT_RECORDS):
            # A task of its own: stopped between the commit and the acknowledgement, they would come here and there.
            await asyncio.shield(self._begin(self._put_behind(checks)))

    async def _put_behind(self, checks: Sequence[Delivery]) -> list[Delivery]:
        """Those whose key is held become rows, in one transaction with the look, and are acknowledged."""
        live = [delivery for delivery in checks if not delivery.lease.revoked]
        held = dict.fromkeys((id(delivery) for delivery in checks), False)
        try:
            if live:
                held.update(zip(map(id, live), await self._held.divert(live), strict=True))
        except BaseException:
            self._check.set()  # they come back and are looked up again
            raise
        finally:
            gone = self._back_from_check(checks, held)
        return await self._broker.acknowledge(self.name, gone)

    def _back_from_check(self, checks: Sequence[Delivery], held: dict[int, bool]) -> list[Delivery]:
        """Who is held is gone, the others are as they were; returns those that are gone."""
        gone = [delivery for delivery in checks if held[id(delivery)]]
        for delivery in checks:
            if held[id(delivery)]:
                self._gate.finish(delivery)
            else:
                self._gate.give_back(delivery)
        self._free()
        return gone

    def _free(self) -> None:
        """Some key or some room is free."""
        self._wake.set()
        self._room.set()
        if self._gate.has_checks:
            self._check.set()

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def settle(self, answers: Sequence[Answer]) -> Awaitable[list[Delivery]]:
        """Answer deliveries; keys of those done are free at once, the awaitable returns those whose lane or lease was lost."""
        plan = self._sorted(answers)
        self._free()
        # A task of its own: whoever waits for it may be cancelled between the commit and the acknowledgement.
        return asyncio.shield(self._begin(self._carry_out(plan)))

    def _begin(self, settling: Awaitable[list[Delivery]]) -> "asyncio.Future[list[Delivery]]":
        task = asyncio.ensure_future(settling)
        self._open.add(task)
        task.add_done_callback(self._carried_out)
        return task

    def _sorted(self, answers: Sequence[Answer]) -> Answers:
        plan = Answers()
        for answer in answers:
            if isinstance(answer, InTransaction):
                self._sort_inside(plan, answer)
                continue
            delivery = answer.delivery
            if delivery.is_held:
                plan.held.append(answer)
            elif delivery.lease.revoked:
                self._gate.finish(delivery)
                plan.lost.append(delivery)
            elif answer.verdict == "release":
                self._sort_back(plan, delivery)
            elif answer.verdict != "done":
                plan.stored.append(answer)
            else:
                plan.done.append(answer)
                if answer.emits:
                    plan.emits = True
                else:
                    self._gate.finish(delivery)
        return plan

    def _sort_back(self, plan: Answers, delivery: Delivery) -> None:
        if delivery.lease.lost:  # its lane is about to go
            self._gate.finish(delivery)
            plan.back.append(delivery)
        else:
            self._gate.give_back(delivery)

    def _sort_inside(self, plan: Answers, work: InTransaction) -> None:
        if work.deliveries[0].is_held:  # a claim lends one kind only
            plan.held.append(work)
        elif any(delivery.lease.revoked for delivery in work.deliveries):
            # A batch can be lost in part: what is still ours of it is handled again.
            plan.lost += [delivery for delivery in work.deliveries if delivery.lease.revoked]
            self._hand_back([work])
        else:
            plan.stored.append(work)

    def _carried_out(self, task: "asyncio.Future[list[Delivery]]") -> None:
        self._open.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("group %s: %s", self.name, error)  # told to who settles; rows handed back have nobody who waits
        self._free()

    async def _carry_out(self, plan: Answers) -> list[Delivery]:
        steps: list[Awaitable[list[Delivery]]] = []
        if plan.emits or (plan.done and self._emitting.locked()):
            steps.append(self._emit(plan.done))
        elif plan.done:
            steps.append(self._done([settlement.delivery for settlement in plan.done]))
        if plan.stored:
            steps.append(self._keep(plan.stored))
        if plan.held:
            steps.append(self._settle_held(plan.held))
        if plan.back:
            await self._broker.release(self.name, plan.back)
        if len(steps) == 1:
            return plan.lost + await steps[0]
        results = await asyncio.gather(*steps, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return plan.lost + [delivery for result in results if not isinstance(result, BaseException) for delivery in result]

    async def _done(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        self.finished += len(deliveries)
        return await self._broker.acknowledge(self.name, deliveries) if deliveries else []

    async def _emit(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """Publish what handlers emitted; what is confirmed is acknowledged, what is not is handled again.

        One after the other, what emitted nothing too: nothing may be acknowledged before an earlier one of its key.
        """
        async with self._emitting:
            outcomes = await self._published(settlements)
            done, refused, lost = [], [], []
            for settlement, found in zip(settlements, outcomes, strict=True):
                if all(isinstance(outcome, Receipt) for outcome in found):
                    done.append(settlement)
                elif any(map(is_refused, found)):
                    refused.append(dead_of(settlement.delivery, found))
                else:
                    lost.append(settlement)
            self._hand_back(lost)
            for settlement in done:
                if settlement.emits:
                    self._gate.finish(settlement.delivery)
            self._free()
            not_acknowledged = await self._done([settlement.delivery for settlement in done])
        not_kept = await self._keep(refused) if refused else []
        return [*(settlement.delivery for settlement in lost), *not_acknowledged, *not_kept]

    async def _published(self, settlements: Sequence[Settlement]) -> list[list[Outcome]]:
        """What became of the emits of each."""
        owners = [n for n, settlement in enumerate(settlements) for _ in settlement.emits]
        envelopes = [envelope for settlement in settlements for envelope in settlement.emits]

        def lost(n: int) -> bool:
            return self._stopping or settlements[owners[n]].delivery.lease.lost

        found: list[list[Outcome]] = [[] for _ in settlements]
        for owner, outcome in zip(owners, await confirmed(self._publish, envelopes, lost=lost), strict=True):
            found[owner].append(outcome)
        return found

    async def _keep(self, answers: Sequence[Answer]) -> list[Delivery]:
        """Rows, effects and places in one transaction of the store; then acknowledge."""
        deliveries = [delivery for answer in answers for delivery in deliveries_of(answer)]
        try:
            places = self._places_after if self._places else None
            inside = any(isinstance(answer, InTransaction) for answer in answers)
            # By ids also where there are places: what was published again, or emitted again, is at another place.
            taken = await self._store.inbox.settle(self.name, answers, places=places, seen=inside)
        except LeaseLost as error:
            log.info("group %s: %s", self.name, error)
            try:
                await asyncio.sleep(BACKOFF_S)  # until the broker says so too: then they are no longer here
                await self._join_anew(deliveries)
            finally:
                self._hand_back(answers)
            return deliveries
        except BaseException:
            # Not at once: what the store cannot take now is handled again.
            await asyncio.sleep(0 if self._stopping else BACKOFF_S)
            self._hand_back(answers)
            raise
        self._held.note(taken.before, taken.after)
        settled = [settlement.delivery for settlement in taken.settlements]
        self._gate.learn(s.delivery.record.key for s in taken.settlements if s.holds_key and s.delivery.record.key is not None)
        for delivery in settled:
            self._gate.finish(delivery)
        for delivery in taken.again:
            self._gate.give_back(delivery)
        self._free()
        self.finished += sum(settlement.verdict == "done" for settlement in taken.settlements)
        return await self._broker.acknowledge(self.name, settled)

    async def _join_anew(self, deliveries: Sequence[Delivery]) -> None:
        """The store has a later assignment than ours, and the broker still gives us the lane: another process was assigned it
        before us, and slow to say so. Who asks now is the later one again."""
        async with self._joining:
            if not self._stopping and self._aside is None and any(not delivery.lease.lost for delivery in deliveries):
                await self._rejoin(self.group)

    def _places_after(self, deliveries: Sequence[Delivery]) -> list[Place]:
        found = self._broker.progress(self.name, deliveries)
        return [Place(progress, self._epochs.get(progress.lane, -1)) for progress in found]

    def _hand_back(self, answers: Sequence[Answer]) -> None:
        """Nothing came of these: they are handled again, and what follows of their keys after them."""
        for answer in answers:
            for delivery in deliveries_of(answer):
                self._gate.give_back(delivery)
            if isinstance(answer, InTransaction):
                answer.settlements = [Settlement(delivery, "release") for delivery in answer.deliveries]
        self._free()

    async def _settle_held(self, answers: Sequence[Answer]) -> list[Delivery]:
        """Settle rows of the store; what their handlers emitted goes to the broker first, as that of fresh ones does."""
        try:
            emitting = [each for each in answers if isinstance(each, Settlement) and each.emits and each.verdict == "done"]
            if emitting:
                outcomes = dict(zip(map(id, emitting), await self._published(emitting), strict=True))
                answers = [after_publish(each, outcomes.get(id(each), ())) for each in answers]
            return await self._store.settle(self.name, answers)
        finally:
            for answer in answers:
                for delivery in deliveries_of(answer):
                    self._gate.finish(delivery)


def _first_of_each(deliveries: Sequence[Delivery], limit: int) -> list[Delivery]:
    """At most `limit` of them in order, the first of each key before what follows it: many keys go on rather than one far."""
    seen: set[str] = set()
    heads: list[Delivery] = []
    rest: list[Delivery] = []
    for delivery in deliveries:
        key = delivery.record.key
        (rest if key in seen else heads).append(delivery)
        if key is not None:
            seen.add(key)
    chosen = set(map(id, [*heads, *rest][:limit]))
    return [delivery for delivery in deliveries if id(delivery) in chosen]
