"""A clock that moves when told, and ids that count: twins of the real ones in `deploy.runtime`.

Promises: the same calls give the same answers, in every run. Does not promise that ids are hard to guess.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

Sleep = Callable[[float], Awaitable[None]]
"""A way to wait so many seconds: `asyncio.sleep`, or the `sleep` of a SteppingClock."""


def microseconds(seconds: float) -> int:
    """Whole microseconds: sums of floats would miss the moment that they were meant for."""
    return round(seconds * 1_000_000)


async def first_of(*waits: Awaitable[object]) -> None:
    """Wait until one is done, and cancel the others; their results and errors are their owners' business."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


@dataclass
class SteppingClock:
    """A clock that moves only by `step`, in whole microseconds; `sleep` waits until it was moved far enough."""

    moment: datetime = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
    elapsed: float = 0.0
    _sleepers: list[tuple[int, int, asyncio.Future[None]]] = field(default_factory=list, repr=False, compare=False)
    _numbers: itertools.count[int] = field(default_factory=itertools.count, repr=False, compare=False)

    def now(self) -> datetime:
        """Aware, UTC."""
        return self.moment

    def monotonic(self) -> float:
        """Seconds from zero."""
        return self.elapsed

    def step(self, seconds: float) -> None:
        """Move on, and wake who has slept long enough, the earliest first. Raises ValueError for a step back."""
        if seconds < 0:
            raise ValueError(f"time does not go back: {seconds} s")
        self.moment += timedelta(seconds=seconds)
        now = microseconds(self.elapsed + seconds)
        self.elapsed = now / 1_000_000
        while self._sleepers and self._sleepers[0][0] <= now:
            _, _, sleeper = heapq.heappop(self._sleepers)
            if not sleeper.done():
                sleeper.set_result(None)

    async def sleep(self, seconds: float) -> None:
        """Wait for that many seconds of this clock; 0 or less only lets others run."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (microseconds(self.elapsed + seconds), next(self._numbers), sleeper))
        await sleeper

    def next_wake(self) -> float | None:
        """When the next sleeper wakes (seconds on `monotonic`); None when nobody sleeps."""
        while self._sleepers and self._sleepers[0][2].done():  # cancelled
            heapq.heappop(self._sleepers)
        return self._sleepers[0][0] / 1_000_000 if self._sleepers else None


class CountingIds:
    """Ids that count from 1: never random, always well-formed."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def token(self) -> str:
        """32 hex digits: the next number."""
        return f"{next(self._numbers):032x}"

    def uuid7(self) -> str:
        """A well-formed UUID, version 7: the next number."""
        return f"01900000-0000-7000-8000-{next(self._numbers):012x}"
