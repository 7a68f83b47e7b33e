"""A throw-away RabbitMQ node with its management API, its own name, cookie and epmd (the name server of Erlang nodes)."""

import base64
import http.client
import os
import secrets
import shutil
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

from servers.process import Process, free_ports, kill
from servers.state import Service

PACKAGES = ["rabbitmq-server"]
STOP = signal.SIGTERM
CONFIG = """\
listeners.tcp.default = 127.0.0.1:{port}
management.tcp.ip = 127.0.0.1
management.tcp.port = {admin}
default_user = trilogue
default_pass = {secret}
vm_memory_high_watermark.absolute = 1GB
disk_free_limit.absolute = 100MB
log.console = true
log.file = false
"""


def missing() -> list[str]:
    """The Debian packages that have to be installed first."""
    return [] if _programs() and shutil.which("epmd") else PACKAGES


def prepare(home: Path) -> Service:
    """An empty node's folder, and how epmd and the server are started."""
    home.mkdir(parents=True)
    port, admin, names, nodes = free_ports(4)
    secret, name = secrets.token_hex(12), f"trilogue-{secrets.token_hex(4)}@localhost"
    (home / "rabbitmq.conf").write_text(CONFIG.format(port=port, admin=admin, secret=secret))
    (home / "enabled_plugins").write_text("[rabbitmq_management].\n")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "ERL_EPMD_PORT": str(names)}
    epmd = Process(
        argv=["epmd", "-port", str(names), "-address", "127.0.0.1"],
        env=env,
        user=None,
        folder=str(home),
        log=str(home / "epmd.log"),
        pid=0,
        started=0,
    )
    sbin = _programs()[-1]
    server = Process(
        argv=[f"{sbin}/rabbitmq-server"],
        env={**env, **_variables(home, name, nodes)},
        user=None,
        folder=str(home),
        log=str(home / "server.log"),
        pid=0,
        started=0,
    )
    return Service(
        url=f"amqp://trilogue:{secret}@127.0.0.1:{port}/",
        admin=f"http://trilogue:{secret}@127.0.0.1:{admin}",
        version=sbin.parent.name.rpartition("-")[2],
        home=str(home),
        processes=[epmd, server],
    )


def discard(service: Service) -> None:
    """End it for good."""
    for process in reversed(service["processes"]):
        kill(process)


def answers(service: Service) -> bool:
    """Whether both AMQP and the management API answer within two seconds."""
    return _speaks_amqp(service["url"]) and _manages(service["admin"] or "")


def _programs() -> list[Path]:
    return sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin"))


def _variables(home: Path, name: str, nodes: int) -> dict[str, str]:
    return {
        "RABBITMQ_NODENAME": name,
        "RABBITMQ_DIST_PORT": str(nodes),
        "RABBITMQ_CONF_ENV_FILE": str(home / "none.conf"),
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "none.config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(home / "data"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(home / "generated"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        # Without this a shell stays in front of the server, and a signal would reach the shell.
        "RABBITMQ_LOG": "-color",
        "RUNNING_UNDER_SYSTEMD": "true",
    }


def _speaks_amqp(url: str) -> bool:
    address = urlsplit(url)
    try:
        with socket.create_connection((address.hostname, address.port), 2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"
    except OSError:
        return False


def _manages(url: str) -> bool:
    address = urlsplit(url)
    token = base64.b64encode(f"{address.username}:{address.password}".encode()).decode()
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=2)
    try:
        connection.request("GET", "/api/vhosts", headers={"Authorization": f"Basic {token}"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
