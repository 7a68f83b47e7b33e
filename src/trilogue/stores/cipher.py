"""How a value is sealed with a key: AES-256-GCM, and what that looks like as a text.

    b'"a@example.org"'  ──key of u7, event and field──▶  "sealed:1:dTc:W3qx…"      subject u7, nonce and ciphertext, in base64url

It opens with the same key, for the same event and field only. The nonce is a keyed hash of what is sealed and where: no two
values share one, and sealing the same event again gives the same bytes. A random one would make of every repeated publish,
and of what a handler emits when it runs again, an event with other content.
"""

import base64
import binascii
import hmac
from functools import lru_cache
from typing import Any

from trilogue.errors import DecodeError, Unsupported
from trilogue.sealing import PREFIX

KEY_BYTES = 64
NONCE_BYTES = 12
_STANDARD = str.maketrans("-_", "+/")


class Key:
    """The key of one person."""

    __slots__ = ("_cipher", "_invalid", "_nonces")

    def __init__(self, key: bytes) -> None:
        """key: KEY_BYTES, 32 to seal with and 32 to make nonces with."""
        aes_gcm, self._invalid = cryptography()
        self._cipher = aes_gcm(key[:32])
        self._nonces = key[32:]

    def seal(self, plain: bytes, about: bytes) -> bytes:
        """Nonce and ciphertext."""
        nonce = hmac.digest(self._nonces, len(about).to_bytes(8, "big") + about + plain, "sha256")[:NONCE_BYTES]
        return nonce + bytes(self._cipher.encrypt(nonce, plain, about))

    def unseal(self, sealed: bytes, about: bytes) -> bytes | None:
        """The plain bytes; None if they were not sealed like this."""
        try:
            return bytes(self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], about))
        except (self._invalid, ValueError):
            return None


def cryptography() -> tuple[Any, type[Exception]]:
    """The cipher and its error; raises Unsupported where the package is not installed."""
    # Imported with the first key: who seals nothing need not have it.
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise Unsupported(
            "personal data is sealed with the package cryptography, which is not installed: pip install 'trilogue[privacy]'"
        ) from error
    return AESGCM, InvalidTag


# ── sealed values as text ────────────────────────────────────────────────────────────────────────────────────────────


def joined(subject: str, value: bytes) -> str:
    """A sealed value as one text."""
    return f"{PREFIX}{_encoded(subject.encode())}:{_encoded(value)}"


def _encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def parted(sealed: str) -> tuple[str, bytes]:
    """Whose it is, and the nonce and ciphertext; raises DecodeError."""
    head, _, text = sealed.rpartition(":")
    try:
        subject = _subject(head)
        value = binascii.a2b_base64(text.translate(_STANDARD) + "=" * (-len(text) % 4))
    except ValueError as error:
        raise DecodeError("a sealed value is not complete: expected sealed:1:SUBJECT:VALUE as it was written") from error
    # Written in one way only: base64 has bits that mean nothing, and passes over what it does not know.
    if _encoded(value) != text:
        raise DecodeError("a sealed value was changed: expected sealed:1:SUBJECT:VALUE as it was written")
    return subject, value


@lru_cache(maxsize=10_000)
def _subject(head: str) -> str:
    text = head.removeprefix(PREFIX)
    subject = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    if head != f"{PREFIX}{_encoded(subject.encode())}":
        raise ValueError(head)
    return subject
