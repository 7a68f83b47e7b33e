"""`certify URL`: every promise of a log, proved against the one behind a URL, on places of its own beside it.

kept     a_crash_loses_nothing       After a crash in the middle of a batch, exactly what was not settled comes again, …
skipped  parked_keys_wait            needs: parked keys
broken   redrive_in_order            Broken: the one: expected [(4, 1)], got []

amqp://localhost alone: 14 kept, 1 broken, 60 skipped
"""

from typing import Annotated

from cyclopts import Parameter

from trilogue.brokers import is_broker
from trilogue.cli.log import Json, Log, near
from trilogue.cli.output import flush, redacted, safe, say, say_json
from trilogue.conformance import PROMISES, Outcome, Promise, check
from trilogue.errors import BadOption

NAME_CHARS = max(len(promise.name) for promise in PROMISES)


async def certify(
    url: Annotated[str, Parameter(help="As amqp://…, kafka://…, postgresql://…, sqlite:///file.db, memory://.")],
    /,
    *,
    store: Annotated[str | None, Parameter(help="The store beside a broker; none: without one.")] = None,
    only: Annotated[tuple[str, ...], Parameter(help="Promises whose names contain this, as retry.")] = (),
    json: Json = False,
) -> int:
    """Prove every promise of a log against a URL: on files, a schema, queues or topics made for it and removed again.

    Exit code 1 if one is broken.

        trilogue certify sqlite:///trilogue.db
        trilogue certify amqp://localhost --store postgresql://localhost/app
        trilogue certify kafka://localhost:9092 --store none --only dead
    """
    log, promises = Log(url, store), _chosen(only)
    outcomes: list[Outcome] = []
    async for outcome in check(url, promises, store=log.beside):
        outcomes.append(outcome)
        if not json:
            say(_line(outcome))
            flush()
    counts = _counts(outcomes)
    if json:
        say_json({"url": redacted(url), "store": _beside(log), **counts, "promises": [_fields(each) for each in outcomes]})
    else:
        say(f"\n{safe(_where(log))}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(counts["broken"] > 0)


def _chosen(only: tuple[str, ...]) -> list[Promise]:
    chosen = [promise for promise in PROMISES if not only or any(part in promise.name for part in only)]
    if not chosen:
        names = [promise.name for promise in PROMISES]
        raise BadOption(f"no promise is named like {' or '.join(map(repr, only))}:{near(only[0], names)} there are {len(names)}")
    return chosen


def _counts(outcomes: list[Outcome]) -> dict[str, int]:
    verdicts = [outcome.verdict for outcome in outcomes]
    return {verdict: verdicts.count(verdict) for verdict in ("kept", "broken", "skipped")}


def _line(outcome: Outcome) -> str:
    needs = "needs: " if outcome.verdict == "skipped" else ""
    text = f"{needs}{outcome.reason}" if outcome.reason else outcome.promise.text
    return f"{outcome.verdict:<8} {outcome.promise.name:<{NAME_CHARS}} {safe(redacted(text))}"


def _fields(outcome: Outcome) -> dict[str, str]:
    promise = outcome.promise
    return {"name": promise.name, "promise": promise.text, "verdict": outcome.verdict, "reason": redacted(outcome.reason)}


def _beside(log: Log) -> str | None:
    return None if log.beside is None or not is_broker(log.url) else redacted(log.beside)


def _where(log: Log) -> str:
    if not is_broker(log.url):
        return redacted(log.url)
    beside = _beside(log)
    return f"{redacted(log.url)} alone" if beside is None else f"{redacted(log.url)} with {beside}"
