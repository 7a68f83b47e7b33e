"""The PostgreSQL store beyond what every store promises: many writers at once, lost connections, poolers, its schema."""

import asyncio
import glob
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec
import psycopg
import pytest
from common import run
from services import postgresql_database

from trilogue import App
from trilogue.cli.main import main as cli
from trilogue.conformance import PROMISES
from trilogue.conformance.tools import Bench, answer, drain, effect, envelope, group, numbers, take
from trilogue.errors import BadOption, Conflict, LogError, OutcomeUnknown, Rejected, Unavailable, Unsupported
from trilogue.ports import Query, Store
from trilogue.stores import open_store, postgresql, postgresql_schema
from trilogue.stores import postgresql_database as database_module
from trilogue.stores.postgresql import PgConnection
from trilogue.stores.postgresql_sql import Translator
from trilogue.stores.transaction import SqlTransaction

READERS = group()


def plain(url: str) -> str:
    """The URL without our options."""
    return urlunsplit(urlsplit(url)._replace(query=""))


def schema_of(url: str) -> str:
    return urlsplit(url).query.partition("schema=")[2].partition("&")[0]


@contextmanager
def beside(url: str, **options: Any) -> Iterator[psycopg.Connection[Any]]:
    """A connection of somebody else, in the schema of the log."""
    with psycopg.connect(plain(url), **options) as connection:
        connection.execute(f"set search_path = {schema_of(url)}, public")
        yield connection


def backends(connection: psycopg.Connection[Any], doing: str) -> list[int]:
    """The pids of our connections to this database."""
    found = "select pid from pg_stat_activity where datname = current_database() and application_name like %s"
    return [pid for (pid,) in connection.execute(found, (f"trilogue {doing}",))]


async def waits_for_a_lock(connection: psycopg.Connection[Any], task: "asyncio.Task[Any]") -> None:
    """Until one of our writers waits for a lock, or the task has ended."""
    here = "datname = current_database() and application_name = 'trilogue write'"
    found = f"select 1 from pg_stat_activity where {here} and wait_event_type = 'Lock'"
    while not task.done() and not connection.execute(found).fetchall():
        await asyncio.sleep(0.005)


# ── positions ────────────────────────────────────────────────────────────────────────────────────────────────────────

APPEND = """
select trilogue_append('{1}', array[%s], '{k}', '{1}', '{1}', '{null}', '{null}', '{null}', '{"\\\\x30"}', '{}', '{}', '{}', '{}',
'{}', false)"""


def test_a_commit_that_comes_late_is_not_passed_over(postgresql_url: str) -> None:
    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            reader, writer = await bench.open(READERS), await bench.open()
            await writer.append([envelope(0, "k")])
            await drain(reader, "readers", 1)
            with beside(postgresql_url) as slow, beside(postgresql_url, autocommit=True) as watcher:
                slow.execute(APPEND, ("late",))
                append = asyncio.create_task(writer.append([envelope(1, "k", id="next")]))
                await waits_for_a_lock(watcher, append)
                seen = [d.record.id for d in await drain(reader, "readers", 1)] if append.done() else []
                slow.commit()
            await append
            seen += [d.record.id for d in await drain(reader, "readers", 2 - len(seen))]
            assert seen == ["late", "next"]

    run(main())


@pytest.mark.parametrize("seed", range(3))
def test_many_writers_and_a_reader_that_skips_nothing(postgresql_url: str, seed: int) -> None:
    async def write(store: Store, chance: random.Random, name: str) -> list[str]:
        ids: list[str] = []
        for n in range(25):
            sent = [envelope(n, f"k{chance.randrange(5)}", id=f"{name}-{n}-{m}") for m in range(chance.randint(1, 30))]
            await asyncio.sleep(chance.random() * 0.003)
            if chance.random() < 0.2:
                with pytest.raises(ZeroDivisionError):
                    await store.transact(lambda tx, sent=sent: (tx.append(sent), 1 / 0))  # type: ignore[misc]
            elif chance.random() < 0.3:
                await store.transact(lambda tx, sent=sent: tx.append(sent))  # type: ignore[misc]
                ids += [each.id for each in sent]
            else:
                await store.append(sent)
                ids += [each.id for each in sent]
        return ids

    async def read(store: Store, seen: list[tuple[int, str]], ended: asyncio.Event) -> None:
        while not ended.is_set() or await store.read(Query(after=seen[-1][0] if seen else 0)):
            page = await store.read(Query(after=seen[-1][0] if seen else 0, limit=chance_of_page.randint(1, 50)))
            seen += [(record.position, record.id) for record in page]

    chance_of_page = random.Random(seed)

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            writers = [await bench.open() for _ in range(8)]
            readers = [await bench.open(READERS) for _ in range(2)]
            seen: list[tuple[int, str]] = []
            ended = asyncio.Event()
            reading = asyncio.create_task(read(readers[0], seen, ended))
            handling = [asyncio.create_task(_handle_all(each, ended)) for each in readers]
            writes = [write(store, random.Random((seed, n).__hash__()), f"w{n}") for n, store in enumerate(writers)]
            written = [id for ids in await asyncio.gather(*writes) for id in ids]
            ended.set()
            await reading
            handled = [id for task in handling for id in await task]
            assert [position for position, _ in seen] == list(range(1, len(written) + 1))
            assert sorted(id for _, id in seen) == sorted(written)
            assert sorted(handled) == sorted(written)

    run(main())


async def _handle_all(store: Store, ended: asyncio.Event) -> list[str]:
    handled: list[str] = []
    while not (ended.is_set() and await store.idle(["readers"])):
        deliveries = await store.claim("readers", limit=100, wait_s=0.05)
        await answer(store, deliveries)
        handled += [delivery.record.id for delivery in deliveries]
    return handled


def test_an_open_transaction_of_somebody_else_stalls_nobody(postgresql_url: str) -> None:
    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            with beside(postgresql_url) as other:
                other.execute("create temp table mine (n integer)")
                other.execute("select txid_current()")
                store = await bench.open(READERS)
                await store.append([envelope(n, f"k{n}") for n in range(100)])
                assert len(await drain(store, "readers", 100)) == 100
                await store.trim(keep=1)

    run(main())


def test_a_restored_dump_goes_on(postgresql_url: str) -> None:
    async def fill(url: str) -> None:
        async with Bench(lambda: open_store(url)) as bench:
            store = await bench.open(READERS)
            await store.append([envelope(n, f"k{n % 7}") for n in range(50)])
            await answer(store, await take(store, "readers", 20))
            await store.append([envelope(1, "s")], expected=("s", 0))

    async def go_on(url: str) -> None:
        async with Bench(lambda: open_store(url)) as bench:
            store = await bench.open(READERS)
            assert await store.append([envelope(2, "s", kind="thing.made")], expected=("s", 1)) == [52]
            left = await drain(store, "readers", 32)
            assert {d.record.position for d in left} == set(range(21, 53))
            assert (await store.status()).head == 52

    run(fill(postgresql_url))
    with postgresql_database() as other:
        take_out = [_binary("pg_dump"), "-n", schema_of(postgresql_url), plain(postgresql_url)]
        dump = subprocess.run(take_out, capture_output=True, check=True).stdout
        put_in = [_binary("psql"), "-q", "-v", "ON_ERROR_STOP=1", other]
        subprocess.run(put_in, input=dump, check=True, stdout=subprocess.DEVNULL)
        run(go_on(f"{other}?schema={schema_of(postgresql_url)}"))


def _binary(name: str) -> str:
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return found[-1] if found else name


# ── connections that are lost ────────────────────────────────────────────────────────────────────────────────────────


def test_connections_that_are_cut_are_made_anew(postgresql_url: str) -> None:
    """Whatever is cut while it publishes and handles: what returned is stored, what is Unavailable is not, and it goes on."""

    async def publish(store: Store, outcomes: dict[str, str], ended: asyncio.Event) -> None:
        for n in range(1_000_000):
            if ended.is_set():
                return
            id = f"id-{n}"
            try:
                await store.append([envelope(n, f"k{n % 5}", id=id)])
                outcomes[id] = "stored"
            except OutcomeUnknown:
                outcomes[id] = "unknown"
            except Unavailable:
                outcomes[id] = "refused"
            await asyncio.sleep(0)

    async def handle(store: Store, handled: set[str], ended: asyncio.Event) -> None:
        while not ended.is_set():
            try:
                deliveries = await store.claim("readers", limit=50, wait_s=0.1)
                handled |= {delivery.record.id for delivery in deliveries}  # seen; the answer may stay unknown
                await answer(store, deliveries)
            except LogError:
                await asyncio.sleep(0.01)

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open(READERS)
            outcomes: dict[str, str] = {}
            handled: set[str] = set()
            ended, all_handled = asyncio.Event(), asyncio.Event()
            publishing = asyncio.create_task(publish(store, outcomes, ended))
            handling = asyncio.create_task(handle(store, handled, all_handled))
            with beside(postgresql_url, autocommit=True) as killer:
                for kind in ("write", "read", "listen", "%", "write", "%"):
                    await more(outcomes, 20)
                    for pid in backends(killer, kind):
                        killer.execute("select pg_terminate_backend(%s)", (pid,))
            await more(outcomes, 50)
            ended.set()
            await publishing
            kept = {id for id, said in outcomes.items() if said == "stored"}
            while not handled >= kept:
                await asyncio.sleep(0.01)
            all_handled.set()
            await handling
            pages = [await store.read(Query(after=n * 1_000, before=n * 1_000 + 1_001)) for n in range(20)]
            stored = {record.id for page in pages for record in page}
            assert kept <= stored
            assert not {id for id, said in outcomes.items() if said == "refused"} & stored

    async def more(outcomes: dict[str, str], count: int) -> None:
        """Until so many more are stored."""
        enough = list(outcomes.values()).count("stored") + count
        while list(outcomes.values()).count("stored") < enough:
            await asyncio.sleep(0.005)

    run(main())


@pytest.mark.parametrize("wrong", ["password", "database", "host"])
def test_who_cannot_connect_is_told_at_once_and_without_the_password(postgresql_url: str, wrong: str) -> None:
    parts = urlsplit(postgresql_url)
    address = parts.netloc.rpartition("@")[2]
    url = {
        "password": f"postgresql://{parts.username}:hush-hush@{address}{parts.path}",
        "database": f"postgresql://{parts.netloc}/nowhere",
        "host": f"postgresql://{parts.username}:hush-hush@127.0.0.1:1{parts.path}",
    }[wrong]

    async def main() -> None:
        with pytest.raises(Unavailable) as refused:
            await open_store(url).open()
        told = str(refused.value)
        assert "hush-hush" not in told
        assert (parts.password or "") not in told
        assert {"password": "password", "database": "does not exist", "host": "refused"}[wrong] in told

    run(main())


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://localhost", "names no database"),
        ("postgresql://localhost/db?schema=Big", "lower-case"),
        ("postgresql://localhost/db?prepare=maybe", "on or off"),
        ("postgresql://localhost/db?wal_bytes=1000000", "unknown option"),
        ("postgresql://localhost/db?keys=postgresql://localhost/keys", "keys are kept in no database"),
    ],
)
def test_a_wrong_url_is_refused(url: str, told: str) -> None:
    with pytest.raises(BadOption, match=told):
        open_store(url)


def test_without_the_driver_it_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("trilogue.stores.postgresql")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(Unsupported, match=r"trilogue\[postgresql\]"):
        open_store("postgresql://user:secret@localhost/db")


# ── transactions that lose ───────────────────────────────────────────────────────────────────────────────────────────

LOSES = """
create sequence tries;
create function loses_once(times integer, state text) returns integer language plpgsql as $$
begin
  if nextval('tries') <= times then raise exception 'it lost' using errcode = state; end if;
  return 1;
end $$;
create table done (n integer)"""


def _effects(store: Store, deliveries: Any, state: str) -> list[Any]:
    def write(db: Any) -> None:
        db.execute("select loses_once(2, ?)", (state,))
        db.execute("insert into done values (1)")

    return [effect(delivery, write) for delivery in deliveries]


@pytest.mark.parametrize("state", ["40001", "40P01"])
@pytest.mark.parametrize("through", ["transact", "settle"])
def test_a_transaction_that_loses_is_run_again(postgresql_url: str, state: str, through: str) -> None:
    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open(group(has_effects=True))
            with beside(postgresql_url) as connection:
                connection.execute(LOSES)
            await store.append([envelope(n, f"k{n}") for n in range(3)])
            out = await take(store, "readers", 3)
            if through == "settle":
                answers = _effects(store, out, state)
                appended = asyncio.create_task(store.append([envelope(9)]))
                assert await store.settle("readers", answers) == []
                assert [each.settlements[0].verdict for each in answers] == ["done", "done", "done"]
                await appended
                assert await store.query("select count(*) from done") == [(3,)]
            else:
                await store.transact(lambda tx: tx.execute("select loses_once(2, ?)", (state,)))
            assert await store.query("select last_value > 2 from tries") == [(True,)]

    run(main())


def test_one_that_loses_always_is_given_up(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "REPEAT_S", 0.0001)

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open()
            with beside(postgresql_url) as connection:
                connection.execute(LOSES)
            with pytest.raises(Unavailable, match="in the way too often"):
                await store.transact(lambda tx: tx.execute("select loses_once(1000, '40001')"))
            assert await store.query("select last_value from tries") == [(postgresql.REPEATS + 1,)]
            await store.append([envelope(1)])

    run(main())


def test_a_caught_sql_error_undoes_the_effect_and_says_so(postgresql_url: str) -> None:
    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open(group(has_effects=True))
            await store.transact(lambda tx: tx.execute("create table seen (n integer primary key)"))

            def swallows(tx: Any) -> None:
                tx.execute("insert into seen values (1)")
                with pytest.raises(psycopg.errors.UniqueViolation):
                    tx.execute("insert into seen values (1)")

            with pytest.raises(Rejected, match="its error was caught"):
                await store.transact(swallows)
            await store.append([envelope(1, "k")])
            [delivery] = await take(store, "readers", 1)
            failing = effect(delivery, swallows)
            await store.settle("readers", [failing])
            assert "its error was caught" in failing.settlements[0].error
            assert await store.query("select count(*) from seen") == [(0,)]

    run(main())


# ── hints, poolers, SQL ──────────────────────────────────────────────────────────────────────────────────────────────


def test_without_hints_the_log_is_polled(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module.PostgresqlDatabase, "_notify", lambda self: None)
    monkeypatch.setattr(database_module.Listener, "_listen", lambda self: self._stopped.wait(60))

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            reader, writer = await bench.open(READERS), await bench.open()
            for n in range(5):
                await writer.append([envelope(n, "k")])
                assert numbers(await drain(reader, "readers", 1)) == [n]

    run(main())


POOLED = [
    "everything_comes_back", "ids_are_idempotent", "one_writer_wins", "effects_happen_with_the_settlement",
    "an_interrupted_effect_is_undone", "timers_survive", "zombies_have_no_effect", "restart_reads_nothing_twice",
]  # fmt: skip


@pytest.mark.parametrize("name", POOLED)
def test_promises_without_anything_kept_between_transactions(postgresql_url: str, name: str) -> None:
    [kept] = [promise for promise in PROMISES if promise.name == name]
    asyncio.run(kept.keep(lambda: open_store(f"{postgresql_url}&prepare=off")))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("select ? from a where b = '?'", "select %s from a where b = '?'"),
        ("select 5 % ?, '100%'", "select 5 %% %s, '100%%'"),
        ('select "a?" -- why?\n, ?', 'select "a?" -- why?\n, %s'),
        ("select /* ? */ a ?? ? from $$?$$", "select /* ? */ a ? %s from $$?$$"),
        ("select 'it''s ?', ?", "select 'it''s ?', %s"),
        ("select * from trilogue_state", 'select * from "s".trilogue_state'),
        ("select 'trilogue_head'::regclass", "select '\"s\".trilogue_head'::regclass"),
    ],
)
def test_statements_are_translated(ours: str, theirs: str) -> None:
    assert Translator("s")(ours) == theirs


def test_without_values_only_names_are_translated() -> None:
    assert Translator("s")("select '?', 5 % 2, a ? 'b' from trilogue_x", has_values=False) == (
        "select '?', 5 % 2, a ? 'b' from \"s\".trilogue_x"
    )


# ── schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_many_that_open_a_new_log_at_once_make_it_once(postgresql_url: str) -> None:
    async def main() -> None:
        stores = [open_store(postgresql_url) for _ in range(8)]
        await asyncio.gather(*(store.open() for store in stores))
        positions = await asyncio.gather(*(store.append([envelope(n)]) for n, store in enumerate(stores)))
        assert sorted(positions) == [[n] for n in range(1, 9)]
        await asyncio.gather(*(store.close() for store in stores))

    run(main())


def test_a_newer_schema_is_refused(postgresql_url: str) -> None:
    async def main() -> None:
        store = open_store(postgresql_url)
        await store.open()
        await store.close()
        with beside(postgresql_url) as connection:
            connection.execute("update trilogue_meta set version = 99")
        with pytest.raises(Unavailable, match="schema 99, newer than this trilogue"):
            await open_store(postgresql_url).open()

    run(main())


def test_bringing_the_schema_up_waits_for_nobody_for_long(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql_schema, "LOCK_S", 1)

    async def main() -> None:
        with beside(postgresql_url) as other:
            other.execute("select pg_advisory_xact_lock(%s)", (postgresql_schema._LOCK,))
            with pytest.raises(Unavailable, match="another transaction"):
                await open_store(postgresql_url).open()

    run(main())


def test_it_describes_itself(postgresql_url: str) -> None:
    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open()
            told = await store.describe()
            assert told["database"].startswith("PostgreSQL 1")
            assert told["schema"] == str(postgresql_schema.SCHEMA_VERSION)
            assert told["durability"].startswith("os-crash: fsync on")
            assert store.durability == "os-crash"

    run(main())


@pytest.mark.parametrize(
    ("setting", "durability"), [("synchronous_commit=off", "process-crash"), ("synchronous_commit=local", "os-crash")]
)
def test_durability_is_what_the_server_says(setting: str, durability: str) -> None:
    said = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "synchronous_standby_names": ""}
    name, _, value = setting.partition("=")
    assert postgresql_schema._survives({**said, name: value}) == durability
    assert postgresql_schema._survives({**said, "synchronous_standby_names": "one"}) == "replicated"
    assert postgresql_schema._survives({**said, "fsync": "off"}) == "process-crash"


def test_migrate_tells_what_it_did(postgresql_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for told in ("schema 1, created", "schema 1, as it was"):
        assert cli(["migrate", "--url", postgresql_url]) == 0
        assert told in capsys.readouterr().out
    assert cli(["migrate", "--url", "sqlite:///a.db"]) == 2
    assert "migrate is for postgresql://" in capsys.readouterr().err


def test_keys_of_personal_data_need_a_file(postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        app = App(postgresql_url)
        async with app:
            with pytest.raises(Rejected, match="keys=FILE"):
                app.keys.seal("u7", b"secret", b"")
        file = tmp_path / "app-keys"
        for url in (f"{postgresql_url}&keys={file}", postgresql_url):
            async with App(url) as app:
                assert app.keys.unseal(app.keys.seal("u7", b"secret", b""), b"") == b"secret"
            monkeypatch.setenv("TRILOGUE_KEYS", str(file))
        assert file.exists()

    run(main())


# ── what is read to be changed ───────────────────────────────────────────────────────────────────────────────────────


def test_states_read_to_be_changed_are_changed_one_after_the_other(postgresql_url: str) -> None:
    """Effects of two workers run at the same moment; what they keep for the same id is counted exactly all the same."""

    def count(db: Any) -> None:
        before = int(db.state("counts", "all") or b"0")
        db.set_state("counts", "all", b"%d" % (before + 1))

    async def work(store: Store, left: list[int]) -> None:
        while left[0] > 0:
            deliveries = await store.claim("readers", limit=1, wait_s=0.05)
            if deliveries:
                await store.settle("readers", [effect(delivery, count) for delivery in deliveries])
                left[0] -= len(deliveries)

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            mine = group(has_effects=True, ordered=False)
            stores = [await bench.open(mine) for _ in range(3)]
            await stores[0].append([envelope(n) for n in range(120)])
            left = [120]
            await asyncio.gather(*(work(store, left) for store in stores))
            assert await stores[0].state("counts", "all") == b"120"

    run(main())


def test_transactions_run_one_after_the_other(postgresql_url: str) -> None:
    def count(tx: Any) -> None:
        [(before,)] = tx.execute("select n from counted")
        tx.execute("update counted set n = ?", (before + 1,))

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            stores = [await bench.open() for _ in range(4)]
            await stores[0].transact(lambda tx: tx.execute("create table counted as select 0 as n"))
            await asyncio.gather(*(store.transact(count) for store in stores for _ in range(20)))
            assert await stores[0].query("select n from counted") == [(80,)]

    run(main())


def test_decisions_by_tags_of_many_processes_see_each_other(postgresql_url: str) -> None:
    """Each takes a seat unless it is taken: no seat is taken twice."""

    async def take_seat(store: Store, seat: int, who: int) -> bool:
        tag = f"seat:{seat}"
        sent = [msgspec.structs.replace(envelope(who), tags=(tag,))]
        try:
            await store.transact(lambda tx: tx.append(sent, unless=[Query(tags=(tag,))]))
        except Conflict:
            return False
        return True

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            stores = [await bench.open() for _ in range(4)]
            tries = [take_seat(store, seat, who) for seat in range(10) for who, store in enumerate(stores)]
            assert sum(await asyncio.gather(*tries)) == 10

    run(main())


def test_a_decision_by_tags_locks_the_end_of_the_log_first(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody, not even who decides nothing, puts a record between the look and the append."""
    original = SqlTransaction._refuse_newer

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open()
            with beside(postgresql_url, autocommit=True) as other:
                other.execute("set lock_timeout = '100ms'")
                refused: list[bool] = []

                def look(self: SqlTransaction, query: Query) -> None:
                    original(self, query)
                    with pytest.raises(psycopg.errors.LockNotAvailable):
                        other.execute(APPEND, ("between",))
                    refused.append(True)

                monkeypatch.setattr(SqlTransaction, "_refuse_newer", look)
                await store.transact(lambda tx: tx.append([envelope(1)], unless=[Query(tags=("t",))]))
                assert refused == [True]

    run(main())


def test_a_commit_whose_answer_is_lost_is_unknown(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PgConnection.commit

    def lost(self: PgConnection) -> None:
        original(self)
        if not self.sql.concerns_others:
            return  # a renewal of leases
        monkeypatch.setattr(PgConnection, "commit", original)
        self.psycopg.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    async def main() -> None:
        async with Bench(lambda: open_store(postgresql_url)) as bench:
            store = await bench.open()
            monkeypatch.setattr(PgConnection, "commit", lost)
            with pytest.raises(OutcomeUnknown, match="repeating it with the same id is harmless"):
                await store.append([envelope(1, id="one")])
            assert await store.append([envelope(1, id="one")]) == [1]

    run(main())
