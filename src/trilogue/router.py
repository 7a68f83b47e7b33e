"""What services register themselves on: `@router.on` above their handlers, `@router.setup` above what makes their tables."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, overload

from trilogue.durations import Duration
from trilogue.errors import UnknownEvent
from trilogue.handlers import check_options
from trilogue.instances import registration
from trilogue.ports import Db
from trilogue.process import Process
from trilogue.projection import PROJECTED
from trilogue.retry import Retry
from trilogue.schema.known import classes_of

P = ParamSpec("P")
R = TypeVar("R")
Q = TypeVar("Q", bound=Process)
Setup = Callable[[Db], object]


class Router:
    """A bundle of subscriptions, to be included in an App, so that services need not import the app.

    >>> router = Router()
    """

    def __init__(self) -> None:
        self.handlers: list[tuple[Callable[..., Any], str | None, dict[str, Any]]] = []
        self.setups: list[Setup] = []
        self.process_classes: list[tuple[type[Process], dict[str, Any]]] = []
        self.projection_functions: list[tuple[Callable[..., Any], str | None, dict[str, Any]]] = []
        self.models: list[Any] = []

    @overload
    def on(self, handler: Callable[P, R], /) -> Callable[P, R]: ...

    @overload
    def on(
        self,
        pattern: str | None = None,
        /,
        *,
        group: str | None = None,
        order: Literal["key"] | None = "key",
        retry: Retry | None = None,
        concurrency: int = 16,
        timeout: Duration | None = None,
        on_dead: Literal["skip", "park"] = "skip",
        batch: int | None = None,
        start: Literal["now", "beginning"] = "now",
        reset: Callable[[Db], None] | None = None,
        db_limit: Duration = "250ms",
    ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...

    def on(self, handler_or_pattern: Any = None, /, **options: Any) -> Any:
        """Subscribe a function to the events its first parameter is annotated with; returns it untouched.

        pattern: an AMQP pattern; with an annotation their intersection, alone it hands over the Record.
        group: its name in production; `module.function` if not given.
        order: "key": one at a time per key, in order; None: any order.
        retry: how often and after which waits; then a dead letter. on_dead: "park" keeps the key waiting behind it.
        concurrency: how many keys at once (1 to 1,000). timeout: of one call of an async handler.
        batch: most events of one call, for a handler of list[...].
        start: where a new group begins. reset: empties what it wrote through `db`, before a replay in place.
        db_limit: how long the SQL of one call with `db` may take.
        Raises a WiringError when the App is opened.
        """
        check_options(options)
        if isinstance(handler_or_pattern, type):
            raise UnknownEvent(
                f"on({handler_or_pattern.__qualname__}): write @app.on alone; the annotation of the parameter says which events"
            )
        if callable(handler_or_pattern):
            self.handlers.append((handler_or_pattern, None, options))
            return handler_or_pattern

        def register(handler: Callable[P, R]) -> Callable[P, R]:
            self.handlers.append((handler, handler_or_pattern, options))
            return handler

        return register

    def process(
        self,
        model: type[Q],
        /,
        *,
        group: str | None = None,
        retry: Retry | None = None,
        start: Literal["now", "beginning"] = "now",
        on_dead: Literal["skip", "park"] = "park",
    ) -> type[Q]:
        """Run the instances of a Process class; returns the class. Also as `@app.process` above it.

        group: its name; `process.NAME` if not given. retry, start: as for on(). on_dead: "park" keeps what follows of the same
        key waiting behind a step that failed for good, until somebody redrives or drops it.
        Raises a WiringError for what is no process now, and for what is wrong with it when the App is opened.

        >>> router.process(MoneyTransfer, retry=Retry(3, "1s"))     # doctest: +SKIP
        """
        if not isinstance(model, type) or not issubclass(model, Process):
            raise UnknownEvent(f"process({model!r}): expected a class, as class Transfer(Process, key='id', name='transfer')")
        options = {"group": group, "retry": retry, "start": start, "on_dead": on_dead}
        self.process_classes.append((model, options))
        self.setups.append(registration(model, group))
        return model

    def knows(self, *models: Any) -> None:
        """Name event classes that no handler takes, Aggregates, Deciders and Decisions: for decode() and `trilogue schema`.

        Raises UnknownEvent for anything else.

        >>> router.knows(Account, OrderPlaced)     # doctest: +SKIP
        """
        for model in models:
            classes_of(model)
        self.models += models

    def projection(
        self,
        pattern: str | None = None,
        /,
        *,
        tables: Mapping[str, str],
        version: int = 1,
        indexes: Sequence[str] = (),
        name: str | None = None,
        switch: Literal["auto", "manual"] = "auto",
        batch: int | None = None,
        retry: Retry | None = None,
        db_limit: Duration = "250ms",
        erased: Callable[[str, Db], object] | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Fold the events a function is annotated with into SQL tables, from the beginning of the log; returns it untouched.

        pattern: as for on(). tables: name to columns; in the SQL of the function `{name}` is the table being written, readers
        use the view of that name. indexes: as "balances(cents)". name: the function's if not given.
        version: raise it with the function or the tables: they are built anew beside the old ones, and shown when they are
        ready. switch: "manual" waits with that for App.switch(). batch: most events of one call, for a handler of list[...].
        retry, db_limit: as for on(); what fails for good parks its key. erased: forgets a person, (subject, db).
        What it returns is published, but not while it is built. Raises a WiringError when the App is opened.
        """
        options = {
            "tables": tables, "version": version, "indexes": indexes, "name": name, "switch": switch, "batch": batch,
            "retry": retry, "db_limit": db_limit, "erased": erased,
        }  # fmt: skip

        def register(function: Callable[P, R]) -> Callable[P, R]:
            self.projection_functions.append((function, pattern, options))
            if inspect.isfunction(function):  # a test may begin with the function alone
                setattr(function, PROJECTED, (pattern, options))
            return function

        return register

    def setup(self, create: Setup) -> Setup:
        """Run a function with the database at every start, in one transaction: `create table if not exists …`."""
        self.setups.append(create)
        return create

    def include(self, *routers: "Router") -> None:
        """Take over everything these routers hold."""
        for router in routers:
            self.handlers += router.handlers
            self.setups += router.setups
            self.models += router.models
            self.process_classes += router.process_classes
            self.projection_functions += router.projection_functions
