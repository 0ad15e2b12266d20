"""Retries: the error's disposition decides whether, the policy when, and chance where in between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.failures import (
    FAILURES,
    DatabaseError,
    DependencyUnavailableError,
    Disposition,
    DomainValidationError,
    InvalidModelStateError,
    RiskfleetError,
)
from contracts.topology import RUNGS
from resilience.retry import RetryPolicy, call_again, call_wait, ladder_wait

POLICY = RetryPolicy(waits_ms=(100, 5_000), call_tries=4, call_first_s=0.1, call_longest_s=0.3, call_budget_s=10)
ERRORS = list(FAILURES)


class Flaky:
    """Fails with each of `errors` in turn, then answers."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


class Sleeps(list[float]):
    async def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.mark.parametrize("kind", ERRORS)
def test_the_ladder_takes_only_what_the_disposition_sends_there(kind: type[RiskfleetError]) -> None:
    wait = ladder_wait(kind(), 0, POLICY)
    assert wait == (100 if FAILURES[kind].disposition is Disposition.RETRY else None)


def test_the_ladder_ends() -> None:
    waits = [ladder_wait(DependencyUnavailableError(), attempts, POLICY) for attempts in range(4)]
    assert waits == [100, 5_000, None, None]


def test_the_default_waits_are_rungs() -> None:
    assert set(RetryPolicy().waits_ms) <= {ttl for _, ttl in RUNGS}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_call_repeats_what_may_pass_and_nothing_else(kind: type[RiskfleetError]) -> None:
    wait = call_wait(kind(), 1, POLICY, lambda: 0.5)
    assert (wait is not None) == (FAILURES[kind].disposition in (Disposition.RETRY, Disposition.PAUSE))


@given(st.integers(1, 3), st.floats(0, 1, exclude_max=True))
def test_the_wait_is_anywhere_below_a_bound_that_doubles_to_its_limit(tries: int, chance: float) -> None:
    wait = call_wait(DatabaseError(), tries, POLICY, lambda: chance)
    assert wait == chance * [0.1, 0.2, 0.3][tries - 1]


def test_many_tries_stay_a_number() -> None:
    policy = RetryPolicy(call_tries=10**9)
    assert call_wait(DatabaseError(), 10**8, policy, lambda: 0.5) == 0.5 * policy.call_longest_s


async def test_a_call_that_recovers_is_answered_after_its_waits() -> None:
    flaky, slept = Flaky(DatabaseError(), DatabaseError()), Sleeps()
    assert await call_again(flaky, POLICY, lambda: 0.5, slept) == "answer"
    assert slept == [0.05, 0.1]


async def test_a_call_that_does_not_recover_raises_its_own_last_error() -> None:
    last = DatabaseError("the last")
    flaky, slept = Flaky(*(DatabaseError() for _ in range(3)), last), Sleeps()
    with pytest.raises(DatabaseError) as raised:
        await call_again(flaky, POLICY, lambda: 0.5, slept)
    assert raised.value is last
    assert (flaky.calls, len(slept)) == (4, 3)


@pytest.mark.parametrize("error", [DomainValidationError(), InvalidModelStateError()])
async def test_what_is_refused_or_parked_is_not_repeated(error: RiskfleetError) -> None:
    flaky, slept = Flaky(error), Sleeps()
    with pytest.raises(type(error)):
        await call_again(flaky, POLICY, lambda: 0.5, slept)
    assert (flaky.calls, slept) == (1, [])


async def test_an_end_of_the_process_is_not_repeated() -> None:
    flaky = Flaky(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        await call_again(flaky, POLICY, lambda: 0.5, Sleeps())
    assert flaky.calls == 1


async def test_all_waits_together_stay_below_the_budget() -> None:
    policy = RetryPolicy(call_tries=100, call_first_s=1, call_longest_s=1, call_budget_s=3)
    flaky, slept = Flaky(*(DatabaseError() for _ in range(100))), Sleeps()
    with pytest.raises(DatabaseError):
        await call_again(flaky, policy, lambda: 0.9, slept)
    assert slept == [0.9] * 3
