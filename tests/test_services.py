"""The servers that tests run on: started once, hurt and started again, taken down without a trace; a corner for each test."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import pytest
import services
from confluent_kafka.admin import AdminClient, NewTopic
from servers import postgresql, process, sets, state
from services import kafka_prefix, own_servers, postgresql_database, rabbitmq_api, rabbitmq_vhost

TOOL = Path(__file__).resolve().parents[1] / "tools" / "services.py"
VARIABLES = {f"TRILOGUE_{name.upper()}_URL" for name in sets.NAMES}


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[state.Service]:
    """A PostgreSQL of this test's own; its set is in tmp_path / "set"."""
    with own_servers(tmp_path / "set", "postgresql") as services_of_mine:
        yield services_of_mine["postgresql"]


def tool(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command with these variables; those of real servers are not passed on."""
    around = {name: value for name, value in os.environ.items() if name not in VARIABLES} | env
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], env=around, capture_output=True, text=True, timeout=200)


def sql(url: str, statement: str) -> list[asyncpg.Record]:
    async def fetch() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(url, timeout=10)
        try:
            return await connection.fetch(statement)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def shared_memory(service: state.Service) -> str:
    """The id of its System V segment: the last field of the seventh line of its lock file."""
    lines = Path(service["home"], "data", "postmaster.pid").read_text().splitlines()
    return lines[6].split()[1]


def segments() -> list[str]:
    return [line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]


def states(service: state.Service) -> set[str]:
    """What its processes do: T is stopped."""
    members = process.family(service["processes"][0])
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid, _ in members}


def pids(service: state.Service) -> list[int]:
    return [one["pid"] for one in service["processes"]]


@pytest.fixture
def dead_port() -> int:
    return process.free_ports(1)[0]


def test_up_twice_leaves_what_runs_as_it_is(mine: state.Service, tmp_path: Path) -> None:
    again = tool("up", "postgresql", "--home", tmp_path / "set")
    assert again.returncode == 0
    assert again.stdout.split() == ["postgresql", mine["version"], mine["url"]]
    assert pids(state.load(tmp_path / "set")["postgresql"]) == pids(mine)


def test_two_who_start_a_server_at_once_share_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: tool("up", "postgresql", "--home", tmp_path / "set"), range(2))
    sets.down(tmp_path / "set")
    assert (one.returncode, two.returncode) == (0, 0)
    assert one.stdout == two.stdout


def test_passwords_are_for_their_owner_only(mine: state.Service, tmp_path: Path) -> None:
    assert (tmp_path / "set" / "services.json").stat().st_mode & 0o077 == 0
    assert not Path(mine["home"], "password").exists()


def test_what_was_killed_comes_back_on_its_port_with_its_data(mine: state.Service, tmp_path: Path) -> None:
    sql(mine["url"], "create table t as select 7 as seven")
    members = process.family(mine["processes"][0])
    sets.kill(tmp_path / "set", "postgresql")
    assert len(members) > 1
    assert not any(process.runs(*member) for member in members)
    assert sets.running(tmp_path / "set") == {}

    again = tool("up", "postgresql", "--home", tmp_path / "set")
    assert again.returncode == 0, again.stderr
    assert [tuple(row) for row in sql(mine["url"], "select seven from t")] == [(7,)]
    assert pids(state.load(tmp_path / "set")["postgresql"]) != pids(mine)


def test_a_lock_file_of_a_killed_server_may_name_a_process_of_today(mine: state.Service, tmp_path: Path) -> None:
    sets.stop(tmp_path / "set", "postgresql")
    with own_servers(tmp_path / "other", "postgresql") as others:
        lock = Path(others["postgresql"]["home"], "data", "postmaster.pid").read_text()
        Path(mine["home"], "data", "postmaster.pid").write_text(lock)
        assert sets.start(tmp_path / "set", "postgresql")["url"] == mine["url"]
        assert postgresql.answers(others["postgresql"])


def test_what_was_stopped_starts_again(mine: state.Service, tmp_path: Path) -> None:
    sets.stop(tmp_path / "set", "postgresql")
    assert not postgresql.answers(mine)
    assert sets.start(tmp_path / "set", "postgresql")["url"] == mine["url"]
    assert postgresql.answers(mine)


def test_a_frozen_server_is_silent_until_it_is_thawed(mine: state.Service, tmp_path: Path) -> None:
    sets.freeze(tmp_path / "set", "postgresql")
    assert process.wait_for(lambda: states(mine) == {"T"}, 10)
    assert not postgresql.answers(mine)
    assert sets.running(tmp_path / "set")
    sets.thaw(tmp_path / "set", "postgresql")
    assert postgresql.answers(mine)


def test_writes_go_through_to_the_disk(mine: state.Service) -> None:
    for name in ("fsync", "synchronous_commit", "full_page_writes"):
        assert [row[0] for row in sql(mine["url"], f"show {name}")] == ["on"]


def test_down_ends_what_was_started_and_nothing_else(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with own_servers(tmp_path / "other", "postgresql") as others, own_servers(tmp_path / "set", "postgresql") as ours:
        family = process.family(ours["postgresql"]["processes"][0])
        sets.down(tmp_path / "set")
        assert len(family) > 1
        assert not any(process.runs(*member) for member in family)
        assert not (tmp_path / "set").exists()
        assert not Path(ours["postgresql"]["home"]).exists()
        assert postgresql.answers(others["postgresql"])
        assert bystander.poll() is None
    bystander.communicate(b"\n")


def test_a_killed_server_leaves_no_shared_memory_when_it_is_taken_down(tmp_path: Path) -> None:
    with own_servers(tmp_path, "postgresql") as mine:
        segment = shared_memory(mine["postgresql"])
        assert segment in segments()
        sets.kill(tmp_path, "postgresql")
        sets.down(tmp_path)
        assert segment not in segments()


def test_a_pid_that_was_used_again_is_not_ours() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    long_gone = process.Process(argv=[], env={}, user=None, folder="", log="", pid=bystander.pid, started=1)
    assert not process.alive(long_gone)
    process.end(long_gone, signal.SIGTERM, 1)
    process.kill(long_gone)
    bystander.communicate(b"\n")
    assert bystander.returncode == 0


def test_down_without_anything_there_is_nothing(tmp_path: Path) -> None:
    done = tool("down", "--home", tmp_path / "none")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "none").exists()


def test_down_keeps_files_that_are_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    sets.down(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_given_server_that_does_not_answer(tmp_path: Path, dead_port: int) -> None:
    given = f"postgresql://me:secret@127.0.0.1:{dead_port}/app"
    done = tool("up", "postgresql", "--home", tmp_path / "set", TRILOGUE_POSTGRESQL_URL=given)
    assert done.returncode == 1
    assert f"TRILOGUE_POSTGRESQL_URL names 127.0.0.1:{dead_port}, and nobody answers there." in done.stderr
    assert "secret" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "set").exists()


def test_a_given_server_that_answers_is_used(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = tool("up", "kafka", "--home", tmp_path / "set", TRILOGUE_KAFKA_URL=f"kafka://127.0.0.1:{port}")
    assert (done.returncode, done.stdout.split()) == (0, ["kafka", "(given)", f"kafka://127.0.0.1:{port}"])
    assert not (tmp_path / "set").exists()


def test_a_server_that_does_not_start_shows_the_end_of_its_log(mine: state.Service, tmp_path: Path) -> None:
    sets.stop(tmp_path / "set", "postgresql")
    with socket.create_server(("127.0.0.1", int(mine["url"].rpartition(":")[2].partition("/")[0]))):
        done = tool("start", "postgresql", "--home", tmp_path / "set")
    assert done.returncode == 1
    assert "Address already in use" in done.stderr
    assert "postgresql ended while it started; above is the end of" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_server_that_was_never_started_cannot_be_killed(tmp_path: Path) -> None:
    done = tool("kill", "kafka", "--home", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"there is no kafka in {tmp_path}: `services.py up kafka")


def test_run_takes_down_what_it_started_and_says_nothing_after_the_command(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        given = {"TRILOGUE_RABBITMQ_URL": f"amqp://{address}", "TRILOGUE_KAFKA_URL": f"kafka://{address}"}
        script = (
            f"import pathlib; print(pathlib.Path({str(tmp_path)!r}, 'set/services.json').exists()); print('1 failed'); exit(3)"
        )
        done = tool("run", "--home", tmp_path / "set", "--", sys.executable, "-c", script, **given)
    assert done.returncode == 3
    assert done.stdout.splitlines()[-2:] == ["True", "1 failed"]
    assert done.stderr == ""
    assert not (tmp_path / "set").exists()


def test_a_pooler_stands_before_the_sets_database(tmp_path: Path) -> None:
    with own_servers(tmp_path / "set", "pgbouncer", "postgresql") as mine:
        behind, pooled = mine["postgresql"]["url"], mine["pgbouncer"]["url"]
        assert pooled != behind
        assert sql(behind, "select inet_server_port() as port") == sql(pooled, "select inet_server_port() as port")
        sets.kill(tmp_path / "set", "pgbouncer")
        sets.start(tmp_path / "set", "pgbouncer")
        assert sql(pooled, "select 1 as one")[0]["one"] == 1
        sets.down(tmp_path / "set", ["postgresql"])
        assert not state.load(tmp_path / "set")  # without what is behind it, it is nothing


def test_a_pooler_alone_says_what_it_needs(tmp_path: Path) -> None:
    done = tool("up", "pgbouncer", "--home", tmp_path / "set")
    assert done.returncode == 1
    assert "start postgresql too" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_leaves_alone_what_ran_before(mine: state.Service, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        given = {"TRILOGUE_RABBITMQ_URL": f"amqp://{address}", "TRILOGUE_KAFKA_URL": f"kafka://{address}"}
        done = tool("run", "--home", tmp_path / "set", "--", "true", **given)
    assert done.returncode == 0
    assert postgresql.answers(mine)


@pytest.mark.parametrize(("ci", "code", "ran"), [("", 0, True), ("true", 1, False)])
def test_run_without_a_server(tmp_path: Path, dead_port: int, ci: str, code: int, ran: bool) -> None:
    given = dict.fromkeys(VARIABLES, f"x://127.0.0.1:{dead_port}")
    done = tool("run", "--home", tmp_path / "set", "--", "echo", "ran", CI=ci, **given)
    assert (done.returncode, "ran\n" in done.stdout) == (code, ran)
    assert "and nobody answers there" in done.stderr


def test_a_test_without_its_server_is_skipped_and_in_ci_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILOGUE_SERVICES", str(tmp_path))
    monkeypatch.delenv("TRILOGUE_KAFKA_URL", raising=False)
    for ci, outcome in (("", pytest.skip.Exception), ("true", pytest.fail.Exception)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(
            (pytest.skip.Exception, pytest.fail.Exception), match="no kafka runs: `make services` starts one"
        ) as raised:
            services.url("kafka")
        assert raised.type is outcome


def test_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILOGUE_KAFKA_URL", "kafka://elsewhere:1")
    assert services.url("kafka") == "kafka://elsewhere:1"


def test_a_database_for_each_test() -> None:
    with postgresql_database() as one, postgresql_database() as two:
        sql(one, "create table t (n int)")
        assert sql(two, "select 1 from pg_tables where tablename = 't'") == []
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        sql(one, "select 1")


def test_a_virtual_host_for_each_test() -> None:
    with rabbitmq_vhost() as url:
        name = url.rpartition("/")[2]
        assert name in names_of(rabbitmq_api("GET", "/api/vhosts"))
    assert name not in names_of(rabbitmq_api("GET", "/api/vhosts"))


def test_topics_for_each_test() -> None:
    with kafka_prefix() as url:
        address, _, prefix = url.removeprefix("kafka://").partition("?prefix=")
        admin = AdminClient({"bootstrap.servers": address})
        admin.create_topics([NewTopic(f"{prefix}t", 1, 1)])[f"{prefix}t"].result(30)
        assert f"{prefix}t" in admin.list_topics(timeout=30).topics
    assert f"{prefix}t" not in admin.list_topics(timeout=30).topics


def names_of(vhosts: object) -> list[str]:
    assert isinstance(vhosts, list)
    return [vhost["name"] for vhost in vhosts]
