"""Every event of every released schema is read as today's class, whichever way it leaves the log."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import old_shop
import pytest
from old_shop import HELD, LOG, PLACED, STREAM, TIMERS, Placed, Shipped

from trilogue import Aggregate, App, Context, Db, Decider, Process, Record, starts, to_cloudevent
from trilogue.apps.video.platform import platform
from trilogue.cli.main import main
from trilogue.codec import coder
from trilogue.ports import Query
from trilogue.schema.changes import changes, read_lock
from trilogue.schema.stored import in_todays_form

RELEASED = sorted(path.name for path in old_shop.HERE.glob("*.jsonl"))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


@pytest.fixture
def old_url(tmp_path: Path) -> str:
    """A log as release 0.1.0 left it."""
    return old_shop.old_log(tmp_path / "shop.db")


def app_on(url: str) -> App:
    """The shop of today, with the groups that its log knows."""
    app = App(url, name="shop")
    app.knows(Placed, Shipped)
    return app


def idle(app: App, *groups: str) -> None:
    """Take over groups of the old program that a test is not about."""
    for group in groups:

        @app.on(group=group)
        async def pass_over(e: Placed) -> None:
            return


GROUPS = ("skipping", "parking", "retrying")
Seen = list[Any]


# ── history and streams ──────────────────────────────────────────────────────────────────────────────────────────────


def test_history(old_url: str) -> None:
    async def go() -> None:
        async with app_on(old_url) as app:
            assert [app.decode(record) async for record in app.history()] == list(LOG)
            assert [app.decode(record) async for record in app.history(stream="order-o3")] == list(STREAM)

    run(go())


class Order(Aggregate, stream="order-{id}"):
    seen: tuple[Any, ...] = ()

    def apply(self, e: Placed | Shipped) -> None:
        self.seen = (*self.seen, e)


def collected(seen: tuple[Any, ...], e: Placed | Shipped) -> tuple[Any, ...]:
    return (*seen, e)


def test_streams(old_url: str) -> None:
    async def go() -> None:
        async with app_on(old_url) as app:
            order = await app.load(Order, "o3")
            assert (order.seen, order.version) == (STREAM, 3)
            assert (await app.load(Order, "o3", version=1)).seen == STREAM[:1]
            assert (await app.load(Decider("order-{id}", (), collected), "o3")).state == STREAM

    run(go())


def test_a_live_fold(old_url: str) -> None:
    async def go() -> None:
        async with app_on(old_url) as app:
            assert await app.fold(collected, (), key="c3") == STREAM

    run(go())


# ── handlers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def one_by_one(app: App, seen: Seen) -> None:
    @app.on(group="feed", start="beginning")
    async def feed(e: Placed) -> None:
        seen.append(e)


def in_threads(app: App, seen: Seen) -> None:
    @app.on(group="feed", start="beginning", concurrency=1)
    def feed(e: Placed) -> None:
        seen.append(e)


def with_a_context(app: App, seen: Seen) -> None:
    @app.on(group="feed", start="beginning")
    async def feed(e: Placed, ctx: Context) -> None:
        seen.append(e)


def with_a_database(app: App, seen: Seen) -> None:
    @app.on(group="feed", start="beginning")
    def feed(e: Placed, db: Db) -> None:
        seen.append(e)


def in_batches(app: App, seen: Seen) -> None:
    @app.on(group="feed", start="beginning")
    async def feed(es: list[Placed]) -> None:
        seen.extend(es)


def in_batches_with_a_database(app: App, seen: Seen) -> None:
    @app.on(group="feed", start="beginning")
    def feed(es: list[Placed], db: Db) -> None:
        seen.extend(es)


FORMS = [one_by_one, in_threads, with_a_context, with_a_database, in_batches, in_batches_with_a_database]


@pytest.mark.parametrize("subscribe", FORMS)
def test_handlers(subscribe: Callable[[App, Seen], None], old_url: str) -> None:
    seen: Seen = []

    async def go() -> None:
        app = app_on(old_url)
        await forget(app, *GROUPS)
        subscribe(app, seen)
        async with app.running():
            await fired(app)
            await app.wait_idle(timeout="30s")

    run(go())
    assert sorted(seen, key=repr) == sorted([*PLACED, *TIMERS], key=repr)


async def fired(app: App) -> None:
    """Return when the timers of the old log have entered it."""
    while await app.store.timers():
        await app.store.changed(0.1)


async def forget(app: App, *groups: str) -> None:
    async with app:
        for group in groups:
            await app.store.drop_group(group)


@pytest.mark.parametrize("group", ["skipping", "parking"])
def test_dead_and_parked_records_that_are_driven_again(group: str, old_url: str) -> None:
    seen: Seen = []
    app = app_on(old_url)

    @app.on(group=group, on_dead="park" if group == "parking" else "skip")
    async def handle(e: Placed) -> None:
        seen.append(e)

    idle(app, *(each for each in GROUPS if each != group))

    async def go() -> None:
        async with app:
            assert [app.decode(letter.record) for letter in await app.store.dead(group)] == list(HELD)
            assert await app.store.redrive(group) == len(HELD)
        async with app.running():
            await app.wait_idle(timeout="30s")
            assert await app.store.dead(group) == []

    run(go())
    assert {*seen} >= {*HELD}


def test_records_that_wait_to_be_tried_again(old_url: str) -> None:
    seen: list[tuple[Any, int]] = []
    app = app_on(old_url)

    @app.on(group="retrying")
    async def handle(e: Placed, ctx: Context) -> None:
        seen.append((e, ctx.attempt))

    idle(app, "skipping", "parking")

    async def go() -> None:
        async with app.running():
            await app.wait_idle(timeout="30s")

    run(go())
    assert {e for e, attempt in seen if attempt == 2} == {*HELD}


def test_timers(old_url: str) -> None:
    app = app_on(old_url)
    idle(app, *GROUPS)

    async def go() -> None:
        async with app:
            assert [app.decode(timer.envelope) for timer in await app.store.timers()] == list(reversed(TIMERS))
        async with app.running():
            await fired(app)
            entered = await app.store.read(Query(after=len(LOG)))
            assert {app.decode(record) for record in entered} == {*TIMERS}

    run(go())


# ── read models, processes ───────────────────────────────────────────────────────────────────────────────────────────

TABLE = {"totals": "id text primary key, cents integer not null, currency text not null"}


@pytest.mark.parametrize("many", [False, True])
def test_projections(many: bool, old_url: str) -> None:
    app = app_on(old_url)
    idle(app, *GROUPS)
    add = "insert into {totals} values (?, ?, ?) on conflict do update set cents = cents + excluded.cents"

    def row(e: Placed) -> tuple[str, int, str]:
        return e.order, int(e.total * 100), e.currency

    if many:

        @app.projection(tables=TABLE)
        def totals(es: list[Placed], db: Db) -> None:
            db.executemany(add, [row(e) for e in es])
    else:

        @app.projection(tables=TABLE)
        def totals(e: Placed, db: Db) -> None:
            db.execute(add, row(e))

    async def go() -> None:
        async with app.running():
            await fired(app)
            await app.wait_idle(timeout="30s")
            rows = await app.db("select id, cents, currency from totals order by id")
            assert [tuple(each) for each in rows] == [
                ("o1", 990, "EUR"),
                ("o2", 500, "EUR"),
                ("o3", 400, "EUR"),
                ("o4", 700, "EUR"),
                ("o5", 800, "EUR"),
                ("o6", 300, "EUR"),
                ("o7", 400, "EUR"),
            ]

    run(go())


class Delivery(Process, key="order", name="delivery"):
    currency: str = ""
    times: int = 0

    @starts
    def placed(self, e: Placed) -> None:
        self.currency, self.times = e.currency, self.times + 1


def test_processes(old_url: str) -> None:
    app = app_on(old_url)
    idle(app, *GROUPS)
    app.process(Delivery, start="beginning")

    async def go() -> None:
        async with app.running():
            await fired(app)
            await app.wait_idle(timeout="30s")
            instances = {each.id: each.state for each in await app.processes("delivery")}
            assert instances == {f"o{n}": {"currency": "EUR", "times": 1 + (n == 3)} for n in range(1, 8)}

    run(go())


# ── export ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def in_shop(old_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRILOGUE_URL", "sqlite:///shop.db")
    return tmp_path


EXPORT = ["tail", "--no-follow", "--after", "0", "--json"]


def exported(capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([*EXPORT, *more]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_export(in_shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = exported(capsys, "--app", "old_shop:app")
    assert [line["schemaversion"] for line in lines] == [3, 1, 3, 3, 3, 3, 3, 1]
    assert [line["data"].get("currency") for line in lines] == ["EUR", None, "EUR", "EUR", "EUR", "EUR", "EUR", None]
    envelopes = [old_shop.from_cloudevent(json.dumps(line).encode()) for line in lines]
    # Not with upcasting: what was exported has to be in today's form by itself.
    assert [coder(type(e)).decode(envelope.data) for e, envelope in zip(LOG, envelopes, strict=True)] == list(LOG)


def test_export_without_an_app_is_as_stored(in_shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = exported(capsys)
    assert lines[0]["data"] == {"order": "o1", "customer": "c1", "amount": "9.90"}


def test_tail_shows_todays_form(in_shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tail", "--no-follow", "--after", "0", "--limit", "1", "--app", "old_shop:app"]) == 0
    assert '"total":"9.90","currency":"EUR"' in capsys.readouterr().out


def test_all_that_the_old_log_holds_can_be_read(in_shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "check", "--app", "old_shop:app", "--sample", "all"]) == 0
    assert "fine to deploy" in capsys.readouterr().out


# ── released events ──────────────────────────────────────────────────────────────────────────────────────────────────


def known_to(name: str) -> App:
    return platform("memory://") if name.startswith("video") else app_on("memory://")


@pytest.mark.parametrize("name", RELEASED)
def test_no_released_form_has_changed(name: str) -> None:
    lock = read_lock((old_shop.HERE / name.replace(".jsonl", ".lock.json")).read_bytes(), name)
    assert changes(lock, known_to(name).known) == []


@pytest.mark.parametrize("name", RELEASED)
def test_there_are_events_of_every_released_version(name: str) -> None:
    lock = read_lock((old_shop.HERE / name.replace(".jsonl", ".lock.json")).read_bytes(), name)
    there = {(e.type, e.schema_version) for e in old_shop.released(name)}
    assert there == {(type, form["version"]) for type, forms in lock.items() for form in forms}


@pytest.mark.parametrize("name", RELEASED)
def test_released_events_are_read_and_travel_on(name: str) -> None:
    app = known_to(name)
    for envelope in old_shop.released(name):
        decoded = app.decode(envelope)
        again = old_shop.from_cloudevent(to_cloudevent(envelope))
        assert app.decode(again) == decoded
        assert app.decode(app.envelope(decoded)) == decoded


@pytest.mark.parametrize("name", RELEASED)
def test_released_events_are_read_after_they_were_imported(name: str, url: str) -> None:
    envelopes = old_shop.released(name)

    async def go() -> None:
        app = known_to(name)
        async with App(url) as log:
            await log.publish_many(envelopes)
            assert [app.decode(record) async for record in log.history()] == [app.decode(e) for e in envelopes]

    run(go())


def test_a_record_of_no_known_class_is_exported_as_it_is() -> None:
    record = Record("i", "some.other", b'{"n":1}', schema_version=2, position=1)
    assert in_todays_form(record, app_on("memory://").known) is record
