"""given/then for a projection: its tables in a database of their own, in memory."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from trilogue.errors import BadOption
from trilogue.events import event_type
from trilogue.patterns import matches_any
from trilogue.ports import Db
from trilogue.projection import PROJECTED, Projection, create_tables, fold_into, projection
from trilogue.stores.sqlite import ApswSql, connect
from trilogue.stores.userdb import UserDb
from trilogue.testing.told import Story, stored


class GivenTables:
    """The tables of a projection after some events."""

    def __init__(self, model: Projection | Callable[..., Any], events: Sequence[object], *, times: int = 1) -> None:
        self._projection = model if isinstance(model, Projection) else _declared(model)
        self._story = Story(f"projection {self._projection.name!r}", tuple(events))
        self._events = [self._taken(event) for event in events]
        self._times = times

    def _taken(self, event: object) -> Any:
        known = stored(event, self._story)
        if not matches_any(self._projection.types, event_type(type(event)).name):
            raise self._story.failed(f"{event!r} would be passed over: it reads {', '.join(self._projection.types)}")
        return known

    def twice(self) -> "GivenTables":
        """The same, with each call of its function happening twice: for folds that must not mind a repetition."""
        return GivenTables(self._projection, self._story.given, times=2)

    def then(self, **tables: Sequence[tuple[Any, ...]]) -> "GivenTables":
        """These tables hold exactly these rows, in any order; others are not looked at.

        tables: rows by name of the table, each with all its columns.
        """
        __tracebackhide__ = True
        if not tables:
            raise BadOption("then() names no table: write then(balances=[('ACC001', 1000)])")
        db = self._folded()
        for table, expected in tables.items():
            if table not in self._projection.tables:
                raise self._story.failed(f"it has no table {table!r}: there is {', '.join(self._projection.tables)}")
            rows = db.execute(f"select * from {table}")
            wanted = [tuple(row) for row in expected]
            if sorted(rows, key=repr) != sorted(wanted, key=repr):
                raise self._story.differs(f"table {table!r} holds other rows", *_aligned(wanted, rows))
        return self

    def _folded(self) -> Db:
        db = UserDb(ApswSql(connect(":memory:")))
        create_tables(db, self._projection.tables, self._projection.indexes, None)
        size = self._projection.sub.batch or 1
        for start in range(0, len(self._events), size):
            for _ in range(self._times):
                fold_into(self._projection, self._events[start : start + size], db)
        return db


def _declared(function: Callable[..., Any]) -> Projection:
    """What @app.projection said of a function."""
    said = getattr(function, PROJECTED, None)
    if said is None:
        raise BadOption(
            f"{function!r} is nothing to begin a test with: expected an Aggregate, a Decider, a Decision, a Process, or a "
            "function under @app.projection"
        )
    pattern, options = said
    return projection(function, pattern, **options)


def _aligned(wanted: Sequence[Any], rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The rows of both, then what each has alone."""
    both = Counter(wanted) & Counter(rows)
    same = sorted(both.elements(), key=repr)
    alone = [sorted((Counter(each) - both).elements(), key=repr) for each in (wanted, rows)]
    return [*same, *alone[0]], [*same, *alone[1]]
