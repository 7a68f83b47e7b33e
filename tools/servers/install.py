"""What the servers need from outside: Debian packages through apt, Kafka's jars through Maven.

.tools/kafka/4.3.1/*.jar      kept between runs
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from servers.process import ServiceError, run
from servers.state import ROOT

KAFKA = ROOT / "tools" / "kafka.xml"
COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
POLICY = Path("/usr/sbin/policy-rc.d")
LIMIT = 600  # seconds for one download


def packages(names: list[str]) -> None:
    """Install Debian packages without starting the system-wide servers that come with them."""
    if not names:
        return
    wanted = " ".join(names)
    if not shutil.which("apt-get"):
        raise ServiceError(f"no apt-get on this machine: install {wanted} yourself, or give TRILOGUE_…_URL of servers that run.")
    prefix = _as_root(wanted)
    with _no_daemons(prefix):
        apt = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", f"DPkg::Lock::Timeout={LIMIT}"]
        run([*apt, "update"], f"apt-get update failed, so {wanted} cannot be installed", seconds=LIMIT)
        run([*apt, "install", "-y", "--no-install-recommends", *names], f"apt-get could not install {wanted}", seconds=LIMIT)


def kafka_version() -> str:
    """The version of Kafka that tools/kafka.xml asks for."""
    version = ElementTree.parse(KAFKA).findtext("./{*}dependencies/{*}dependency/{*}version")
    assert version
    return version


def kafka_jars() -> Path:
    """The folder with Kafka's jars, fetched when it is not there yet."""
    folder = ROOT / ".tools" / "kafka" / kafka_version()
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
        jars = Path(draft) / "jars"
        # -C: a jar whose checksum is wrong is an error.
        command = ["mvn", "-B", "-q", "-C", "-f", str(KAFKA), COPY, "-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
        run(command, f"Maven could not fetch Kafka {kafka_version()}", seconds=LIMIT)
        jars.replace(folder)
    return folder


def _as_root(wanted: str) -> list[str]:
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True, timeout=30).returncode == 0:
        return ["sudo", "-n"]
    raise ServiceError(
        f"{wanted} must be installed and that takes root: run `sudo apt-get install --no-install-recommends {wanted}` first."
    )


@contextmanager
def _no_daemons(prefix: list[str]) -> Iterator[None]:
    """Debian asks this file before a package may start its server: while we install, the answer is no."""
    if POLICY.exists():
        yield
        return
    with tempfile.NamedTemporaryFile("w") as text:
        text.write("#!/bin/sh\nexit 101\n")
        text.flush()
        run([*prefix, "install", "-m", "755", text.name, str(POLICY)], f"{POLICY} cannot be written")
    try:
        yield
    finally:
        run([*prefix, "rm", "-f", str(POLICY)], f"{POLICY} cannot be removed")
