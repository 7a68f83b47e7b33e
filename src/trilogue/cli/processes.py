"""Commands that look at processes: `processes list`, `processes show`.

process   id  since                     changed                   events  timers                      problem
transfer  t1  2026-11-22T15:09:38.123Z  2026-11-22T15:09:38.130Z       2  stuck 2026-11-22T15:24:38…  -
"""

from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from trilogue.cli.log import DEFAULT_LOG, Json, Log, opened
from trilogue.cli.output import note, safe, say, say_json, say_table, stamp
from trilogue.instances import LISTED, ProcessInstance, process_instance, process_instances

MOST_LISTED = 100_000


async def processes_list(
    name: Annotated[str | None, Parameter(help="Only of this process.")] = None,
    /,
    *,
    stuck: Annotated[
        str | None, Parameter(help="Only those whose record failed, or without a change for so long and no timer to come, as 1h.")
    ] = None,
    limit: Annotated[int, Parameter(validator=Number(gte=1, lte=MOST_LISTED), help="At most this many.")] = LISTED,
    json: Json = False,
    log: Log = DEFAULT_LOG,
) -> None:
    """List the instances of processes that have not ended."""
    async with opened(log) as store:
        found = await process_instances(store, name, stuck=stuck, limit=limit)
    if json:
        say_json([_fields(each) for each in found])
        return
    if not found:
        say("no process is stuck" if stuck is not None else "no process has begun, or all have ended")
        return
    say_table(_COLUMNS, [_row(each) for each in found])
    if len(found) == limit:
        note(f"the first {limit:,} are shown: name one process, or raise --limit")


async def processes_show(
    name: Annotated[str, Parameter(help="Of the process.")],
    id: Annotated[str, Parameter(help="Of the instance.")],
    /,
    *,
    json: Json = False,
    log: Log = DEFAULT_LOG,
) -> None:
    """Show one instance whole: its state, the timers it waits for, and why it does not go on."""
    async with opened(log) as store:
        found = await process_instance(store, name, id)
    if json:
        say_json(_fields(found))
    else:
        _say_instance(found)


_COLUMNS = ("process", "id", "started", "changed", "events", "timers", "problem")


def _row(each: ProcessInstance) -> tuple[str | int, ...]:
    timers = ", ".join(f"{name} {stamp(due)}" for name, due in each.timers.items())
    more = f" (and {len(each.problems) - 1} more)" if len(each.problems) > 1 else ""
    problem = each.problems[0] + more if each.problems else "-"
    return (each.process, each.id, stamp(each.started_us), stamp(each.changed_us), each.events, timers or "-", problem)


def _fields(each: ProcessInstance) -> dict[str, Any]:
    """A ProcessInstance for JSON."""
    return {
        "process": each.process,
        "id": each.id,
        "started": stamp(each.started_us),
        "changed": stamp(each.changed_us),
        "position": each.position,
        "events": each.events,
        "timers": {name: stamp(due) for name, due in each.timers.items()},
        "state": dict(each.state),
        "problems": list(each.problems),
    }


def _say_instance(each: ProcessInstance) -> None:
    fields = _fields(each)
    timers, state, problems = fields.pop("timers"), fields.pop("state"), fields.pop("problems")
    for name, value in fields.items():
        say(f"{name}: {safe(str(value))}")
    say("\ntimers:" if timers else "\ntimers: none")
    for name, due in timers.items():
        say(f"  {safe(name)}: {due}")
    say("\nstate:" if state else "\nstate: none")
    for name, value in state.items():
        say(f"  {safe(name)}: {safe(_text(value))}")
    say("\nproblems:" if problems else "\nproblems: none")
    for problem in problems:
        say(f"  {safe(problem)}")


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()
