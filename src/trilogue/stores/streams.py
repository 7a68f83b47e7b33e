"""What is unusual about a stream: that it is closed, or that its beginning is hidden.

trilogue_state    owner "stream", id = the stream   {"closed": "reason", "first": 120}
"""

from typing import Any

import msgspec

from trilogue.errors import Conflict
from trilogue.stores.append import stream_head
from trilogue.stores.dialect import Sql
from trilogue.stores.log import Types
from trilogue.stores.transaction import SqlTransaction

OWNER = "stream"
SNAPSHOTS = "snapshot"


def close(sql: Sql, types: Types, tx: SqlTransaction, stream: str, reason: str) -> int:
    """Let nothing be appended to a stream any more; returns its version."""
    types.end(sql)  # forgets what another process may have changed
    version, is_closed = stream_head(sql, types, stream)
    if not is_closed:
        _note(tx, stream, {"closed": reason})
        types.heads.pop(stream, None)
    return version


def truncate(sql: Sql, types: Types, tx: SqlTransaction, stream: str, before: int) -> None:
    """Hide the records below a version; raises Conflict if that would hide the newest."""
    types.end(sql)  # forgets what another process may have changed
    version, _ = stream_head(sql, types, stream)
    if not 1 <= before <= version:
        raise Conflict(
            f"stream {stream!r} has version {version}: it can be truncated before 1 to {version}, not before {before}",
            stream=stream,
            expected=before,
            actual=version,
        )
    _note(tx, stream, {"first": before})
    tx.clear_states(SNAPSHOTS, prefix=stream + "\x1f")  # they were folded from what is hidden now


def _note(tx: SqlTransaction, stream: str, what: dict[str, Any]) -> None:
    known: dict[str, Any] = msgspec.json.decode(tx.state(OWNER, stream) or b"{}")
    if known.get("first", 0) > what.get("first", 0):  # what is hidden stays hidden
        what = {**what, "first": known["first"]}
    tx.set_state(OWNER, stream, msgspec.json.encode({**known, **what}))
