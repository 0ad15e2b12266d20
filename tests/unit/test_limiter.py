"""Rate limits: never more than a burst and the rate, never less than promised, and nothing that a clock can break.

What Redis and its twin make of them is in tests/conformance/test_backlog.py.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pydantic import ValidationError

from contracts.limits import RateLimit, TenantLimits
from resilience.limiter import conform

NOW = 1_769_860_800_000_000
RATES = st.builds(RateLimit, st.sampled_from([0.5, 1.0, 3.0, 7.3, 1000.0, 250_000.0]), st.integers(1, 20))


class NeverTooMuch(RuleBasedStateMachine):
    """Events at any moments: in every span, no more than burst + rate · span; refused and waited as told, allowed."""

    @initialize(limit=RATES)
    def begin(self, limit: RateLimit) -> None:
        self.limit, self.now, self.arrival = limit, NOW, None
        self.allowed: list[int] = []

    arrival: int | None

    @rule(share=st.floats(0, 3))
    def wait(self, share: float) -> None:
        self.now += int(share * self.limit.interval_us)

    @rule()
    def arrive(self) -> None:
        before = self.arrival
        self.arrival, wait_ms = conform(self.arrival, self.limit, self.now)
        if not wait_ms:
            self.allowed.append(self.now)
            return
        assert self.arrival == before, "a refused event costs nothing"
        assert conform(self.arrival, self.limit, self.now + wait_ms * 1000)[1] == 0
        assert conform(self.arrival, self.limit, self.now + (wait_ms - 1) * 1000)[1] > 0

    @invariant()
    def no_span_had_more(self) -> None:
        for first, begin in enumerate(self.allowed):
            for taken, at in enumerate(self.allowed[first:], 1):
                assert taken <= self.limit.burst + (at - begin) * self.limit.per_second / 1e6 + 1e-6


NeverTooMuch.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestNeverTooMuch = NeverTooMuch.TestCase


def after_a_burst(limit: RateLimit, now: int = NOW) -> int | None:
    arrival = None
    for _ in range(limit.burst):
        arrival, wait_ms = conform(arrival, limit, now)
        assert wait_ms == 0
    return arrival


@given(RATES, st.integers(0, 20))
def test_whoever_keeps_to_the_rate_is_never_refused(limit: RateLimit, events: int) -> None:
    now, arrival = NOW, None
    for _ in range(events):
        arrival, wait_ms = conform(arrival, limit, now)
        assert wait_ms == 0
        now += limit.interval_us


@given(RATES)
def test_a_new_tenant_has_the_whole_burst_and_not_one_more(limit: RateLimit) -> None:
    assert conform(after_a_burst(limit), limit, NOW)[1] == -(-limit.interval_us // 1000)


def test_a_clock_that_went_back_shuts_nobody_out_for_longer_than_a_burst() -> None:
    limit = RateLimit(1, 5)
    ahead, _ = conform(None, limit, NOW + 3_600_000_000)
    assert conform(ahead, limit, NOW) == (ahead, 1_000)


def test_a_limit_that_shrank_holds_at_once_and_one_that_grew_too() -> None:
    arrival = after_a_burst(RateLimit(1, 100))
    assert conform(arrival, RateLimit(1, 2), NOW)[1] == 1_000
    assert conform(arrival, RateLimit(1, 200), NOW)[1] == 0


@pytest.mark.parametrize(
    ("rate", "burst"), [(0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1), (1, 0), (1, 1 << 60)]
)
def test_a_limit_that_cannot_be_kept_is_refused(rate: float, burst: int) -> None:
    with pytest.raises(ValueError, match=r"rate is|burst is"):
        RateLimit(rate, burst)
    with pytest.raises(ValidationError):
        TenantLimits(rate_per_s=rate, burst=burst)


def test_a_rate_and_its_burst_are_stored_together_or_not_at_all() -> None:
    assert TenantLimits().rate is None
    assert TenantLimits(rate_per_s=2.5, burst=10).rate == RateLimit(2.5, 10)
    for alone in ({"rate_per_s": 1.0}, {"burst": 1}):
        with pytest.raises(ValidationError, match="set together, or neither"):
            TenantLimits.model_validate(alone)
    with pytest.raises(ValidationError, match="burst is at least 1"):  # what no double counts exactly
        TenantLimits(rate_per_s=1 / 86_400, burst=10_000_000)
