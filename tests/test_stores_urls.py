"""URLs: what opens a store, what is refused with which sentence, and that no password is ever shown."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilogue import App, BadOption, Unavailable, UnknownScheme, Unsupported, WiringError, open_store
from trilogue.brokers import open_log
from trilogue.stores import redacted


def path_of(url: str) -> str:
    store: Any = open_store(url)
    return str(store.path)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///video.db", "video.db"),
        ("sqlite:////var/lib/app/video.db", "/var/lib/app/video.db"),
        ("sqlite:///../up.db", "../up.db"),
        ("SQLite:///video.db", "video.db"),
        ("  sqlite:///video.db\n", "video.db"),
        ("sqlite:///with space.db", "with space.db"),
        ("sqlite:///with%20space.db", "with space.db"),
        ("sqlite:///a%3Fb%23c%25d.db", "a?b#c%d.db"),
        ("sqlite:///grüße.db", "grüße.db"),
        ("sqlite:///gr%C3%BC%C3%9Fe.db", "grüße.db"),
        ("sqlite:///a@b:c.db", "a@b:c.db"),
        ("sqlite:///video.db?lease_s=2&wal_bytes=1048576", "video.db"),
        ("sqlite:///file:x.db", "file:x.db"),
    ],
)
def test_paths(url: str, path: str) -> None:
    assert path_of(url) == path


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("sqlite:///~/video.db") == f"{tmp_path}/video.db"


def test_options_arrive() -> None:
    store: Any = open_store("sqlite:///a.db?lease_s=2.5&payload_bytes=77&wal_bytes=1048576")
    assert (store.lease_us, store.payload_bytes) == (2_500_000, 77)
    assert store.url == "sqlite:///a.db?lease_s=2.5&payload_bytes=77&wal_bytes=1048576"
    memory: Any = open_store("memory://?lease_s=1")
    assert (memory.lease_us, memory.in_memory) == (1_000_000, True)


def test_nothing_is_made_before_it_is_opened(tmp_path: Path) -> None:
    open_store(f"sqlite:///{tmp_path}/a.db")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "error", "sentence"),
    [
        ("", UnknownScheme, "'': there is no log behind 'no scheme'; expected memory://, sqlite:///file.db or postgresql://"),
        ("video.db", UnknownScheme, "'no scheme'; expected memory://"),
        ("/var/lib/video.db", UnknownScheme, "'no scheme'"),
        ("sqlit:///video.db", UnknownScheme, "did you mean sqlite://"),
        ("sqlite3:///video.db", UnknownScheme, "did you mean sqlite://"),
        ("kafk://h/db", UnknownScheme, "did you mean kafka://"),
        ("mongodb://h/db", UnknownScheme, "no log behind 'mongodb'"),
        ("amqp://h//", Unsupported, "'amqp://h//' is a broker and no store: expected memory://"),
        ("kafka://h1,h2/", Unsupported, "is a broker and no store"),
        ("sqlite://", BadOption, "names no file: write sqlite:///relative.db or sqlite:////absolute/path.db"),
        ("sqlite:///", BadOption, "names no file"),
        ("sqlite:////", BadOption, "names no file"),
        ("sqlite:///folder/", BadOption, "names no file"),
        ("sqlite://video.db", BadOption, "names no file"),
        ("sqlite:video.db", BadOption, "names no file"),
        ("sqlite://host/video.db", BadOption, "names no file"),
        ("sqlite:///:memory:", BadOption, "is no file: write memory://"),
        ("sqlite:///a#b.db", BadOption, "everything after # would be lost; write %23"),
        ("sqlite:///a#", BadOption, "write %23"),
        ("sqlite:///a\nb.db", BadOption, "has a line break or control character in it"),
        ("sqlite:///a\x00b.db", BadOption, "control character"),
        ("sqlite:///a%00b.db", BadOption, "control character in its path"),
        ("sqlite:///a%0Ab.db", BadOption, "control character in its path"),
        ("sqlite:///a%FFb.db", BadOption, "its path cannot be read: 'utf-8' codec"),
        ("sqlite:///~nobody-of-that-name/a.db", BadOption, "its path cannot be read"),
        ("memory://name", BadOption, "a memory:// log has no name"),
        ("memory:///name", BadOption, "a memory:// log has no name"),
        ("sqlite://[::1/a.db", BadOption, "is no URL: check the brackets"),
        ("sqlite:///a.db?leases=1", BadOption, "unknown option 'leases'; there are lease_s, payload_bytes, wal_bytes; lease_s?"),
        ("sqlite:///a.db?what", BadOption, "unknown option 'what'"),
        ("sqlite:///a.db?lease_s=1&lease_s=2", BadOption, "option 'lease_s' is given twice"),
        ("sqlite:///a.db?lease_s=", BadOption, "lease_s='' is out of range: expected 0.1 to 3600"),
        ("sqlite:///a.db?lease_s=0", BadOption, "out of range"),
        ("sqlite:///a.db?lease_s=nan", BadOption, "out of range"),
        ("sqlite:///a.db?lease_s=inf", BadOption, "out of range"),
        ("sqlite:///a.db?lease_s=soon", BadOption, "out of range"),
        ("sqlite:///a.db?payload_bytes=1.5", BadOption, "out of range"),
        ("sqlite:///a.db?payload_bytes=-1", BadOption, "out of range"),
        ("sqlite:///a.db?wal_bytes=1", BadOption, "out of range: expected 1048576 to 35184372088832"),
        ("memory://?what=1", BadOption, "unknown option 'what'"),
        (None, BadOption, "a URL is a text, as 'sqlite:///file.db': this is NoneType"),
        (Path("a.db"), BadOption, "a URL is a text"),
        (b"memory://", BadOption, "a URL is a text"),
    ],
)
def test_refusals(url: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        open_store(url)
    assert isinstance(caught.value, WiringError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://user:sesame@host/v", "amqp://user:***@host/v"),
        ("amqp://:sesame@host/v", "amqp://:***@host/v"),
        ("amqp://user:sesame@h1,h2/v", "amqp://user:***@h1,h2/v"),
        ("amqp://user:ses/ame@host/v", "amqp://user:***@host/v"),
        ("amqp://user:ses@ame@host", "amqp://user:***@host"),
        ("amqp://user:ses?ame@host", "amqp://user:***@host"),
        ("amqp://user:ses#ame@host", "amqp://user:***@host"),
        ("amqp:user:sesame@host", "amqp:user:***@host"),
        ("kafka://host/?sasl_password=sesame&x=1", "kafka://host/?sasl_password=***&x=1"),
        ("kafka://host/?Token=sesame", "kafka://host/?Token=***"),
        ("sqlite:///a@b.db", "sqlite:///a@b.db"),
        ("sqlite:////home/me@work/b.db?lease_s=1", "sqlite:////home/me@work/b.db?lease_s=1"),
        ("memory://", "memory://"),
        ("", ""),
        ("no url", "no url"),
    ],
)
def test_redacted(url: str, shown: str) -> None:
    assert redacted(url) == shown
    assert redacted(shown) == shown


SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=20).map(lambda text: f"S3c{text}r3t")


@given(SECRETS, st.sampled_from(["amqp", "rabitmq", "postgresql", "sqlite", "memory", "kafka", "x"]))
def test_no_password_is_ever_shown(secret: str, scheme: str) -> None:
    url = f"{scheme}://user:{secret}@host:5672/v?nope=1"
    assert secret not in redacted(url)
    with pytest.raises(WiringError) as caught:
        open_log(url)
    assert secret not in str(caught.value)
    assert secret not in repr(caught.value.__cause__)


def refused(url: str) -> str:
    async def main() -> None:
        async with App(url):
            pytest.fail("opened")

    with pytest.raises(Unavailable) as caught:
        asyncio.run(main())
    return str(caught.value)


def test_places_no_database_can_be_at(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("not a database, but long enough to have a header of sixteen bytes\n" * 40)
    assert "does not exist: create it, or use another path in the URL" in refused(f"sqlite:///{tmp_path}/no/a.db")
    assert "is a folder: add a file name to the URL" in refused(f"sqlite:///{tmp_path}/folder")
    assert "text is no SQLite database: use another file" in refused(f"sqlite:///{tmp_path}/text")
    assert "does not exist" in refused(f"sqlite:///{tmp_path}/text/a.db")
    assert (tmp_path / "text").read_text().startswith("not a database")


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()

    async def main() -> None:
        app = App("sqlite:///a.db")
        async with app:
            os.chdir("other")
            assert await app.db("select 1") == [(1,)]
            assert (await app.store.status()).head == 0

    asyncio.run(main())
    assert os.listdir(tmp_path / "other") == []
    assert (tmp_path / "a.db").exists()


def test_odd_names_are_files_like_others(tmp_path: Path) -> None:
    async def main(url: str) -> None:
        async with App(url) as app:
            await app.store.status()

    for name in ("with%20space", "q%3Fx", "h%23x", "p%25x", "gr%C3%BC", "a@b", "'quote", "semi;colon"):
        asyncio.run(main(f"sqlite:///{tmp_path}/{name}"))
    files = {name for name in os.listdir(tmp_path) if not name.endswith(("-lock", "-wal", "-shm"))}
    assert files == {"with space", "q?x", "h#x", "p%x", "grü", "a@b", "'quote", "semi;colon"}
