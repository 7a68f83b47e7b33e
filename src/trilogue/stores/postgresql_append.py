"""What append.py does, done by PostgreSQL itself: one call for everything that goes onto the log together.

types  [1, 1, 2]        sizes    [2, 1]                    ──trilogue_append──▶  [0, 41]     positions 42, 43, 44
ids    ["a", "b", "c"]  streams  ["account:7", None]                             [1, 1]      append 1 does not fit its stream
…                       expected [3, -1]                                         [2]         some id is there already

The function takes the lock of the counter row, which is held until the commit: what it refused is looked at one by one under it.
"""

from collections.abc import Sequence
from typing import Any

from trilogue.errors import Conflict
from trilogue.events import Envelope
from trilogue.stores.append import Append, alone, more_of
from trilogue.stores.dialect import Sql, clock_us
from trilogue.stores.log import PLACE_RECORDS, Types, newest, note_places, slot_of

_ARRAYS = "integer text text smallint bigint text text bytea bytea integer text bigint integer text"  # as 1.sql says
_CALL = f"select trilogue_append({', '.join(f'cast(? as {kind}[])' for kind in _ARRAYS.split())}, ?)"
_STORED, _UNFIT, _REPEATED = 0, 1, 2
_MOVE_HEAD = (
    "update trilogue_head set head = r.position, recorded_us = r.recorded_us from "
    "(select position, recorded_us from trilogue_records order by position desc limit 1) r where head < r.position"
)


def append_all(sql: Sql, types: Types, appends: Sequence[Append], _now_us: int) -> list[list[int] | Conflict]:
    """Append independently of each other; each gets its positions, or the Conflict that refused it alone.

    When it was recorded the server says, whose clock all processes share.
    """
    answer = _call(sql, types, appends)
    fit = set(range(len(appends)))
    if answer[0] == _UNFIT:
        fit -= {n - 1 for n in answer[1:]}
        answer = _call(sql, types, [appends[n] for n in sorted(fit)]) if fit else answer
    if answer[0] != _STORED:
        fit.clear()
    positions: list[list[int] | Conflict] = [[] for _ in appends]
    head = answer[1] if fit else 0
    for n in sorted(fit):
        positions[n] = list(range(head + 1, head + 1 + len(appends[n].envelopes)))
        head += len(appends[n].envelopes)
    if len(fit) < len(appends):
        head = _one_by_one(sql, types, appends, fit, positions)
    note_places(sql, types, head)
    return positions


def append_at_once(sql: Sql, types: Types, appends: Sequence[Append], _now_us: int) -> list[list[int] | Conflict] | None:
    """append_all() as one statement; None where it would not do: then nothing was stored."""
    envelopes = [envelope for append in appends for envelope in append.envelopes]
    if types.placed is None or not all(types.is_known(envelope) for envelope in envelopes):
        return None
    answer = _call(sql, types, appends)
    if answer[0] != _STORED:
        return None
    head = answer[1]
    if head + len(envelopes) - types.placed >= PLACE_RECORDS:
        types.placed = None  # the next one is to look, and to note the places
    positions: list[list[int] | Conflict] = []
    for append in appends:
        positions.append(list(range(head + 1, head + 1 + len(append.envelopes))))
        head += len(append.envelopes)
    return positions


def _one_by_one(sql: Sql, types: Types, appends: Sequence[Append], fit: set[int], positions: list[list[int] | Conflict]) -> int:
    """Store what is not among `fit`, one after the other; returns the newest position."""
    at_us = max(clock_us(sql), types.end(sql)[1])
    for n, append in enumerate(appends):
        if n not in fit:
            positions[n] = alone(sql, types, append, at_us)
            types.heads.clear()
    sql.rows(_MOVE_HEAD)
    return newest(sql)[0]


def emit(sql: Sql, types: Types, envelopes: Sequence[Envelope], _now_us: int) -> None:
    """Append what a handler emitted; ids that are there already are left alone."""
    head: int = _call(sql, types, [Append(envelopes)], skip=True)[1]
    note_places(sql, types, head)  # what is stored just now is noted the next time


def _call(sql: Sql, types: Types, appends: Sequence[Append], *, skip: bool = False) -> list[int]:
    envelopes = [envelope for append in appends for envelope in append.envelopes]
    in_streams = any(append.stream is not None for append in appends)
    tags = [(n, tag) for n, envelope in enumerate(envelopes, 1) for tag in envelope.tags]
    values: tuple[Any, ...] = (
        _numbers([types.number(sql, e) for e in envelopes]),
        _texts([e.id for e in envelopes]),
        _texts([e.key for e in envelopes]),
        _numbers([None if e.key is None else slot_of(e.key) for e in envelopes]),
        _numbers([e.time_us for e in envelopes]),
        _texts([e.correlation_id for e in envelopes]),
        _texts([e.causation_id for e in envelopes]),
        _bodies([more_of(e) for e in envelopes]),
        _bodies([e.data for e in envelopes]),
        _numbers([len(append.envelopes) for append in appends] if in_streams else []),
        _texts([append.stream for append in appends] if in_streams else []),
        _numbers([append.expected for append in appends] if in_streams else []),
        _numbers([n for n, _ in tags]),
        _texts([tag for _, tag in tags]),
        skip,
    )
    answer: list[int] = sql.rows(_CALL, values)[0][0]
    return answer


# Array literals, written here: the driver's own lists take many times as long and have another type for every size of number.


def _numbers(values: Sequence[int | None]) -> str:
    return "{" + ",".join(["null" if value is None else str(value) for value in values]) + "}"


def _texts(values: Sequence[str | None]) -> str:
    return "{" + ",".join(["null" if value is None else _quoted(value) for value in values]) + "}"


def _quoted(value: str) -> str:
    if value.isalnum() and value.isascii() and value.lower() != "null":
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _bodies(values: Sequence[bytes | None]) -> str:
    return "{" + ",".join(["null" if value is None else '"\\\\x' + value.hex() + '"' for value in values]) + "}"
