"""Signatures of approvals: Ed25519 over what was approved, by whom and until when.

Promises: who can write to the database, its owner included, cannot make a version of their own that decides without
the private key. Does not promise more: such a person can still activate an approved version of old, take approvals
away, or set halts, which is what the audit and the backups are for; and defaults of the release are trusted by its own
list, unsigned. Several public keys are accepted at once, so that a key can be changed without a gap. Pure: keys come
from the composition root, times are arguments. Source: RFC 8032.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from contracts.events import canonical_json
from contracts.failures import EncryptionError, InvalidModelStateError

KEY_BYTES: Final = 32
_PURPOSE: Final = b"riskfleet.artifact\0"
"""A signature of something else that the same key may sign one day is never one of an approval."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What an approval vouches for. `tenant` is "*" for what every tenant uses; times are aware."""

    kind: str
    tenant: str
    name: str
    version: int
    digest: str
    author: str
    approver: str
    approved_at: datetime
    valid_until: datetime | None = None

    def signed_bytes(self) -> bytes:
        """The bytes that are signed: canonical JSON, times in UTC with microseconds."""
        fields = {
            "kind": self.kind,
            "tenant": self.tenant,
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "author": self.author,
            "approver": self.approver,
            "approved_at": _exact(self.approved_at),
            "valid_until": None if self.valid_until is None else _exact(self.valid_until),
        }
        return _PURPOSE + canonical_json(fields)

    def __str__(self) -> str:
        return f"{self.kind} {self.name} version {self.version}"


class Signer:
    """Signs with one private key of 32 bytes. Raises EncryptionError for other key material."""

    def __init__(self, private: bytes) -> None:
        if len(private) != KEY_BYTES:
            raise EncryptionError(f"a private key of artifacts has {KEY_BYTES} bytes; run 'riskfleet keys init'")
        self._key = Ed25519PrivateKey.from_private_bytes(private)

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    @property
    def key_id(self) -> str:
        """How signatures of this key are told from others."""
        return key_id(self.public)

    def sign(self, statement: Statement) -> bytes:
        """The signature, 64 bytes; the same statement gives the same one."""
        return self._key.sign(statement.signed_bytes())


class Verifier:
    """Checks signatures by any of some public keys; none at all refuses everything. Raises EncryptionError for no key.

    A key that is taken away makes what it signed unusable: approve those versions anew first.
    """

    def __init__(self, publics: Iterable[bytes]) -> None:
        self._keys = {key_id(public): _public(public) for public in publics}

    def check(self, statement: Statement, named_key: str | None, signature: bytes | None) -> None:
        """Return when the signature is good. Raises InvalidModelStateError that says what is wrong with it."""
        if named_key is None or signature is None:
            raise InvalidModelStateError(f"{statement} is not signed")
        key = self._keys.get(named_key)
        if key is None:
            raise InvalidModelStateError(
                f"{statement} is signed by the key {named_key[:16]}, which is not trusted here"
            )
        try:
            key.verify(signature, statement.signed_bytes())
        except InvalidSignature:
            raise InvalidModelStateError(f"the signature of {statement} does not fit what is registered") from None


def key_id(public: bytes) -> str:
    """The first 16 hex digits of the public key's SHA-256."""
    return hashlib.sha256(public).hexdigest()[:16]


def _public(public: bytes) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(public)
    except ValueError:
        raise EncryptionError(f"a public key has {KEY_BYTES} bytes (64 hex digits)") from None


def _exact(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="microseconds")
