"""Processes without a log: what a class may say, and what an instance makes of an event."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from transfers import Deposit, Deposited, Prolonged, Refund, Refused, Requested, Transfer, Withdraw, Withdrawn

from trilogue import App, BadOption, Cancel, End, Process, Router, Timer, TwiceNamed, UnknownEvent, event, reacts, starts, timer
from trilogue.instances import process_subscription
from trilogue.process import Due, Reaction, react

# ── one event, one instance ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_story_without_a_log() -> None:
    first = react(Transfer, None, Requested("t1", 5))
    assert first == Reaction(Transfer("t1", 5, 1), (Withdraw("t1", 5),), (Timer("stuck", after="1h"),))
    second = react(Transfer, first.state, Withdrawn("t1"))
    assert second == Reaction(Transfer("t1", 5, 1, ["a"]), (Deposit("t1", 5),))
    assert react(Transfer, second.state, Deposited("t1")) == Reaction(None, ended=True)
    assert react(Transfer, second.state, Refused("t1", "closed")) == Reaction(None, (Refund("t1", 5, "closed"),), ended=True)
    late = react(Transfer, second.state, Due("stuck"))
    assert late.emits == (Refund("t1", 5, "stuck"),)
    assert late.timers == (Timer("stuck", after="2h"),)


def test_what_is_for_nobody_is_passed_over() -> None:
    assert react(Transfer, None, Withdrawn("t1")) == Reaction()
    assert react(Transfer, None, Withdrawn(None)) == Reaction()
    assert react(Transfer, None, Due("stuck")) == Reaction()
    state = Transfer("t1", 5)
    assert react(Transfer, state, Withdrawn(None)) == Reaction(state)


def test_an_event_that_starts_is_a_step_like_others_for_a_running_instance() -> None:
    again = react(Transfer, Transfer("t1", 5, 1, ["a"]), Requested("t1", 7)).state
    assert again == Transfer("t1", 7, 2, ["a"])


def test_the_state_that_is_handed_over_stays_as_it_is() -> None:
    state = Transfer("t1", 5, 1, ["a"])
    before = copy.deepcopy(state)
    react(Transfer, state, Withdrawn("t1"))
    assert state == before


def test_an_event_of_another_instance_is_refused() -> None:
    with pytest.raises(BadOption, match="is for instance 't2' of process 'transfer', the state is of 't1'"):
        react(Transfer, Transfer("t1"), Deposited("t2"))
    with pytest.raises(UnknownEvent, match=r"no step for Deposit\(.*it takes transfer.deposited.* timers \['stuck'\]"):
        react(Transfer, Transfer("t1"), Deposit("t1", 5))
    with pytest.raises(UnknownEvent, match="no step for Due"):
        react(Transfer, Transfer("t1"), Due("other"))


def saying(*said: object) -> type[Process]:
    """A process whose only step says this."""

    class Says(Process, key="transfer", name="says"):
        @starts
        def requested(self, e: Requested) -> Iterator[object]:
            yield from said

        @timer("a")
        def a(self) -> None: ...

        @timer("b")
        def b(self) -> None: ...

    return Says


def test_the_last_word_about_a_timer_counts() -> None:
    moved = react(saying(Timer("a", after="1m"), Timer("b", after="1m"), Timer("a", after="2m")), None, Requested("t", 1))
    assert moved.timers == (Timer("b", after="1m"), Timer("a", after="2m"))
    off = react(saying(Timer("a", after="1m"), Cancel("a")), None, Requested("t", 1))
    assert (off.timers, off.cancels) == ((), ("a",))
    on = react(saying(Cancel("a"), Timer("a", after="1m")), None, Requested("t", 1))
    assert (on.timers, on.cancels) == ((Timer("a", after="1m"),), ())


def test_an_instance_that_ends_sets_no_timer_but_says_what_it_said() -> None:
    ended = react(saying(Timer("a", after="1m"), End(), Deposit("t", 1)), None, Requested("t", 1))
    assert ended == Reaction(None, (Deposit("t", 1),), ended=True)


@pytest.mark.parametrize("said", ["text", 5, Requested, Timer])
def test_what_a_step_cannot_say(said: object) -> None:
    with pytest.raises(BadOption, match=r"expected events, Timer\(...\), Cancel\(...\) or End\(\)"):
        react(saying(said), None, Requested("t", 1))


def test_a_timer_without_a_step_is_refused_when_it_is_said() -> None:
    name = "aa"
    with pytest.raises(UnknownEvent, match="names timer 'aa', for which there is no step: did you mean 'a'"):
        react(saying(Timer(name, after="1m")), None, Requested("t", 1))
    with pytest.raises(UnknownEvent, match=r"write a step under @timer\('quite'\)"):
        react(saying(Cancel("quite")), None, Requested("t", 1))


def test_more_than_a_step_may_say() -> None:
    with pytest.raises(BadOption, match="it said 1001 things: expected at most 1,000"):
        react(saying(*[Deposit("t", 1)] * 1001), None, Requested("t", 1))


def test_when_a_timer_is_due() -> None:
    assert Timer("a", after="1m").due_us(5) == 60_000_005
    assert Timer("a", at=datetime(1970, 1, 1, 0, 1, tzinfo=UTC)).due_us(5) == 60_000_000
    with pytest.raises(BadOption, match="has no time zone"):
        Timer("a", at=datetime(2026, 1, 1))
    for options in ({}, {"after": "1m", "at": datetime(2026, 1, 1, tzinfo=UTC)}):
        with pytest.raises(BadOption, match="needs after= or at=, one of them"):
            Timer("a", **options)  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="'soon' is not understood"):
        Timer("a", after="soon")


# ── what a class may say ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_class_makes_a_group_of() -> None:
    sub = process_subscription(Transfer, app="bank")
    assert (sub.group.name, sub.group.app, sub.park, sub.kind) == ("process.transfer", "bank", True, "db")
    assert set(sub.group.patterns) == {
        "transfer.requested", "transfer.withdrawn", "transfer.deposited", "transfer.refused", "transfer.prolonged",
        "trilogue.timer.transfer",
    }  # fmt: skip

    class Untimed(Process, key="transfer", name="untimed"):
        @starts
        def requested(self, e: Requested) -> None: ...

    assert process_subscription(Untimed, group="mine").group.patterns == ("transfer.requested",)


def test_a_subclass_overrides_a_step() -> None:
    class Patient(Transfer, name="patient"):
        @reacts
        def withdrawn(self, e: Withdrawn) -> None: ...

    assert react(Patient, Patient("t1"), Withdrawn("t1")).emits == ()
    assert react(Patient, None, Requested("t1", 5)).emits == (Withdraw("t1", 5),)
    assert process_subscription(Patient).group.name == "process.patient"


def nameless() -> Any:
    class Nameless(Process, key="transfer"):
        @starts
        def requested(self, e: Requested) -> None: ...

    return Nameless


def keyless() -> Any:
    class Keyless(Process, name="x"):
        @starts
        def requested(self, e: Requested) -> None: ...

    return Keyless


def ill_named() -> Any:
    class IllNamed(Process, key="transfer", name="my process"):
        @starts
        def requested(self, e: Requested) -> None: ...

    return IllNamed


def startless() -> Any:
    class Startless(Process, key="transfer", name="x"):
        @reacts
        def requested(self, e: Requested) -> None: ...

    return Startless


def unannotated() -> Any:
    class Unannotated(Process, key="transfer", name="x"):
        @starts
        def requested(self, e) -> None: ...  # type: ignore[no-untyped-def]

    return Unannotated


def no_event() -> Any:
    class NoEvent(Process, key="transfer", name="x"):
        @starts
        def requested(self, e: str) -> None: ...

    return NoEvent


def twice() -> Any:
    class Twice(Process, key="transfer", name="x"):
        @starts
        def requested(self, e: Requested) -> None: ...

        @reacts
        def again(self, e: Requested | Deposited) -> None: ...

    return Twice


def timer_twice() -> Any:
    class TimerTwice(Process, key="transfer", name="x"):
        @starts
        def requested(self, e: Requested) -> None: ...

        @timer("a")
        def a(self) -> None: ...

        @timer("a")
        def b(self) -> None: ...

    return TimerTwice


def slip() -> Any:
    class Slip(Process, key="transfer", name="x"):
        @starts
        def requested(self, e: Requested) -> Timer:
            return Timer("stukc", after="1h")

        @timer("stuck")
        def hangs(self) -> None: ...

    return Slip


def other_slip() -> Any:
    class OtherSlip(Process, key="transfer", name="x"):
        @starts
        def requested(self, e: Requested) -> Iterator[Cancel]:
            yield Cancel(name="late")

    return OtherSlip


def wrong_key() -> Any:
    class WrongKey(Process, key="order", name="x"):
        @starts
        def requested(self, e: Requested) -> None: ...

    return WrongKey


def too_many() -> Any:
    class TooMany(Process, key="transfer", name="x"):
        @starts
        def requested(self, e: Requested, more: int) -> None: ...

    return TooMany


def timer_with_event() -> Any:
    class TimerWithEvent(Process, key="transfer", name="x"):
        @starts
        def requested(self, e: Requested) -> None: ...

        @timer("a")
        def a(self, e: Requested) -> None: ...

    return TimerWithEvent


def waits() -> Any:
    class Waits(Process, key="transfer", name="x"):
        @starts
        async def requested(self, e: Requested) -> None: ...

    return Waits


def without_default() -> Any:
    class WithoutDefault(Process, key="transfer", name="x"):
        amount: int

        @starts
        def requested(self, e: Requested) -> None: ...

    return WithoutDefault


def unstorable() -> Any:
    class Unstorable(Process, key="transfer", name="x"):
        what: Requested | Deposited | None = None

        @starts
        def requested(self, e: Requested) -> None: ...

    return Unstorable


def same_event() -> Any:
    @event("transfer.requested")
    @dataclass(frozen=True)
    class Other:
        transfer: str

    class SameEvent(Process, key="transfer", name="x"):
        @starts
        def requested(self, e: Requested | Other) -> None: ...

    return SameEvent


@pytest.mark.parametrize(
    ("declare", "sentence"),
    [
        (nameless, r"process nameless.<locals>.Nameless needs key= and name="),
        (keyless, r"Keyless needs key= and name="),
        (ill_named, r"process name 'my process' of .*: expected words of letters"),
        (startless, r"nothing starts process 'x': mark a step of .*Startless with @starts"),
        (unannotated, r"step .*Unannotated.requested takes None, which is no event: annotate its parameter"),
        (no_event, r"takes <class 'str'>, which is no event"),
        (twice, r"process 'x' has two steps for Requested: requested and again"),
        (timer_twice, r"process 'x' has two steps for timer 'a'"),
        (slip, r"step .*Slip.requested of process 'x' names timer 'stukc', for which there is no step: did you mean 'stuck'"),
        (other_slip, r"names timer 'late', for which there is no step: write a step under @timer\('late'\)"),
        (wrong_key, r"the key of process 'x', 'order' is no field of Requested, which has \['amount'"),
        (too_many, r"step .*requested takes other parameters: expected \(self, e: Withdrawn\)"),
        (timer_with_event, r"step .*a takes other parameters: expected \(self\)"),
        (waits, r"step .*requested is async: a step only decides"),
        (without_default, r"field 'amount' of process .* has no default: an instance begins with its id alone"),
        (unstorable, r"the state of process 'x', .*Unstorable, cannot be read from JSON"),
        (same_event, r"process 'x' takes two classes that are the same event"),
    ],
)
def test_a_slip_is_refused_at_the_start(declare: Callable[[], Any], sentence: str) -> None:
    app = App("memory://")
    app.process(declare())
    with pytest.raises((BadOption, UnknownEvent, TwiceNamed), match=sentence):
        _ = app.subscriptions


def test_what_is_refused_at_once() -> None:
    with pytest.raises(UnknownEvent, match="expected a class, as class Transfer"):
        App("memory://").process(Transfer("t1"))  # type: ignore[type-var, arg-type]
    with pytest.raises(BadOption, match="is marked twice"):
        starts(reacts(lambda self, e: None))
    with pytest.raises(BadOption, match="write it directly above a method"):
        starts(staticmethod(print))  # type: ignore[type-var]
    with pytest.raises(BadOption, match=r"has no name: write @timer\('stuck'\)"):
        timer(lambda self: None)  # type: ignore[arg-type]


def test_two_processes_of_one_name() -> None:
    class Other(Process, key="transfer", name="transfer"):
        @starts
        def requested(self, e: Requested) -> None: ...

    app = App("memory://")
    app.process(Transfer)
    app.process(Other, group="other")
    with pytest.raises(TwiceNamed, match=r"two processes have the name 'transfer', Transfer and .*Other"):
        _ = app.subscriptions


def test_a_router_brings_its_processes() -> None:
    router = Router()

    @router.process
    class Mine(Process, key="transfer", name="mine"):
        notes: list[str] = field(default_factory=list)

        @starts
        def requested(self, e: Requested) -> None: ...

    app = App("memory://")
    app.include(router)
    assert [sub.group.name for sub in app.subscriptions] == ["process.mine"]
    assert Mine("m").notes == []


def test_a_prolonged_transfer_moves_its_timer() -> None:
    assert react(Transfer, Transfer("t1"), Prolonged("t1", "3h")).timers == (Timer("stuck", after="3h"),)
    assert react(Transfer, Transfer("t1"), Prolonged("t1", "")).cancels == ("stuck",)
