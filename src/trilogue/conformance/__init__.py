"""What a Store promises, as tests anybody can run against one.

    PROMISES ── each: one sentence, the Features it needs, an async function of `make_store`
    async for outcome in check("sqlite:///x.db"): print(outcome.promise.name, outcome.verdict)

A promise calls `make_store()` for every store it opens; all of one promise's stores are on the same log, which is empty at
first. It is skipped exactly when the store does not list a Feature it needs. Written for a new adapter in its own tests:

    @pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.name)
    def test_keeps(promise): asyncio.run(promise.keep(lambda: MyStore(...)))
"""

from trilogue.conformance import effects, groups, log, streams, successors, transactions, workers
from trilogue.conformance.check import Outcome, check
from trilogue.conformance.tools import PROMISES, Broken, MakeStore, Promise

__all__ = [
    "PROMISES",
    "Broken",
    "MakeStore",
    "Outcome",
    "Promise",
    "check",
    "effects",
    "groups",
    "log",
    "streams",
    "successors",
    "transactions",
    "workers",
]
