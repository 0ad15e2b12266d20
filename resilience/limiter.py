"""Rates per tenant: how many new events a tenant may hand in at once, and how many per second from then on.

Promises: in any span of t seconds no more than `burst` + `per_second` · t are allowed, however many processes ask;
what is refused costs nothing. Pure: the time is an argument, the memory of a limit is one number. `scripts/limit.lua`
and the twin of the state store carry this arithmetic out inside the reservation, where a new identity is told from a
known one. Does not queue or wait.

The method is the Generic Cell Rate Algorithm in its virtual-scheduling form (ITU-T Recommendation I.371, annex A; ATM
Forum, Traffic Management 4.0). The number is the theoretical arrival time: when the next event would come if they came
exactly at the rate. Whole microseconds, so that Lua's doubles and Python's integers agree to the last one.
"""

from __future__ import annotations

from collections.abc import Callable

from contracts.limits import RateLimit
from contracts.telemetry import Measurement

Observe = Callable[[Measurement], object]
"""Whoever counts: `Telemetry.record`, say."""


def ignore(_measurement: Measurement) -> None:
    """Counts nothing."""


def conform(arrival_us: int | None, limit: RateLimit, now_us: int) -> tuple[int | None, int]:
    """The theoretical arrival time to remember, and in how many ms one more is allowed: 0, it is and was taken.

    A time further ahead than a burst allows is a clock that went back or a limit that shrank; it is cut off, so that
    neither shuts a tenant out for longer than a burst takes to earn.
    """
    start = min(max(arrival_us or 0, now_us), now_us + limit.span_us)
    late = start + limit.interval_us - limit.span_us - now_us
    return (arrival_us, -(-late // 1000)) if late > 0 else (start + limit.interval_us, 0)
