"""The ports: what a log must do, batch-shaped, in bytes and positions. Adapters never see handlers or user types.

    Store    append ──> LOG ──> claim ──> (handle) ──> settle        memory, SQLite, PostgreSQL
                         └────> read
    Broker   publish ─> LOG ──> receive ─> (handle) ─> acknowledge   RabbitMQ, Kafka; brokers/ makes a Store of it

One adapter stands behind each kind of URL. What it cannot do it does not list in `features`, and asking for it is refused
with the URLs that can.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeVar

from trilogue.errors import BadOption, LogError
from trilogue.events import Delivery, Durability, Envelope, Group, InTransaction, Receipt, Record, Settlement

T = TypeVar("T")
SLOTS = 64
ANY_VERSION = -1


class Feature(StrEnum):
    """What an adapter can do."""

    ORDER = "order per key"
    COMPETE = "groups without order: any worker takes any record"
    RETRY = "retries with a delay that hold up nobody else"
    PARK = "parked keys"
    DEAD = "dead letters: list, redrive, drop"
    REPLAY = "seek and replay"
    PAUSE = "pause and resume"
    TIMERS = "delayed events"
    DEDUP = "a repeated publish adds nothing"
    HISTORY = "published events read by key, type, position and time"
    EXPECTED = "append with the version the writer expects"
    PROJECTIONS = "read models of published events"
    EFFECTS = "effects in the settlement's transaction"
    OWN_TRANSACTION = "publish inside the user's own transaction"
    PERSISTENT = "survives the process"
    SHARED = "several processes"
    MACHINES = "several machines"


class Db(Protocol):
    """SQL inside the settlement's savepoint, or on a read-only connection.

    Values are bound with `?`; rows come back as a list of tuples, all of them. Transactions, PRAGMA, ATTACH and writing to
    trilogue's own tables (`trilogue_…`) are refused.
    """

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        ...

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]], /) -> None:
        """Run one statement once per row of values."""
        ...


@dataclass(frozen=True, slots=True)
class Query:
    """Which records to read, in order of position.

    types: AMQP patterns. tags: all of these. correlation: what one record led to, by its id; without that record itself.
    id: the one with this id. schema_version: of the events stored as this version only.
    after / before: positions, both exclusive. since_us / until_us: recorded time, since inclusive,
    until exclusive. reverse: newest first. limit: at most this many, 10,000 being the most a page may hold.
    """

    types: tuple[str, ...] = ("#",)
    key: str | None = None
    stream: str | None = None
    after: int = 0
    before: int | None = None
    since_us: int | None = None
    until_us: int | None = None
    reverse: bool = False
    limit: int = 1_000
    tags: tuple[str, ...] = ()
    correlation: str | None = None
    id: str | None = None
    schema_version: int | None = None


class Transaction(Db, Protocol):
    """What can happen in one transaction of a store, all of it or nothing: the user's SQL, and what the store does beside it.

    Valid while the function it was given to runs. now_us: the wall clock.
    """

    @property
    def now_us(self) -> int:
        """The wall clock, in microseconds."""
        ...

    def append(
        self,
        envelopes: Sequence[Envelope],
        *,
        stream: str | None = None,
        expected: int = ANY_VERSION,
        unless: Sequence[Query] = (),
    ) -> list[int]:
        """Put envelopes on the log; returns their positions.

        stream, expected: as Store.append(). unless: raises Conflict if a record that matches one of these queries is there.
        """
        ...

    def read(self, query: Query) -> list[Record]:
        """One page of records, as this transaction sees them."""
        ...

    def state(self, owner: str, id: str) -> bytes | None:
        """What set_state() has kept, None if there is nothing."""
        ...

    def set_state(self, owner: str, id: str, body: bytes | None) -> None:
        """Keep a small state: of a process, a snapshot, an answer. None removes it."""
        ...

    def clear_states(self, owner: str, *, prefix: str = "") -> int:
        """Remove all states of an owner, or those whose id begins so; returns how many."""
        ...

    def forget_states(self, owner: str, before_us: int, limit: int) -> None:
        """Remove the oldest states of an owner that were written before a time."""
        ...

    def schedule(self, envelope: Envelope, due_us: int, *, name: str) -> None:
        """Put an envelope on the log at that time; a timer of the same name is replaced."""
        ...

    def cancel(self, name: str) -> bool:
        """Remove a named timer; False if it has fired or never was."""
        ...

    def start_group(self, group: Group, after: int, *, instead_of: str | None = None, paused: bool = False) -> None:
        """Make a group that reads after a position.

        instead_of: a group that goes in the same act; what the new one emits stays off up to where that one was.
        """
        ...

    def pause_group(self, name: str, paused: bool) -> None:
        """Let a group be lent nothing, or go on."""
        ...

    def group_held(self, name: str) -> tuple[int, int] | None:
        """How many records are held ready for a group, and how many are parked; None if there is no such group."""
        ...

    def group_reached(self, name: str) -> int:
        """The position up to which a group has read everything, as Store.finished_to(); raises UnknownEvent."""
        ...

    def drop_group(self, name: str) -> None:
        """Forget a group, its cursor and everything held for it; raises UnknownEvent."""
        ...

    def rename_group(self, name: str, new: str) -> None:
        """Give a group another name: its cursor and what is held for it go along, and who works for the old one has lost it.

        Raises UnknownEvent for a group that is not there, TwiceNamed if there is one of the new name.
        """
        ...

    def drop_held(self, name: str, position: int) -> None:
        """Forget that a group gave up on a record; a parked key goes on with what follows."""
        ...

    def kind_of(self, table: str) -> str | None:
        """ "table" or "view", None if there is nothing of that name."""
        ...

    def shows(self, view: str, table: str) -> bool:
        """Whether there is a view of that name that shows a table."""
        ...

    def columns(self, table: str) -> list[str]:
        """The names of a table's columns, in order."""
        ...

    def removed(self) -> tuple[int, int]:
        """Position and recorded time of the newest record that trim() has removed; (0, 0) if none was.

        The log is whole only after it, whatever older records have stayed.
        """
        ...


class Rows(list[tuple[Any, ...]]):
    """What a query returned. columns: their names, as far as there is a row."""

    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class State:
    """A small state somebody keeps in the store. owner: whose, as "process:transfer". at_us: when it was written."""

    owner: str
    id: str
    at_us: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Scheduled:
    """An envelope that enters the log when due. name: of one that can be moved, as a process's."""

    envelope: Envelope
    due_us: int
    name: str | None


@dataclass(frozen=True, slots=True)
class Kind:
    """One type in one schema version, and how many records of it were ever accepted."""

    type: str
    schema_version: int
    count: int


@dataclass(frozen=True, slots=True)
class SeekTo:
    """Where a group is set: at a position, a recorded time, the beginning or the end. Exactly one is given."""

    position: int | None = None
    time_us: int | None = None
    end: Literal["beginning", "now"] | None = None

    def __post_init__(self) -> None:
        if [self.position, self.time_us, self.end].count(None) != 2:
            raise BadOption(f"{self} is no one place: expected exactly one of position=, time_us= and end=")
        if self.end not in (None, "beginning", "now"):
            raise BadOption(f"SeekTo(end={self.end!r}): expected 'beginning' or 'now'")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record a group gave up on, with why. parked: its key waits for a decision."""

    group: str
    record: Record
    attempts: int
    error: str
    traceback: str
    died_us: int
    parked: bool


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """How far a group is. lag: records not finished (`lag_at_least` when counting was cut off), lag_s: age of the oldest of
    them. held: by state. rates are per second over the last seconds, as its workers reported them. lanes: on a broker."""

    name: str
    app: str
    patterns: tuple[str, ...]
    ordered: bool
    paused: bool
    workers: int
    lag: int
    lag_at_least: bool
    lag_s: float
    in_flight: int
    retrying: int
    waiting: int
    parked: int
    dead: int
    done: int
    failed: int
    rate: float
    lanes: Sequence["LaneStatus"] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """The whole log at a glance. types: records ever accepted, by type. bytes: file and write-ahead log."""

    url: str
    head: int
    oldest: int
    types: Mapping[str, int]
    timers: int
    bytes: int
    groups: Sequence[GroupStatus] = field(default_factory=tuple)


class Store(Protocol):
    """Log, cursors, exceptions and timers in one place: memory, SQLite, PostgreSQL. Not thread-safe: one event loop."""

    url: str
    features: frozenset[Feature]
    durability: Durability

    async def open(self) -> None:
        """Connect, create or check the schema. Raises Unavailable, Unsupported."""

    async def close(self) -> None:
        """Give back every slot and let go. What was in flight is handed back without charging an attempt."""

    async def bind(self, groups: Sequence[Group], *, work: bool = True) -> None:
        """Declare groups, idempotently. work: also become a worker for them, taking a share of the slots."""

    async def unbind(self, group: str) -> None:
        """Stop working for one group that is gone."""

    async def leave(self) -> None:
        """Stop working for all groups: hand back what is out, uncharged, and give up all slots."""

    async def append(self, envelopes: Sequence[Envelope], *, expected: tuple[str, int] | None = None) -> list[int]:
        """Put envelopes on the log: all or none, in this order, durable on return. Returns their positions.

        expected: stream and the version it must have (0: none yet; ANY_VERSION: whatever it is).
        The same id with the same content is not stored again; its position is the one it has.
        Raises Conflict (other version; same id with other content), StreamClosed, Rejected, StorageFull, OutcomeUnknown.
        """

    async def read(self, query: Query) -> list[Record]:
        """One page of records. Never skips a record that commits late."""

    async def claim(self, group: str, *, limit: int, wait_s: float) -> list[Delivery]:
        """Lend up to `limit` deliveries, waiting up to `wait_s` for the first. Ordered groups: a key is out in one claim."""

    def settle(self, group: str, answers: Sequence[Settlement | InTransaction]) -> Awaitable[list[Delivery]]:
        """Answer deliveries. The keys of finished ones are free at once; awaiting makes it durable and returns the
        deliveries whose lease was lost: nothing of theirs happened."""

    async def schedule(self, envelopes: Sequence[Envelope], due_us: int) -> None:
        """Put envelopes on the log at that time; idempotent by id. Fires while any worker runs."""

    async def publish_in(self, tx: object, envelopes: Sequence[Envelope], due_us: int | None = None) -> None:
        """Publish with the commit of the user's own transaction, or at that time after it; in this order, idempotent by id.

        tx: a connection or session the user has, on the database of this store. Raises Unsupported where there is none, BadOption
        for what is no such thing, Conflict.
        """

    async def cancel(self, event_id: str) -> bool:
        """Remove a timer; False if there is none (any more)."""

    async def seek(
        self,
        group: str,
        to: SeekTo,
        *,
        into: str | None = None,
        emits: bool = False,
        reset: Callable[[Db], None] | None = None,
    ) -> int:
        """Set a group (or a new one, `into`) to start again after the returned position. Its held records are forgotten.

        emits: whether events emitted while replaying go onto the log. reset: empties the group's tables in the same
        transaction; refused without it (Unsupported) where a group that writes through `db` is replayed in place.
        """

    async def pause(self, group: str) -> None:
        """Lend nothing of this group until resume(); survives restarts."""

    async def resume(self, group: str) -> None:
        """Undo pause()."""

    async def dead(self, group: str | None, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        """Dead letters of a group or of all, by position."""

    async def held(self, *, after: int = 0, limit: int = 1_000) -> list[Record]:
        """Records that some group holds: to be tried again, parked or dead; each once, by position."""

    async def redrive(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Handle dead letters again, from attempt 1, in order per key; all of them if no positions are given."""

    async def drop_dead(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Forget dead letters; a parked key goes on with what follows."""

    async def drop_group(self, group: str) -> None:
        """Forget a group, its cursor and everything held for it."""

    async def trim(
        self, *, older_than_us: int | None = None, keep: int | None = None, force: bool = False, streams: bool = False
    ) -> int:
        """Remove old records, by age or count, never the newest one.

        force: also what a group still needs. streams: also what decisions rest on: records of streams, but for the newest of
        each, and those with tags. Returns how many went.
        """

    async def handled(self, group: str, position: int) -> bool:
        """Whether the group has finished this record; raises HandlerFailed if it is a dead letter."""

    async def finished_to(self, group: str) -> int:
        """The position up to which a group has read everything; what it holds of that is not finished."""

    async def orphans(self, app: str, names: Sequence[str]) -> list[str]:
        """Groups of an app beyond these names that have work and nobody who does it."""

    async def idle(self, names: Sequence[str]) -> bool:
        """Whether these groups have nothing left to do; dead and parked records and what waits behind them do not count."""

    async def changed(self, wait_s: float) -> None:
        """Return when anything on the log or its groups may have changed, at the latest after `wait_s`."""

    async def status(self) -> Status:
        """The whole log at a glance."""

    async def query(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        """Read the user's own tables, on a read-only connection."""

    async def transact(self, work: Callable[[Transaction], T], *, rows: int = 1_000, limit_us: int | None = None) -> T:
        """Run `work` in a transaction of its own, and return what it returns.

        rows: about how many it writes. limit_us: its SQL is interrupted after that (TimedOut).
        """

    async def state(self, owner: str, id: str) -> bytes | None:
        """What an owner keeps under one id."""

    async def states(self, owner: str, *, after: str = "", limit: int = 1_000) -> list[State]:
        """What an owner keeps, by id, after one."""

    async def kinds(self) -> list[Kind]:
        """What was ever accepted, by type and schema version."""

    async def timers(self, *, after: str = "", limit: int = 1_000) -> list[Scheduled]:
        """What is scheduled, by the id of its envelope, after one."""

    async def stream_version(self, stream: str) -> int:
        """The version of a stream, closed or truncated ones too; 0 if there is none."""

    async def close_stream(self, stream: str, reason: str) -> int:
        """Let nothing be appended to a stream any more; returns its version. Closing it again changes nothing."""

    async def truncate_stream(self, stream: str, before: int) -> None:
        """Hide the records of a stream below a version; the next trim() may remove them. The newest one always stays."""

    async def describe(self) -> dict[str, str]:
        """What `trilogue doctor` prints: kind and version, what the durability rests on, integrity where it can be told."""

    async def rewrite(self) -> bool:
        """Write the files anew, so that nothing of what was deleted is left in them; False while a reader keeps old pages.

        Blocks writing meanwhile, about a second for 100 MB; a log without tables of the user has nothing to write anew.
        """

    async def publish(self, envelopes: Sequence[Envelope]) -> list[Receipt | LogError]:
        """Put envelopes on the log, in this order, each with its own outcome; on a store they share one.

        Rejected and Unavailable: certainly not there. OutcomeUnknown: repeating it with the same id is harmless.
        """


# ── brokers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class LaneStatus:
    """How far a group is in one ordered part of a broker's log: a partition, a queue.

    lag: records not acknowledged; None where the broker does not tell. in_flight: received here and not acknowledged.
    stalled_s: for how long nothing of a lane with lag was acknowledged here, 0 if it moves.
    next: the offset below which everything is finished; None where there are no offsets.
    """

    name: str
    lag: int | None
    in_flight: int
    stalled_s: float = 0.0
    next: int | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """A group's place in one lane, to be kept in a store's transaction together with effects.

    lane: topic and partition as text, "video-events[0]". next: below it everything is finished. finished: what
    is finished from there on.
    """

    lane: str
    next: int
    finished: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a lane is with a settlement. epoch: of the assignment under which it was received."""

    progress: Progress
    epoch: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """A lane as it came to a process. epoch: newer than every one before, whatever clocks say; progress: where the group goes
    on, None if it has never been there."""

    epoch: int
    progress: Progress | None


PlacesAfter = Callable[[Sequence[Delivery]], Sequence[Place]]


@dataclass(frozen=True, slots=True)
class Marks:
    """What tells whether anything about a broker's group has changed. inbox: the position last given to a held record of
    it. revision: grows when dead letters are driven again, when it is paused, defined anew, or set to another place.
    superseded: another program reads something else as this group."""

    inbox: int
    revision: int
    paused: bool
    superseded: bool = False


@dataclass(frozen=True, slots=True)
class Diverted:
    """Which deliveries went behind held rows of their key, in order; and Marks.inbox before and after."""

    held: Sequence[bool]
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of fresh deliveries: the final answers. again: to be handled anew. before, after: Marks.inbox."""

    settlements: Sequence[Settlement]
    again: Sequence[Delivery]
    before: int
    after: int


class Inbox(Protocol):
    """What a store keeps for groups whose log is a broker. Each verb is one transaction."""

    async def marks(self, group: Group) -> Marks:
        """What tells whether anything about a group has changed; raises UnknownEvent."""

    async def held_keys(self, group: str, after: int) -> list[str]:
        """Keys that have rows ready or parked beyond a position."""

    async def divert(self, group: str, deliveries: Sequence[Delivery]) -> Diverted:
        """Put those whose key is held behind its rows."""

    async def settle(
        self, group: str, answers: Sequence[Settlement | InTransaction], *, places: PlacesAfter | None = None, seen: bool = False
    ) -> Taken:
        """Write what became of fresh deliveries, effects and emits included.

        places: where the lanes are once some deliveries are finished; called in the transaction, with those that are. seen:
        recognise events by their ids: a broker delivers again, and keeps twice what was published twice. Raises LeaseLost if a
        place went to somebody else: nothing happened.
        """

    async def assigned(self, group: str, lane: str) -> Assignment:
        """A lane came to this process: from now on whoever settles with an older epoch is refused."""

    async def start_over(self, group: str, reset: Callable[[Db], None] | None, ends: dict[str, int]) -> None:
        """Forget what is held for a group and where it is. ends: by lane, below which its emits stay off."""

    async def replay_ends(self, group: str) -> dict[str, int]:
        """By lane, below which offset the emits of a group stay off."""

    async def names(self) -> list[str]:
        """The groups whose log is a broker."""


class InboxStore(Store, Protocol):
    """A Store that can stand beside a broker. payload_bytes: the largest event it takes. takes_nul: whether texts may have NUL
    characters there."""

    inbox: Inbox
    payload_bytes: int
    takes_nul: bool


class Cursors(Protocol):
    """Where a paired store keeps the cursors of groups that write through `db`, instead of the broker."""

    async def assigned(self, group: str, lane: str) -> Progress | None:
        """A lane came to this process; where the group goes on in it, None if it has never been there.

        From now on the store refuses whoever had the lane before.
        """
        ...


class Broker(Protocol):
    """A log that delivers and acknowledges, nothing more: RabbitMQ, Kafka. Not thread-safe: one event loop.

    A Lease of a broker's delivery stands for one lane and one assignment of it; it is revoked when the lane goes to another
    process or the connection is lost, and then its deliveries can be neither acknowledged nor handed back: the broker delivers
    them again.
    """

    url: str
    features: frozenset[Feature]
    durability: Durability

    async def open(self) -> None:
        """Connect and declare what is ours. Raises Unavailable, Unsupported; a wrong password at once, an absent server after
        a bounded time."""

    async def close(self) -> None:
        """Hand back what is out, flush what was published, let go; bounded in time."""

    async def bind(self, groups: Sequence[Group], *, work: bool = True, cursors: Cursors | None = None) -> None:
        """Declare groups, idempotently; with `work`, begin to receive. cursors: asked for groups with effects, where positions
        can be kept outside. Raises Unsupported for what this broker cannot do, Unavailable where something there is different."""

    async def unbind(self, group: str) -> None:
        """Stop receiving for one group."""

    async def leave(self) -> None:
        """Stop receiving for all groups; what is out goes back in order."""

    async def publish(self, envelopes: Sequence[Envelope]) -> list[Receipt | LogError]:
        """Publish in order, one outcome each: confirmed by the broker, Rejected (certainly not there), or OutcomeUnknown."""

    async def receive(self, group: str, *, limit: int, wait_s: float) -> list[Delivery]:
        """The next deliveries of a group's lanes, in lane order, waiting up to `wait_s` for the first.

        How many may be out and not acknowledged is bounded by the adapter. attempt: 1, or as the broker counted. What the group's
        patterns do not match is passed over when it is asked again, not before: who asks has looked whether the group still is
        what it was. So it may answer with nothing before `wait_s` is over.
        """

    async def acknowledge(self, group: str, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """These are finished, in whatever order; returns those whose lane was lost (they come again, here or elsewhere)."""

    async def release(self, group: str, deliveries: Sequence[Delivery]) -> None:
        """Hand back as if never lent. In an ordered lane they come again, in order, before anything that follows."""

    async def dead_letter(self, group: str, delivery: Delivery, *, attempts: int, error: str, traceback: str) -> None:
        """Put a record with its error where the broker keeps dead letters, confirmed, then acknowledge it. For direct mode."""

    def progress(self, group: str, deliveries: Sequence[Delivery]) -> list[Progress]:
        """Where the lanes of these deliveries will be once these are finished; raises LeaseLost, Unsupported."""

    async def seek(
        self, group: str, to: SeekTo, *, into: str | None = None, moved: Callable[[], Awaitable[None]] | None = None
    ) -> int:
        """Set a group, or a new one, to start again; returns 0, or the offset where there is one lane. Raises Unsupported.

        moved: awaited once it is set and before anything of it is delivered again; not if it is refused.
        """

    async def pause(self, group: str) -> None:
        """Receive nothing of this group here until resume()."""

    async def resume(self, group: str) -> None:
        """Undo pause()."""

    async def drop_group(self, group: str) -> None:
        """Forget a group and what waits for it. Raises UnknownEvent."""

    async def dead(self, group: str | None, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        """Dead letters the broker keeps, looked at without taking them. For direct mode."""

    async def redrive(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Give dead letters back to the group alone, confirmed before they go; all of them if no positions are given."""

    async def drop_dead(self, group: str, positions: Sequence[int] | None = None) -> int:
        """Forget dead letters."""

    async def groups(self) -> list[str]:
        """The groups this broker knows, as far as it can tell; those bound here otherwise."""

    async def lanes(self, group: str) -> list[LaneStatus]:
        """How far a group is, by lane."""

    async def changed(self, wait_s: float) -> None:
        """Return when something may have been received or acknowledged, at the latest after `wait_s`."""

    async def describe(self) -> dict[str, str]:
        """What `trilogue doctor` prints: server version, queue type or replication, what durability follows and why."""
