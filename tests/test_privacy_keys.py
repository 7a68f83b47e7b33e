"""The keys file: who is in it can be read, who was destroyed cannot, in this process or any other."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilogue import DecodeError, Rejected, Unavailable, Unsupported
from trilogue.stores import cipher
from trilogue.stores import keys as keys_module
from trilogue.stores.keys import MEMORY, Keyring


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "app.db-keys"


@pytest.fixture
def keys(path: Path) -> Iterator[Keyring]:
    keyring = opened(path)
    yield keyring
    keyring.close()


def opened(path: Path | str) -> Keyring:
    keyring = Keyring()
    keyring.open(str(path))
    return keyring


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def some_keys() -> Iterator[Keyring]:
    keyring = opened(MEMORY)
    yield keyring
    keyring.close()


subjects = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=50)


@given(subject=subjects, plain=st.binary(max_size=300), about=st.binary(max_size=50))
def test_what_was_sealed_opens_again(some_keys: Keyring, subject: str, plain: bytes, about: bytes) -> None:
    assert some_keys.unseal(some_keys.seal(subject, plain, about), about) == plain


@given(data=st.data(), plain=st.binary(max_size=100))
def test_no_byte_can_be_changed(some_keys: Keyring, data: st.DataObject, plain: bytes) -> None:
    sealed = some_keys.seal("u7", plain, b"here")
    at = data.draw(st.integers(0, len(sealed) - 1))
    other = data.draw(st.characters(codec="ascii").filter(lambda c: c != sealed[at]))
    with pytest.raises(DecodeError):
        some_keys.unseal(sealed[:at] + other + sealed[at + 1 :], b"here")


@pytest.mark.parametrize("plain", [b"", b"1", b"22", b"333"])
def test_not_even_a_bit_that_means_nothing_can_be_changed(some_keys: Keyring, plain: bytes) -> None:
    sealed = some_keys.seal("u7", plain, b"here")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=+/ :\n"
    for at in (*range(8, 14), len(sealed) - 2, len(sealed) - 1):
        for other in alphabet.replace(sealed[at], ""):
            with pytest.raises(DecodeError):
                some_keys.unseal(sealed[:at] + other + sealed[at + 1 :], b"here")


@given(plain=st.binary(max_size=100), about=st.binary(max_size=20), other=st.binary(max_size=20))
def test_it_opens_in_its_own_place_only(some_keys: Keyring, plain: bytes, about: bytes, other: bytes) -> None:
    sealed = some_keys.seal("u7", plain, about)
    if other != about:
        with pytest.raises(DecodeError, match="belongs to another event or field"):
            some_keys.unseal(sealed, other)


def test_a_value_of_one_does_not_open_as_a_value_of_another(keys: Keyring) -> None:
    sealed, other = keys.seal("u1", b"x", b""), keys.seal("u2", b"x", b"")
    mixed = ":".join([*other.split(":")[:3], sealed.split(":")[3]])
    with pytest.raises(DecodeError):
        keys.unseal(mixed, b"")


def test_the_same_again_is_the_same_text_and_elsewhere_it_is_not(keys: Keyring) -> None:
    texts = [keys.seal("u1", b"x", b"event 1"), keys.seal("u1", b"x", b"event 1"), keys.seal("u1", b"x", b"event 2")]
    assert texts[0] == texts[1] != texts[2]
    assert len({text.split(":")[3][:16] for text in texts}) == 2, "two values share a nonce"


@pytest.mark.parametrize("text", ["sealed:1:", "sealed:1:dTE", "sealed:1:dTE:", "sealed:1:dTE:a", "sealed:2:dTE:abcd", "x", ""])
def test_what_is_no_sealed_value_is_a_decode_error(keys: Keyring, text: str) -> None:
    keys.seal("u1", b"x", b"")
    with pytest.raises(DecodeError):
        keys.unseal(text, b"")


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_made_with_the_first_key_and_for_its_owner_alone(keys: Keyring, path: Path) -> None:
    assert keys.erasures() == 0
    assert not path.exists()
    os.umask(os.umask(0))
    keys.seal("u1", b"x", b"")
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys._rows("pragma journal_mode") == [("delete",)]
    assert keys._rows("pragma synchronous") == [(3,)]
    assert keys._rows("pragma secure_delete") == [(1,)]


def test_it_survives(path: Path) -> None:
    first = opened(path)
    sealed = first.seal("u1", b"x", b"")
    first.close()
    again = opened(path)
    assert again.unseal(sealed, b"") == b"x"
    again.close()


def test_another_keys_file_is_not_mistaken_for_an_erasure(keys: Keyring, path: Path, tmp_path: Path) -> None:
    sealed = keys.seal("u1", b"x", b"")
    other = opened(tmp_path / "other-keys")
    for _ in range(2):  # without a file, and with one
        with pytest.raises(DecodeError, match=r"no key for 'u1' in .*other-keys: the value was sealed with another keys file"):
            other.unseal(sealed, b"")
        other.seal("u2", b"x", b"")
    other.close()


def test_the_file_of_somebody_else_is_left_alone(path: Path, keys: Keyring) -> None:
    import apsw

    connection = apsw.Connection(str(path))
    connection.execute("create table t (a)").fetchall()
    connection.close()
    with pytest.raises(Unavailable, match="is no keys file of trilogue"):
        keys.seal("u1", b"x", b"")


def test_a_text_file_is_no_keys_file(path: Path, keys: Keyring) -> None:
    path.write_text("x" * 5_000)
    with pytest.raises(Unavailable):
        keys.seal("u1", b"x", b"")


def test_it_is_closed_when_it_is_closed(keys: Keyring, path: Path) -> None:
    keys.seal("u1", b"x", b"")
    keys.close()
    with pytest.raises(Unavailable, match="inside `async with app:`"):
        keys.seal("u1", b"x", b"")


def test_a_fork_opens_its_own(keys: Keyring) -> None:
    keys.seal("u1", b"x", b"")
    keys._pid = -1
    with pytest.raises(Unavailable, match="before a fork"):
        keys.seal("u1", b"x", b"")
    keys._pid = os.getpid()


def test_the_cache_is_bounded(keys: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "KEYS_CACHED", 3)
    sealed = [keys.seal(f"u{n}", b"%d" % n, b"") for n in range(20)]
    assert len(keys._cache) == 3
    assert [keys.unseal(text, b"") for text in sealed] == [b"%d" % n for n in range(20)]


def test_keys_made_together_are_durable_at_the_end(keys: Keyring, path: Path) -> None:
    with keys.together():
        sealed = [keys.seal(f"u{n}", b"x", b"") for n in range(5)]
    other = opened(path)
    assert [other.unseal(text, b"") for text in sealed] == [b"x"] * 5
    other.close()


def test_keys_that_could_not_be_written_are_not_used(keys: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.seal("u0", b"x", b"")
    rows = keys._rows

    def failing(sql: str, values: object = ()) -> list[object]:
        if sql == "commit" and keys._is_changing() and rows("select count(*) from keys") == [(2,)]:
            import apsw

            raise apsw.FullError("full")
        return rows(sql, values)

    monkeypatch.setattr(keys, "_rows", failing)
    with pytest.raises(Rejected, match="no room"):
        keys.seal("u1", b"x", b"")
    monkeypatch.undo()
    sealed = keys.seal("u1", b"x", b"")
    other = opened(keys.path)
    assert other.unseal(sealed, b"") == b"x"
    other.close()


def test_without_the_package_it_says_how_to_get_it(keys: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(Unsupported, match=r"pip install 'trilogue\[privacy\]'"):
        keys.seal("u1", b"x", b"")


# ── destroying ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_destroyed_key_is_gone(keys: Keyring) -> None:
    sealed, other = keys.seal("u1", b"x", b""), keys.seal("u2", b"y", b"")
    destroyed = keys.destroy("u1", "asked")
    assert (destroyed.subject, destroyed.reason, destroyed.is_repeated) == ("u1", "asked", False)
    assert keys.unseal(sealed, b"") is None
    assert keys.unseal(other, b"") == b"y"
    assert keys.erasures() == 1
    with pytest.raises(Rejected, match="'u1' has been erased"):
        keys.seal("u1", b"x", b"")


def test_destroying_again_says_when_it_was(keys: Keyring) -> None:
    keys.seal("u1", b"x", b"")
    first = keys.destroy("u1", "asked")
    again = keys.destroy("u1", "another reason")
    assert (again.erased_us, again.reason, again.is_repeated) == (first.erased_us, "asked", True)
    assert keys.erasures() == 1


@pytest.mark.parametrize("subject", ["nobody", keys_module.STATES])
def test_who_never_had_a_key_cannot_be_destroyed(keys: Keyring, subject: str) -> None:
    for _ in range(2):
        with pytest.raises(Rejected, match="nothing was ever sealed for"):
            keys.destroy(subject, "asked")
        keys.seal("u1", b"x", b"")
        keys.seal_state(b"x")


def test_another_keyring_notices_before_the_next_value(keys: Keyring, path: Path) -> None:
    other = opened(path)
    sealed = [keys.seal(f"u{n}", b"x", b"") for n in range(20)]
    for n in range(20):
        assert other.unseal(sealed[n], b"") == b"x"
        keys.destroy(f"u{n}", "asked")
        assert other.unseal(sealed[n], b"") is None
        with pytest.raises(Rejected):
            other.seal(f"u{n}", b"x", b"")
        assert other.erasures() == n + 1
    other.close()


def test_it_notices_among_new_keys_of_both(keys: Keyring, path: Path) -> None:
    other, chance = opened(path), random.Random(1)
    sealed: dict[str, str] = {}
    erased: set[str] = set()
    for n in range(300):
        actor, reader = chance.sample([keys, other], 2)
        if chance.random() < 0.7 or not sealed:
            sealed[f"u{n}"] = actor.seal(f"u{n}", b"x", b"")
        else:
            who = chance.choice(sorted(sealed))
            actor.destroy(who, "asked")
            erased.add(who)
        who = chance.choice(sorted(sealed))
        assert reader.unseal(sealed[who], b"") == (None if who in erased else b"x")
    assert erased
    other.close()


DESTROY = "import sys; from trilogue.stores.keys import Keyring; k = Keyring(); k.open(sys.argv[1]); k.destroy('u1', 'asked')"
SEAL = """
import sys
from trilogue.stores.keys import Keyring
k = Keyring(); k.open(sys.argv[1]); sys.stdin.readline()
print(*[k.seal(f"u{n}", b"x", b"") for n in range(40)])
"""


@pytest.mark.processes
def test_another_process_destroys_it(keys: Keyring, path: Path) -> None:
    sealed = keys.seal("u1", b"x", b"")
    assert keys.unseal(sealed, b"") == b"x"
    subprocess.run([sys.executable, "-c", DESTROY, path], check=True)
    assert keys.unseal(sealed, b"") is None


@pytest.mark.processes
def test_of_processes_that_make_the_same_key_one_wins(path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", SEAL, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    texts = [process.communicate("go\n")[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert texts[0] == texts[1] == texts[2] == texts[3]
    keys = opened(path)
    assert [keys.unseal(text, b"") for text in texts[0]] == [b"x"] * 40
    keys.close()


def test_who_comes_second_takes_the_key_of_the_first(keys: Keyring, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = opened(path)
    other.seal("u0", b"x", b"")
    begin, sealed = keys._begin, []

    def late() -> None:
        sealed.append(other.seal("u1", b"x", b""))
        begin()

    monkeypatch.setattr(keys, "_begin", late)
    sealed.append(keys.seal("u1", b"x", b""))
    assert sealed[0] == sealed[1]
    assert other.unseal(sealed[1], b"") == b"x"
    other.close()


def test_no_byte_of_a_destroyed_key_is_left(keys: Keyring, path: Path) -> None:
    names = [f"{random.Random(n).getrandbits(200):x}"[: 3 + n % 40] + str(n) for n in range(1_500)]
    for n in range(0, len(names), 50):
        with keys.together():
            for name in names[n : n + 50]:
                keys.seal(name, b"x", b"")
    doomed = names[::30]
    secrets = [keys._row(name)[0] for name in doomed]
    for name in doomed:
        keys.destroy(name, "asked")
    raw = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert not Path(f"{path}-journal").exists()
    assert [n for n, secret in enumerate(secrets) for at in range(0, 64, 8) if secret[at : at + 8] in raw] == []


def test_copies_in_split_pages_are_written_over(keys: Keyring, path: Path) -> None:
    """What the test above may not meet: a copy that SQLite left where a page was split."""
    keys.seal("u1", b"x", b"")
    secret = keys._row("u1")[0]
    keys._rows("create table left_over (a)")
    keys._rows("insert into left_over values (?)", (secret,))
    keys._rows("pragma secure_delete = 0")
    keys._rows("drop table left_over")
    assert path.read_bytes().count(secret) == 2
    keys.destroy("u1", "asked")
    assert path.read_bytes().count(secret) == 0


def test_repeating_removes_what_a_crash_has_left(keys: Keyring, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.seal("u1", b"x", b"")
    secret = keys._row("u1")[0]
    keys._rows("pragma secure_delete = 0")
    keys._rows("create table left_over (a)")
    keys._rows("insert into left_over values (?)", (secret,))
    keys._rows("drop table left_over")
    monkeypatch.setattr(keys, "_leave_no_bytes", lambda key: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        keys.destroy("u1", "asked")
    monkeypatch.undo()
    assert path.read_bytes().count(secret) == 1
    assert keys.destroy("u1", "asked").is_repeated
    assert path.read_bytes().count(secret) == 0


# ── states ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_state_opens_until_somebody_is_erased(keys: Keyring) -> None:
    keys.seal("u1", b"x", b"")
    sealed = keys.seal_state(b"everybody")
    assert sealed is not None
    assert b"everybody" not in sealed
    assert keys.unseal_state(sealed) == b"everybody"
    keys.destroy("u1", "asked")
    assert keys.unseal_state(sealed) is None
    again = keys.seal_state(b"everybody but one")
    assert again is not None
    assert keys.unseal_state(again) == b"everybody but one"


def test_a_state_that_was_read_before_somebody_was_erased_is_not_kept(keys: Keyring, path: Path) -> None:
    other = opened(path)
    other.seal("u1", b"x", b"")
    since = keys.erasures()
    assert keys.seal_state(b"with u1", since=since) is not None
    other.destroy("u1", "asked")
    assert keys.seal_state(b"with u1", since=since) is None
    assert keys.seal_state(b"without", since=keys.erasures()) is not None
    other.close()


@pytest.mark.parametrize("state", [b"", b"{}", b"sealed:1:", b"sealed:1:" + b"x" * 50])
def test_what_is_no_sealed_state_is_none(keys: Keyring, state: bytes) -> None:
    assert keys.unseal_state(state) is None
    keys.seal_state(b"x")
    assert keys.unseal_state(state) is None


def test_nonces_differ_for_what_differs() -> None:
    key = cipher.Key(bytes(64))
    nonces = {key.seal(plain, about)[:12] for plain in (b"", b"a", b"ab") for about in (b"", b"a", b"ab")}
    assert len(nonces) == 9
