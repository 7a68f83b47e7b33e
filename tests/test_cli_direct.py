"""Commands on a broker alone, from a process that has bound nothing: RabbitMQ lists no groups, so that one is named."""

import asyncio
from dataclasses import dataclass

import pytest
from services import rabbitmq_vhost

from trilogue import App, Retry, event
from trilogue.cli.main import main

Captured = pytest.CaptureFixture[str]


@event("video.watched", key="user")
@dataclass(frozen=True)
class Watched:
    user: str


def fail(url: str, *users: str) -> None:
    """Let each of these become a dead letter of group badge."""
    app = App(url, store=None)

    @app.on(group="badge", retry=Retry(1), order=None)
    async def badge(e: Watched) -> None:
        raise ValueError("no")

    async def go() -> None:
        async with app.running():
            for user in users:
                await app.publish(Watched(user))
            await app.wait_idle(timeout=30)

    asyncio.run(go())


def said(capsys: Captured, url: str, *args: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main([*args, "--url", url, "--store", "none"]) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    return err if code else out


def test_a_group_that_is_named_is_found(capsys: Captured) -> None:
    with rabbitmq_vhost() as url:
        fail(url, "u1", "u2", "u3")
        assert said(capsys, url, "dead", "list", "--group", "badge").count("video.watched") == 3
        assert "1 dropped" in said(capsys, url, "dead", "drop", _first(capsys, url), "--group", "badge", "--yes")
        assert "2 will be handled again" in said(capsys, url, "dead", "redrive", "--all", "--group", "badge")
        assert said(capsys, url, "dead", "list", "--group", "badge") == "no dead letters\n"
        fail(url)
        assert "2 dropped" in said(capsys, url, "dead", "drop", "--all", "--group", "badge", "--yes")
        assert said(capsys, url, "groups", "drop", "badge", "--yes") == "group badge: dropped\n"
        assert "no group 'badge'" in said(capsys, url, "groups", "drop", "badge", "--yes", code=2)


def _first(capsys: Captured, url: str) -> str:
    return said(capsys, url, "dead", "list", "--group", "badge").splitlines()[1].split()[0]


@pytest.mark.parametrize("command", ["dead list", "dead redrive --all", "dead drop --all --yes", "groups list"])
def test_groups_that_nobody_lists_have_to_be_named(command: str, capsys: Captured) -> None:
    with rabbitmq_vhost() as url:
        assert "does not list its groups: name one with --group" in said(capsys, url, *command.split(), code=2)


def test_a_slip_is_told(capsys: Captured) -> None:
    with rabbitmq_vhost() as url:
        for command in ("dead list --group bagde", "dead redrive --all --group bagde", "groups drop bagde --yes"):
            assert "no group 'bagde'" in said(capsys, url, *command.split(), code=2)
