"""A throw-away Kafka: one KRaft node that is broker and controller, with half a gigabyte of heap."""

import base64
import os
import shutil
import signal
import socket
import struct
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from servers import install
from servers.process import Process, free_ports, kill, run
from servers.state import Service

PACKAGES = ["default-jre-headless", "maven"]
STOP = signal.SIGTERM
# One copy of everything; sessions and rebalances as short as tests need them. The broker's own session is short, because a
# broker that was killed may come back only when its last session is over.
CONFIG = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
group.consumer.min.session.timeout.ms=1000
group.consumer.session.timeout.ms=6000
group.consumer.min.heartbeat.interval.ms=100
group.consumer.heartbeat.interval.ms=500
"""
LOGGING = """\
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %m (%c)%n
rootLogger.level=INFO
rootLogger.appenderRef.out.ref=out
"""
METADATA_V0 = struct.pack(">ihhihi", 14, 3, 0, 1, -1, 0)


def missing() -> list[str]:
    """The Debian packages that have to be installed first."""
    return [package for package, program in zip(PACKAGES, ("java", "mvn"), strict=True) if not shutil.which(program)]


def prepare(home: Path) -> Service:
    """An empty, formatted log folder and how the server is started on it."""
    jars = install.kafka_jars()
    home.mkdir(parents=True)
    port, controller = free_ports(2)
    (home / "server.properties").write_text(CONFIG.format(port=port, controller=controller, data=home / "data"))
    (home / "log4j2.properties").write_text(LOGGING)
    java = ["java", "-Xmx512m", "-cp", f"{jars}/*", f"-Dlog4j2.configurationFile={home}/log4j2.properties"]
    cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[:22]
    layout = [*java, "kafka.tools.StorageTool", "format", "-c", f"{home}/server.properties", f"--cluster-id={cluster}"]
    run(layout, "Kafka could not format its log folder")
    process = Process(
        argv=[*java, "kafka.Kafka", f"{home}/server.properties"],
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
        user=None,
        folder=str(home),
        log=str(home / "server.log"),
        pid=0,
        started=0,
    )
    url = f"kafka://127.0.0.1:{port}"
    return Service(url=url, admin=None, version=install.kafka_version(), home=str(home), processes=[process])


def discard(service: Service) -> None:
    """End it for good."""
    kill(service["processes"][-1])


def answers(service: Service) -> bool:
    """Whether it says within two seconds that a broker takes part (it listens a little earlier than that)."""
    address = urlsplit(service["url"])
    try:
        with socket.create_connection((address.hostname, address.port), 2) as connection:
            connection.sendall(METADATA_V0)
            head = connection.recv(12, socket.MSG_WAITALL)
    except OSError:
        return False
    return len(head) == 12 and struct.unpack(">iii", head)[2] > 0
