"""Publishing, delayed events and history: on memory and on a file."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from common import Watched, Won, all_of, run

from trilogue import (
    App,
    BadOption,
    BadPattern,
    Conflict,
    Context,
    Db,
    DecodeError,
    Envelope,
    Rejected,
    Retry,
    Unavailable,
    UnknownEvent,
    derived_id,
)

# ── publishing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_publish_and_read_back(url: str) -> None:
    async def main() -> None:
        app = App(url, name="video")
        async with app:
            receipt = await app.publish(Watched("u1"), time=datetime(2020, 1, 2, tzinfo=UTC))
            assert (receipt.position, receipt.due_us) == (1, None)
            assert receipt.durability == ("memory" if url == "memory://" else "os-crash")
            [record] = await all_of(app)
            assert (record.id, record.type, record.key, record.source) == (receipt.id, "video.watched", "u1", "video")
            assert record.time == datetime(2020, 1, 2, tzinfo=UTC)
            assert record.recorded > record.time

    run(main())


def test_the_same_id_again_adds_nothing_and_other_content_is_a_conflict(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            first = await app.publish(Watched("u1"), id="one")
            assert (await app.publish(Watched("u1"), id="one")).position == first.position
            with pytest.raises(Conflict, match=r"'one' is stored at position 1 .* with other content"):
                await app.publish(Watched("u2"), id="one")
            assert len(await all_of(app)) == 1

    run(main())


def test_publishes_of_one_moment_succeed_and_fail_alone(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            await app.publish(Watched("u0"), id="taken")
            outcomes = await asyncio.gather(
                *(app.publish(Watched(f"u{n}")) for n in range(50)),
                app.publish(Watched("other"), id="taken"),
                app.publish(Watched("u0"), id="taken"),
                app.publish(Watched("x" * 513)),
                app.publish(Watched("u"), id=""),
                app.publish(Watched("u"), id="\ud800"),
                app.publish(Envelope("odd-time", "a.b", b"{}", time_us=2**63)),
                app.publish(Envelope("odd-version", "a.b", b"{}", schema_version=2**63)),
                app.publish(Envelope("odd-key", "a.b", b"{}", key="\ud800")),
                app.publish(Envelope("odd-more", "a.b", b"{}", extensions={"a": object()})),  # type: ignore[dict-item]
                app.publish(Envelope("odd-data", "a.b", "text")),  # type: ignore[arg-type]
                *(app.publish(Watched(f"u{n}")) for n in range(50)),
                return_exceptions=True,
            )
            assert isinstance(outcomes[50], Conflict)
            assert not isinstance(outcomes[51], BaseException)
            assert [type(o).__name__ for o in outcomes[52:60]] == ["Rejected"] * 8
            assert not any(isinstance(o, BaseException) for o in [*outcomes[:50], *outcomes[60:]])
            assert len(await all_of(app)) == 101

    run(main())


def test_publish_many_is_in_order_and_repeatable(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            made = [app.envelope(Watched(f"u{n}"), id=derived_id(n, "w", n), time_us=n) for n in range(2_500)]
            receipts = await app.publish_many(made)
            assert [r.position for r in receipts] == list(range(1, 2_501))
            again = await app.publish_many(made)
            assert [r.position for r in again] == list(range(1, 2_501))
            mixed = await app.publish_many([made[7], Watched("new"), made[8]])
            positions = [r.position for r in mixed]
            assert (positions[0], positions[2]) == (8, 9)
            assert positions[1] is not None
            assert positions[1] > 2_500
            assert len(await all_of(app)) == 2_501
            assert await app.publish_many([]) == []

    run(main())


def test_publish_many_stores_a_thousand_whole_or_not_at_all(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            await app.publish(Watched("u"), id="taken")
            events = [Watched(f"u{n}") for n in range(1_100)]
            bad = app.envelope(Watched("other"), id="taken")
            with pytest.raises(Conflict):
                await app.publish_many([*events, bad])
            assert len(await all_of(app)) == 1_001

    run(main())


def test_limits_are_refused_with_the_mend(tmp_path: Path) -> None:
    async def main() -> None:
        app = App(f"sqlite:///{tmp_path}/a.db?payload_bytes=100")
        async with app:
            with pytest.raises(
                Rejected, match=r"has 1\d\d bytes, the limit is 100: store the content elsewhere .*payload_bytes="
            ):
                await app.publish(Watched("u", "v" * 100))
            with pytest.raises(Rejected, match="has 1"):
                await app.publish(Watched("u", "v" * 100), delay="1h")
            with pytest.raises(Rejected, match=r"key of event 'a.b' has 513 characters, the limit is 512"):
                await app.publish(Envelope("i", "a.b", b"{}", key="k" * 513))
            with pytest.raises(Rejected, match=r"id has 1 to 255 characters, .* has 256"):
                await app.publish(Watched("u"), id="i" * 256)
            assert (await app.publish(Watched("u"), id="i" * 255)).position == 1

    run(main())


def test_what_a_handler_emits_has_the_same_limits(tmp_path: Path) -> None:
    async def main() -> None:
        app = App(f"sqlite:///{tmp_path}/a.db?payload_bytes=100")

        @app.on(group="one", retry=Retry(1))
        async def one(e: Watched) -> Won:
            return Won(e.user, "b" * (200 if e.user == "bad" else 1))

        @app.on(group="db", retry=Retry(1))
        def with_db(e: Watched, db: Db, ctx: Context) -> None:
            ctx.publish(Won("k" * (600 if e.user == "bad" else 1), ""))

        @app.on(group="batch", batch=1, retry=Retry(1))
        def batch(es: list[Watched], db: Db) -> list[Won]:
            return [Won(es[0].user, "b" * (200 if es[0].user == "bad" else 1))]

        async with app.running():
            await app.publish_many([Watched("bad"), Watched("good")])
            await app.wait_idle()
            letters = await app.store.dead(None)
            assert sorted(letter.group for letter in letters) == ["batch", "db", "one"]
            assert {letter.record.key for letter in letters} == {"bad"}
            assert all("event 'badge.won' has " in letter.error for letter in letters)
            assert len(await all_of(app, types="badge.*")) == 3

    run(main())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"time": datetime(2020, 1, 1)}, "time=2020-01-01 00:00:00 has no time zone: write datetime"),
        ({"at": datetime(2020, 1, 1)}, "at=2020-01-01 00:00:00 has no time zone"),
        ({"delay": "1s", "at": datetime(2020, 1, 1, tzinfo=UTC)}, "delay= and at= say the same thing"),
        ({"delay": "soon"}, "'soon' is not understood"),
        ({"delay": -1}, "out of range"),
        ({"delay": "11y"}, "not understood"),
    ],
)
def test_wrong_times_are_refused(options: dict[str, Any], sentence: str) -> None:
    async def main() -> None:
        app = App("memory://")
        async with app:
            with pytest.raises(BadOption, match=sentence):
                await app.publish(Watched("u"), **options)
            assert await all_of(app) == []

    run(main())


def test_what_is_no_event_is_refused() -> None:
    async def main() -> None:
        app = App("memory://")
        async with app:
            for thing in ({"user": "u"}, None, Watched):
                with pytest.raises(UnknownEvent, match="is not an event: put @event"):
                    await app.publish(thing)

    run(main())


def test_an_envelope_keeps_its_id_and_time() -> None:
    async def main() -> None:
        app = App("memory://")
        async with app:
            made = app.envelope(Watched("u"), id="mine", time_us=7)
            for options in ({"id": "other"}, {"time": datetime(2020, 1, 1, tzinfo=UTC)}):
                with pytest.raises(BadOption, match="an Envelope has its id and time already"):
                    await app.publish(made, **options)  # type: ignore[arg-type]
            assert (await app.publish(made)).id == "mine"
            [record] = await all_of(app)
            assert (await app.publish(record)).position == record.position  # a Record is an Envelope too

    run(main())


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 256])
def test_a_name_that_can_be_no_source_is_refused(name: str) -> None:
    with pytest.raises(BadOption, match="expected 1 to 255 printable characters"):
        App("memory://", name=name)


def test_a_closed_app_says_how_it_is_opened(url: str) -> None:
    async def main() -> None:
        app = App(url)
        for call in (app.publish(Watched("u")), app.db("select 1"), app.publish_many([Watched("u")]), all_of(app)):
            with pytest.raises(Unavailable, match=r"is not open: use it inside `async with app:`"):
                await call
        async with app:
            await app.publish(Watched("u"))
        with pytest.raises(Unavailable, match="is not open"):
            await app.publish(Watched("u"))

    run(main())


def test_an_app_is_opened_inside_itself_and_again_later(file_url: str) -> None:
    async def main() -> None:
        app = App(file_url)
        for n in range(3):
            async with app:
                async with app:
                    await app.publish(Watched("u"))
                assert len(await all_of(app)) == n + 1

    run(main())


# ── delayed events ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_delayed_events_enter_when_due_and_can_be_cancelled(url: str) -> None:
    async def main() -> None:
        app, seen = App(url), []

        @app.on(group="g")
        async def handle(e: Watched) -> None:
            seen.append(e.user)

        async with app.running():
            soon = await app.publish(Watched("soon"), delay="20ms")
            past = await app.publish(Watched("past"), at=datetime.now(UTC) - timedelta(days=1))
            never = await app.publish(Watched("never"), delay="30d")
            far = await app.publish(Watched("far"), at=datetime(9999, 1, 1, tzinfo=UTC))
            assert soon.position is None
            assert soon.due_us is not None
            assert await app.cancel(never)
            assert not await app.cancel(never)
            with pytest.raises(BadOption, match="is delayed: it can be waited for once it is on the log"):
                await app.wait_for(soon, "g")
            while len(seen) < 2:
                await asyncio.sleep(0.01)
            assert not await app.cancel(soon)
            assert not await app.cancel(await app.publish(Watched("u")))
            assert sorted(seen[:2]) == ["past", "soon"]
            assert (await app.store.status()).timers == 1
            assert await app.cancel(far)
            [record] = [r for r in await all_of(app) if r.id == soon.id]
            assert app.decode(record) == Watched("soon")
            assert past.id != soon.id

    run(main())


def test_a_delayed_event_with_an_id_is_scheduled_once(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            for _ in range(2):
                await app.publish(Watched("u"), id="reminder", delay="1h")
            assert (await app.store.status()).timers == 1

    run(main())


def test_a_delayed_event_with_a_taken_id_and_other_content_is_a_conflict(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            await app.publish(Watched("u"), id="scheduled", delay="1h")
            await app.publish(Watched("u"), id="published")
            await app.publish(Watched("u"), id="published", delay="1h")  # it is there already
            for id_ in ("scheduled", "published"):
                with pytest.raises(Conflict, match="with other content"):
                    await app.publish(Watched("other"), id=id_, delay="1h")
            assert (await app.store.status()).timers == 1

    run(main())


def test_timers_survive_a_restart(file_url: str) -> None:
    async def main() -> None:
        first = App(file_url)
        async with first:
            await first.publish(Watched("u"), delay="10ms")
        app, seen = App(file_url), asyncio.Event()

        @app.on(group="g", start="beginning")
        async def handle(e: Watched) -> None:
            seen.set()

        async with app.running():
            await seen.wait()

    run(main())


# ── history ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_history_by_everything(url: str) -> None:
    async def main() -> None:
        app = App(url)
        async with app:
            for n in range(10):
                await app.publish(Watched(f"u{n % 2}"))
                await app.publish(Won(f"u{n % 2}", "b"))
            await app.store.append([app.envelope(Won("s", "1")), app.envelope(Won("s", "2"))], expected=("stream-1", 0))
            everything = await all_of(app)
            assert [r.position for r in everything] == list(range(1, 23))
            assert [r.position for r in await all_of(app, key="u1", types="video.*")] == [3, 7, 11, 15, 19]
            assert {r.type for r in await all_of(app, types="badge.won")} == {"badge.won"}
            assert len(await all_of(app, types=["badge.*", "video.#"])) == 22
            assert await all_of(app, types=[]) == []
            assert await all_of(app, types="nothing.of.that") == []
            assert [(r.stream, r.version) for r in await all_of(app, stream="stream-1")] == [("stream-1", 1), ("stream-1", 2)]
            assert [r.position for r in await all_of(app, after=20)] == [21, 22]
            assert await all_of(app, after=22) == []
            assert [r.position for r in await all_of(app, reverse=True, limit=3)] == [22, 21, 20]
            assert [r.position for r in await all_of(app, reverse=True, after=19)] == [22, 21, 20]
            assert [r.position for r in await all_of(app, limit=3)] == [1, 2, 3]
            assert await all_of(app, limit=0) == []
            middle = everything[10].recorded
            assert all(r.recorded >= middle for r in await all_of(app, since=middle))
            assert all(r.recorded < middle for r in await all_of(app, until=middle))
            assert len(await all_of(app, since=middle)) + len(await all_of(app, until=middle)) == 22
            assert await all_of(app, until=datetime(2000, 1, 1, tzinfo=UTC)) == []
            assert await all_of(app, since=datetime(9999, 1, 1, tzinfo=UTC)) == []

    run(main())


def test_history_goes_over_pages(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilogue.reading.HISTORY_PAGE", 7)

    async def main() -> None:
        app = App(url)
        async with app:
            await app.publish_many([Watched(f"u{n % 3}") for n in range(50)])
            assert [r.position for r in await all_of(app)] == list(range(1, 51))
            assert [r.position for r in await all_of(app, reverse=True)] == list(range(50, 0, -1))
            assert [r.position for r in await all_of(app, limit=20)] == list(range(1, 21))
            assert len(await all_of(app, key="u0")) == 17

    run(main())


def test_wrong_histories_are_refused() -> None:
    async def main() -> None:
        app = App("memory://")
        async with app:
            with pytest.raises(BadPattern):
                await all_of(app, types="video.[")
            with pytest.raises(BadPattern):
                await all_of(app, types=["video.*", ""])
            with pytest.raises(BadOption, match=r"since=.* has no time zone"):
                await all_of(app, since=datetime(2020, 1, 1))

    run(main())


def test_decode_knows_the_classes_of_the_handlers() -> None:
    async def main() -> None:
        app = App("memory://")

        @app.on
        async def handle(e: Watched) -> None: ...

        async with app:
            assert app.decode(app.envelope(Watched("u"))) == Watched("u")
            with pytest.raises(UnknownEvent, match=r"no handler of this app is annotated with a class for 'badge\.won'"):
                app.decode(app.envelope(Won("u", "b")))
            with pytest.raises(DecodeError):
                app.decode(Envelope("i", "video.watched", b"[]"))

    run(main())
