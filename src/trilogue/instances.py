"""Processes on the log: the subscription that runs the instances of a class, and the list of them.

record ──▶ which instance? ──▶ its state, as it is in this transaction ──▶ step ──▶ state, timers, emits ──┐
                                                                   "this record is done", the cursor ──────┴─▶ one commit

"process" | "transfer"       {"group": "process.transfer", "key": "transfer"}                 what was registered
"process:transfer" | "t1"    {"version": …, "started_us": …, "timers": {…}, "state": {…}}     an instance
"""

import dataclasses
import functools
import operator
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, cast

import msgspec

from trilogue.durations import Duration, microseconds, readable
from trilogue.errors import DecodeError, OrphanedGroup, Reject, TrilogueError, TwiceNamed, UnknownEvent, Unsupported
from trilogue.events import KEY_CHARS, Envelope, Record, as_datetime, caused_id, now_us
from trilogue.handlers import Context, Subscription, subscription
from trilogue.ports import Db, Feature, Store, Transaction
from trilogue.process import TIMER_TYPE, Due, Process, Reaction, Wiring, reaction_of, wiring_of
from trilogue.retry import Retry

REGISTERED = "process"
LISTED = 1_000
PAGE = 1_000
MOST_FAILING = 10_000
SEPARATOR = "\x1f"


class _Pending(msgspec.Struct):
    """A timer an instance waits for. id: of the envelope that will come; another one is a timer of before."""

    id: str
    due_us: int


class _Kept(msgspec.Struct):
    """An instance as it is stored."""

    version: str
    started_us: int
    changed_us: int
    position: int
    events: int
    timers: dict[str, _Pending]
    state: msgspec.Raw


class _Fired(msgspec.Struct):
    """The data of a timer's envelope."""

    process: str
    id: str
    timer: str


class _Registered(msgspec.Struct):
    """Where the failed records of a process are, and how they name the instance."""

    group: str
    key: str


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def process_subscription(
    model: Any,
    *,
    app: str = "trilogue",
    group: str | None = None,
    retry: Retry | None = None,
    start: Literal["now", "beginning"] = "now",
    on_dead: Literal["skip", "park"] = "park",
) -> Subscription:
    """One group for all instances of a Process class; raises a WiringError that names what is wrong with it."""
    wiring = wiring_of(model)

    def handle(event: Any, db: Db, ctx: Context) -> Sequence[object]:
        return _handle(wiring, app, event, cast("Transaction", db), ctx)

    handle.__module__, handle.__qualname__ = model.__module__, model.__qualname__
    handle.__annotations__ = {"event": functools.reduce(operator.or_, wiring.steps), "db": Db, "ctx": Context}
    sub = subscription(
        handle,
        app=app,
        group=wiring.group if group is None else group,
        retry=retry,
        start=start,
        on_dead=on_dead,
        reset=lambda db: _reset(wiring, cast("Transaction", db)),
    )
    patterns = (*sub.group.patterns, *([wiring.timer_type] if wiring.timers else []))
    return dataclasses.replace(sub, group=dataclasses.replace(sub.group, patterns=patterns), whole=True)


def process_subscriptions(processes: Sequence[tuple[type[Process], dict[str, Any]]], app: str) -> list[Subscription]:
    """The subscriptions of several classes; raises TwiceNamed for two of one name, which would share their states."""
    subs: list[Subscription] = []
    named: dict[str, type[Process]] = {}
    for model, options in processes:
        subs.append(process_subscription(model, app=app, **options))
        other = named.setdefault(model.process_name, model)
        if other is not model:
            both = f"{other.__qualname__} and {model.__qualname__}"
            raise TwiceNamed(f"two processes have the name {model.process_name!r}, {both}: give each its own with name=")
    return subs


def registration(model: Any, group: str | None) -> Callable[[Db], None]:
    """What notes, at the start of a program, how the instances of this class are found by others."""

    def register(db: Db) -> None:
        tx, wiring = cast("Transaction", db), wiring_of(model)
        body = msgspec.json.encode(_Registered(wiring.group if group is None else group, model.process_key))
        known = tx.state(REGISTERED, wiring.name)
        if known is not None and known != body:
            _refuse_renamed(tx, wiring, msgspec.json.decode(known, type=_Registered))
        if known != body:
            tx.set_state(REGISTERED, wiring.name, body)

    return register


def _refuse_renamed(tx: Transaction, wiring: Wiring, known: "_Registered") -> None:
    """Another group would read again what the instances that are there have counted already."""
    if tx.execute("select 1 from trilogue_state where owner = ? limit 1", (wiring.owner,)):
        raise OrphanedGroup(
            f"process {wiring.name!r} has instances that group {known.group!r} with key {known.key!r} has brought so far: "
            f"give it group={known.group!r} and key={known.key!r} again, or wait until they have ended"
        )


_PAGE = "select id, body from trilogue_state where owner = ? and id > ? order by id limit 1000"


def _reset(wiring: Wiring, tx: Transaction) -> None:
    """Before a replay in place: all instances go, because the log makes them anew, if it still can."""
    position, recorded_us = tx.removed()  # not the oldest that is left: records of streams stay when all around them goes
    id = _begun_before(tx, wiring.owner, recorded_us)
    if id is not None:
        raise Unsupported(
            f"{wiring.name} {id} began before position {position + 1}, and records below it were removed from the log: a replay "
            "would lose it; wait until it has ended"
        )
    tx.clear_states(wiring.owner)


def _begun_before(tx: Transaction, owner: str, at_us: int) -> str | None:
    """The id of an instance that began no later than a moment."""
    after = ""
    while rows := tx.execute(_PAGE, (owner, after)):
        for id, body in rows:
            if msgspec.json.decode(body, type=_Kept).started_us <= at_us:
                return str(id)
        after = rows[-1][0]
    return None


def _handle(wiring: Wiring, source: str, event: Any, tx: Transaction, ctx: Context) -> Sequence[object]:
    """One record, in the settlement's transaction; returns what goes onto the log with it."""
    id, said = _addressed(wiring, event)
    if id is None:
        return ()
    body = tx.state(wiring.owner, id)
    kept = None if body is None else msgspec.json.decode(body, type=_Kept)
    if isinstance(said, Due):
        if kept is None or said.name not in kept.timers or kept.timers[said.name].id != ctx.record.id:
            return ()  # it was moved or forgotten meanwhile, or the instance has ended
        del kept.timers[said.name]
    step = wiring.step_for(said)
    if kept is None and not step.starts:
        return ()
    state = None if kept is None else _state(wiring, id, kept)
    try:
        reaction = reaction_of(wiring, state, said, id)
        _keep(wiring, source, tx, ctx, id, kept, reaction)
    except Exception as error:
        where = f"step {step.name} of {wiring.name} {id}"
        if where not in getattr(error, "__notes__", ()):
            error.add_note(where)
        raise
    return reaction.emits


def _addressed(wiring: Wiring, event: Any) -> tuple[str | None, object]:
    """The instance an event is for, None for nobody; and what it is to its step: itself, or Due for a timer."""
    if isinstance(event, Record):
        try:
            fired = msgspec.json.decode(event.data, type=_Fired)
        except msgspec.MsgspecError as error:
            raise DecodeError(f"not a timer of process {wiring.name!r}: {error}") from error
        return fired.id, Due(fired.timer)
    id = wiring.instance[type(event)](event)
    if id is not None and not 0 < len(id) <= KEY_CHARS:
        raise Reject(f"it names an instance of process {wiring.name!r} with {len(id)} characters: expected 1 to {KEY_CHARS}")
    return id, event


def _state(wiring: Wiring, id: str, kept: _Kept) -> Process:
    try:
        state: Process = wiring.decode(bytes(kept.state))
    except DecodeError as error:
        raise DecodeError(
            f"the state of {wiring.name} {id}, as written at position {kept.position}, does not fit the fields of "
            f"{wiring.model.__qualname__} any more: {error}. Let them read what was written, and redrive"
        ) from error
    return state


def _keep(wiring: Wiring, source: str, tx: Transaction, ctx: Context, id: str, kept: _Kept | None, reaction: Reaction) -> None:
    """Write what an instance has become, and its timers; a replay leaves the timers as they are."""
    record = ctx.record
    pending = {} if kept is None else kept.timers
    gone = list(pending) if reaction.ended else [name for name in reaction.cancels if name in pending]
    for name in gone:
        del pending[name]
        if not ctx.replay:
            tx.cancel(_timer_name(wiring, id, name))
    if reaction.ended:
        tx.set_state(wiring.owner, id, None)
        return
    for n, timer in enumerate(reaction.timers):
        # A replay cannot know when it was set first: the moment of its cause is as near as it gets.
        due_us = timer.due_us(record.recorded_us if ctx.replay else tx.now_us)
        envelope = _timer_envelope(wiring, source, record, id, timer.name, n, due_us)
        pending[timer.name] = _Pending(envelope.id, due_us)
        if not ctx.replay:
            tx.schedule(envelope, due_us, name=_timer_name(wiring, id, timer.name))
    now = _Kept(
        wiring.version,
        record.recorded_us if kept is None else kept.started_us,
        record.recorded_us,
        record.position,
        1 if kept is None else kept.events + 1,
        pending,
        msgspec.Raw(wiring.encode(reaction.state)),
    )
    tx.set_state(wiring.owner, id, msgspec.json.encode(now))


def _timer_name(wiring: Wiring, id: str, timer: str) -> str:
    return SEPARATOR.join((wiring.owner, timer, id))


def _timer_envelope(wiring: Wiring, source: str, cause: Record, id: str, timer: str, n: int, due_us: int) -> Envelope:
    # The id comes from the cause: a replay waits for the very timer that was set the first time. When it is due is no part of
    # the data, because one id has one content however often it is set.
    return Envelope(
        caused_id(cause.id, wiring.owner, timer, n),
        wiring.timer_type,
        msgspec.json.encode(_Fired(wiring.name, id, timer)),
        id,
        source,
        due_us,
        correlation_id=cause.correlation_id or cause.id,
        causation_id=cause.id,
        traceparent=cause.traceparent,
    )


# ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ProcessInstance:
    """One instance that has not ended.

    process: the name of its class. position: of the last record it took; events: how many. timers: due in microseconds, by
    name. state: its fields. problems: why it does not go on, a sentence each.
    """

    process: str
    id: str
    started_us: int
    changed_us: int
    position: int
    events: int
    timers: Mapping[str, int]
    state: Mapping[str, Any]
    problems: tuple[str, ...]

    @property
    def started(self) -> datetime:
        """When the log took the event that began it."""
        return as_datetime(self.started_us)

    @property
    def changed(self) -> datetime:
        """When the log took the last event it has handled."""
        return as_datetime(self.changed_us)


@dataclass(frozen=True, slots=True)
class _Failing:
    """A record a process's group has failed on."""

    id: str
    position: int
    recorded_us: int
    sentence: str


async def process_instances(
    store: Store, name: str | None = None, *, stuck: Duration | None = None, limit: int = LISTED
) -> list[ProcessInstance]:
    """Instances by process and id.

    name: of one process. stuck: only those with a record that failed, or without a change for so long and no timer to come.
    Raises UnknownEvent for a process the log does not have.
    """
    still_us = None if stuck is None else microseconds(stuck)
    found: list[ProcessInstance] = []
    registered = await _registered(store)
    for process in registered if name is None else [_known(name, registered)]:
        async for each in _instances(store, process, registered[process], still_us):
            if stuck is None or each.problems:
                found.append(each)
            if len(found) == limit:
                return found
    return found


async def process_instance(store: Store, name: str, id: str) -> ProcessInstance:
    """One instance; raises UnknownEvent for a process, TrilogueError for an instance that is not there."""
    registered = await _registered(store)
    failing = await _failing(store, _known(name, registered), registered[name])
    rows = await store.query("select body from trilogue_state where owner = ? and id = ?", (f"{REGISTERED}:{name}", id))
    mine = [each for each in failing if each.id == id]
    if not rows and not mine:
        raise TrilogueError(
            f"process {name!r} has no instance {id!r}: it has ended, or never began; see its events in the history"
        )
    return _shown(name, id, rows[0][0], mine, None) if rows else _unborn(name, id, mine)


async def refuse_beside(store: Store, group: str) -> None:
    """Raise Unsupported for the group of a process: its states belong to its name, a second group would count on in them."""
    if Feature.EFFECTS not in store.features:
        return  # a broker alone runs no processes
    for name, registered in (await _registered(store)).items():
        if registered.group == group:
            raise Unsupported(
                f"group {group!r} runs process {name!r}, whose instances are there once, and its App makes them anew: replay it "
                f"in place, with `trilogue replay {group} --to beginning --app MODULE:APP` and without into="
            )


def renamed(tx: Transaction, group: str, new: str) -> None:
    """A group has another name now: if it is a process's, its program looks for it there."""
    for name, body in tx.execute("select id, body from trilogue_state where owner = ?", (REGISTERED,)):
        registered = msgspec.json.decode(body, type=_Registered)
        if registered.group == group:
            tx.set_state(REGISTERED, name, msgspec.json.encode(_Registered(new, registered.key)))


async def _registered(store: Store) -> dict[str, _Registered]:
    return {state.id: msgspec.json.decode(state.body, type=_Registered) for state in await store.states(REGISTERED, limit=PAGE)}


def _known(name: str, registered: Mapping[str, _Registered]) -> str:
    if name in registered:
        return name
    names = f"it has {', '.join(registered)}" if registered else "it has none: a program with app.process(...) notes its own"
    raise UnknownEvent(f"process {name!r} is not on this log: {names}")


async def _instances(store: Store, process: str, registered: _Registered, still_us: int | None) -> AsyncIterator[ProcessInstance]:
    """By id; among them those whose very first event failed."""
    failing: dict[str, list[_Failing]] = {}
    for each in await _failing(store, process, registered):
        failing.setdefault(each.id, []).append(each)
    unborn = sorted(failing)
    after = ""
    while page := await store.states(f"{REGISTERED}:{process}", after=after, limit=PAGE):
        for state in page:
            while unborn and unborn[0] <= state.id:
                first = unborn.pop(0)
                if first != state.id:
                    yield _unborn(process, first, failing[first])
            yield _shown(process, state.id, state.body, failing.get(state.id, ()), still_us)
        after = page[-1].id
    for id in unborn:
        yield _unborn(process, id, failing[id])


def _shown(process: str, id: str, body: bytes, failing: Sequence[_Failing], still_us: int | None) -> ProcessInstance:
    kept = msgspec.json.decode(body, type=_Kept)
    timers = {name: pending.due_us for name, pending in kept.timers.items()}
    problems = [each.sentence for each in failing]
    now = now_us()
    if still_us is not None and kept.changed_us <= now - still_us and not any(due > now - still_us for due in timers.values()):
        waits = "no timer is to come" if not timers else f"timer {', '.join(timers)} is overdue"
        problems.append(f"nothing has happened for {readable(now - kept.changed_us)} and {waits}")
    state = {field: value for field, value in msgspec.json.decode(kept.state).items() if field != "id"}
    place = (kept.started_us, kept.changed_us, kept.position, kept.events)
    return ProcessInstance(process, id, *place, timers, state, tuple(problems))


def _unborn(process: str, id: str, failing: Sequence[_Failing]) -> ProcessInstance:
    """An instance that would be there if its first event had not failed."""
    first = failing[0]
    problems = tuple(each.sentence for each in failing)
    return ProcessInstance(process, id, first.recorded_us, first.recorded_us, 0, 0, {}, {}, problems)


_HELD = """
select h.position, h.state, h.attempt, h.error, h.record, t.name, r.recorded_us, r.data
from trilogue_groups g join trilogue_held h on h.group_id = g.id
left join trilogue_records r on r.position = h.position and h.record is null left join trilogue_types t on t.id = r.type
where g.name = ? and h.failed_us is not null order by h.position limit ?"""


async def _failing(store: Store, process: str, registered: _Registered) -> list[_Failing]:
    """Records of the process's group that are dead, parked or tried again, and name an instance."""
    rows = await store.query(_HELD, (registered.group, MOST_FAILING))
    found = []
    for position, state, attempt, error, body, type, recorded_us, data in rows:
        if body is not None:  # a broker's
            record = msgspec.msgpack.decode(body, type=Record)
            type, recorded_us, data = record.type, record.recorded_us, record.data
        id = _named(data, "id" if type == TIMER_TYPE + process else registered.key)
        if id is not None:
            is_what = (f"is tried again, attempt {attempt} being next", "is parked", "is a dead letter")[state]
            lines = (error or "").splitlines() or ["(no error)"]
            found.append(_Failing(id, position, recorded_us, f"position {position} ({type}) {is_what}: {lines[0]}"))
    return found


def _named(data: bytes, field: str) -> str | None:
    """The instance a record's data names."""
    try:
        value = msgspec.json.decode(data, type=dict[str, Any]).get(field)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return None if value is None else str(value)
