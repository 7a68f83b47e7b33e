"""Processes on a log: instances and timers."""

import asyncio
from typing import Any

import msgspec
from common import all_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from transfers import (
    GROUP,
    Deposited,
    Prolonged,
    Refund,
    Refused,
    Requested,
    Transfer,
    Withdrawn,
    fire,
    handled,
    said,
    transfers,
    types,
    until,
)

from trilogue import App, Process, starts
from trilogue.process import react

# ── instances ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_instance_begins_goes_on_and_ends(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            [t1] = await handled(app, Requested("t1", 5))
            assert (t1.process, t1.id, t1.position, t1.events, t1.problems) == ("transfer", "t1", 1, 1, ())
            assert (t1.state, list(t1.timers)) == ({"amount": 5, "asked": 1, "seen": []}, ["stuck"])
            [t1, t2] = await handled(app, Requested("t2", 7), Withdrawn("t1", "x"), Withdrawn("t2"), Withdrawn("t1", "y"))
            assert (t1.state["seen"], t2.state["seen"]) == (["x", "y"], ["a"])
            assert (t1.events, t2.events) == (3, 2)
            assert t1.started == (await all_of(app))[0].recorded < t1.changed
            [t2] = await handled(app, Deposited("t1"))
            assert t2.id == "t2"
            assert await handled(app, Refused("t2", "closed")) == []
            assert await app.store.timers() == []
            refund = (await all_of(app, types="transfer.refund"))[0]
            assert refund.data == msgspec.json.encode(Refund("t2", 7, "closed"))
            assert refund.correlation_id == refund.causation_id

    run(main())


def test_what_is_for_nobody_is_passed_over(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            assert await handled(app, Withdrawn("t1"), Withdrawn(None), Deposited("t9"), Prolonged("t1", "1h")) == []
            assert await types(app) == ["withdrawn", "withdrawn", "deposited", "prolonged"]
            [t1] = await handled(app, Requested("t1", 5), Withdrawn(None))
            assert t1.events == 1
            assert await handled(app, Deposited("t1"), Withdrawn("t1")) == []

    run(main())


class Withdrawal(Process, key="transfer", name="withdrawal"):
    @starts
    def withdrawn(self, e: Withdrawn) -> None: ...


def test_an_event_that_names_nobody_begins_nothing(url: str) -> None:
    async def main() -> None:
        async with transfers(url, Withdrawal).running() as app:
            assert [each.id for each in await handled(app, Withdrawn(None), Withdrawn("t1"))] == ["t1"]

    run(main())


def test_an_instance_that_ended_can_begin_anew(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            [t1] = await handled(app, Requested("t1", 5), Deposited("t1"), Requested("t1", 6), Requested("t1", 7))
            assert t1.state == {"amount": 7, "asked": 2, "seen": []}
            assert t1.events == 2
            assert len(await app.store.timers()) == 1

    run(main())


def test_the_instances_of_several_programs_on_one_file_are_one(file_url: str) -> None:
    """The events of one transfer have different keys, so that different workers hold them: no step may be lost."""

    async def main() -> None:
        async with transfers(file_url).running() as one, transfers(file_url).running() as other:
            await handled(one, *[Requested(f"t{n}", 5) for n in range(5)])

            async def publish(app: App, accounts: range) -> None:
                for account in accounts:
                    await app.publish_many([Withdrawn(f"t{n}", str(account)) for n in range(5)])

            await asyncio.gather(publish(one, range(40)), publish(other, range(40, 80)))
            await one.wait_idle(timeout="20s")
            for instance in await one.processes():
                assert instance.events == 81
                assert sorted(map(int, instance.state["seen"])) == list(range(80))
            assert len(await all_of(one, types="transfer.deposit")) == 400

    run(main())


STEPS = st.one_of(
    *[
        st.builds(cls, transfer=st.sampled_from(["t1", "t2", "t3"]), **rest)
        for cls, rest in (
            (Requested, {"amount": st.integers(1, 9)}),
            (Withdrawn, {"account": st.sampled_from(["a", "b"])}),
            (Prolonged, {"patience": st.sampled_from(["", "1h", "2h"])}),
            (Deposited, {}),
            (Refused, {"why": st.just("x")}),
        )
    ]
)


@settings(max_examples=25)
@given(events=st.lists(STEPS, max_size=25))
def test_the_log_makes_of_events_what_the_class_makes_of_them(events: list[Any]) -> None:
    states: dict[str, Process] = {}
    waiting: dict[str, set[str]] = {}
    said: dict[str, list[object]] = {"t1": [], "t2": [], "t3": []}
    for each in events:
        id = each.transfer
        reaction = react(Transfer, states.get(id), each)
        said[id] += reaction.emits
        if reaction.state is None:
            states.pop(id, None)
        else:
            states[id] = reaction.state
        timers = waiting.get(id, set()) if not reaction.ended else set()
        waiting[id] = timers - set(reaction.cancels) | {each.name for each in reaction.timers}

    async def main() -> None:
        # One key for all events of a transfer, or what is said twice may be said in another order.
        async with transfers("memory://").running() as app:
            await app.publish_many([msgspec.structs.replace(app.envelope(each), key=each.transfer) for each in events])
            await app.wait_idle(timeout="20s")
            found = {each.id: each for each in await app.processes()}
            assert {id: each.state for id, each in found.items()} == {
                id: {"amount": state.amount, "asked": state.asked, "seen": state.seen}  # type: ignore[attr-defined]
                for id, state in states.items()
            }
            assert {id: set(each.timers) for id, each in found.items()} == {id: waiting[id] for id in found}
            assert len(await app.store.timers()) == sum(map(len, waiting.values()))
            for id, emits in said.items():
                stored = [r.data for r in await all_of(app) if r.causation_id and r.key == id]
                assert stored == [msgspec.json.encode(each) for each in emits]

    run(main())


# ── timers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_timer_fires_by_itself_and_sets_the_next(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            await app.publish(Requested("t1", 5, "10ms"))
            await until(lambda: said(app, "refund"))
            await app.wait_idle(timeout="20s")
            [t1] = await app.processes()
            assert t1.state["seen"] == ["stuck"]
            record = (await all_of(app, types="trilogue.timer.transfer"))[0]
            assert (record.key, record.data) == ("t1", b'{"process":"transfer","id":"t1","timer":"stuck"}')
            assert record.causation_id == (await all_of(app))[0].id
            [pending] = await app.store.timers()
            assert pending.due_us == t1.timers["stuck"] == pending.envelope.time_us
            await fire(app)
            [t1] = await app.processes()
            assert (t1.state["seen"], list(t1.timers)) == (["stuck", "stuck"], ["stuck"])
            await fire(app)
            [t1] = await app.processes()
            assert (t1.state["seen"], list(t1.timers)) == (["stuck"] * 3, [])

    run(main())


def test_a_timer_is_moved_and_cancelled(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            [t1] = await handled(app, Requested("t1", 5, "1h"))
            [first] = await app.store.timers()
            [moved] = await handled(app, Prolonged("t1", "3h"))
            [second] = await app.store.timers()
            assert second.envelope.id != first.envelope.id
            assert moved.timers["stuck"] - t1.timers["stuck"] > 3_600_000_000
            assert second.due_us == moved.timers["stuck"]
            [calm] = await handled(app, Prolonged("t1", ""))
            assert calm.timers == {}
            assert await app.store.timers() == []
            [calm] = await handled(app, Prolonged("t1", ""), Prolonged("t1", "1h"))
            assert list(calm.timers) == ["stuck"]
            assert await types(app) == ["requested", "withdraw", *["prolonged"] * 4]

    run(main())


def test_a_timer_that_was_on_its_way_already_is_passed_over(url: str) -> None:
    """Whatever came first on the log: moved, cancelled, ended, and begun anew."""

    async def main() -> None:
        async with transfers(url).running() as app:
            for n, after in enumerate(
                ([Prolonged("t", "3h")], [Prolonged("t", "")], [Deposited("t")], [Deposited("t"), Requested("t", 1)])
            ):
                events = [msgspec.structs.replace(app.envelope(each), key=f"t{n}") for each in after]
                events = [msgspec.structs.replace(e, data=e.data.replace(b'"t"', f'"t{n}"'.encode())) for e in events]
                await handled(app, Requested(f"t{n}", 5))
                stale = [each.envelope for each in await app.store.timers() if each.envelope.key == f"t{n}"]
                await app.publish_many([*events, *stale])
                await app.wait_idle(timeout="20s")
            assert len(await all_of(app, types="trilogue.timer.transfer")) == 4
            assert not await said(app, "refund")
            moved, cancelled, anew = await app.processes()
            assert [list(each.timers) for each in (moved, cancelled, anew)] == [["stuck"], [], ["stuck"]]
            assert [each.events for each in (moved, cancelled, anew)] == [2, 2, 1]
            await fire(app)
            assert len(await all_of(app, types="transfer.refund")) == 2
            assert await app.store.dead(None) == []

    run(main())


def test_a_timer_that_is_none_of_ours_is_a_dead_letter(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            await handled(app, Requested("t1", 5))
            envelope = (await app.store.timers())[0].envelope
            await app.publish(msgspec.structs.replace(envelope, id="mine", data=b"{}"))
            await app.publish(msgspec.structs.replace(envelope, id="other", key="t2"))
            await app.wait_idle(timeout="20s")
            [letter] = await app.store.dead(GROUP)
            assert "not a timer of process 'transfer'" in letter.error
            assert not await said(app, "refund")

    run(main())
