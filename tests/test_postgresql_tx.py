"""Publishing inside the user's own transaction, with each kind of connection: together with its commit, or not at all."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psycopg
import pytest
from common import Won, all_of, run
from services import postgresql_database
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from trilogue import App
from trilogue.errors import BadOption, Conflict, Unsupported

Opened = Callable[[str], AbstractAsyncContextManager[Any]]


def plain(url: str) -> str:
    """The URL without our options."""
    return urlunsplit(urlsplit(url)._replace(query=""))


@pytest.fixture
def database(postgresql_url: str) -> str:
    """A log, and in the same database a table of the user."""
    with psycopg.connect(plain(postgresql_url)) as connection:
        connection.execute("drop table if exists orders")
        connection.execute("create table orders (id text primary key)")
    return postgresql_url


@asynccontextmanager
async def alchemy(url: str) -> AsyncIterator[Any]:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with Session(engine) as session:
            yield session
    finally:
        engine.dispose()


@asynccontextmanager
async def alchemy_connection(url: str) -> AsyncIterator[Any]:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


@asynccontextmanager
async def alchemy_async(url: str, driver: str = "asyncpg") -> AsyncIterator[Any]:
    engine = create_async_engine(url.replace("postgresql:", f"postgresql+{driver}:"))
    try:
        async with AsyncSession(engine) as session:
            yield session
    finally:
        await engine.dispose()


@asynccontextmanager
async def with_psycopg(url: str) -> AsyncIterator[Any]:
    with psycopg.connect(url) as connection:
        yield connection


@asynccontextmanager
async def with_async_psycopg(url: str) -> AsyncIterator[Any]:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        yield connection


class Asyncpg:
    """asyncpg's connection with a transaction, and the verbs the others have."""

    def __init__(self, connection: Any) -> None:
        self.tx = connection
        self.transaction = connection.transaction()

    async def execute(self, sql: str) -> None:
        await self.tx.execute(sql)

    async def commit(self) -> None:
        await self.transaction.commit()

    async def rollback(self) -> None:
        await self.transaction.rollback()


@asynccontextmanager
async def with_asyncpg(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    try:
        mine = Asyncpg(connection)
        await mine.transaction.start()
        yield mine
    finally:
        await connection.close()


KINDS: dict[str, Opened] = {
    "sqlalchemy session": alchemy,
    "sqlalchemy connection": alchemy_connection,
    "sqlalchemy async": alchemy_async,
    "psycopg": with_psycopg,
    "psycopg async": with_async_psycopg,
    "asyncpg": with_asyncpg,
}
each_kind = pytest.mark.parametrize("opened", KINDS.values(), ids=KINDS)


async def awaited(result: Any) -> None:
    if hasattr(result, "__await__"):
        await result


async def order(connection: Any, id: str) -> None:
    sql = f"insert into orders values ('{id}')"
    await awaited(connection.execute(text(sql) if "sqlalchemy" in type(connection).__module__ else sql))


async def stored(app: App, count: int) -> list[str]:
    """The keys of the log, once there are so many."""
    while len(records := await all_of(app)) < count:
        await asyncio.sleep(0.01)
    return [record.key or "" for record in records]


@each_kind
def test_a_commit_publishes_in_order_and_a_rollback_nothing(database: str, opened: Opened) -> None:
    async def main() -> None:
        async with App(database) as app:
            async with opened(plain(database)) as connection:
                tx = getattr(connection, "tx", connection)
                await order(connection, "o1")
                for n in range(20):
                    receipt = await app.publish(Won(f"u{n}", "b"), tx=tx, id=f"{(n * 7) % 20:02}")
                    assert receipt.position is None
                await asyncio.sleep(0.05)
                assert await all_of(app) == []
                await awaited(connection.commit())
            assert await stored(app, 20) == [f"u{n}" for n in range(20)]
            async with opened(plain(database)) as connection:
                await app.publish(Won("nobody", "b"), tx=getattr(connection, "tx", connection))
                await awaited(connection.rollback())
            await app.publish(Won("last", "b"))
            assert (await stored(app, 21))[-1] == "last"
            assert await app.db("select id from orders") == [("o1",)]

    run(main())


@each_kind
def test_a_repeated_id_adds_nothing_and_other_content_is_refused(database: str, opened: Opened) -> None:
    async def main() -> None:
        async with App(database) as app:
            await app.publish(Won("u", "stored"), id="one")
            async with opened(plain(database)) as connection:
                tx = getattr(connection, "tx", connection)
                for _ in range(2):
                    await app.publish(Won("u", "stored"), id="one", tx=tx)
                    await app.publish(Won("u", "new"), id="two", tx=tx)
                for id in ("one", "two"):
                    with pytest.raises(Conflict, match="other content"):
                        await app.publish(Won("u", "other"), id=id, tx=tx)
                await awaited(connection.commit())
            assert len(await stored(app, 2)) == 2

    run(main())


def test_a_long_transaction_of_the_user_holds_up_nobody(database: str) -> None:
    async def main() -> None:
        async with App(database) as app:
            with psycopg.connect(plain(database)) as connection:
                await app.publish(Won("slow", "b"), tx=connection)
                await app.publish(Won("quick", "b"))
                assert await stored(app, 1) == ["quick"]
            assert await stored(app, 2) == ["quick", "slow"]

    run(main())


def test_the_schema_of_the_log_is_found_from_any_search_path(database: str) -> None:
    async def main() -> None:
        async with App(database) as app:
            with psycopg.connect(plain(database)) as connection:
                connection.execute("set search_path = pg_catalog")
                await app.publish(Won("u", "b"), tx=connection)
            assert await stored(app, 1) == ["u"]

    run(main())


def test_it_can_be_delayed_too(database: str) -> None:
    async def main() -> None:
        async with App(database) as app:
            with psycopg.connect(plain(database)) as connection:
                receipt = await app.publish(Won("u", "b"), tx=connection, delay="1d")
            assert [timer.envelope.id for timer in await app.store.timers()] == [receipt.id]
            assert await app.cancel(receipt)

    run(main())


def test_what_is_no_transaction_is_refused(database: str) -> None:
    async def main() -> None:
        async with App(database) as app:
            with pytest.raises(BadOption, match="expected a Session"):
                await app.publish(Won("u", "b"), tx=object())
            with (
                psycopg.connect(plain(database), autocommit=True) as connection,
                pytest.raises(BadOption, match="no transaction"),
            ):
                await app.publish(Won("u", "b"), tx=connection)
            bare = await asyncpg.connect(plain(database))
            with pytest.raises(BadOption, match="no transaction"):
                await app.publish(Won("u", "b"), tx=bare)
            await bare.close()
            lite = create_engine("sqlite://")
            with Session(lite) as session, pytest.raises(BadOption, match="connection to sqlite"):
                await app.publish(Won("u", "b"), tx=session)
            lite.dispose()

    run(main())


def test_a_connection_to_another_database_is_refused(database: str) -> None:
    async def main() -> None:
        with postgresql_database() as other:
            async with App(database) as app:
                with psycopg.connect(other) as connection, pytest.raises(BadOption, match="another database") as refused:
                    await app.publish(Won("u", "b"), tx=connection)
                assert (urlsplit(database).password or "") not in str(refused.value)

    run(main())


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{folder}/a.db"])
def test_other_urls_refuse_it(url: str, tmp_path: Any) -> None:
    async def main() -> None:
        async with App(url.format(folder=tmp_path)) as app:
            with pytest.raises(Unsupported, match="postgresql://"):
                await app.publish(Won("u", "b"), tx=object())

    run(main())


def test_from_a_program_without_a_loop(database: str) -> None:
    engine = create_engine(plain(database).replace("postgresql:", "postgresql+psycopg:"))
    with App(database).sync() as bus, Session(engine) as session:
        bus.publish(Won("u", "b"), tx=session)
        session.commit()
        while not (records := list(bus.history())):
            pass
        assert [record.key for record in records] == ["u"]
    engine.dispose()
