"""A throw-away PostgreSQL: fsync on as in real life, TCP on 127.0.0.1 only, one role and one database named trilogue."""

import os
import secrets
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from servers.process import Process, ServiceError, end, free_ports, reachable, run
from servers.state import Service

PACKAGES = ["postgresql"]
STOP = signal.SIGINT  # "fast": ends the sessions, keeps what was committed
SETTINGS = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": "200", "fsync": "on"}


def missing() -> list[str]:
    """The Debian packages that have to be installed first."""
    return [] if _versions() else PACKAGES


def prepare(home: Path) -> Service:
    """A new, empty data folder and how the server is started on it."""
    home = reachable(home)
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        shutil.chown(home, user, user)
    bin_folder, data, secret, (port,) = _versions()[-1], home / "data", secrets.token_hex(12), free_ports(1)
    settings = [option for name, value in {**SETTINGS, "port": str(port)}.items() for option in ("-c", f"{name}={value}")]
    process = Process(
        # A killed server's lock file names a pid that may be in use again, and then it refuses to start.
        argv=[
            "sh",
            "-c",
            'rm -f "$0/postmaster.pid"; exec "$@"',
            str(data),
            f"{bin_folder}/postgres",
            "-D",
            str(data),
            *settings,
        ],
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        user=user,
        folder=str(home),
        log=str(home / "server.log"),
        pid=0,
        started=0,
    )
    _initialise(bin_folder, process, data, secret)
    version = run([f"{bin_folder}/postgres", "--version"], "postgres does not run").split()[2]
    url = f"postgresql://trilogue:{secret}@127.0.0.1:{port}/trilogue"
    return Service(url=url, admin=None, version=version, home=str(home), processes=[process])


def discard(service: Service) -> None:
    """End it for good."""
    (process,) = service["processes"]
    end(process, STOP, 15)
    data = Path(service["home"]) / "data"
    if not (data / "postmaster.pid").exists():
        return
    # It was killed, and left shared memory behind. The next start on the same data removes that; single-user mode is enough.
    (data / "postmaster.pid").unlink()
    with suppress(ServiceError):
        run([f"{_versions()[-1]}/postgres", "--single", "-D", str(data), "postgres"], "", process)


def answers(service: Service) -> bool:
    """Whether it answers a query within two seconds."""
    command = [f"{_versions()[-1]}/psql", service["url"], "-Atqc", "select 1"]
    env = {**service["processes"][0]["env"], "PGCONNECT_TIMEOUT": "2"}
    try:
        return subprocess.run(command, env=env, capture_output=True, timeout=4).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _initialise(bin_folder: Path, process: Process, data: Path, secret: str) -> None:
    """Make the data folder, with the role and the database."""
    password = Path(process["folder"]) / "password"
    password.touch(mode=0o600)
    password.write_text(secret)
    if process["user"]:
        shutil.chown(password, process["user"])
    how = ["-A", "scram-sha-256", "-U", "trilogue", f"--pwfile={password}", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
    run([f"{bin_folder}/initdb", "-D", str(data), *how], "initdb failed", process)
    password.unlink()
    create = [f"{bin_folder}/postgres", "--single", "-D", str(data), "postgres"]
    run(create, "PostgreSQL could not make its database", process, "create database trilogue\n")


def _versions() -> list[Path]:
    """The folders with its programs, the newest version last."""
    folders = [folder for folder in Path("/usr/lib/postgresql").glob("*/bin") if (folder / "postgres").exists()]
    return sorted(folders, key=lambda folder: int(folder.parent.name))
