"""A broker alone: what it does, in what order, and what it refuses."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from common import QUICK, Watched, Won, run
from fake_broker import FakeBroker, FakeServer

from trilogue import App, Context, Db, Effect, Later, Retry
from trilogue.brokers import direct
from trilogue.brokers.direct import Direct
from trilogue.errors import Rejected, Unavailable, UnknownEvent, Unsupported
from trilogue.events import Delivery, Envelope, Group, Receipt, Settlement, new_id
from trilogue.features import who_can
from trilogue.ports import DeadLetter, Feature, Query, SeekTo


class Broker(FakeBroker):
    """With dead letters; without positions what is given back comes again alone, and is counted.

    trouble_dead: the next dead letters that are not confirmed. log: what was done, in order.
    """

    def __init__(self, server: FakeServer, *, counts: bool = True) -> None:
        super().__init__(server)
        self.features |= {Feature.DEAD}
        self.counts = counts
        self.buried: list[DeadLetter] = []
        self.trouble_dead = 0
        self.done: list[str] = []
        self._back: list[Delivery] = []

    async def publish(self, envelopes: Sequence[Envelope]) -> list[Any]:
        outcomes: list[Any] = list(await super().publish([each for each in envelopes if each.type != "too.large"]))
        for each, outcome in zip(envelopes, outcomes, strict=False):
            self.done.append(f"{'published' if isinstance(outcome, Receipt) else 'lost'} {each.type} {each.data.decode()}")
        found = iter(outcomes)
        return [Rejected("too large") if each.type == "too.large" else next(found) for each in envelopes]

    async def acknowledge(self, group: str, deliveries: Sequence[Delivery]) -> list[Delivery]:
        self.done += [f"acknowledged {each.record.data.decode()}" for each in deliveries]
        return await super().acknowledge(group, deliveries)

    async def dead_letter(self, group: str, delivery: Delivery, *, attempts: int, error: str, traceback: str) -> None:
        if self.trouble_dead:
            self.trouble_dead -= 1
            raise Unavailable("the broker is not reached")
        self.buried.append(DeadLetter(group, delivery.record, attempts, error, traceback, 0, False))
        self.done.append("buried")
        await super().acknowledge(group, [delivery])

    async def dead(self, group: str | None, *, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        return self.buried[:limit]

    async def release(self, group: str, deliveries: Sequence[Delivery]) -> None:
        if self.server.positions:
            await super().release(group, deliveries)
            return
        again = [Delivery(each.record, group, each.lease, each.attempt + 1 if self.counts else 2) for each in deliveries]
        self._back += again
        self.server.changed()

    def _next(self, group: str, limit: int) -> list[Delivery]:
        back, self._back = self._back, []
        return back + super()._next(group, limit)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "BACKOFF_S", 0.01)


def made(*, positions: bool = True, **options: Any) -> tuple[App, Broker]:
    """An App on a broker alone: with positions as Kafka's, without as RabbitMQ's."""
    broker = Broker(FakeServer(positions=positions), **options)
    app = App("memory://")
    app.store = Direct(broker)
    return app, broker


async def until_idle(app: App) -> None:
    await app.wait_idle(timeout=20)


# ── trying again ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_failure_is_tried_again_in_place_and_its_key_waits() -> None:
    app, broker = made()
    handled: list[tuple[str, str, int]] = []

    @app.on(group="g", retry=Retry(3, "30ms"))
    async def handle(e: Watched, ctx: Context) -> None:
        handled.append((e.user, e.video, ctx.attempt))
        if e == Watched("bad", "1") and ctx.attempt < 3:
            raise ValueError("no")

    async def main() -> None:
        async with app.running():
            await app.publish_many([Watched("bad", "1"), Watched("bad", "2"), *(Watched(f"u{n}") for n in range(20))])
            await app.publish_many([Watched("bad", "3")])
            await until_idle(app)
            status = (await app.store.status()).groups[0]
            assert (status.done, status.failed, status.lag, status.dead) == (23, 2, 0, 0)

    run(main())
    bad = [(video, attempt) for user, video, attempt in handled if user == "bad"]
    assert bad == [("1", 1), ("1", 2), ("1", 3), ("2", 1), ("3", 1)]
    assert handled.index(("u19", "v", 1)) < handled.index(("bad", "1", 2))
    assert not broker.buried


def test_after_the_last_attempt_it_is_a_dead_letter_and_its_key_goes_on() -> None:
    app, broker = made()
    broker.trouble_dead = 2
    handled: list[str] = []

    @app.on(group="g", retry=QUICK)
    async def handle(e: Watched) -> None:
        handled.append(e.video)
        if e.video == "1":
            raise ValueError("no")

    async def main() -> None:
        async with app.running():
            await app.publish_many([Watched("u", "1"), Watched("u", "2")])
            await until_idle(app)

    run(main())
    assert handled == ["1", "1", "1", "2"]
    [letter] = broker.buried
    assert (letter.attempts, letter.error) == (3, "ValueError: no")
    assert [each for each in broker.done if each.startswith("ack")] == ['acknowledged {"user":"u","video":"2"}']


@pytest.mark.parametrize("counts", [True, False])
def test_a_queue_gets_a_failure_back_and_counts(counts: bool) -> None:
    app, broker = made(positions=False, counts=counts)  # False: as a classic queue, which tells no numbers
    attempts: list[int] = []

    @app.on(group="g", order=None, retry=Retry(4, "1ms"))
    async def handle(e: Watched, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise ValueError("no")

    async def main() -> None:
        async with app.running():
            await app.publish(Watched("u"))
            await until_idle(app)

    run(main())
    assert attempts == [1, 2, 3, 4]
    assert [letter.attempts for letter in broker.buried] == [4]


def test_later_is_kept_in_hand_if_it_is_soon_and_refused_if_not() -> None:
    app, broker = made()
    attempts: list[int] = []

    @app.on(group="g")
    async def handle(e: Watched, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise Later("1h" if len(attempts) == 3 else "1ms")

    async def main() -> None:
        async with app.running():
            await app.publish(Watched("u"))
            await until_idle(app)

    run(main())
    assert attempts == [1, 1, 1]
    assert "is to handle a record again after 1h, which this log cannot do" in broker.buried[0].error


def test_a_dead_letter_that_is_never_confirmed_stays_with_its_lane() -> None:
    app, broker = made()
    broker.trouble_dead = 7
    attempts: list[int] = []

    @app.on(group="g", retry=Retry(1))
    async def handle(e: Watched, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise ValueError("no")

    async def main() -> None:
        async with app.running():
            await app.publish(Watched("u"))
            await until_idle(app)

    run(main())
    assert attempts == [1, 1]  # after five attempts to bury it it is handled again
    assert [letter.attempts for letter in broker.buried] == [1]


# ── what is emitted ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_emits_are_confirmed_before_the_record_is_acknowledged() -> None:
    app, broker = made()
    handled: list[str] = []

    @app.on(group="g")
    async def handle(e: Watched) -> Won:
        handled.append(e.video)
        return Won(e.user, e.video)

    async def main() -> None:
        async with app.running():
            broker.server.trouble[:] = ["", "", "", "unknown", "", "unavailable"]
            await app.publish_many([Watched("u", str(n)) for n in range(3)])
            await until_idle(app)

    run(main())
    assert any(each.startswith("lost") for each in broker.done)
    for n in range(3):
        confirmed = broker.done.index(f'published badge.won {{"user":"u","badge":"{n}"}}')
        assert confirmed < broker.done.index(f'acknowledged {{"user":"u","video":"{n}"}}')
    emitted = [each for log in broker.server.log for each in log if each.type == "badge.won"]
    assert {each.data for each in emitted} == {b'{"user":"u","badge":"%d"}' % n for n in range(3)}
    # A repetition has the ids of before; the last time each is handled, all are in order.
    assert len({each.id for each in emitted}) == 3
    last = {video: n for n, video in enumerate(handled)}
    assert last["0"] < last["1"] < last["2"]


def test_what_cannot_be_emitted_is_a_dead_letter() -> None:
    app, broker = made()

    @app.on(group="g")
    async def handle(e: Watched) -> Any:
        return Effect(lambda db: None) if e.video == "effect" else Won("x" * 600, "b")

    async def main() -> None:
        async with app.running():
            await app.publish_many([Watched("a", "effect"), Watched("b", "emit")])
            await until_idle(app)

    run(main())
    errors = {letter.record.key: letter.error for letter in broker.buried}
    assert "a handler returned an Effect, which this log cannot do" in errors["a"]
    assert "what its handler emits cannot be published" in errors["b"]


# ── leases, cancellation, leaving ────────────────────────────────────────────────────────────────────────────────────


def envelopes(count: int, key: str = "k") -> list[Envelope]:
    return [Envelope(new_id(), "a.b", str(n).encode(), key, time_us=1) for n in range(count)]


async def opened(broker: Broker, *groups: Group) -> Direct:
    store = Direct(broker)
    await store.open()
    await store.bind(groups or [Group("g", ("#",), start="beginning")])
    return store


def numbers(deliveries: Sequence[Delivery]) -> list[int]:
    return [int(each.record.data) for each in deliveries]


def test_what_moved_away_is_lost_and_comes_again_in_order() -> None:
    async def main() -> None:
        broker = Broker(FakeServer(lanes=1))
        store = await opened(broker)
        await store.append(envelopes(4))
        out = await store.claim("g", limit=2, wait_s=5)
        assert numbers(out) == [0, 1]
        assert await store.settle("g", [Settlement(out[0], "retry", after_us=10_000_000), Settlement(out[1], "release")]) == []
        await broker.reconnect()
        again = await store.claim("g", limit=10, wait_s=5)
        assert numbers(again) == [0, 1, 2, 3]
        assert {each.attempt for each in again} == {1}
        await broker.reconnect()
        assert await store.settle("g", [Settlement(each) for each in again]) == again
        assert numbers(await store.claim("g", limit=10, wait_s=5)) == [0, 1, 2, 3]
        await store.close()

    run(main())


def test_a_cancelled_claim_loses_nothing() -> None:
    async def main() -> None:
        store = await opened(Broker(FakeServer()))
        for n in range(30):
            claiming = asyncio.create_task(store.claim("g", limit=10, wait_s=5))
            await asyncio.sleep(0)
            publishing = asyncio.create_task(store.append(envelopes(1, f"k{n}")))
            for _ in range(n % 7):
                await asyncio.sleep(0)
            claiming.cancel()
            [taken, _] = await asyncio.gather(claiming, publishing, return_exceptions=True)
            out = [] if isinstance(taken, BaseException) else taken
            while not out:
                out = await store.claim("g", limit=10, wait_s=5)
            await store.settle("g", [Settlement(each) for each in out])
        assert await store.idle(["g"])
        await store.close()

    run(main())


def test_leaving_hands_back_what_is_in_hand_and_what_waits() -> None:
    async def main() -> None:
        broker = Broker(FakeServer(lanes=1))
        store = await opened(broker)
        await store.append(envelopes(5))
        out = await store.claim("g", limit=2, wait_s=5)
        await store.settle("g", [Settlement(out[0]), Settlement(out[1], "retry", after_us=20_000_000)])
        assert not await store.idle(["g"])
        await store.close()
        other = await opened(broker)
        assert numbers(await other.claim("g", limit=10, wait_s=5)) == [1, 2, 3, 4]
        await other.close()

    run(main())


def test_what_waits_for_its_key_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilogue.brokers.keyed.WAITING_RECORDS", 50)
    monkeypatch.setattr(direct, "RECEIVE_RECORDS", 10)

    async def main() -> None:
        broker = Broker(FakeServer(lanes=1))
        store = await opened(broker)
        await store.append(envelopes(500))
        out = await store.claim("g", limit=1, wait_s=5)
        for _ in range(200):
            await asyncio.sleep(0)
        assert store._readings["g"].gate.waiting <= 60
        handled = numbers(out)
        while len(handled) < 500:
            await store.settle("g", [Settlement(each) for each in out])
            out = await store.claim("g", limit=100, wait_s=5)
            handled += numbers(out)
        assert handled == list(range(500))
        await store.close()

    run(main())


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────

VERBS: dict[str, tuple[Any, Feature]] = {
    "read": (lambda s: s.read(Query()), Feature.HISTORY),
    "trim": (lambda s: s.trim(keep=1), Feature.HISTORY),
    "handled": (lambda s: s.handled("g", 1), Feature.HISTORY),
    "finished_to": (lambda s: s.finished_to("g"), Feature.HISTORY),
    "kinds": (lambda s: s.kinds(), Feature.HISTORY),
    "held": (lambda s: s.held(), Feature.RETRY),
    "append": (lambda s: s.append(envelopes(1), expected=("s", 0)), Feature.EXPECTED),
    "stream_version": (lambda s: s.stream_version("s"), Feature.EXPECTED),
    "close_stream": (lambda s: s.close_stream("s", "why"), Feature.EXPECTED),
    "truncate_stream": (lambda s: s.truncate_stream("s", 1), Feature.EXPECTED),
    "schedule": (lambda s: s.schedule(envelopes(1), 0), Feature.TIMERS),
    "cancel": (lambda s: s.cancel("x"), Feature.TIMERS),
    "timers": (lambda s: s.timers(), Feature.TIMERS),
    "pause": (lambda s: s.pause("g"), Feature.PAUSE),
    "resume": (lambda s: s.resume("g"), Feature.PAUSE),
    "transact": (lambda s: s.transact(lambda tx: None), Feature.EFFECTS),
    "query": (lambda s: s.query("select 1"), Feature.EFFECTS),
    "state": (lambda s: s.state("o", "i"), Feature.EFFECTS),
    "states": (lambda s: s.states("o"), Feature.EFFECTS),
    "rewrite": (lambda s: s.rewrite(), Feature.EFFECTS),
    "seek": (lambda s: s.seek("g", SeekTo(end="now")), Feature.REPLAY),
    "bind ordered": (lambda s: s.bind([Group("h", ("#",))]), Feature.ORDER),
    "bind effects": (lambda s: s.bind([Group("h", ("#",), False, has_effects=True)]), Feature.EFFECTS),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_queue_alone_cannot_do_is_refused_with_the_urls_that_can(verb: str) -> None:
    ask, feature = VERBS[verb]

    async def main() -> None:
        store = await opened(Broker(FakeServer(positions=False)), Group("g", ("#",), False))
        assert feature not in store.features
        with pytest.raises(Unsupported) as told:
            await ask(store)
        assert who_can(feature) in str(told.value)
        assert str(told.value).startswith("fake://broker: ")
        await store.close()

    run(main())


def test_a_parked_key_is_refused() -> None:
    async def main() -> None:
        store = await opened(Broker(FakeServer()))
        await store.append(envelopes(1))
        [out] = await store.claim("g", limit=1, wait_s=5)
        with pytest.raises(Unsupported, match="parks keys"):
            store.settle("g", [Settlement(out, "dead", park=True)])
        await store.close()

    run(main())


def test_a_replay_in_place_has_to_say_that_it_publishes_again() -> None:
    async def main() -> None:
        store = await opened(Broker(FakeServer(lanes=1)))
        await store.append(envelopes(3))
        out = await store.claim("g", limit=3, wait_s=5)
        await store.settle("g", [Settlement(each) for each in out])
        with pytest.raises(Unsupported, match="emits=True"):
            await store.seek("g", SeekTo(end="beginning"))
        with pytest.raises(Unsupported, match="tables to reset"):
            await store.seek("g", SeekTo(end="beginning"), emits=True, reset=lambda db: None)
        await store.seek("g", SeekTo(end="beginning"), emits=True)
        assert numbers(await store.claim("g", limit=3, wait_s=5)) == [0, 1, 2]
        await store.close()

    run(main())


def test_before_open_and_of_unknown_groups() -> None:
    async def main() -> None:
        store = Direct(Broker(FakeServer()))
        with pytest.raises(Unavailable, match="is not open"):
            await store.append(envelopes(1))
        await store.open()
        with pytest.raises(Unavailable, match="open already"):
            await store.open()
        for doing in (store.claim("x", limit=1, wait_s=0), store.redrive("x"), store.dead("x"), store.drop_dead("x")):
            with pytest.raises(UnknownEvent, match="'x'"):
                await doing
        await store.close()
        await store.close()

    run(main())


def test_an_app_with_tables_is_refused_when_it_starts() -> None:
    app, _ = made()

    @app.on(group="g")
    def write(e: Watched, db: Db) -> None: ...

    async def main() -> None:
        async with app:
            raise AssertionError("it opened")

    with pytest.raises(Unsupported, match="writes through `db`"):
        run(main())
