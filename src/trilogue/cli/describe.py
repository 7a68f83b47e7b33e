"""`describe MODULE:APP`: what is subscribed and how, where dead letters go, and what its URL cannot do.

shop at amqp://localhost with sqlite:///trilogue.db: one machine, several processes (survives os-crash)
group    handler     reads         order    at once  attempts         timeout  when it fails for good
billing  shop.bill   order.placed  per key  1        5, 1s to 5m      -        dead letter (trilogue dead list)

cannot: group 'audit' parks keys (parked keys): leave on_dead='park' out, or use memory://, …
"""

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from trilogue import App
from trilogue.brokers import is_broker
from trilogue.cli.load import load_app
from trilogue.cli.log import Json, Log, where, workers
from trilogue.cli.output import safe, say, say_json, say_table
from trilogue.cli.run import Spec
from trilogue.durations import readable
from trilogue.errors import BadOption
from trilogue.features import Need, missing, who_can
from trilogue.handlers import Subscription
from trilogue.ports import Feature, Store
from trilogue.projection import Projection


def describe(
    app: Spec,
    /,
    *,
    url: Annotated[str | None, Parameter(help="As if it were at this URL; its own if not given.")] = None,
    store: Annotated[str | None, Parameter(help="With --url of a broker: the store beside it; none: without one.")] = None,
    json: Json = False,
) -> int:
    """Say what an App subscribes to and how, where dead letters go, and what a URL cannot do of it; nothing is opened.

    Exit code 1 if the URL cannot do something that the App asks for.

        trilogue describe shop:app
        trilogue describe shop:app --url kafka://localhost:9092 --store none
    """
    loaded = load_app(app)
    if store is not None and url is None:
        raise BadOption("--store is for the URL that --url gives: add --url amqp://… or kafka://…")
    log = loaded.store if url is None else Log(url, store).open()
    cannot = missing(log.features, loaded.subscriptions, loaded.declared, loaded.known.values())
    fields = _fields(loaded, log, cannot)
    if json:
        say_json(fields)
    else:
        _say(fields)
    return int(bool(cannot))


def _fields(app: App, log: Store, cannot: Sequence[Need]) -> dict[str, Any]:
    return {
        "name": app.name,
        "url": where(log),
        "workers": workers(log),
        "survives": log.durability,
        "groups": [_group(sub, log) for sub in app.subscriptions],
        "projections": [_projection(each) for each in app.declared],
        "cannot": [_sentence(need) for need in cannot],
        "remarks": _remarks(app, log),
    }


def _group(sub: Subscription, log: Store) -> dict[str, Any]:
    retry = sub.retry
    return {
        "group": sub.group.name,
        "handler": f"{sub.handler.__module__}.{sub.handler.__qualname__}",
        "kind": _kind(sub),
        "reads": list(sub.group.patterns),
        "order": "per key" if sub.group.ordered else "any",
        "starts": "at the beginning" if sub.group.start == "beginning" else "with what comes",
        "at_once": 1 if sub.kind == "db" else sub.concurrency,
        "batch": sub.batch,
        "attempts": retry.attempts,
        "waits": _waits(retry.first_us, retry.longest_us) if retry.attempts > 1 else None,
        "timeout": None if sub.timeout_us is None else readable(sub.timeout_us),
        "dead_letters": _dead_letters(sub, log),
    }


def _kind(sub: Subscription) -> str:
    return "process" if sub.whole else {"async": "async", "thread": "in a thread", "db": "in the settlement"}[sub.kind]


def _waits(first_us: int, longest_us: int) -> str:
    return readable(first_us) if first_us == longest_us else f"{readable(first_us)} to {readable(longest_us)}"


def _dead_letters(sub: Subscription, log: Store) -> str:
    """Where a record goes that fails for good."""
    if Feature.EFFECTS not in log.features:
        queue = "topic" if Feature.REPLAY in log.features else "queue"
        return f"{queue} {sub.group.name}.dead"
    return "parked: its key waits" if sub.park else "dead letter of the store"


def _projection(each: Projection) -> dict[str, Any]:
    return {"name": each.name, "version": each.version, "reads": list(each.types), "tables": list(each.tables)}


def _sentence(need: Need) -> str:
    mend = f"{need.mend}, or use" if need.mend else "use"
    return f"{need.what} ({need.feature.value}): {mend} {who_can(need.feature)}"


def _remarks(app: App, log: Store) -> list[str]:
    """What works otherwise than one may think."""
    remarks = []
    beside_sqlite = is_broker(log.url) and Feature.EFFECTS in log.features and Feature.MACHINES not in log.features
    if beside_sqlite:
        remarks.append(f"the store beside the broker is a file: processes on other machines need {who_can(Feature.MACHINES)}")
    if app.declared and Feature.PROJECTIONS not in log.features and Feature.EFFECTS in log.features:
        remarks.append(
            "projections read the store's log: events of aggregates and decisions; what is only published goes to the broker"
        )
    late = [sub.group.name for sub in app.subscriptions if sub.group.start == "beginning"]
    if late and Feature.REPLAY not in log.features:
        remarks.append(f"{', '.join(late)}: a queue has no beginning; it gets what is published after it was declared")
    return remarks


def _say(fields: dict[str, Any]) -> None:
    say(f"{safe(fields['name'])} at {safe(fields['url'])}: {fields['workers']} (survives {fields['survives']})")
    if fields["groups"]:
        columns = ("group", "handler", "reads", "order", "at once", "attempts", "timeout", "when it fails for good")
        say_table(columns, [_row(group) for group in fields["groups"]])
    else:
        say("no handlers")
    if fields["projections"]:
        say("")
        rows = [(p["name"], p["version"], ", ".join(p["reads"]), ", ".join(p["tables"])) for p in fields["projections"]]
        say_table(("projection", "version", "reads", "tables"), rows)
    for word in ("cannot", "remarks"):
        for sentence in fields[word]:
            say(f"\n{'cannot' if word == 'cannot' else 'mind'}: {safe(sentence)}")


def _row(group: dict[str, Any]) -> tuple[str, ...]:
    handler = f"{group['handler']} ({group['kind']})"
    at_once = f"batches of {group['batch']}" if group["batch"] else str(group["at_once"])
    attempts = f"{group['attempts']}, {group['waits']}" if group["waits"] else str(group["attempts"])
    timeout, dead_letters = group["timeout"] or "-", group["dead_letters"]
    return (group["group"], handler, ", ".join(group["reads"]), group["order"], at_once, attempts, timeout, dead_letters)
