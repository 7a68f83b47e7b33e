"""Servers of a campaign's own, and for each run a corner of them that nothing else has touched.

    with Site(folder, "rabbitmq", "postgresql") as site:
        with site.place("amqp+postgresql", run, proxied=True) as place: …     {"url": …, "store": …}, through TCP proxies

A name is what stands in the URL: sqlite, postgresql, or a broker and the store beside it.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from proxy import Proxy, proxy_to, through
from servers import sets
from servers.process import free_ports
from services import kafka_prefix, own_servers, postgresql_database, rabbitmq_vhost

NAMES = ("sqlite", "postgresql", "amqp+sqlite", "amqp+postgresql", "kafka+sqlite", "kafka+postgresql")
SERVERS = {"postgresql": "postgresql", "amqp": "rabbitmq", "kafka": "kafka"}
# Short enough that what rests on them is seen in seconds, long enough that nothing but a fault lets them run out.
LEASE_S, SESSION_S = 3, 6
IN_FLIGHT = 64  # records of a group at a worker of a broker: little, so that what is repeated at most says something
FOR_EVER = 1 << 62  # bytes


def broker_of(name: str) -> str | None:
    """The server that is the broker of such a URL; None for a store alone."""
    scheme, plus, _ = name.partition("+")
    return SERVERS[scheme] if plus else None


def database_of(name: str) -> str | None:
    """The server that is the store of such a URL; None for a file."""
    return SERVERS.get(name.rpartition("+")[2])


class Site:
    """A set of servers that may be hurt. proxies: by server, once a place asked for them."""

    def __init__(self, home: Path, *names: str) -> None:
        self.home, self.names = home, names
        self.proxies: dict[str, ThreadedProxy] = {}
        self._until_closed = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.services = self._until_closed.enter_context(own_servers(self.home, *self.names))
        self._until_closed.enter_context(_environment(self._variables()))
        return self

    def __exit__(self, *_: object) -> None:
        self._until_closed.close()

    def _variables(self) -> dict[str, str]:
        found = {f"TRILOGUE_{name.upper()}_URL": service["url"] for name, service in self.services.items()}
        if "rabbitmq" in self.services:
            found["TRILOGUE_RABBITMQ_ADMIN_URL"] = self.services["rabbitmq"]["admin"] or ""
        return found

    @contextlib.contextmanager
    def place(self, name: str, run: Path, *, proxied: bool = False) -> Iterator[dict[str, Any]]:
        """Where a run takes place, empty. proxied: every connection goes through a proxy of the server."""
        scheme, _, beside = name.rpartition("+")
        if proxied:
            self._start_proxies()
        with contextlib.ExitStack() as corner:
            store = self._store(beside, run, corner, proxied)
            url = self._broker(scheme, corner, proxied) if scheme else store
            # The last to be registered is the first to happen: only servers that answer can be tidied up.
            corner.callback(self.mend)
            # A queue begins when it is declared: there is no beginning to start at.
            yield {"url": url, "store": store if scheme else None, "start": "now" if scheme == "amqp" else "beginning"}

    def mend(self) -> None:
        """Everything runs and answers again."""
        for name in self.names:
            sets.thaw(self.home, name)
            sets.start(self.home, name)
        for proxy in self.proxies.values():
            proxy.mend()

    def _store(self, kind: str, run: Path, corner: contextlib.ExitStack, proxied: bool) -> str:
        if kind == "sqlite":
            return f"sqlite:///{run}/faults.db?lease_s={LEASE_S}"
        url = corner.enter_context(postgresql_database())
        return f"{self._through('postgresql', url, proxied)}?lease_s={LEASE_S}"

    def _broker(self, scheme: str, corner: contextlib.ExitStack, proxied: bool) -> str:
        if scheme == "amqp":
            return f"{self._through('rabbitmq', corner.enter_context(rabbitmq_vhost()), proxied)}?prefetch={IN_FLIGHT}"
        url = corner.enter_context(kafka_prefix())
        return f"{self._through('kafka', url, proxied)}&partitions=4&session_s={SESSION_S}&in_flight={IN_FLIGHT}"

    def _through(self, name: str, url: str, proxied: bool) -> str:
        return self.proxies[name].through(url) if proxied else url

    def _start_proxies(self) -> None:
        for name in self.names:
            if name not in self.proxies:
                (inner,) = free_ports(1)
                url = f"kafka://127.0.0.1:{inner}" if name == "kafka" else self.services[name]["url"]
                self.proxies[name] = self._until_closed.enter_context(ThreadedProxy(url))
                if name == "kafka":
                    self._advertise(inner, self.proxies[name].port)

    def _advertise(self, inner: int, proxy: int) -> None:
        """A Kafka tells its clients where to connect to: those that come through a proxy need a listener of their own."""
        file = self.home / "kafka" / "server.properties"
        more = {
            "listeners": f"PROXIED://127.0.0.1:{inner}",
            "advertised.listeners": f"PROXIED://127.0.0.1:{proxy}",
            "listener.security.protocol.map": "PROXIED:PLAINTEXT",
        }
        pairs = [line.split("=", 1) for line in file.read_text().splitlines()]
        sets.stop(self.home, "kafka")
        file.write_text("".join(f"{name}={value}{',' + more[name] if name in more else ''}\n" for name, value in pairs))
        sets.start(self.home, "kafka")


class ThreadedProxy:
    """A Proxy in a loop of its own, for a test that is not asynchronous."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._proxy: Proxy

    def __enter__(self) -> Self:
        self._thread.start()
        self._proxy = asyncio.run_coroutine_threadsafe(proxy_to(self._url).__aenter__(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._proxy.__aexit__(None, None, None), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def port(self) -> int:
        return self._proxy.port

    @property
    def cuts(self) -> int:
        return self._proxy.cuts

    def through(self, url: str) -> str:
        return through(self._proxy, url)

    def cut(self) -> None:
        """Cut every connection."""
        self._in_loop(self._proxy.cut)

    def cut_after(self, count: int) -> None:
        """Cut the connection that carries the byte after so many more to the server."""
        self._in_loop(lambda: self._proxy.cut_after(count))

    def deafen(self) -> None:
        """Throw the server's answers away."""
        self._proxy.is_deaf = True

    def mend(self) -> None:
        """Let everything pass."""
        self._proxy.is_deaf = False
        self._in_loop(lambda: self._proxy.cut_after(FOR_EVER))
        self._in_loop(self._proxy.thaw)

    def _in_loop(self, act: Callable[[], None]) -> None:
        async def acting() -> None:
            act()

        asyncio.run_coroutine_threadsafe(acting(), self._loop).result(10)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
