"""Simulation: the four stages in one go, for an event that is never submitted.

Promises the decision that the pipeline would make of the same event, on the same facts, from its beginning or from a
version that it has reached; records nothing, sends nothing, and takes no more of a process than its permits. A failing
server is the caller's to hear of: there is nothing to retry. Does not hold a decision for anybody to find later.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from contracts.events import Event, event_id_of
from contracts.failures import InvalidWorkflowStateError, LimitExceededError
from contracts.outcomes import Decision
from contracts.ports import Clock, Ids
from contracts.state import EventState, begin
from contracts.telemetry import current_correlation
from contracts.tenancy import TenantScope
from workers.pipeline import PIPELINE
from workers.stages import StagePorts


class StageSimulator:
    """The ports Simulator and Redecider over the stages themselves."""

    def __init__(self, ports: StagePorts, clock: Clock, ids: Ids, permits: int) -> None:
        """At most `permits` (≥ 1) at once in this process, and at most half of them (at least one) for one tenant."""
        if permits < 1:
            raise ValueError("a simulator needs at least one permit")
        self._ports = ports
        self._clock = clock
        self._ids = ids
        self._permits = permits
        self._share = max(permits // 2, 1)
        self._running: dict[TenantScope, int] = {}

    async def simulate(self, scope: TenantScope, event: Event) -> Decision:
        """The decision that the event would get now. Its own id is not looked up: nothing was or will be submitted.

        Raises LimitExceededError when too many run at once, InfrastructureError when PostgreSQL does not answer.
        """
        return await self._permitted(scope, lambda: self._finish(self._begun(scope, event)))

    async def redecide(self, state: EventState) -> Decision:
        """The decision that this version would come to now; its pins hold if it has them.

        Raises what its stages raise, and LimitExceededError as `simulate` does.
        """
        return await self._permitted(state.scope, lambda: self._finish(state))

    async def _permitted(self, scope: TenantScope, work: Callable[[], Awaitable[Decision]]) -> Decision:
        mine = self._running.get(scope, 0)
        if mine >= self._share or sum(self._running.values()) >= self._permits:
            raise LimitExceededError("too many simulations run at once; repeat in a moment")
        self._running[scope] = mine + 1
        try:
            return await work()
        finally:
            self._running[scope] -= 1
            if not self._running[scope]:
                del self._running[scope]

    def _begun(self, scope: TenantScope, event: Event) -> EventState:
        correlation = current_correlation()
        return begin(
            scope,
            event_id_of(scope, event.id if event.id is not None else self._ids.uuid7()),
            event,
            received_at=self._now(),
            source="simulation",
            correlation_id=correlation.correlation_id or self._ids.uuid7(),
            traceparent=correlation.traceparent,
        )

    async def _finish(self, state: EventState) -> Decision:
        for stage in PIPELINE[state.KIND][state.n :]:
            (facts,) = await stage.gather([state], self._ports)
            step = stage.decide(state, facts, self._now(), self._clock.monotonic)
            state = state.transition(step.target, step.section, stage=stage.stage, detail=step.detail)
        if state.decided is None:
            raise InvalidWorkflowStateError("the last stage decided nothing")
        return state.decided.decision

    def _now(self) -> str:
        return self._clock.now().isoformat()
