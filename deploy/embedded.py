"""The whole fleet in one process on the twins: no server, first decision in seconds, nothing kept.

Every room runs the code that it runs in production; only the adapters of RabbitMQ, Redis and PostgreSQL are replaced
by their twins in memory. Promises the same answers. Keeps no promise across a crash or a stop: the events, the
decisions and the audit end with the process.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

from contracts.failures import InvalidWorkflowStateError, RiskfleetError
from contracts.ports import Clock, DecisionRow, Publisher, Telemetry
from contracts.tenancy import TenantScope
from contracts.topology import (
    DELIVERY_QUEUE,
    LABELS_QUEUE,
    METRICS_QUEUE,
    PARKED_SOURCES,
    STAGES,
    UNROUTED,
    Layouts,
    parked_queue,
    tenant_ingest,
    topology,
)
from deploy.runtime import RandomIds, SystemClock
from deploy.settings import Settings
from gateway.health import CollectorRegistry, HealthDoor, HealthReport
from gateway.http import HttpPorts, create_app
from gateway.ingress import Ingress
from gateway.intake import Admission, Intake, IntakePorts, Refusal, Submission
from gateway.labelling import LabelDesk
from gateway.refusals import RefusalCounter, RefusalLog, RefusalPolicy
from gateway.waiting import Waiting
from gateway.web import Application
from governance.access import KEY_BYTES, new_api_key
from governance.memory import (
    MemoryAuditLog,
    MemoryDatabase,
    MemoryDeadLetters,
    MemoryDecisionFeed,
    MemoryDirectory,
    MemoryLabelBook,
    MemoryLedger,
    MemoryRegistry,
)
from governance.memory.past import MemoryPast
from governance.memory.records import DEAD_LETTERS
from resilience.memory.broker import MemoryBroker
from resilience.memory.consumer import MemoryConsumer
from resilience.memory.features import MemoryFeatureStore
from resilience.memory.replies import MemoryReplies
from resilience.memory.state_store import MemoryRedis, MemoryStateStore
from resilience.rabbit import ConsumerPolicy, Handler
from resilience.redis import StatePolicy, new_boot_id
from workers.runner import RunnerPolicy, RunnerPorts, StageRunner
from workers.settling import RetryPolicy
from workers.simulation import StageSimulator
from workers.sinks.audit import AuditSink
from workers.sinks.delivery import DeliverySink
from workers.sinks.labels import LabelsSink
from workers.sinks.metrics import MetricsSink
from workers.sinks.parking import ParkingSink
from workers.stages import StagePorts
from workers.telemetry import QueueTelemetry
from workers.velocity import HealingFeatures, LabelFeed

BANNER: Final = "embedded: everything is in memory and ends with this process; it keeps no promise across a crash"
TENANT: Final = TenantScope("demo")
_AT_ONCE: Final = 256
_LOOK_S: Final = 0.02
_SINK: Final = ConsumerPolicy(prefetch=512, group=1_024)


@dataclass(frozen=True, slots=True)
class EmbeddedFleet:
    """A running fleet: its door, its tables, and the demo tenant's API key."""

    app: Application
    intake: Intake
    ledger: MemoryLedger
    database: MemoryDatabase
    audit: MemoryAuditLog
    broker: MemoryBroker
    api_key: str

    async def decide(
        self, bodies: Sequence[bytes | RiskfleetError], decided: Callable[[int], None] = lambda _: None
    ) -> list[DecisionRow | Refusal]:
        """Submit events of the demo tenant and wait for their answers, in order.

        `decided` is called with how many have their answer. An event that was parked is a refusal with its problem.
        """
        template = Submission(TENANT, None, b"", None, None, None, "http", allow_generated_identity=True)
        answers: list[DecisionRow | Refusal | Admission] = []
        for start in range(0, len(bodies), _AT_ONCE):
            some = bodies[start : start + _AT_ONCE]
            answers += await asyncio.gather(*(self._admit(template, body) for body in some))
        while places := [i for i, answer in enumerate(answers) if isinstance(answer, Admission)]:
            keys = [(TENANT, answer.event_id) for answer in answers if isinstance(answer, Admission)]
            parked = await self.parked()
            for place, (_, event_id), row in zip(places, keys, await self.ledger.decisions(keys), strict=True):
                problem = parked.get(event_id)
                if row is not None:
                    answers[place] = row
                elif problem is not None:
                    answers[place] = Refusal(InvalidWorkflowStateError(f"parked: {problem}"), event_id)
            decided(len(answers) - sum(isinstance(answer, Admission) for answer in answers))
            await asyncio.sleep(_LOOK_S)
        return [answer for answer in answers if not isinstance(answer, Admission)]

    async def _admit(self, template: Submission, body: bytes | RiskfleetError) -> Admission | Refusal:
        return (
            Refusal(body) if isinstance(body, RiskfleetError) else await self.intake.admit(replace(template, body=body))
        )

    async def parked(self) -> dict[str, str]:
        """The problem of each event that has an open dead letter."""
        letters = await self.database.run([TENANT], lambda tx: tx.rows(DEAD_LETTERS))
        return {letter.event_id: letter.problem for letter in letters if letter.status == "open"}


@asynccontextmanager
async def embedded(settings: Settings) -> AsyncIterator[EmbeddedFleet]:
    """Start every role in this process; stops them in the fleet's order: doors, stages, sinks."""
    clock, ids = SystemClock(), RandomIds()
    boot = new_boot_id(ids.token())
    layouts, database, redis = Layouts.first(settings.partitions), MemoryDatabase(clock), MemoryRedis(clock)
    broker = MemoryBroker(topology(settings.partitions), clock)
    await broker.apply(tenant_ingest(TENANT.ingest_queue, TENANT.tenant_id))
    past, features = MemoryPast(database), MemoryFeatureStore(redis, ids)
    directory, ledger, registry = MemoryDirectory(database), MemoryLedger(database), MemoryRegistry(database)
    api_key, _, _ = new_api_key(secrets.token_bytes(KEY_BYTES), secrets.token_bytes(32))
    directory.create_tenant(TENANT, "Demo tenant", f"up-{TENANT}")
    directory.create_api_key(TENANT, api_key)

    publisher = broker.publisher("embedded", timeout_s=settings.publish_timeout_s)
    store = MemoryStateStore(redis, boot, StatePolicy(settings.lease_ms, settings.state_ttl, settings.tombstone_ttl))
    telemetry = QueueTelemetry(publisher, ids)
    refusals = RefusalLog(RefusalCounter(RefusalPolicy(boot)), publisher, telemetry, clock, layouts)
    intake = Intake(IntakePorts(store, publisher, ledger, telemetry, clock, ids), refusals, layouts)
    stage_ports = StagePorts(ledger, registry, HealingFeatures(features, past))
    replies, stopping, measured = MemoryReplies(broker, boot), asyncio.Event(), CollectorRegistry()
    runner_ports = RunnerPorts(store, ledger, publisher, stage_ports, telemetry, clock, ids)
    runner_policy = RunnerPolicy(retry=RetryPolicy(settings.retry_waits_ms))
    labels = LabelDesk(publisher, telemetry, clock, refusals)

    async def probe() -> None:
        await publisher.ping()

    def consumer(queues: Sequence[str], handler: Handler, policy: ConsumerPolicy | None = None) -> MemoryConsumer:
        return broker.consumer(queues, handler, probe, policy or ConsumerPolicy(settings.prefetch, settings.group))

    doors = [
        consumer(
            [UNROUTED, TENANT.ingest_queue],
            Ingress(intake, labels, directory, publisher, refusals, clock, ids).handle,
        )
    ]
    stages = [
        consumer(
            layouts.newest.stage_queues(stage),
            StageRunner(stage, runner_ports, layouts, runner_policy).handle,
        )
        for stage in STAGES
    ]
    sinks = [
        consumer(queues, handler, _SINK)
        for queues, handler in _sink_handlers(
            database, publisher, telemetry, clock, measured, layouts, LabelFeed(features, past)
        )
    ]

    async def check() -> HealthReport:
        reasons = tuple(c.paused_reason for c in (*doors, *stages, *sinks) if c.paused_reason)
        return HealthReport(not reasons, reasons)

    ports = HttpPorts(
        directory,
        directory,
        ledger,
        store,
        ids,
        feed=MemoryDecisionFeed(database),
        labels=labels,
        simulator=StageSimulator(replace(stage_ports, recording=False), clock, ids, settings.simulations)
        if settings.simulations
        else None,
        waiting=Waiting(replies, ledger, clock, stopping=stopping),
    )
    door = HealthDoor(settings.environment, settings.version, check, measured)
    app = create_app(intake, ports, refusals, door, layouts=layouts)
    ticking = asyncio.create_task(broker.run(), name="embedded-broker")
    flushing = asyncio.create_task(refusals.run(asyncio.Event()), name="embedded-refusals")
    try:
        await store.beat()
        await telemetry.start()
        await replies.start()
        for part in (*sinks, *reversed(stages), *doors):
            await part.start()
        yield EmbeddedFleet(app, intake, ledger, database, MemoryAuditLog(database), broker, api_key)
    finally:
        stopping.set()
        for part in (*doors, *stages):
            await part.stop()
        await refusals.flush(final=True)
        await telemetry.stop()
        for part in sinks:
            await part.stop()
        await replies.close()
        for task in (ticking, flushing):
            task.cancel()
        await asyncio.gather(ticking, flushing, return_exceptions=True)


def _simulator(settings: Settings, ports: StagePorts, clock: Clock, ids: RandomIds) -> StageSimulator | None:
    if not settings.simulations:
        return None
    return StageSimulator(replace(ports, recording=False), clock, ids, settings.simulations)


def _sink_handlers(
    database: MemoryDatabase,
    publisher: Publisher,
    telemetry: Telemetry,
    clock: Clock,
    measured: CollectorRegistry,
    layouts: Layouts,
    feed: LabelFeed,
) -> list[tuple[Sequence[str], Handler]]:
    audit, book = MemoryAuditLog(database), MemoryLabelBook(database)
    return [
        (layouts.newest.audit_queues(), AuditSink(audit, publisher, telemetry, clock).handle),
        ([parked_queue(source) for source in PARKED_SOURCES], ParkingSink(MemoryDeadLetters(database), clock).handle),
        ([LABELS_QUEUE], LabelsSink(book, publisher, telemetry, clock, feed.feed).handle),
        ([DELIVERY_QUEUE], DeliverySink(MemoryLedger(database), publisher, telemetry).handle),
        ([METRICS_QUEUE], MetricsSink(measured).handle),
    ]
