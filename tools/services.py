"""Real servers for tests, by command. Needs Python 3.11 and nothing else; installs what is missing through apt and Maven.

    python3 tools/services.py up [NAME …]            start what does not run, print the URLs
    python3 tools/services.py down [NAME …]          end exactly what `up` started, remove its files
    python3 tools/services.py run COMMAND …          up, the command, down again (what ran before goes on)
    python3 tools/services.py start|stop|restart|kill|freeze|thaw NAME …

NAME is postgresql, rabbitmq, kafka or pgbouncer (before that PostgreSQL); none means all. A server whose URL is in the
environment (TRILOGUE_POSTGRESQL_URL, TRILOGUE_RABBITMQ_URL and so on) is used and not started. `--home FOLDER` (or
TRILOGUE_SERVICES) names another set than that in .services/.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from servers import process, sets, state
from servers.process import ServiceError

PORTS = {"postgresql": 5432, "rabbitmq": 5672, "kafka": 9092, "pgbouncer": 6432}
STEPS: dict[str, list[Callable[[Path, str], object]]] = {
    "start": [sets.start],
    "stop": [sets.stop],
    "restart": [sets.stop, sets.start],
    "kill": [sets.kill],
    "freeze": [sets.freeze],
    "thaw": [sets.thaw],
}


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; the exit code."""
    options = _parser().parse_args(arguments)
    home = Path(options.home).resolve()
    try:
        if options.command == "run":
            return run(home, options.rest[1:] if options.rest[:1] == ["--"] else options.rest)
        _command(home, options.command, options.names or sets.NAMES)
    except ServiceError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def up(home: Path, names: Sequence[str]) -> None:
    """Start what is not given by the environment, and print where everything is."""
    given = {name: os.environ[variable(name)] for name in names if os.environ.get(variable(name))}
    for name, url in given.items():
        _check(name, url)
        print(f"{name:<11} {'(given)':<9} {_address(name, url)}", flush=True)
    wanted = [name for name in names if name not in given]
    for name, service in (sets.up(home, wanted) if wanted else {}).items():
        print(f"{name:<11} {service['version']:<9} {service['url']}", flush=True)


def run(home: Path, command: Sequence[str]) -> int:
    """Run a command while all servers are up, and take down those that were not up before; the command's exit code.

    Where CI is not set, a server that cannot be started is no reason not to run it: the tests that need it are skipped.
    """
    before = sets.running(home)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        try:
            up(home, sets.NAMES)
        except ServiceError as error:
            if os.environ.get("CI"):
                raise
            print(f"{error}\nTests that need this server will be skipped.", file=sys.stderr, flush=True)
        # An interrupt is the command's to handle: we wait for it. A handler, unlike SIG_IGN, is not inherited by it.
        signal.signal(signal.SIGINT, lambda *_: None)
        return _call(command)
    finally:
        sets.down(home, [name for name in sets.NAMES if name not in before])


def variable(name: str) -> str:
    """The variable that gives a server's URL."""
    return f"TRILOGUE_{name.upper()}_URL"


def _command(home: Path, command: str, names: Sequence[str]) -> None:
    if command == "up":
        return up(home, names)
    if command == "down":
        return sets.down(home, names)
    for name in names:
        for step in STEPS[command]:
            step(home, name)
    return None


def _call(command: Sequence[str]) -> int:
    try:
        return subprocess.run(command).returncode
    except (OSError, IndexError) as error:
        raise ServiceError(f"run: {' '.join(command) or 'no command'} cannot be started: {error}") from None


def _check(name: str, url: str) -> None:
    address = urlsplit(url)
    try:
        host, port = address.hostname or "127.0.0.1", address.port or PORTS[name]
    except ValueError:
        raise ServiceError(f"{variable(name)}: its port is not a number from 1 to 65535.") from None
    if not process.listens(host, port):
        raise ServiceError(
            f"{variable(name)} names {host}:{port}, and nobody answers there. "
            f"Start that server, or unset {variable(name)} to have a throw-away one."
        )


def _address(name: str, url: str) -> str:
    """A URL without user and password."""
    address = urlsplit(url)
    return f"{address.scheme}://{address.hostname}:{address.port or PORTS[name]}{address.path}"


def _name(text: str) -> str:
    if text not in sets.NAMES:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(sets.NAMES)}")
    return text


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in ("up", "down", *STEPS):
        one = commands.add_parser(command)
        one.add_argument("names", nargs="*" if command in ("up", "down") else "+", type=_name, metavar="NAME")
        one.add_argument("--home", default=state.default_home())
    one = commands.add_parser("run")
    one.add_argument("--home", default=state.default_home())
    one.add_argument("rest", nargs=argparse.REMAINDER, metavar="COMMAND")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
