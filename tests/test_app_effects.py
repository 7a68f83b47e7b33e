"""Effects in the settlement, and the SQL they may not do."""

import asyncio
import contextlib

import pytest
from common import ADD, QUICK, Sent, Watched, Won, all_of, counting, run

from trilogue import (
    App,
    BadOption,
    Context,
    Db,
    Effect,
    Retry,
)


def test_an_effect_of_a_failing_handler_is_undone(url: str) -> None:
    async def main() -> None:
        app = App(url)
        counting(app)

        @app.on(group="g", retry=QUICK)
        def handle(e: Watched, db: Db, ctx: Context) -> Won:
            db.execute(ADD, (e.user,))
            ctx.publish(Sent(e.user))
            if ctx.attempt < 3 or e.user == "bad":
                raise ValueError("after the write")
            return Won(e.user, "b")

        @app.on(group="other")
        def other(e: Watched, db: Db) -> None:
            db.executemany(ADD, [("other",), ("other",)])

        async with app.running():
            await app.publish_many([Watched(user) for user in ("good", "bad", "good")])
            await app.wait_idle()
            assert await app.db("select name, n from counts order by 1") == [("good", 2), ("other", 6)]
            assert await app.db("select n from counts where name = ?", ("good",)) == [(2,)]
            assert [r.type for r in await all_of(app, types=["badge.*", "mail.*"])].count("badge.won") == 2
            assert len(await all_of(app, types="mail.sent")) == 2
            assert [letter.record.key for letter in await app.store.dead(None)] == ["bad"]

    run(main())


def test_an_effect_returned_by_a_coroutine_or_a_thread(url: str) -> None:
    async def main() -> None:
        app = App(url)
        counting(app)

        @app.on(group="async", retry=QUICK)
        async def compute(e: Watched, ctx: Context) -> tuple[Won, Effect]:
            await asyncio.sleep(0)

            def write(db: Db) -> None:
                db.execute(ADD, (e.user,))
                if ctx.attempt == 1:
                    raise ValueError("in the effect")

            return Won(e.user, "b"), Effect(write)

        @app.on(group="thread")
        def in_thread(e: Watched) -> Effect:
            return Effect(lambda db: db.execute(ADD, ("thread",)))

        @app.on(group="db")
        def in_db(e: Watched, db: Db) -> Effect:
            return Effect(lambda db: db.execute(ADD, ("db",)))

        async with app.running():
            await app.publish_many([Watched("u"), Watched("u")])
            await app.wait_idle()
            assert await app.db("select name, n from counts order by 1") == [("db", 2), ("thread", 2), ("u", 2)]
            assert len(await all_of(app, types="badge.won")) == 2

    run(main())


ENDLESS = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"


def test_endless_sql_is_interrupted_and_hurts_no_other(url: str) -> None:
    async def main() -> None:
        app = App(url)
        counting(app)

        @app.on(group="endless", retry=Retry(1), db_limit="20ms")
        def endless(e: Watched, db: Db) -> None:
            db.execute(ADD, (e.user,))
            if e.user == "bad":
                db.execute(ENDLESS)

        @app.on(group="batch", retry=Retry(1), db_limit="20ms")
        def batch(es: list[Watched], db: Db) -> None:
            db.executemany(ADD, [("batch",) for _ in es])
            if es[0].user == "bad":
                db.execute(ENDLESS)

        @app.on(group="swallows", retry=Retry(1), db_limit="20ms")
        def swallows(e: Watched, db: Db) -> None:
            db.execute(ADD, ("swallows",))
            if e.user == "bad":
                with contextlib.suppress(Exception):
                    db.execute(f"insert into counts select i, 1 from ({ENDLESS.replace('count(*)', 'i')})")

        async with app.running():
            for user in ("bad", "u1", "u2"):
                await app.publish(Watched(user))
                await app.wait_idle()
            counts = dict(await app.db("select name, n from counts"))
            assert counts == {"u1": 1, "u2": 1, "batch": 2, "swallows": 2}
            letters = {letter.group: letter.error for letter in await app.store.dead(None)}
            assert letters.keys() == {"endless", "batch", "swallows"}
            assert "make it cheaper, or raise db_limit=" in letters["endless"]

    run(main())


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("commit", "COMMIT is not allowed here: trilogue owns the transaction"),
        ("/* x */ commit", "COMMIT is not allowed"),
        ("-- x\nrollback", "ROLLBACK is not allowed"),
        (";; savepoint x", "SAVEPOINT is not allowed"),
        ("select 1; begin", "BEGIN is not allowed"),
        ("pragma synchronous = 0", "PRAGMA is not allowed"),
        ("attach ':memory:' as x", "ATTACH is not allowed"),
        ("delete from trilogue_records", "written by trilogue alone"),
        ('delete from "trilogue_records"', "written by trilogue alone"),
        ("with x as (select 1) delete from trilogue_held", "written by trilogue alone"),
        ("drop table [trilogue_held]", "written by trilogue alone"),
    ],
)
def test_sql_that_would_harm_the_transaction_is_refused(sql: str, sentence: str) -> None:
    async def main() -> None:
        app = App("memory://")
        counting(app)

        @app.on(group="g", retry=Retry(1))
        def handle(e: Watched, db: Db) -> None:
            db.execute(ADD, (e.user,))
            db.execute(sql)

        async with app.running():
            await app.publish(Watched("u"))
            await app.wait_idle()
            [letter] = await app.store.dead("g")
            assert sentence in letter.error
            assert await app.db("select * from counts") == []

    run(main())


def test_sql_that_only_looks_harmful_is_done(url: str) -> None:
    async def main() -> None:
        app = App(url)

        @app.setup
        def tables(db: Db) -> None:
            db.execute("create table if not exists notes (text text); -- ; commit")
            db.execute("create table if not exists copies (text text)")
            db.execute(
                "create trigger if not exists copy after insert on notes begin "
                "insert into copies values (new.text); insert into copies values ('; begin'); end"
            )

        @app.on(group="g")
        def handle(e: Watched, db: Db) -> None:
            db.execute("insert into notes values ('it''s; commit; trilogue_records')")
            db.execute("select /* ; rollback */ count(*) from trilogue_records where 1 = ?", (1,))
            db.execute("with x as (select * from trilogue_records) select * from x")

        async with app.running():
            await app.publish(Watched("u"))
            await app.wait_idle()
            assert await app.store.dead(None) == []
            assert await app.db("select text from copies") == [("it's; commit; trilogue_records",), ("; begin",)]

    run(main())


def test_app_db_only_reads(url: str) -> None:
    async def main() -> None:
        app = App(url)
        counting(app)
        async with app:
            assert await app.db("select 1 as one, 'a' as two") == [(1, "a")]
            assert await app.db("-- nothing\nselect n from counts where name = ?", ("u",)) == []
            for sql in ("insert into counts values ('u', 1)", "drop table counts", "delete from counts", "create table x (a)"):
                with pytest.raises(BadOption, match=r"app.db\(\) only reads: write in a handler with a `db` parameter"):
                    await app.db(sql)
            for sql in ("pragma query_only = 0", "begin", "attach ':memory:' as x"):
                with pytest.raises(BadOption, match="is not allowed here"):
                    await app.db(sql)
            assert await app.db("select count(*) from counts") == [(0,)]

    run(main())
