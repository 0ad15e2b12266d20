"""Rate limits: never more than a burst and the rate, never less than promised, and nothing that a clock can break.

What the twin has in common with Redis is in tests/conformance/test_limiter.py.
"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from contracts.failures import StateStoreError
from contracts.telemetry import LIMITER_REFUSALS, Measurement
from contracts.tenancy import TenantScope
from resilience.limiter import Allowance, RateLimit, Take, conform
from resilience.memory import MemoryLimiter, SteppingClock

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")
RATES = st.builds(RateLimit, st.sampled_from([0.5, 1.0, 3.0, 7.3, 1000.0, 250_000.0]), st.integers(1, 20))


class NeverTooMuch(RuleBasedStateMachine):
    """Takes at any moments: in every span, no more than burst + rate · span; refused and waited as told, allowed."""

    @initialize(limit=RATES)
    def begin(self, limit: RateLimit) -> None:
        self.limit, self.now, self.arrival = limit, 1_769_860_800_000_000, None
        self.allowed: list[tuple[int, int]] = []

    arrival: int | None

    @rule(share=st.floats(0, 3))
    def wait(self, share: float) -> None:
        self.now += int(share * self.limit.interval_us)

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        one = Take(ACME, "x", self.limit, data.draw(st.integers(1, self.limit.burst)))
        before = self.arrival
        self.arrival, answer = conform(self.arrival, one, self.now)
        if answer.allowed:
            self.allowed.append((self.now, one.cost))
            return
        assert self.arrival == before, "a refused take costs nothing"
        assert answer.remaining < one.cost
        assert conform(self.arrival, one, self.now + answer.retry_after_ms * 1000)[1].allowed
        assert not conform(self.arrival, one, self.now + (answer.retry_after_ms - 1) * 1000)[1].allowed

    @rule()
    def the_rest_is_as_much_as_was_said(self) -> None:
        left = conform(self.arrival, Take(ACME, "x", self.limit), self.now)[1]
        remaining = left.remaining + (1 if left.allowed else 0)
        if remaining:
            assert conform(self.arrival, Take(ACME, "x", self.limit, remaining), self.now)[1].allowed
        if remaining < self.limit.burst:
            assert not conform(self.arrival, Take(ACME, "x", self.limit, remaining + 1), self.now)[1].allowed

    @invariant()
    def no_span_had_more(self) -> None:
        for first in range(len(self.allowed)):
            begin, taken = self.allowed[first][0], 0
            for at, cost in self.allowed[first:]:
                taken += cost
                assert taken <= self.limit.burst + (at - begin) * self.limit.per_second / 1e6 + 1e-6


NeverTooMuch.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestNeverTooMuch = NeverTooMuch.TestCase


@given(RATES, st.lists(st.integers(0, 5), max_size=20))
def test_whoever_keeps_to_the_rate_is_never_refused(limit: RateLimit, early: list[int]) -> None:
    now, arrival = 1_769_860_800_000_000, None
    for _ in early:
        arrival, answer = conform(arrival, Take(ACME, "x", limit), now)
        assert answer.allowed
        now += limit.interval_us


@given(RATES)
def test_a_new_tenant_has_the_whole_burst_and_not_one_more(limit: RateLimit) -> None:
    arrival, answer = conform(None, Take(ACME, "x", limit, limit.burst), 1_769_860_800_000_000)
    assert answer == Allowance(allowed=True, retry_after_ms=0, remaining=0)
    assert not conform(arrival, Take(ACME, "x", limit), 1_769_860_800_000_000)[1].allowed


def test_a_clock_that_went_back_shuts_nobody_out_for_longer_than_a_burst() -> None:
    limit = RateLimit(1, 5)
    ahead, _ = conform(None, Take(ACME, "x", limit), 7_200_000_000)
    _, answer = conform(ahead, Take(ACME, "x", limit), 3_600_000_000)
    assert answer == Allowance(allowed=False, retry_after_ms=1_000, remaining=0)


def test_a_limit_that_shrank_holds_at_once_and_one_that_grew_too() -> None:
    arrival, _ = conform(None, Take(ACME, "x", RateLimit(1, 100), 100), 10**15)
    assert conform(arrival, Take(ACME, "x", RateLimit(1, 2)), 10**15)[1].retry_after_ms == 1_000
    assert conform(arrival, Take(ACME, "x", RateLimit(1, 200)), 10**15)[1].allowed


@pytest.mark.parametrize(
    ("rate", "burst"), [(0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1), (1, 0), (1, 1 << 60)]
)
def test_a_limit_that_cannot_be_kept_is_refused(rate: float, burst: int) -> None:
    with pytest.raises(ValueError, match=r"rate is|burst is"):
        RateLimit(rate, burst)


@pytest.mark.parametrize("cost", [0, -1, 6])
def test_a_take_that_could_never_be_allowed_is_refused_where_it_is_made(cost: int) -> None:
    with pytest.raises(ValueError, match="can never be allowed"):
        Take(ACME, "x", RateLimit(1, 5), cost)


@pytest.mark.parametrize("name", ["", "X", "a:b", "{s0000}", "a" * 33])
def test_a_name_cannot_reach_into_another_key(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Take(ACME, name, RateLimit(1, 1))


async def test_a_refusal_is_counted_with_its_limit_and_tenant() -> None:
    seen: list[Measurement] = []
    limiter = MemoryLimiter(SteppingClock(), seen.append)
    await limiter.take([Take(ACME, "submit", RateLimit(1, 1))] * 3)
    assert seen == [Measurement(LIMITER_REFUSALS, 1.0, {"limit": "submit", "tenant": "acme"})] * 2


async def test_memory_is_bounded_by_what_is_still_owed() -> None:
    clock = SteppingClock()
    limiter = MemoryLimiter(clock)
    for number in range(4_000):
        await limiter.take([Take(TenantScope(f"t{number}"), "x", RateLimit(10, 1))])
        clock.step(0.01)
    assert len(limiter._arrivals) <= 1_025


async def test_the_server_may_be_away() -> None:
    async def away() -> None:
        raise StateStoreError

    with pytest.raises(StateStoreError):
        await MemoryLimiter(SteppingClock(), wire=away).take([Take(ACME, "x", RateLimit(1, 1))])


async def test_callers_of_one_process_share_the_limit() -> None:
    limiter = MemoryLimiter(SteppingClock())
    answers = await asyncio.gather(*(limiter.take([Take(GLOBEX, "x", RateLimit(1, 3))]) for _ in range(10)))
    assert sum(one.allowed for (one,) in answers) == 3
