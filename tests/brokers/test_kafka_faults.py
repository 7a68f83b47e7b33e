"""A Kafka of one's own to hurt: killed under load, frozen, with passwords and TLS."""

import asyncio
import datetime
import ipaddress
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kafka_tools import happened, kafka, numbers, publish, readers, receive, run
from servers import process, sets
from services import own_servers

from trilogue.brokers import open_broker
from trilogue.brokers.kafka.broker import Kafka
from trilogue.errors import LogError, OutcomeUnknown, Unavailable
from trilogue.events import Envelope, Receipt

BACK_S = 60.0  # long before that, after its port is back, every consumer has to consume again


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """The folder of a Kafka of one's own."""
    with own_servers(tmp_path, "kafka"):
        yield tmp_path


def url_of(home: Path) -> str:
    return sets.running(home)["kafka"]["url"]


async def keep_publishing(broker: Kafka, stored: list[Envelope], stop: asyncio.Event) -> None:
    """Publish until told to stop; what is not confirmed is published again with the same id."""
    n = 0
    while not stop.is_set():
        left = [happened(n + each) for each in range(50)]
        n += 50
        while left:
            outcomes = await broker.publish(left)
            assert all(isinstance(outcome, (Receipt, OutcomeUnknown)) for outcome in outcomes)
            stored += [each for each, outcome in zip(left, outcomes, strict=True) if isinstance(outcome, Receipt)]
            left = [each for each, outcome in zip(left, outcomes, strict=True) if isinstance(outcome, LogError)]
        await asyncio.sleep(0.01)


async def keep_consuming(broker: Kafka, group: str, seen: dict[str, int], beat: dict[str, float]) -> None:
    while True:
        deliveries = await broker.receive(group, limit=200, wait_s=0.5)
        for delivery in deliveries:
            seen[delivery.record.id] = seen.get(delivery.record.id, 0) + 1
        if deliveries:
            beat[group] = time.monotonic()
            await broker.acknowledge(group, deliveries)


@pytest.mark.processes
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_broker_that_is_killed_and_comes_back(home: Path, protocol: str) -> None:
    async def main() -> None:
        groups = [readers(f"g{n}") for n in range(3)]
        async with kafka(f"{url_of(home)}?protocol={protocol}&timeout_s=60&retries=3", *groups) as broker:
            stored: list[Envelope] = []
            seen: dict[str, dict[str, int]] = {group.name: {} for group in groups}
            beat: dict[str, float] = {}
            stop = asyncio.Event()
            consuming = [asyncio.create_task(keep_consuming(broker, each.name, seen[each.name], beat)) for each in groups]
            publishing = asyncio.create_task(keep_publishing(broker, stored, stop))
            while len(stored) < 1_000:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(sets.kill, home, "kafka")
            await asyncio.to_thread(sets.start, home, "kafka")
            back = time.monotonic()
            while any(beat.get(group.name, 0) < back for group in groups):
                assert time.monotonic() - back < BACK_S, "a group does not consume again"
                await asyncio.sleep(0.05)
            stop.set()
            await publishing
            ids = {each.id for each in stored}
            until = time.monotonic() + 60
            while any(ids - found.keys() for found in seen.values()) and time.monotonic() < until:
                await asyncio.sleep(0.1)
            assert all(not ids - found.keys() for found in seen.values()), "something that was confirmed was lost"
            for task in consuming:
                task.cancel()
            await asyncio.gather(*consuming, return_exceptions=True)

    run(main())


@pytest.mark.processes
def test_closing_is_bounded_while_the_broker_stands_still(home: Path) -> None:
    async def main() -> None:
        broker = open_broker(f"{url_of(home)}?timeout_s=60")
        assert isinstance(broker, Kafka)
        await broker.open()
        await broker.bind([readers()])
        await publish(broker, [happened(0)])
        await broker.acknowledge("readers", await receive(broker, 1))
        await asyncio.to_thread(sets.freeze, home, "kafka")
        try:
            publishing = asyncio.create_task(broker.publish([happened(1), happened(2)]))
            await asyncio.sleep(0.1)
            await asyncio.wait_for(broker.close(), 60)
            assert all(isinstance(outcome, OutcomeUnknown) for outcome in await publishing)
        finally:
            await asyncio.to_thread(sets.thaw, home, "kafka")

    run(main())


# ── passwords and TLS ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """A Kafka that asks for a user: its plain address, its address with TLS, the authority that signed its certificate."""
    home = tmp_path_factory.mktemp("guarded")
    with own_servers(home, "kafka") as mine:
        open_url = mine["kafka"]["url"]
        sets.stop(home, "kafka")
        plain, tls = process.free_ports(2)
        certificate = self_signed(home)
        _guard(home / "kafka" / "server.properties", open_url, plain, tls, certificate)
        sets.start(home, "kafka")
        admin = AdminClient({"bootstrap.servers": open_url.removeprefix("kafka://")})
        credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion("bob", credential, b"bobs secret")
        admin.alter_user_scram_credentials([change])["bob"].result(30)
        yield f"127.0.0.1:{plain}", f"127.0.0.1:{tls}", certificate


def _guard(file: Path, open_url: str, plain: int, tls: int, certificate: Path) -> None:
    listeners = next(line for line in file.read_text().splitlines() if line.startswith("listeners="))
    controllers = "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,GUARDED:SASL_PLAINTEXT,TLS:SASL_SSL"
    login = 'org.apache.kafka.common.security.{} required user_ann="anns secret";'
    file.write_text(
        f"""{file.read_text()}
{listeners},GUARDED://127.0.0.1:{plain},TLS://127.0.0.1:{tls}
advertised.listeners=PLAINTEXT://{open_url.removeprefix("kafka://")},GUARDED://127.0.0.1:{plain},TLS://127.0.0.1:{tls}
{controllers}
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512
listener.name.guarded.plain.sasl.jaas.config={login.format("plain.PlainLoginModule")}
listener.name.tls.plain.sasl.jaas.config={login.format("plain.PlainLoginModule")}
listener.name.guarded.scram-sha-512.sasl.jaas.config={login.format("scram.ScramLoginModule")}
listener.name.tls.scram-sha-512.sasl.jaas.config={login.format("scram.ScramLoginModule")}
ssl.keystore.type=PEM
ssl.keystore.location={certificate.with_name("server.pem")}
"""
    )


def self_signed(folder: Path) -> Path:
    """A certificate for this machine that vouches for itself; its key and itself beside it as server.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(secret + certificate)
    (folder / "ca.pem").write_bytes(certificate)
    return folder / "ca.pem"


@pytest.mark.processes
@pytest.mark.parametrize("login", ["ann:anns%20secret@", "bob:bobs%20secret@"])
@pytest.mark.parametrize("tls", [False, True])
def test_users_with_their_password_come_in(guarded: tuple[str, str, Path], login: str, tls: bool) -> None:
    mechanism = "PLAIN" if login.startswith("ann") else "SCRAM-SHA-512"
    scheme, address = ("kafka+ssl", guarded[1]) if tls else ("kafka", guarded[0])
    url = f"{scheme}://{login}{address}?mechanism={mechanism}" + (f"&ca={guarded[2]}" if tls else "")

    async def main() -> None:
        group = readers(f"g{tls}{mechanism}", "video.*", start="now")
        async with kafka(url, group) as broker:
            await publish(broker, [happened(1)])
            assert numbers(await receive(broker, 1, group.name)) == [1]

    run(main())


@pytest.mark.processes
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("kafka://ann:wrong@{plain}", "refuses us"),
        ("kafka://bob:wrong@{plain}?mechanism=SCRAM-SHA-512", "refuses us"),
        ("kafka+ssl://ann:anns%20secret@{tls}", "refuses us"),  # nobody we trust vouches for its certificate
    ],
)
def test_who_is_refused_is_told_at_once(guarded: tuple[str, str, Path], url: str, says: str) -> None:
    at = url.format(plain=guarded[0], tls=guarded[1])

    async def main() -> None:
        began = time.monotonic()
        with pytest.raises(Unavailable, match=says) as told:
            await open_broker(f"{at}{'&' if '?' in at else '?'}connect_timeout_s=60").open()
        assert "wrong" not in str(told.value)
        assert "secret" not in str(told.value)
        assert time.monotonic() - began < 30  # and not after the time an absent server is given

    run(main())
