"""Simulation: the four stages in one go, for an event that is never submitted.

Promises the decision that the pipeline would make of the same event, on the same facts, from its beginning or from a
version that it has reached; records nothing, sends nothing, and takes no more of a process than its permits. A failing
server is the caller's to hear of: there is nothing to retry. Does not hold a decision for anybody to find later.
"""

from __future__ import annotations

from contracts.events import Event, event_id_of
from contracts.failures import InvalidWorkflowStateError
from contracts.outcomes import Decision
from contracts.ports import Clock, Ids
from contracts.state import EventState, begin
from contracts.telemetry import current_correlation
from contracts.tenancy import TenantScope
from resilience.bulkhead import Bulkhead, BulkheadPolicy
from resilience.limiter import Observe, ignore
from workers.pipeline import PIPELINE
from workers.stages import StagePorts


class StageSimulator:
    """The ports Simulator and Redecider over the stages themselves."""

    def __init__(self, ports: StagePorts, clock: Clock, ids: Ids, permits: int, observe: Observe = ignore) -> None:
        """At most `permits` (≥ 1) at once in this process, and at most half of them (at least one) for one tenant.

        Nobody waits for a permit: whoever tries an event out is told at once when to come again.
        """
        policy = BulkheadPolicy(permits, max(permits // 2, 1), waiting=0)
        self._ports = ports
        self._clock = clock
        self._ids = ids
        self._bulkhead = Bulkhead("simulation", clock, policy, observe)

    async def simulate(self, scope: TenantScope, event: Event) -> Decision:
        """The decision that the event would get now. Its own id is not looked up: nothing was or will be submitted.

        Raises LimitExceededError when too many run at once, InfrastructureError when PostgreSQL does not answer.
        """
        async with self._bulkhead.permit(scope):
            return await self._finish(self._begun(scope, event))

    async def redecide(self, state: EventState) -> Decision:
        """The decision that this version would come to now; its pins hold if it has them.

        Raises what its stages raise, and LimitExceededError as `simulate` does.
        """
        async with self._bulkhead.permit(state.scope):
            return await self._finish(state)

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
