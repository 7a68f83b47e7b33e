"""Real servers in tests: where they are, a corner of one's own on them, and servers of one's own to hurt.

    url("kafka")                                       the shared server's URL; without one the test is skipped, in CI it fails
    with postgresql_database() as url: …               a database of its own, dropped at the end
    with rabbitmq_vhost() as url: …                    a virtual host of its own, deleted at the end
    with kafka_prefix() as url: …                      a prefix of its own for topics, which are deleted at the end
    with own_servers(tmp_path, "postgresql") as mine:  servers of its own: sets.kill(tmp_path, "postgresql") hurts nobody else

The shared servers are those of the environment (TRILOGUE_POSTGRESQL_URL and so on) or those that `make services` started.
"""

import asyncio
import base64
import json
import os
import secrets
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg
import pytest
from confluent_kafka.admin import AdminClient

# Behind everything else: this module and the command there have the same name.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from servers import sets, state
from servers.process import ServiceError
from servers.state import Services

SECONDS = 30  # for one request to a server


def url(name: str) -> str:
    """The URL of the shared postgresql, rabbitmq, kafka or pgbouncer."""
    given = os.environ.get(f"TRILOGUE_{name.upper()}_URL")
    return given or _started(name)["url"]


@contextmanager
def own_servers(folder: Path, *names: str) -> Iterator[Services]:
    """Servers nobody else uses, by name, with everything about them; gone at the end."""
    try:
        yield _brought_up(folder, names)
    finally:
        sets.down(folder)


@contextmanager
def postgresql_database() -> Iterator[str]:
    """The URL of a new database."""
    name, server = f"t{secrets.token_hex(6)}", url("postgresql")
    _sql(server, f"create database {name}")
    try:
        yield urlunsplit(urlsplit(server)._replace(path=f"/{name}"))
    finally:
        _sql(server, f"drop database if exists {name} with (force)")


@contextmanager
def rabbitmq_vhost() -> Iterator[str]:
    """The URL of a new virtual host, in which the user may do everything."""
    name, server = f"t{secrets.token_hex(6)}", url("rabbitmq")
    user = urlsplit(server).username or "guest"
    rabbitmq_api("PUT", f"/api/vhosts/{name}")
    try:
        rabbitmq_api("PUT", f"/api/permissions/{name}/{quote(user, safe='')}", {"configure": ".*", "write": ".*", "read": ".*"})
        yield urlunsplit(urlsplit(server)._replace(path=f"/{name}"))
    finally:
        rabbitmq_api("DELETE", f"/api/vhosts/{name}")


@contextmanager
def kafka_prefix() -> Iterator[str]:
    """A URL with a prefix for topics and groups that nobody else has."""
    prefix, server = f"t{secrets.token_hex(6)}-", url("kafka")
    try:
        yield f"{server}?prefix={prefix}"
    finally:
        admin = AdminClient({"bootstrap.servers": urlsplit(server).netloc})
        topics = [topic for topic in admin.list_topics(timeout=SECONDS).topics if topic.startswith(prefix)]
        for deleted in admin.delete_topics(topics, request_timeout=SECONDS).values() if topics else ():
            deleted.result(SECONDS)


def rabbitmq_api(method: str, path: str, body: object = None) -> object:
    """What the shared RabbitMQ's management API answers; None when it answers nothing."""
    admin = urlsplit(_rabbitmq_admin())
    token = base64.b64encode(f"{admin.username}:{admin.password}".encode()).decode()
    headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{admin.hostname}:{admin.port}{path}", data, headers, method=method)
    # No proxy: the server is on this machine.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=SECONDS) as response:
        text = response.read()
    return json.loads(text) if text else None


def _rabbitmq_admin() -> str:
    given = os.environ.get("TRILOGUE_RABBITMQ_URL")
    if not given:
        return _started("rabbitmq")["admin"] or ""
    address = urlsplit(given)
    user = f"{address.username or 'guest'}:{address.password or 'guest'}"
    return os.environ.get("TRILOGUE_RABBITMQ_ADMIN_URL") or f"http://{user}@{address.hostname}:15672"


def _started(name: str) -> state.Service:
    service = sets.running(state.default_home()).get(name)
    return service or _without(f"no {name} runs: `make services` starts one, or set TRILOGUE_{name.upper()}_URL.")


def _brought_up(folder: Path, names: Sequence[str]) -> Services:
    try:
        return sets.up(folder, names)
    except ServiceError as error:
        _without(str(error))


def _without(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _sql(server: str, *statements: str) -> None:
    """Run statements, in a thread of its own: the test may have a loop running in this one."""

    async def execute() -> None:
        connection = await asyncpg.connect(server, timeout=SECONDS, command_timeout=SECONDS)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, execute()).result()
