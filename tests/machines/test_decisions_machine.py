"""Aggregates, deciders, decisions and transactions against a ledger in plain Python.

accounts   each a list of amounts, and what of it is hidden     once   what a request was answered
seats      who took it                                          rows   what transactions wrote beside

Snapshots are taken every other event, so that a wrong one is soon found; conflicts come from tasks that run together.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import apsw
import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ledger_model import Account, Ledger, Mirrored, Moved, NotEnough, SeatTaken, TakeSeat, decider, move

from trilogue import App, Conflict, Db, Decided, Query, Record, StreamClosed

T = TypeVar("T")
IDS = ("a", "b", "c")
amounts = st.integers(-5, 20)
ids = st.sampled_from(IDS)


class DecisionsMachine(RuleBasedStateMachine):
    """One App on a log in memory."""

    url = "memory://"

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.ledgers = {id_: Ledger() for id_ in IDS}
        self.seats: dict[int, str] = {}
        self.once: dict[tuple[str, str], Decided[Any]] = {}
        self.rows = 0
        self.app = App(self.url)

    @initialize()
    def start(self) -> None:
        @self.app.setup
        def tables(db: Db) -> None:
            db.execute("create table if not exists moved (id text, amount integer)")

        self.do(self.app.__aenter__())

    def do(self, doing: Awaitable[T]) -> T:
        return self.loop.run_until_complete(doing)

    def moved(self, id_: str, decided: Decided[Any]) -> None:
        """The ledger learns what was appended."""
        ledger = self.ledgers[id_]
        ledger.entries += [e.amount for e in decided.events]
        if decided.receipt is not None:
            last = decided.receipt.position
            ledger.positions += range(last - len(decided.events) + 1, last + 1)
        assert decided.version == len(ledger.entries)

    # ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(id_=ids, moves=st.lists(amounts, min_size=1, max_size=3), functional=st.booleans())
    def decide(self, id_: str, moves: list[int], functional: bool) -> None:
        ledger = self.ledgers[id_]

        def rule_(account: Account) -> int:
            return [account.move(amount) for amount in moves][-1]

        expected = list(ledger.entries)
        shown = ledger.at()
        wanted = moves[:1] if functional else moves
        is_enough = all(sum(shown) + sum(wanted[: n + 1]) >= 0 for n in range(len(wanted)))
        does = self.app.decide(decider, id_, move(moves[0])) if functional else self.app.decide(Account, id_, rule_)
        try:
            decided: Decided[Any] = self.do(does)
        except NotEnough:
            assert not is_enough
            return
        except StreamClosed:
            assert ledger.is_closed
            return
        assert is_enough
        assert not (ledger.is_closed and decided.events)
        appended = [e.amount for e in decided.events]
        assert appended == (wanted if wanted != [0] or not functional else [])
        self.moved(id_, decided)
        assert ledger.entries == expected + appended
        state = list(decided.state) if functional else decided.state.entries
        assert state == ledger.at()
        assert functional or decided.answer == sum(ledger.at())

    @rule(id_=ids, amount=st.integers(1, 9), tasks=st.integers(2, 5), same_once=st.booleans())
    def race(self, id_: str, amount: int, tasks: int, same_once: bool) -> None:
        """Tasks decide on one account together: all are done, one after the other; under the same `once`, one of them."""
        assume(sum(self.ledgers[id_].at()) + amount >= 0)  # where the beginning is hidden, the rest may be below 0
        once = f"race-{len(self.once)}" if same_once else None
        tries = (self.app.decide(Account, id_, lambda a: a.move(amount), once=once, attempts=100) for _ in range(tasks))
        results: list[Any] = self.do(_together(*tries))
        if self.ledgers[id_].is_closed:
            assert all(isinstance(result, StreamClosed) for result in results)
            return
        assert not any(isinstance(result, BaseException) for result in results), results
        new = [result for result in results if not result.repeated]
        assert len(new) == (1 if same_once else tasks)
        for decided in sorted(new, key=lambda result: result.version):
            self.moved(id_, decided)
        for decided in results:
            assert decided.events == (Moved(amount),)
        if once is not None:
            assert {(r.answer, r.version, r.receipt) for r in results} == {(new[0].answer, new[0].version, new[0].receipt)}
            self.once[id_, once] = new[0]

    @rule(id_=ids, once=st.sampled_from(["r1", "r2", "r3"]), amount=amounts)
    def decide_once(self, id_: str, once: str, amount: int) -> None:
        known, ledger = self.once.get((id_, once)), self.ledgers[id_]
        try:
            decided = self.do(self.app.decide(Account, id_, lambda a: a.move(amount), once=once))
        except (NotEnough, StreamClosed):
            assert known is None
            assert ledger.is_closed or sum(ledger.at()) + amount < 0
            return
        if known is None:
            assert not decided.repeated
            self.moved(id_, decided)
            self.once[id_, once] = decided
            return
        assert decided.repeated
        assert (decided.answer, decided.version) == (known.answer, known.version)
        if known.version >= ledger.first:
            assert (decided.events, decided.receipt) == (known.events, known.receipt)

    @rule(seat=st.integers(0, 3), guests=st.lists(st.sampled_from("xyz"), min_size=1, max_size=4, unique=True))
    def take_seats(self, seat: int, guests: list[str]) -> None:
        """Guests want one seat at the same time: one of those who have none yet gets it, if it is free."""
        results: list[Any] = self.do(_together(*(self.app.decide(TakeSeat(seat, guest)) for guest in guests)))
        seated = set(self.seats.values())
        assert [isinstance(result, NotEnough) for result in results] == [guest in seated for guest in guests]
        winners = [g for g, result in zip(guests, results, strict=True) if isinstance(result, Decided) and result.events]
        wants = [guest for guest in guests if guest not in seated]
        assert len(winners) == (1 if wants and seat not in self.seats else 0)
        self.seats.update(dict.fromkeys([seat], winners[0]) if winners else {})

    @rule(seat=st.integers(0, 3), guest=st.sampled_from("xyz"), once=st.sampled_from(["s1", "s2"]))
    def take_seat_once(self, seat: int, guest: str, once: str) -> None:
        known = self.once.get(("seats", once))
        try:
            decided = self.do(self.app.decide(TakeSeat(seat, guest), once=once))
        except NotEnough:
            assert known is None
            assert guest in self.seats.values()
            return
        assert decided.repeated == (known is not None)
        if known is None:
            assert decided.events == (() if seat in self.seats else (SeatTaken(seat, guest),))
            self.seats.setdefault(seat, guest)
            self.once["seats", once] = decided
        elif all(self.seats.get(taken.seat) == taken.guest for taken in known.events):  # none of it is trimmed
            assert (decided.events, decided.receipt) == (known.events, known.receipt)

    # ── saving, transactions ─────────────────────────────────────────────────────────────────────────────────────────

    @rule(id_=ids, amount=st.integers(1, 9))
    def the_slower_one_is_refused(self, id_: str, amount: int) -> None:
        assume(sum(self.ledgers[id_].at()) + amount >= 0)
        first, second = self.do(self.app.load(Account, id_)), self.do(self.app.load(Account, id_))
        for account in (first, second):
            account.move(amount)
        version = len(self.ledgers[id_].entries)
        if self.ledgers[id_].is_closed:
            with pytest.raises(StreamClosed):
                self.do(self.app.save(first))
            return
        self.moved(id_, self.do(self.app.save(first)))
        with pytest.raises(Conflict) as told:
            self.do(self.app.save(second))
        assert (told.value.stream, told.value.expected, told.value.actual) == (f"account-{id_}", version, version + 1)
        assert len(second.uncommitted) == 1

    @rule(amount=amounts, ways=st.permutations(IDS), ends=st.sampled_from(["well", "well", "beaten", "raises", "no table"]))
    def transfer(self, amount: int, ways: list[str], ends: str) -> None:
        try:
            self.do(self._transfer(amount, ways[0], ways[1], ends))
        except Exception as error:
            kinds = {"beaten": Conflict, "raises": LookupError, "no table": apsw.SQLError}
            closed = [id_ for id_ in ways[:2] if self.ledgers[id_].is_closed]
            expected: list[type[Exception]] = [NotEnough, *([StreamClosed] if closed else []), kinds.get(ends, NotEnough)]
            if not isinstance(error, tuple(expected)):
                raise
            return
        assert ends == "well"
        for id_, moved in zip(ways[:2], (-amount, amount), strict=True):
            self.ledgers[id_].entries.append(moved)
        ends_at = self.do(self.app.store.read(Query(reverse=True, limit=2)))
        for record in ends_at:
            self.ledgers[(record.stream or "").removeprefix("account-")].positions.append(record.position)
        self.rows += 2

    async def _transfer(self, amount: int, source: str, target: str, ends: str) -> None:
        async with self.app.transaction() as tx:
            one, two = await tx.load(Account, source), await tx.load(Account, target)
            assert await tx.load(Account, source) is one
            one.move(-amount)
            two.move(amount)
            tx.effect(lambda db: db.execute("insert into moved values (?, ?)", (source, -amount)))
            if ends == "no table":
                tx.effect(lambda db: db.execute("insert into nothing values (1)"))
            tx.effect(lambda db: db.execute("insert into moved values (?, ?)", (target, amount)))
            if ends == "raises":
                raise LookupError
            if ends == "beaten":
                self.moved(target, await self.app.decide(Account, target, lambda a: a.move(1)))

    # ── looking back ─────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(id_=ids, data=st.data(), model=st.sampled_from([Account, Mirrored, decider]))
    def look_back(self, id_: str, data: st.DataObject, model: Any) -> None:
        ledger = self.ledgers[id_]
        version = data.draw(st.integers(1, len(ledger.entries) + 1))
        loaded = self.do(self.app.load(model, id_, version=version))
        assert _entries(loaded) == ledger.at(version)
        if version <= len(ledger.positions):
            before = self.do(self.app.load(model, id_, position=ledger.positions[version - 1]))
            assert _entries(before) == ledger.at(version)

    @rule(id_=ids, amount=amounts, data=st.data())
    def what_if(self, id_: str, amount: int, data: st.DataObject) -> None:
        ledger = self.ledgers[id_]
        version = data.draw(st.none() | st.integers(1, len(ledger.entries) + 1))
        shown = ledger.at(version)
        try:
            decided = self.do(self.app.what_if(Account, id_, lambda a: a.move(amount), version=version))
        except NotEnough:
            assert sum(shown) + amount < 0
            return
        assert (decided.events, decided.state.entries, decided.receipt) == ((Moved(amount),), [*shown, amount], None)
        assert self.do(self.app.what_if(TakeSeat(0, "nobody"))).events == (() if 0 in self.seats else (SeatTaken(0, "nobody"),))

    @precondition(lambda self: any(ledger.entries for ledger in self.ledgers.values()))
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from([id_ for id_, ledger in self.ledgers.items() if ledger.entries]))
        before = data.draw(st.integers(1, len(self.ledgers[id_].entries)))
        self.do(self.app.truncate_stream(f"account-{id_}", before=before))
        self.ledgers[id_].first = max(self.ledgers[id_].first, before)

    @rule()
    def trim(self) -> None:
        """Only what is published goes, and what is hidden; the decision about a seat that was trimmed is open again."""
        self.do(self.app.store.trim(keep=1))
        left = self.do(self.app.store.read(Query(types=("machine.seat_taken",))))
        self.seats = {seat: guest for seat, guest in self.seats.items() if [f"seat:{seat}", f"guest:{guest}"] in map(_tags, left)}

    @rule(id_=ids, really=st.integers(0, 9))
    def close(self, id_: str, really: int) -> None:
        if really == 0:
            assert self.do(self.app.close_stream(f"account-{id_}", reason="enough")) == len(self.ledgers[id_].entries)
            self.ledgers[id_].is_closed = True

    # ── what always holds ────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def states_are_folds(self) -> None:
        for id_, ledger in self.ledgers.items():
            for model in (Account, Mirrored, decider):
                loaded = self.do(self.app.load(model, id_))  # type: ignore[call-overload]
                assert _entries(loaded) == ledger.at(), f"{id_} as {model} is {_entries(loaded)}"
                assert loaded.version == len(ledger.entries)
        assert self.do(self.app.db("select count(*) from moved")) == [(self.rows,)]

    @invariant()
    def nothing_else_is_on_the_log(self) -> None:
        for id_, ledger in self.ledgers.items():
            records = self.do(self.app.store.read(Query(stream=f"account-{id_}")))
            assert [record.version for record in records] == list(range(ledger.first if records else 1, len(ledger.entries) + 1))
        taken = self.do(self.app.store.read(Query(types=("machine.seat_taken",))))
        assert sorted(map(_tags, taken)) == sorted([f"seat:{seat}", f"guest:{guest}"] for seat, guest in self.seats.items())

    def teardown(self) -> None:
        try:
            self.do(self.app.__aexit__(None, None, None))
        finally:
            self.loop.close()


async def _together(*doing: Awaitable[Any]) -> list[Any]:
    return await asyncio.gather(*doing, return_exceptions=True)


def _tags(record: Record) -> list[str]:
    return list(record.tags)


def _entries(loaded: Any) -> list[int]:
    if isinstance(loaded, Mirrored):
        return [-amount for amount in loaded.entries]
    return list(loaded.state) if hasattr(loaded, "state") else loaded.entries


TestDecisions = DecisionsMachine.TestCase
TestDecisions.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))


def test_a_snapshot_of_what_was_hidden_meanwhile_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream is truncated between the fold and the moment the state would be kept."""

    async def proof() -> None:
        async with App("memory://") as app:
            account = Account("a")
            for amount in (1, 2, 3):
                account.move(amount)
            await app.save(account)
            transact = app.store.transact

            async def truncated_before(work: Any, **options: Any) -> Any:
                await app.truncate_stream("account-a", before=3)
                return await transact(work, **options)

            monkeypatch.setattr(app.store, "transact", truncated_before)
            await app.take_snapshot(Account, "a")
            monkeypatch.undo()
            assert (await app.load(Account, "a")).entries == [3]

    asyncio.run(proof())
