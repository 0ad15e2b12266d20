"""Two numbers of partitions side by side: whom a change moves, and when the old version's queues are empty.

Promises: a version is retired only after all that could still hold one of its entries was seen empty, again and again,
for longer than anything can hide between two readings. Which entry stays on which version say `contracts.topology`'s
layouts. Declares, reads and removes no queue: `deploy.relayout` does.

The arithmetic is `contracts.tenancy`: slot of the tenant, then the jump consistent hash over the partitions, whose test
vectors stand in docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from contracts.tenancy import TenantScope
from contracts.topology import Layout


def moved(scopes: Iterable[TenantScope], before: Layout, after: Layout) -> tuple[TenantScope, ...]:
    """The tenants whose partition is another after a change, in order: growing moves them into new partitions only."""
    return tuple(s for s in scopes if s.partition(before.partitions) != s.partition(after.partitions))


@dataclass(frozen=True, slots=True)
class DrainPolicy:
    """How long (s) everything must have been empty, and how far apart two readings may be.

    A message in flight between two queues is in neither while it is read; the longest rung and the broker's retry of a
    dead letter (30 s + 3 s) bound how long it can be anywhere unseen.
    """

    quiet_s: float = 60.0
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
    queues = layout.work_queues()
    left = {queue: depth for queue in queues if (depth := depths.get(queue))}
    unread = tuple(queue for queue in queues if depths.get(queue) is None)
    if left or unread:
        return Drain(left, unread, retire=False, state=DrainState(None, now))
    blind = state.read_at is None or (now - state.read_at).total_seconds() > policy.gap_s
    since = now if blind or state.empty_since is None else state.empty_since
    after = replace(state, empty_since=since, read_at=now)
    return Drain(retire=(now - since).total_seconds() >= policy.quiet_s, state=after)
