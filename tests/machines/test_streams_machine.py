"""Streams, tags, states and named timers on a file, through two stores in turns, against the plain model.

What happens in one transaction is a list of steps; the same list runs in transact() and inside a settlement, and some end badly.
"""

import asyncio
import copy
import shutil
import tempfile
from collections.abc import Awaitable, Sequence
from itertools import permutations
from typing import Any, TypeVar
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from streams_model import ANY, Entry, Model, Refused

from trilogue.conformance.tools import Bench, group
from trilogue.errors import Conflict
from trilogue.events import Envelope, InTransaction, Settlement
from trilogue.ports import Query, Store, Transaction
from trilogue.stores import open_store
from trilogue.stores import store as store_module
from trilogue.stores import transaction as transaction_module

T = TypeVar("T")
Step = tuple[Any, ...]
STREAMS = ("s", "t")
TAGS = ("x:1", "y:1", "y:2")
NAMES = ("n", "m")
JOBS = group("jobs", "job.#", has_effects=True)

some_tags = st.sampled_from([*((each,) for each in TAGS), *permutations(TAGS, 2)])
which_tags = st.just(()) | some_tags
off_by = st.sampled_from([0, 0, 0, 0, 1, -1, None])
append_step = st.tuples(st.just("append"), st.sampled_from([None, *STREAMS]), off_by, st.integers(0, 3), which_tags)
unless_step = st.tuples(st.just("unless"), some_tags, st.booleans())
state_step = st.tuples(st.just("state"), st.sampled_from("ab"), st.sampled_from([b"1", b"2", None]))
timer_step = st.tuples(st.just("timer"), st.sampled_from(NAMES), st.sampled_from([10, 1_000]))
cancel_step = st.tuples(st.just("cancel"), st.sampled_from(NAMES))
any_step = st.one_of(append_step, append_step, unless_step, state_step, timer_step, cancel_step, st.just(("row",)))
steps = st.lists(any_step, min_size=1, max_size=5)


class Ended(Exception):
    """What a transaction that ends badly raises."""


class StreamsMachine(RuleBasedStateMachine):
    """The first store works for a group and stays; the second one comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="trilogue-machine-")
        self.clock_us = 1_800_000_000_000_000
        self.patches = [mock.patch.object(each, "now_us", self.now) for each in (store_module, transaction_module)]
        for patch in self.patches:
            patch.start()
        self.loop = asyncio.new_event_loop()
        self.model = Model()
        self.count = 0
        self.repeatable: list[tuple[list[Envelope], tuple[str, int] | None, list[int]]] = []
        self.bench = Bench(lambda: open_store(f"sqlite:///{self.folder}/log.db?lease_s=3600"))
        self.stores = [self.do(self.bench.open(JOBS)), self.do(self.bench.open())]
        self.do(self.stores[0].transact(lambda tx: tx.execute("create table mine (n integer)")))

    def now(self) -> int:
        return self.clock_us

    def do(self, doing: Awaitable[T]) -> T:
        return self.loop.run_until_complete(doing)

    def envelopes(self, count: int, tags: tuple[str, ...] = (), kind: str = "thing.made") -> list[Envelope]:
        numbers = range(self.count, self.count + count)
        self.count += count
        return [Envelope(f"id-{n}", kind, str(n).encode(), None, time_us=1, tags=tags) for n in numbers]

    def expected(self, stream: str | None, by: int | None) -> int:
        known = self.model.streams.get(stream or "")
        return ANY if by is None or stream is None else max(0, (known.version if known else 0) + by)

    # ── one append ───────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(store=st.integers(0, 1), step=append_step)
    def append(self, store: int, step: Step) -> None:
        _, stream, by, count, tags = step
        envelopes, expected = self.envelopes(count, tags), self.expected(stream, by)
        condition = None if stream is None else (stream, expected)
        try:
            entries = self.model.append(_numbers(envelopes), tags, stream, expected)
        except Refused:
            assert isinstance(self.outcome(self.stores[store].append(envelopes, expected=condition)), Conflict)
            return
        positions = self.do(self.stores[store].append(envelopes, expected=condition))
        _placed(entries, positions)
        if envelopes and expected != ANY:
            self.repeatable.append((envelopes, condition, positions))

    def outcome(self, doing: Awaitable[Any]) -> Any:
        return self.do(_together(doing))[0]

    @precondition(lambda self: self.repeatable)
    @rule(store=st.integers(0, 1), data=st.data())
    def append_again(self, store: int, data: st.DataObject) -> None:
        """A writer that never got its answer: the positions are those of the first time, even of a stream closed since."""
        envelopes, condition, positions = data.draw(st.sampled_from(self.repeatable))
        if any(entry.gone for entry in self.model.records if entry.position in positions):
            return
        assert self.do(self.stores[store].append(envelopes, expected=condition)) == positions

    @rule(store=st.integers(0, 1), wanted=st.lists(append_step, min_size=2, max_size=4))
    def append_together(self, store: int, wanted: list[Step]) -> None:
        """Of one turn of the loop: what was stored could have been stored one after the other, what was refused had to be."""
        parts = [
            (self.envelopes(max(1, count), tags), tags, stream, self.expected(stream, by))
            for _, stream, by, count, tags in wanted
        ]
        doing = (self.stores[store].append(own, expected=s and (s, expected)) for own, _, s, expected in parts)
        results = self.do(_together(*doing))
        assert all(isinstance(result, (list, Conflict)) for result in results), results
        stored = [(result, part) for result, part in zip(results, parts, strict=True) if isinstance(result, list)]
        states = [copy.deepcopy(self.model)]
        for positions, (own, tags, stream, expected) in sorted(stored, key=lambda each: each[0][0]):
            _placed(self.model.append(_numbers(own), tags, stream, expected), positions)
            states.append(copy.deepcopy(self.model))
        for result, (own, tags, stream, expected) in zip(results, parts, strict=True):
            if isinstance(result, Conflict):
                assert any(_refuses(state, own, tags, stream, expected) for state in states), result

    # ── transactions ─────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(store=st.integers(0, 1), wanted=steps, ends_badly=st.sampled_from([False, False, True]))
    def transact(self, store: int, wanted: list[Step], ends_badly: bool) -> None:
        made = self.made(wanted)
        result = self.outcome(self.stores[store].transact(lambda tx: self.run(tx, made, ends_badly)))
        self.learn(made, result, ends_badly)

    @rule(wanted=st.lists(st.tuples(steps, st.booleans()), min_size=1, max_size=3))
    def settle(self, wanted: list[tuple[list[Step], bool]]) -> None:
        """Several effects in one settlement, each whole or not at all."""
        jobs = self.envelopes(len(wanted), kind="job.made")
        _placed(self.model.append(_numbers(jobs), (), None, ANY), self.do(self.stores[0].append(jobs)))
        lent = self.do(self.stores[0].claim("jobs", limit=10, wait_s=5))
        assert [delivery.record.id for delivery in lent] == [job.id for job in jobs]
        results: list[Any] = []
        planned: list[tuple[list[Step], bool]] = []
        answers: list[InTransaction] = []
        for delivery, (wants, ends_badly) in zip(lent, wanted, strict=True):

            def run(db: Any, delivery: Any = delivery, wants: Any = wants, ends_badly: bool = ends_badly) -> list[Settlement]:
                # The model has learnt what the effects before this one did, as the versions they expect must.
                made = self.made(wants)
                planned.append((made, ends_badly))
                try:
                    results.append(self.run(db, made, ends_badly))
                except Exception as error:
                    results.append(error)
                    raise
                finally:
                    self.learn(made, results[-1], ends_badly)
                return [Settlement(delivery)]

            answers.append(InTransaction([delivery], run, lambda error, d=delivery: [Settlement(d, "dead")]))  # type: ignore[misc]
        assert self.do(self.stores[0].settle("jobs", answers)) == []
        assert len(results) == len(wanted)

    def made(self, wanted: Sequence[Step]) -> list[Step]:
        """Steps with their envelopes, and with what they expect as things are; later steps know what earlier ones did."""
        made: list[Step] = []
        grown: dict[str | None, int] = {}
        for step in wanted:
            match step:
                case ("append", stream, by, count, tags):
                    expected = self.expected(stream, by)
                    expected = expected if expected == ANY else expected + grown.get(stream, 0)
                    grown[stream] = grown.get(stream, 0) + count
                    made.append(("append", self.envelopes(count, tags), tags, stream, expected))
                case ("unless", tags, is_new):
                    after = len(self.model.records) if is_new else 0
                    made.append(("unless", self.envelopes(1, tags), tags, after))
                case ("timer", name, after_us):
                    made.append(("timer", self.envelopes(1), name, self.clock_us + after_us))
                case _:
                    made.append(step)
        return made

    def run(self, tx: Transaction, made: Sequence[Step], ends_badly: bool) -> list[Any]:
        """The steps on the store; what each gave."""
        gave: list[Any] = []
        for step in made:
            match step:
                case ("append", envelopes, _, stream, expected):
                    gave.append(tx.append(envelopes, stream=stream, expected=expected))
                case ("unless", envelopes, tags, after):
                    at = self.model.records[after - 1].position if after else 0
                    gave.append(tx.append(envelopes, unless=[Query(tags=tags, after=at), Query(tags=("no:no",))]))
                case ("state", id_, body):
                    gave.append(tx.set_state("mine", id_, body))
                case ("timer", envelopes, name, due_us):
                    gave.append(tx.schedule(envelopes[0], due_us, name=name))
                case ("cancel", name):
                    gave.append(tx.cancel(name))
                case ("row",):
                    gave.append(tx.execute("insert into mine values (?)", (self.count,)))
        if ends_badly:
            raise Ended
        return gave

    def learn(self, made: Sequence[Step], result: Any, ends_badly: bool) -> None:
        """The model does the same, and must come to the same end."""
        after = copy.deepcopy(self.model)
        try:
            expected = [self.modelled(after, step) for step in made]
        except Refused:
            assert isinstance(result, Conflict), result
            return
        if ends_badly:
            assert isinstance(result, Ended), repr(result)
            return
        assert isinstance(result, list), repr(result)
        for step, entries, gave in zip(made, expected, result, strict=True):
            if step[0] in ("append", "unless"):
                _placed(entries, gave)
            elif step[0] == "cancel":
                assert entries == gave
        self.model = after

    def modelled(self, model: Model, step: Step) -> Any:
        match step:
            case ("append", envelopes, tags, stream, expected):
                return model.append(_numbers(envelopes), tags, stream, expected)
            case ("unless", envelopes, tags, after):
                model.refuse(tags, after)
                return model.append(_numbers(envelopes), tags, None, ANY)
            case ("state", id_, None):
                return model.states.pop(id_, None)
            case ("state", id_, body):
                model.states[id_] = body
            case ("timer", envelopes, name, due_us):
                model.timers[name] = (due_us, _numbers(envelopes)[0])
            case ("cancel", name):
                return model.timers.pop(name, None) is not None
            case ("row",):
                model.rows.append(self.count)
        return None

    # ── time, streams, faults ────────────────────────────────────────────────────────────────────────────────────────

    @rule(us=st.sampled_from([100, 5_000]), store=st.integers(0, 1))
    def wait(self, us: int, store: int) -> None:
        self.clock_us += us
        before = len(self.model.records)
        self.model.fire(self.clock_us)
        self.do(self.stores[store]._fire())  # type: ignore[attr-defined]
        new = self.model.records[before:]
        if new:
            newest = self.do(self.stores[store].read(Query(reverse=True, limit=len(new))))
            _placed(new, [record.position for record in reversed(newest)])

    @rule(store=st.integers(0, 1), stream=st.sampled_from(STREAMS), before=st.integers(0, 9))
    def truncate(self, store: int, stream: str, before: int) -> None:
        result = self.outcome(self.stores[store].truncate_stream(stream, before))
        try:
            self.model.truncate(stream, before)
        except Refused:
            assert isinstance(result, Conflict)
        else:
            assert result is None, result

    @rule(store=st.integers(0, 1), stream=st.sampled_from(STREAMS), really=st.integers(0, 7))
    def close(self, store: int, stream: str, really: int) -> None:
        known = self.model.streams.get(stream)
        if known is not None and (known.is_closed or really == 0):
            assert self.do(self.stores[store].close_stream(stream, "enough")) == known.version
            known.is_closed = True

    @rule(store=st.integers(0, 1), streams=st.booleans())
    def trim(self, store: int, streams: bool) -> None:
        self.do(self.stores[store].trim(keep=1, force=True, streams=streams))
        self.model.trim(streams=streams)

    @rule(is_crash=st.booleans())
    def another_store(self, is_crash: bool) -> None:
        self.do(self.bench.crash(self.stores[1]) if is_crash else self.bench.close(self.stores[1]))
        self.stores[1] = self.do(self.bench.open())

    # ── what always holds ────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def the_stores_agree(self) -> None:
        for store in self.stores:
            self.do(self.agrees(store))

    async def agrees(self, store: Store) -> None:
        model = self.model
        assert await _read(store) == model.shown()
        for stream in STREAMS:
            assert await _read(store, stream=stream) == model.shown(stream=stream)
            assert await store.stream_version(stream) == (model.streams[stream].version if stream in model.streams else 0)
        for tags in [(tag,) for tag in TAGS] + list(permutations(TAGS, 2)):
            assert await _read(store, tags=tags) == model.shown(tags=tags), tags
        assert {state.id: state.body for state in await store.states("mine")} == model.states
        timers = {timer.name: (timer.due_us, int(timer.envelope.data)) for timer in await store.timers()}
        assert timers == model.timers
        assert [n for (n,) in await store.query("select n from mine order by rowid")] == model.rows

    def teardown(self) -> None:
        try:
            self.do(self.bench.__aexit__(None, None, None))
        finally:
            self.loop.close()
            for patch in self.patches:
                patch.stop()
            shutil.rmtree(self.folder, ignore_errors=True)


async def _together(*doing: Awaitable[Any]) -> list[Any]:
    return await asyncio.gather(*doing, return_exceptions=True)


async def _read(store: Store, **query: Any) -> list[int]:
    return [int(record.data) for record in await store.read(Query(**query))]


def _numbers(envelopes: Sequence[Envelope]) -> list[int]:
    return [int(envelope.data) for envelope in envelopes]


def _placed(entries: Sequence[Entry], positions: Sequence[int]) -> None:
    for entry, position in zip(entries, positions, strict=True):
        entry.position = position


def _refuses(model: Model, own: Sequence[Envelope], tags: tuple[str, ...], stream: str | None, expected: int) -> bool:
    try:
        copy.deepcopy(model).append(_numbers(own), tags, stream, expected)
    except Refused:
        return True
    return False


TestStreams = StreamsMachine.TestCase
TestStreams.settings = settings(max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
