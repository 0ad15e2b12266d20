"""The role `autoscaler`: looks at every stage, decides how many workers it should have, and says so.

Promises: it decides and starts nothing itself; whoever starts workers asks `GET /ops/v1/scaling/{stage}`. A server that
does not answer leaves the last decision as it is, and after a minute there is none. One process is enough: a second one
would decide the same, a little later.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import structlog

from contracts.failures import InfrastructureError
from contracts.topology import STAGES, Stage
from deploy import keys
from deploy.settings import Settings
from deploy.stopping import stop_signal
from deploy.wiring import Kit, background, health_door, kit
from gateway.health import CollectorRegistry, serve
from gateway.scaling import ScalingAnswer, ScalingMeter, scaling_app
from governance.postgres.directory import PostgresDirectory
from resilience.autoscaling import Action, MetricsSnapshot, ScalingDecision, ScalingState, evaluate, policy_within
from resilience.management import BrokerManagement
from resilience.monitor import StageReading
from resilience.sampling import Sighting, carried, depth_of, is_whole, snapshot_between

log = structlog.get_logger("autoscaler")


@dataclass(slots=True)
class _Watched:
    """What is remembered of one stage between two looks."""

    before: Sighting | None = None
    state: ScalingState = field(default_factory=ScalingState)
    desired: int = 0
    answer: ScalingAnswer | None = None


class Autoscaler:
    """Looks and decides; `latest` is what the scaling call answers."""

    def __init__(self, k: Kit, directory: PostgresDirectory, management: BrokerManagement) -> None:
        s = k.settings
        self.policy = policy_within(s.scaling_slo_s, s.workers_min, s.workers_max)
        self.registry = CollectorRegistry()
        self._kit, self._directory, self._management = k, directory, management
        self._watched = {stage: _Watched() for stage in STAGES}
        self._meter = ScalingMeter(self.registry)

    async def run(self) -> None:
        """Look, decide, rest, for ever."""
        while True:
            try:
                await self.look()
            except InfrastructureError as error:
                log.warning("autoscaler.blind", reason=error.detail)
            await asyncio.sleep(self._kit.settings.scaling_period_s)

    async def look(self) -> None:
        """One look at every stage. Raises InfrastructureError when a server does not answer."""
        scopes = [profile.scope for profile in await self._directory.tenants()]
        now = self._kit.clock.now()
        counted = await self._kit.state_store.backlog(scopes, now)
        whole = []
        for stage, backlog in zip(STAGES, counted, strict=True):
            load = await self._management.loads(self._queues(stage))
            watched = self._watched[stage]
            learnt = watched.before.events_per_message if watched.before else 1.0
            seen = Sighting(now, backlog, load.messages, load.consumers, learnt)
            if is_whole(watched.before, seen):
                whole.append(stage)
            self._decide(stage, watched, seen)
            watched.before = replace(seen, events_per_message=carried(seen))
        await self._kit.state_store.trust(whole)

    def _queues(self, stage: Stage) -> list[str]:
        return [queue for layout in self._kit.layouts.running for queue in layout.stage_queues(stage)]

    def _decide(self, stage: Stage, watched: _Watched, seen: Sighting) -> None:
        current = watched.desired or max(seen.workers, self.policy.minimum)
        snapshot = snapshot_between(stage, watched.before, seen, current, self._kit.layouts.newest.partitions)
        decision = evaluate(snapshot, self.policy, watched.state, seen.as_of)
        watched.state, watched.desired = decision.state, decision.desired
        if decision.action is not Action.NO_ACTION:
            log.info("autoscaler.decided", stage=stage, action=decision.action, count=decision.desired)
        self._show(watched, seen, snapshot, decision)

    def _show(self, watched: _Watched, seen: Sighting, snapshot: MetricsSnapshot, decision: ScalingDecision) -> None:
        stage, depth = snapshot.stage, depth_of(seen)
        watched.answer = ScalingAnswer(
            depth.events,
            depth.messages,
            round(depth.oldest_age_s, 3),
            snapshot.arrival_rate,
            snapshot.service_rate or decision.state.service_rate,
            decision.desired,
            decision.reason,
            seen.as_of,
            depth.estimated,
        )
        self._meter.show(stage, watched.answer, seen.workers, decision.action)

    def readings(self) -> dict[str, StageReading]:
        """What the health port is judged by; a stage without a fresh answer could not be read."""
        answers = {stage: self.latest(stage) for stage in STAGES}
        return {
            stage: StageReading(None, None) if one is None else StageReading(one.backlog_events, one.oldest_age_s)
            for stage, one in answers.items()
        }

    def latest(self, stage: str) -> ScalingAnswer | None:
        """The last answer, None once it is too old to act on."""
        answer = self._watched[Stage(stage)].answer
        if answer is None:
            return None
        age_s = (self._kit.clock.now() - answer.as_of).total_seconds()
        return answer if age_s <= self.policy.max_metrics_age_s else None


async def run_autoscaler(settings: Settings) -> None:
    """The autoscaler, until SIGTERM or SIGINT."""
    async with kit(settings, "autoscaler") as k:
        directory = PostgresDirectory(k.engine, k.clock, keys.pepper(settings))
        management = BrokerManagement(settings.need("rabbitmq_management_url"))
        scaler = Autoscaler(k, directory, management)
        stop = stop_signal()
        try:
            async with background(k, stop, scaler.run()):
                app = scaling_app(health_door(k, scaler.registry, lambda: None, stages=scaler.readings), scaler.latest)
                await serve(app, settings.health_host, settings.scaling_port, stop=stop)
        finally:
            await management.close()
