"""`trace ID`: what led to what across groups, as a tree.

4  2026-11-22T15:09:38.123Z  video.watched  u1  {"user":"u1"}                        dead in analytics
5  2026-11-22T15:09:38.131Z     badge.won   u1  {"user":"u1","badge":"b"}  by badge
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

from cyclopts import Parameter

from trilogue.cli.log import DEFAULT_LOG, Json, Log, opened
from trilogue.cli.output import record_fields, safe, say, say_json, shown, stamp
from trilogue.cli.show import MOST, PAGE
from trilogue.errors import TrilogueError
from trilogue.events import Record, caused_id
from trilogue.history import Traced, traced
from trilogue.ports import Query, Store


async def trace(
    record: Annotated[str, Parameter(help="The position or the id of any record that belongs to it.")],
    /,
    *,
    json: Json = False,
    log: Log = DEFAULT_LOG,
) -> None:
    """Print everything that belongs together with a record, each below what caused it: which group made it, where it died."""
    async with opened(log) as store:
        found = await traced(store, await _record(store, record))
        makers = emitters(found, [group.name for group in (await store.status()).groups])
        dead = await _dead_in(store, found)
    if json:
        extra = [{"by": makers.get(each.record.id), "dead_in": dead.get(each.record.position, [])} for each in found]
        say_json([{"depth": each.depth, **more, **record_fields(each.record)} for each, more in zip(found, extra, strict=True)])
        return
    for each in found:
        say(_line(each, makers.get(each.record.id), dead.get(each.record.position, [])))


async def _record(store: Store, text: str) -> Record:
    is_position = text.isascii() and text.isdecimal() and int(text) <= MOST
    query = Query(after=int(text) - 1, before=int(text) + 1) if is_position else Query(id=text)
    found = await store.read(query)
    if not found:
        raise TrilogueError(f"no record has the {'position' if is_position else 'id'} {text!r}: see `trilogue tail`")
    return found[0]


def emitters(found: Sequence[Traced], groups: Sequence[str]) -> dict[str, str]:
    """By id of a record the group whose handler emitted it: ids of emits are made from their cause, the group and a number."""
    records = {each.record.id: each.record for each in found}
    caused: dict[str, set[str]] = {}
    for record in records.values():
        if record.causation_id in records:
            caused.setdefault(record.causation_id, set()).add(record.id)
    return {id: group for cause, ids in caused.items() for id, group in _made(records[cause], ids, groups)}


def _made(cause: Record, ids: set[str], groups: Sequence[str]) -> Iterator[tuple[str, str]]:
    for group in groups:
        for n in range(len(ids)):
            id = caused_id(cause.id, group, n)
            if id in ids:
                yield id, group


async def _dead_in(store: Store, found: Sequence[Traced]) -> dict[int, list[str]]:
    """By position the groups that gave up on it; of a log with very many dead letters the first of them."""
    positions = {each.record.position for each in found}
    dead: dict[int, list[str]] = {}
    for letter in await store.dead(None, after=min(positions) - 1, limit=10 * PAGE):
        if letter.record.position in positions:
            dead.setdefault(letter.record.position, []).append(letter.group)
    return dead


def _line(each: Traced, maker: str | None, dead: Sequence[str]) -> str:
    record = each.record
    where = f"{record.stream} v{record.version}" if record.stream else record.key or "-"
    indent = "   " * each.depth
    by = f"  by {safe(maker)}" if maker else ""
    died = f"  dead in {safe(', '.join(dead))}" if dead else ""
    what = f"{indent}{safe(record.type)}  {safe(where)}  {shown(record.data)}"
    return f"{record.position:>8}  {stamp(record.recorded_us)}  {what}{by}{died}"
