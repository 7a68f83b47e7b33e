"""The log as rows, and how it is read: one page by key, stream, tag, correlation, type, position or time.

Plain functions over a narrow SQL cursor. What is appended, and how: append.py.
"""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from trilogue.events import Envelope, Record
from trilogue.patterns import matches_any
from trilogue.ports import SLOTS, Query
from trilogue.stores.dialect import Sql

PAGE_RECORDS = 10_000
PLACE_RECORDS = 4_096
HEADS = 10_000

COLUMNS = "position, slot, type, id, key, time_us, recorded_us, stream, version, correlation, causation, more, data"
Row = tuple[Any, ...]
PUT_STATE = (
    "insert into trilogue_state (owner, id, at_us, body) values (?, ?, ?, ?) on conflict (owner, id) do update set "
    "at_us = excluded.at_us, body = excluded.body"
)


class Types:
    """What the owner of one connection remembers: the numbers of (type, source, schema version), and where things end.

    heads: versions of streams that are not closed. newest: position and recorded time of the newest record. Both are true as
    long as no other process has committed.
    """

    def __init__(self) -> None:
        self.placed: int | None = None
        self.heads: dict[str, int] = {}
        self.newest: tuple[int, int] | None = None
        self._data_version = -1
        self._numbers: dict[tuple[str, str, int], int] = {}
        self.by_number: dict[int, tuple[str, str, int]] = {}

    def number(self, sql: Sql, envelope: Envelope) -> int:
        """The number of an envelope's type; made if it is new."""
        triple = (envelope.type, envelope.source, envelope.schema_version)
        return self._numbers.get(triple) or self._make(sql, triple)

    def is_known(self, envelope: Envelope) -> bool:
        """Whether number() needs nothing from the database."""
        return (envelope.type, envelope.source, envelope.schema_version) in self._numbers

    def _make(self, sql: Sql, triple: tuple[str, str, int]) -> int:
        if sql.dialect.end:
            sql.rows(
                sql.dialect.end
            )  # numbers become visible in their order, as positions do: a reader asks for those after its last
        sql.rows(
            "insert into trilogue_types (id, name, source, schema_version) select coalesce(max(id), 0) + 1, ?, ?, ? "
            "from trilogue_types where true on conflict (name, source, schema_version) do nothing",
            triple,
        )
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
        self.heads.clear()
        self.newest = self.placed = None
        self._data_version = -1

    def end(self, sql: Sql) -> tuple[int, int]:
        """Position and recorded time of the newest record; what is remembered is forgotten if another process has committed.

        Where several transactions write at a time, nobody else appends from here until the commit.
        """
        if sql.dialect.end:
            self.heads.clear()
            end: tuple[int, int] = sql.rows(sql.dialect.end)[0]
            return end
        version = sql.rows("pragma data_version")[0][0]
        if version != self._data_version or len(self.heads) > HEADS:
            self._data_version = version
            self.heads.clear()
            self.newest = None
        return self.newest or newest(sql)

    def matching(self, patterns: Sequence[str]) -> list[int]:
        """The numbers of all types the patterns mean."""
        return [number for number, (name, _, _) in self.by_number.items() if matches_any(patterns, name)]

    def of_version(self, schema_version: int) -> list[int]:
        """The numbers of all types in one schema version."""
        return [number for number, (_, _, version) in self.by_number.items() if version == schema_version]


def slot_of(key: str) -> int:
    """The slot of a key: stable across processes, machines and releases."""
    return zlib.crc32(key.encode()) & (SLOTS - 1)


def newest(sql: Sql) -> tuple[int, int]:
    """Position and recorded time of the newest record; (0, 0) on an empty log."""
    rows = sql.rows("select position, recorded_us from trilogue_records order by position desc limit 1")
    return rows[0] if rows else (0, 0)


def extent(sql: Sql) -> tuple[int, int]:
    """Position of the newest record and number of the newest type, in one look."""
    rows = sql.rows("select (select max(position) from trilogue_records), (select max(id) from trilogue_types)")
    return rows[0][0] or 0, rows[0][1] or 0


def note_places(sql: Sql, types: Types, head: int, *, least: int = PLACE_RECORDS) -> None:
    """Note places and traces, and count types for some thousand records at once, when at least so many are new.

    head: the newest position, not more: what comes later must not seem to be noted.
    """
    if types.placed is not None and head - types.placed < least:
        return
    placed = "select placed from trilogue_progress" + sql.dialect.for_update
    types.placed = int(sql.rows(placed)[0][0])  # another process may have done it
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
    sql.rows(
        "insert into trilogue_traces select correlation, position from trilogue_records "
        "where position > ? and position <= ? and correlation is not null order by correlation, position "
        "on conflict (correlation, position) do nothing",
        new,
    )
    sql.rows("update trilogue_progress set placed = ?", (head,))
    types.placed = head


# ── read ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def record_of(sql: Sql, types: Types, row: Any) -> Record:
    """A row of COLUMNS as a Record."""
    position, _, number, id_, key, time_us, recorded_us, stream, version, correlation, causation, more, data = row
    if number not in types.by_number:
        types.load(sql)
    name, source, schema_version = types.by_number[number]
    if more is None:
        return Record(
            id_, name, data, key, source, time_us, schema_version, correlation, causation, None, None, None, (),
            position, recorded_us, stream, version,
        )  # fmt: skip
    subject, traceparent, extensions, *tags = msgspec.json.decode(more)
    return Record(
        id_, name, data, key, source, time_us, schema_version, correlation, causation, subject, traceparent, extensions,
        tuple(tags[0]) if tags else (), position, recorded_us, stream, version,
    )  # fmt: skip


_packer = msgspec.msgpack.Encoder()
_unpacker = msgspec.msgpack.Decoder(Record)


def pack(record: Record) -> bytes:
    """A whole record as it is kept in a held row of a broker's group."""
    return _packer.encode(record)


def unpack(body: bytes, position: int) -> Record:
    """The record of a held row. Its position is that of the row, by which it is redriven or dropped; on Kafka the
    extension `offset` says where it is there."""
    record = _unpacker.decode(body)
    extensions = record.extensions if record.topic is None else {**(record.extensions or {}), "offset": record.position}
    return msgspec.structs.replace(record, position=position, extensions=extensions)


def read(sql: Sql, types: Types, query: Query) -> list[Record]:
    """One page of records."""
    where, values = _conditions(sql, types, query)
    order = "desc" if query.reverse else "asc"
    limit = max(0, min(query.limit, PAGE_RECORDS))
    if query.key is not None:
        index, of, value = "trilogue_places", "p.slot = ?", slot_of(query.key)
        rows = _rows_noted(sql, (index, of, value), ("r.key = ?", query.key), where, values, order, limit)
    elif query.correlation is not None:
        index, of, named = "trilogue_traces", "p.correlation = ?", query.correlation
        rows = _rows_noted(sql, (index, of, named), ("r.correlation = ?", named), where, values, order, limit)
    elif query.tags:
        rows = _rows_tagged(sql, query.tags, where, values, order, limit)
    else:
        by = "version" if query.stream is not None else "position"
        statement = f"select {COLUMNS} from trilogue_records r where {where} order by {by} {order} limit ?"
        rows = sql.rows(statement, (*values, limit))
    return [record_of(sql, types, row) for row in rows]


_OF_R = ", ".join("r." + column for column in COLUMNS.split(", "))


def _rows_noted(
    sql: Sql, index: tuple[str, str, Any], mine: tuple[str, str], where: str, values: list[Any], order: str, limit: int
) -> list[Any]:
    """Rows of one key or correlation: by what is noted of it, and those after the last noted place by looking at each."""
    placed = sql.rows("select placed from trilogue_progress")[0][0]
    table, of, noted_as = index
    is_mine, value = mine
    noted = (
        f"select {_OF_R} from {table} p {sql.dialect.leads} trilogue_records r on r.position = p.position where {of} and "
        f"p.position <= ? and {is_mine} and {where.replace('r.position', 'p.position')} order by p.position {order} limit ?"
    )
    newer = (
        f"select {_OF_R} from trilogue_records r where r.position > ? and {is_mine} and {where} "
        f"order by r.position {order} limit ?"
    )
    parts = [(noted, (noted_as, placed, value, *values)), (newer, (placed, value, *values))]
    rows: list[Any] = []
    for statement, bound in parts if order == "asc" else reversed(parts):
        if len(rows) < limit:
            rows += sql.rows(statement, (*bound, limit - len(rows)))
    return rows


def _rows_tagged(sql: Sql, tags: Sequence[str], where: str, values: list[Any], order: str, limit: int) -> list[Any]:
    """Rows that carry all of some tags; the first one leads, so name the rarest first."""
    others = " and exists (select 1 from trilogue_tags o where o.tag = ? and o.position = p.position)" * (len(tags) - 1)
    return sql.rows(
        f"select {_OF_R} from trilogue_tags p {sql.dialect.leads} trilogue_records r on r.position = p.position "
        f"where p.tag = ?{others} and {where.replace('r.position', 'p.position')} order by p.position {order} limit ?",
        (*tags, *values, limit),
    )


def _conditions(sql: Sql, types: Types, query: Query) -> tuple[str, list[Any]]:
    parts: list[tuple[str, list[Any]]] = [("r.position > ?", [query.after])]
    if query.id is not None:
        parts.append(("r.id = ?", [query.id]))
    if query.before is not None:
        parts.append(("r.position < ?", [query.before]))
    if query.key is not None:  # what leads the way is read by its own index, the others only sieve
        parts += [("r.correlation = ?", [query.correlation])] if query.correlation is not None else []
    if query.key is not None or query.correlation is not None:
        has_tag = "exists (select 1 from trilogue_tags t where t.tag = ? and t.position = r.position)"
        parts += [(has_tag, [tag]) for tag in query.tags]
    if query.stream is not None:
        parts.append(("r.stream = ?", [query.stream]))
        if first := first_version(sql, query.stream):
            parts.append(("r.version >= ?", [first]))
    # Recorded time never falls with position, so a time becomes a position and no index on time is needed.
    if query.since_us is not None:
        parts.append(("r.position >= ?", [position_at(sql, query.since_us)]))
    if query.until_us is not None:
        parts.append(("r.position < ?", [position_at(sql, query.until_us)]))
    if tuple(query.types) != ("#",):
        types.load(sql)
        parts.append((f"r.type in ({numbers(types.matching(query.types))})", []))
    if query.schema_version is not None:
        types.load(sql)
        parts.append((f"r.type in ({numbers(types.of_version(query.schema_version))})", []))
    return " and ".join(part for part, _ in parts), [value for _, values in parts for value in values]


def first_version(sql: Sql, stream: str) -> int:
    """The first version of a stream that is shown; 0 if it was never truncated."""
    return stream_marks(sql, stream).first


class StreamMarks(msgspec.Struct, omit_defaults=True):
    """What is unusual about a stream: why it is closed, the first version that is shown."""

    closed: str | None = None
    first: int = 0


def stream_marks(sql: Sql, stream: str) -> StreamMarks:
    """What trilogue_state says of a stream."""
    rows = sql.rows("select body from trilogue_state where owner = 'stream' and id = ?", (stream,))
    return msgspec.json.decode(rows[0][0], type=StreamMarks) if rows else StreamMarks()


def numbers(values: Iterable[int]) -> str:
    """Whole numbers as SQL text; `null`, which equals nothing, where there are none."""
    return ", ".join(str(int(value)) for value in values) or "null"


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
