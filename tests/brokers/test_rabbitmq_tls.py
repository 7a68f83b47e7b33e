"""amqps://: the server's certificate is checked, and closing over TLS hands back as without it."""

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from amqp import envelopes, numbers, opened, published, taken
from common import run
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from services import rabbitmq_vhost

from trilogue import Unavailable
from trilogue.brokers import open_broker
from trilogue.events import Group

READERS = Group("readers", ("video.#",))


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"


@asynccontextmanager
async def _tls_before(url: str, folder: Path) -> AsyncIterator[str]:
    """The URL of a server that takes the TLS off before RabbitMQ."""
    parts = urlsplit(url)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*_certificate(folder))
    tasks: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65_536):
                writer.write(piece)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(parts.hostname, parts.port)
        tasks.update((asyncio.create_task(copy(reader, back)), asyncio.create_task(copy(there, writer))))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"amqps://{parts.username}:{parts.password}@127.0.0.1:{port}{parts.path}"
    finally:
        server.close()
        await server.wait_closed()
        if tasks:
            await asyncio.wait(tasks, timeout=10)


def test_over_tls_everything_is_as_without(tmp_path: Path) -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with _tls_before(url, tmp_path) as secure:
                async with opened(f"{secure}?ca={tmp_path}/cert.pem", READERS) as broker:
                    await published(broker, envelopes(300))
                    got = await taken(broker, "readers", 200)
                    await broker.acknowledge("readers", got[:150])
                async with opened(f"{secure}?ca={tmp_path}/cert.pem", READERS) as broker:
                    assert numbers(await taken(broker, "readers", 150)) == list(range(150, 300))

    run(main())


def test_a_certificate_nobody_vouches_for_is_refused_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url:
            async with _tls_before(url, tmp_path) as secure:
                with pytest.raises(Unavailable, match=r"no TLS with.*\?ca="):
                    await open_broker(secure).open()

    run(main())


def test_a_server_without_tls_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        with rabbitmq_vhost() as url, pytest.raises(Unavailable, match="TLS"):
            await open_broker(url.replace("amqp://", "amqps://") + "?connect_timeout_s=2").open()

    run(main())
