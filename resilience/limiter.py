"""Rates per tenant: how much of something a tenant may take at once, and how much per second from then on.

Promises: in any span of t seconds no more than `burst` + `per_second` · t is allowed under one name, however many
processes ask; what is refused costs nothing. Pure: the time is an argument, the memory of a limit is one number, and
`resilience.redis.RedisLimiter` and `resilience.memory.MemoryLimiter` carry the same arithmetic out. Does not queue or
wait, and does not know a repeated question from a new one: a reply that got lost was still counted, so a repeat errs
towards refusing.

The method is the Generic Cell Rate Algorithm in its virtual-scheduling form (ITU-T Recommendation I.371, annex A; ATM
Forum, Traffic Management 4.0). The number is the theoretical arrival time: when the next take would come if they came
exactly at the rate. Whole microseconds, so that Lua's doubles and Python's integers agree to the last one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from contracts.telemetry import LIMITER_REFUSALS, Measurement
from contracts.tenancy import TenantScope

Observe = Callable[[Measurement], object]
"""Whoever counts: `Telemetry.record`, say."""

_SECOND: Final = 1_000_000
_EXACT: Final = 1 << 50
"""Microseconds up to which a sum with a moment of this century is still exact in a double."""
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")


def ignore(_measurement: Measurement) -> None:
    """Counts nothing."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A sustained rate (takes per second) and how many may come at once.

    Raises ValueError outside 1 per day … 1,000,000 per second, for a burst below 1, or for one that takes longer than
    35 years to earn. Above 10,000 per second the rate is rounded down by up to one microsecond per take.
    """

    per_second: float
    burst: int

    def __post_init__(self) -> None:
        if not 1 / 86_400 <= self.per_second <= _SECOND:
            raise ValueError(f"a rate is between 1 per day and {_SECOND} per second, not {self.per_second} per second")
        if self.burst < 1 or self.span_us > _EXACT:
            raise ValueError(f"a burst is at least 1 and is earned within 35 years, not {self.burst}")

    @property
    def interval_us(self) -> int:
        """Microseconds between two takes at the sustained rate, rounded up: never more than the rate."""
        return -int(-_SECOND // self.per_second)

    @property
    def span_us(self) -> int:
        """Microseconds in which a whole burst is earned."""
        return self.burst * self.interval_us


@dataclass(frozen=True, slots=True)
class Take:
    """A tenant wants `cost` of what `name` limits (a word of the code, such as `submit`).

    Raises ValueError for a name outside `[a-z][a-z0-9-]{0,31}`, and for a cost below 1 or above the burst: that could
    never be allowed, so whoever makes the take refuses such a request for its size.
    """

    scope: TenantScope
    name: str
    limit: RateLimit
    cost: int = 1

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError("a limit's name has 1 to 32 of a-z, 0-9 and '-', and starts with a letter")
        if not 1 <= self.cost <= self.limit.burst:
            raise ValueError(f"a cost of {self.cost} can never be allowed: the burst is {self.limit.burst}")

    @property
    def key(self) -> str:
        """The name of the limit's memory."""
        return self.scope.limit_key(self.name)


@dataclass(frozen=True, slots=True)
class Allowance:
    """The answer. `retry_after_ms`: when the same take would be allowed if nobody else took, 0 if it was.

    `remaining`: how many takes of cost 1 would be allowed now.
    """

    allowed: bool
    retry_after_ms: int
    remaining: int


class Limiter(Protocol):
    """What RedisLimiter and its twin have in common."""

    async def take(self, takes: Sequence[Take]) -> Sequence[Allowance]:
        """One answer per take, in order; of two takes under one name the second sees the first.

        Each stands for itself: a refused one takes nothing, and no other back. Raises StateStoreError.
        """
        ...


def conform(arrival_us: int | None, take: Take, now_us: int) -> tuple[int | None, Allowance]:
    """The answer to one take, and the theoretical arrival time to remember (None: nothing to remember).

    A time further ahead than a burst allows is a clock that went back or a limit that shrank; it is cut off, so that
    neither shuts a tenant out for longer than a burst takes to earn.
    """
    interval, span = take.limit.interval_us, take.limit.span_us
    start = min(max(arrival_us or 0, now_us), now_us + span)
    after = start + take.cost * interval
    late = after - span - now_us
    if late > 0:
        return arrival_us, Allowance(False, -(-late // 1000), _left(start, take, now_us))
    return after, Allowance(True, 0, _left(after, take, now_us))


def _left(arrival_us: int, take: Take, now_us: int) -> int:
    return (now_us + take.limit.span_us - arrival_us) // take.limit.interval_us


def refused(take: Take) -> Measurement:
    """What a limiter counts for a take that it refused."""
    return Measurement(LIMITER_REFUSALS, 1.0, {"limit": take.name, "tenant": take.scope.tenant_id})
