"""A throw-away pgbouncer before PostgreSQL, the set's or the environment's: a transaction gets any of few connections."""

import os
import shutil
import signal
from pathlib import Path
from urllib.parse import unquote, urlsplit

from servers import process, state
from servers.process import Process, ServiceError, free_ports, run
from servers.state import Service

PACKAGES = ["pgbouncer"]
STOP = signal.SIGTERM  # at once; SIGINT would wait for all transactions
BEHIND = "postgresql"
PLACES = "/usr/sbin:/usr/bin:/usr/local/bin"
CONFIG = """\
[databases]
* = host={host} port={behind}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {users}
pool_mode = transaction
default_pool_size = 4
max_client_conn = 200
"""


def missing() -> list[str]:
    """The Debian packages that have to be installed first."""
    return [] if shutil.which("pgbouncer", path=PLACES) else PACKAGES


def prepare(home: Path) -> Service:
    """A folder with its settings, and how it is started. Raises ServiceError where there is no PostgreSQL to stand before."""
    server = urlsplit(_server(home))
    name, password = unquote(server.username or ""), unquote(server.password or "")
    home = process.reachable(home)
    user = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
    program, (port,) = shutil.which("pgbouncer", path=PLACES) or "pgbouncer", free_ports(1)
    users, config = home / "users.txt", home / "pgbouncer.ini"
    for file, text in (
        (users, f'"{name}" "{password}"\n'),
        (config, CONFIG.format(host=server.hostname, behind=server.port or 5432, port=port, users=users)),
    ):
        file.touch(mode=0o600)
        file.write_text(text)
    if user:
        for path in (home, users, config):
            shutil.chown(path, user)
    own = Process(
        argv=[program, "-q", str(config)],
        env={"PATH": os.environ["PATH"]},
        user=user,
        folder=str(home),
        log=str(home / "server.log"),
        pid=0,
        started=0,
    )
    version = run([program, "--version"], "pgbouncer does not run").split()[1]
    url = server._replace(netloc=f"{server.netloc.rpartition('@')[0]}@127.0.0.1:{port}").geturl()
    return Service(url=url, admin=None, version=version, home=str(home), processes=[own])


def discard(service: Service) -> None:
    """End it for good."""
    process.end(service["processes"][0], STOP, 5)


def answers(service: Service) -> bool:
    """Whether it takes connections."""
    return process.listens("127.0.0.1", urlsplit(service["url"]).port or 0)


def _server(home: Path) -> str:
    given = os.environ.get("TRILOGUE_POSTGRESQL_URL")
    started = state.load(home.parent).get(BEHIND)
    if not given and started is None:
        raise ServiceError("pgbouncer stands before a PostgreSQL, and there is none: start postgresql too, or see why it failed.")
    return given or str(started and started["url"])
