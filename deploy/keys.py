"""Key material of an installation: files below the data directory, readable by their owner only.

Promises: an existing key is never replaced, however many processes start at once; a file is there whole or not at
all; a directory that was only half made is completed. Holds the pepper of API keys and two Ed25519 pairs: `artifact`
signs approved versions, `token` signs logins. A host that only checks signatures has the `.pub` files and no `.key`;
nothing is made there that would not fit them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.settings import Settings, SettingsError
from governance.signing import KEY_BYTES, Signer, Verifier

PAIRS = ("artifact", "token")


def pepper_file(data_dir: Path) -> Path:
    """Where the pepper of API keys lies."""
    return data_dir / "keys" / "pepper"


def private_file(data_dir: Path, pair: str) -> Path:
    """Where the private key of a pair lies, as 64 hex digits."""
    return data_dir / "keys" / f"{pair}.key"


def public_file(data_dir: Path, pair: str) -> Path:
    """Where its public key lies, as 64 hex digits."""
    return data_dir / "keys" / f"{pair}.pub"


def init(data_dir: Path) -> list[Path]:
    """Make what is missing; returns the files that were made. Raises SettingsError for a key that cannot be read."""
    (data_dir / "keys").mkdir(parents=True, exist_ok=True, mode=0o700)
    made = []
    if _make(pepper_file(data_dir), secrets.token_hex(32), 0o600):
        made.append(pepper_file(data_dir))
    for pair in PAIRS:
        private, public = private_file(data_dir, pair), public_file(data_dir, pair)
        if not private.exists() and public.exists():
            continue  # the private key is elsewhere, and another one would not fit
        if _make(private, secrets.token_bytes(KEY_BYTES).hex(), 0o600):
            made.append(private)
        # From the file, not from what we wanted to write: another process may have been faster.
        if _make(public, _public_of(_read(private)).hex(), 0o644):
            made.append(public)
    return made


def _make(path: Path, content: str, mode: int) -> bool:
    """Write a new file as a whole; False when there is one already."""
    if path.exists():
        return False
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # fails when the name is taken, as a rename would not
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
    return True


def _public_of(private: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _read(path: Path) -> bytes:
    return _key_bytes(path.read_text().strip(), str(path))


def _key_bytes(value: str, where: str) -> bytes:
    """32 bytes out of 64 hex digits. The error never holds the value."""
    with contextlib.suppress(ValueError):
        if len(key := bytes.fromhex(value)) == KEY_BYTES:
            return key
    raise SettingsError(f"{where} does not hold a key of {KEY_BYTES * 2} hex digits")


def pepper(settings: Settings) -> bytes:
    """The pepper of API keys. Raises SettingsError when there is none."""
    if settings.pepper is not None:
        return settings.pepper.get_secret_value().encode()
    path = pepper_file(settings.data_dir)
    found = path.read_text().strip() if path.exists() else ""
    if not found:
        raise SettingsError("no pepper for API keys; run 'riskfleet keys init' or set RISKFLEET_PEPPER")
    return found.encode()


def artifact_signer(settings: Settings) -> Signer:
    """Signs approvals; for the operator API only. Raises SettingsError when this host has no private key."""
    private = _private(settings, "artifact")
    if private is None:
        raise SettingsError(
            "no private key to sign approvals with; run 'riskfleet keys init' on the operator API's host"
        )
    return Signer(private)


def artifact_verifier(settings: Settings) -> Verifier:
    """Checks approvals by every public key that is set. Raises SettingsError when there is none."""
    publics = _publics(settings.artifact_keys, "RISKFLEET_ARTIFACT_KEYS", settings, "artifact")
    if not publics:
        raise SettingsError(
            "no public key to check approvals with; run 'riskfleet keys init', or set RISKFLEET_ARTIFACT_KEYS to the "
            "content of the operator API's artifact.pub"
        )
    return Verifier(publics)


def token_private(settings: Settings) -> bytes | None:
    """The private key of logins (Ed25519, 32 bytes); None on a host that only checks them."""
    return _private(settings, "token")


def token_publics(settings: Settings) -> list[bytes]:
    """The public keys (32 bytes each) by which a login is accepted; none where nobody can log in."""
    return _publics(settings.token_keys, "RISKFLEET_TOKEN_KEYS", settings, "token")


def _private(settings: Settings, pair: str) -> bytes | None:
    path = private_file(settings.data_dir, pair)
    return _read(path) if path.exists() else None


def _publics(given: str | None, variable: str, settings: Settings, pair: str) -> list[bytes]:
    if given is not None:
        return [_key_bytes(part.strip(), variable) for part in given.split(",") if part.strip()]
    path = public_file(settings.data_dir, pair)
    return [_read(path)] if path.exists() else []
