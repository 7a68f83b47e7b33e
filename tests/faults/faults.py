"""What is done to the servers, the connections and the processes; each with the URLs it makes sense for.

Every fault is a function of a Scene under load. It says when it is over (`healed`), and from then on the time counts.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from confluent_kafka.admin import AdminClient
from crew import until
from places import LEASE_S, Site, broker_of, database_of
from scene import Result, Scene, judged, scene
from servers import sets
from services import rabbitmq_api

FROZEN_S = 10.0
RSS_MB = 400  # of a worker, however much waits
GROUPS_OF_THE_BROKER = ("ordered", "any", "effect", "emitting", "echo")


def anywhere(name: str) -> bool:
    """Of faults that hurt processes."""
    return True


def has_broker(name: str) -> bool:
    """Of faults that hurt a broker."""
    return broker_of(name) is not None


def has_database(name: str) -> bool:
    """Of faults that hurt PostgreSQL."""
    return database_of(name) is not None


def has_server(name: str) -> bool:
    """Of faults that hurt connections."""
    return has_broker(name) or has_database(name)


@dataclass(frozen=True)
class Fault:
    """A fault by name. suits: whether there is anything to hurt at a URL. proxied: through TCP proxies.

    under_load: act(scene) is called in the midst of the workload; otherwise act(scene, name) is the whole run.
    """

    name: str
    act: Callable[..., Any]
    suits: Callable[[str], bool] = anywhere
    proxied: bool = False
    under_load: bool = True


def nothing(s: Scene) -> None:
    """The control: without a fault there is no repetition at all."""
    s.sleep(3, 4)


# ── servers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def kill_broker(s: Scene) -> None:
    """kill -9 and a start, twice, under load."""
    for _ in range(2):
        _kill(s, s.broker)


def kill_database(s: Scene) -> None:
    """The same with PostgreSQL."""
    for _ in range(2):
        _kill(s, s.database)


def _kill(s: Scene, server: str | None) -> None:
    assert server is not None
    with s.interruption():
        sets.kill(s.site.home, server)
        s.sleep(0.5, 3)
        sets.start(s.site.home, server)
    s.healed()


def freeze_broker(s: Scene) -> None:
    """SIGSTOP: connections stay open and nothing answers."""
    _freeze(s, s.broker)


def freeze_database(s: Scene) -> None:
    """The same with PostgreSQL."""
    _freeze(s, s.database)


def _freeze(s: Scene, server: str | None) -> None:
    assert server is not None
    with s.interruption():
        sets.freeze(s.site.home, server)
        time.sleep(FROZEN_S)
        sets.thaw(s.site.home, server)
    s.healed()


# ── connections ──────────────────────────────────────────────────────────────────────────────────────────────────────


def cut_connections(s: Scene) -> None:
    """All connections to one server at once, at a random byte of one or at a random moment, five times."""
    for _ in range(5):
        proxy = s.site.proxies[s.chance.choice(s.site.names)]
        with s.interruption():
            if s.chance.random() < 0.5:
                proxy.cut_after(s.chance.randint(1, 20_000))
                s.sleep(0.2, 1)
            proxy.cut()
        s.sleep(0.2, 1.5)
    s.healed()


def cut_before_the_answer(s: Scene) -> None:
    """The server hears and does what it is told; its answers are thrown away, and then the connections are cut."""
    for server in [name for name in (s.broker, s.database) if name] * 2:
        proxy = s.site.proxies[server]
        with s.interruption():
            proxy.deafen()
            s.sleep(0.2, 1)
            proxy.cut()
            proxy.mend()
        s.sleep(0.5, 1.5)
    s.healed()


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def kill_processes(s: Scene) -> None:
    """kill -9 of a worker or a publisher each second, and its start."""
    for _ in range(6):
        s.sleep(0.5, 1.5)
        args = s.chance.choice([*s.crew.alive("work"), *s.crew.alive("publish")])
        with s.interruption(s.crew.running[args].pid):
            s.crew.kill(args)
            if args[0] == "work":
                s.start_worker(int(args[1]))
            else:
                s.crew.start(*args)
    s.healed()


def freeze_worker(s: Scene) -> None:
    """A worker sleeps past its lease and wakes as a zombie, while another has taken over."""
    process = s.crew.running[s.chance.choice(s.crew.alive("work"))]
    with s.interruption(process.pid):
        until(lambda: _sleeps(s, process.pid), "the worker is stopped while it holds no lock")
        time.sleep(max(FROZEN_S, LEASE_S * 2))
        process.send_signal(signal.SIGCONT)
    s.healed()


def _sleeps(s: Scene, pid: int) -> bool:
    """A process stopped inside a transaction of SQLite stops everybody who writes: that is how files are, and not looked at."""
    worker = next(process for process in s.crew.running.values() if process.pid == pid)
    worker.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    lock = s.folder / "faults.db-lock"
    if not lock.exists() or _is_free(lock):
        return True
    worker.send_signal(signal.SIGCONT)
    return False


def _is_free(path: Path) -> bool:
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def storm(s: Scene) -> None:
    """Workers join, leave and are killed every second, so that there is always a rebalance."""
    spare = s.workers
    for _ in range(8):
        s.sleep(0.5, 1.5)
        alive = s.crew.alive("work")
        with s.interruption():
            if len(alive) < 2 or (len(alive) < 4 and s.chance.random() < 0.5):
                s.start_worker(spare)
                spare += 1
            else:
                s.crew.kill(s.chance.choice(alive), s.chance.choice((signal.SIGKILL, signal.SIGTERM)))
    if not s.crew.alive("work"):
        s.start_worker(spare)
    s.healed()


# ── the brokers' own ways to fail ────────────────────────────────────────────────────────────────────────────────────


def delete_queues(s: Scene) -> None:
    """Somebody deletes the queues, or the topics, while they are read: what was in them is gone, what follows is not."""
    with s.interruption():
        delete = _delete_rabbitmq_queues if s.broker == "rabbitmq" else _delete_kafka_topics
        delete(s.place["url"])
    s.healed()
    s.excused_until = time.monotonic_ns()


def _delete_rabbitmq_queues(url: str) -> None:
    vhost = urlsplit(url).path.removeprefix("/")
    for group in GROUPS_OF_THE_BROKER:
        rabbitmq_api("DELETE", f"/api/queues/{vhost}/{group}")


def _delete_kafka_topics(url: str) -> None:
    prefix = dict(parse_qsl(urlsplit(url).query))["prefix"]
    admin = AdminClient({"bootstrap.servers": urlsplit(url).netloc})
    topics = [topic for topic in admin.list_topics(timeout=10).topics if topic.startswith(prefix)]
    for deleted in admin.delete_topics(topics, request_timeout=10).values():
        deleted.result(15)


def memory_alarm(s: Scene) -> None:
    """RabbitMQ takes no publishes; what is there is handled all the same."""
    with s.interruption():
        _rabbitmqctl(s, "set_vm_memory_high_watermark", "0")
        time.sleep(6)
        _rabbitmqctl(s, "set_vm_memory_high_watermark", "absolute", "1GB")
    s.healed()


def _rabbitmqctl(s: Scene, *command: str) -> None:
    server = s.site.services["rabbitmq"]["processes"][-1]
    program = Path(server["argv"][0]).with_name("rabbitmqctl")
    node = server["env"]["RABBITMQ_NODENAME"]
    subprocess.run([program, "-q", "-n", node, *command], env=server["env"], check=True, capture_output=True, timeout=60)


# ── without the load ─────────────────────────────────────────────────────────────────────────────────────────────────


def wrong_password(s: Scene, fault: str) -> Result:
    """A worker with a wrong password ends at once, with a sentence, and shows no password."""
    wrong = {name: _with_password(url, "not-the-secret") for name, url in s.place.items() if name in ("url", "store") and url}
    (s.folder / "place.json").write_text(json.dumps(s.place | wrong))
    (s.folder / "denied.py").write_text(DENIED)
    command = [sys.executable, "-m", "trilogue", "run", "denied:app"]
    began = time.monotonic()
    ended = subprocess.run(command, cwd=s.folder, capture_output=True, text=True, timeout=60, check=False)
    said = ended.stdout + ended.stderr
    trouble = [
        *(["exit code 0"] if ended.returncode == 0 else []),
        *(["a traceback"] if "Traceback" in said else []),
        *(["a password is shown"] if "not-the-secret" in said else []),
        *([] if "password" in said.lower() or "credential" in said.lower() else [f"it does not say why: {said[-300:]}"]),
    ]
    return Result(fault, s.name, recovery_s=time.monotonic() - began, trouble=tuple(trouble))


def _with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    if parts.username is None:
        return url
    return parts._replace(netloc=f"{parts.username}:{password}@{parts.hostname}:{parts.port}").geturl()


DENIED = """
import json
from pathlib import Path
from trilogue import App, Record
place = json.loads(Path("place.json").read_text())
app = App(place["url"], **({"store": place["store"]} if place["store"] else {}))
@app.on("#", group="denied")
async def handle(record: Record) -> None: ...
"""


def long_queue(s: Scene, fault: str) -> Result:
    """A group with very many records waiting, and one worker: all are handled, and memory stays what it is with few."""
    count = int(os.environ.get("FAULTS_WAITING", 50_000))
    for role in ("hoard", "drain"):
        code = s.crew.start(role, str(count)).wait(1_800)
        assert code == 0, s.crew.log(role)[-2_000:]
    found = json.loads((s.folder / "drained.json").read_text())
    trouble = [f"{found['rss_mb']} MB of memory: at most {RSS_MB}"] if found["rss_mb"] > RSS_MB else []
    trouble += [f"{found[what]} {what}" for what in ("lost", "repeated") if found[what]]
    return Result(
        fault,
        s.name,
        stored=count,
        lost=found["lost"],
        repeated=found["repeated"],
        recovery_s=found["seconds"],
        rss_mb=found["rss_mb"],
        trouble=tuple(trouble),
    )


FAULTS = (
    Fault("none", nothing),
    Fault("broker killed", kill_broker, has_broker),
    Fault("database killed", kill_database, has_database),
    Fault("broker frozen", freeze_broker, has_broker),
    Fault("database frozen", freeze_database, has_database),
    Fault("connections cut", cut_connections, has_server, proxied=True),
    Fault("cut before the answer", cut_before_the_answer, has_server, proxied=True),
    Fault("processes killed", kill_processes),
    Fault("worker frozen", freeze_worker),
    Fault("workers come and go", storm),
    Fault("queues deleted", delete_queues, has_broker),
    Fault("memory alarm", memory_alarm, lambda name: broker_of(name) == "rabbitmq"),
    Fault("wrong password", wrong_password, lambda name: name in ("postgresql", "amqp+sqlite"), under_load=False),
    Fault("long queue", long_queue, under_load=False),
)


def run(fault: Fault, name: str, site: Site, folder: Path, seed: str, **more: Any) -> Result:
    """One fault at one URL, from the first publish to the verdict."""
    with scene(site, name, folder, f"{seed}/{fault.name}/{name}", proxied=fault.proxied, **more) as s:
        if not fault.under_load:
            return fault.act(s, fault.name)
        s.begin()
        fault.act(s)
        return judged(s, fault.name, s.end())


def fault_named(name: str) -> Fault:
    """The fault of this name."""
    return next(fault for fault in FAULTS if fault.name == name)
