"""Bulkheads: never more than the permits, nobody starved, nobody waits for ever, and no permit gets lost."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from contracts.failures import LimitExceededError
from contracts.telemetry import BULKHEAD_REFUSALS, Measurement
from contracts.tenancy import TenantScope
from resilience.bulkhead import Bulkhead, BulkheadPolicy, Bulkheads, Grant, Permits
from resilience.memory import SteppingClock

A, B, C = (TenantScope(name) for name in ("a", "b", "c"))
SCOPES = st.sampled_from([A, B, C])
POLICIES = st.builds(
    lambda permits, share, waiting: BulkheadPolicy(permits, max(1, min(permits, share)), waiting),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 3),
)


class AnyCallers(RuleBasedStateMachine):
    """Callers that ask, leave and give up in any order."""

    @initialize(policy=POLICIES)
    def begin(self, policy: BulkheadPolicy) -> None:
        self.permits: Permits[int] = Permits(policy)
        self.holding: list[TenantScope] = []
        self.waiting: dict[int, TenantScope] = {}
        self.number = 0

    @rule(scope=SCOPES)
    def ask(self, scope: TenantScope) -> None:
        self.number += 1
        grant = self.permits.ask(scope, self.number)
        if grant is Grant.GIVEN:
            self.holding.append(scope)
        elif grant is Grant.WAITING:
            self.waiting[self.number] = scope
        else:
            assert sum(s == scope for s in self.waiting.values()) == self.permits.policy.waiting

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        scope = self.holding.pop(data.draw(st.integers(0, len(self.holding) - 1)))
        for waiter in self.permits.give_back(scope):
            self.holding.append(self.waiting.pop(waiter))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.permits.withdraw(self.waiting.pop(waiter), waiter)

    @invariant()
    def never_more_than_the_permits(self) -> None:
        policy = self.permits.policy
        assert self.permits.total == len(self.holding) <= policy.permits
        assert self.permits.held == Counter(self.holding)
        assert max(self.permits.held.values(), default=0) <= policy.per_tenant
        assert sum(len(queue) for queue in self.permits.queues.values()) == len(self.waiting)

    @invariant()
    def nobody_waits_for_a_permit_that_is_free(self) -> None:
        held, policy = Counter(self.holding), self.permits.policy
        if len(self.holding) < policy.permits:
            assert all(held[scope] >= policy.per_tenant for scope in self.waiting.values())


AnyCallers.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAnyCallers = AnyCallers.TestCase


def test_a_flood_leaves_the_others_their_share() -> None:
    permits: Permits[int] = Permits(BulkheadPolicy(permits=4, per_tenant=3, waiting=10))
    assert [permits.ask(A, n) for n in range(5)] == [Grant.GIVEN] * 3 + [Grant.WAITING] * 2
    assert permits.ask(B, 10) is Grant.GIVEN


def test_what_is_scarce_is_shared_by_turns_whoever_asks_most() -> None:
    permits: Permits[str] = Permits(BulkheadPolicy(permits=1, per_tenant=1, waiting=10))
    assert permits.ask(A, "a0") is Grant.GIVEN
    for number in range(6):
        permits.ask(A, f"a{number + 1}")
    permits.ask(B, "b0")
    permits.ask(B, "b1")
    permits.ask(C, "c0")
    served, holder = [], A
    for _ in range(7):
        (waiter,) = permits.give_back(holder)
        served.append(waiter)
        holder = TenantScope(waiter[0])
    assert served == ["a1", "b0", "c0", "a2", "b1", "a3", "a4"]


def test_who_holds_the_fewest_comes_first() -> None:
    permits: Permits[str] = Permits(BulkheadPolicy(permits=4, per_tenant=4, waiting=10))
    for number in range(4):
        permits.ask(A, f"a{number}")
    for waiter in ("a4", "b0", "b1"):
        permits.ask(TenantScope(waiter[0]), waiter)
    assert [permits.give_back(A)[0] for _ in range(3)] == ["b0", "b1", "a4"]


def test_a_permit_cannot_be_given_back_twice() -> None:
    permits: Permits[int] = Permits(BulkheadPolicy())
    permits.ask(A, 1)
    permits.give_back(A)
    with pytest.raises(ValueError, match="holds no permit"):
        permits.give_back(A)


@pytest.mark.parametrize(
    "bad", [{"permits": 0}, {"per_tenant": 0}, {"per_tenant": 33}, {"waiting": -1}, {"wait_s": -1}]
)
def test_a_policy_that_cannot_work_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"per_tenant|waiting"):
        BulkheadPolicy(**bad)


# --- the waiting one ----------------------------------------------------------------------------------


async def hold(bulkhead: Bulkhead, scope: TenantScope, until: asyncio.Event) -> str:
    async with bulkhead.permit(scope):
        await until.wait()
    return str(scope)


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_beyond_the_queue_is_refused_at_once_and_counted() -> None:
    seen: list[Measurement] = []
    bulkhead, done = Bulkhead("llm", SteppingClock(), BulkheadPolicy(2, 1, 1, wait_s=5), seen.append), asyncio.Event()
    tasks = [asyncio.create_task(hold(bulkhead, A, done)) for _ in range(2)]
    await settled()
    with pytest.raises(LimitExceededError, match="llm"):
        await hold(bulkhead, A, done)
    assert seen[-1] == Measurement(BULKHEAD_REFUSALS, 1.0, {"dependency": "llm", "reason": "full"})
    done.set()
    assert await asyncio.gather(*tasks, hold(bulkhead, B, done)) == ["a", "a", "b"]


async def test_nobody_waits_longer_than_promised_and_then_holds_nothing() -> None:
    seen: list[Measurement] = []
    bulkhead, done = (
        Bulkhead("llm", SteppingClock(), BulkheadPolicy(1, 1, 5, wait_s=0.01), seen.append),
        asyncio.Event(),
    )
    first = asyncio.create_task(hold(bulkhead, A, done))
    await settled()
    with pytest.raises(LimitExceededError):
        await hold(bulkhead, B, done)
    assert seen[-1].labels == {"dependency": "llm", "reason": "late"}
    done.set()
    await first
    assert await hold(bulkhead, B, done) == "b"
    assert bulkhead._permits.total == 0


async def test_an_error_inside_gives_the_permit_back() -> None:
    bulkhead = Bulkhead("llm", SteppingClock(), BulkheadPolicy(1, 1, 0))
    for _ in range(3):
        with pytest.raises(KeyError):
            async with bulkhead.permit(A):
                raise KeyError
    assert bulkhead._permits.total == 0


@pytest.mark.parametrize("seed", range(20))
async def test_whoever_is_cancelled_at_whatever_moment_takes_no_permit_along(seed: int) -> None:
    """Cancelled while it waits, in the very step in which it is given one, or while it holds one."""
    bulkhead, done = Bulkhead("llm", SteppingClock(), BulkheadPolicy(2, 2, 50, wait_s=5)), asyncio.Event()
    tasks = [asyncio.create_task(hold(bulkhead, (A, B, C)[n % 3], done)) for n in range(30)]
    for step in range(seed):
        await asyncio.sleep(0)
        tasks[(7 * step) % 30].cancel()
        tasks[(11 * step + 1) % 30].cancel()
    done.set()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert (bulkhead._permits.total, bulkhead._permits.queues) == (0, {})


async def test_dependencies_do_not_share_permits() -> None:
    bulkheads = Bulkheads(SteppingClock(), BulkheadPolicy(1, 1, 0))
    async with bulkheads.of("llm").permit(A), bulkheads.of("screening").permit(A):
        with pytest.raises(LimitExceededError):
            async with bulkheads.of("llm").permit(B):
                pass
