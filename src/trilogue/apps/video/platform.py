"""The six services on one log, and how to make some of them fail.

SERVICES   user · recommendation · analytics · notification · badge · ranking: a Router each
platform() an App with all of them
failing()  the same service on a bad day: a share of its attempts fails, everything else stays as it is
"""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trilogue import App, Db, Failed, Router
from trilogue.apps.place import app_on
from trilogue.apps.video import analytics, badge, notification, ranking, recommendation, user

SERVICES: dict[str, Router] = {
    "user": user.router,
    "recommendation": recommendation.router,
    "analytics": analytics.router,
    "notification": notification.router,
    "badge": badge.router,
    "ranking": ranking.router,
}
Batch = Callable[[list[Any], Db], Sequence[object] | None]


class SimulatedFailure(Exception):
    """What a service raises on a bad day."""


def platform(url: str, *, store: str | None = None, fail: Mapping[str, float] | None = None, seed: int = 1) -> App:
    """An App with all six services.

    store: what stands beside a broker. fail: the share of attempts (0 to 1) that fails on purpose, by service. seed: of which do.
    """
    app = app_on(url, store, "video")
    for name, router in SERVICES.items():
        rate = (fail or {}).get(name, 0.0)
        app.include(failing(router, rate, random.Random(f"{seed} {name}")) if rate else router)
    return app


def failing(router: Router, rate: float, rng: random.Random) -> Router:
    """The same service, failing a share of its attempts. rate: 0 to 1."""
    unlucky = Router()
    unlucky.setups += router.setups
    unlucky.handlers += [
        (_sometimes(handler, rate, rng, ordered=options.get("order", "key") == "key"), pattern, options)
        for handler, pattern, options in router.handlers
    ]
    return unlucky


def _sometimes(handler: Batch, rate: float, rng: random.Random, *, ordered: bool) -> Batch:
    @functools.wraps(handler)
    def handle(events: list[Any], db: Db) -> list[object]:
        failed: list[int] = []
        users: set[str] = set()
        for n, event in enumerate(events):
            # In an ordered group what follows a failed event of the same key must not overtake it.
            if rng.random() < rate or event.user in users:
                failed.append(n)
                if ordered:
                    users.add(event.user)
        unlucky = set(failed)
        lucky = [event for n, event in enumerate(events) if n not in unlucky]
        done = handler(lucky, db) if lucky else None
        return [*(done or ()), *(Failed(n, SimulatedFailure("failed on purpose")) for n in failed)]

    return handle
