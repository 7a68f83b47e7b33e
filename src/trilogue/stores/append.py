"""What goes onto the log: publishes, conditional appends to streams, what handlers emit.

appends of one turn of the loop ──▶ one insert      position = newest + 1, + 2, …; version = the stream's + 1, + 2, …
                                                    the write lock makes commit order = order of positions
one that repeats an id, or expects another version ──▶ alone, in a savepoint: its old positions, or a Conflict
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from trilogue.errors import Conflict, Rejected, StreamClosed
from trilogue.events import EARLIEST_US, KEY_CHARS, LATEST_US, MOST_VERSION, Envelope
from trilogue.patterns import TYPE_CHARS
from trilogue.ports import ANY_VERSION, SLOTS
from trilogue.stores.dialect import Sql
from trilogue.stores.log import COLUMNS, Row, StreamMarks, Types, newest, note_places, record_of, slot_of, stream_marks

PAYLOAD_BYTES = 1 << 20
ID_CHARS = 255
STREAM_CHARS = 512
TAGS = 32
TAG_CHARS = 512
CHECKED_TYPES = 10_000
_CHECKED: set[tuple[str, str]] = set()
_INSERT = f"insert into trilogue_records ({COLUMNS}) values (?,?,?,?,?,?,?,?,?,?,?,?,?) on conflict (id) do nothing"


class Append(NamedTuple):
    """Envelopes to be stored together. stream, expected: the stream they are for, and the version it must have."""

    envelopes: Sequence[Envelope]
    stream: str | None = None
    expected: int = ANY_VERSION


# ── what may be stored ───────────────────────────────────────────────────────────────────────────────────────────────


def check_envelope(envelope: Envelope, payload_bytes: int, *, takes_nul: bool = True) -> None:
    """Raise Rejected if this envelope must not go onto a log. takes_nul: whether its texts may have NUL characters there."""
    if len(envelope.data) > payload_bytes:
        raise Rejected(
            f"event {envelope.type!r} has {len(envelope.data)} bytes, the limit is {payload_bytes}: store the content elsewhere "
            "and publish where, or raise ?payload_bytes= in the URL"
        )
    if envelope.key is not None and len(envelope.key) > KEY_CHARS:
        raise Rejected(f"the key of event {envelope.type!r} has {len(envelope.key)} characters, the limit is {KEY_CHARS}")
    if not 0 < len(envelope.id) <= ID_CHARS:
        raise Rejected(f"an event's id has 1 to {ID_CHARS} characters, this one of type {envelope.type!r} has {len(envelope.id)}")
    if envelope.tags and (len(envelope.tags) > TAGS or max(map(len, envelope.tags)) > TAG_CHARS):
        raise Rejected(f"event {envelope.type!r} has tags beyond the limit: at most {TAGS} of {TAG_CHARS} characters")
    e = envelope
    if (e.type, e.source) not in _CHECKED or not _is_plain(e):
        _check_text(e)
    if not takes_nul:
        _check_nul(e)
    if type(e.data) is not bytes or not 0 < len(e.type) <= TYPE_CHARS:
        raise Rejected(f"event {e.type!r} cannot be stored: expected a type of 1 to {TYPE_CHARS} characters and data in bytes")
    if not EARLIEST_US <= e.time_us <= LATEST_US or not 1 <= e.schema_version <= MOST_VERSION:
        raise Rejected(
            f"event {e.type!r} cannot be stored with time_us={e.time_us} and schema_version={e.schema_version}: expected "
            f"microseconds of the years 1 to 9999, and 1 to {MOST_VERSION}"
        )


def check_stream(stream: str) -> None:
    """Raise Rejected for what cannot be the name of a stream."""
    if not isinstance(stream, str) or not 0 < len(stream) <= STREAM_CHARS or not stream.isprintable():
        raise Rejected(f"{stream!r} cannot be a stream: expected a text of 1 to {STREAM_CHARS} printable characters")


def _is_plain(e: Envelope) -> bool:
    """Whether it obviously is Unicode text, as nearly every envelope is; saves looking closely."""
    caused = e.correlation_id is None or (e.correlation_id.isascii() and (e.causation_id or "").isascii())
    rest = e.subject is None and e.traceparent is None and e.extensions is None and not e.tags
    return rest and caused and e.id.isascii() and (e.key is None or e.key.isascii())


def _check_nul(e: Envelope) -> None:
    for text in (e.id, e.type, e.key, e.source, e.correlation_id, e.causation_id, *e.tags):
        if text is not None and "\x00" in text:
            raise Rejected(f"event {e.type!r} has the text {text!r}, and PostgreSQL stores no NUL character: leave it out")


def _check_text(envelope: Envelope) -> None:
    """Found out here and not in the writer, where it would fail everything published at the same moment."""
    for name in ("id", "type", "key", "source", "correlation_id", "causation_id", "subject", "traceparent", "extensions", "tags"):
        try:
            msgspec.json.encode(getattr(envelope, name))
        except (ValueError, TypeError, msgspec.MsgspecError) as error:
            raise Rejected(f"the {name} of event {envelope.type!r} cannot be stored: {error}; expected Unicode text") from error
    if len(_CHECKED) < CHECKED_TYPES:
        _CHECKED.add((envelope.type, envelope.source))


# ── append ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def append_all(sql: Sql, types: Types, appends: Sequence[Append], now_us: int) -> list[list[int] | Conflict]:
    """Append independently of each other; each gets its positions, or the Conflict that refused it alone."""
    if sql.dialect.append_all is not None:
        done: list[list[int] | Conflict] = sql.dialect.append_all(sql, types, appends, now_us)
        return done
    head, last_us = types.end(sql)
    at_us = max(now_us, last_us)
    planned = _plan(sql, types, appends, head, at_us)
    rows = [row for _, own in planned if own is not None for row in own]
    stored = _insert(sql, rows)
    if stored != len(rows):
        # Some id was there already: rare, so everything is taken back and done one by one.
        sql.rows("delete from trilogue_records where position > ? and position <= ?", (head, head + len(rows)))
        types.heads.clear()
        planned = [(append, None) for append, _ in planned]
    else:
        _note_tags(sql, planned)
    positions: list[list[int] | Conflict] = [
        alone(sql, types, append, at_us) if own is None else [row[0] for row in own] for append, own in planned
    ]
    is_plain = all(own is not None for _, own in planned)
    types.newest = (head + len(rows), at_us) if is_plain and rows else None
    note_places(sql, types, head + len(rows) if is_plain else newest(sql)[0])
    return positions


def _plan(sql: Sql, types: Types, appends: Sequence[Append], head: int, at_us: int) -> list[tuple[Append, list[Row] | None]]:
    """The rows of each append; None for one that needs a closer look."""
    planned: list[tuple[Append, list[Row] | None]] = []
    for append in appends:
        version: int | None = None
        if append.stream is not None:
            version, is_closed = stream_head(sql, types, append.stream)
            if is_closed or append.expected not in (ANY_VERSION, version):
                planned.append((append, None))
                continue
            types.heads[append.stream] = version + len(append.envelopes)
        own = [
            _row(sql, types, envelope, head + n, at_us, append.stream, None if version is None else version + n)
            for n, envelope in enumerate(append.envelopes, 1)
        ]
        head += len(own)
        planned.append((append, own))
    return planned


def stream_head(sql: Sql, types: Types, stream: str) -> tuple[int, bool]:
    """The version of a stream, and whether it is closed."""
    version = types.heads.get(stream)
    if version is not None:
        return version, False
    rows = sql.rows(
        "select (select max(version) from trilogue_records where stream = ?), "
        "(select body from trilogue_state where owner = 'stream' and id = ?)",
        (stream, stream),
    )
    version, body = rows[0][0] or 0, rows[0][1]
    is_closed = body is not None and msgspec.json.decode(body, type=StreamMarks).closed is not None
    if not is_closed:
        types.heads[stream] = version
    return version, is_closed


def _insert(sql: Sql, rows: list[Row]) -> int:
    if len(rows) == 1:
        return len(sql.rows(_INSERT + " returning position", rows[0]))
    return sql.many(_INSERT, rows) if rows else 0


def _note_tags(sql: Sql, planned: Sequence[tuple[Append, list[Row] | None]]) -> None:
    tags = [
        (tag, row[0])
        for append, own in planned
        if own is not None
        for envelope, row in zip(append.envelopes, own, strict=True)
        for tag in envelope.tags
    ]
    if tags:
        sql.many("insert into trilogue_tags (tag, position) values (?, ?) on conflict (tag, position) do nothing", tags)


def _row(
    sql: Sql,
    types: Types,
    envelope: Envelope,
    position: int,
    at_us: int,
    stream: str | None = None,
    version: int | None = None,
) -> Row:
    key = envelope.key
    return (
        position,
        slot_of(key) if key is not None else position % SLOTS,
        types.number(sql, envelope),
        envelope.id,
        key,
        envelope.time_us,
        at_us,
        stream,
        version,
        envelope.correlation_id,
        envelope.causation_id,
        more_of(envelope),
        envelope.data,
    )


def more_of(envelope: Envelope) -> bytes | None:
    """What few envelopes have, as it is stored: subject, trace, extensions, tags."""
    if envelope.subject is None and envelope.traceparent is None and envelope.extensions is None and not envelope.tags:
        return None
    return msgspec.json.encode((envelope.subject, envelope.traceparent, envelope.extensions, envelope.tags))


# ── one by one ───────────────────────────────────────────────────────────────────────────────────────────────────────


def alone(sql: Sql, types: Types, append: Append, at_us: int) -> list[int] | Conflict:
    """The positions of one append some of which may be stored already; a Conflict takes back what was not."""
    sql.rows("savepoint append")
    try:
        positions = _one_by_one(sql, types, append, at_us)
    except Conflict as conflict:
        sql.rows("rollback to append")
        sql.rows("release append")
        types.forget()
        return conflict
    sql.rows("release append")
    return positions


def _one_by_one(sql: Sql, types: Types, append: Append, at_us: int) -> list[int]:
    stream, version = append.stream, None
    if stream is not None:
        version, is_closed = stream_head(sql, types, stream)
        types.heads.pop(stream, None)
        if is_closed or append.expected not in (ANY_VERSION, version):
            repeated = _repeated(sql, types, append.envelopes, stream, append.expected)
            if repeated and len(repeated) == len(append.envelopes):
                return repeated
            # What is there beyond the expected version may be this very append, to which something was added since.
            if is_closed or not repeated or append.expected + len(repeated) != version:
                raise _refused(sql, types, stream, append.expected, version, is_closed=is_closed)
    positions = []
    for envelope in append.envelopes:
        there = sql.rows(f"select {COLUMNS} from trilogue_records where id = ?", (envelope.id,))
        if there:
            positions.append(same_or_conflict(sql, types, there[0], envelope, stream))
            continue
        position = newest(sql)[0] + 1
        version = None if version is None else version + 1
        own = [_row(sql, types, envelope, position, at_us, stream, version)]
        sql.many(_INSERT, own)
        _note_tags(sql, [(Append([envelope]), own)])
        positions.append(position)
    return positions


def _refused(sql: Sql, types: Types, stream: str, expected: int, version: int, *, is_closed: bool) -> Conflict:
    """The error that says which version the stream has, and who wrote it."""
    by, last = None, "nothing is stored in it"
    rows = sql.rows(f"select {COLUMNS} from trilogue_records where stream = ? and version = ?", (stream, version))
    if rows:
        record = record_of(sql, types, rows[0])
        by = record.who or record.source
        last = f"version {version} is {record.type!r}, written by {by} at {record.recorded:%Y-%m-%d %H:%M:%S.%f} UTC"
    if is_closed:
        why = stream_marks(sql, stream).closed
        told = f"stream {stream!r} is closed at version {version} ({why}): nothing is appended to it any more; {last}"
        return StreamClosed(told, stream=stream, expected=expected, actual=version, by=by)
    return Conflict(
        f"stream {stream!r} has version {version}, expected was {expected}; {last}: load it again and decide again",
        stream=stream,
        expected=expected,
        actual=version,
        by=by,
    )


def same_or_conflict(sql: Sql, types: Types, row: Any, envelope: Envelope, stream: str | None) -> int:
    """The position of a stored row (of COLUMNS) that has this envelope's id; raises Conflict if it is another event."""
    stored = record_of(sql, types, row)
    same = (stored.type, stored.key, stored.data, stored.stream) == (envelope.type, envelope.key, envelope.data, stream)
    if same:
        return stored.position
    raise Conflict(
        f"id {envelope.id!r} is stored at position {stored.position} as {stored.type!r} with other content: "
        "give a different event an id of its own"
    )


def _repeated(sql: Sql, types: Types, envelopes: Sequence[Envelope], stream: str, expected: int) -> list[int]:
    """The positions of what was stored before, from the first envelope on: a writer that never got the answer asks again."""
    positions: list[int] = []
    for n, envelope in enumerate(envelopes, 1):
        there = sql.rows(f"select {COLUMNS} from trilogue_records where stream = ? and id = ?", (stream, envelope.id))
        if not there or (expected != ANY_VERSION and record_of(sql, types, there[0]).version != expected + n):
            break
        positions.append(same_or_conflict(sql, types, there[0], envelope, stream))
    return positions


def emit(sql: Sql, types: Types, envelopes: Sequence[Envelope], now_us: int) -> None:
    """Append what a handler emitted; ids that are there already (a redelivery emits them again) are left alone."""
    if sql.dialect.emit is not None:
        sql.dialect.emit(sql, types, envelopes, now_us)
        return
    head, last_us = newest(sql)
    at_us, types.newest = max(now_us, last_us), None
    rows = [_row(sql, types, envelope, head + n, at_us) for n, envelope in enumerate(envelopes, 1)]
    stored = sql.many(_INSERT, rows)
    tags = [(tag, envelope.id) for envelope in envelopes for tag in envelope.tags]
    if tags:  # by id, because some of them may have been there before
        select = "select cast(? as text), position from trilogue_records where id = ?"
        sql.many(f"insert into trilogue_tags {select} on conflict (tag, position) do nothing", tags)
    note_places(sql, types, head + len(rows) if stored == len(rows) else newest(sql)[0])
