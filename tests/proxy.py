"""A TCP proxy between a program and its server, to cut what passes through it.

program ──▶ proxy ──▶ server        open        everything passes
                                    cut_after   so many more bytes go to the server, then both sides are cut
                                    deaf        the server hears everything, its answers are thrown away
                                    frozen      nothing passes in either direction, nothing is closed
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

PIECE_BYTES = 65_536


class Proxy:
    """A proxy for one server. cuts: how many connections it has cut."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._server: asyncio.Server | None = None
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._left: int | None = None
        self._thawed = asyncio.Event()
        self._thawed.set()
        self.is_deaf = False
        self.refuses = False
        self.cuts = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server is not None
        self._server.close()
        self._thawed.set()
        self.cut()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        """Where to connect to instead of the server."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self) -> None:
        """Cut every connection, in both directions."""
        for pair in list(self._pairs):
            self._cut(pair)

    def cut_after(self, count: int) -> None:
        """Let so many more bytes pass to the server, over all connections, then cut the one that carries the next."""
        self._left = count

    def freeze(self) -> None:
        """Let nothing pass until thaw()."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Undo freeze()."""
        self._thawed.set()

    # ── one connection ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, back)
        self._pairs.add(pair)
        for task in (self._to_server(pair, reader), self._to_program(pair, there)):
            one = asyncio.create_task(task)
            self._tasks.add(one)
            one.add_done_callback(self._tasks.discard)

    async def _to_server(self, pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter], reader: asyncio.StreamReader) -> None:
        async for piece in self._pieces(pair, reader):
            if self._left is None or self._left > len(piece):
                self._left = None if self._left is None else self._left - len(piece)
                pair[1].write(piece)
                continue
            pair[1].write(piece[: self._left])
            self._left = None
            with contextlib.suppress(OSError):
                await pair[1].drain()
            self._cut(pair)

    async def _to_program(self, pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter], reader: asyncio.StreamReader) -> None:
        async for piece in self._pieces(pair, reader):
            if not self.is_deaf:
                pair[0].write(piece)

    async def _pieces(
        self, pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter], reader: asyncio.StreamReader
    ) -> AsyncIterator[bytes]:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                await self._thawed.wait()
                yield piece
                for writer in pair:
                    await writer.drain()
        for writer in pair:  # what one side ends, ends for the other
            writer.close()
        self._pairs.discard(pair)

    def _cut(self, pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        self.cuts += pair in self._pairs
        self._pairs.discard(pair)
        for writer in pair:
            writer.transport.abort()


def proxy_to(url: str) -> Proxy:
    """A Proxy to the server of a URL."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return Proxy(parts.hostname, parts.port)


def through(proxy: Proxy, url: str) -> str:
    """The URL, going through the proxy."""
    parts = urlsplit(url)
    user = f"{parts.username}:{parts.password}@" if parts.username else ""
    return urlunsplit(parts._replace(netloc=f"{user}127.0.0.1:{proxy.port}"))
