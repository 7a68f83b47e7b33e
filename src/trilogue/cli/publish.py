"""`publish TYPE JSON`: one event from the command line, or one per line of standard input.

trilogue publish video.watched '{"user":"u1","video":"v9"}' --key u1
trilogue publish video.watched - --key u1 < watched.jsonl
"""

import asyncio
import codecs
import os
import stat
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

import msgspec
from cyclopts import Parameter

from trilogue.cli.log import DEFAULT_LOG, Log, opened, type_question
from trilogue.cli.output import note, progress, safe, say, stamp
from trilogue.durations import microseconds
from trilogue.errors import BadOption, LogError, TrilogueError
from trilogue.events import Envelope, Receipt, new_id, now_us
from trilogue.patterns import check_type
from trilogue.ports import Store

CHUNK_BYTES = 1 << 16
LINE_BYTES = 16 << 20
PAGE = 1_000

Json = Annotated[str, Parameter(allow_leading_hyphen=True, help="Its fields; `-`: one object per line of standard input.")]


async def publish(
    type: Annotated[str, Parameter(help="As video.watched.")],
    json: Json,
    /,
    *,
    key: Annotated[str | None, Parameter(help="Events of one key are handled one after the other.")] = None,
    id: Annotated[str | None, Parameter(help="Its identity: publishing the same again adds nothing.")] = None,
    delay: Annotated[str | None, Parameter(help="Put it on the log after this long, as 5m or 30d.")] = None,
    log: Log = DEFAULT_LOG,
) -> None:
    """Publish an event, or one per line of standard input."""
    check_type(type)
    delay_us = None if delay is None else microseconds(delay)
    if json == "-" and id is not None:
        raise BadOption("--id names one event and standard input may hold many: publish it as an argument")
    first = None if json == "-" else _envelope(type, json.encode("utf-8", "surrogateescape"), key, id, "the JSON")
    async with opened(log, create=True) as store:
        if question := await type_question(store, type):
            note(f"note: {type} is a new type on this log;{question}")
        if first is None:
            await _publish_lines(store, type, key, delay_us)
        else:
            await _publish_one(store, first, delay_us)


async def _publish_one(store: Store, envelope: Envelope, delay_us: int | None) -> None:
    what = f"{envelope.type}, id {safe(envelope.id)}"
    if delay_us is not None:
        due_us = now_us() + delay_us
        await store.schedule([envelope], due_us)
        say(f"scheduled {what}: enters the log at {stamp(due_us)} while any worker runs")
        return
    receipt = (await store.publish([envelope]))[0]
    if isinstance(receipt, LogError):
        raise receipt
    say(f"published {what}: {_place(receipt)}, survives {receipt.durability}")


def _place(receipt: Receipt) -> str:
    if receipt.topic is not None:
        return f"offset {receipt.position} of {receipt.topic}[{receipt.partition}]"
    return "in the queues" if receipt.position is None else f"position {receipt.position}"


async def _publish_lines(store: Store, type: str, key: str | None, delay_us: int | None) -> None:
    fd = _stdin()
    number = published = 0
    with progress("publishing", _size(fd), hidden=os.isatty(fd)) as advance:
        async for lines in _lines(fd):
            envelopes: list[Envelope] = []
            try:
                for line in lines:
                    number += 1
                    if text := _text(line, number):
                        envelopes.append(_envelope(type, text, key, None, f"line {number}"))
            except BadOption as error:
                published += await _store(store, envelopes, delay_us)
                raise TrilogueError(f"{error}; the {published:,} events before it are published") from error
            published += await _store(store, envelopes, delay_us)
            advance(sum(map(len, lines)))
    say(f"{'scheduled' if delay_us is not None else 'published'} {published:,} {type}")


def _text(line: bytes, number: int) -> bytes:
    return (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()


async def _store(store: Store, envelopes: Sequence[Envelope], delay_us: int | None) -> int:
    for start in range(0, len(envelopes), PAGE):
        page = envelopes[start : start + PAGE]
        await (store.append(page) if delay_us is None else store.schedule(page, now_us() + delay_us))
    return len(envelopes)


def _envelope(type: str, data: bytes, key: str | None, id: str | None, where: str) -> Envelope:
    return Envelope(id or new_id(), type, _checked(data, where), key, time_us=now_us())


def _checked(data: bytes, where: str) -> bytes:
    """The JSON without needless blanks; raises BadOption that names the place if it is not the fields of an event."""
    expected = 'expected one JSON object, as \'{"user":"u1"}\''
    try:
        data.decode()  # for the place: msgspec counts from the beginning of the text it stands in
        fields = msgspec.json.decode(data)
    except UnicodeDecodeError as error:
        raise BadOption(f"{where} is not UTF-8 (byte {error.start}): {expected}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadOption(f"{where} is not understood: {error}: {expected}") from error
    if not isinstance(fields, (dict, list)):
        raise BadOption(f"{where} is {_KINDS.get(type(fields), 'null')}: {expected}")
    return msgspec.json.format(data, indent=-1)


_KINDS: dict[type, str] = {str: "a text", bool: "a boolean", int: "a number", float: "a number"}


# ── standard input ───────────────────────────────────────────────────────────────────────────────────────────────────


def _stdin() -> int:
    try:
        return sys.stdin.fileno()
    except (AttributeError, ValueError, OSError) as error:
        raise BadOption("standard input is closed: give the JSON as an argument") from error


def _size(fd: int) -> int | None:
    found = os.fstat(fd)
    return found.st_size if stat.S_ISREG(found.st_mode) else None


async def _lines(fd: int) -> AsyncIterator[list[bytes]]:
    """Whole lines as they come, as many as are there; a slow pipe's line goes out at once."""
    rest = b""
    while chunk := await _read(fd):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > LINE_BYTES:
            raise TrilogueError(f"a line of the input exceeds {LINE_BYTES:,} bytes: expected one JSON object a line")
        yield lines
    if rest:
        yield [rest]


async def _read(fd: int) -> bytes:
    # Never a blocking read in a thread: Ctrl-C would have to wait for the next line.
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(fd, ready.set)
    except PermissionError:  # epoll takes no regular files: they are always ready
        return os.read(fd, CHUNK_BYTES)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
    return os.read(fd, CHUNK_BYTES)
