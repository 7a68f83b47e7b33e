"""Which event classes an App knows.

@app.on  def bill(e: OrderPlaced) -> Billed     takes and returns      ┐
app.knows(Account, OrderPaid)                   folds; the class itself ├──▶ {"order.placed": Coder, "order.billed": …}
processes, projections                          take                   ┘
"""

import inspect
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from trilogue.aggregate import Decision, reducer_of
from trilogue.codec import Coder, coder
from trilogue.errors import TwiceNamed
from trilogue.events import is_event
from trilogue.handlers import Subscription
from trilogue.process import Process
from trilogue.projection import Projection
from trilogue.schema.changes import differences
from trilogue.schema.forms import Form, form_of


class Knowing(Protocol):
    """What known() asks of an App. models: event classes, Aggregates, Deciders and Decisions it was told of."""

    models: list[Any]
    process_classes: list[tuple[type[Process], dict[str, Any]]]

    @property
    def subscriptions(self) -> Sequence[Subscription]:
        """Its handlers."""
        ...

    @property
    def declared(self) -> Sequence[Projection]:
        """Its projections."""
        ...


def known(app: Knowing) -> dict[str, Coder]:
    """The event classes of an app, by type: of handlers, of what they return, and of app.knows(); the newest version of each.

    Raises TwiceNamed where two classes are one type and version and do not look the same, UnknownEvent.
    """
    found: dict[str, Coder] = {}
    for code in _coders(app):
        there = found.get(code.type)
        if there is None or there.version < code.version:
            found[code.type] = code
        elif there.version == code.version:
            _check_same(there, code)
    return dict(sorted(found.items()))


def _coders(app: Knowing) -> Iterator[Coder]:
    for sub in (*app.subscriptions, *(projection.sub for projection in app.declared)):
        yield from sub.coders.values()
        yield from map(coder, _returned(sub.handler))
    for model in app.models:
        yield from map(coder, classes_of(model))
    for process, _ in app.process_classes:
        for step in filter(inspect.isfunction, vars(process).values()):
            yield from map(coder, _returned(step))


def classes_of(model: Any) -> Sequence[type]:
    """The event classes of an event class, Aggregate, Decider or Decision; raises UnknownEvent for anything else."""
    if is_event(model):
        return (model,)
    decides = _returned(model.decide) if isinstance(model, type) and issubclass(model, Decision) else ()
    return (*reducer_of(model).classes, *decides)


def _returned(function: Any) -> list[type]:
    """The event classes a function says it returns, as far as that can be read."""
    try:
        return list(_events_in(typing.get_type_hints(function).get("return")))
    except Exception:  # an annotation may hold anything; what a handler takes has been checked before
        return []


def _events_in(annotation: Any) -> Iterator[type]:
    if is_event(annotation):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _events_in(part)


def _check_same(one: Coder, other: Coder) -> None:
    if one.cls is other.cls or _is_same(form_of(one), form_of(other)):
        return
    names = " and ".join(f"{code.cls.__module__}.{code.cls.__qualname__}" for code in (one, other))
    raise TwiceNamed(
        f"event {one.type!r} version {one.version} is two classes that differ: {names}; keep one of them, or give the newer "
        f"one version={one.version + 1} with upcast="
    )


def _is_same(one: Form, other: Form) -> bool:
    return not differences(one, other) and {**one, "schema": None} == {**other, "schema": None}
