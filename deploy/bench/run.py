"""Runs a plan against a fleet and measures it: throughput, latency, cost by process, nothing lost or done twice.

The clock of a drain runs from the moment when every stage worker consumes to the last audit record in PostgreSQL. Costs
are differences of two looks at /proc, so what the fleet does when idle between them is counted as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any, Protocol

import httpx
import orjson
import uvloop

from contracts.failures import InfrastructureError
from contracts.tenancy import TenantScope
from deploy.bench.load import Load, Sent, backlog, by_amqp, by_http
from deploy.bench.machine import Cost, costs, cpu_between, hardware
from deploy.bench.plan import BenchPlan, bench_events
from deploy.bench.private import private_fleet
from deploy.provision import DemoCredentials
from deploy.runtime import RandomIds, SystemClock
from deploy.settings import Settings
from governance.postgres import AsyncEngine, PostgresAuditLog, create_engine
from governance.postgres.measured import (
    BenchProgress,
    bench_bytes,
    bench_findings,
    bench_progress,
    bench_times,
)
from resilience.redis import RedisStateStore, StatePolicy, connect, new_boot_id

Say = Callable[[str], None]
_LOOK_S = 0.25
_SAMPLED = 20_000
_READY_S = 60.0
TRAIL_RECORDS = 5
"""Audit records of an event's way from the door to its decision."""


class Target(Protocol):
    """A fleet that can be measured."""

    @property
    def settings(self) -> Settings:
        """Where its servers are."""

    @property
    def tenants(self) -> Sequence[DemoCredentials]:
        """Who sends."""

    def pids(self) -> dict[str, list[int]]:
        """Its processes by kind; empty when they are not known."""

    def start_stages(self) -> None:
        """Start the stage workers, if they do not run."""

    def stages_ready(self) -> bool:
        """Whether they consume."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look: seconds since the start, first decisions so far, and cost by process kind."""

    at_s: float
    decided: int
    records: int
    costs: dict[str, Cost]


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What a run came to. Latencies in ms, CPU in seconds per 1,000 events, memory in bytes, `seconds` of the run.

    `lost`: accepted but not decided within the patience of the plan. `double`: decided twice, by what PostgreSQL
    holds. `late_ms`: how late the load generator itself was at worst.
    """

    plan: dict[str, Any]
    hardware: dict[str, str | int]
    versions: dict[str, str]
    accepted: int
    decided: int
    lost: int
    double: int
    dead_letters: int
    missing_records: int
    audit_intact: bool
    statuses: dict[int, int]
    seconds: float
    decided_seconds: float
    events_per_s: float
    cpu_s_per_1000: dict[str, float]
    rss: dict[str, int]
    descriptors: dict[str, int]
    redis_bytes_per_event: float
    redis_peak_bytes_per_event: float
    postgresql_bytes_per_event: float
    latency_ms: dict[str, float]
    stage_latency_ms: dict[str, dict[str, float]]
    late_ms: float
    samples: list[Sample] = field(repr=False)

    @property
    def good(self) -> bool:
        """Whether every accepted event was decided once, and its trail is in an intact audit.

        A run in which nothing was accepted, or a request had no answer, proves nothing.
        """
        whole = self.audit_intact and self.missing_records == 0 and self.accepted > 0 and 0 not in self.statuses
        return self.lost == 0 == self.double and self.dead_letters == 0 and whole

    def to_json(self) -> dict[str, Any]:
        """For programs: the agreed fields first."""
        named = {f"{name}_ms": round(self.latency_ms.get(name, 0.0), 3) for name in ("p50", "p95", "p99", "max")}
        head = {"events": self.accepted, "decided": self.decided, "lost": self.lost, "double": self.double}
        rates = {"events_per_s": round(self.events_per_s, 1), "cpu_s_per_1000": round(self.cpu_total, 4)}
        rest = asdict(self) | {"cpu_s_per_1000_by_kind": self.cpu_s_per_1000, "good": self.good}
        return head | rates | named | {name: value for name, value in rest.items() if name not in head | rates}

    @property
    def cpu_total(self) -> float:
        """CPU seconds per 1,000 events of all processes of the fleet and its servers, without the load generator."""
        return sum(self.cpu_s_per_1000.values())


def bench(plan: BenchPlan, say: Say) -> BenchReport:
    """Run the plan on a fleet of its own. Raises ServersError, InfrastructureError."""
    with private_fleet(plan, say) as fleet:
        return fleet.supervise(lambda: uvloop.run(measure(fleet, plan, say)))


async def measure(target: Target, plan: BenchPlan, say: Say) -> BenchReport:
    """Run the plan against a fleet whose other roles run already."""
    settings, ids = target.settings, RandomIds()
    engine = create_engine(settings.need("database_url"), application_name="riskfleet-bench")
    policy = StatePolicy(settings.lease_ms, settings.state_ttl, settings.tombstone_ttl)
    store = RedisStateStore(connect(settings.need("redis_url")), new_boot_id(ids.token()), policy)
    try:
        return await _Run(target, plan, say, engine, store).run()
    finally:
        await store.close()
        await engine.dispose()


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and max by nearest rank; empty without values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    ranks = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
    found = {name: ordered[min(len(ordered) - 1, int(len(ordered) * share))] for name, share in ranks.items()}
    return found | {"max": ordered[-1]}


class _Run:
    """One run: what is measured beside it lives as long as it."""

    def __init__(self, target: Target, plan: BenchPlan, say: Say, engine: AsyncEngine, store: RedisStateStore) -> None:
        self._target, self._plan, self._say = target, plan, say
        self._engine, self._store = engine, store
        self._scopes = [TenantScope(tenant.tenant) for tenant in target.tenants]
        self._url = f"http://{target.settings.http_host}:{target.settings.http_port}"
        self._samples: list[Sample] = []
        self._base = BenchProgress(0, 0)
        self._peak = 0
        self._shown = 0.0

    async def run(self) -> BenchReport:
        plan, load = self._plan, self._load()
        await self._wait("the gateway is not ready", self._gateway_ready)
        sent = Sent()
        before = (await self._store.memory_bytes(), await bench_bytes(self._engine))
        self._base = await bench_progress(self._engine, self._scopes)
        if plan.rate is None:
            accepted = await backlog(
                self._target.settings,
                load,
                single=plan.single,
                tick=lambda n: self._progress(f"{n:,} events laid down"),
            )
            self._peak = await self._store.memory_bytes()
            self._target.start_stages()
            await self._wait("the stage workers are not ready", self._stages_ready, 0.02)
            began = await self._begin()
            await self._until_decided(accepted, began)
        else:
            self._target.start_stages()
            await self._wait("the stage workers are not ready", self._stages_ready)
            began = await self._begin()
            watching = asyncio.ensure_future(self._watch_forever(began))
            try:
                tick: Callable[[int], None] = lambda n: self._progress(f"{n:,} events sent")  # noqa: E731
                if plan.door == "http":
                    await by_http(self._url, load, plan.rate, sent, tick)
                else:
                    await by_amqp(self._target.settings, load, plan.rate, sent, tick)
            finally:
                watching.cancel()
                with suppress(asyncio.CancelledError):
                    await watching
            accepted = len(sent.intended)
            await self._until_decided(accepted, began)
        return await self._report(sent, accepted, began, before)

    def _load(self) -> Load:
        tenants = self._target.tenants
        return [(tenants[number], orjson.dumps(event)) for number, event in bench_events(self._plan)]

    async def _gateway_ready(self) -> bool:
        with suppress(httpx.TransportError):
            async with httpx.AsyncClient(timeout=5, verify=False) as client:  # noqa: S501 - plain HTTP on this machine
                return (await client.get(f"{self._url}/health/ready")).status_code == 200
        return False

    async def _stages_ready(self) -> bool:
        return self._target.stages_ready()

    async def _wait(self, problem: str, good: Callable[[], Any], every_s: float = 0.1) -> None:
        deadline = time.monotonic() + _READY_S
        while not await good():
            if time.monotonic() > deadline:
                raise InfrastructureError(f"{problem} after {_READY_S:.0f} s; their logs are in the data directory")
            await asyncio.sleep(every_s)

    async def _begin(self) -> float:
        began = time.time()
        self._samples.append(Sample(0.0, 0, 0, costs(self._target.pids())))
        return began

    async def _look(self, began: float) -> BenchProgress:
        now = await bench_progress(self._engine, self._scopes)
        decided, records = now.decided - self._base.decided, now.records - self._base.records
        self._samples.append(Sample(time.time() - began, decided, records, costs(self._target.pids())))
        return BenchProgress(decided, records)

    async def _watch_forever(self, began: float) -> None:
        while True:
            await self._look(began)
            self._peak = max(self._peak, await self._store.memory_bytes())
            await asyncio.sleep(1.0)

    async def _until_decided(self, accepted: int, began: float) -> None:
        """Until every event is decided and has its records, or nothing moved for the plan's patience."""
        last, moved = BenchProgress(-1, -1), time.monotonic()
        while True:
            now = await self._look(began)
            self._peak = max(self._peak, await self._store.memory_bytes())
            if now.decided >= accepted and now.records >= accepted * TRAIL_RECORDS:
                return
            if now != last:
                last, moved = now, time.monotonic()
            elif time.monotonic() - moved > self._plan.wait_s:
                self._say(f"nothing moved for {self._plan.wait_s:.0f} s: giving up")
                return
            self._progress(f"{now.decided:,} of {accepted:,} decided, {now.records:,} audit records")
            await asyncio.sleep(_LOOK_S)

    def _progress(self, line: str) -> None:
        if time.monotonic() - self._shown >= 1.0:
            self._shown = time.monotonic()
            self._say(line)

    async def _report(self, sent: Sent, accepted: int, began: float, before: tuple[int, int]) -> BenchReport:
        intact, missing = await self._verified()
        found = await bench_findings(self._engine, self._scopes)
        decided = found.decided - self._base.decided
        seconds = max(_since(found.audited_at, began), 1e-9)
        share = 1_000 / max(accepted, 1)
        last = self._samples[-1].costs
        used = cpu_between(self._samples[0].costs, last)
        totals, stages = await self._latencies(sent, began)
        redis = await self._store.memory_bytes()
        return BenchReport(
            plan=asdict(self._plan) | {"stages": {str(k): v for k, v in self._plan.stages.items()}},
            hardware=hardware(),
            versions=await self._versions(),
            accepted=accepted,
            decided=decided,
            lost=max(0, accepted - decided),
            double=found.twice,
            dead_letters=found.letters,
            missing_records=missing,
            audit_intact=intact,
            statuses=sent.statuses,
            seconds=seconds,
            decided_seconds=max(_since(found.decided_at, began), 1e-9),
            events_per_s=decided / seconds,
            cpu_s_per_1000={kind: round(cpu * share, 5) for kind, cpu in used.items()},
            rss={kind: cost.rss for kind, cost in last.items()},
            descriptors={kind: cost.descriptors for kind, cost in last.items()},
            redis_bytes_per_event=(redis - before[0]) / max(accepted, 1),
            redis_peak_bytes_per_event=(self._peak - before[0]) / max(accepted, 1),
            postgresql_bytes_per_event=(await bench_bytes(self._engine) - before[1]) / max(accepted, 1),
            latency_ms=totals,
            stage_latency_ms=stages,
            late_ms=sent.late_s * 1_000,
            samples=self._samples,
        )

    async def _verified(self) -> tuple[bool, int]:
        """Whether every tenant's chain is intact, and how many records of trails are missing from them."""
        log, deadline = PostgresAuditLog(self._engine, SystemClock()), time.monotonic() + 10
        while True:
            reports = [await log.verify(scope) for scope in self._scopes]
            missing = sum(report.missing for report in reports)
            if missing == 0 or time.monotonic() > deadline:
                return all(report.intact for report in reports), missing
            await asyncio.sleep(_LOOK_S)

    async def _latencies(self, sent: Sent, began: float) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Of all events, and of each step of the trail after the one before.

        With `Prefer: wait` from the intended moment to the answer; by AMQP to the decision's own time; of a backlog
        from the moment when the workers were ready (which says how long it was, not how fast a single event is).
        """
        rows = await bench_times(self._engine, self._scopes, _SAMPLED)
        steps: dict[str, list[float]] = {}
        ends: list[float] = []
        for row in rows:
            started = began if self._plan.rate is None else sent.intended.get((row.tenant, row.event_id))
            if started is not None:
                ends.append((row.decided_at.timestamp() - started) * 1_000)
            trail = orjson.loads(row.state)["trail"]
            moments = [(str(step["stage"]), datetime.fromisoformat(step["at"]).timestamp()) for step in trail]
            for (_, earlier), (stage, later) in pairwise(moments):
                steps.setdefault(stage, []).append((later - earlier) * 1_000)
        totals = [seconds * 1_000 for seconds in sent.latencies.values()] or ends
        return percentiles(totals), {stage: percentiles(values) for stage, values in steps.items()}

    async def _versions(self) -> dict[str, str]:
        from deploy.doctor import examine

        found = await examine(self._target.settings)
        return {f.check: f.found for f in found} | {"riskfleet": self._target.settings.version}


def _since(moment: datetime | None, began: float) -> float:
    return moment.timestamp() - began if moment is not None else 0.0
