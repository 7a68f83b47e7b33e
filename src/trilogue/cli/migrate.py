"""`trilogue migrate`: create the schema of a log on a server, or bring it up to what this release knows.

migrate --url postgresql://owner@host/db      schema 1, as it was
migrate --url amqp://… --store postgresql://… the store beside a broker
"""

from trilogue.brokers import DEFAULT_STORE, is_broker
from trilogue.cli.log import DEFAULT_LOG, Json, Log
from trilogue.cli.output import safe, say, say_json
from trilogue.errors import Unsupported
from trilogue.stores import open_store, redacted


async def migrate(*, json: Json = False, log: Log = DEFAULT_LOG) -> None:
    """Create the schema on a PostgreSQL server, or bring it up; programs that run meanwhile go on.

    Programs do so themselves when they open the log, if their user may create tables; this is for one who may.

        trilogue migrate --url postgresql://owner@localhost/app
    """
    url = (log.beside or DEFAULT_STORE) if is_broker(log.url) else log.url
    store = open_store(url)
    bring_up = getattr(store, "migrate", None)
    if bring_up is None:
        raise Unsupported(f"{redacted(url)} is brought up when a program opens it: migrate is for postgresql://")
    before, now = await bring_up()
    if json:
        say_json({"url": redacted(url), "before": before, "now": now})
        return
    told = "as it was" if before == now else "created" if before == 0 else f"it was {before}"
    say(f"{safe(redacted(url))}: schema {now}, {told}")
