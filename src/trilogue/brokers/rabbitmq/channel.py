"""A channel: calls and their answers, and the content that arrives, cut out of frames.

deliver ─▶ header ─▶ body, body, … ─▶ on_delivery          a call ─▶ its answer, in the order of the calls
"""

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pika.frame
from pika import spec

from trilogue.errors import Unavailable

if TYPE_CHECKING:
    from trilogue.brokers.rabbitmq.link import Link

_LONG = struct.Struct(">I")
_TAG = struct.Struct(">Q")
_DELIVER = spec.Basic.Deliver.INDEX
_RETURN = spec.Basic.Return.INDEX


def _nothing(*_: object) -> None:
    return None


class Silent(Unavailable):
    """The server did not answer in time."""


class Closed(Unavailable):
    """The server closed a channel. code, text: what it said."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"RabbitMQ closed the channel: {text}")
        self.code, self.text = code, text


def method_frame(number: int, method: Any) -> bytes:
    """A method as bytes for the wire."""
    return bytes(pika.frame.Method(number, method).marshal())


class Channel:
    """A channel of a Link. The handlers are called while bytes are read: they must be quick and must not raise.

    on_delivery(tag, redelivered, routing key, properties, body), on_return(properties), on_confirm(tag, multiple, stored).
    closed: done when the channel or its connection is gone, or the server cancelled its consumer; its result is why.
    """

    def __init__(self, link: "Link", number: int) -> None:
        self.link, self.number = link, number
        self.closed: asyncio.Future[Unavailable] = asyncio.get_running_loop().create_future()
        self.on_delivery: Callable[[int, int, str, bytes, bytes], None] = _nothing
        self.on_confirm: Callable[[int, bool, bool], None] = _nothing
        self.on_return: Callable[[bytes], None] = _nothing
        self._calls: deque[asyncio.Future[Any]] = deque()
        # Of the content that is arriving: what it is, its properties, its parts, and how many bytes are missing.
        self._kind, self._tag, self._redelivered, self._key = 0, 0, 0, ""
        self._properties = b""
        self._parts: list[bytes] = []
        self._missing = 0

    async def call(self, method: Any, timeout_s: float = 10.0) -> Any:
        """Send a method and wait for its answer; raises Closed, Silent, Unavailable."""
        if self.closed.done():
            raise self.closed.result()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.append(answer)
        self.link.write(method_frame(self.number, method))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise Silent(f"{self.link.url} did not answer {method.NAME} within {timeout_s:g} s") from None

    async def close(self) -> None:
        """Close politely, which does not cancel consumers first; see Link.fin()."""
        if not self.closed.done():
            self.mute()
            with contextlib.suppress(Unavailable):
                await self.call(spec.Channel.Close(200, "", 0, 0))

    def mute(self) -> None:
        """Hear nothing more of what the server sends on its own."""
        self.on_delivery = self.on_confirm = self.on_return = _nothing

    def gone(self, error: Unavailable) -> None:
        """The channel cannot be used any more."""
        self.link.channels.pop(self.number, None)
        if not self.closed.done():
            self.closed.set_result(error)
        while self._calls:
            answer = self._calls.popleft()
            if not answer.done():
                answer.set_exception(error)

    def frame(self, kind: int, buffer: bytes, at: int, stop: int) -> None:
        """One frame of this channel, the payload of which is buffer[at:stop]."""
        if kind == spec.FRAME_BODY:
            self._body(buffer[at:stop])
        elif kind == spec.FRAME_HEADER:
            self._properties = buffer[at + 12 : stop]
            self._missing = _TAG.unpack_from(buffer, at + 4)[0]
            if not self._missing:
                self._content(b"")
        elif _LONG.unpack_from(buffer, at)[0] == _DELIVER:
            # consumer tag, delivery tag, redelivered, exchange, routing key
            place = at + 5 + buffer[at + 4]
            self._kind, self._tag = _DELIVER, _TAG.unpack_from(buffer, place)[0]
            self._redelivered = buffer[place + 8] & 1
            place += 10 + buffer[place + 9]
            self._key = buffer[place + 1 : place + 1 + buffer[place]].decode("utf-8", "replace")
        else:
            self._method(buffer, at)

    def _body(self, part: bytes) -> None:
        self._missing -= len(part)
        if self._missing > 0:
            self._parts.append(part)
        elif self._parts:
            part = b"".join((*self._parts, part))
            self._parts = []
            self._content(part)
        else:
            self._content(part)

    def _content(self, body: bytes) -> None:
        if self._kind == _DELIVER:
            self.on_delivery(self._tag, self._redelivered, self._key, self._properties, body)
        else:
            self.on_return(self._properties)

    def _method(self, buffer: bytes, at: int) -> None:
        index = _LONG.unpack_from(buffer, at)[0]
        method = spec.methods[index]().decode(buffer, at + 4)
        if isinstance(method, spec.Basic.Ack):
            self.on_confirm(method.delivery_tag, method.multiple, True)
        elif isinstance(method, spec.Basic.Nack):
            self.on_confirm(method.delivery_tag, method.multiple, False)
        elif index == _RETURN:
            self._kind = _RETURN
        elif isinstance(method, spec.Basic.Cancel):
            if not self.closed.done():
                self.closed.set_result(Unavailable("RabbitMQ cancelled the consumer: its queue was deleted or moved"))
        elif isinstance(method, spec.Channel.Close):
            self.link.write(method_frame(self.number, spec.Channel.CloseOk()))
            self.gone(Closed(method.reply_code, str(method.reply_text)))
        else:
            self._answer(method)

    def _answer(self, method: Any) -> None:
        answer = self._calls.popleft() if self._calls else None
        if answer is not None and not answer.done():
            answer.set_result(method)
        if isinstance(method, spec.Channel.CloseOk):
            self.gone(Unavailable("the channel was closed"))
