"""One connection to RabbitMQ and its channels, on asyncio. pika knows the methods and tables; the frames are cut here.

TCP ─▶ [type channel size | payload | 0xCE]… ─▶ channel 0: hello, tune, open, blocked, close
                                             └▶ channel n: deliveries, confirms, returns, the answers to calls, close

Most frames are deliveries and publishes. Those are read and written without an object for each method, which is what makes
this several times faster than a client that calls back for every message; all that is rare goes through pika's codec.
What is written in one turn of the loop is one write to the socket.
"""

import asyncio
import ssl
import struct
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from pika import spec

from trilogue.brokers.rabbitmq.channel import Channel, method_frame
from trilogue.brokers.rabbitmq.options import Options
from trilogue.errors import Unavailable

FRAME = struct.Struct(">BHI")
FRAME_END = b"\xce"
FRAME_BYTES = 131_072
WAITING_BYTES = 4 << 20
FIN_S = 2.0
_LONG = struct.Struct(">I")
_CAPABILITIES = (
    "publisher_confirms",
    "basic.nack",
    "consumer_cancel_notify",
    "connection.blocked",
    "authentication_failure_close",
    "exchange_exchange_bindings",
)
_DENIED = {402, 403, 530, 540}


class Denied(Unavailable):
    """The server said no; trying again will not help."""


class Ended(Unavailable):
    """We ended it ourselves."""


class Link(asyncio.Protocol):
    """A connection. lost: done when it is gone; its result is why. blocked: the server's reason to take no publishes now.

    on_room: called when there may be room to write again.
    """

    def __init__(self, options: Options, purpose: str) -> None:
        self.url, self._options, self._purpose = options.url, options, purpose
        self._loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.lost: asyncio.Future[Unavailable] = self._loop.create_future()
        self.channels: dict[int, Channel] = {}
        self.server: dict[str, Any] = {}
        self.frame_bytes = FRAME_BYTES
        self.blocked: str | None = None
        self.on_room: Callable[[], None] = lambda: None
        self._transport: asyncio.Transport | None = None
        self._numbers = 0
        self._rest = b""
        self._writes: list[bytes] = []
        self._waiting_bytes = 0
        self._is_paused = False
        self._is_ending = False
        self._why: Unavailable | None = None
        self._heard_at = self._said_at = self._loop.time()
        self._heartbeat: asyncio.TimerHandle | None = None

    # ── channels ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def channel(self) -> Channel:
        """Open a channel; raises Unavailable."""
        if self.lost.done():
            raise self.lost.result()
        self._numbers = next(
            n % 2_000 + 1 for n in range(self._numbers, self._numbers + 2_000) if n % 2_000 + 1 not in self.channels
        )
        channel = self.channels[self._numbers] = Channel(self, self._numbers)
        await channel.call(spec.Channel.Open())
        return channel

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, data: bytes) -> None:
        """Write with everything else of this turn of the loop."""
        if not self._writes:
            self._loop.call_soon(self._flush)
        self._writes.append(data)
        self._waiting_bytes += len(data)

    @property
    def is_full(self) -> bool:
        """Whether enough waits to be written."""
        return self._is_paused or self._waiting_bytes > WAITING_BYTES

    def _flush(self) -> None:
        if not self._writes or self._transport is None or self.lost.done():
            return
        was_full = self._waiting_bytes > WAITING_BYTES
        self._transport.write(b"".join(self._writes))
        self._writes.clear()
        self._waiting_bytes = 0
        self._said_at = self._loop.time()
        if was_full and not self._is_paused:
            self.on_room()

    def pause_writing(self) -> None:
        """The socket takes no more for now."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """The socket takes more."""
        self._is_paused = False
        self.on_room()

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TCP, and TLS, are there: say hello."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(b"AMQP\x00\x00\x09\x01")

    def data_received(self, data: bytes) -> None:
        """Cut frames out of what arrived; what is not whole waits for more."""
        if self._is_ending:
            return
        self._heard_at = self._loop.time()
        buffer = self._rest + data if self._rest else data
        at, end, channels = 0, len(buffer), self.channels
        try:
            while at + 8 <= end:
                kind, number, size = FRAME.unpack_from(buffer, at)
                at += 7
                stop = at + size
                if size > self.frame_bytes:
                    raise ValueError(f"a frame of {size} bytes")
                if stop >= end:
                    at -= 7
                    break
                if buffer[stop] != 0xCE:
                    raise ValueError("a frame without its end")
                if number == 0:
                    self._own(kind, buffer, at)
                elif channel := channels.get(number):
                    channel.frame(kind, buffer, at, stop)
                at = stop + 1
        except Exception as error:  # whatever is wrong with the bytes, nothing that follows can be understood
            self.drop(Unavailable(f"what {self.url} sends is not AMQP 0-9-1: {type(error).__name__}: {error}"))
        self._rest = buffer[at:]

    def eof_received(self) -> bool:
        """The server is gone, or has seen that we go."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """TCP is gone."""
        if self._heartbeat:
            self._heartbeat.cancel()
        if self.lost.done():
            return
        error = self._why or Unavailable(f"the connection to {self.url} was lost: {exc or 'closed by the other side'}")
        self.lost.set_result(error)
        if not self.opened.done():
            self.opened.set_exception(error)
            self.opened.exception()  # seen, also where connect() has given up waiting for it
        for channel in list(self.channels.values()):
            channel.gone(error)

    # ── channel 0 ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _own(self, kind: int, buffer: bytes, at: int) -> None:
        if kind != spec.FRAME_METHOD:
            return  # a heartbeat, which was noted with every other byte
        index = _LONG.unpack_from(buffer, at)[0]
        method = spec.methods[index]().decode(buffer, at + 4)
        if isinstance(method, spec.Connection.Start):
            self._start(method)
        elif isinstance(method, spec.Connection.Tune):
            self._tune(method)
        elif isinstance(method, spec.Connection.OpenOk):
            self._beat()
            self.opened.set_result(None)
        elif isinstance(method, spec.Connection.Blocked):
            self.blocked = str(method.reason)
        elif isinstance(method, spec.Connection.Unblocked):
            self.blocked = None
            self.on_room()
        elif isinstance(method, spec.Connection.Close):
            self.write(method_frame(0, spec.Connection.CloseOk()))
            self._flush()
            self.drop(self._refusal(method.reply_code, str(method.reply_text)))
        elif isinstance(method, spec.Connection.CloseOk):
            self.drop(Ended("the connection was closed"))

    def _start(self, start: Any) -> None:
        self.server = {str(name): value for name, value in start.server_properties.items()}
        properties = {
            "product": "trilogue",
            "version": version("trilogue"),
            "platform": "Python",
            "connection_name": f"trilogue: {self._purpose}",
            "capabilities": dict.fromkeys(_CAPABILITIES, True),
        }
        secret = f"\0{self._options.user}\0{self._options.password}"
        self.write(method_frame(0, spec.Connection.StartOk(properties, "PLAIN", secret, "en_US")))

    def _tune(self, tune: Any) -> None:
        self.frame_bytes = min(tune.frame_max or FRAME_BYTES, FRAME_BYTES)
        self._beat_s = min(tune.heartbeat or self._options.heartbeat_s, self._options.heartbeat_s)
        self.write(method_frame(0, spec.Connection.TuneOk(tune.channel_max, self.frame_bytes, self._beat_s)))
        self.write(method_frame(0, spec.Connection.Open(self._options.vhost)))

    def _refusal(self, code: int, text: str) -> Unavailable:
        if code not in _DENIED or self.opened.done():
            return Unavailable(f"{self.url} closed the connection: {text}")
        o = self._options
        if code == 403:
            return Denied(f"{self.url} does not let user {o.user!r} in: check user and password in the URL ({text})")
        return Denied(
            f"{self.url} does not open virtual host {o.vhost!r} to user {o.user!r} ({text}): make it with "
            "`rabbitmqctl add_vhost` and `rabbitmqctl set_permissions`, or name another one behind the / of the URL"
        )

    def _beat(self) -> None:
        """Say something at least twice per heartbeat, and give up who said nothing for two."""
        now = self._loop.time()
        if now - self._heard_at > 2 * self._beat_s:
            self.drop(Unavailable(f"{self.url} was silent for {now - self._heard_at:.0f} s"))
            return
        if now - self._said_at >= self._beat_s / 2:
            self.write(b"\x08\x00\x00\x00\x00\x00\x00\xce")
        self._heartbeat = self._loop.call_later(self._beat_s / 3, self._beat)

    # ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def drop(self, error: Unavailable) -> None:
        """Give the connection up, at once."""
        self._why = self._why or error
        self._is_ending = True
        if self._transport is not None:
            self._transport.abort()
        self.connection_lost(None)

    async def fin(self) -> None:
        """End without a word: what is not acknowledged goes back in order.

        A consumer must not be cancelled first, as clients do that close politely: the next one would be given what follows while
        the cancelled one's deliveries are still out.
        """
        self._flush()
        self._is_ending = True
        self._why = Ended("the connection was ended")
        if self._transport is not None and not self.lost.done():
            if self._transport.can_write_eof():
                self._transport.write_eof()
            else:
                self._transport.close()
            await asyncio.wait([self.lost], timeout=FIN_S)
        self.drop(self._why)

    async def close(self) -> None:
        """Close politely."""
        if not self.lost.done():
            self.write(method_frame(0, spec.Connection.Close(200, "bye", 0, 0)))
            await asyncio.wait([self.lost], timeout=FIN_S)
        self.drop(Ended("the connection was closed"))


async def connect(options: Options, purpose: str) -> Link:
    """One attempt to connect; raises Denied where another would not help, Unavailable where it may."""
    loop = asyncio.get_running_loop()
    where = f"{options.host}:{options.port}"
    link = Link(options, purpose)
    try:
        async with asyncio.timeout(options.connect_timeout_s):
            await loop.create_connection(lambda: link, options.host, options.port, ssl=options.tls)
            await asyncio.shield(link.opened)
    except TimeoutError:
        raise Unavailable(f"{options.url}: nobody at {where} answered within {options.connect_timeout_s:g} s") from None
    except ssl.SSLError as error:
        raise Denied(f"{options.url}: no TLS with {where}: {error}; is ?ca= the authority of its certificate?") from error
    except OSError as error:
        raise Unavailable(f"{options.url}: no RabbitMQ answers at {where}: {error.strerror or error}") from error
    finally:
        if not link.opened.done() or link.opened.exception():
            link.drop(Unavailable("not opened"))
    return link
