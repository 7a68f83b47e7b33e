"""`demo`: a video platform (one watch reaching six services), a bank, and the three levels of event-driven systems.

demo video                                          a generated sample; analytics fails 30 % of the time
demo video --input ml-latest-small --report json    a MovieLens folder
demo video --input - --columns user=u,video=v,time=at --down badge --fail ranking=0.1
demo video --url kafka://localhost:9092             the same program on a broker, with the same counts
demo queue                                          three watches, who was told
demo stream                                         four people stream, who is watching what, and how well
demo bank --accounts 50 --transfers 20000 --workers 2 --db bank.db
demo levels                                         what does a receiver have to ask for?

Beside a broker stands a store, a throw-away file unless --store names one. Queues and topics carry a prefix that is kept in the
store: a new store begins with empty ones, a store that was used goes on where it ended, and ?prefix= in the URL says otherwise.
"""

from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

MEMORY = "memory://"

_INPUT = Parameter(help="A watch log: MovieLens folder, CSV, TSV, JSON Lines, or - (stdin).", allow_leading_hyphen=True)
Url = Annotated[str | None, Parameter(help="The log: memory://, sqlite:///…, postgresql://…, amqp://… or kafka://….")]
Store = Annotated[
    str | None,
    Parameter(help="What stands beside a broker; a throw-away file if not given. Its queues and topics are its own: ?prefix=."),
]
Db = Annotated[str | None, Parameter(help="Keep the log in this file; running again goes on where it ended.")]
Report = Annotated[Literal["text", "json"], Parameter(help="For people or for programs.", show_default=True)]


async def video(
    *,
    input: Annotated[str | None, _INPUT] = None,
    columns: Annotated[str | None, Parameter(help="What its columns are called, as user=u,video=v,time=at.")] = None,
    limit: Annotated[int | None, Parameter(validator=Number(gte=1), help="Only the first so many watches.")] = None,
    speed: Annotated[str, Parameter(help="max, or how many times as fast as recorded: 60x.", show_default=True)] = "max",
    fail: Annotated[tuple[str, ...], Parameter(help="SERVICE=RATE: fails so often. Default: analytics=0.3.")] = (),
    down: Annotated[tuple[str, ...], Parameter(help="A service that is down until all the others are done.")] = (),
    db: Db = None,
    url: Url = None,
    store: Store = None,
    report: Report = "text",
    chain_sample: Annotated[int, Parameter(help="How many watches also go through the chain.", show_default=True)] = 20,
    seed: Annotated[int, Parameter(help="Of the generated sample and of what fails.")] = 1,
) -> None:
    """Feed a watch log to six services, one of which keeps failing, and report what became of every watch."""
    from trilogue.apps.video.demo import demo_video  # here: the other commands start without six services
    from trilogue.apps.video.options import VideoOptions

    await demo_video(VideoOptions(input, columns, limit, speed, fail, down, db, report, chain_sample, seed, url, store))


async def queue(*, url: Url = None, store: Store = None, report: Report = "text") -> None:
    """Publish three watches, and show who was told although analytics fails."""
    from trilogue.apps.video.queue_demo import demo_queue

    await demo_queue(url or MEMORY, report, store=store)


async def stream(*, url: Url = None, store: Store = None, report: Report = "text") -> None:
    """Let four people stream, and show who is watching, how well, and what is recommended to them."""
    from trilogue.apps.video.stream_demo import demo_stream

    await demo_stream(url or MEMORY, report, store=store)


async def bank(
    *,
    accounts: Annotated[int, Parameter(help="Between which money is moved.", show_default=True)] = 100,
    transfers: Annotated[int, Parameter(help="How many.", show_default=True)] = 3_000,
    writers: Annotated[int, Parameter(help="How many ask for transfers at once.", show_default=True)] = 16,
    workers: Annotated[int | None, Parameter(help="Processes on the log: 2, but 1 on memory://.")] = None,
    db: Db = None,
    url: Url = None,
    store: Store = None,
    seed: Annotated[int, Parameter(help="Of who pays whom.")] = 1,
    report: Report = "text",
) -> int:
    """Tell one account's story, move money between many, check that none was made or lost; exit code 1 if it was."""
    from trilogue.apps.bank.demo import demo_bank
    from trilogue.apps.bank.options import BankOptions

    found = await demo_bank(BankOptions(accounts, transfers, writers, workers, db, seed, report, url, store))
    return 0 if all(found["load"]["invariants"].values()) else 1


async def levels(*, url: Url = None, store: Store = None, report: Report = "text") -> None:
    """Run the three levels of event-driven systems, and count what each receiver has to ask for."""
    from trilogue.apps.levels.demo import demo_levels

    await demo_levels(report, url=url or MEMORY, store=store)
