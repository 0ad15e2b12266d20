"""The whole fleet in one loop: doors, stages and sinks as processes that can be killed or stopped at named places.

Every process runs the code that it runs in production, on the twins of the servers. Its ports are wrapped so that each
call passes a named place before it is sent and after it was answered; the code itself knows of none. Promises that a
killed process loses its memory, its connection and its locks' owner, and that a stopped one keeps them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from random import Random
from typing import Any, Final

from contracts.failures import InfrastructureError
from contracts.ports import Confirm, Message
from contracts.settlement import Settlement
from contracts.telemetry import Measurement
from contracts.tenancy import TenantScope
from contracts.topology import (
    DECISIONS,
    DELIVERY_QUEUE,
    PARKED_SOURCES,
    REJECTED,
    STAGES,
    UNROUTED,
    Binding,
    Layouts,
    Queue,
    Stage,
    Topology,
    audit_queue,
    parked_queue,
    stage_queue,
    tenant_ingest,
    topology,
)
from gateway.ingress import Ingress
from gateway.intake import Intake, IntakePorts
from gateway.labelling import LabelDesk
from gateway.refusals import RefusalCounter, RefusalLog, RefusalPolicy
from governance.memory import (
    MemoryAuditLog,
    MemoryDatabase,
    MemoryDeadLetters,
    MemoryDirectory,
    MemoryLedger,
    MemoryRegistry,
)
from governance.memory.past import MemoryPast
from resilience.memory.broker import Faults, MemoryBroker
from resilience.memory.consumer import MemoryConsumer
from resilience.memory.features import MemoryFeatureStore
from resilience.memory.state_store import MemoryRedis, MemoryStateStore
from resilience.rabbit import ConsumerPolicy, Handler, PausePolicy
from resilience.redis import StatePolicy
from tests.simulation.loop import Life, Owner, VirtualLoop
from workers.runner import RunnerPolicy, RunnerPorts, StageRunner
from workers.settling import RetryPolicy
from workers.sinks.audit import AuditSink
from workers.sinks.delivery import DeliverySink
from workers.sinks.parking import ParkingSink
from workers.stages import StagePorts
from workers.velocity import HealingFeatures

TENANTS: Final = (TenantScope("acme"), TenantScope("globex"), TenantScope("initech"))
START: Final = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
RESTART_S: Final = 1.0
LEASE_S: Final = 10.0
_BEAT_TTL_S: Final = 6.0
_FOR_EVER_MS: Final = 1 << 50

_CALLS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(STAGES, ("claim", "advance", "publish")),
    "gateway": ("reserve", "publish"),
    "ingress": ("reserve", "publish"),
    "sink-audit": ("append",),
    "sink-parking": ("park",),
}
_MORE: Final[dict[str, tuple[str, ...]]] = {
    Stage.RETRIEVAL: ("record_events", "active", "histories", "observe"),
    Stage.SCORING: ("artifacts",),
    Stage.GUARDRAIL: ("artifacts",),
    Stage.DECISION: ("revoked", "decide"),
}
_HALVES: Final = ("publish.records-first", "publish.onward-first")


@cache
def places_of(kind: str) -> tuple[str, ...]:
    """The named places that a process of this kind passes with every event, in no order."""
    calls = (*_CALLS.get(kind, ()), *_MORE.get(kind, ()))
    places = tuple(f"{call}.{edge}" for call in calls for edge in ("sent", "answered"))
    if kind in STAGES:
        places += _HALVES
    return (*places, "answered") if kind == "gateway" else (*places, "delivered", "settled")


KINDS: Final = tuple(_CALLS)
ALL_PLACES: Final = tuple((kind, place) for kind in KINDS for place in places_of(kind))
"""Every failpoint: a kind of process, and a place in it."""


class Counts:
    """What happened, for reports and for the question whether a run bit at all."""

    def __init__(self) -> None:
        self.metrics: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.hits: Counter[tuple[str, str]] = Counter()

    def record(self, *measurements: Measurement) -> None:
        """The port Telemetry."""
        for m in measurements:
            self.metrics[m.metric.name] += int(m.value) if m.value >= 1 else 1


class Clock:
    """A process's clock: the loop's time, wrong by `skew`."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.skew = timedelta()

    def now(self) -> datetime:
        """Aware, UTC."""
        return START + timedelta(seconds=self._loop.time()) + self.skew

    def monotonic(self) -> float:
        """Seconds from the start."""
        return self._loop.time()


class Ids:
    """Ids by the seed."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def token(self) -> str:
        """32 hex digits."""
        return f"{self._random.getrandbits(128):032x}"

    def uuid7(self) -> str:
        """A well-formed UUID, version 7."""
        return f"01900000-0000-7000-8000-{self._random.getrandbits(48):012x}"


class Passing:
    """A port whose calls pass a place before they are sent and after they were answered."""

    def __init__(self, port: Any, process: Process) -> None:
        self._port = port
        self._process = process

    def __getattr__(self, name: str) -> Any:
        method, process = getattr(self._port, name), self._process
        if f"{name}.sent" not in process.places:
            return method

        async def call(*args: Any, **kwargs: Any) -> Any:
            await process.reach(f"{name}.sent")
            answer = await method(*args, **kwargs)
            await process.reach(f"{name}.answered")
            return answer

        self.__dict__[name] = call
        return call


class PassingPublisher:
    """A publisher whose publishes pass places, and two between their messages: only records, or all else, are out."""

    def __init__(self, publisher: Any, process: Process) -> None:
        self._publisher = publisher
        self._process = process
        self.ping = publisher.ping

    async def publish(self, messages: Sequence[Message]) -> Sequence[Confirm]:
        """The port's method."""
        process = self._process
        if "publish.sent" not in process.places:
            return list(await self._publisher.publish(messages))
        await process.reach("publish.sent")
        half = next((half for half in _HALVES if half in process.places and process.armed(half)), None)
        if half is not None:
            audit = [m for m in messages if ".audit." in m.routing_key]
            other = [m for m in messages if ".audit." not in m.routing_key]
            first = audit if half == _HALVES[0] else other
            if audit and other:
                await self._publisher.publish(first)
                await process.reach(half)
        answers = list(await self._publisher.publish(messages))
        await process.reach("publish.answered")
        return answers


class Process(Owner):
    """One process of the fleet; `name` is its place in the fleet, which its successors take."""

    def __init__(self, fleet: Fleet, kind: str, name: str) -> None:
        super().__init__(fleet.next_number())
        self.fleet, self.kind, self.name = fleet, kind, name
        self.places = frozenset(places_of(kind))
        self.boot = f"{name}/{self.number}"
        self.clock = Clock(fleet.loop)
        self.ids = Ids(fleet.random)
        self.context = fleet.loop.owned(self)
        self.publisher_faults = Faults()
        self.intake: Intake | None = None
        self.consumers: list[MemoryConsumer] = []
        self._tasks: list[asyncio.Task[Any]] = []

    def armed(self, place: str) -> bool:
        """Whether the plan strikes here next."""
        return self.fleet.armed(self, place)

    async def reach(self, place: str) -> None:
        """Pass a place; when it is struck the process goes no further, or not for a while."""
        if self.fleet.reached(self, place):
            await asyncio.sleep(0)

    def start(self) -> None:
        """Begin to run. Its heart beats by itself: two beats a second are no part of what is looked at here."""
        self.beat()
        self.context.run(self._build)

    def beat(self) -> None:
        """A heartbeat that lasts until somebody ends it."""
        self.fleet.redis.beat(self.boot, _FOR_EVER_MS)

    def _spawn(self, work: Any) -> None:
        self._tasks.append(self.fleet.loop.create_task(work, context=self.context))

    def _build(self) -> None:
        f = self.fleet
        raw = f.broker.publisher(self.boot, faults=self.publisher_faults)
        publisher = PassingPublisher(raw, self)
        store = MemoryStateStore(f.redis, self.boot, StatePolicy(lease_ms=int(LEASE_S * 1000)), wire=f.wire)
        passing_store, ledger = Passing(store, self), Passing(MemoryLedger(f.database), self)

        async def probe() -> None:
            await raw.ping()
            await store.ping()
            await f.database.run((), lambda _: None)

        if self.kind in ("gateway", "ingress"):
            self._door(passing_store, publisher, ledger, probe)
        elif self.kind in STAGES:
            features = Passing(MemoryFeatureStore(f.redis, self.ids, wire=f.wire), self)
            healing = HealingFeatures(features, MemoryPast(f.database))
            stage_ports = StagePorts(ledger, Passing(f.registry, self), healing)
            ports = RunnerPorts(passing_store, ledger, publisher, stage_ports, f.counts, self.clock, self.ids)
            policy = RunnerPolicy(retry=RetryPolicy((1_000, 5_000)))
            runner = StageRunner(Stage(self.kind), ports, Layouts.first(f.partitions), policy)
            self._consume([stage_queue(self.kind, p) for p in range(f.partitions)], runner.handle, probe)
        else:
            self._sink(publisher, probe)

    def _door(self, store: Any, publisher: Any, ledger: Any, probe: Callable[[], Awaitable[None]]) -> None:
        f = self.fleet
        refusals = RefusalLog(
            RefusalCounter(RefusalPolicy(self.boot)), publisher, f.counts, self.clock, Layouts.first(f.partitions)
        )
        directory = MemoryDirectory(f.database)
        ports = IntakePorts(store, publisher, ledger, f.counts, self.clock, self.ids, directory)
        self.intake = Intake(ports, refusals, Layouts.first(f.partitions))
        self._spawn(refusals.run(asyncio.Event()))
        if self.kind == "ingress":
            labels = LabelDesk(publisher, f.counts, self.clock, refusals)
            ingress = Ingress(self.intake, labels, directory, publisher, refusals, self.clock, self.ids)
            self._consume([UNROUTED, *(tenant.ingest_queue for tenant in TENANTS)], ingress.handle, probe)

    def _sink(self, publisher: Any, probe: Callable[[], Awaitable[None]]) -> None:
        f = self.fleet
        if self.kind == "sink-audit":
            sink = AuditSink(Passing(MemoryAuditLog(f.database), self), publisher, f.counts, self.clock)
            self._consume([audit_queue(p) for p in range(f.partitions)], sink.handle, probe)
            return
        letters = ParkingSink(Passing(MemoryDeadLetters(f.database), self), self.clock)
        self._consume([parked_queue(source) for source in PARKED_SOURCES], letters.handle, probe)
        delivery = DeliverySink(MemoryLedger(f.database), publisher, f.counts)
        self._consume([DELIVERY_QUEUE], delivery.handle, probe)

    def _consume(self, queues: Sequence[str], handler: Handler, probe: Callable[[], Awaitable[None]]) -> None:
        async def handle(deliveries: Any) -> Sequence[Settlement]:
            self.fleet.deliveries += len(deliveries)
            self.fleet.redelivered += sum(delivery.redelivered for delivery in deliveries)
            await self.reach("delivered")
            settled = await handler(deliveries)
            await self.reach("settled")
            return settled

        pause = PausePolicy(first_probe_s=0.2, longest_probe_s=2.0, return_after_s=self.fleet.return_after_s)
        policy = ConsumerPolicy(prefetch=16, group=16, pause=pause)
        consumer = MemoryConsumer(self.fleet.broker, queues, handle, probe, policy, self.boot)
        self.consumers.append(consumer)
        self._spawn(self._subscribe(consumer))

    async def _subscribe(self, consumer: MemoryConsumer) -> None:
        """As a process that does not come up is started again by its supervisor."""
        while True:
            try:
                await consumer.start()
                return
            except InfrastructureError:
                await asyncio.sleep(RESTART_S)

    def stop_consuming(self) -> None:
        """SIGTERM: finish the group in hand and let go of the rest."""
        for consumer in self.consumers:
            self._spawn(consumer.stop())


class Fleet:
    """Servers, processes and the plan's faults. `workers` processes per stage, two doors of each kind, two sinks."""

    def __init__(self, loop: VirtualLoop, random: Random, *, partitions: int = 2, workers: int = 2) -> None:
        self.loop, self.random, self.partitions = loop, random, partitions
        self.counts = Counts()
        self.return_after_s = 300.0
        self.deliveries = self.redelivered = 0
        self._numbers = 0
        self._pace = random.random()
        clock = Clock(loop)
        self.clock = clock
        self.broker = MemoryBroker(topology(partitions), clock)
        self.redis = MemoryRedis(clock, undo_s=30.0)
        self.database = MemoryDatabase(clock)
        self.registry = MemoryRegistry(self.database)
        directory = MemoryDirectory(self.database)
        for tenant in TENANTS:
            directory.create_tenant(tenant, str(tenant), f"up-{tenant}")
            self.broker._apply(tenant_ingest(tenant.ingest_queue, tenant.tenant_id))  # as `tenants create` does
            self.broker._apply(_observed(tenant))
        self.database.wire = self.wire
        self.processes: dict[str, Process] = {}
        self._armed: dict[tuple[str, str], list[Any]] = {}
        self.on_reach: Callable[[Process, str], bool] | None = None
        self.on_armed: Callable[[Process, str], bool] | None = None
        for kind in KINDS:
            for number in range(workers if kind in STAGES else 2):
                self._start(kind, f"{kind}-{number}")

    def next_number(self) -> int:
        """A number that no other process has."""
        self._numbers += 1
        return self._numbers

    def _start(self, kind: str, name: str) -> None:
        self.processes[name] = process = Process(self, kind, name)
        process.start()

    def of_kind(self, kind: str) -> Iterator[Process]:
        """Its living processes, the stopped ones too."""
        return (p for p in self.processes.values() if p.kind == kind and p.life is not Life.DEAD)

    async def wire(self) -> None:
        """The way to a server or back: others run, and now and then some time passes."""
        if self.random.random() < 0.1 * self._pace:
            await asyncio.sleep(self.random.random() * 0.05)
        else:
            await asyncio.sleep(0)

    # --- faults ---------------------------------------------------------------------------------------------

    def reached(self, process: Process, place: str) -> bool:
        """Note that a place is passed; whether its process was struck there."""
        self.counts.hits[process.kind, place] += 1
        return self.on_reach is not None and self.on_reach(process, place)

    def armed(self, process: Process, place: str) -> bool:
        """Whether the plan strikes this process at this place when it gets there."""
        return self.on_armed is not None and self.on_armed(process, place)

    def kill(self, process: Process, *, restart_s: float = RESTART_S, known_dead: bool = True) -> None:
        """kill -9: its connections end, its deliveries go back, and its successor starts after a while.

        `known_dead`: as on one host, where a process can be looked up; else its heartbeat has to run out.
        """
        if process.life is Life.DEAD:
            return
        process.life = Life.DEAD
        self.counts.faults["kill"] += 1
        self.broker.cut(process.boot)
        self._in_world(lambda: self.loop.call_later(0 if known_dead else _BEAT_TTL_S, self.redis.silence, process.boot))
        self._in_world(lambda: self.loop.call_later(restart_s, self._start, process.kind, process.name))

    def stop(self, process: Process, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after `seconds`; when that is long the broker gives its deliveries to others."""
        if process.life is not Life.RUNNING:
            return
        process.life = Life.STOPPED
        self.counts.faults["stop"] += 1
        if seconds > _BEAT_TTL_S:
            self._in_world(lambda: self.loop.call_later(_BEAT_TTL_S, self.redis.silence, process.boot))
            self._in_world(lambda: self.loop.call_later(1.0, self.broker.cut, process.boot))
        self._in_world(lambda: self.loop.call_later(seconds, self._continue, process))

    def _continue(self, process: Process) -> None:
        if process.life is Life.STOPPED:
            process.beat()
            self.loop.go_on(process)

    def flush(self) -> None:
        """FLUSHALL; who runs is heard of again with the next beat."""
        self.redis.flush()
        for process in self.processes.values():
            if process.life is Life.RUNNING:
                process.beat()

    def drain(self, process: Process) -> None:
        """SIGTERM, and a successor; what it does not finish in ten seconds is cut off."""
        self.counts.faults["drain"] += 1
        process.context.run(process.stop_consuming)
        self._in_world(lambda: self.loop.call_later(12.0, self._replace, process))

    def _replace(self, process: Process) -> None:
        if process.life is not Life.DEAD:
            process.life = Life.DEAD
            self.broker.cut(process.boot)
            self.redis.silence(process.boot)
            self._start(process.kind, process.name)

    def _in_world(self, work: Callable[[], object]) -> None:
        self.loop.owned(self.loop.world).run(work)


def _observed(tenant: TenantScope) -> Topology:
    name = f"up.{tenant}.all"
    keys = (Binding(DECISIONS, name, f"{tenant}.#"), Binding(REJECTED, name, f"{tenant}.#"))
    return Topology((), (Queue(name),), keys, ())
