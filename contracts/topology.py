"""The AMQP topology as data: `riskfleet topology apply` makes it, `check` compares, workers only look.

The version is in queue names and never in keys, so that another number of partitions can run beside
this one. A `Layout` is one version: its stage, audit and ladder queues. What depends on no number of partitions
(doors, parked, labels, delivery, metrics) is there once, under the names of the first version. Limits, TTLs and
dead-letter targets are policies, since arguments cannot be changed; they hold for every version.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

from contracts.failures import MessagingFailureError
from contracts.tenancy import TenantScope

VERSION = "v1"
INGEST = "risk.ingest"
UNROUTED = "risk.ingest.unrouted"
DECISIONS = "risk.decisions"
REJECTED = "risk.rejected"
WORK = f"risk.{VERSION}.work"
METRICS_QUEUE = f"risk.{VERSION}.metrics"
LABELS_QUEUE = f"risk.{VERSION}.labels"
DELIVERY_QUEUE = f"risk.{VERSION}.delivery"
"""Decisions that the broker refused to hand on, on their way through the ladder to be published again."""


class Stage(StrEnum):
    """The four stages, in pipeline order."""

    RETRIEVAL = "retrieval"
    SCORING = "scoring"
    GUARDRAIL = "guardrail"
    DECISION = "decision"


STAGES: tuple[Stage, ...] = tuple(Stage)

RUNGS: tuple[tuple[str, int], ...] = (("100ms", 100), ("1s", 1_000), ("5s", 5_000), ("15s", 15_000), ("30s", 30_000))
"""The retry ladder: name and TTL in milliseconds of each rung."""

DELIVERY_RUNGS: tuple[tuple[str, int], ...] = RUNGS[1:]
"""The ladder of decisions that a tenant's queue refused. Its queues are its own: full, they hold up no stage."""

PARKED_SOURCES: tuple[str, ...] = (*STAGES, "ingress", "audit", "labels")


def stage_queue(stage: str, partition: int, version: str = VERSION) -> str:
    """The work queue of a stage and partition."""
    return f"risk.{version}.{stage}.p{partition:02d}"


def partition_of(queue: str) -> int:
    """The partition of a stage's or audit queue."""
    return int(queue.rpartition(".p")[2])


def version_of(queue: str) -> str:
    """The version in the name of a stage's or audit queue."""
    return queue.split(".", 2)[1]


def audit_queue(partition: int, version: str = VERSION) -> str:
    """The audit queue of a partition."""
    return f"risk.{version}.audit.p{partition:02d}"


def rung_exchange(delay: str, version: str = VERSION) -> str:
    """The exchange in front of a rung: publish to it with the *target queue* as routing key."""
    return f"risk.{version}.retry.{delay}"


def rung_queue(delay: str, version: str = VERSION) -> str:
    """The queue of a rung of the retry ladder."""
    return f"risk.{version}.retry.{delay}"


def delivery_rung(at_least_ms: int) -> str:
    """The queue of the first delivery rung that waits at least this long; the last one when none does."""
    name = next((name for name, ttl in DELIVERY_RUNGS if ttl >= at_least_ms), DELIVERY_RUNGS[-1][0])
    return f"{DELIVERY_QUEUE}.{name}"


def parked_queue(source: str) -> str:
    """Dead letters of a stage on their way to the table `dead_letters`."""
    return f"risk.{VERSION}.parked.{source}"


def reply_queue(boot: str) -> str:
    """The exclusive queue of one gateway process: copies of decisions that a caller waits for."""
    return f"risk.{VERSION}.reply.{boot}"


def first_rung(at_least_ms: int) -> str:
    """The name of the first rung that waits at least this long; the last one when none does."""
    return next((name for name, ttl in RUNGS if ttl >= at_least_ms), RUNGS[-1][0])


@dataclass(frozen=True, slots=True)
class Exchange:
    """One durable exchange."""

    name: str
    type: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Queue:
    """One durable queue; its type is the one thing that is an argument."""

    name: str
    type: str = "quorum"

    @property
    def arguments(self) -> dict[str, Any]:
        """Declare arguments; another value for an existing queue is refused by the broker (406)."""
        return {"x-queue-type": self.type}


@dataclass(frozen=True, slots=True)
class Binding:
    """Exchange → queue by routing key."""

    exchange: str
    queue: str
    key: str


@dataclass(frozen=True, slots=True)
class Policy:
    """One broker policy: a pattern over queue names and what holds for them. One policy matches a queue."""

    name: str
    pattern: str
    definition: dict[str, Any]
    priority: int = 10


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything that the broker must hold before a fleet may start."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]
    policies: tuple[Policy, ...]


def tenant_ingest(tenant_queue: str, tenant_id: str) -> Topology:
    """The part of the topology that a tenant with a broker user adds."""
    return Topology((), (Queue(tenant_queue),), (Binding(INGEST, tenant_queue, f"{tenant_id}.#"),), ())


_VERSION: Final = re.compile(r"v([1-9][0-9]{0,3})")
_ANY: Final = r"^risk\.v[0-9]+"


def is_version(name: str) -> bool:
    """Whether it could be a topology version: v1, v2, …"""
    return _VERSION.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Layout:
    """One version of the topology and its number of partitions.

    Raises ValueError for a version that is not `v` and a number, or no partitions.
    """

    version: str
    partitions: int

    def __post_init__(self) -> None:
        if not is_version(self.version):
            raise ValueError("a topology version is v1, v2, …")
        if not 1 <= self.partitions <= 100:
            raise ValueError("a layout has 1 to 100 partitions: their queues are named p00 to p99")

    @property
    def number(self) -> int:
        """The number in the version: v2 comes after v1, and v10 after v9."""
        return int(self.version[1:])

    def partition(self, scope: TenantScope | None) -> int:
        """The partition of a tenant; what belongs to no tenant goes to partition 0."""
        return scope.partition(self.partitions) if scope else 0

    def stage_queue(self, stage: str, scope: TenantScope) -> str:
        """The queue of a stage that carries a tenant's entries of this version."""
        return stage_queue(stage, self.partition(scope), self.version)

    def audit_queue(self, scope: TenantScope | None) -> str:
        """The queue of a tenant's audit records; those of no tenant go to partition 0."""
        return audit_queue(self.partition(scope), self.version)

    def stage_queues(self, stage: str) -> tuple[str, ...]:
        """Every queue of a stage."""
        return tuple(stage_queue(stage, p, self.version) for p in range(self.partitions))

    def audit_queues(self) -> tuple[str, ...]:
        """Every audit queue."""
        return tuple(audit_queue(p, self.version) for p in range(self.partitions))

    def work_queues(self) -> tuple[str, ...]:
        """Every queue of this version: stages, audit and ladder. They go with it, so they must be empty before."""
        return (
            *(queue for stage in STAGES for queue in self.stage_queues(stage)),
            *self.audit_queues(),
            *(rung_queue(name, self.version) for name, _ in RUNGS),
        )


class RunningLayouts(Protocol):
    """The versions that run, as whoever publishes has to know them; what it says may change between two calls."""

    @property
    def running(self) -> tuple[Layout, ...]:
        """Oldest first: what is consumed."""
        ...

    @property
    def newest(self) -> Layout:
        """Where new entries and all audit records go."""
        ...

    def of(self, version: str) -> Layout:
        """The layout on which an entry stays. Raises MessagingFailureError for one that is not known here."""
        ...


@dataclass(frozen=True, slots=True)
class Layouts:
    """The versions that run, oldest first; `filling`: the one that takes new entries, without it the last.

    Raises ValueError for none, a repeated one, another order, or a filling version that does not run.
    """

    running: tuple[Layout, ...]
    filling: str | None = None

    def __post_init__(self) -> None:
        numbers = [layout.number for layout in self.running]
        if not numbers or numbers != sorted(set(numbers)):
            raise ValueError("at least one layout runs; each version is there once, oldest first")
        if self.filling is not None and self.filling not in [layout.version for layout in self.running]:
            raise ValueError("the filling version does not run")

    @classmethod
    def first(cls, partitions: int) -> Layouts:
        """The first version alone: what runs as long as nobody has changed the number of partitions."""
        return cls((Layout(VERSION, partitions),))

    @property
    def newest(self) -> Layout:
        """Where new entries and all audit records go: not yet the last one while nobody consumes it."""
        return self.running[-1] if self.filling is None else self.of(self.filling)

    @property
    def old(self) -> tuple[Layout, ...]:
        """The versions that drain."""
        return tuple(layout for layout in self.running if layout.number < self.newest.number)

    def of(self, version: str) -> Layout:
        """The layout on which an entry of a version stays.

        Raises MessagingFailureError for a version that is not known here: sent elsewhere, its entry could meet itself.
        """
        found = next((layout for layout in self.running if layout.version == version), None)
        if found is None:
            raise MessagingFailureError(
                f"topology {version} is not known here; the entry waits: is it in 'riskfleet topology check'?"
            )
        return found


def topology(partitions: int, *, queue_bytes: int = 1 << 30) -> Topology:
    """The whole topology for a number of partitions; `queue_bytes` limits each stage queue (bytes)."""
    return topology_of(Layouts.first(partitions).running, queue_bytes=queue_bytes)


def topology_of(layouts: Sequence[Layout], *, queue_bytes: int = 1 << 30) -> Topology:
    """The whole topology in which these versions run; `queue_bytes` limits each stage queue (bytes)."""
    stage_queues = [queue for layout in layouts for stage in STAGES for queue in layout.stage_queues(stage)]
    work = [*stage_queues, *(queue for layout in layouts for queue in layout.audit_queues())]
    parked = [parked_queue(source) for source in PARKED_SOURCES]
    rungs = [(rung_exchange(name, v.version), rung_queue(name, v.version)) for v in layouts for name, _ in RUNGS]
    deliveries = (DELIVERY_QUEUE, *(delivery_rung(ttl) for _, ttl in DELIVERY_RUNGS))
    return Topology(
        exchanges=(
            Exchange(INGEST, "topic", {"alternate-exchange": UNROUTED}),
            Exchange(UNROUTED, "fanout"),
            Exchange(DECISIONS, "topic"),
            Exchange(REJECTED, "topic"),
            Exchange(WORK, "direct"),
            *(Exchange(exchange, "topic") for exchange, _ in rungs),
        ),
        queues=(
            *(Queue(name) for name in work),
            *(Queue(name) for name in parked),
            *(Queue(queue) for _, queue in rungs),
            Queue(METRICS_QUEUE, "classic"),
            Queue(LABELS_QUEUE),
            *(Queue(name) for name in deliveries),
            Queue(UNROUTED),
        ),
        bindings=(
            *(Binding(WORK, name, name) for name in (*work, *parked, METRICS_QUEUE, LABELS_QUEUE, *deliveries)),
            *(Binding(exchange, queue, "#") for exchange, queue in rungs),
            Binding(UNROUTED, UNROUTED, ""),
        ),
        policies=_policies(queue_bytes),
    )


def _policies(queue_bytes: int) -> tuple[Policy, ...]:
    """One set for every version, so that a new one is limited before its first message."""
    return (
        *(Policy(f"rf-{stage}", rf"{_ANY}\.{stage}\.", _netted(queue_bytes, stage, 20)) for stage in STAGES),
        Policy("rf-audit", rf"{_ANY}\.audit\.", _netted(queue_bytes, "audit", 20)),
        *(Policy(f"rf-retry-{name}", rf"{_ANY}\.retry\.{name}$", _rung(ttl, queue_bytes)) for name, ttl in RUNGS),
        Policy("rf-labels", rf"^risk\.{VERSION}\.labels$", _netted(queue_bytes // 4, "labels", 20)),
        # Nothing is dead-lettered from here: a decision stands in PostgreSQL, and the feed has it.
        Policy("rf-delivery", rf"^risk\.{VERSION}\.delivery$", _bounded(queue_bytes // 4)),
        *(
            Policy(f"rf-delivery-{name}", rf"^risk\.{VERSION}\.delivery\.{name}$", _round(ttl, queue_bytes // 4))
            for name, ttl in DELIVERY_RUNGS
        ),
        Policy("rf-parked", rf"^risk\.{VERSION}\.parked\.", {"overflow": "reject-publish"}),
        Policy("rf-metrics", rf"^risk\.{VERSION}\.metrics$", {"max-length": 100_000, "overflow": "drop-head"}),
        # The ingress parks by itself after 20 deliveries; the broker's limit stands behind that.
        Policy("rf-ingest", r"^risk\.ingest\.", _netted(queue_bytes // 4, "ingress", 40)),
        Policy("rf-upstream", r"^up\.", {"max-length-bytes": queue_bytes // 4, "overflow": "drop-head"}),
    )


def _bounded(limit: int) -> dict[str, Any]:
    return {"max-length-bytes": limit, "overflow": "reject-publish"}


def _netted(limit: int, source: str, deliveries: int) -> dict[str, Any]:
    """The last net: what comes back that often goes to the parked queue, never to the ladder and never lost."""
    return _bounded(limit) | {
        "delivery-limit": deliveries,
        "dead-letter-exchange": WORK,
        "dead-letter-routing-key": parked_queue(source),
        "dead-letter-strategy": "at-least-once",
    }


def _rung(ttl_ms: int, limit: int) -> dict[str, Any]:
    """The routing key is kept, so an expired entry returns to the queue that it was published for."""
    return _bounded(limit) | {
        "message-ttl": ttl_ms,
        "dead-letter-exchange": WORK,
        "dead-letter-strategy": "at-least-once",
    }


def _round(ttl_ms: int, limit: int) -> dict[str, Any]:
    """Every delivery rung has one target, so a target that is missing or full holds up no other queue's entries."""
    return _rung(ttl_ms, limit) | {"dead-letter-routing-key": DELIVERY_QUEUE}
