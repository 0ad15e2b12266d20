"""Passwords: argon2id hashes, made and compared outside the event loop.

Promises: a comparison costs the same for every password of a known user and for a user that does not exist, the loop
never waits for one, and a flood of logins takes a bounded share of memory and threads. Where hashes lie and how many
guesses a user has is decided elsewhere; randomness (the salt) comes from the caller.
"""

from __future__ import annotations

import asyncio
import unicodedata
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from contracts.failures import InvalidRequestError, LimitExceededError

MIN_CHARACTERS: Final = 12
MAX_BYTES: Final = 1_024
SALT_BYTES: Final = 16

# OWASP Password Storage Cheat Sheet, argon2id: 19 MiB of memory, 2 passes, 1 lane.
_MEMORY_KIB, _PASSES, _LANES = 19 * 1024, 2, 1
_AT_ONCE: Final = 2
_WAITING: Final = 32


class Passwords:
    """Hashes and compares. `memory_kib` and `passes` are for tests; a hash made with others is made anew at login."""

    def __init__(self, *, memory_kib: int = _MEMORY_KIB, passes: int = _PASSES) -> None:
        self._hasher = PasswordHasher(time_cost=passes, memory_cost=memory_kib, parallelism=_LANES)
        # What an unknown user's password is compared with: nobody has it, and it costs what a real one costs.
        self._nobody = self._hasher.hash("nobody", salt=bytes(SALT_BYTES))
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._inside = 0

    async def hash(self, password: str, salt: bytes) -> str:
        """The text to store, parameters included. Raises InvalidRequestError for a password that cannot be one.

        Raises LimitExceededError as `matches` does: whoever may choose a password keeps nobody from logging in.
        """
        plain = checked(password)
        self.check_room()
        self._inside += 1
        try:
            return await self._hashed(plain, salt)
        finally:
            self._inside -= 1

    async def renew(self, password: str, salt: bytes) -> str:
        """`hash` for a password that is in use already, whatever rules held when it was chosen."""
        return await self._hashed(normal(password)[:MAX_BYTES], salt)

    async def matches(self, password: str, stored: str | None) -> bool:
        """Whether the password belongs to a stored hash; None (nobody, or nobody's) takes as long and is False.

        Raises LimitExceededError while 32 comparisons wait.
        """
        self.check_room()
        plain = normal(password)
        if len(plain) > MAX_BYTES:  # nobody's can be that long; the work stays the same
            plain, stored = plain[:MAX_BYTES], None
        self._inside += 1
        try:
            async with self._gate:
                same = await asyncio.to_thread(self._same, plain, stored or self._nobody)
        finally:
            self._inside -= 1
        return same and bool(stored)

    def outdated(self, stored: str) -> bool:
        """Whether a hash was made with other parameters than today's."""
        try:
            return self._hasher.check_needs_rehash(stored)
        except InvalidHashError:
            return True

    def check_room(self) -> None:
        """Raise LimitExceededError while `matches` would."""
        if self._inside >= _WAITING:
            raise LimitExceededError("too many logins at once; repeat in a moment")

    async def _hashed(self, plain: bytes, salt: bytes) -> str:
        if len(salt) != SALT_BYTES:
            raise ValueError(f"a salt has {SALT_BYTES} random bytes, not {len(salt)}")
        async with self._gate:
            return await asyncio.to_thread(lambda: self._hasher.hash(plain, salt=salt))

    def _same(self, password: bytes, stored: str) -> bool:
        try:
            return self._hasher.verify(stored, password)
        except (VerificationError, InvalidHashError):
            return False


def normal(password: str) -> bytes:
    """The bytes that are hashed: NFKC, so that two keyboards spell one password the same (NIST SP 800-63B)."""
    return unicodedata.normalize("NFKC", password).encode("utf-8", "replace")


def checked(password: str) -> bytes:
    """The bytes of a new password. Raises InvalidRequestError unless it has 12 characters and at most 1,024 bytes."""
    plain = normal(password)
    if len(password) < MIN_CHARACTERS:
        raise InvalidRequestError(f"a password has at least {MIN_CHARACTERS} characters")
    if len(plain) > MAX_BYTES:
        raise InvalidRequestError(f"a password has at most {MAX_BYTES:,} bytes")
    return plain
