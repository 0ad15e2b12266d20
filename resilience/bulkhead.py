"""Permits per tenant and dependency: one tenant's flood of slow calls leaves the other tenants theirs.

Promises: never more than `permits` calls at once on a dependency and `per_tenant` of one tenant; a bounded number of a
tenant's calls waits, and no longer than `wait_s`; what is beyond is refused with LimitExceededError at once. A permit
that comes back goes to the waiting tenant that holds the fewest, among equals to the one that was served longest ago,
and within a tenant in order: so tenants share what is scarce equally, whoever asks most. Does not bound the number of
tenants, nor what all processes together do: the share is this process's. `Permits` is the plain bookkeeping; `Bulkhead`
waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from contracts.failures import LimitExceededError
from contracts.ports import Clock
from contracts.telemetry import BULKHEAD_REFUSALS, BULKHEAD_WAIT_SECONDS, Measurement
from contracts.tenancy import TenantScope
from resilience.limiter import Observe, ignore

W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class BulkheadPolicy:
    """Calls at once on a dependency and of one tenant, waiting calls of one tenant, and how long they wait (s).

    With `per_tenant` below `permits` no single tenant can take everything. Raises ValueError for numbers below 1 (or a
    negative `waiting` or `wait_s`), and for a tenant's share above the whole.
    """

    permits: int = 32
    per_tenant: int = 8
    waiting: int = 16
    wait_s: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.per_tenant <= self.permits:
            raise ValueError("per_tenant is between 1 and permits")
        if self.waiting < 0 or self.wait_s < 0:
            raise ValueError("waiting and wait_s are not negative")


class Grant(StrEnum):
    """The answer to who asks for a permit."""

    GIVEN = "given"
    WAITING = "waiting"
    FULL = "full"


class Permits(Generic[W]):
    """Who holds permits of one dependency (`total` of them) and who waits. `W` names one waiter; nothing here waits.

    The order of `queues` is the order of turns: who was served goes to the end.
    """

    def __init__(self, policy: BulkheadPolicy) -> None:
        self.policy = policy
        self.held: dict[TenantScope, int] = {}
        self.queues: dict[TenantScope, deque[W]] = {}
        self.total = 0

    def ask(self, scope: TenantScope, waiter: W) -> Grant:
        """A permit now, a place in the tenant's queue, or neither."""
        queue = self.queues.get(scope)
        if not queue and self._may(scope):
            self._give(scope)
            return Grant.GIVEN
        if len(queue or ()) >= self.policy.waiting:
            return Grant.FULL
        self.queues.setdefault(scope, deque()).append(waiter)
        return Grant.WAITING

    def give_back(self, scope: TenantScope) -> list[W]:
        """A permit came back; answers the waiters that have one now. Raises ValueError if the tenant holds none."""
        if not self.held.get(scope):
            raise ValueError(f"the tenant {scope} holds no permit")
        self.total -= 1
        self.held[scope] -= 1
        if not self.held[scope]:
            del self.held[scope]
        given = []
        while (served := self._next()) is not None:
            queue = self.queues.pop(served)
            given.append(queue.popleft())
            self._give(served)
            if queue:
                self.queues[served] = queue
        return given

    def withdraw(self, scope: TenantScope, waiter: W) -> bool:
        """A waiter waits no longer; False = it does not wait (any more): it may hold a permit."""
        queue = self.queues.get(scope, deque())
        if waiter not in queue:
            return False
        queue.remove(waiter)
        if not queue:
            del self.queues[scope]
        return True

    def _may(self, scope: TenantScope) -> bool:
        return self.total < self.policy.permits and self.held.get(scope, 0) < self.policy.per_tenant

    def _give(self, scope: TenantScope) -> None:
        self.total += 1
        self.held[scope] = self.held.get(scope, 0) + 1

    def _next(self) -> TenantScope | None:
        able = [scope for scope in self.queues if self._may(scope)]
        return min(able, key=lambda scope: self.held.get(scope, 0), default=None)


class Bulkhead:
    """The permits of one dependency in this process."""

    def __init__(
        self, dependency: str, clock: Clock, policy: BulkheadPolicy | None = None, observe: Observe = ignore
    ) -> None:
        """`dependency` is a word of the code or of the settings: it is a metric's label and part of a sentence."""
        self.dependency = dependency
        self._clock = clock
        self._observe = observe
        self._permits: Permits[asyncio.Future[None]] = Permits(policy or BulkheadPolicy())

    @asynccontextmanager
    async def permit(self, scope: TenantScope) -> AsyncIterator[None]:
        """Hold one permit of a tenant inside the block.

        Raises LimitExceededError when too many of the tenant's calls wait already, or this one waited too long.
        """
        await self._enter(scope)
        try:
            yield
        finally:
            self._leave(scope)

    async def _enter(self, scope: TenantScope) -> None:
        began = self._clock.monotonic()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        grant = self._permits.ask(scope, waiter)
        if grant is Grant.FULL:
            raise self._refusal("full", f"too many calls to {self.dependency} wait already; repeat in a second")
        if grant is Grant.WAITING:
            try:
                async with asyncio.timeout(self._permits.policy.wait_s):
                    await waiter
            except BaseException as error:
                # Given and given up at one moment: the permit came, but nobody is left to use it.
                if not self._permits.withdraw(scope, waiter):
                    self._leave(scope)
                if isinstance(error, TimeoutError):
                    sentence = f"no call to {self.dependency} ended in time; repeat in a second"
                    raise self._refusal("late", sentence) from error
                raise
        waited = self._clock.monotonic() - began
        self._observe(Measurement(BULKHEAD_WAIT_SECONDS, waited, {"dependency": self.dependency}))

    def _leave(self, scope: TenantScope) -> None:
        # A waiter that was cancelled a moment ago still stands in `_enter`, finds that it no longer waits, and hands
        # its permit on from there.
        for waiter in self._permits.give_back(scope):
            if not waiter.done():
                waiter.set_result(None)

    def _refusal(self, reason: str, sentence: str) -> LimitExceededError:
        self._observe(Measurement(BULKHEAD_REFUSALS, 1.0, {"dependency": self.dependency, "reason": reason}))
        return LimitExceededError(sentence)


class Bulkheads:
    """One bulkhead per dependency, made when it is first asked for."""

    def __init__(self, clock: Clock, policy: BulkheadPolicy | None = None, observe: Observe = ignore) -> None:
        self._clock = clock
        self._policy = policy
        self._observe = observe
        self._found: dict[str, Bulkhead] = {}

    def of(self, dependency: str) -> Bulkhead:
        """The bulkhead of a dependency: always the same one."""
        if dependency not in self._found:
            self._found[dependency] = Bulkhead(dependency, self._clock, self._policy, self._observe)
        return self._found[dependency]
