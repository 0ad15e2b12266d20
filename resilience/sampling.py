"""From what was counted to what the autoscaler decides on: pure arithmetic between two looks at a stage.

Promises: the backlog is in events, 0 when the stage's queues are empty and never below their messages; what cannot be
known is None and never a guess. While the state store has forgotten (FLUSHALL), and until the queues were once empty
since, the backlog is *estimated* from the messages and the events that a message was last seen to hold. Reads nothing.

A worker's rate while it is busy can only be seen while there is always work: the backlog of both looks must be at least
a second's worth of what was done between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from contracts.ports import StageBacklog
from resilience.autoscaling import MetricsSnapshot

_A_WORKERS_HANDFUL = 8


@dataclass(frozen=True, slots=True)
class Sighting:
    """One look at a stage at `as_of` (aware, UTC): the state store's counts, messages in its queues, its workers."""

    as_of: datetime
    counted: StageBacklog
    messages: int
    workers: int
    events_per_message: float = 1.0


@dataclass(frozen=True, slots=True)
class Depth:
    """How much waits for a stage; `oldest_age_s` 0 when nothing does."""

    events: int
    messages: int
    oldest_age_s: float
    estimated: bool


def depth_of(seen: Sighting) -> Depth:
    """The backlog in events."""
    if seen.messages == 0:
        return Depth(0, 0, 0.0, estimated=False)
    oldest = seen.counted.oldest_ms
    age_s = 0.0 if oldest is None else max(seen.as_of.timestamp() - oldest / 1000, 0.0)
    least = max(seen.counted.events, seen.messages)
    if seen.counted.whole:
        return Depth(least, seen.messages, age_s, estimated=False)
    return Depth(max(least, round(seen.messages * seen.events_per_message)), seen.messages, age_s, estimated=True)


def carried(seen: Sighting) -> float:
    """Events per message, learnt while the counts are whole; else as learnt before."""
    if not seen.counted.whole or seen.messages == 0:
        return seen.events_per_message
    return max(seen.counted.events / seen.messages, 1.0)


def is_whole(before: Sighting | None, seen: Sighting) -> bool:
    """Whether the counts may be trusted from now on: the queues were empty twice, since their numbers lag."""
    return before is not None and before.messages == seen.messages == 0 and not seen.counted.whole


def snapshot_between(
    stage: str, before: Sighting | None, seen: Sighting, current: int, partitions: int
) -> MetricsSnapshot:
    """What happened between two looks; without a first one, or when the counts began anew, there are no rates."""
    depth = depth_of(seen)
    nothing = MetricsSnapshot(
        stage, seen.as_of, current, partitions, depth.events, depth.oldest_age_s, None, None, None
    )
    if before is None:
        return nothing
    seconds = (seen.as_of - before.as_of).total_seconds()
    attempts = seen.counted.claimed - before.counted.claimed
    won = seen.counted.advanced - before.counted.advanced
    if seconds <= 0 or attempts < 0 or won < 0:
        return nothing
    earlier = depth_of(before).events
    rate = attempts / seconds
    busy = min(earlier, depth.events) >= max(rate, _A_WORKERS_HANDFUL * seen.workers) and seen.workers > 0
    return MetricsSnapshot(
        stage,
        seen.as_of,
        current,
        partitions,
        depth.events,
        depth.oldest_age_s,
        max(depth.events - earlier + won, 0) / seconds,
        rate / seen.workers if busy and attempts else None,
        max(attempts - won, 0) / attempts if attempts else 0.0,
    )
