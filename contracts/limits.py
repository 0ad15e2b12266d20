"""How much a tenant may hand in: what is stored of it, and the rate that it means.

One model for the database, the operator API and the doors. Holds no counts and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_SECOND: Final = 1_000_000
_EXACT: Final = 1 << 50
"""Microseconds up to which a sum with a moment of this century is still exact in a double."""
_SLOWEST: Final = 1 / 86_400


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A sustained rate (events per second) and how many may come at once.

    Raises ValueError outside 1 per day … 1,000,000 per second, for a burst below 1, or for one that takes longer than
    35 years to earn. Above 10,000 per second the rate is rounded down by up to one microsecond per event.
    """

    per_second: float
    burst: int

    def __post_init__(self) -> None:
        if not _SLOWEST <= self.per_second <= _SECOND:
            raise ValueError(f"a rate is between 1 per day and {_SECOND} per second, not {self.per_second} per second")
        if self.burst < 1 or self.span_us > _EXACT:
            raise ValueError(f"a burst is at least 1 and is earned within 35 years, not {self.burst}")

    @property
    def interval_us(self) -> int:
        """Microseconds between two events at the sustained rate, rounded up: never more than the rate."""
        return -int(-_SECOND // self.per_second)

    @property
    def span_us(self) -> int:
        """Microseconds in which a whole burst is earned."""
        return self.burst * self.interval_us


class TenantLimits(BaseModel):
    """How much a tenant may have under way, and how fast it may hand in new events; None: no limit.

    `rate_per_s` (1 per day … 1,000,000) and `burst` (events at once) are set together or not at all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    undecided_events: int | None = Field(default=None, ge=1, le=10_000_000)
    rate_per_s: float | None = Field(default=None, ge=_SLOWEST, le=_SECOND, allow_inf_nan=False)
    burst: int | None = Field(default=None, ge=1, le=10_000_000)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.rate_per_s is None) != (self.burst is None):
            raise ValueError("rate_per_s and burst are set together, or neither")
        _ = self.rate
        return self

    @property
    def rate(self) -> RateLimit | None:
        """The rate of new events, None for no limit."""
        if self.rate_per_s is None or self.burst is None:
            return None
        return RateLimit(self.rate_per_s, self.burst)


NO_LIMITS: Final = TenantLimits()
