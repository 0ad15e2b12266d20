"""Waiting for a decision in the caller's name: `Prefer: wait=S` (RFC 7240, section 4.3).

Promises: a copy of a decision only wakes a wait; what is answered is the row in PostgreSQL, at its highest revision and
for the same body. So a lost copy costs a second, and a foreign or outdated one costs nothing. A wait never outlives its
deadline, its caller or the process, and their number is bounded: beyond it there is no waiting. Admits nothing and
speaks no HTTP.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import orjson
import structlog

from contracts.failures import IdempotencyConflictError, InfrastructureError
from contracts.ports import Clock, DecisionRow, Ledger, Replies
from contracts.tenancy import TenantScope
from gateway.gathering import Gathered

log = structlog.get_logger(__name__)

MAX_WAIT: Final = 30
_MAX_PREFER: Final = 1_024
# Commas inside quotes separate nothing. Possessive, or unbalanced quotes would be tried in every combination.
_PREFERENCE: Final = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*+"?)++')
_WAIT: Final = re.compile(r'\s*wait\s*=\s*(?:"([0-9]{1,9})"|([0-9]{1,9}))\s*(?:;.*)?', re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class WaitPolicy:
    """Seconds between two looks into PostgreSQL, and how many may wait in one process."""

    look_s: float = 1.0
    max_waiters: int = 1_000


@dataclass(frozen=True, slots=True)
class Expected:
    """The event that somebody waits for: by its body digest too, since an identity may meet another body."""

    scope: TenantScope
    event_id: str
    body_digest: str


def preferred_wait(values: Sequence[str]) -> int | None:
    """The seconds (1 … 30) that the Prefer headers of one request ask to wait; None without a usable preference.

    More than 30 is 30; the first `wait` counts, as RFC 7240 says; what cannot be read is ignored, as it says too.
    """
    text = ",".join(values)
    if len(text) > _MAX_PREFER:
        return None
    for preference in _PREFERENCE.findall(text):
        if preference.partition("=")[0].strip().lower() == "wait":
            found = _WAIT.fullmatch(preference)
            return min(int(found[1] or found[2]), MAX_WAIT) or None if found else None
    return None


class Waiting:
    """Every wait of one process.

    Once `stopping` is set every wait ends, as if its time were up, and nobody waits any more: a process that stops
    answers 202 at once. `pause` is the passing of time (seconds); tests bring their own.
    """

    def __init__(
        self,
        replies: Replies,
        ledger: Ledger,
        clock: Clock,
        policy: WaitPolicy | None = None,
        *,
        stopping: asyncio.Event | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._replies = replies
        self._clock = clock
        self._policy = policy or WaitPolicy()
        self._pause = pause
        self._rows: Gathered[tuple[TenantScope, str], DecisionRow | None] = Gathered(ledger.decisions)
        self._stopping = stopping or asyncio.Event()
        self._open = 0

    @property
    def address(self) -> str:
        """The `reply_to` of what is waited for here."""
        return self._replies.address

    @property
    def open(self) -> int:
        """How many wait now."""
        return self._open

    @asynccontextmanager
    async def registered(self, expected: Expected, seconds: float) -> AsyncIterator[Wait | None]:
        """A wait whose time runs from here: register, publish inside the block, then ask the wait.

        None when the process waits for as many as it may, or is stopping.
        """
        if self._open >= self._policy.max_waiters or self._stopping.is_set():
            yield None
            return
        until = self._clock.monotonic() + seconds
        # Registered by the call itself, so that a decision that is faster than our own publish is not missed.
        copy = asyncio.ensure_future(self._replies.wait(expected.event_id, seconds))
        self._open += 1
        try:
            yield Wait(self, expected, copy, until)
        finally:
            self._open -= 1
            await _end(copy)

    async def decision(
        self, expected: Expected, copy: asyncio.Future[bytes | None], until: float, gone: Awaitable[Any]
    ) -> DecisionRow | None:
        """See `Wait.decision`."""
        left = asyncio.ensure_future(gone)
        stopping = asyncio.ensure_future(self._stopping.wait())
        waking: set[asyncio.Future[Any]] = {copy, left, stopping}
        try:
            while (remaining := until - self._clock.monotonic()) > 0:
                pause = asyncio.ensure_future(self._pause(min(self._policy.look_s, remaining)))
                try:
                    await asyncio.wait({*waking, pause}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await _end(pause)
                if left.done() or stopping.done():
                    return None
                if copy.done() and copy in waking:
                    waking.remove(copy)  # from now on the looks alone: a copy that was no answer must not spin
                    if not _belongs(copy, expected):
                        continue
                row = await self._look(expected)
                if row is not None:
                    return row
            return await self._look(expected)
        finally:
            await _end(left)
            await _end(stopping)

    async def _look(self, expected: Expected) -> DecisionRow | None:
        try:
            row = await self._rows.one((expected.scope, expected.event_id))
        except InfrastructureError:
            return None  # the event is accepted all the same; the next look may be answered
        if row is not None and row.body_digest != expected.body_digest:
            # Redis had forgotten who owns the identity: the newcomer will be parked, and gets nobody else's decision.
            raise IdempotencyConflictError
        return row


@dataclass(frozen=True, slots=True)
class Wait:
    """One registered wait."""

    waiting: Waiting
    expected: Expected
    copy: asyncio.Future[bytes | None]
    until: float

    async def decision(self, gone: Awaitable[Any]) -> DecisionRow | None:
        """The event's decision; None when the time is up, or once `gone` (the caller went away) has happened.

        Raises IdempotencyConflictError when the decision belongs to another body of the same identity.
        """
        return await self.waiting.decision(self.expected, self.copy, self.until, gone)


def _belongs(copy: asyncio.Future[bytes | None], expected: Expected) -> bool:
    """Whether a copy is of this tenant's event; a copy that failed or timed out is none."""
    if copy.cancelled() or copy.exception() is not None:
        return False
    body = copy.result()
    if body is None:
        return False
    try:
        document = orjson.loads(body)
        belongs = (document["tenant_id"], document["event_id"]) == (expected.scope.tenant_id, expected.event_id)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        belongs = False
    if not belongs:
        log.warning("reply_ignored", reason="the copy is of another event, or no decision")
    return belongs


async def _end(future: asyncio.Future[Any]) -> None:
    """Cancel, and let it end: nothing that was begun here outlives the wait. Its own error is nobody's."""
    future.cancel()
    await asyncio.wait({future})
    if not future.cancelled():
        future.exception()
