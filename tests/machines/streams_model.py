"""The plain model of what transactions do to a log: lists, dictionaries and what follows from the promises.

records  every record with its number, stream, version and tags; `gone`: trimmed      streams  numbers, first shown, closed
states, timers, rows: what is kept beside
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

ANY = -1


class Refused(Exception):
    """The store has to raise a Conflict."""


@dataclass
class Entry:
    number: int
    tags: tuple[str, ...] = ()
    stream: str | None = None
    version: int | None = None
    position: int = 0
    gone: bool = False


@dataclass
class Stream:
    version: int = 0
    first: int = 1
    is_closed: bool = False


@dataclass
class Model:
    records: list[Entry] = field(default_factory=list)
    streams: dict[str, Stream] = field(default_factory=dict)
    states: dict[str, bytes] = field(default_factory=dict)
    timers: dict[str, tuple[int, int]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)

    def append(self, numbers: Sequence[int], tags: tuple[str, ...], name: str | None, expected: int) -> list[Entry]:
        entries = [Entry(number, tags, name) for number in numbers]
        if name is not None:
            stream = self.streams.setdefault(name, Stream())
            if stream.is_closed or expected not in (ANY, stream.version):
                raise Refused
            for entry in entries:
                stream.version += 1
                entry.version = stream.version
        self.records += entries
        return entries

    def refuse(self, tags: Sequence[str], after: int) -> None:
        """after: how many records had been read."""
        if any(set(tags) <= set(entry.tags) and not entry.gone for entry in self.records[after:]):
            raise Refused

    def shown(self, *, tags: Sequence[str] = (), stream: str | None = None) -> list[int]:
        first = self.streams[stream].first if stream in self.streams else 1
        return [
            entry.number
            for entry in self.records
            if not entry.gone
            and set(tags) <= set(entry.tags)
            and (stream is None or (entry.stream == stream and (entry.version or 0) >= first))
        ]

    def truncate(self, name: str, before: int) -> None:
        stream = self.streams.get(name, Stream())
        if not 1 <= before <= stream.version:
            raise Refused
        stream.first = max(stream.first, before)

    def trim(self, *, streams: bool) -> None:
        for entry in self.records[:-1]:
            if entry.tags and not streams:
                continue
            if entry.stream is None:
                entry.gone = True
                continue
            stream = self.streams[entry.stream]
            is_hidden = (entry.version or 0) < stream.first
            entry.gone |= entry.version != stream.version and (streams or is_hidden)

    def fire(self, now_us: int) -> None:
        due = sorted((due_us, f"id-{number}", number, name) for name, (due_us, number) in self.timers.items() if due_us <= now_us)
        for _, _, number, name in due:
            del self.timers[name]
            self.append([number], (), None, ANY)
