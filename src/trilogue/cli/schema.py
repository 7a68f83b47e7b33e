"""`schema list`, `schema show`, `schema check`: what an App's events look like, and whether they may be deployed.

type          version  key       reads  fields                        list
order.placed        3  customer  1, 2   currency, customer, note?, …
error: order.placed version 3: field 'total' was string, is integer; put it back, or declare version=4 with …      check
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trilogue.cli.load import load_app
from trilogue.cli.log import Json, Log, near, opened
from trilogue.cli.output import flush, note, progress, safe, say, say_json, say_table
from trilogue.codec import Coder
from trilogue.errors import BadOption, TrilogueError, UnknownEvent
from trilogue.ports import Store
from trilogue.schema.changes import Change, Lock, changes, lock_text, read_lock, updated
from trilogue.schema.forms import fields_of, form_of
from trilogue.schema.stored import SAMPLE, Report, Tally, read_stored
from trilogue.stores.sqlite_store import SqliteStore

LOCK_FILE = "schemas.lock.json"

AppSpec = Annotated[str, Parameter(name="--app", help="MODULE:APP, as video:app for the `app` in video.py.")]
LockFile = Annotated[str | None, Parameter(help=f"The file that holds every released schema; {LOCK_FILE} if not given.")]
Url = Annotated[str | None, Parameter(env_var="TRILOGUE_URL", help="A log to read; the App's own if it is there.")]


async def schema_list(*, app: AppSpec, json: Json = False) -> None:
    """List the events an App knows, with the versions it can read."""
    coders = load_app(app).known
    if json:
        say_json([{**_row(code), "fields": fields_of(form_of(code))} for code in coders.values()])
        return
    if not coders:
        say("this App knows no events: annotate handlers with them, or name them in app.knows(...)")
        return
    say_table(("type", "version", "key", "reads", "fields"), [_cells(code) for code in coders.values()])


def _row(code: Coder) -> dict[str, Any]:
    return {"type": code.type, "version": code.version, "key": code.mark.key, "reads": list(_reads(code))}


def _reads(code: Coder) -> range:
    """The older versions that are upcast."""
    return range(1, code.version) if code.mark.upcasts else range(0)


def _cells(code: Coder) -> Sequence[str | int]:
    reads = ", ".join(map(str, _reads(code))) or "-"
    return code.type, code.version, code.mark.key or "-", reads, ", ".join(fields_of(form_of(code)))


async def schema_show(
    type: Annotated[str, Parameter(help="As `schema list` shows it.")], /, *, app: AppSpec, json: Json = False
) -> None:
    """Show the schema of one event, as the lock file would hold it."""
    coders = load_app(app).known
    if type not in coders:
        raise UnknownEvent(f"this App knows no event {type!r}:{near(type, coders)} see `trilogue schema list --app {app}`")
    say_json({"type": type, **form_of(coders[type])}, line=json)


# ── check ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def schema_check(
    *,
    app: AppSpec,
    url: Url = None,
    lock: LockFile = None,
    update: Annotated[bool, Parameter(help="Write today's schemas to the lock file.")] = False,
    force: Annotated[bool, Parameter(help="With --update: breaking ones, too.")] = False,
    sample: Annotated[str, Parameter(help="Oldest and newest of each kind to read, or `all`.", show_default=True)] = str(SAMPLE),
    strict: Annotated[bool, Parameter(help="Fail also for stored types the App does not know.")] = False,
    json: Json = False,
) -> int:
    """Tell whether this code may be deployed: nothing released has changed, and all that is stored can be read."""
    if force and not update:
        raise BadOption("--force says what --update may write: add --update, or leave it out")
    count = _sample(sample)
    loaded = load_app(app)
    coders = loaded.known
    found = _compared(Path(lock or LOCK_FILE), coders, is_needed=lock is not None and not update)
    breaking = [change for change in found if change.breaking]
    wrote = update and _update(Path(lock or LOCK_FILE), coders, found, force=force)
    report = await _stored(loaded.store, url, coders, count)
    is_fine = (not breaking or wrote) and not (report and (report.unread or (strict and report.unknown)))
    if json:
        say_json({"ok": is_fine, "changes": [asdict(change) for change in found], "updated": wrote, **_fields(report)})
    else:
        _say_changes(found, wrote, refused=update and not wrote and bool(breaking))
        _say_report(report, strict)
        say("fine to deploy" if is_fine else "not to be deployed")
    return 0 if is_fine else 1


def _sample(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or not 0 < int(text) <= 10**9:
        raise BadOption(f"--sample {text!r} is not understood: expected a number from 1, or all")
    return int(text)


# ── the lock file ────────────────────────────────────────────────────────────────────────────────────────────────────


def _compared(path: Path, coders: Mapping[str, Coder], *, is_needed: bool) -> list[Change]:
    return changes(_read(path, is_needed=is_needed), coders)


def _read(path: Path, *, is_needed: bool = False) -> Lock:
    try:
        return read_lock(path.read_bytes(), str(path))
    except FileNotFoundError:
        if is_needed:
            raise TrilogueError(f"there is no lock file {path}: make it with --update, and commit it") from None
        return {}


def _update(path: Path, coders: Mapping[str, Coder], found: Sequence[Change], *, force: bool) -> bool:
    if any(change.breaking for change in found) and not force:
        return False
    # Beside it and then in its place: a lock file that is half written would be taken for a broken one.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(lock_text(updated(_read(path), coders)))
    beside.replace(path)
    return True


def _say_changes(found: Sequence[Change], wrote: bool, *, refused: bool) -> None:
    for change in found:
        say(f"{'breaking' if change.breaking else 'new'}: {safe(str(change))}")
    if refused:
        note("the lock file was not written: mend what is breaking, or accept it with --update --force")
    elif wrote:
        say("the lock file holds today's schemas: commit it")
    elif found:
        note("the lock file does not hold these: add --update for what is meant, and commit it")


# ── the log ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _stored(own: Store, url: str | None, coders: Mapping[str, Coder], sample: int | None) -> Report | None:
    """What a log holds; None where no log was named and the App's own is not there."""
    if url is None and not _is_there(own):
        note("no log was read: name one with --url")
        return None
    async with opened(Log(url or own.url)) as log:
        kinds = await log.kinds()
        with progress("reading", sum(kind.count if sample is None else min(kind.count, 2 * sample) for kind in kinds)) as advance:
            return await read_stored(log, coders, sample=sample, advance=advance)


def _is_there(store: Store) -> bool:
    return isinstance(store, SqliteStore) and not store.in_memory and Path(store.path).exists()


def _fields(report: Report | None) -> dict[str, Any]:
    if report is None:
        return {"stored": None}
    return {
        "stored": [asdict(tally) for tally in report.tallies],
        "unknown": [asdict(kind) for kind in report.unknown],
        "newer": [asdict(kind) for kind in report.newer],
    }


def _say_report(report: Report | None, strict: bool) -> None:
    if report is None:
        return
    say_table(("stored", "version", "records", "read", "failed"), [_tally_cells(tally) for tally in report.tallies])
    for each in report.unread:
        say(f"unreadable: {safe(str(each))}")
    for kind in report.unknown:
        said = f"no class for {safe(kind.type)} version {kind.schema_version}, {kind.count:,} stored"
        say(f"{'unknown' if strict else 'warning'}: {said}; name it in app.knows(...)")
    for kind in report.newer:
        say(f"warning: {safe(kind.type)} was written as version {kind.schema_version} by newer code than this")
    flush()


def _tally_cells(tally: Tally) -> Sequence[str | int]:
    version = "-" if tally.schema_version is None else str(tally.schema_version)
    stored = "-" if tally.stored is None else f"{tally.stored:,}"
    return tally.name, version, stored, tally.looked, tally.failed
