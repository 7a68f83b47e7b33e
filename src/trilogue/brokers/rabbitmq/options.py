"""What a RabbitMQ URL says.

amqp://user:secret@host:5672/vhost?prefix=shop-&queue_type=classic
amqps://…                            └ %2f, / or nothing: the default one, "/"
└ TLS, the server's certificate checked
"""

import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from trilogue.errors import BadOption
from trilogue.stores.append import PAYLOAD_BYTES
from trilogue.urls import Reader, number, one_of, options, redacted, split, whole

PREFIX_CHARS = 64


def _name(text: str) -> str:
    if not 0 < len(text) <= PREFIX_CHARS or not text.isprintable() or text.startswith("amq."):
        raise ValueError(f"1 to {PREFIX_CHARS} printable characters, not beginning with 'amq.'")
    return text


def _file(text: str) -> str:
    if not text:
        raise ValueError("the name of a PEM file")
    return text


_READERS: dict[str, Reader] = {
    "prefix": _name,
    "exchange": _name,
    "queue_type": one_of("quorum", "classic"),
    "prefetch": whole(1, 2_000),
    "window": whole(1, 65_535),
    "timeout_s": number(0.1, 3_600),
    "connect_timeout_s": number(0.1, 600),
    "heartbeat_s": whole(1, 3_600),
    "payload_bytes": whole(1, 1 << 27),
    "ca": _file,
    "cert": _file,
    "key": _file,
}


@dataclass(frozen=True, slots=True)
class Options:
    """A RabbitMQ URL, read.

    url: as it may be shown. prefix: before the name of every queue and exchange. exchange: where events are published.
    queue_type: quorum or classic. prefetch: how many deliveries of a group are out at most. window: publishes not confirmed
    yet. timeout_s: how long a publish may wait. connect_timeout_s: for one attempt to connect, and for open() in all.
    heartbeat_s: after twice this silence a connection is given up. payload_bytes: the largest event. tls: None without.
    """

    url: str
    host: str
    port: int
    user: str
    password: str = field(repr=False)
    vhost: str
    tls: ssl.SSLContext | None = None
    prefix: str = ""
    exchange: str = "events"
    queue_type: str = "quorum"
    prefetch: int = 256
    window: int = 1_024
    timeout_s: float = 30.0
    connect_timeout_s: float = 5.0
    heartbeat_s: int = 30
    payload_bytes: int = PAYLOAD_BYTES

    @property
    def events(self) -> str:
        """The exchange all events go to."""
        return self.prefix + self.exchange

    @property
    def unrouted(self) -> str:
        """The exchange and queue of events that no group wanted."""
        return f"{self.events}.unrouted"

    @property
    def dead(self) -> str:
        """The exchange of dead letters."""
        return f"{self.events}.dead"

    def queue(self, group: str) -> str:
        """The queue of a group."""
        return self.prefix + group

    def dead_queue(self, group: str) -> str:
        """The queue of a group's dead letters."""
        return f"{self.prefix}{group}.dead"


def read(url: str) -> Options:
    """The Options in a URL; raises BadOption saying what is wrong with it."""
    parts = split(url)
    found = options(parts.query, url, _READERS)
    files = {name: found.pop(name) for name in ("ca", "cert", "key") if name in found}
    is_tls = parts.scheme == "amqps"
    if files and not is_tls:
        raise BadOption(f"{redacted(url)!r}: {', '.join(files)} belong to TLS; write amqps://")
    try:
        port = parts.port
    except ValueError:  # its text may contain the password
        raise BadOption(
            f"{redacted(url)!r}: the port is no number from 0 to 65535; write amqp://user:password@host:5672/"
        ) from None
    if not parts.hostname:
        raise BadOption(f"{redacted(url)!r} names no host; write amqp://user:password@host:5672/")
    return Options(
        url=redacted(url),
        host=parts.hostname,
        port=port or (5671 if is_tls else 5672),
        user=unquote(parts.username or "guest"),
        password=unquote("guest" if parts.password is None else parts.password),
        vhost=_vhost(parts.path, url),
        tls=_tls(url, **files) if is_tls else None,
        **found,
    )


def _vhost(path: str, url: str) -> str:
    name = path.removeprefix("/")
    if "/" in name:
        raise BadOption(f"{redacted(url)!r}: a virtual host with a / in its name is written with %2f instead")
    return unquote(name) or "/"


def _tls(url: str, ca: str | None = None, cert: str | None = None, key: str | None = None) -> ssl.SSLContext:
    if key and not cert:
        raise BadOption(f"{redacted(url)!r}: key= without cert=; give the client's certificate, too")
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert:
            # A password prompt would hang a service: an encrypted key is refused instead.
            context.load_cert_chain(cert, key, password=_refuse)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise BadOption(f"{redacted(url)!r}: the TLS files cannot be read: {error}; expected PEM files") from error
    return context


def _refuse(*_: Any) -> bytes:
    raise ValueError("the key is encrypted; decrypt it, and keep it readable for this user only")
