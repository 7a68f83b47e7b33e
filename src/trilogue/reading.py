"""Reading through an App: records in order, tables that handlers write, and waiting until they have got far enough.

async for record in app.history(key="u1")             the log
await app.find(Balance, "select * from balances")     what is folded from it, as objects
…, after=receipt.token, of="balances"                 and at least what this receipt is for is in it
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from time import monotonic
from typing import Any, TypeVar

import msgspec

from trilogue import projections
from trilogue.codec import Coder, Keys
from trilogue.durations import Duration, seconds
from trilogue.errors import BadOption, TimedOut, UnknownEvent
from trilogue.events import Envelope, Receipt, Record, us_of
from trilogue.patterns import check_pattern
from trilogue.ports import Query, Store
from trilogue.projection import Projection

M = TypeVar("M")
HISTORY_PAGE = 1_000


class Reading:
    """What App inherits: reading the log and what was made of it."""

    store: Store
    keys: Keys | None

    @property
    def known(self) -> Mapping[str, Coder]:
        """The event classes of the app by type; App says which."""
        raise NotImplementedError

    @property
    def declared(self) -> Sequence[Projection]:
        """The projections of the app; App says which."""
        raise NotImplementedError

    async def history(
        self,
        *,
        key: str | None = None,
        stream: str | None = None,
        types: str | Sequence[str] = "#",
        after: int = 0,
        since: datetime | None = None,
        until: datetime | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> AsyncIterator[Record]:
        """Records in order of position, a page at a time, to the end of the log as it is.

        key, stream: of one only. types: AMQP patterns. after: a position. since, until: recorded time. reverse: newest first.
        """
        for pattern in (types,) if isinstance(types, str) else types:
            check_pattern(pattern)
        query = Query(
            types=(types,) if isinstance(types, str) else tuple(types),
            key=key,
            stream=stream,
            after=after,
            since_us=None if since is None else us_of(since, "since"),
            until_us=None if until is None else us_of(until, "until"),
            reverse=reverse,
        )
        left = limit
        while left is None or left > 0:
            page = await self.store.read(replace(query, limit=HISTORY_PAGE if left is None else min(left, HISTORY_PAGE)))
            for record in page:
                yield record
            if not page:
                return
            left = None if left is None else left - len(page)
            last = page[-1].position
            query = replace(query, before=last) if reverse else replace(query, after=last)

    def decode(self, record: Envelope) -> Any:
        """The typed event in a record of any schema version, by the classes this app knows.

        Raises UnknownEvent, DecodeError.
        """
        code = self.known.get(record.type)
        if code is None:
            raise UnknownEvent(f"no handler of this app is annotated with a class for {record.type!r}, and app.knows() of none")
        return code.read(record, self.keys)

    async def db(
        self, sql: str, values: Sequence[Any] = (), *, after: Receipt | str | None = None, of: str | None = None
    ) -> list[tuple[Any, ...]]:
        """Read the tables that handlers and projections write: one statement, all its rows, within 30 s.

        after, of: wait until the group or projection `of` has finished what this receipt (or its token) is for.
        Raises TimedOut, BadOption (anything that is not reading).
        """
        if (after is None) != (of is None):
            raise BadOption("after= says what must be there already and of= which group or projection brings it: give both")
        if after is not None and of is not None:
            await self.wait_for(after, of)
        return await self.store.query(sql, values)

    async def find(
        self,
        model: type[M],
        sql: str,
        values: Sequence[Any] = (),
        *,
        after: Receipt | str | None = None,
        of: str | None = None,
    ) -> list[M]:
        """The rows of a query as objects: a dataclass or Struct whose fields are called like the columns.

        Raises BadOption naming the column that has no field or does not fit; otherwise as db().
        """
        rows = await self.db(sql, values, after=after, of=of)
        columns = getattr(rows, "columns", ())
        try:
            return [msgspec.convert(dict(zip(columns, row, strict=True)), model, strict=False) for row in rows]
        except msgspec.MsgspecError as error:
            raise BadOption(f"the columns {', '.join(columns)} do not make a {model.__qualname__}: {error}") from error

    async def wait_for(self, receipt: Receipt | str, group: str, *, timeout: Duration = "10s") -> None:
        """Return when a group has finished the published event: what it wrote can be read now.

        receipt: of publish() or of a decision, or its token, as it came in an HTTP header.
        Raises TimedOut, HandlerFailed (it is a dead letter), UnknownEvent (the group does not read this type), BadOption.
        """
        position = _position(receipt)
        until = monotonic() + seconds(timeout)
        while not await self._handled(group, position):
            if monotonic() > until:
                raise TimedOut(f"group {group!r} has not finished position {position} within {timeout}")
            await self.store.changed(0.1)

    async def _handled(self, group: str, position: int) -> bool:
        if any(group == each.name for each in self.declared):
            return await projections.handled(self.store, group, position)
        return await self.store.handled(group, position)


def _position(receipt: Receipt | str) -> int:
    token = receipt if isinstance(receipt, str) else receipt.token
    if not (token.isascii() and token.isdecimal() and 0 < len(token) < 20):
        raise BadOption(f"{token[:40]!r} is no token of a receipt: expected the text of Receipt.token, as '42'")
    return int(token)
