"""What can happen in one transaction: the user's SQL, and beside it appends, states and timers of the store itself.

handler(e, db) in its settlement  ──▶  execute, executemany
store.transact(work)              ──▶  the same, and append, read, state, schedule, …

SQLite undoes a whole transaction when a statement that writes is interrupted, or says OR ROLLBACK. What comes after it would
be committed by itself, so it is refused.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from trilogue.errors import Conflict, LogError, Rejected, TimedOut
from trilogue.events import Envelope, Group, Record, now_us
from trilogue.ports import ANY_VERSION, Query
from trilogue.stores import groups, log, retention, status, timers
from trilogue.stores.append import Append, append_all, check_envelope, check_stream
from trilogue.stores.dialect import Sql, TransactionSql
from trilogue.stores.userdb import UserDb
from trilogue.stores.writer import Again, answerable

T = TypeVar("T")
STATE_BYTES = 16 << 20
OWNER_CHARS = 512
GONE = (
    "an earlier statement was interrupted or said OR ROLLBACK, which undid the whole transaction, and the code went on as if "
    "nothing had happened: let the error of that statement through"
)
SWALLOWED = (
    "an earlier SQL statement failed, its error was caught, and PostgreSQL takes nothing more in such a transaction: let the "
    "error through, or ask first (`on conflict do nothing`, `if exists`)"
)


class _Inside:
    """Sql that runs inside a transaction or not at all."""

    def __init__(self, sql: Sql, in_transaction: Callable[[], bool]) -> None:
        self._sql, self._in_transaction = sql, in_transaction
        self.dialect = sql.dialect

    def rows(self, sql: str, values: Any = ()) -> list[Any]:
        if not self._in_transaction():
            raise TimedOut(GONE)
        return self._sql.rows(sql, values)

    def many(self, sql: str, values: Any) -> int:
        if not self._in_transaction():
            raise TimedOut(GONE)
        return self._sql.many(sql, values)


class SqlTransaction(UserDb):
    """ports.Transaction on the write connection of a store.

    appended: whether something was put on the log since the last look. regrouped: whether groups changed since then.
    scheduled: told the due time of a new timer.
    """

    def __init__(self, sql: TransactionSql, types: log.Types, payload_bytes: int, scheduled: Callable[[int], None]) -> None:
        super().__init__(_Inside(sql.user, sql.in_transaction))
        self._sql = _Inside(sql, sql.in_transaction)
        self.check = sql.check
        self._types, self._payload_bytes, self._scheduled = types, payload_bytes, scheduled
        self.appended = self.regrouped = False

    @property
    def now_us(self) -> int:
        """The wall clock, in microseconds."""
        return now_us()

    @property
    def sql(self) -> Sql:
        """The cursor, for what the store itself does in the same transaction."""
        return self._sql

    def append(
        self,
        envelopes: Sequence[Envelope],
        *,
        stream: str | None = None,
        expected: int = ANY_VERSION,
        unless: Sequence[Query] = (),
    ) -> list[int]:
        """Put envelopes on the log; raises Conflict for another version, or a record that matches one of `unless`."""
        for envelope in envelopes:
            check_envelope(envelope, self._payload_bytes, takes_nul=self._sql.dialect.takes_nul)
        if stream is not None:
            check_stream(stream)
        if unless:
            self._types.end(self._sql)  # nothing may come between the look and the append
        for query in unless:
            self._refuse_newer(query)
        outcome = append_all(self._sql, self._types, [Append(envelopes, stream, expected)], now_us())[0]
        if isinstance(outcome, Conflict):
            raise outcome
        self.appended = True
        return outcome

    def _refuse_newer(self, query: Query) -> None:
        newer = self.read(dataclasses.replace(query, limit=1))
        if newer:
            record = newer[0]
            by = record.who or record.source
            raise Conflict(
                f"since it was read (up to position {query.after}), {record.type!r} arrived at position {record.position}, "
                f"written by {by}, with the tags {', '.join(query.tags)}: read again and decide again",
                by=by,
            )

    def read(self, query: Query) -> list[Record]:
        """One page of records, as this transaction sees them."""
        return log.read(self._sql, self._types, query)

    def state(self, owner: str, id: str) -> bytes | None:
        """What set_state() has kept, None if there is nothing."""
        if self._sql.dialect.state:
            self._sql.rows(self._sql.dialect.state, (f"{owner}\x1f{id}",))  # nobody else reads it, to write it, until the commit
        rows = self._sql.rows("select body from trilogue_state where owner = ? and id = ?", (owner, id))
        return rows[0][0] if rows else None

    def set_state(self, owner: str, id: str, body: bytes | None) -> None:
        """Keep a small state; None removes it. Raises Rejected for one that is too large."""
        if body is None:
            self._sql.rows("delete from trilogue_state where owner = ? and id = ?", (owner, id))
            return
        if len(body) > STATE_BYTES or max(len(owner), len(id)) > OWNER_CHARS * 2:
            raise Rejected(f"the state {id!r} of {owner!r} has {len(body)} bytes: the limit is {STATE_BYTES}")
        self._sql.rows(log.PUT_STATE, (owner, id, now_us(), body))

    def clear_states(self, owner: str, *, prefix: str = "") -> int:
        """Remove all states of an owner, or those whose id begins so; returns how many."""
        values = (owner, prefix, len(prefix), prefix)
        return self._sql.many(
            "delete from trilogue_state where owner = ? and id >= ? and substr(id, 1, cast(? as integer)) = ?", [values]
        )

    def forget_states(self, owner: str, before_us: int, limit: int) -> None:
        """Remove the oldest states of an owner that were written before a time."""
        self._sql.rows(
            "delete from trilogue_state where (owner, id) in (select owner, id from trilogue_state where owner = ? and at_us < ? "
            "order by at_us limit ?)",
            (owner, before_us, limit),
        )

    def schedule(self, envelope: Envelope, due_us: int, *, name: str) -> None:
        """Put an envelope on the log at that time; a timer of the same name is replaced."""
        check_envelope(envelope, self._payload_bytes, takes_nul=self._sql.dialect.takes_nul)
        timers.cancel_named(self._sql, name)
        timers.schedule(self._sql, self._types, [envelope], due_us, name=name)
        self._scheduled(due_us)

    def cancel(self, name: str) -> bool:
        """Remove a named timer; False if it has fired or never was."""
        return timers.cancel_named(self._sql, name)

    def start_group(self, group: Group, after: int, *, instead_of: str | None = None, paused: bool = False) -> None:
        """Make a group that reads after a position, maybe instead of another one."""
        groups.start(self._sql, group, after, now_us(), instead_of=instead_of, paused=paused)
        self.regrouped = True

    def pause_group(self, name: str, paused: bool) -> None:
        """Let a group be lent nothing, or go on."""
        groups.set_paused(self._sql, name, paused)
        self.regrouped = True

    def group_held(self, name: str) -> tuple[int, int] | None:
        """How many records are held ready for a group, and how many are parked."""
        return groups.held(self._sql, name)

    def group_reached(self, name: str) -> int:
        """The position up to which a group has read everything; raises UnknownEvent."""
        return status.finished_to(self._sql, self._types, name)

    def drop_group(self, name: str) -> None:
        """Forget a group; raises UnknownEvent."""
        groups.drop(self._sql, name)
        self.regrouped = True

    def rename_group(self, name: str, new: str) -> None:
        """Give a group another name; raises UnknownEvent, TwiceNamed."""
        groups.rename(self._sql, name, new)
        self.regrouped = True

    def removed(self) -> tuple[int, int]:
        """Position and recorded time of the newest record that trim() has removed; (0, 0) if none was."""
        return retention.removed(self._sql)

    def kind_of(self, table: str) -> str | None:
        """ "table" or "view", None if there is nothing of that name."""
        rows = self._sql.rows(self._sql.dialect.kind_of, (table,))
        return rows[0][0] if rows else None

    def shows(self, view: str, table: str) -> bool:
        """Whether there is a view of that name that shows a table."""
        return bool(self._sql.rows(self._sql.dialect.view, (view, table)))

    def columns(self, table: str) -> list[str]:
        """The names of a table's columns, in order."""
        return [name for (name,) in self._sql.rows(self._sql.dialect.columns, (table,))]

    def drop_held(self, name: str, position: int) -> None:
        """Forget that a group gave up on a record."""
        groups.drop_held(self._sql, name, position)
        self.regrouped = True


def whole(
    work: Callable[[], T],
    *,
    in_transaction: Callable[[], bool],
    check: Callable[[], None],
    translate: Callable[[Exception], Exception],
) -> Callable[[], T]:
    """`work`, so that it happens whole or not at all, and harms no other change that is written with it.

    Where it has undone the whole transaction, all others are run again without it, and it fails alone.
    """
    doomed: list[Exception] = []

    def run() -> T:
        if doomed:
            raise doomed[0]
        try:
            result = work()
            check()
            if in_transaction():
                return result
            error: Exception = TimedOut(GONE)
        except BaseException as raised:
            if in_transaction():
                raise
            error = translate(answerable(raised))
        if isinstance(error, LogError | Again):  # the disk is full: no fault of this work
            raise error
        doomed.append(error)
        raise Again

    return run
