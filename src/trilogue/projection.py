"""A read model: a fold of the log into SQL tables that can be built again beside itself.

    balances: list[Deposited] ──▶  insert into {balances} …  ──View──▶  insert into balances_b3 …      the build being written
    app.db("select … from balances")  ──▶  view balances  ──▶  balances_b3                             the build that is live

Pure declaration and fold. builds.py keeps which builds there are, follower.py builds and runs them.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from trilogue.codec import envelope
from trilogue.durations import Duration
from trilogue.errors import BadOption, DecodeError, TwiceNamed, Unsupported
from trilogue.events import Group, Record
from trilogue.handlers import Context, Effect, Failed, Subscription, subscription
from trilogue.ports import Db, Transaction
from trilogue.retry import Retry
from trilogue.sealing import NoKeys

ERASED = "trilogue.subject.erased"
PROJECTED = "__trilogue_projection__"  # on a function: the pattern and options it was declared with
BATCH = 500
MOST_VERSION = 2**31 - 1
TEXTS = 1_000
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_BUILD = re.compile(r"_b\d+$")
_INDEX = re.compile(r"\s*(\w+)\s*\((.+)\)\s*", re.DOTALL)
# Texts and comments stay as they are: JSON has braces too.
_PARTS = re.compile(r"'(?:[^']|'')*'|--[^\n]*|/\*.*?(?:\*/|\Z)|\{(\w+)\}", re.DOTALL)
_WRITES = re.compile(r"(?:^|;)\s*(?:insert|update|delete|replace|create|drop|alter)\b|^\s*with\b.*\b(?:insert|update|delete)\b")

Erased = Callable[[str, Db], object]
Switch = Literal["auto", "manual"]
Wanted = Callable[[Any, Sequence[Record]], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Projection:
    """A function that folds events into tables, as declared. tables: name to columns. sub: what it reads and how it is called;
    its group belongs to no build yet. erased: forgets a person whose personal data is erased."""

    name: str
    version: int
    tables: Mapping[str, str]
    indexes: tuple[str, ...]
    switch: Switch
    sub: Subscription
    erased: Erased | None

    @property
    def types(self) -> tuple[str, ...]:
        """The patterns of what it reads."""
        return self.sub.group.patterns

    def decode(self, record: Record) -> Any:
        """The event in a record; the record itself for a handler of patterns, and where a person was erased."""
        return record if self.is_erasure(record) else self.sub.decode(record)

    def is_erasure(self, record: Record) -> bool:
        """Whether this says that a person was erased, which is for the hook and not for the handler."""
        return self.erased is not None and record.type == ERASED


def projection(
    handler: Callable[..., Any],
    pattern: str | None = None,
    *,
    app: str = "trilogue",
    version: int = 1,
    tables: Mapping[str, str],
    indexes: Sequence[str] = (),
    name: str | None = None,
    switch: Switch = "auto",
    batch: int | None = None,
    retry: Retry | None = None,
    db_limit: Duration = "250ms",
    erased: Erased | None = None,
) -> Projection:
    """Read a projection's signature; raises a WiringError that names it and the mend."""
    name = name or str(getattr(handler, "__name__", ""))
    if not _NAME.fullmatch(name):
        raise BadOption(f"projection {name!r}: expected a name of letters, digits and _, as name='balances'")
    if type(version) is not int or not 1 <= version <= MOST_VERSION:
        raise BadOption(f"projection {name!r} has version={version!r}: expected a whole number from 1")
    if switch not in ("auto", "manual"):
        raise BadOption(f"projection {name!r} has switch={switch!r}: expected 'auto' or 'manual'")
    _check_tables(name, tables, indexes)
    sub = subscription(
        handler, pattern, app=app, group=f"projection.{name}", on_dead="park", batch=batch, retry=retry, db_limit=db_limit
    )
    if sub.kind != "db":
        raise Unsupported(f"projection {name!r} has no parameter `db: Db`: it writes its tables through it")
    if batch is None and sub.batch is not None:
        sub = replace(sub, batch=BATCH)
    _check_personal(name, sub, erased)
    if erased is not None and ERASED not in sub.group.patterns:
        sub = replace(sub, group=replace(sub.group, patterns=(*sub.group.patterns, ERASED)))
    return Projection(name, version, dict(tables), tuple(indexes), switch, sub, erased)


def declarations(functions: Sequence[tuple[Callable[..., Any], str | None, dict[str, Any]]], app: str) -> list[Projection]:
    """The projections of an app; raises TwiceNamed where two have one name, or one table."""
    found: list[Projection] = []
    for function, pattern, options in functions:
        new = projection(function, pattern, app=app, **options)
        for other in found:
            if other.name == new.name:
                raise TwiceNamed(f"two projections are {new.name!r}: give each its own name with name=")
            if both := other.tables.keys() & new.tables.keys():
                raise TwiceNamed(f"projections {other.name!r} and {new.name!r} both have the table {min(both)!r}: rename one")
        found.append(new)
    return found


def _check_tables(name: str, tables: Mapping[str, str], indexes: Sequence[str]) -> None:
    if not tables:
        raise BadOption(f"projection {name!r} has no tables: give tables={{'{name}': 'id text primary key, …'}}")
    for table, columns in tables.items():
        if not _NAME.fullmatch(table) or table.lower().startswith(("trilogue_", "sqlite_")) or _BUILD.search(table):
            raise BadOption(
                f"projection {name!r} has a table {table!r}: expected letters, digits and _, not trilogue_… and not …_b1"
            )
        if not isinstance(columns, str) or not columns.strip() or ";" in columns:
            raise BadOption(f"table {table!r} of projection {name!r} has columns {columns!r}: expected 'id text primary key, …'")
    for index in indexes:
        found = _INDEX.fullmatch(index)
        if found is None or found[1] not in tables or ";" in index:
            raise BadOption(f"projection {name!r} has an index {index!r}: expected 'table(column, …)' of {', '.join(tables)}")


def _check_personal(name: str, sub: Subscription, erased: Erased | None) -> None:
    personal = [code.type for code in sub.coders.values() if code.mark.personal]
    if personal and erased is None:
        raise Unsupported(
            f"projection {name!r} folds {personal[0]!r}, which has personal data: give it erased=, a function (subject, db) that "
            "forgets that person in its tables"
        )


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def physical(table: str, build: int) -> str:
    """The name of a table of one build.

    >>> physical("balances", 3)
    'balances_b3'
    """
    return f"{table}_b{build}"


def create_tables(db: Db, tables: Mapping[str, str], indexes: Sequence[str], build: int | None) -> None:
    """Make the tables and indexes of one build; None: under their own names, as in a test."""
    names = {table: table if build is None else physical(table, build) for table in tables}
    for table, columns in tables.items():
        db.execute(f"create table {names[table]} ({columns})")
    for n, index in enumerate(indexes, 1):
        found = _INDEX.fullmatch(index)
        if found is not None:
            db.execute(f"create index {names[found[1]]}_i{n} on {names[found[1]]} ({found[2]})")


class Tables:
    """The tables of one build: what stands for `{name}` in SQL. Keeps the texts it has been put in."""

    def __init__(self, projection: str, names: Mapping[str, str]) -> None:
        self._projection, self._names = projection, names
        self._texts: dict[str, str] = {}

    def put_in(self, sql: str) -> str:
        """The SQL with the real names; raises BadOption for a name that is no table, or for writing another table."""
        text = self._texts.get(sql)
        if text is None:
            if len(self._texts) >= TEXTS:
                self._texts.clear()
            text = self._texts[sql] = self._replaced(sql)
        return text

    def _replaced(self, sql: str) -> str:
        text = _PARTS.sub(self._part, sql)
        bare = _PARTS.sub(lambda found: found[0] if found[1] else " ", sql).lower()
        if "{" not in bare and _WRITES.search(bare):
            raise BadOption(
                f"projection {self._projection!r} writes a table that is not its own: only {self._said()} can be built again"
            )
        return text

    def _part(self, found: "re.Match[str]") -> str:
        name = found[1]
        if name is None:
            return found[0]
        if name not in self._names:
            raise BadOption(f"projection {self._projection!r} has no table {{{name}}}: there is {self._said()}")
        return self._names[name]

    def _said(self) -> str:
        return ", ".join(f"{{{name}}}" for name in self._names)


class View:
    """ports.Db for one build: `{balances}` means the table that is being written."""

    __slots__ = ("_db", "_tables")

    def __init__(self, db: Db, tables: Tables) -> None:
        self._db, self._tables = db, tables

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        return self._db.execute(self._tables.put_in(sql), values)

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]], /) -> None:
        """Run one statement once per row of values."""
        self._db.executemany(self._tables.put_in(sql), rows)


def tables_of(projection: Projection, build: int) -> Tables:
    """The tables of one build."""
    return Tables(projection.name, {table: physical(table, build) for table in projection.tables})


# ── folding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def fold(projection: Projection, records: Sequence[Record], events: Sequence[Any], view: Db) -> Iterator[object]:
    """Fold decoded events, in order, as a replay; yields what the handler returned. An event that is a DecodeError is raised."""
    sub = projection.sub
    for start, end in _runs(projection, records):
        if projection.is_erasure(records[start]):
            forget(projection, records[start], view)
        elif sub.batch is not None:
            yield from _items(sub.handler(_readable(events[start:end]), db=view), start, events[start:end])
        else:
            [event] = _readable(events[start:end])
            extra = {"ctx": Context(records[start], 1, True)} if sub.takes_ctx else {}
            yield from _items(sub.handler(event, db=view, **extra), start, ())


def _runs(projection: Projection, records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """Start and end of what one call takes: an erasure alone, else as many as it wants."""
    size = projection.sub.batch or 1
    start = 0
    for n, record in enumerate(records):
        if projection.is_erasure(record):
            if start < n:
                yield start, n
            yield n, n + 1
            start = n + 1
        elif n + 1 - start >= size:
            yield start, n + 1
            start = n + 1
    if start < len(records):
        yield start, len(records)


def _readable(events: Sequence[Any]) -> list[Any]:
    for event in events:
        if isinstance(event, DecodeError):
            raise event
    return list(events)


def _items(outcome: Any, start: int, events: Sequence[Any]) -> Iterator[object]:
    """What a handler returned, one by one; what failed of a batch is named by its place among all records."""
    if outcome is None:
        return
    many = isinstance(outcome, (list, tuple)) or (hasattr(outcome, "send") and hasattr(outcome, "__next__"))
    for item in outcome if many else (outcome,):
        if isinstance(item, Effect):
            raise BadOption("a projection returns no Effect: it writes its tables through `db`")
        if isinstance(item, Failed):
            yield Failed(start + _place(item, events), item.error)
        elif item is not None:
            yield item


def _place(item: Failed, events: Sequence[Any]) -> int:
    if type(item.item) is int:
        return item.item
    return next((n for n, event in enumerate(events) if event is item.item), len(events))


def forget(projection: Projection, record: Record, view: Db) -> None:
    """A person was erased: let the projection forget what it holds of them; raises DecodeError."""
    if projection.erased is None:
        return
    try:
        subject = msgspec.json.decode(record.data, type=dict[str, Any])["subject"]
    except (msgspec.MsgspecError, KeyError) as error:
        raise DecodeError(f"not an erasure: {error}; expected {{'subject': …}}") from error
    projection.erased(str(subject), view)


def fold_into(projection: Projection, events: Sequence[object], db: Db) -> list[object]:
    """Fold plain events into tables under their own names, made by create_tables(…, None): for tests; what it returned.

    events: as they would be read, each of a class with @event, or Records.
    """
    view = View(db, Tables(projection.name, {table: table for table in projection.tables}))
    records = [e if isinstance(e, Record) else _as_record(e, n) for n, e in enumerate(events, 1)]
    takes_records = not projection.sub.coders
    folded = [r if takes_records or isinstance(e, Record) else e for e, r in zip(events, records, strict=True)]
    return list(fold(projection, records, folded, view))


def _as_record(event: object, position: int) -> Record:
    fields = msgspec.structs.asdict(envelope(event, keys=NoKeys()))
    return Record(**fields, position=position, recorded_us=fields["time_us"])


# ── live ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def live_subscription(projection: Projection, build: int, group: Group, not_skipped: Wanted) -> Subscription:
    """The ordinary subscription that keeps a live build up to date. not_skipped: which of some records are not passed over."""
    tables, sub = tables_of(projection, build), projection.sub

    def one(record: Record, db: Transaction, **extra: Any) -> Any:
        if not not_skipped(db, (record,)):
            return None
        if projection.is_erasure(record):
            return forget(projection, record, View(db, tables))
        outcome = sub.handler(projection.decode(record), db=View(db, tables), **extra)
        return list(_items(outcome, 0, ()))

    def many(records: list[Record], db: Transaction) -> list[object]:
        wanted, events, failed = [], [], []
        for n in not_skipped(db, records):
            try:
                events.append(projection.decode(records[n]))
                wanted.append(n)
            except Exception as error:
                failed.append(Failed(n, error))
        outcome = fold(projection, [records[n] for n in wanted], events, View(db, tables))
        return [*failed, *(Failed(wanted[i.item], i.error) if isinstance(i, Failed) else i for i in outcome)]  # type: ignore[call-overload]

    return replace(sub, handler=one if sub.batch is None else many, group=group, coders={})
