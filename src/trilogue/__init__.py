"""One log, read three ways: message queue, event stream, event store."""

from trilogue.app import App
from trilogue.codec import from_cloudevent, to_cloudevent
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
    Reject,
    Rejected,
    StorageFull,
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
from trilogue.events import Envelope, Group, Receipt, Record, derived_id, event, new_id
from trilogue.handlers import Context, Effect, Failed
from trilogue.ports import Db, DeadLetter, Feature, GroupStatus, Query, SeekTo, Status, Store
from trilogue.retry import Retry
from trilogue.router import Router
from trilogue.stores import open_store

__version__ = "0.1.0"

__all__ = [
    "App",
    "BadOption",
    "BadPattern",
    "Conflict",
    "Context",
    "Db",
    "DeadLetter",
    "DecodeError",
    "Effect",
    "Envelope",
    "Failed",
    "Feature",
    "Group",
    "GroupStatus",
    "HandlerFailed",
    "Later",
    "LeaseLost",
    "LogError",
    "OrphanedGroup",
    "OutcomeUnknown",
    "Query",
    "Receipt",
    "Record",
    "Reject",
    "Rejected",
    "Retry",
    "Router",
    "SeekTo",
    "Status",
    "StorageFull",
    "Store",
    "TimedOut",
    "TrilogueError",
    "TwiceNamed",
    "Unavailable",
    "UnknownEvent",
    "UnknownScheme",
    "Unsupported",
    "Verdict",
    "WiringError",
    "derived_id",
    "event",
    "from_cloudevent",
    "new_id",
    "open_store",
    "to_cloudevent",
]
