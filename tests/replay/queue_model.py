"""A stage as a fluid queue: what a scaling rule would have met, had it governed the stage of a trace.

One second at a time: events arrive, workers that have started serve the oldest first, a share of attempts fails and
comes back after the ladder's wait with its age. A new worker costs from the moment it is wanted and works once it has
started; one too many stops at once. No chance of its own: a trace holds all of it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from resilience.autoscaling import MetricsSnapshot, ScalingDecision, ScalingPolicy, ScalingState, evaluate
from tests.replay.traces import Trace

LADDER_S = 5
_NOTHING = 1e-6


@dataclass(frozen=True, slots=True)
class World:
    """What the rule does not choose (s): how often it is asked, and how long a worker takes to start."""

    period_s: int = 15
    start_s: int = 20
    slo_age_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Score:
    """Seconds with an event older than the objective, paid seconds of workers, and changes of direction."""

    over_slo_s: int
    worker_s: int
    flaps: int


Rule = Callable[[MetricsSnapshot], int]
"""The workers wanted on a snapshot."""


@dataclass
class Stage:
    """The queue, its workers, and what was measured since it was last asked."""

    workers: deque[int] = field(default_factory=deque)
    """When each worker is ready, the longest-running first."""

    waiting: deque[list[float]] = field(default_factory=deque)
    """[arrival, events], the oldest first."""

    laddered: deque[tuple[int, list[list[float]]]] = field(default_factory=deque)
    arrived: float = 0.0
    attempts: float = 0.0
    failed: float = 0.0

    def scale(self, wanted: int, now: int, start_s: int) -> None:
        """Start or stop workers; those that still start go first."""
        while len(self.workers) < wanted:
            self.workers.append(now + start_s)
        while len(self.workers) > wanted:
            self.workers.pop()

    def second(self, now: int, arrivals: float, service_rate: float, failing: float) -> None:
        """One second of work."""
        while self.laddered and self.laddered[0][0] <= now:
            self.waiting = deque(sorted([*self.laddered.popleft()[1], *self.waiting]))
        if arrivals > 0:
            self.waiting.append([float(now), arrivals])
            self.arrived += arrivals
        capacity = service_rate * sum(1 for ready in self.workers if ready <= now)
        again: list[list[float]] = []
        while self.waiting and capacity > _NOTHING:
            oldest = self.waiting[0]
            served = min(oldest[1], capacity)
            capacity -= served
            oldest[1] -= served
            self.attempts += served
            self.failed += served * failing
            if served * failing > _NOTHING:
                again.append([oldest[0], served * failing])
            if oldest[1] <= _NOTHING:
                self.waiting.popleft()
        if again:
            self.laddered.append((now + LADDER_S, again))

    @property
    def backlog(self) -> float:
        """Events not yet through, those on the ladder too."""
        return sum(n for _, n in self.waiting) + sum(n for _, some in self.laddered for _, n in some)

    def oldest_age(self, now: int) -> float:
        """Seconds since the oldest whole event arrived, 0 for none: a fluid leaves ever smaller drops behind."""
        older = 0.0
        for arrival, events in sorted([*self.waiting, *(one for _, some in self.laddered for one in some)]):
            older += events
            if older >= 1.0:
                return now - arrival
        return 0.0


def replay(trace: Trace, rule: Rule, world: World | None = None, first: int = 1) -> tuple[Score, list[MetricsSnapshot]]:
    """What the rule would have made of the trace, and what it was shown."""
    world = world or World()
    stage, shown, counts = Stage(), [], [first]
    stage.scale(first, -world.start_s, world.start_s)
    over = paid = 0
    for now in range(trace.seconds):
        load = trace.at(now)
        if now and now % world.period_s == 0:
            shown.append(_snapshot(trace, stage, now, world))
            stage.scale(max(rule(shown[-1]), 0), now, world.start_s)
            counts.append(len(stage.workers))
            stage.arrived = stage.attempts = stage.failed = 0.0
        stage.second(now, load.arrival_rate, load.service_rate, load.failure_rate)
        paid += len(stage.workers)
        over += stage.oldest_age(now) > world.slo_age_s
    return Score(over, paid, flaps(counts)), shown


def _snapshot(trace: Trace, stage: Stage, now: int, world: World) -> MetricsSnapshot:
    load = trace.at(now - 1)
    return MetricsSnapshot(
        trace.stage,
        trace.start + timedelta(seconds=now),
        len(stage.workers),
        trace.partitions,
        stage.backlog,
        stage.oldest_age(now),
        stage.arrived / world.period_s,
        load.service_rate if stage.attempts else None,
        stage.failed / stage.attempts if stage.attempts else 0.0,
    )


def flaps(counts: Sequence[int]) -> int:
    """Changes of direction in a row of counts."""
    steps = [after - before for before, after in itertools.pairwise(counts) if after != before]
    return sum((one > 0) != (two > 0) for one, two in itertools.pairwise(steps))


class Ours:
    """The rule of `resilience.autoscaling`; keeps what it decided."""

    def __init__(self, policy: ScalingPolicy) -> None:
        self.policy = policy
        self.state = ScalingState()
        self.decided: list[ScalingDecision] = []

    def __call__(self, snapshot: MetricsSnapshot) -> int:
        decision = evaluate(snapshot, self.policy, self.state, snapshot.as_of)
        self.state = decision.state
        self.decided.append(decision)
        return decision.desired


@dataclass
class QueueLength:
    """KEDA's queue-length rule as Kubernetes carries it out: a ScaledObject becomes an HPA with an AverageValue target.

    Defaults of autoscaling/v2: asked every 15 s, ⌈backlog / target⌉ workers, no change within 10 % of the target, up at
    once by 100 % or 4 whichever is more, down only to the most that was wanted in the last 300 s. KEDA's own
    `cooldownPeriod` (300 s) is for the step to zero, which a minimum of one never takes.
    """

    target: float
    minimum: int
    maximum: int
    window_s: int = 300
    tolerance: float = 0.1
    _wanted: deque[tuple[float, int]] = field(default_factory=deque)

    def __call__(self, snapshot: MetricsSnapshot) -> int:
        assert snapshot.backlog_events is not None
        now, current = snapshot.as_of.timestamp(), snapshot.current
        ratio = snapshot.backlog_events / (self.target * max(current, 1))
        wanted = current if abs(ratio - 1) <= self.tolerance else -int(-snapshot.backlog_events // self.target)
        wanted = min(max(wanted, self.minimum), self.maximum, snapshot.partitions)
        self._wanted.append((now, wanted))
        while self._wanted[0][0] <= now - self.window_s:
            self._wanted.popleft()
        if wanted >= current:
            return min(wanted, max(2 * current, current + 4))
        return min(max(n for _, n in self._wanted), current)
