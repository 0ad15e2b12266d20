"""Two numbers of partitions side by side: on which version's queues an entry stays, and when the old ones are empty.

Promises: a new entry goes to the newest version; one that is under way stays on its own until it is decided, so a
change of the number moves nobody's events between queues; a version is retired only after all that could still hold
one of its entries was seen empty, again and again, for longer than anything can hide between two readings. Keys know
no version: locks and states are the same from either side. Declares, reads and removes no queue.

The arithmetic is `contracts.tenancy`: slot of the tenant, then the jump consistent hash over the partitions, whose test
vectors stand in docs/architecture.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from contracts.failures import InvalidWorkflowStateError
from contracts.tenancy import TenantScope
from contracts.topology import (
    DELIVERY_RUNGS,
    PARKED_SOURCES,
    RUNGS,
    STAGES,
    audit_queue,
    parked_queue,
    rung_queue,
    stage_queue,
)

_VERSION: Final = re.compile(r"v([1-9][0-9]{0,3})")


@dataclass(frozen=True, slots=True)
class Layout:
    """One version of the topology and its number of partitions.

    Raises ValueError for a version that is not `v` and a number, or no partitions.
    """

    version: str
    partitions: int

    def __post_init__(self) -> None:
        if not _VERSION.fullmatch(self.version):
            raise ValueError("a topology version is v1, v2, …")
        if not 1 <= self.partitions <= 100:
            raise ValueError("a layout has 1 to 100 partitions: their queues are named p00 to p99")

    @property
    def number(self) -> int:
        """The number in the version: v2 comes after v1, and v10 after v9."""
        return int(self.version[1:])

    def stage_queue(self, stage: str, scope: TenantScope) -> str:
        """The queue of a stage that carries a tenant's entries of this version."""
        return stage_queue(stage, scope.partition(self.partitions), self.version)

    def audit_queue(self, scope: TenantScope | None) -> str:
        """The queue of a tenant's audit records; those of no tenant go to partition 0."""
        return audit_queue(scope.partition(self.partitions) if scope else 0, self.version)

    def work_queues(self) -> tuple[str, ...]:
        """Every queue of this version that must not be lost: work, ladder, parked, labels, and decisions on their way.

        Metrics may be lost, so they keep no version alive.
        """
        parts = range(self.partitions)
        return (
            *(stage_queue(stage, p, self.version) for stage in STAGES for p in parts),
            *(audit_queue(p, self.version) for p in parts),
            *(rung_queue(name, self.version) for name, _ in RUNGS),
            *(parked_queue(source, self.version) for source in PARKED_SOURCES),
            *(f"risk.{self.version}.{name}" for name in ("labels", "delivery")),
            *(f"risk.{self.version}.delivery.{name}" for name, _ in DELIVERY_RUNGS),
        )


@dataclass(frozen=True, slots=True)
class Layouts:
    """The versions that run, oldest first. Raises ValueError for none, a repeated one, or another order."""

    running: tuple[Layout, ...]

    def __post_init__(self) -> None:
        numbers = [layout.number for layout in self.running]
        if not numbers or numbers != sorted(set(numbers)):
            raise ValueError("at least one layout runs; each version is there once, oldest first")

    @property
    def newest(self) -> Layout:
        """Where new entries go."""
        return self.running[-1]

    @property
    def old(self) -> tuple[Layout, ...]:
        """The versions that drain."""
        return self.running[:-1]

    def of(self, version: str | None) -> Layout:
        """The layout on which an entry of a version stays; None = a new entry.

        Raises InvalidWorkflowStateError for a version that does not run: sent elsewhere, its entry could meet itself.
        """
        if version is None:
            return self.newest
        found = next((layout for layout in self.running if layout.version == version), None)
        if found is None:
            raise InvalidWorkflowStateError("the entry is of a topology version that does not run here; start it again")
        return found

    def queues(self, stage: str) -> tuple[str, ...]:
        """What a worker of a stage consumes: every version, the oldest first, so that it drains."""
        return tuple(stage_queue(stage, p, layout.version) for layout in self.running for p in range(layout.partitions))


def moved(scopes: Iterable[TenantScope], before: Layout, after: Layout) -> tuple[TenantScope, ...]:
    """The tenants whose partition is another after a change, in order: growing moves them into new partitions only."""
    return tuple(s for s in scopes if s.partition(before.partitions) != s.partition(after.partitions))


@dataclass(frozen=True, slots=True)
class DrainPolicy:
    """How long (s) everything must have been empty, and how far apart two readings may be.

    A message in flight between two queues is in neither while it is read; the longest rung and the broker's retry of a
    dead letter (30 s + 3 s) bound how long it can be anywhere unseen.
    """

    quiet_s: float = 120.0
    gap_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.gap_s <= self.quiet_s:
            raise ValueError("gap_s is above 0 and at most quiet_s")


@dataclass(frozen=True, slots=True)
class DrainState:
    """Since when a version was seen empty, and when it was looked at last (aware, UTC)."""

    empty_since: datetime | None = None
    read_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """What is left of an old version: messages per queue that holds some, queues that could not be read, and whether
    it may be retired.
    """

    left: Mapping[str, int] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    retire: bool = False
    state: DrainState = field(default_factory=DrainState)


def drain(
    layout: Layout, depths: Mapping[str, int | None], policy: DrainPolicy, state: DrainState, now: datetime
) -> Drain:
    """The progress of an old version, by its queues' messages: ready *and* unacknowledged.

    A queue that is absent from `depths`, or None, could not be read, and is not empty. Doors must write to a newer
    version already: this cannot see them.
    """
    queues: Sequence[str] = layout.work_queues()
    left = {queue: depth for queue in queues if (depth := depths.get(queue))}
    unread = tuple(queue for queue in queues if depths.get(queue) is None)
    if left or unread:
        return Drain(left, unread, retire=False, state=DrainState(None, now))
    blind = state.read_at is None or (now - state.read_at).total_seconds() > policy.gap_s
    since = now if blind or state.empty_since is None else state.empty_since
    after = replace(state, empty_since=since, read_at=now)
    return Drain(retire=(now - since).total_seconds() >= policy.quiet_s, state=after)
