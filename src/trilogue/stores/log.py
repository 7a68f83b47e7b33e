"""The log itself: append and read. Plain functions over a narrow SQL cursor.

append   envelopes ──▶ position = newest + 1, + 2, …      the write lock makes commit order = order of positions
read     ◀── one page by key, stream, type, position or time
"""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from trilogue.errors import Conflict, Rejected
from trilogue.events import EARLIEST_US, KEY_CHARS, LATEST_US, MOST_VERSION, Envelope, Record
from trilogue.patterns import TYPE_CHARS, matches_any
from trilogue.ports import ANY_VERSION, SLOTS, Query
from trilogue.stores.writer import Sql

PAYLOAD_BYTES = 1 << 20
ID_CHARS = 255
PAGE_RECORDS = 10_000
PLACE_RECORDS = 4_096
CHECKED_TYPES = 10_000
_CHECKED: set[tuple[str, str]] = set()

COLUMNS = "position, slot, type, id, key, time_us, recorded_us, stream, version, correlation, causation, more, data"
Row = tuple[Any, ...]
_INSERT = f"insert into trilogue_records ({COLUMNS}) values (?,?,?,?,?,?,?,?,?,?,?,?,?) on conflict (id) do nothing"


class Types:
    """The numbers of (type, source, schema version), as stored; a cache that only the owner of one connection uses."""

    def __init__(self) -> None:
        self.placed: int | None = None
        self._numbers: dict[tuple[str, str, int], int] = {}
        self.by_number: dict[int, tuple[str, str, int]] = {}

    def number(self, sql: Sql, envelope: Envelope) -> int:
        """The number of an envelope's type; made if it is new."""
        triple = (envelope.type, envelope.source, envelope.schema_version)
        return self._numbers.get(triple) or self._make(sql, triple)

    def _make(self, sql: Sql, triple: tuple[str, str, int]) -> int:
        sql.rows("insert into trilogue_types (name, source, schema_version) values (?, ?, ?) on conflict do nothing", triple)
        self.load(sql)
        return self._numbers[triple]

    def load(self, sql: Sql) -> None:
        """Read those that were added since."""
        for number, *triple in sql.rows(
            "select id, name, source, schema_version from trilogue_types where id > ?",
            (max(self.by_number, default=0),),
        ):
            self._numbers[tuple(triple)] = number
            self.by_number[number] = tuple(triple)

    def forget(self) -> None:
        """What was read inside a transaction that was rolled back is not true."""
        self._numbers.clear()
        self.by_number.clear()
        self.placed = None

    def matching(self, patterns: Sequence[str]) -> list[int]:
        """The numbers of all types the patterns mean."""
        return [number for number, (name, _, _) in self.by_number.items() if matches_any(patterns, name)]


def slot_of(key: str) -> int:
    """The slot of a key: stable across processes, machines and releases."""
    return zlib.crc32(key.encode()) & (SLOTS - 1)


# ── append ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_envelope(envelope: Envelope, payload_bytes: int) -> None:
    """Raise Rejected if this envelope must not go onto a log."""
    if len(envelope.data) > payload_bytes:
        raise Rejected(
            f"event {envelope.type!r} has {len(envelope.data)} bytes, the limit is {payload_bytes}: store the content elsewhere "
            "and publish where, or raise ?payload_bytes= in the URL"
        )
    if envelope.key is not None and len(envelope.key) > KEY_CHARS:
        raise Rejected(f"the key of event {envelope.type!r} has {len(envelope.key)} characters, the limit is {KEY_CHARS}")
    if not 0 < len(envelope.id) <= ID_CHARS:
        raise Rejected(f"an event's id has 1 to {ID_CHARS} characters, this one of type {envelope.type!r} has {len(envelope.id)}")
    e = envelope
    if (e.type, e.source) not in _CHECKED or not _is_plain(e):
        _check_text(e)
    if type(e.data) is not bytes or not 0 < len(e.type) <= TYPE_CHARS:
        raise Rejected(f"event {e.type!r} cannot be stored: expected a type of 1 to {TYPE_CHARS} characters and data in bytes")
    if not EARLIEST_US <= e.time_us <= LATEST_US or not 1 <= e.schema_version <= MOST_VERSION:
        raise Rejected(
            f"event {e.type!r} cannot be stored with time_us={e.time_us} and schema_version={e.schema_version}: expected "
            f"microseconds of the years 1 to 9999, and 1 to {MOST_VERSION}"
        )


def _is_plain(e: Envelope) -> bool:
    """Whether it obviously is Unicode text, as nearly every envelope is; saves looking closely."""
    caused = e.correlation_id is None or (e.correlation_id.isascii() and (e.causation_id or "").isascii())
    rest = e.subject is None and e.traceparent is None and e.extensions is None
    return rest and caused and e.id.isascii() and (e.key is None or e.key.isascii())


def _check_text(envelope: Envelope) -> None:
    """Found out here and not in the writer, where it would fail everything published at the same moment."""
    for name in ("id", "type", "key", "source", "correlation_id", "causation_id", "subject", "traceparent", "extensions"):
        try:
            msgspec.json.encode(getattr(envelope, name))
        except (ValueError, TypeError, msgspec.MsgspecError) as error:
            raise Rejected(f"the {name} of event {envelope.type!r} cannot be stored: {error}; expected Unicode text") from error
    if len(_CHECKED) < CHECKED_TYPES:
        _CHECKED.add((envelope.type, envelope.source))


def newest(sql: Sql) -> tuple[int, int]:
    """Position and recorded time of the newest record; (0, 0) on an empty log."""
    rows = sql.rows("select position, recorded_us from trilogue_records order by position desc limit 1")
    return rows[0] if rows else (0, 0)


def extent(sql: Sql) -> tuple[int, int]:
    """Position of the newest record and number of the newest type, in one look."""
    rows = sql.rows("select (select max(position) from trilogue_records), (select max(id) from trilogue_types)")
    return rows[0][0] or 0, rows[0][1] or 0


def append_all(sql: Sql, types: Types, appends: Sequence[Sequence[Envelope]], now_us: int) -> list[list[int] | Conflict]:
    """Append several independent publishes; each gets its positions, or the Conflict that refused it alone."""
    head, last_us = newest(sql)
    at_us = max(now_us, last_us)
    rows = [_row(sql, types, envelope, head + n, at_us) for n, envelope in enumerate(_chain(appends), 1)]
    stored = sql.many(_INSERT, rows) if len(rows) > 1 else _insert_one(sql, rows)
    outcomes = _cut(rows, appends)
    if stored == len(rows):
        note_places(sql, types, head + len(rows))
        return [[row[0] for row in cut] for cut in outcomes]
    # Some id was there already: rare, so repetitions are told from conflicts one by one.
    sorted_out = [_sort_out(sql, types, envelopes, cut) for envelopes, cut in zip(appends, outcomes, strict=True)]
    note_places(sql, types, newest(sql)[0])
    return sorted_out


def note_places(sql: Sql, types: Types, head: int, *, least: int = PLACE_RECORDS) -> None:
    """Note places and count types for some thousand records at once, when at least so many are new.

    head: the newest position, not more: what comes later must not seem to be noted.
    """
    if types.placed is not None and head - types.placed < least:
        return
    types.placed = int(sql.rows("select placed from trilogue_progress")[0][0])  # another process may have done it
    if head - types.placed < least:
        return
    new = (types.placed, head)
    counts = sql.rows("select count(*), type from trilogue_records where position > ? and position <= ? group by type", new)
    sql.many("update trilogue_types set counted = counted + ? where id = ?", counts)
    sql.rows(
        "insert into trilogue_places select slot, position from trilogue_records "
        "where position > ? and position <= ? and key is not null order by slot, position",
        new,
    )
    sql.rows("update trilogue_progress set placed = ?", (head,))
    types.placed = head


def _chain(appends: Sequence[Sequence[Envelope]]) -> Iterable[Envelope]:
    return (envelope for envelopes in appends for envelope in envelopes)


def _insert_one(sql: Sql, rows: list[Row]) -> int:
    return len(sql.rows(_INSERT + " returning position", rows[0])) if rows else 0


def _cut(rows: list[Row], appends: Sequence[Sequence[Envelope]]) -> list[list[Row]]:
    cut: list[list[Row]] = []
    start = 0
    for envelopes in appends:
        cut.append(rows[start : start + len(envelopes)])
        start += len(envelopes)
    return cut


def _sort_out(sql: Sql, types: Types, envelopes: Sequence[Envelope], rows: list[Row]) -> list[int] | Conflict:
    """The positions of envelopes some of which were stored before; a Conflict takes back those that were not."""
    positions: list[int] = []
    try:
        for envelope in envelopes:
            there = sql.rows(f"select {COLUMNS} from trilogue_records where id = ?", (envelope.id,))
            if not there:  # taken back with another publish of this very moment that had the same id
                raise Conflict(f"id {envelope.id!r} is published twice at once with different content")
            positions.append(same_or_conflict(sql, types, there[0], envelope, None))
    except Conflict as conflict:
        ours = [(row[0], row[3]) for row in rows]
        sql.many("delete from trilogue_records where position = ? and id = ?", ours)
        return conflict
    return positions


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
        _more(envelope),
        envelope.data,
    )


def _more(envelope: Envelope) -> bytes | None:
    if envelope.subject is None and envelope.traceparent is None and envelope.extensions is None:
        return None
    return msgspec.json.encode((envelope.subject, envelope.traceparent, envelope.extensions))


def _append_once(sql: Sql, types: Types, envelope: Envelope, at_us: int, stream: str | None, version: int | None) -> int:
    there = sql.rows(f"select {COLUMNS} from trilogue_records where id = ?", (envelope.id,))
    if there:
        return same_or_conflict(sql, types, there[0], envelope, stream)
    position = newest(sql)[0] + 1
    sql.many(_INSERT, [_row(sql, types, envelope, position, at_us, stream, version)])
    return position


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


def append_expected(sql: Sql, types: Types, envelopes: Sequence[Envelope], stream: str, expected: int, now_us: int) -> list[int]:
    """Append to a stream if it has the expected version; raises Conflict otherwise and writes nothing."""
    version = sql.rows("select max(version) from trilogue_records where stream = ?", (stream,))[0][0] or 0
    if expected not in (ANY_VERSION, version):
        repeated = _repeated(sql, types, envelopes, stream, expected)
        if repeated is not None:
            return repeated
        raise Conflict(f"stream {stream!r} has version {version}, expected was {expected}: read it again and decide again")
    head, last_us = newest(sql)
    at_us = max(now_us, last_us)
    positions = []
    for envelope in envelopes:
        position = _append_once(sql, types, envelope, at_us, stream, version + 1)
        if position > head:  # not a repetition
            head, version = position, version + 1
        positions.append(position)
    return positions


def _repeated(sql: Sql, types: Types, envelopes: Sequence[Envelope], stream: str, expected: int) -> list[int] | None:
    """The positions, if exactly this append was done before: a writer that never got the answer asks again."""
    positions = []
    for n, envelope in enumerate(envelopes, 1):
        there = sql.rows(
            f"select {COLUMNS} from trilogue_records where stream = ? and version = ? and id = ?",
            (stream, expected + n, envelope.id),
        )
        if not there:
            return None
        positions.append(same_or_conflict(sql, types, there[0], envelope, stream))
    return positions


def emit(sql: Sql, types: Types, envelopes: Sequence[Envelope], now_us: int) -> None:
    """Append what a handler emitted; ids that are there already (a redelivery emits them again) are left alone."""
    head, last_us = newest(sql)
    at_us = max(now_us, last_us)
    rows = [_row(sql, types, envelope, head + n, at_us) for n, envelope in enumerate(envelopes, 1)]
    stored = sql.many(_INSERT, rows)
    note_places(sql, types, head + len(rows) if stored == len(rows) else newest(sql)[0])


# ── read ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def record_of(sql: Sql, types: Types, row: Any) -> Record:
    """A row of COLUMNS as a Record."""
    position, _, number, id_, key, time_us, recorded_us, stream, version, correlation, causation, more, data = row
    if number not in types.by_number:
        types.load(sql)
    name, source, schema_version = types.by_number[number]
    subject, traceparent, extensions = msgspec.json.decode(more) if more else (None, None, None)
    return Record(
        id_, name, data, key, source, time_us, schema_version, correlation, causation, subject, traceparent, extensions,
        position, recorded_us, stream, version,
    )  # fmt: skip


def read(sql: Sql, types: Types, query: Query) -> list[Record]:
    """One page of records."""
    where, values = _conditions(sql, types, query)
    order = "desc" if query.reverse else "asc"
    limit = max(0, min(query.limit, PAGE_RECORDS))
    if query.key is None:
        rows = sql.rows(
            f"select {COLUMNS} from trilogue_records r where {where} order by position {order} limit ?", (*values, limit)
        )
    else:
        rows = _rows_of_key(sql, query.key, where, values, order, limit)
    return [record_of(sql, types, row) for row in rows]


def _rows_of_key(sql: Sql, key: str, where: str, values: list[Any], order: str, limit: int) -> list[Any]:
    """Rows of one key: by the places of its slot, and those after the last noted place by looking at each."""
    columns = ", ".join("r." + column for column in COLUMNS.split(", "))
    placed = sql.rows("select placed from trilogue_progress")[0][0]
    noted = (
        f"select {columns} from trilogue_places p cross join trilogue_records r on r.position = p.position where p.slot = ? and "
        f"p.position <= ? and r.key = ? and {where.replace('r.position', 'p.position')} order by p.position {order} limit ?"
    )
    newer = (
        f"select {columns} from trilogue_records r where r.position > ? and r.key = ? and {where} "
        f"order by r.position {order} limit ?"
    )
    parts = [(noted, (slot_of(key), placed, key, *values)), (newer, (placed, key, *values))]
    rows: list[Any] = []
    for statement, bound in parts if order == "asc" else reversed(parts):
        if len(rows) < limit:
            rows += sql.rows(statement, (*bound, limit - len(rows)))
    return rows


def _conditions(sql: Sql, types: Types, query: Query) -> tuple[str, list[Any]]:
    parts: list[tuple[str, list[Any]]] = [("r.position > ?", [query.after])]
    if query.before is not None:
        parts.append(("r.position < ?", [query.before]))
    if query.stream is not None:
        parts.append(("r.stream = ?", [query.stream]))
    # Recorded time never falls with position, so a time becomes a position and no index on time is needed.
    if query.since_us is not None:
        parts.append(("r.position >= ?", [position_at(sql, query.since_us)]))
    if query.until_us is not None:
        parts.append(("r.position < ?", [position_at(sql, query.until_us)]))
    if tuple(query.types) != ("#",):
        types.load(sql)
        parts.append((f"r.type in ({numbers(types.matching(query.types))})", []))
    return " and ".join(part for part, _ in parts), [value for _, values in parts for value in values]


def numbers(values: Iterable[int]) -> str:
    """Whole numbers as SQL text."""
    return ", ".join(str(int(value)) for value in values)


def position_at(sql: Sql, time_us: int) -> int:
    """The first position recorded at or after a time; one past the newest if there is none."""
    low, high = oldest(sql), newest(sql)[0] + 1
    while low < high:
        middle = (low + high) // 2
        rows = sql.rows(
            "select position, recorded_us from trilogue_records where position >= ? order by position limit 1",
            (middle,),
        )
        if rows and rows[0][1] < time_us:
            low = rows[0][0] + 1
        else:
            high = middle
    return low


def oldest(sql: Sql) -> int:
    """The first position still there; 1 on an empty log."""
    return sql.rows("select min(position) from trilogue_records")[0][0] or 1
