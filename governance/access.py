"""API keys as pure functions: how one is made, what is stored of it, and how a presented one is compared.

A key is `rfk_<12 hex>_<43 url-safe characters>`: a public prefix that finds the row, and 256 random bits. Only
HMAC-SHA-256(pepper, secret) is stored, so a copy of the table opens nothing. Randomness comes from the caller.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass, field
from typing import Final

KEY_BYTES: Final = 38
"""How many random bytes a key is made of: 6 for its public prefix, 32 for its secret."""

_KEY: Final = re.compile(r"(rfk_[0-9a-f]{12})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """The two parts of a key that somebody presents."""

    key_id: str
    secret: str = field(repr=False)


def new_api_key(token_bytes: bytes, pepper: bytes) -> tuple[str, str, bytes]:
    """A key from 38 random bytes: (the key to show once, its public id, the MAC to store).

    Raises ValueError for another number of bytes.
    """
    if len(token_bytes) != KEY_BYTES:
        raise ValueError(f"an API key is made of {KEY_BYTES} random bytes, not {len(token_bytes)}")
    key_id = f"rfk_{token_bytes[:6].hex()}"
    secret = base64.urlsafe_b64encode(token_bytes[6:]).rstrip(b"=").decode()
    return f"{key_id}_{secret}", key_id, mac_of(secret, pepper)


def mac_of(secret: str, pepper: bytes) -> bytes:
    """What is stored of a secret."""
    return hmac.new(pepper, secret.encode(), hashlib.sha256).digest()


def parse_api_key(api_key: str) -> PresentedKey | None:
    """The parts of a presented key; None when it is not formed like one."""
    match = _KEY.fullmatch(api_key)
    return PresentedKey(match[1], match[2]) if match else None


def matches(presented: PresentedKey, mac: bytes, pepper: bytes) -> bool:
    """Whether the secret belongs to the stored MAC; takes the same time for every secret."""
    return hmac.compare_digest(mac_of(presented.secret, pepper), mac)
