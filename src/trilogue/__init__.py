"""One log, read three ways: message queue, event stream, event store."""

from trilogue.aggregate import Aggregate, Boundary, Decider, Decision, Snapshot, tag
from trilogue.app import App
from trilogue.codec import from_cloudevent, to_cloudevent
from trilogue.deciding import Decided
from trilogue.errors import (
    BadOption,
    BadPattern,
    Conflict,
    DecodeError,
    HandlerFailed,
    Later,
    LeaseLost,
    LogError,
    OrphanedGroup,
    OutcomeUnknown,
    OutOfRange,
    Reject,
    Rejected,
    StorageFull,
    StreamClosed,
    TimedOut,
    TrilogueError,
    TwiceNamed,
    Unavailable,
    UnknownEvent,
    UnknownScheme,
    Unsupported,
    Verdict,
    WiringError,
)
from trilogue.events import Envelope, Group, Receipt, Record, audited, derived_id, event, new_id
from trilogue.handlers import Context, Effect, Failed
from trilogue.history import Difference, Entry, Traced
from trilogue.instances import ProcessInstance
from trilogue.ports import Db, DeadLetter, Feature, GroupStatus, Query, SeekTo, State, Status, Store, Transaction
from trilogue.privacy import ErasureReceipt
from trilogue.process import Cancel, End, Process, Timer, reacts, starts, timer
from trilogue.projections import Comparison, ProjectionStatus
from trilogue.retry import Retry
from trilogue.router import Router
from trilogue.stores import open_store
from trilogue.stream import Loaded

__version__ = "0.1.0"

__all__ = [
    "Aggregate",
    "App",
    "BadOption",
    "BadPattern",
    "Boundary",
    "Cancel",
    "Comparison",
    "Conflict",
    "Context",
    "Db",
    "DeadLetter",
    "Decided",
    "Decider",
    "Decision",
    "DecodeError",
    "Difference",
    "Effect",
    "End",
    "Entry",
    "Envelope",
    "ErasureReceipt",
    "Failed",
    "Feature",
    "Group",
    "GroupStatus",
    "HandlerFailed",
    "Later",
    "LeaseLost",
    "Loaded",
    "LogError",
    "OrphanedGroup",
    "OutOfRange",
    "OutcomeUnknown",
    "Process",
    "ProcessInstance",
    "ProjectionStatus",
    "Query",
    "Receipt",
    "Record",
    "Reject",
    "Rejected",
    "Retry",
    "Router",
    "SeekTo",
    "Snapshot",
    "State",
    "Status",
    "StorageFull",
    "Store",
    "StreamClosed",
    "TimedOut",
    "Timer",
    "Traced",
    "Transaction",
    "TrilogueError",
    "TwiceNamed",
    "Unavailable",
    "UnknownEvent",
    "UnknownScheme",
    "Unsupported",
    "Verdict",
    "WiringError",
    "audited",
    "derived_id",
    "event",
    "from_cloudevent",
    "new_id",
    "open_store",
    "reacts",
    "starts",
    "tag",
    "timer",
    "to_cloudevent",
]
