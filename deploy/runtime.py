"""The real clock and the real identifiers: the only place where a process asks for either."""

from __future__ import annotations

import secrets
import time
import uuid
from datetime import UTC, datetime


class SystemClock:
    """Clock on the machine's time."""

    def now(self) -> datetime:
        """Aware, UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds from an arbitrary start."""
        return time.monotonic()


class RandomIds:
    """Ids from the operating system's randomness."""

    def token(self) -> str:
        """32 random hex digits."""
        return secrets.token_hex(16)

    def uuid7(self) -> str:
        """UUID version 7 (RFC 9562, section 5.7): 48 bits of milliseconds, then randomness."""
        value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
        value = value & ~(0xF << 76) | 0x7 << 76
        value = value & ~(0x3 << 62) | 0x2 << 62
        return str(uuid.UUID(int=value))
