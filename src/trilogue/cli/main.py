"""`trilogue`: the commands, and what becomes of their errors.

    0    done
    1    the operation failed: the log is in trouble, or has no such thing
    2    usage: an option, a name, a URL or a program is wrong; nothing has happened
    130  Ctrl-C            141  the reader of our output went away (`trilogue tail | head`)

Every error is one sentence on standard error. `--debug` or TRILOGUE_DEBUG=1 shows the traceback.
"""

import asyncio
import importlib.metadata
import inspect
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter, UnknownCommandError

from trilogue.cli import (
    act,
    bench,
    certify,
    demo,
    describe,
    doctor,
    erase,
    groups,
    migrate,
    processes,
    projections,
    publish,
    relay,
    run,
    schema,
    show,
    streams,
    trace,
)
from trilogue.cli.output import flush, note, redacted, safe
from trilogue.errors import TrilogueError, WiringError

OK, FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141

cli = App(
    name="trilogue",
    help="One log, read three ways: message queue, event stream, event store.",
    version=lambda: importlib.metadata.version("trilogue"),
    default_parameter=Parameter(negative=(), show_default=False),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
dead = App(name="dead", help="List, show, redrive or drop the records that groups gave up on.")
store_streams = App(name="streams", help="Show, close or truncate the streams that aggregates live in.")
snapshots = App(name="snapshots", help="List or drop the states of streams that are kept.")
readers = App(name="groups", help="List, rename or forget groups.")
sagas = App(name="processes", help="List and show the processes that have begun and not ended, and what is stuck.")
tables = App(name="projections", help="List read models, build them anew, compare, switch, drop, forget, pause, skip an event.")
schemas = App(name="schema", help="What an App's events look like, and whether a change of them may be deployed.")
demos = App(name="demo", help="Programs to watch: a video platform, a bank, three levels of event-driven systems.")

cli.command(run.run)
cli.command(demos)
cli.command(publish.publish)
cli.command(show.tail)
cli.command(show.status)
cli.command(dead)
cli.command(act.replay)
cli.command(store_streams)
cli.command(trace.trace)
cli.command(snapshots)
cli.command(erase.erase_subject, name="erase")
cli.command(readers)
cli.command(groups.pause)
cli.command(groups.resume)
cli.command(sagas)
cli.command(tables)
cli.command(schemas)
cli.command(describe.describe)
cli.command(relay.relay)
cli.command(doctor.doctor)
cli.command(migrate.migrate)
cli.command(certify.certify)
cli.command(bench.bench)
dead.command(show.dead_list, name="list")
dead.command(show.dead_show, name="show")
dead.command(act.dead_redrive, name="redrive")
dead.command(act.dead_drop, name="drop")
readers.command(groups.groups_list, name="list")
readers.command(groups.groups_rename, name="rename")
readers.command(groups.groups_drop, name="drop")
store_streams.command(streams.show, name="show")
store_streams.command(streams.state, name="state")
store_streams.command(streams.close, name="close")
store_streams.command(streams.truncate, name="truncate")
snapshots.command(streams.snapshots_list, name="list")
snapshots.command(streams.snapshots_drop, name="drop")
sagas.command(processes.processes_list, name="list")
sagas.command(processes.processes_show, name="show")
tables.command(projections.projections_list, name="list")
tables.command(projections.projections_rebuild, name="rebuild")
tables.command(projections.projections_compare, name="compare")
tables.command(projections.projections_switch, name="switch")
tables.command(projections.projections_drop, name="drop")
tables.command(projections.projections_forget, name="forget")
tables.command(projections.projections_pause, name="pause")
tables.command(projections.projections_resume, name="resume")
tables.command(projections.projections_skip, name="skip")
schemas.command(schema.schema_list, name="list")
schemas.command(schema.schema_show, name="show")
schemas.command(schema.schema_check, name="check")
demos.command(demo.video)
demos.command(demo.queue)
demos.command(demo.stream)
demos.command(demo.bank)
demos.command(demo.levels)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. argv: without the program's name; that of the process if not given."""
    _write_anything()
    tokens = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("TRILOGUE_DEBUG", "0") not in ("", "0") or "--debug" in tokens
    try:
        code = cli.meta(tokens, exit_on_error=False, print_error=False, verbose=False)
        flush()
    except (Exception, KeyboardInterrupt) as error:
        if debug and isinstance(error, Exception):
            traceback.print_exc()
        return _explained(error)
    return code if isinstance(code, int) else OK


@cli.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[bool, Parameter(help="Show the traceback of an error (also TRILOGUE_DEBUG=1).")] = False,
) -> object:
    command, bound, _ = cli.parse_args(tokens, exit_on_error=False, print_error=False, verbose=False)
    result = command(*bound.args, **bound.kwargs)
    if inspect.iscoroutine(result):
        return asyncio.run(result)
    if isinstance(result, int):
        return result
    # Without a command there is nothing to do: the help it printed is the answer to a mistake.
    return OK if {"--help", "-h", "--version"} & set(tokens) else USAGE


def _write_anything() -> None:
    """Have characters that the locale lacks written as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _explained(error: BaseException) -> int:
    """Say what went wrong, in one sentence where there is something to say; the exit code."""
    match error:
        case KeyboardInterrupt():
            return INTERRUPTED
        case BrokenPipeError():
            _drop_output()
            return PIPE_CLOSED
        case CycloptsError():
            sentence = _usage(error)
        case TrilogueError() | OSError():
            sentence = str(error)
        case _:
            sentence = f"{type(error).__name__}: {error} (a defect: --debug shows where)"
    note(f"error: {safe(redacted(sentence))}")
    return USAGE if isinstance(error, (CycloptsError, WiringError)) else FAILED


def _usage(error: CycloptsError) -> str:
    tokens = error.unused_tokens
    if isinstance(error, UnknownCommandError) and tokens and tokens[0].startswith("-"):
        return f"Option {tokens[0]} stands before the command: write `trilogue COMMAND {tokens[0]} …`, see --help."
    command = " ".join(("trilogue", *(error.command_chain or ())))
    return f"{error} See `{command} --help`."


def _drop_output() -> None:
    # What is still buffered would fail again when the interpreter flushes it on its way out.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
