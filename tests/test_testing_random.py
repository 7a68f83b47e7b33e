"""Whatever goes wrong in whatever order: every event has its effect once, and settle() returns when that is so."""

from typing import Any

from common import ADD, Watched, Won, counting, run
from hypothesis import given, settings
from hypothesis import strategies as st

from trilogue import App, Db, Effect, Retry
from trilogue.testing import World, simulated

GROUPS = ("async", "thread", "db", "effect", "batch")
PATIENT = Retry(1_000, "1s..1m")

steps = st.one_of(
    st.tuples(st.just("publish"), st.sampled_from(("u1", "u2", "u3"))),
    st.tuples(st.sampled_from(("fail", "duplicate", "crash", "lose")), st.sampled_from(GROUPS)),
    st.tuples(st.sampled_from(("settle", "advance")), st.just("10s")),
)


def app_of_all_kinds(url: str) -> App:
    """A handler of each kind; each event is counted and answered by each."""
    app = App(url)
    counting(app)

    @app.on(group="async", retry=PATIENT)
    async def a(e: Watched) -> Won:
        return Won(e.user, f"async {e.video}")

    @app.on(group="thread", retry=PATIENT)
    def t(e: Watched) -> Won:
        return Won(e.user, f"thread {e.video}")

    @app.on(group="db", retry=PATIENT)
    def d(e: Watched, db: Db) -> Won:
        db.execute(ADD, (f"db {e.video}",))
        return Won(e.user, f"db {e.video}")

    @app.on(group="effect", retry=PATIENT)
    async def f(e: Watched) -> list[Any]:
        return [Won(e.user, f"effect {e.video}"), Effect(lambda db: db.execute(ADD, (f"effect {e.video}",)))]

    @app.on(group="batch", retry=PATIENT)
    def b(es: list[Watched], db: Db) -> list[Won]:
        db.executemany(ADD, [(f"batch {e.video}",) for e in es])
        return [Won(e.user, f"batch {e.video}") for e in es]

    return app


async def one_step(world: World, step: tuple[str, str], published: list[Watched]) -> None:
    match step:
        case "publish", user:
            published.append(Watched(user, str(len(published))))
            await world.publish(published[-1])
        case "fail", group:
            world.fail(group, times=2)
        case "duplicate", group:
            await world.duplicate(group)
        case "crash", group:
            world.crash_after(group)
        case "lose", group:
            world.lose_lease(group)
        case "settle", _:
            await world.settle()
        case "advance", by:
            await world.advance(by)


async def check(world: World, published: list[Watched]) -> None:
    """Every event was answered once by each group, those of one key in order, and counted once."""
    won = await world.published(Won)
    for group in GROUPS:
        assert await world.held(group) == []
        assert await world.dead(group) == []
        for user in ("u1", "u2", "u3"):
            mine = [e.badge for e in won if e.user == user and e.badge.startswith(group + " ")]
            assert mine == [f"{group} {e.video}" for e in published if e.user == user]
    counts = await world.app.db("select name, n from counts")
    assert sorted(counts) == sorted((f"{group} {e.video}", 1) for group in ("db", "effect", "batch") for e in published)


@settings(max_examples=25)
@given(st.lists(steps, max_size=25))
def test_every_event_has_its_effect_once(script: list[tuple[str, str]]) -> None:
    async def main() -> None:
        published: list[Watched] = []
        async with simulated(app_of_all_kinds("memory://")) as world:
            for step in script:
                await one_step(world, step, published)
            await world.advance("2h")
            await check(world, published)

    run(main())
