"""Personal data: sealed wherever it is written, plain where the program reads it, redacted once the person is erased."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pydantic
import pytest
from common import QUICK, all_of, run
from hypothesis import given
from hypothesis import strategies as st

from trilogue import (
    Aggregate,
    App,
    BadOption,
    Db,
    DecodeError,
    Effect,
    Envelope,
    Failed,
    Later,
    Record,
    Reject,
    Rejected,
    Retry,
    SeekTo,
    Snapshot,
    event,
    from_cloudevent,
    to_cloudevent,
)
from trilogue.codec import coder, envelope
from trilogue.events import Delivery, Lease
from trilogue.handlers import subscription
from trilogue.outcomes import Outcomes
from trilogue.stores.keys import MEMORY, Keyring

MAIL = "anna.k@example.org"


@event("customer.registered", key="customer", subject="customer", personal=("email", "age"))
@dataclass(frozen=True)
class Registered:
    customer: str
    email: str
    age: int | None = None
    plan: str = "free"


@event("mail.sent", key="customer", subject="customer", personal=("to",))
@dataclass(frozen=True)
class Sent:
    customer: str
    to: str


@event("order.paid", key="order")
@dataclass(frozen=True)
class Paid:
    order: str


class Customer(Aggregate, stream="customer-{id}", snapshot=Snapshot(every=1)):
    email: str = ""
    plan: str = ""

    def register(self, email: str) -> str:
        self.emit(Registered(self.id, email, 41))
        return email

    def apply(self, e: Registered) -> None:
        self.email, self.plan = e.email, e.plan


ANNA = Registered("u1", MAIL, 41)
ERASED = Registered("u1", "[erased]", None)


def memory_keys() -> Keyring:
    keys = Keyring()
    keys.open(MEMORY)
    return keys


def holds_plain(data: bytes) -> bool:
    return b"anna" in data or b'"age":41' in data  # not ":41" alone, which is a time of day too


# ── declaring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def declared(fields: dict[str, Any], **options: Any) -> str:
    """What declaring such an event is refused with."""
    cls = event("a.b", **{"subject": "who", **options})(dataclass(type("A", (), {"__annotations__": {"who": str, **fields}})))
    with pytest.raises(BadOption) as caught:
        coder(cls)
    return str(caught.value)


def test_a_personal_field_must_be_a_field() -> None:
    assert "personal 'emial' is no field of A, which has ['email', 'who']" in declared({"email": str}, personal=("emial",))


def test_the_subject_must_be_a_field() -> None:
    assert "subject 'whom' is no field" in declared({"email": str}, personal=("email",), subject="whom")


@pytest.mark.parametrize("options", [{"key": "email"}, {"tags": ("email",)}, {"subject": "email"}])
def test_what_stands_in_plain_text_on_the_log_cannot_be_personal(options: dict[str, Any]) -> None:
    assert "cannot be personal: use an id of yours there" in declared({"email": str}, personal=("email",), **options)


@pytest.mark.parametrize("kind", [int, list[str], Annotated[str, msgspec.Meta(max_length=3)]])
def test_a_personal_field_must_allow_what_it_reads_once_erased(kind: Any) -> None:
    assert "can be neither None nor '[erased]'" in declared({"age": kind}, personal=("age",))


def test_a_list_has_no_names() -> None:
    @event("a.b", subject="who", personal=("email",))
    class A(msgspec.Struct, array_like=True):
        who: str
        email: str

    with pytest.raises(BadOption, match="drop array_like=True"):
        coder(A)


@event("struct.renamed", subject="who_is", personal=("e_mail", "notes"))
class Renamed(msgspec.Struct, rename="camel", frozen=True):
    who_is: int
    e_mail: str | None
    notes: list[str] | None = None


@event("model.renamed", subject="who", personal=("email", "age"))
class Model(pydantic.BaseModel):
    who: str
    email: str = pydantic.Field(alias="eMail", min_length=3)
    age: int | None = pydantic.Field(default=None, ge=0)


@pytest.mark.parametrize(
    ("made", "erased", "subject"),
    [
        (ANNA, ERASED, "u1"),
        (Renamed(7, MAIL, ["anna"]), Renamed(7, None, None), "7"),
        (Model(who="u1", eMail=MAIL, age=41), Model(who="u1", eMail="[erased]"), "u1"),
    ],
)
def test_all_kinds_of_classes_are_sealed_and_redacted(made: Any, erased: Any, subject: str) -> None:
    keys = memory_keys()
    stored = envelope(made, keys=keys)
    assert not holds_plain(stored.data)
    assert stored.data.count(b'"sealed:1:') == 2
    assert coder(type(made)).read(stored, keys) == made
    keys.destroy(subject, "asked")
    assert coder(type(made)).read(stored, keys) == erased
    keys.close()


def test_a_pydantic_field_that_allows_nothing_is_refused() -> None:
    @event("a.b", subject="who", personal=("age",))
    class A(pydantic.BaseModel):
        who: str
        age: int

    with pytest.raises(BadOption, match="can be neither None nor"):
        coder(A)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@event("any.thing", subject="who", personal=("a", "b"))
@dataclass(frozen=True)
class Anything:
    who: str
    a: Any
    b: Any
    c: Any


@given(a=plain, b=plain, c=plain)
def test_whatever_json_can_say_comes_back(a: Any, b: Any, c: Any) -> None:
    keys = memory_keys()
    made = Anything("u1", a, b, c)
    assert coder(Anything).read(envelope(made, keys=keys), keys) == made
    keys.close()


def test_nothing_is_sealed_where_nothing_is_said() -> None:
    keys = memory_keys()
    assert b'"age":null' in envelope(Registered("u1", MAIL), keys=keys).data


@pytest.mark.parametrize("subject", ["", "\x00states", "x" * 513])
def test_the_subject_must_name_somebody(subject: str) -> None:
    with pytest.raises(BadOption, match=r"which says whose, is .*: expected an id"):
        envelope(Registered(subject, MAIL), keys=memory_keys())


def test_without_keys_nothing_is_written_plain_or_read_as_if_erased() -> None:
    with pytest.raises(BadOption, match="is sealed by an App"):
        envelope(ANNA)
    with pytest.raises(BadOption, match="is read without keys"):
        coder(Registered).read(envelope(ANNA, keys=memory_keys()))


def test_a_sealed_value_opens_in_its_event_and_field_only() -> None:
    keys = memory_keys()
    stored = envelope(Renamed(7, MAIL, ["anna"]), keys=keys)
    data = json.loads(stored.data)
    swapped = msgspec.json.encode({**data, "eMail": data["notes"], "notes": data["eMail"]})
    for moved in (msgspec.structs.replace(stored, id="another"), msgspec.structs.replace(stored, data=swapped)):
        with pytest.raises(DecodeError, match="belongs to another event or field"):
            coder(Renamed).read(moved, keys)


# ── change ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def renamed(document: dict[str, Any]) -> dict[str, Any]:
    return {"customer": document["customer"], "mail": document["email"].lower(), "years": document["age"]}


CHANGED: dict[str, Any] = {"version": 2, "upcast": {1: renamed}, "personal": ("mail", "years")}


@event("customer.registered", key="customer", subject="customer", **CHANGED)
@dataclass(frozen=True)
class RegisteredNow:
    customer: str
    mail: str
    years: int | None = None


def test_what_was_sealed_under_another_name_is_opened_before_upcasting() -> None:
    keys = memory_keys()
    stored = envelope(ANNA, keys=keys)
    assert coder(RegisteredNow).read(stored, keys) == RegisteredNow("u1", MAIL, 41)
    keys.destroy("u1", "asked")
    assert coder(RegisteredNow).read(stored, keys) == RegisteredNow("u1", "[erased]", None)


def test_what_was_stored_before_it_was_personal_reads_as_it_is() -> None:
    old = Envelope(id="1", type="customer.registered", data=b'{"customer":"u1","email":"x@y","age":3}')
    assert coder(Registered).read(old, memory_keys()) == Registered("u1", "x@y", 3)


def test_a_text_that_only_looks_sealed_is_a_text() -> None:
    keys = memory_keys()
    made = Registered("u1", "sealed:1:dTE:abcd", plan="sealed:1:dTE:abcd")
    assert coder(Registered).read(envelope(made, keys=keys), keys) == made
    old = Envelope(id="1", type="customer.registered", data=b'{"customer":"u1","email":"sealed:1:x","age":null}')
    assert coder(RegisteredNow).read(old, keys).mail == "sealed:1:x"


# ── through an App ───────────────────────────────────────────────────────────────────────────────────────────────────


def reading(app: App) -> dict[str, list[Any]]:
    """Every kind of reader; what each has seen last."""
    seen: dict[str, list[Any]] = {name: [] for name in ("async", "thread", "db", "batch", "db batch", "records")}

    @app.on(group="async")
    async def one(e: Registered) -> None:
        seen["async"].append(e)

    @app.on(group="thread")
    def two(e: Registered) -> None:
        seen["thread"].append(e)

    @app.on(group="db")
    def three(e: Registered, db: Db) -> None:
        seen["db"].append(e)

    @app.on(group="batch")
    async def four(es: list[Registered]) -> None:
        seen["batch"] += es

    @app.on(group="db-batch")
    def five(es: list[Registered], db: Db) -> None:
        seen["db batch"] += es

    @app.on("customer.#", group="records")
    async def six(r: Record) -> None:
        seen["records"].append(r)

    return seen


READERS = ("async", "thread", "db", "batch", "db batch")


@pytest.mark.parametrize(("erased", "expected"), [(False, ANNA), (True, ERASED)])
def test_everybody_reads_it_until_it_is_erased(url: str, erased: bool, expected: Registered) -> None:
    app = App(url)
    app.knows(Customer)
    seen = reading(app)

    async def main() -> None:
        async with app.running():
            groups = [sub.group.name for sub in app.subscriptions]
            for group in groups:
                await app.store.pause(group)
            await app.decide(Customer, "u1", lambda c: c.register(MAIL))
            if erased:
                await app.erase("u1", reason="asked")
            for group in groups:
                await app.store.resume(group)
            await app.wait_idle()
            assert {name: seen[name] for name in READERS} == {name: [expected] for name in READERS}
            assert not holds_plain(seen["records"][0].data)
            record = (await all_of(app, types="customer.#"))[0]
            assert not holds_plain(record.data)
            assert app.decode(record) == expected
            assert (await app.load(Customer, "u1")).email == expected.email

    run(main())


def test_nothing_personal_of_the_erased_can_be_stored(url: str) -> None:
    app = App(url)
    app.knows(Customer)

    async def main() -> None:
        async with app:
            await app.publish_many([ANNA, Registered("u2", "b@example.org")])
            await app.erase("u1", reason="asked")
            with pytest.raises(Rejected, match="'u1' has been erased"):
                await app.publish(Registered("u1", "new@example.org"))
            with pytest.raises(Rejected):
                await app.decide(Customer, "u1", lambda c: c.register("new@example.org"))
            await app.publish(Registered("u2", "still@example.org"))
            assert len(await all_of(app, types="customer.#")) == 3

    run(main())


def test_publishing_again_is_still_a_repetition(url: str) -> None:
    app = App(url)

    async def main() -> None:
        async with app:
            first = await app.publish(ANNA, id="once")
            assert await app.publish(ANNA, id="once") == first
            await app.publish(Sent("u1", MAIL), id="later", delay="1h")
            await app.publish(Sent("u1", MAIL), id="later", delay="1h")
            assert len(await all_of(app)) == 1

    run(main())


def test_a_key_is_durable_before_the_event_is(file_url: str) -> None:
    app = App(file_url)
    opened: list[bytes | None] = []

    async def main() -> None:
        async with app:
            append = app.store.append

            async def looking(envelopes: Any, **rest: Any) -> list[int]:
                there = Keyring()  # sees what is in the file, as after a crash
                there.open(app.keys.path)
                opened.extend(coder(Registered).read(made, there).email for made in envelopes)
                there.close()
                return await append(envelopes, **rest)

            app.store.append = looking  # type: ignore[method-assign]
            await app.publish(ANNA)
            await app.publish_many([Registered(f"u{n}", f"m{n}") for n in range(5)])

    run(main())
    assert opened == [MAIL, "m0", "m1", "m2", "m3", "m4"]


def test_timers_and_what_they_become_are_sealed(url: str) -> None:
    app = App(url)
    seen = reading(app)

    async def main() -> None:
        async with app.running():
            await app.publish(ANNA, delay="1h")
            timers = await app.store.timers()
            assert not holds_plain(timers[0].envelope.data)
            await app.publish(Registered("u1", MAIL, 41), delay="20ms")
            await app.wait_idle()
            while not seen["async"]:
                await app.store.changed(0.1)
            assert seen["async"] == [ANNA]

    run(main())


def test_what_handlers_emit_is_sealed_and_repeats_itself(url: str) -> None:
    app = App(url)
    sent: list[str] = []

    @app.on(group="a")
    async def a(e: Registered) -> Sent:
        return Sent(e.customer, e.email)

    @app.on(group="b")
    def b(e: Registered, db: Db) -> Sent:
        return Sent(e.customer, e.email)

    @app.on(group="c", retry=QUICK)
    async def c(e: Sent) -> Effect:
        sent.append(e.to)
        return Effect(lambda db: None)

    async def main() -> None:
        async with app.running():
            await app.publish(ANNA)
            await app.wait_idle()
            records = await all_of(app, types="mail.#")
            assert sent == [MAIL, MAIL]
            assert not any(holds_plain(record.data) for record in records)
            await app.replay("a", SeekTo(end="beginning"), emits=True)
            await app.wait_idle()
            assert len(await all_of(app, types="mail.#")) == 2

    run(main())


def test_dead_letters_are_redriven_as_erased(url: str) -> None:
    app = App(url)
    seen: list[Registered] = []

    @app.on(group="g", retry=Retry(1))
    async def handle(e: Registered) -> None:
        seen.append(e)
        if len(seen) == 1:
            raise ValueError("first")

    async def main() -> None:
        async with app.running():
            await app.publish(ANNA)
            await app.wait_idle()
            await app.erase("u1", reason="asked")
            await app.store.redrive("g")
            await app.wait_idle()

    run(main())
    assert seen == [ANNA, ERASED]


def test_cloudevents_and_other_logs_get_it_sealed(url: str) -> None:
    here, there = App(url), App("memory://")
    there.knows(Registered)

    async def main() -> None:
        async with here, there:
            await here.publish(ANNA)
            record = (await all_of(here))[0]
            document = to_cloudevent(record)
            assert b"sealed:1:" in document
            assert not holds_plain(document)
            await there.publish(from_cloudevent(document))
            copy = (await all_of(there))[0]
            assert copy.data == record.data
            with pytest.raises(DecodeError, match="sealed with another keys file"):
                there.decode(copy)

    run(main())


def test_sync_programs_can_erase(url: str) -> None:
    app = App(url)
    app.knows(Registered)
    with app.sync() as bus:
        bus.publish(ANNA)
        assert bus.erase("u1", reason="asked").reason == "asked"
        assert [app.decode(record) for record in bus.history(types="customer.#")] == [ERASED]


def test_who_seals_nothing_needs_neither_file_nor_package(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys; sys.path.insert(0, 'tests'); from common import Watched; from trilogue import App\n"
        "async def main():\n    async with App(sys.argv[1]) as app: await app.publish(Watched('u1'))\n"
        "asyncio.run(main()); assert not [name for name in sys.modules if name.startswith('cryptography')]"
    )
    subprocess.run([sys.executable, "-c", code, f"sqlite:///{tmp_path}/a.db"], check=True)
    assert not (tmp_path / "a.db-keys").exists()


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def noisy(app: App, name: str) -> None:
    """A handler that says what it should not, each in its own way."""

    def said(e: Registered) -> ValueError:
        error = ValueError(f"no mailbox {e.email}")
        error.add_note(f"{e.email} is wrong")
        error.__cause__ = KeyError(e.email)
        return error

    async def one(e: Registered) -> None:
        raise said(e)

    async def reject(e: Registered) -> None:
        raise Reject(f"not {e.email}")

    async def batch(es: list[Registered]) -> list[Failed]:
        return [Failed(es[0], f"not {es[0].email}")]

    def db(e: Registered, db: Db) -> None:
        raise said(e)

    def db_batch(es: list[Registered], db: Db) -> None:
        raise said(es[0])

    def thread(e: Registered) -> None:
        raise said(e)

    async def record(r: Record) -> None:
        raise said(app.decode(r))

    async def emits(e: Registered) -> Effect:
        return Effect(lambda db: db.execute(f"insert into nowhere values ('{e.email}')"))

    handlers: dict[str, Callable[..., Any]] = {
        "one": one, "reject": reject, "batch": batch, "db": db, "db_batch": db_batch, "thread": thread, "record": record,
        "emits": emits,
    }  # fmt: skip
    if name == "record":
        app.knows(Registered)
        app.on("customer.#", group="g", retry=Retry(2, "1ms"))(record)
    else:
        app.on(group="g", retry=Retry(2, "1ms"))(handlers[name])


@pytest.mark.parametrize("name", ["one", "reject", "batch", "db", "db_batch", "thread", "record", "emits"])
def test_no_error_text_quotes_it(url: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    app = App(url)
    noisy(app, name)

    async def main() -> None:
        async with app.running():
            await app.publish(ANNA)
            await app.wait_idle()
            (letter,) = await app.store.dead("g")
            told = letter.error + letter.traceback + caplog.text
            assert "(withheld: this event holds personal data)" in letter.error
            assert "anna" not in told
            assert letter.error.split(":")[0] in ("ValueError", "Reject", "TrilogueError", "SQLError")
            if name in ("one", "db", "thread"):
                assert "in said" in letter.traceback or f"in {name}" in letter.traceback

    with caplog.at_level(logging.DEBUG):
        run(main())


def test_later_keeps_its_text_to_itself(url: str) -> None:
    class Full(Later):
        def __str__(self) -> str:
            return f"mailbox {MAIL} is full"

    app = App(url)

    @app.on(group="g")
    async def handle(e: Registered) -> None:
        raise Full("1h")

    async def main() -> None:
        async with app.running():
            await app.publish(ANNA)
            while not (rows := await app.db("select error from trilogue_held")):
                await app.store.changed(0.1)
            assert rows[0][0].endswith("Full: (withheld: this event holds personal data)")

    run(main())


def test_errors_of_other_events_are_told(url: str) -> None:
    app = App(url)

    @app.on(group="g", retry=Retry(1))
    async def handle(e: Paid) -> None:
        raise ValueError("no such order")

    async def main() -> None:
        async with app.running():
            await app.publish(Paid("o1"))
            await app.wait_idle()
            (letter,) = await app.store.dead("g")
            assert letter.error == "ValueError: no such order"

    run(main())


@event("customer.registered", key="customer", subject="customer", personal=("email",))
@dataclass(frozen=True)
class Wrong:
    customer: str
    email: str

    def __post_init__(self) -> None:
        if "@" in self.email:
            raise ValueError(f"{self.email} is no address")


def test_decode_errors_do_not_quote_it(url: str, caplog: pytest.LogCaptureFixture) -> None:
    app = App(url)

    @app.on(group="g")
    async def handle(e: Wrong) -> None:
        raise AssertionError

    @app.on(group="h")
    def many(es: list[Wrong], db: Db) -> None:
        raise AssertionError

    async def main() -> None:
        async with app.running():
            await app.publish(ANNA)
            await app.wait_idle()
            letters = await app.store.dead(None)
            assert [letter.error for letter in letters] == ["DecodeError: (withheld: this event holds personal data)"] * 2
            assert "anna" not in "".join(letter.traceback for letter in letters) + caplog.text

    with caplog.at_level(logging.DEBUG):
        run(main())


def test_handlers_with_db_open_it_inside_the_transaction() -> None:
    """What is erased meanwhile must not be written after the fact was handled."""
    keys = memory_keys()
    seen: list[Any] = []

    def one(e: Registered, db: Db) -> None:
        seen.append(e)

    def many(es: list[Registered], db: Db) -> None:
        seen.extend(es)

    stored = envelope(ANNA, keys=keys)
    record = Record(**{name: getattr(stored, name) for name in stored.__struct_fields__}, position=1)
    delivery = Delivery(record, "g", Lease(0, 1, 10**18, lambda: 0))
    answers: list[Any] = []
    for handler in (one, many):
        outcomes = Outcomes(replace(subscription(handler), keys=keys), "test")
        answers += [outcomes.in_transaction(delivery)] if handler is one else outcomes.batch_in_transaction([delivery])
    keys.destroy("u1", "asked")
    for answer in answers:
        assert [settlement.verdict for settlement in answer.run(None)] == ["done"]
    assert seen == [ERASED, ERASED]


# ── snapshots and answers ────────────────────────────────────────────────────────────────────────────────────────────


def test_snapshots_are_sealed_and_go_with_an_erasure(url: str) -> None:
    app = App(url)
    app.knows(Customer)

    async def main() -> None:
        async with app:
            await app.decide(Customer, "u1", lambda c: c.register(MAIL), once="r1")
            await app.decide(Customer, "u2", lambda c: c.register("b@example.org"))
            for customer in ("u1", "u2"):
                await app.take_snapshot(Customer, customer)
            states = [*await app.store.states("snapshot"), *await app.store.states("once")]
            assert len(states) == 3
            assert not any(b"example" in state.body for state in states)
            assert (await app.load(Customer, "u1")).email == MAIL
            repeated = await app.decide(Customer, "u1", lambda c: c.register("never"), once="r1")
            assert (repeated.repeated, repeated.answer) == (True, MAIL)

            receipt = await app.erase("u2", reason="asked")
            assert "sealed snapshots removed: 2" in receipt.done
            assert await app.store.states("snapshot") == []
            assert (await app.load(Customer, "u1")).email == MAIL
            assert (await app.load(Customer, "u2")).email == "[erased]"
            repeated = await app.decide(Customer, "u1", lambda c: c.register("never"), once="r1")
            assert (repeated.repeated, repeated.answer) == (True, None)

    run(main())


def test_a_snapshot_of_before_is_not_kept_after(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(url)
    app.knows(Customer)

    async def main() -> None:
        async with app:
            await app.decide(Customer, "u1", lambda c: c.register(MAIL))
            unseal = app.keys.unseal

            def read_before(sealed: str, about: bytes) -> bytes | None:
                plain = unseal(sealed, about)
                app.keys.destroy("u1", "asked")  # while the snapshot is being made
                return b"41" if plain is None else plain

            monkeypatch.setattr(app.keys, "unseal", read_before)
            await app.take_snapshot(Customer, "u1")
            monkeypatch.undo()
            assert await app.store.states("snapshot") == []
            assert (await app.load(Customer, "u1")).email == "[erased]"

    run(main())
