"""Breakers: open means that nothing passes, half-open that few do, and a late answer changes nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from contracts.failures import DatabaseError, DependencyUnavailableError, DomainValidationError
from contracts.telemetry import BREAKER_CHANGES, BREAKER_REFUSALS, Measurement
from resilience.breaker import (
    PHASES,
    Answer,
    Breaker,
    BreakerPolicy,
    Breakers,
    BreakerState,
    Phase,
    Ticket,
    admit,
    guarded,
    open_for,
    settle,
)
from resilience.memory import SteppingClock

POLICY = BreakerPolicy(window=4, minimum=2, failure_rate=0.5, open_s=1, growth=2, longest_s=5, probes=2, probe_s=10)


class AnyCalls(RuleBasedStateMachine):
    """Calls that begin, end and hang in any order at any time; the machine's table and promises hold throughout."""

    @initialize()
    def begin(self) -> None:
        self.state, self.now = BreakerState(), 100.0
        self.out: list[Ticket] = []

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def become(self, state: BreakerState) -> None:
        # A step may pass through one phase only: open → half-open → probes given, never further.
        assert state.phase is self.state.phase or state.phase in PHASES[self.state.phase]
        self.state = state

    @rule()
    def call(self) -> None:
        before = self.state
        state, ticket = admit(self.state, POLICY, self.now)
        if before.phase is Phase.OPEN and self.now - before.since < open_for(before, POLICY):
            assert ticket is None, "nothing passes while open"
            assert state == before
        if state.phase is Phase.OPEN:
            assert ticket is None
        self.become(state)
        if ticket:
            self.out.append(ticket)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), answer=st.sampled_from(Answer))
    def end(self, data: st.DataObject, answer: Answer) -> None:
        ticket = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        before = self.state
        self.become(settle(before, POLICY, self.now, ticket, answer))
        if ticket.number != before.number:
            assert self.state == before

    @invariant()
    def few_probe(self) -> None:
        state = self.state
        if state.phase is Phase.HALF_OPEN:
            assert 0 <= state.out + state.good <= POLICY.probes
            assert state.out == sum(ticket.number == state.number for ticket in self.out)
        assert open_for(state, POLICY) <= POLICY.longest_s
        assert len(state.answers) <= POLICY.window

    @rule()
    def it_recovers_once_the_dependency_does(self) -> None:
        """From any state: wait long enough, and good answers close it."""
        state, now = self.state, self.now + 1_000
        for _ in range(2 * POLICY.probes + 1):
            state, ticket = admit(state, POLICY, now)
            now += 1_000
            if ticket:
                state = settle(state, POLICY, now, ticket, Answer.GOOD)
        assert state.phase is Phase.CLOSED


AnyCalls.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAnyCalls = AnyCalls.TestCase


def fail(state: BreakerState, times: int, now: float = 0.0) -> BreakerState:
    for _ in range(times):
        state, ticket = admit(state, POLICY, now)
        assert ticket is not None
        state = settle(state, POLICY, now, ticket, Answer.FAILED)
    return state


def test_one_failure_is_too_little_to_judge_by() -> None:
    assert fail(BreakerState(), 1).phase is Phase.CLOSED
    assert fail(BreakerState(), 2).phase is Phase.OPEN


def test_the_window_forgets() -> None:
    policy = replace(POLICY, window=4, minimum=4)
    state = BreakerState()
    for answer in [Answer.FAILED] + [Answer.GOOD] * 4 + [Answer.FAILED]:
        state = settle(state, policy, 0.0, Ticket(state.number), answer)
    assert state.phase is Phase.CLOSED
    assert settle(state, policy, 0.0, Ticket(state.number), Answer.FAILED).phase is Phase.OPEN


def test_each_opening_in_a_row_is_longer_up_to_a_bound_and_a_recovery_begins_anew() -> None:
    state, now, lengths = fail(BreakerState(), 2), 0.0, []
    for _ in range(5):
        lengths.append(open_for(state, POLICY))
        now += lengths[-1]
        assert admit(state, POLICY, now - 0.001)[1] is None
        state = fail(state, 1, now)
        assert state.phase is Phase.OPEN
    assert lengths == [1, 2, 4, 5, 5]
    now += 5
    for _ in range(2):
        state, ticket = admit(state, POLICY, now)
        assert ticket is not None
        state = settle(state, POLICY, now, ticket, Answer.GOOD)
    assert (state.phase, state.opened) == (Phase.CLOSED, 0)


def test_openings_without_end_stay_a_number() -> None:
    assert open_for(BreakerState(Phase.OPEN, opened=10**9), replace(POLICY, growth=1e4)) == 5


def test_probes_that_never_answer_open_it_again() -> None:
    state = fail(BreakerState(), 2)
    for _ in range(2):
        state, ticket = admit(state, POLICY, 2.0)
        assert ticket is not None
    assert admit(state, POLICY, 11.9)[1] is None
    state, ticket = admit(state, POLICY, 12.0)
    assert (state.phase, ticket, state.opened) == (Phase.OPEN, None, 2)


def test_a_probe_long_after_the_last_is_not_taken_for_a_hanging_one() -> None:
    state = fail(BreakerState(), 2)
    state, first = admit(state, POLICY, 2.0)
    assert first is not None
    state = settle(state, POLICY, 2.1, first, Answer.GOOD)
    state, second = admit(state, POLICY, 500.0)
    assert second is not None
    assert admit(state, POLICY, 500.1)[0].phase is Phase.HALF_OPEN


@pytest.mark.parametrize(
    "bad",
    [
        {"minimum": 0},
        {"minimum": 30},
        {"failure_rate": 0.0},
        {"failure_rate": 1.1},
        {"open_s": 0.0},
        {"open_s": 61.0},
        {"growth": 0.5},
        {"probes": 0},
        {"probe_s": 0.0},
    ],
)
def test_a_policy_that_cannot_work_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)).removesuffix("s")):
        BreakerPolicy(**bad)  # type: ignore[arg-type]  # a number of either kind


# --- the wrapper ------------------------------------------------------------------------------------


class Dependency:
    """Answers, or fails with `error`; counts the calls that reached it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.reached = 0

    async def __call__(self) -> str:
        self.reached += 1
        if self.error:
            raise self.error
        return "answer"


async def test_while_open_the_dependency_is_not_reached_and_the_caller_is_told_when() -> None:
    clock, seen, away = SteppingClock(), list[Measurement](), Dependency(DatabaseError())
    breaker = Breaker("screening", clock, POLICY, seen.append)
    for _ in range(2):
        with pytest.raises(DatabaseError):
            await breaker.call(away)
    for _ in range(5):
        with pytest.raises(DependencyUnavailableError, match=r"screening .* within 1 s"):
            await breaker.call(away)
    assert away.reached == 2
    assert seen[0] == Measurement(BREAKER_CHANGES, 1.0, {"dependency": "screening", "to": "open"})
    assert seen[1:] == [Measurement(BREAKER_REFUSALS, 1.0, {"dependency": "screening"})] * 5
    clock.step(1)
    away.error = None
    assert [await breaker.call(away) for _ in range(2)] == ["answer"] * 2
    assert [m.labels["to"] for m in seen if m.metric is BREAKER_CHANGES] == ["open", "half-open", "closed"]


@pytest.mark.parametrize("error", [DomainValidationError(), ValueError()])
async def test_an_unwelcome_answer_is_an_answer(error: Exception) -> None:
    breaker, there = Breaker("x", SteppingClock(), POLICY), Dependency(error)
    for _ in range(20):
        with pytest.raises(type(error)):
            await breaker.call(there)
    assert breaker.state.phase is Phase.CLOSED


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError(), DatabaseError()])
async def test_an_outage_is_none(error: Exception) -> None:
    breaker = Breaker("x", SteppingClock(), POLICY)
    for _ in range(2):
        with pytest.raises(type(error)):
            await breaker.call(Dependency(error))
    assert breaker.state.phase is Phase.OPEN


async def test_a_cancelled_probe_gives_its_place_back_and_says_nothing() -> None:
    clock = SteppingClock()
    breaker = Breaker("x", clock, replace(POLICY, probes=1))
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await breaker.call(Dependency(TimeoutError()))
    clock.step(1)
    probe = asyncio.create_task(breaker.call(asyncio.Event().wait))
    await asyncio.sleep(0)
    with pytest.raises(DependencyUnavailableError):
        await breaker.call(Dependency())
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert await breaker.call(Dependency()) == "answer"
    assert breaker.state.phase is Phase.CLOSED


async def test_each_dependency_has_a_breaker_of_its_own() -> None:
    breakers = Breakers(SteppingClock(), POLICY)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await breakers.of("llm").call(Dependency(TimeoutError()))
    assert await breakers.of("screening").call(Dependency()) == "answer"
    assert breakers.phases() == {"llm": Phase.OPEN, "screening": Phase.CLOSED}


async def test_every_call_of_a_guarded_port_goes_through_its_breaker() -> None:
    class Port:
        name = "port"

        def __init__(self) -> None:
            self.away, self.asked = True, 0

        def size(self) -> int:
            return 3

        async def read(self, key: str, *, twice: bool = False) -> str:
            self.asked += 1
            if self.away:
                raise TimeoutError
            return key * (2 if twice else 1)

    port, clock = Port(), SteppingClock()
    breaker = Breaker("x", clock, POLICY)
    one = guarded(port, breaker)
    assert (one.name, one.size()) == ("port", 3)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await one.read("a")
    with pytest.raises(DependencyUnavailableError):
        await one.read("a")
    assert (port.asked, breaker.state.phase) == (2, Phase.OPEN)
    port.away = False
    clock.step(1)
    assert await one.read("a", twice=True) == "aa"
    with pytest.raises(AttributeError):
        one.nothing  # type: ignore[attr-defined]  # noqa: B018
