"""Projections declared and folded: no log needed, or a small one."""

from dataclasses import dataclass

import pytest
from common import QUICK, Sent, Watched, Won, all_of, run
from hypothesis import given
from hypothesis import strategies as st

from trilogue import (
    App,
    BadOption,
    Context,
    Db,
    Failed,
    HandlerFailed,
    Record,
    Reject,
    Retry,
    Router,
    TwiceNamed,
    UnknownEvent,
    Unsupported,
    event,
)
from trilogue.projection import Tables, View, create_tables, fold_into, physical, projection

COUNTS = {"counts": "name text primary key, n integer not null"}
ADD_ONE = "insert into {counts} as c values (?, 1) on conflict (name) do update set n = c.n + 1"


def count(es: list[Watched], db: Db) -> None:
    db.executemany(ADD_ONE, [(e.user,) for e in es])


class Sql:
    """A Db that only notes what it is asked."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def execute(self, sql: str, values: object = (), /) -> list[tuple[object, ...]]:
        self.seen.append(sql)
        return []

    def executemany(self, sql: str, rows: object, /) -> None:
        self.seen.append(sql)


# ── declaring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_declared_is_read_from_the_function() -> None:
    found = projection(count, app="shop", version=3, tables=COUNTS, indexes=("counts(n)",))
    assert (found.name, found.version, found.types) == ("count", 3, ("video.watched",))
    assert (found.sub.batch, found.sub.park) == (500, True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tables": {}}, "has no tables"),
        ({"tables": {"a b": "x"}}, "expected letters, digits and _"),
        ({"tables": {"trilogue_x": "x"}}, "not trilogue_"),
        ({"tables": {"counts_b3": "x"}}, "not …_b1"),
        ({"tables": {"counts": "x); drop table y; --"}}, "expected 'id text primary key"),
        ({"tables": COUNTS, "indexes": ("other(n)",)}, "expected 'table(column, …)' of counts"),
        ({"tables": COUNTS, "version": 0}, "expected a whole number from 1"),
        ({"tables": COUNTS, "switch": "never"}, "expected 'auto' or 'manual'"),
        ({"tables": COUNTS, "name": "two words"}, "expected a name of letters"),
        ({"tables": COUNTS, "batch": 0}, "batch=0"),
        ({"tables": COUNTS, "db_limit": "0s"}, "nothing is done in no time"),
    ],
)
def test_what_is_wrong_is_said_at_start(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(BadOption, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        projection(count, **options)  # type: ignore[arg-type]


def test_a_projection_without_db_is_refused() -> None:
    def nothing(e: Watched) -> None: ...

    with pytest.raises(Unsupported, match="has no parameter `db: Db`"):
        projection(nothing, tables=COUNTS)


def test_two_of_one_name_or_table_are_refused() -> None:
    app = App("memory://")
    app.projection(tables=COUNTS)(count)
    app.projection(tables={"others": "x"})(count)
    with pytest.raises(TwiceNamed, match="two projections are 'count'"):
        _ = app.declared
    app = App("memory://")
    app.projection(tables=COUNTS)(count)
    app.projection(tables=COUNTS, name="more")(count)
    with pytest.raises(TwiceNamed, match="both have the table 'counts'"):
        _ = app.declared


def test_the_decorator_returns_the_function_and_a_router_is_included() -> None:
    router = Router()
    assert router.projection(tables=COUNTS)(count) is count
    app = App("memory://")
    app.include(router)
    assert [each.name for each in app.declared] == ["count"]
    assert "video.watched" in app.known


# ── SQL ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_in_braces_are_tables_and_nothing_else_is() -> None:
    tables = Tables("p", {"counts": physical("counts", 3)})
    assert tables.put_in("select * from {counts} c") == "select * from counts_b3 c"
    assert tables.put_in('insert into "{counts}" values (?)') == 'insert into "counts_b3" values (?)'
    kept = """insert into {counts} values ('{"a": {}}', '{counts}', 'it''s {x}') -- {y}\n/* {z} */"""
    assert tables.put_in(kept) == kept.replace("into {counts}", "into counts_b3")
    with pytest.raises(BadOption, match=r"has no table \{other\}: there is \{counts\}"):
        tables.put_in("select * from {other}")


@pytest.mark.parametrize(
    "sql",
    [
        "insert into mails values (1)",
        "DELETE FROM x",
        "select 1; update x set a = 1",
        "with a as (select 1) insert into x select 1",
        "drop table x",
        "insert into x values ('{counts}')",
    ],
)
def test_a_table_of_somebody_else_is_not_written(sql: str) -> None:
    view = View(Sql(), Tables("p", {"counts": "counts_b3"}))  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="writes a table that is not its own"):
        view.execute(sql)
    view.execute("select * from x where a = 'insert into'")


def test_plain_events_are_folded_into_tables_of_their_own_names() -> None:
    db = Sql()
    found = projection(count, tables=COUNTS, indexes=("counts(n)",), batch=2)
    create_tables(db, found.tables, found.indexes, None)  # type: ignore[arg-type]
    assert fold_into(found, [Watched("a"), Watched("b"), Watched("c")], db) == []  # type: ignore[arg-type]
    assert db.seen[:2] == [f"create table counts ({COUNTS['counts']})", "create index counts_i1 on counts (n)"]
    assert db.seen[2:] == [ADD_ONE.replace("{counts}", "counts")] * 2


def test_what_it_returns_comes_back_with_the_place_of_what_failed() -> None:
    def some(es: list[Watched], db: Db) -> list[object]:
        return [Failed(e, "bad") if e.user == "bad" else Won(e.user, "b") for e in es]

    found = projection(some, tables=COUNTS, batch=2)
    events = [Watched("a"), Watched("b"), Watched("c"), Watched("bad")]
    outcome = fold_into(found, events, Sql())  # type: ignore[arg-type]
    assert outcome[:3] == [Won("a", "b"), Won("b", "b"), Won("c", "b")]
    assert isinstance(outcome[3], Failed)
    assert outcome[3].item == 3


# ── live ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def counted(app: App, *, fails: bool = False) -> None:
    """A projection that counts, publishes, and cannot fold the user "bad"."""

    @app.projection(tables=COUNTS, retry=QUICK)
    def counts(e: Watched, db: Db, ctx: Context) -> Won:
        db.execute(ADD_ONE, (e.user,))
        ctx.publish(Sent(e.user))
        if fails and e.user == "bad":
            raise ValueError("after the write")
        return Won(e.user, "b")


def test_tables_and_cursor_move_together_and_what_is_returned_is_published(url: str) -> None:
    async def main() -> None:
        app = App(url)
        counted(app, fails=True)
        async with app.running():
            assert await app.db("select * from counts") == []  # the view is there before the first event
            receipts = await app.publish_many([Watched(user) for user in ("a", "bad", "b", "a", "bad")])
            await app.wait_idle()
            assert await app.db("select * from counts order by 1") == [("a", 2), ("b", 1)]
            assert sorted(str(r.key) for r in await all_of(app, types="badge.*")) == ["a", "a", "b"]
            assert len(await all_of(app, types="mail.sent")) == 3
            [letter] = await app.store.dead("projection.counts.b1")
            assert (letter.parked, letter.record.position) == (True, receipts[1].position)
            with pytest.raises(HandlerFailed):
                await app.wait_for(receipts[1], "counts")
            [status] = await app.projections()
            assert (status.state, status.version, status.lag, status.error[:19]) == ("live", 1, 1, "1 records are parke")

    run(main())


def test_a_batch_is_folded_in_one_call_and_one_bad_event_fails_alone(url: str) -> None:
    async def main() -> None:
        app = App(url)
        calls: list[int] = []

        @app.projection(tables=COUNTS, batch=50, retry=Retry(2, "1ms"))
        def counts(es: list[Watched], db: Db) -> list[Won]:
            calls.append(len(es))
            count(es, db)
            if any(e.user == "bad" for e in es):
                raise Reject("no")
            return [Won(e.user, "b") for e in es]

        async with app.running():
            await app.publish_many([Watched(f"u{n % 7}") for n in range(100)])
            await app.wait_idle()
            assert calls == [50, 50]
            await app.publish(Watched("bad"))
            await app.wait_idle()
            assert await app.db("select sum(n) from counts") == [(100,)]
            assert len(await all_of(app, types="badge.*")) == 100

    run(main())


def test_records_of_a_pattern(url: str) -> None:
    async def main() -> None:
        app = App(url)

        @app.projection("video.*", tables={"seen": "position integer primary key, type text"}, name="audit")
        def fold(r: Record, db: Db) -> None:
            db.execute("insert into {seen} values (?, ?)", (r.position, r.type))

        @app.projection("badge.*", tables={"badges": "position integer primary key"})
        def badges(rs: list[Record], db: Db) -> None:
            db.executemany("insert into {badges} values (?)", [(r.position,) for r in rs])

        async with app.running():
            await app.publish_many([Watched("a"), Won("a", "b"), Watched("b")])
            await app.wait_idle()
            assert await app.db("select * from seen") == [(1, "video.watched"), (3, "video.watched")]
            assert await app.db("select * from badges") == [(2,)]

    run(main())


def test_waiting_for_a_projection_by_its_name(url: str) -> None:
    async def main() -> None:
        app = App(url)
        counted(app)
        async with app.running():
            receipt = await app.publish(Watched("b"))
            assert await app.db("select n from counts where name = 'b'", after=receipt, of="counts") == [(1,)]
            with pytest.raises(UnknownEvent, match="does not read"):
                await app.wait_for(await app.publish(Won("a", "b")), "counts")
            with pytest.raises(UnknownEvent, match="no group"):
                await app.wait_for(receipt, "other")

    run(main())


def test_an_event_that_cannot_be_decoded_is_parked(url: str) -> None:
    async def main() -> None:
        app = App(url)

        @app.projection(tables=COUNTS)
        def counts(es: list[Watched], db: Db) -> None:
            count(es, db)

        async with app.running():
            good = app.envelope(Watched("a"))
            await app.publish_many([good, type(good)("bad", "video.watched", b"{}", key="z"), app.envelope(Watched("b"))])
            await app.wait_idle()
            assert await app.db("select name from counts order by 1") == [("a",), ("b",)]
            assert [letter.record.id for letter in await app.store.dead(None)] == ["bad"]

    run(main())


def test_a_table_of_that_name_is_in_the_way(url: str) -> None:
    async def main() -> None:
        app = App(url)
        app.setup(lambda db: db.execute("create table if not exists counts (x)"))
        counted(app)
        with pytest.raises(BadOption, match="there is a table of that name"):
            async with app:
                pass

    run(main())


# ── erasure ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_personal_data_wants_a_hook() -> None:
    @event("person.seen", key="person", subject="person", personal=("email",))
    @dataclass(frozen=True)
    class Seen:
        person: str
        email: str | None

    def people(e: Seen, db: Db) -> None: ...

    people.__annotations__["e"] = Seen
    with pytest.raises(Unsupported, match="forgets that person"):
        projection(people, tables={"people": "person"})
    assert "trilogue.subject.erased" in projection(people, tables={"people": "person"}, erased=lambda s, db: None).types


def test_the_erased_are_forgotten_in_order(url: str) -> None:
    async def main() -> None:
        app = App(url)

        def forget(subject: str, db: Db) -> None:
            db.execute("delete from {counts} where name = ?", (subject,))

        @app.projection(tables=COUNTS, erased=forget)
        def counts(es: list[Watched], db: Db) -> None:
            count(es, db)

        def unname(subject: str, db: Db) -> None:
            db.execute("delete from {names} where user = ?", (subject,))

        @app.projection(tables={"names": "name text"}, erased=unname)
        def names(e: Watched, db: Db) -> None:
            db.execute("insert into {names} values (?)", (e.user,))

        async with app.running():
            gone = type(app.envelope(Watched("a")))("e1", "trilogue.subject.erased", b'{"subject":"a"}', key="a")
            await app.publish_many([Watched("a"), Watched("b"), gone, Watched("a")])
            await app.wait_idle()
            expected = [("a", 1), ("b", 1)]
            assert await app.db("select * from counts order by 1") == expected
            assert sorted(await app.db("select * from names")) == [("a",), ("b",)]
            await app.rebuild("counts")
            await app.wait_idle()
            [same] = await app.compare("counts")
            assert (same.only_live, same.only_next, same.next) == (0, 0, 2)

    run(main())


# ── a fold of the log ────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40), st.integers(1, 7))
def test_a_projection_equals_a_fold_of_the_log(plan: list[tuple[str, bool]], batch: int) -> None:
    """Whatever is published, in whichever pieces, before and while it runs, and built anew at any moment."""

    async def main() -> None:
        app = App("memory://")

        @app.projection(tables=COUNTS, batch=batch)
        def counts(es: list[Watched], db: Db) -> list[Won]:
            count(es, db)
            return [Won(e.user, "b") for e in es]

        async with app.running():
            for user, rebuilds in plan:
                await app.publish(Watched(user))
                if rebuilds:
                    await app.rebuild("counts")
            await app.wait_idle()
            if any(rebuilds for _, rebuilds in plan):
                await app.switch("counts")
            await app.wait_idle()
            folded: dict[str, int] = {}
            for user, _ in plan:
                folded[user] = folded.get(user, 0) + 1
            assert dict(await app.db("select * from counts")) == folded
            assert len(await all_of(app, types="badge.*")) == len(plan)

    run(main())
