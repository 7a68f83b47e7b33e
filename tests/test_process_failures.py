"""Processes when something goes wrong: steps that fail, states of before, replay, kill -9."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from common import all_of, run
from transfers import (
    GROUP,
    MOODS,
    Deposited,
    Moody,
    Prolonged,
    Requested,
    Transfer,
    Withdraw,
    Withdrawn,
    fire,
    handled,
    transfers,
    types,
    until,
)

from trilogue import (
    App,
    Later,
    OrphanedGroup,
    Process,
    ProcessInstance,
    Reject,
    Retry,
    SeekTo,
    Timer,
    Unsupported,
    reacts,
    starts,
    timer,
)


@pytest.fixture(autouse=True)
def _calm() -> None:
    MOODS.clear()


QUICK = {"retry": Retry(3, "1ms")}


def test_a_step_that_fails_is_tried_again_and_counts_once(url: str) -> None:
    async def main() -> None:
        MOODS["t1"] = [ValueError("no"), Later("1ms"), Later("1ms"), ValueError("no")]
        async with transfers(url, Moody, **QUICK).running() as app:
            [t1] = await handled(app, Requested("t1", 5))
            assert t1.state == {"steps": ["requested"]}
            assert (t1.events, await types(app), len(await app.store.timers())) == (1, ["requested", "withdraw"], 1)

    run(main())


def test_a_step_that_fails_for_good_waits_for_somebody(url: str) -> None:
    async def main() -> None:
        MOODS["t1"] = [ValueError("no money")] * 3
        async with transfers(url, Moody, **QUICK).running() as app:
            [t1, t2] = await handled(app, Requested("t1", 5), Requested("t2", 5), Deposited("t1"), Deposited("t2"))
            [letter] = await app.store.dead(None)
            assert letter.error == "step requested of transfer t1: ValueError: no money"
            assert letter.parked
            assert (t1.id, t1.events, t1.state) == ("t1", 0, {})
            assert t1.problems == (
                "position 1 (transfer.requested) is parked: step requested of transfer t1: ValueError: no money",
            )
            assert (t2.state, t2.problems) == ({"steps": ["requested", "deposited"]}, ())
            assert len(await app.store.timers()) == 1
            assert [each.id for each in await app.processes(stuck="1h")] == ["t1"]
            await app.store.redrive(GROUP)
            await app.wait_idle(timeout="20s")
            [t1, t2] = await app.processes()
            assert (t1.state, t1.problems) == ({"steps": ["requested", "deposited"]}, ())
            assert await app.processes(stuck="1h") == []

    run(main())


def test_what_follows_may_go_on_beside_a_dead_one(url: str) -> None:
    async def main() -> None:
        async with transfers(url, Moody, retry=Retry(1), on_dead="skip").running() as app:
            await handled(app, Requested("t1", 5))
            MOODS["t1"] = [ValueError("no")]
            [t1] = await handled(app, Requested("t1", 6), Deposited("t1"))
            assert t1.state["steps"] == ["requested", "deposited"]
            assert t1.problems == (
                "position 3 (transfer.requested) is a dead letter: step requested of transfer t1: ValueError: no",
            )

    run(main())


def test_giving_up_and_rejecting_still_count(url: str) -> None:
    async def main() -> None:
        MOODS.update(t1=[KeyError("a")], t2=[Reject("never")])
        async with transfers(url, Moody, retry=Retry(5, "1h", give_up=KeyError)).running() as app:
            await handled(app, Requested("t1", 5), Requested("t2", 5))
            errors = [letter.error for letter in await app.store.dead(None)]
            assert errors == ["step requested of transfer t1: KeyError: 'a'", "step requested of transfer t2: Reject: never"]

    run(main())


def test_a_step_that_is_tried_again_is_a_problem_meanwhile(url: str) -> None:
    async def main() -> None:
        MOODS["t1"] = [ValueError("no")]
        async with transfers(url, Moody, retry=Retry(2, "1h")).running() as app:
            await app.publish(Requested("t1", 5))
            await until(lambda: failing(app))
            [t1] = await app.processes(stuck="1h")
            [problem] = t1.problems
            again = "position 1 (transfer.requested) is tried again, attempt 2 being next"
            assert problem == f"{again}: step requested of transfer t1: ValueError: no"

    run(main())


async def failing(app: App) -> bool:
    return (await app.store.status()).groups[0].retrying == 1


@pytest.mark.parametrize("id", ["", "x" * 513])
def test_an_id_that_cannot_be_one(url: str, id: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            await app.publish(msgspec.structs.replace(app.envelope(Requested(id, 5)), key="k"))
            await app.wait_idle(timeout="20s")
            [letter] = await app.store.dead(None)
            assert f"names an instance of process 'transfer' with {len(id)} characters: expected 1 to 512" in letter.error

    run(main())


# ── the class changes ────────────────────────────────────────────────────────────────────────────────────────────────


class Changed(Process, key="transfer", name="transfer"):
    """A field has gone, one is new."""

    asked: int = 0
    currency: str = "EUR"

    @starts
    def requested(self, e: Requested) -> None: ...

    @reacts
    def withdrawn(self, e: Withdrawn) -> None:
        self.currency += "!"

    @timer("stuck")
    def hangs(self) -> None: ...


class Incompatible(Process, key="transfer", name="transfer"):
    amount: list[int] | None = None

    @starts
    def requested(self, e: Requested) -> None: ...

    @reacts
    def withdrawn(self, e: Withdrawn) -> None: ...


def test_a_state_of_before_is_read_with_the_fields_of_today(file_url: str) -> None:
    async def main() -> None:
        async with transfers(file_url).running() as app:
            await handled(app, Requested("t1", 5), Requested("t2", 6))
        async with transfers(file_url, Changed).running() as app:
            [t1, t2] = await handled(app, Withdrawn("t1"))
            assert t1.state == {"asked": 1, "currency": "EUR!"}
            assert t2.state["amount"] == 6
        async with transfers(file_url, Incompatible).running() as app:
            await handled(app, Withdrawn("t2", "b"))
            [letter] = await app.store.dead(None)
            assert "the state of transfer t2, as written at position 2, does not fit the fields of Incompatible" in letter.error
            assert letter.attempts == 1
        async with transfers(file_url).running() as app:
            await app.store.redrive(GROUP)
            await app.wait_idle(timeout="20s")
            assert (await app.processes())[1].state == {"amount": 6, "asked": 1, "seen": ["b"]}

    run(main())


# ── replay ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def without_due(instances: list[ProcessInstance]) -> list[Any]:
    return [
        (each.id, each.position, each.events, each.started_us, each.changed_us, each.state, list(each.timers))
        for each in instances
    ]


async def something(app: App) -> list[ProcessInstance]:
    """Instances that wait for timers set, moved and set by timers; one cancelled, one ended."""
    await handled(app, *[Requested(f"t{n}", n) for n in range(6)], Prolonged("t1", "3h"), Prolonged("t2", ""), Deposited("t3"))
    for each in await app.store.timers():
        if each.envelope.key == "t4":
            await app.publish(each.envelope)
    return await handled(app, Withdrawn("t5"), Requested("t5", 50), Deposited("t0"), Requested("t0", 1))


def test_a_replay_makes_the_same_states_and_nothing_else(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            before, timers, log = await something(app), await app.store.timers(), await all_of(app)
            assert [list(each.timers) for each in before] == [["stuck"], ["stuck"], [], ["stuck"], ["stuck"]]
            await app.replay(GROUP, SeekTo(end="beginning"))
            await app.wait_idle(timeout="20s")
            assert without_due(await app.processes()) == without_due(before)
            assert await app.store.timers() == timers
            assert await all_of(app) == log
            assert {each.envelope.key for each in timers} == {"t0", "t1", "t4", "t5"}
            await fire(app)  # what had been scheduled before the replay is what the states made by it wait for
            assert [each.state["seen"] for each in await app.processes()] == [
                ["stuck"], ["stuck"], [], ["stuck", "stuck"], ["a", "stuck"],
            ]  # fmt: skip

    run(main())


class Talkative(Transfer, name="transfer"):
    """Says what Transfer did not say when it handled these events."""

    @reacts
    def withdrawn(self, e: Withdrawn) -> Iterator[object]:
        yield Transfer.withdrawn(self, e)
        yield Withdraw(self.id, 1)
        yield Timer("more", after="1h")

    @timer("more")
    def more(self) -> None: ...


def test_what_is_said_for_the_first_time_in_a_replay_is_not_said(file_url: str) -> None:
    async def main() -> None:
        async with transfers(file_url).running() as app:
            await something(app)
            timers, log = await app.store.timers(), await all_of(app)
        async with transfers(file_url, Talkative).running() as app:
            await app.replay(GROUP, SeekTo(end="beginning"))
            await app.wait_idle(timeout="20s")
            assert list((await app.processes())[-1].timers) == ["stuck", "more"]
            assert (await app.store.timers(), await all_of(app)) == (timers, log)

    run(main())


def test_a_replay_with_emits_adds_what_is_missing_and_no_more(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            before, log = await something(app), await all_of(app)
            for each in await app.store.timers():
                await app.store.cancel(each.envelope.id)
            await app.replay(GROUP, SeekTo(end="beginning"), emits=True)
            await app.wait_idle(timeout="20s")
            assert without_due(await app.processes()) == without_due(before)
            assert await all_of(app) == log
            assert await app.store.dead(None) == []
            assert {each.envelope.key for each in await app.store.timers()} == {"t0", "t1", "t4", "t5"}

    run(main())


def test_a_replay_from_the_middle_would_lose_instances(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            before = await something(app)
            for to in (SeekTo(position=3), SeekTo(end="now"), SeekTo(time_us=1)):
                with pytest.raises(Unsupported, match=r"is a process: .* replay it from the beginning"):
                    await app.replay(GROUP, to)
            assert await app.processes() == before

    run(main())


def test_a_replay_beside_would_count_everything_twice(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            before = await something(app)
            with pytest.raises(Unsupported, match=r"runs process 'transfer', .* and without into="):
                await app.replay(GROUP, SeekTo(end="beginning"), into="second")
            assert [each.name for each in (await app.store.status()).groups] == [GROUP]
            assert await app.processes() == before

    run(main())


def test_a_replay_of_what_was_trimmed_would_lose_instances(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            before = await something(app)
            await app.trim(keep=3, force=True)
            with pytest.raises(Unsupported, match=r"transfer t0 began before position \d+, and .* would lose it"):
                await app.replay(GROUP, SeekTo(end="beginning"))
            assert await app.processes() == before

    run(main())


def test_a_record_of_a_stream_that_stays_does_not_make_the_log_whole(url: str) -> None:
    async def main() -> None:
        async with transfers(url).running() as app:
            await app.store.append([app.envelope(Withdrawn(None), stream="s")], expected=("s", 0))
            before = await something(app)
            await app.publish(Withdrawn(None))
            await app.wait_idle()
            await app.trim(keep=1, force=True)
            assert (await all_of(app))[0].stream == "s"  # older than all instances
            with pytest.raises(Unsupported, match=r"transfer t0 began before position \d+, and .* would lose it"):
                await app.replay(GROUP, SeekTo(end="beginning"))
            assert await app.processes() == before

    run(main())


# ── kill -9 ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PROGRAM = """
import asyncio, os, sys
sys.path.insert(0, {tests!r})
from transfers import *

class Mortal(Transfer, name="transfer"):
    @starts
    def requested(self, e: Requested):
        yield from Transfer.requested(self, e)
        if not os.path.exists("died"):
            open("died", "w").close()
            os._exit(9)

async def main():
    async with transfers("sqlite:///app.db", Mortal).running() as app:
        if not os.path.exists("died"):
            await app.publish(Requested("t1", 5))
            await asyncio.sleep(60)
        await app.wait_idle()
        await handled(app, Withdrawn("t1"))

asyncio.run(main())
"""


@pytest.mark.processes
def test_a_program_killed_in_a_step_has_done_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    for code in (9, 0):
        assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=60).returncode == code

    async def main() -> None:
        async with App(f"sqlite:///{tmp_path}/app.db") as app:
            [t1] = await app.processes()
            assert t1.state == {"amount": 5, "asked": 1, "seen": ["a"]}
            assert t1.events == 2
            assert await types(app) == ["requested", "withdraw", "withdrawn", "deposit"]
            assert len(await app.store.timers()) == 1

    run(main())


def test_another_group_is_refused_while_there_are_instances(file_url: str) -> None:
    """It would bring them again what they have counted already."""

    async def main() -> None:
        async with transfers(file_url).running() as app:
            await handled(app, Requested("t1", 5))
        with pytest.raises(OrphanedGroup, match=r"give it group='process.transfer' and key='transfer' again"):
            async with transfers(file_url, group="other", start="beginning"):
                pass
        async with transfers(file_url).running() as app:
            await handled(app, Withdrawn("t1"), Deposited("t1"))
            assert await app.processes() == []
        async with transfers(file_url, group="other"):
            pass

    run(main())
