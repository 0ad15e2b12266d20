"""Rate limits in memory: what `resilience.redis.RedisLimiter` answers, on an injected clock.

Promises the same answers, to the millisecond, from `resilience.limiter.conform`. Does not promise to outlive the
process, nor to know what another process allowed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from contracts.ports import Clock
from resilience.limiter import Allowance, Observe, Take, conform, ignore, refused

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_SWEEP_AT_LEAST: Final = 1024


class MemoryLimiter:
    """Limiter of one process. `wire` is awaited before each call: it may wait, or raise StateStoreError."""

    def __init__(
        self, clock: Clock, observe: Observe = ignore, wire: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._clock = clock
        self._observe = observe
        self._wire = wire
        self._arrivals: dict[str, int] = {}
        self._sweep_at = _SWEEP_AT_LEAST

    async def take(self, takes: Sequence[Take]) -> Sequence[Allowance]:
        """One answer per take, in order; nothing else comes between them."""
        if self._wire is not None:
            await self._wire()
        now_us = (self._clock.now() - _EPOCH) // _MICROSECOND
        answers = [self._take(take, now_us) for take in takes]
        if len(self._arrivals) > self._sweep_at:
            # What is earned again in full is worth no memory.
            self._arrivals = {key: at for key, at in self._arrivals.items() if at > now_us}
            self._sweep_at = max(_SWEEP_AT_LEAST, 2 * len(self._arrivals))
        return answers

    def _take(self, take: Take, now_us: int) -> Allowance:
        arrival, answer = conform(self._arrivals.get(take.key), take, now_us)
        if arrival is not None:
            self._arrivals[take.key] = arrival
        if not answer.allowed:
            self._observe(refused(take))
        return answer
