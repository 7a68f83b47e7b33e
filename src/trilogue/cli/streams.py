"""Commands for the event store side: `streams`, `snapshots`.

streams show account-ACC001         its history: version, when, who, why, what
streams state account-ACC001 --app bank:app --version 3        what it was, and with --against what changed since
streams close account-ACC001        nothing is appended to it any more
snapshots list                      states that are kept; nothing depends on them
"""

import json
from datetime import datetime
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from trilogue import App
from trilogue.cli.act import Yes, confirm, seek_to
from trilogue.cli.load import load_app
from trilogue.cli.log import DEFAULT_LOG, Json, Log, opened
from trilogue.cli.output import note, record_fields, safe, say, say_json, say_table, shown, stamp
from trilogue.cli.show import MOST
from trilogue.errors import BadOption, TrilogueError, UnknownEvent
from trilogue.events import Record, as_datetime, now_us
from trilogue.ports import Query, Store
from trilogue.rehydrate import OWNER, SEPARATOR, pages

Stream = Annotated[str, Parameter(help="Its name, as account-ACC001.")]
Version = Annotated[int, Parameter(validator=Number(gte=1, lte=MOST))]
LISTED = 1_000


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def show(stream: Stream, /, *, json: Json = False, log: Log = DEFAULT_LOG) -> None:
    """Print the history of a stream: each event with its version, when it was recorded, who did it and why."""
    async with opened(log) as store:
        records = [record async for page in pages(store, Query(stream=stream)) for record in page]
        about = msgspec.json.decode(await store.state("stream", stream) or b"{}")
    if not records:
        raise TrilogueError(f"there is no stream {stream!r} on this log: expected its whole name, as 'account-ACC001'")
    if json:
        say_json({"stream": stream, "closed": about.get("closed"), "events": [_fields(record) for record in records]})
        return
    say_table(("version", "recorded", "type", "who", "why", "data"), [_row(record) for record in records])
    if "closed" in about:
        say(f"\nclosed: {safe(about['closed'])}")
    if "first" in about:
        say(f"\nits beginning is hidden: it was truncated before version {about['first']}")


def _fields(record: Record) -> dict[str, Any]:
    return {**record_fields(record), "who": record.who, "why": record.why}


def _row(record: Record) -> tuple[str, ...]:
    who, why = record.who or record.source, record.why or "-"
    return (str(record.version), stamp(record.recorded_us), record.type, who, why, shown(record.data))


async def state(
    stream: Stream,
    /,
    *,
    app: Annotated[str, Parameter(help="MODULE:APP that knows the aggregate: app.knows(Account).")],
    version: Version | None = None,
    position: Version | None = None,
    at: Annotated[str | None, Parameter(help="A recorded time as 2026-01-31T12:00Z, or 2h-ago.")] = None,
    against: Annotated[Version | None, Parameter(help="Also print what changed up to this version.")] = None,
    json: Json = False,
) -> None:
    """Print the state of a stream as it is, or as it was at a version, a position or a time."""
    loaded = load_app(app)
    model, id = model_of(loaded, stream)
    moment = None if at is None else _moment(at)
    async with loaded:
        await _version(loaded.store, stream)
        found = await loaded.load(model, id, version=version, position=position, at=moment)
        changed = None if against is None else await loaded.diff(model, id, found.version, against)
    fields = {"stream": stream, "version": found.version, "state": _plain(getattr(found, "state", found))}
    if changed is not None:
        fields["changes"] = {name: [_plain(was), _plain(now)] for name, (was, now) in changed.changes.items()}
    if json:
        say_json(fields)
        return
    say(f"{safe(stream)} at version {found.version:,}: {shown(msgspec.json.encode(fields['state']))}")
    for name, (was, now) in fields.get("changes", {}).items():
        say(f"  {safe(name)}: {shown(msgspec.json.encode(was))} -> {shown(msgspec.json.encode(now))}")


def model_of(app: App, stream: str) -> tuple[Any, str]:
    """The Aggregate or Decider that an app knows for a stream, and the id; raises UnknownEvent."""
    patterns = []
    for model in app.models:
        pattern: str = getattr(model, "stream_pattern", "") or getattr(model, "stream", "")
        before, _, after = pattern.partition("{id}")
        if pattern and stream.startswith(before) and stream.endswith(after) and len(stream) > len(before) + len(after):
            return model, stream.removeprefix(before).removesuffix(after)
        patterns += [pattern] if pattern else []
    known = f"its streams are {', '.join(patterns)}" if patterns else "it names none: app.knows(Account)"
    raise UnknownEvent(f"the app knows no aggregate for the stream {stream!r}: {known}")


def _moment(text: str) -> datetime:
    place = seek_to(text, now_us())
    if place.time_us is None:
        raise BadOption(f"--at {text!r} is no time: expected 2026-01-31T12:00Z, or 2h-ago")
    return as_datetime(place.time_us)


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, enc_hook=str)


async def close(
    stream: Stream,
    /,
    *,
    reason: Annotated[str, Parameter(help="Why, in a few words; shown to whoever tries to append.")],
    yes: Yes = False,
    log: Log = DEFAULT_LOG,
) -> None:
    """Let nothing be appended to a stream any more; its history stays."""
    async with opened(log) as store:
        version = await _version(store, stream)
        note(f"stream {safe(stream)} would be closed at version {version:,}, for good")
        confirm(yes, "close")
        await store.close_stream(stream, reason)
    say(f"stream {safe(stream)}: closed at version {version:,}")


async def truncate(
    stream: Stream,
    /,
    *,
    before: Annotated[Version, Parameter(help="The first version that is still shown.")],
    yes: Yes = False,
    log: Log = DEFAULT_LOG,
) -> None:
    """Hide the beginning of a stream, for good; retention may remove it once no group needs it."""
    async with opened(log) as store:
        version = await _version(store, stream)
        if before > version:
            raise BadOption(f"--before {before}: stream {stream!r} has version {version}, its newest event has to stay")
        note(f"versions below {before:,} of stream {safe(stream)} would be hidden, for good")
        confirm(yes, "truncate")
        await store.truncate_stream(stream, before)
    say(f"stream {safe(stream)}: begins at version {before:,}")


async def _version(store: Store, stream: str) -> int:
    version = await store.stream_version(stream)
    if not version:
        raise TrilogueError(f"there is no stream {stream!r} on this log: expected its whole name, as 'account-ACC001'")
    return version


# ── snapshots ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def snapshots_list(*, json: Json = False, log: Log = DEFAULT_LOG) -> None:
    """List the states of streams that are kept, so that loading need not read them from the start."""
    async with opened(log) as store:
        kept = await store.states(OWNER, limit=LISTED)
    rows = []
    for state in kept:
        stream, _, reducer = state.id.partition(SEPARATOR)
        rows.append({"stream": stream, "fold": reducer, "version": _kept_version(state.body), "taken": stamp(state.at_us)}
                    | {"bytes": len(state.body)})  # fmt: skip
    if json:
        say_json(rows)
    elif not rows:
        say("no snapshots")
    else:
        say_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
        if len(rows) == LISTED:
            note(f"the first {LISTED:,} are shown")


def _kept_version(body: bytes) -> str:
    try:
        return str(json.loads(body)["version"])
    except (ValueError, KeyError, TypeError):
        return "sealed"


async def snapshots_drop(
    stream: Annotated[str | None, Parameter(help="Of which stream; --all for every one.")] = None,
    /,
    *,
    all: Annotated[bool, Parameter(name="--all", help="Every one.")] = False,
    log: Log = DEFAULT_LOG,
) -> None:
    """Forget snapshots; they are made again where they are worth it, and everything reads the same without."""
    if (stream is None) == (not all):
        raise BadOption("which snapshots? give a stream, or --all")
    prefix = "" if stream is None else stream + SEPARATOR
    async with opened(log) as store:
        count = await store.transact(lambda tx: tx.clear_states(OWNER, prefix=prefix))
    say(f"{count:,} snapshots dropped")
