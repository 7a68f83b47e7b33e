"""What a kafka:// URL says, and the librdkafka configurations that follow from it.

kafka://user:secret@h1:9092,h2:9092?prefix=shop-&linger=1ms&partitions=4
└ kafka+ssl:// for TLS  └ any brokers of one cluster     └ Settings has them all, with their defaults
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from trilogue.durations import seconds
from trilogue.errors import BadOption
from trilogue.urls import number, one_of, options, redacted, split, whole

PORT = 9092
OVERHEAD_BYTES = 64 << 10  # what a record's headers and framing may take beside max_bytes


def _duration(low_s: float, high_s: float) -> Callable[[str], float]:
    """A reader of durations, as 10ms."""

    def read(text: str) -> float:
        try:
            length = seconds(text)
        except BadOption:
            length = -1.0
        if not low_s <= length <= high_s:
            raise ValueError(f"a duration of {low_s:g} to {high_s:g} s, as 10ms")
        return length

    return read


def _name_part(text: str) -> str:
    if len(text) > 100 or not all(letter.isascii() and (letter.isalnum() or letter in "._-") for letter in text):
        raise ValueError("at most 100 letters, digits, '.', '_' and '-'")
    return text


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError("a file that is there")
    return text


_READERS: dict[str, Callable[[str], Any]] = {
    "prefix": _name_part,
    "linger": _duration(0, 10),
    "batch_bytes": whole(1, 8 << 20),
    "retries": whole(0, 2**31 - 1),
    "partitions": whole(1, 10_000),
    "replication": whole(1, 100),
    "topics": one_of("create", "expect"),
    "max_bytes": whole(1_000, 64 << 20),
    "timeout_s": number(0.1, 3_600),
    "connect_timeout_s": number(0.1, 600),
    "in_flight": whole(1, 100_000),
    "session_s": number(1, 300),
    "drain_s": number(0, 60),
    "protocol": one_of("classic", "consumer"),
    "start": one_of("latest", "earliest"),
    "reset": one_of("error", "latest", "earliest"),
    "mechanism": one_of("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
    "ca": _file,
    "cert": _file,
    "key": _file,
}


@dataclass(frozen=True)
class Settings:
    """A kafka:// URL, read.

    servers: host:port, with commas. prefix: in front of every topic and group. linger: seconds a publish waits for company.
    partitions, replication: of topics that are created; None: 4, and what the brokers have for a default.
    topics: whether missing ones are created. timeout_s: how long a publish may wait for its confirmation. in_flight: records of
    a group that are received and not acknowledged. drain_s: how long a partition that moves away waits for what is out.
    start: where new groups begin, instead of what they say. reset: what happens when a group's offset is gone.
    """

    url: str
    servers: str
    user: str | None = None
    password: str | None = None
    tls: bool = False
    prefix: str = ""
    linger: float = 0.001
    batch_bytes: int = 1 << 20
    retries: int = 2**31 - 1
    partitions: int | None = None
    replication: int | None = None
    topics: Literal["create", "expect"] = "create"
    max_bytes: int = 1_000_000
    timeout_s: float = 30.0
    connect_timeout_s: float = 10.0
    in_flight: int = 4_000
    session_s: float = 10.0
    drain_s: float = 2.0
    protocol: Literal["classic", "consumer"] = "classic"
    start: Literal["latest", "earliest"] | None = None
    reset: Literal["error", "latest", "earliest"] = "error"
    mechanism: str = "PLAIN"
    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    @cached_property
    def shown(self) -> str:
        """The URL without its password."""
        return redacted(self.url)

    def common(self) -> dict[str, Any]:
        """What every client of ours is told."""
        config: dict[str, Any] = {
            "bootstrap.servers": self.servers,
            "client.id": "trilogue",
            "allow.auto.create.topics": False,  # such topics would have the broker's number of partitions, not ours
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 1_000,
            "socket.keepalive.enable": True,
            "socket.timeout.ms": 10_000,
            "log.connection.close": False,
            "security.protocol": f"{'SASL_' if self.user else ''}{'SSL' if self.tls else 'PLAINTEXT'}",
        }
        if self.user:
            config |= {"sasl.mechanism": self.mechanism, "sasl.username": self.user, "sasl.password": self.password or ""}
        files = {"ssl.ca.location": self.ca, "ssl.certificate.location": self.cert, "ssl.key.location": self.key}
        return config | {name: path for name, path in files.items() if path and self.tls}

    def producer(self) -> dict[str, Any]:
        """A producer whose receipts mean that all replicas in sync have it, and that keeps order when it tries again."""
        return self.common() | {
            "acks": "all",
            "enable.idempotence": True,
            "partitioner": "murmur2_random",  # what Java clients do: equal keys, equal partition, whoever sends
            "linger.ms": self.linger * 1_000,
            "batch.size": self.batch_bytes,
            "topic.metadata.propagation.max.ms": 5_000,  # so long a deleted topic is waited for; then it is said to be gone
            "message.send.max.retries": self.retries,
            "delivery.timeout.ms": max(round(self.timeout_s * 1_000), round(self.linger * 1_000) + 1),
            "message.max.bytes": self.max_bytes + OVERHEAD_BYTES,
            "queue.buffering.max.messages": 100_000,
            "queue.buffering.max.kbytes": 65_536,
        }

    def consumer(self, group_id: str) -> dict[str, Any]:
        """A member of a group that moves its own offsets."""
        config = self.common() | {
            "group.id": group_id,
            "group.protocol": self.protocol,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": self.reset,
            "check.crcs": True,
            "topic.metadata.refresh.interval.ms": 30_000,
            "queued.min.messages": 20_000,
            "queued.max.messages.kbytes": 16_384,
            "fetch.queue.backoff.ms": 10,  # with its default of 1 s, a short queue starves the group
        }
        if self.protocol == "consumer":
            return config  # session and heartbeat are the broker's settings there
        session_ms = round(self.session_s * 1_000)
        # A partition that moves stands still for one heartbeat.
        return config | {
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": session_ms,
            "heartbeat.interval.ms": min(500, session_ms // 3),
        }


def read(url: str) -> Settings:
    """The settings in a URL; raises BadOption for what is wrong with it."""
    parts = split(url)
    user_part, _, hosts = parts.netloc.rpartition("@")
    if parts.path not in ("", "/"):
        raise BadOption(f"{redacted(url)!r}: there is nothing to name after the servers: use ?prefix= to keep topics apart")
    user, _, password = user_part.partition(":")
    found = options(parts.query, url, _READERS)
    if ("cert" in found) != ("key" in found):
        raise BadOption(f"{redacted(url)!r}: cert= and key= belong together: give both")
    tls = parts.scheme == "kafka+ssl"
    if not tls and found.keys() & {"ca", "cert", "key"}:
        raise BadOption(f"{redacted(url)!r}: ca=, cert= and key= are for TLS: write kafka+ssl://")
    if "mechanism" in found and not user:
        raise BadOption(f"{redacted(url)!r}: mechanism= is for a user and password: write kafka://user:password@host")
    servers = ",".join(_address(host, url) for host in hosts.split(","))
    return Settings(url, servers, unquote(user) or None, unquote(password) or None, tls, **found)


def _address(host: str, url: str) -> str:
    name, colon, port = host.rpartition(":") if ":" in host.rpartition("]")[2] else (host, "", "")
    if not name or (colon and not (port.isdigit() and 0 < int(port) < 65_536)):
        raise BadOption(f"{redacted(url)!r}: {host!r} is no server: expected kafka://host:9092, several with commas")
    return host if colon else f"{host}:{PORT}"
