"""What every kind of URL can do, as data; what a program asks for; and the sentence that refuses the rest.

                        memory  sqlite  postgresql  amqp + sqlite  …  amqp alone  kafka alone
    order per key         ✓       ✓         ✓             ✓               -            ✓
    parked keys           ✓       ✓         ✓             ✓               -            -

Adapters list their own features; a test holds that against this table. It is here as data, so that a refusal can name the
URLs that can without a driver being installed.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from trilogue.codec import Coder
from trilogue.durations import readable
from trilogue.errors import Unsupported
from trilogue.handlers import Subscription
from trilogue.ports import Feature
from trilogue.projection import Projection
from trilogue.retry import Retry

# How long a broker alone waits in all between the attempts at one record: it keeps the record in hand meanwhile.
WAIT_IN_HAND_US = 30_000_000

_POSTGRESQL = frozenset(Feature)
_SQLITE = _POSTGRESQL - {Feature.MACHINES, Feature.OWN_TRANSACTION}
_MEMORY = _SQLITE - {Feature.PERSISTENT, Feature.SHARED}
# What was published to a broker is not on the store's log: it cannot be read there, and an id is not looked up.
_ON_THE_STORES_LOG = {Feature.HISTORY, Feature.DEDUP, Feature.PROJECTIONS}
_BROKER = {Feature.COMPETE, Feature.DEAD, Feature.PERSISTENT, Feature.SHARED, Feature.MACHINES}

KINDS: Mapping[str, frozenset[Feature]] = {
    "memory": _MEMORY,
    "sqlite": _SQLITE,
    "postgresql": _POSTGRESQL,
    "amqp + sqlite": _SQLITE - _ON_THE_STORES_LOG - {Feature.REPLAY},
    "amqp + postgresql": _POSTGRESQL - _ON_THE_STORES_LOG - {Feature.REPLAY},
    "kafka + sqlite": _SQLITE - _ON_THE_STORES_LOG,
    "kafka + postgresql": _POSTGRESQL - _ON_THE_STORES_LOG,
    "amqp alone": frozenset(_BROKER),
    "kafka alone": frozenset(_BROKER | {Feature.ORDER, Feature.REPLAY}),
}


@dataclass(frozen=True, slots=True)
class Need:
    """Something a program asks of its log. mend: what to change in the program instead, if there is something."""

    what: str
    feature: Feature
    mend: str = ""


def needs(sub: Subscription) -> list[Need]:
    """What a subscription asks of its log."""
    group = f"group {sub.group.name!r}"
    order = (
        Need(f"{group} keeps order per key", Feature.ORDER, "give its handler order=None")
        if sub.group.ordered
        else Need(f"{group} competes for records", Feature.COMPETE)
    )
    found = [order]
    if sub.group.has_effects:
        found.append(Need(f"{group} writes through `db`", Feature.EFFECTS))
    if sub.park:
        found.append(Need(f"{group} parks keys", Feature.PARK, "leave on_dead='park' out"))
    if (wait_us := longest_us(sub.retry)) > WAIT_IN_HAND_US:
        waits = f"{group} waits up to {readable(wait_us)} between its attempts"
        found.append(Need(waits, Feature.RETRY, f"let its retry= wait {readable(WAIT_IN_HAND_US)} in all at most"))
    return found


def longest_us(retry: Retry) -> int:
    """How long a policy waits in all, at most, in microseconds."""
    return sum(min(retry.first_us << min(n, 40), retry.longest_us) for n in range(retry.attempts - 1))


def missing(
    features: Collection[Feature],
    subs: Iterable[Subscription],
    projections: Iterable[Projection] = (),
    coders: Iterable[Coder] = (),
) -> list[Need]:
    """What a program asks for and a log with these features cannot do. coders: of the events it knows."""
    asked = [need for sub in subs for need in needs(sub)]
    asked += [Need(f"projection {each.name!r} writes tables", Feature.EFFECTS) for each in projections]
    sealed = sorted(code.type for code in coders if code.sealing is not None)
    asked += [Need(f"event {each!r} has personal fields, whose keys a store keeps", Feature.EFFECTS) for each in sealed]
    return [need for need in asked if need.feature not in features]


def check(
    url: str,
    features: Collection[Feature],
    subs: Iterable[Subscription],
    projections: Iterable[Projection] = (),
    coders: Iterable[Coder] = (),
) -> None:
    """Raise Unsupported for the first thing a program asks for and its log cannot do. url: as it may be shown."""
    for need in missing(features, subs, projections, coders):
        raise refusal(url, need.what, need.feature, need.mend)


def refusal(url: str, what: str, feature: Feature, mend: str = "") -> Unsupported:
    """The error that says what a URL cannot do and which can. what: as a sentence without its end, "group 'g' parks keys"."""
    instead = f"{mend}, or use" if mend else "use"
    return Unsupported(f"{url}: {what}, which this log cannot do ({feature.value}): {instead} {who_can(feature)}")


def who_can(feature: Feature) -> str:
    """The URLs that have a feature, in words.

    >>> who_can(Feature.MACHINES)
    'postgresql://, amqp:// or kafka:// with store="postgresql://…", amqp:// or kafka:// alone'
    """
    alone = [f"{kind}://" for kind in ("memory", "sqlite", "postgresql") if feature in KINDS[kind]]
    beside = _beside(feature)
    bare = [f"{broker}://" for broker in ("amqp", "kafka") if feature in KINDS[f"{broker} alone"]]
    return ", ".join([*alone, *beside, *([f"{' or '.join(bare)} alone"] if bare else ())])


def _beside(feature: Feature) -> list[str]:
    """Brokers that have it with a store beside them; which one is named where it matters."""
    found: dict[str, list[str]] = {}
    for broker in ("amqp", "kafka"):
        stores = [store for store in ("sqlite", "postgresql") if feature in KINDS[f"{broker} + {store}"]]
        if stores:
            store = "a store beside it" if len(stores) == 2 else f'store="{stores[0]}://…"'
            found.setdefault(store, []).append(f"{broker}://")
    return [f"{' or '.join(brokers)} with {store}" for store, brokers in found.items()]


def table() -> str:
    """The table of features and URLs, as Markdown."""
    lines = ["| | " + " | ".join(f"`{kind}`" for kind in KINDS) + " |", "|---" + "|:-:" * len(KINDS) + "|"]
    for feature in Feature:
        marks = ("✓" if feature in features else "-" for features in KINDS.values())
        lines.append(f"| {feature.value} | {' | '.join(marks)} |")
    return "\n".join(lines)
