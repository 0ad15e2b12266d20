"""The composition root: builds each role from settings, runs it, and stops it in a stated order.

Nothing is built or connected at import, and each role imports its own room only when it is built: nine
processes start at once on one machine. A role is a `Kit` of connected adapters plus what is started
on them; tests build the same roles from other settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog

from contracts.failures import InfrastructureError, MessagingFailureError, StateStoreError
from contracts.ports import Simulator
from contracts.topology import (
    DELIVERY_QUEUE,
    LABELS_QUEUE,
    METRICS_QUEUE,
    PARKED_SOURCES,
    STAGES,
    UNROUTED,
    Layout,
    Stage,
    parked_queue,
)
from deploy.runtime import RandomIds, SystemClock
from deploy.settings import Settings, SettingsError
from deploy.stopping import stop_signal
from gateway.health import CollectorRegistry, HealthDoor, HealthReport, health_app, serve
from gateway.refusals import RefusalCounter, RefusalLog, RefusalPolicy
from governance.postgres import engine as pg
from resilience.breaker import BreakerPolicy, Breakers, Phase, guarded
from resilience.monitor import MonitorPolicy, Readings, ServerReading, StageReading, judge
from resilience.rabbit import ConsumerPolicy, Handler, Probe, RabbitConsumer, RabbitPublisher, RabbitReplies
from resilience.redis import RedisStateStore, StatePolicy, connect, new_boot_id
from resilience.redis_features import RedisFeatureStore
from workers.telemetry import QueueTelemetry

if TYPE_CHECKING:
    from gateway.intake import Intake
    from governance.postgres import AsyncEngine, PostgresDirectory, PostgresLedger, PostgresRegistry
    from governance.postgres.layouts import PostgresLayouts
    from governance.postgres.pauses import PostgresPauses
    from workers.velocity import HealingFeatures

log = structlog.get_logger("role")

Queues = Sequence[str] | Callable[[Layout], Sequence[str]]
"""Of a consumer: the same whatever runs, or those of every version."""

_BEAT_S = 1.0
_DISCOVERY_S = 2.0
_DOOR_BREAKER = BreakerPolicy(window=6, minimum=3, open_s=1.0, growth=1.5, longest_s=5.0, probes=1, probe_s=5.0)
"""A door's calls take seconds to fail, and few are under way at once: what gathered goes together."""
_ANSWER_S = 3.0  # below the health port's own 5 s, so that a server that is away is named
# A refusal stays unacked until the record of its second is confirmed: a queue answers about so many in 1.5 s.
_INGEST_PREFETCH = 512
_SINK_PREFETCH, _SINK_GROUP, _SINK_LINGER_S = 512, 1_024, 0.05


@dataclass(frozen=True, slots=True)
class Kit:
    """The connected adapters of one process."""

    settings: Settings
    boot: str
    clock: SystemClock
    ids: RandomIds
    engine: AsyncEngine
    publisher: RabbitPublisher
    state_store: RedisStateStore
    telemetry: QueueTelemetry
    layouts: PostgresLayouts
    features: RedisFeatureStore

    async def read(self) -> Readings:
        """Whether each server answers now, and in what time (s); all three at once."""

        async def one(ping: Callable[[], Awaitable[object]]) -> ServerReading:
            began = self.clock.monotonic()
            try:
                async with asyncio.timeout(_ANSWER_S):
                    await ping()
            except (InfrastructureError, TimeoutError):
                return ServerReading(answered=False)
            return ServerReading(True, self.clock.monotonic() - began)

        return Readings(
            *await asyncio.gather(
                one(lambda: pg.ping(self.engine)), one(self.state_store.ping), one(self.publisher.ping)
            )
        )

    async def probe(self) -> None:
        """Raise the InfrastructureError of the first server that does not answer."""
        await self.publisher.ping()
        await self.state_store.ping()
        await pg.ping(self.engine)


@asynccontextmanager
async def kit(settings: Settings, role: str) -> AsyncIterator[Kit]:
    """Connect to the three servers; refuses unsafe ones. Raises an InfrastructureError that says what to do."""
    from governance.postgres.layouts import PostgresLayouts

    ids, clock = RandomIds(), SystemClock()
    boot = new_boot_id(ids.token())
    engine = pg.create_engine(settings.need("database_url"), application_name=f"riskfleet-{role}")
    policy = StatePolicy(settings.lease_ms, settings.state_ttl, settings.tombstone_ttl)
    client = connect(settings.need("redis_url"))
    state_store, features = RedisStateStore(client, boot, policy), RedisFeatureStore(client, clock, ids)
    publisher = RabbitPublisher(
        settings.need("rabbitmq_url"), timeout_s=settings.publish_timeout_s, name=f"riskfleet-{role}"
    )
    telemetry = QueueTelemetry(publisher, ids)
    layouts = PostgresLayouts(engine, settings.partitions)
    try:
        await pg.check_settings(engine)
        await layouts.refresh()
        await check_eviction(state_store)
        await publisher.start()
        await telemetry.start()
        spare_collector()
        yield Kit(settings, boot, clock, ids, engine, publisher, state_store, telemetry, layouts, features)
        # Last measurements need the publisher; the publisher outlives everything that publishes.
        await telemetry.stop()
    finally:
        await publisher.close()
        await state_store.close()
        await pg.dispose(engine)


def spare_collector() -> None:
    """What is there once a process has started stays as long as the process: the collector need not look at it again.

    Events leave few cycles behind, and many objects at once: with CPython's own threshold of 700 a group of them starts
    many collections that find nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


async def check_eviction(state_store: RedisStateStore) -> None:
    """Raise StateStoreError unless Redis refuses writes rather than evict state."""
    policy = await state_store.eviction_policy()
    if policy != "noeviction":
        raise StateStoreError(
            f"Redis evicts ({policy}): set 'maxmemory-policy noeviction', since evicted state is lost"
        )


def role(settings: Settings, role: str, which: str | None) -> Coroutine[Any, Any, None]:
    """The work of a role: gateway, ingress, control, autoscaler, worker STAGE, or sink audit|metrics|parking.

    Raises SettingsError for a role that there is not.
    """
    match role, which:
        case "control", None:
            from deploy.control import run_control

            return run_control(settings)
        case "gateway", None:
            return run_gateway(settings)
        case "ingress", None:
            return run_ingress(settings)
        case "autoscaler", None:
            from deploy.autoscaler import run_autoscaler

            return run_autoscaler(settings)
        case "worker", str(stage) if stage in STAGES:
            return run_worker(settings, Stage(stage))
        case "sink", "audit" | "metrics" | "parking":
            return run_sink(settings, str(which))
    raise SettingsError(f"there is no role {role} {which or ''}: see riskfleet --help")


async def run_worker(settings: Settings, stage: Stage) -> None:
    """One stage's worker over all partitions, until SIGTERM or SIGINT."""
    from governance.postgres.ledger import PostgresLedger
    from workers.gate import StageGate
    from workers.runner import RunnerPolicy, RunnerPorts, StageRunner
    from workers.settling import RetryPolicy
    from workers.stages import StagePorts

    async with kit(settings, stage) as k:
        gate = StageGate(stage, pauses(k), k.telemetry, k.clock)
        ledger = PostgresLedger(k.engine)
        ports = RunnerPorts(
            k.state_store,
            ledger,
            k.publisher,
            StagePorts(ledger, registry(k), healing(k)),
            k.telemetry,
            k.clock,
            k.ids,
            gate,
        )
        policy = RunnerPolicy(retry=RetryPolicy(settings.retry_waits_ms))
        runner = StageRunner(stage, ports, k.layouts, policy)
        parts = [(lambda layout: layout.stage_queues(stage), gate.through(runner.handle))]
        await _consume(k, stage, parts, gate=gate.check)


def registry(k: Kit) -> PostgresRegistry:
    """The registry as workers read it: what is signed by this installation's keys, and what the release brings."""
    from deploy import keys
    from governance.postgres.registry import PostgresRegistry

    return PostgresRegistry(k.engine, k.clock, keys.artifact_verifier(k.settings))


def healing(k: Kit) -> HealingFeatures:
    """Velocity as stages read it."""
    from governance.postgres.past import PostgresPast
    from workers.velocity import HealingFeatures

    return HealingFeatures(k.features, PostgresPast(k.engine))


def pauses(k: Kit) -> PostgresPauses:
    """What is paused, as this process reads it."""
    from governance.postgres.pauses import PostgresPauses

    return PostgresPauses(k.engine, k.clock, k.layouts)


async def run_sink(settings: Settings, sink: str) -> None:
    """One sink (audit, metrics or parking), until SIGTERM or SIGINT.

    Parking takes whatever comes seldom and ends in a row or a second try: dead letters, labels, and decisions on
    their ladder.
    """
    async with kit(settings, f"sink-{sink}") as k:
        measured = CollectorRegistry()
        if sink == "audit":
            from governance.postgres.audit import PostgresAuditLog
            from workers.sinks.audit import AuditSink

            audit = AuditSink(PostgresAuditLog(k.engine, k.clock), k.publisher, k.telemetry, k.clock)
            parts: list[tuple[Queues, Handler]] = [(Layout.audit_queues, audit.handle)]
        elif sink == "parking":
            from governance.postgres.deadletters import PostgresDeadLetters
            from governance.postgres.labels import PostgresLabelBook
            from governance.postgres.ledger import PostgresLedger
            from governance.postgres.past import PostgresPast
            from workers.sinks.delivery import DeliverySink
            from workers.sinks.labels import LabelsSink
            from workers.sinks.parking import ParkingSink, TenantBrake
            from workers.velocity import LabelFeed

            brake = TenantBrake(pauses(k).trip, k.telemetry, k.clock)
            letters = ParkingSink(PostgresDeadLetters(k.engine, k.clock), k.clock, brake)
            feed = LabelFeed(k.features, PostgresPast(k.engine)).feed
            labels = LabelsSink(PostgresLabelBook(k.engine), k.publisher, k.telemetry, k.clock, feed)
            parts = [
                ([parked_queue(source) for source in PARKED_SOURCES], letters.handle),
                ([LABELS_QUEUE], labels.handle),
                ([DELIVERY_QUEUE], DeliverySink(PostgresLedger(k.engine), k.publisher, k.telemetry).handle),
            ]
        else:
            from workers.sinks.metrics import MetricsSink

            parts = [([METRICS_QUEUE], MetricsSink(measured).handle)]
        await _consume(k, f"sink-{sink}", parts, measured)


async def run_gateway(settings: Settings) -> None:
    """The HTTP door, until SIGTERM or SIGINT."""
    from deploy import keys
    from deploy.credentials import authenticator
    from gateway.http import HttpPorts, create_app
    from gateway.labelling import LabelDesk
    from gateway.waiting import Waiting
    from governance.postgres.directory import PostgresDirectory
    from governance.postgres.feed import PostgresDecisionFeed
    from governance.postgres.ledger import PostgresLedger

    async with kit(settings, "gateway") as k:
        breakers = Breakers(k.clock, _DOOR_BREAKER, k.telemetry.record)
        state_store = guarded(k.state_store, breakers.of("redis"))
        ledger = guarded(PostgresLedger(k.engine), breakers.of("postgresql"))
        directory = PostgresDirectory(k.engine, k.clock, keys.pepper(settings))
        refusals, intake = _doors(k, state_store, ledger, directory)
        stop = stop_signal()
        async with AsyncExitStack() as stack:
            replies = RabbitReplies(settings.need("rabbitmq_url"), k.boot)
            await replies.start()
            stack.push_async_callback(replies.close)
            ports = HttpPorts(
                authenticator(settings, directory, k.clock),
                directory,
                ledger,
                state_store,
                k.ids,
                feed=PostgresDecisionFeed(k.engine),
                labels=LabelDesk(k.publisher, k.telemetry, k.clock, refusals),
                simulator=_simulator(k, ledger),
                waiting=Waiting(replies, ledger, k.clock, stopping=stop),
                pauses=pauses(k),
            )
            door = health_door(k, CollectorRegistry(), lambda: None, breakers=breakers.phases)
            app = create_app(intake, ports, refusals, door, layouts=k.layouts)
            async with background(k, stop, refusals.run(asyncio.Event())):
                await serve(app, settings.http_host, settings.http_port, stop=stop)
        await refusals.flush(final=True)


def _simulator(k: Kit, ledger: PostgresLedger) -> Simulator | None:
    if not k.settings.simulations:
        return None
    from workers.simulation import StageSimulator
    from workers.stages import StagePorts

    ports = StagePorts(ledger, registry(k), healing(k), recording=False)
    return StageSimulator(ports, k.clock, k.ids, k.settings.simulations, k.telemetry.record)


async def run_ingress(settings: Settings) -> None:
    """The AMQP door over the ingest queue of every tenant with a broker user, until SIGTERM or SIGINT."""
    from deploy import keys
    from gateway.ingress import Ingress
    from gateway.labelling import LabelDesk
    from governance.postgres.directory import PostgresDirectory
    from governance.postgres.ledger import PostgresLedger

    async with kit(settings, "ingress") as k:
        directory = PostgresDirectory(k.engine, k.clock, keys.pepper(settings))
        refusals, intake = _doors(k, k.state_store, PostgresLedger(k.engine), directory)
        labels, standing = LabelDesk(k.publisher, k.telemetry, k.clock, refusals), pauses(k)
        ingress = Ingress(intake, labels, directory, k.publisher, refusals, k.clock, k.ids, standing)
        policy = ConsumerPolicy(max(k.settings.prefetch, _INGEST_PREFETCH), k.settings.group)
        consumer = _consumer(k, [UNROUTED], ingress.handle, policy)
        stop = stop_signal()
        await consumer.start()
        async with background(
            k, stop, refusals.run(asyncio.Event()), discover(consumer, directory, standing), consumer.join()
        ):
            door = health_door(k, CollectorRegistry(), lambda: consumer.paused_reason)
            await serve(health_app(door), settings.health_host, settings.health_port, stop=stop)
            await consumer.stop()
        await refusals.flush(final=True)


def _doors(
    k: Kit, state_store: RedisStateStore, ledger: PostgresLedger, directory: PostgresDirectory
) -> tuple[RefusalLog, Intake]:
    from gateway.intake import Intake, IntakePorts

    counter = RefusalCounter(RefusalPolicy(k.boot))
    refusals = RefusalLog(counter, k.publisher, k.telemetry, k.clock, k.layouts)
    ports = IntakePorts(state_store, k.publisher, ledger, k.telemetry, k.clock, k.ids, directory)
    return refusals, Intake(ports, refusals, k.layouts)


async def discover(consumer: RabbitConsumer, directory: PostgresDirectory, standing: PostgresPauses) -> None:
    """Take up the queues of new tenants, within seconds of their making, and leave those of paused ones alone.

    What such a queue delivered before is held by the door; anything more would only travel to and fro.
    """
    while True:
        with contextlib.suppress(InfrastructureError):
            scopes = [profile.scope for profile in await directory.tenants() if profile.broker_user is not None]
            for scope, notice in zip(scopes, await standing.doors(scopes), strict=True):
                change = consumer.add_queue if notice is None else consumer.drop_queue
                with contextlib.suppress(MessagingFailureError):  # a tenant whose queue is missing holds up no other
                    await change(scope.ingest_queue)
        await asyncio.sleep(_DISCOVERY_S)


def _consumer(
    k: Kit, queues: Sequence[str], handler: Handler, policy: ConsumerPolicy | None = None, probe: Probe | None = None
) -> RabbitConsumer:
    policy = policy or ConsumerPolicy(k.settings.prefetch, k.settings.group)
    return RabbitConsumer(k.settings.need("rabbitmq_url"), queues, handler, probe or k.probe, policy)


async def _follow(k: Kit, consumers: Sequence[tuple[RabbitConsumer, Queues]]) -> None:
    """Take up the queues of versions that are new, and leave those of retired ones, within seconds."""
    while True:
        await asyncio.sleep(_DISCOVERY_S)
        for consumer, queues in consumers:
            wanted = _wanted(k, queues)
            for queue in wanted:
                with contextlib.suppress(MessagingFailureError):
                    await consumer.add_queue(queue)
            for queue in set(consumer.queues) - set(wanted):
                await consumer.drop_queue(queue)


def _wanted(k: Kit, queues: Queues) -> list[str]:
    """What a role consumes now, the oldest version first, so that it drains."""
    if callable(queues):
        return [queue for layout in k.layouts.running for queue in queues(layout)]
    return list(queues)


async def _consume(
    k: Kit,
    role: str,
    parts: Sequence[tuple[Queues, Handler]],
    measured: CollectorRegistry | None = None,
    gate: Probe | None = None,
) -> None:
    """Beat, consume and answer health until told to stop; then finish the groups in hand.

    `gate` raises while the role is paused on purpose: it then waits, and is not ready, as when a server is away.
    """

    async def probe() -> None:
        await k.probe()
        if gate is not None:
            await gate()

    await k.state_store.beat()
    sink = ConsumerPolicy(_SINK_PREFETCH, _SINK_GROUP, _SINK_LINGER_S) if role.startswith("sink-") else None
    followed = [(_consumer(k, _wanted(k, queues), handler, sink, probe), queues) for queues, handler in parts]
    consumers = [consumer for consumer, _ in followed]
    stop = stop_signal()
    for consumer in consumers:
        await consumer.start()
    log.info("role.ready", role=role, count=sum(len(consumer.queues) for consumer in consumers))
    async with background(k, stop, _follow(k, followed), *(consumer.join() for consumer in consumers)):

        def paused() -> str | None:
            return next((consumer.paused_reason for consumer in consumers if consumer.paused_reason), None)

        door = health_door(k, measured or CollectorRegistry(), paused, gate=probe)
        await serve(health_app(door), k.settings.health_host, k.settings.health_port, stop=stop)
        # Together, and while the heart still beats: what is being finished belongs to a living process.
        await asyncio.gather(*(consumer.stop() for consumer in consumers))


def health_door(
    k: Kit,
    measured: CollectorRegistry,
    paused: Callable[[], str | None],
    *,
    stages: Callable[[], Mapping[str, StageReading]] = dict,
    breakers: Callable[[], Mapping[str, Phase]] = dict,
    gate: Probe | None = None,
) -> HealthDoor:
    """Health of a role: the verdict on its three servers, whether it is paused, and the stages and breakers it has.

    `gate` raises what else keeps the role from its work.
    """

    async def check() -> HealthReport:
        reason = paused()
        if reason is None and gate is not None:
            try:
                await gate()
            except InfrastructureError as error:
                reason = error.detail
        readings = replace(await k.read(), stages=stages(), breakers=breakers(), paused=reason)
        return HealthReport.of(judge(readings, MonitorPolicy()))

    return HealthDoor(k.settings.environment, k.settings.version, check, measured)


@asynccontextmanager
async def background(k: Kit, stop: asyncio.Event, *work: Awaitable[None]) -> AsyncIterator[None]:
    """The heartbeat and other endless work beside a role; a task that dies stops the role, loudly."""
    tasks = [asyncio.ensure_future(item) for item in (_beat_forever(k), _read_layouts(k), *work)]
    for task in tasks:
        task.add_done_callback(lambda t: None if t.cancelled() else stop.set())
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _read_layouts(k: Kit) -> None:
    while True:
        await asyncio.sleep(_DISCOVERY_S)
        with contextlib.suppress(InfrastructureError):
            await k.layouts.refresh()


async def _beat_forever(k: Kit) -> None:
    while True:
        with contextlib.suppress(StateStoreError):
            await k.state_store.beat()
        await asyncio.sleep(_BEAT_S)
