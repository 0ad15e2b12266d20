"""How many workers a stage should have: one pure decision on what was measured.

Promises: the same snapshot, policy, state and moment give the same decision; up at once and as far as needed, down late
and in steps; never below the minimum or above the maximum, which a stage's partitions bound too; no change on numbers
that are missing, old or out of order, nor while so many attempts fail that more workers would only press on what is
failing. Does not start or stop anything: whoever does carries the decision out, hands its `state` to the next call, and
writes both down (docs/traces.md), so that every decision can be repeated.

What is needed follows from the queue's own equation: workers · service rate · utilisation ≥ arrivals + backlog / the
time in which it must be gone. Two signals besides: an event too old although the equation is content, and processors
that are full. A rule that looks at the backlog alone needs a backlog to keep its workers; this one keeps them for what
arrives.

A burst that comes again is learnt: after two, their pause and a quarter is waited for the next one before going down.
Once nothing came in that time, the patience is the policy's again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

_ABSURD: Final = 1e9
"""Workers beyond this are no number of workers; the maximum bounds what is wanted."""
_BURST: Final = 2.0
"""A need that changes by a smaller factor is no burst."""


class Action(StrEnum):
    """What is to be done."""

    SCALE_UP = "scale-up"
    SCALE_DOWN = "scale-down"
    NO_ACTION = "no-action"


class Reason(StrEnum):
    """Why, in one word of a closed set: the label of a metric, and what an operator looks up in the runbook."""

    BACKLOG = "backlog"
    ARRIVALS = "arrivals"
    AGE = "oldest-age"
    CPU = "cpu"
    SURPLUS = "surplus"
    STEADY = "steady"
    COOLING_DOWN = "cooling-down"
    LATENCY = "latency"
    MISSING = "metrics-missing"
    STALE = "metrics-stale"
    FAILING = "dependency-failing"
    BELOW_MINIMUM = "below-minimum"
    ABOVE_MAXIMUM = "above-maximum"
    AT_MAXIMUM = "at-maximum"


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """What was measured of one stage at `as_of` (aware, UTC); None = it could not be.

    `current`: workers wanted at the moment, those that still start included. `backlog_events`: accepted and not yet
    through the stage, in events. `oldest_age_s`: of the oldest of them, 0 for none. `arrival_rate`: events per second.
    `service_rate`: attempts per second that one worker makes *while it is busy*, None when none was. `failure_rate`:
    failed attempts per attempt, 0 when there were none, 1 while the stage is paused. `latency_s`: median from delivery
    to settlement. `cpu`: busy share of the workers' processors. The last two may be missing: they are second opinions.
    """

    stage: str
    as_of: datetime
    current: int
    partitions: int
    backlog_events: float | None
    oldest_age_s: float | None
    arrival_rate: float | None
    service_rate: float | None
    failure_rate: float | None
    latency_s: float | None = None
    cpu: float | None = None


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """Bounds and patience of one stage; times in seconds, rates and shares as in the snapshot.

    `slo_age_s`: no event may be older. `drain_s`: how fast a backlog must go. `busy`: the utilisation that a stage is
    sized for; `spare`: the one that it must not exceed *after* shrinking (below `busy`: the gap is the hysteresis).
    `growth`: at most so many times as many workers at once. `shrink`: at most this share fewer at once, one anyway.
    `calm_s`: so long must fewer have been enough; the most that was needed in that time stays. `recall_s`: a load that
    comes again after at most this long is waited for next time; 0 never waits. `up_pause_s`: the rest
    between two steps up. `down_pause_s`: the rest after any step, before one down. `failing`: the failure rate from
    which nothing changes, until it is below `healed`. `slow_s`: the latency above which nothing shrinks. `full`: the
    CPU share from which a backlog needs one more, whatever the rest says.

    Raises ValueError for a policy that contradicts itself.
    """

    minimum: int = 1
    maximum: int = 64
    slo_age_s: float = 10.0
    drain_s: float = 20.0
    busy: float = 0.9
    spare: float = 0.8
    growth: float = 8.0
    shrink: float = 0.5
    calm_s: float = 45.0
    recall_s: float = 600.0
    up_pause_s: float = 15.0
    down_pause_s: float = 15.0
    max_metrics_age_s: float = 60.0
    failing: float = 0.3
    healed: float = 0.1
    slow_s: float = 5.0
    full: float = 0.9

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError("minimum is between 1 and maximum")
        if not 0 < self.spare <= self.busy <= 1:
            raise ValueError("0 < spare ≤ busy ≤ 1")
        if not 0 <= self.healed <= self.failing <= 1:
            raise ValueError("0 ≤ healed ≤ failing ≤ 1")
        if self.growth <= 1 or not 0 < self.shrink <= 1 or not 0 < self.full <= 1:
            raise ValueError("growth is above 1; shrink and full are above 0 and at most 1")
        if min(self.slo_age_s, self.drain_s, self.max_metrics_age_s, self.slow_s) <= 0:
            raise ValueError("slo_age_s, drain_s, max_metrics_age_s and slow_s are above 0")
        if min(self.calm_s, self.recall_s, self.up_pause_s, self.down_pause_s) < 0:
            raise ValueError("calm_s, recall_s, up_pause_s and down_pause_s are not negative")


def policy_within(slo_age_s: float, minimum: int, maximum: int) -> ScalingPolicy:
    """The default policy for another objective: every patience grows and shrinks with it."""
    known = ScalingPolicy()
    times = {
        name: getattr(known, name) * slo_age_s / known.slo_age_s
        for name in ("slo_age_s", "drain_s", "calm_s", "recall_s", "up_pause_s", "down_pause_s", "slow_s")
    }
    return replace(known, minimum=minimum, maximum=maximum, **times)


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What one decision leaves to the next; the default is a fleet that has just begun.

    `needs`: what would have been enough, newest last, as far back as `patience_s`, which is `calm_s` unless more was
    learnt. `eased_at`: since when far fewer were enough, None while a burst lasts. `service_rate`: learnt, for the
    times when no worker is busy.
    """

    as_of: datetime | None = None
    changed_at: datetime | None = None
    raised_at: datetime | None = None
    eased_at: datetime | None = None
    patience_s: float = 0.0
    needs: tuple[tuple[datetime, int], ...] = ()
    service_rate: float | None = None
    backlog: float = 0.0
    failing: bool = False


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """What to do: `desired` workers, why, and the state for the next decision."""

    action: Action
    desired: int
    reason: Reason
    state: ScalingState


@dataclass(frozen=True, slots=True)
class _Known:
    """A snapshot whose needed numbers are all there."""

    current: int
    backlog: float
    age_s: float
    arrivals: float
    service: float
    failures: float
    cpu: float | None
    latency_s: float | None


def evaluate(snapshot: MetricsSnapshot, policy: ScalingPolicy, state: ScalingState, now: datetime) -> ScalingDecision:
    """The decision on one snapshot, at `now` (aware, UTC).

    Raises ValueError for a snapshot that nobody can have measured: negative counts, or no partitions.
    """
    if snapshot.current < 0 or snapshot.partitions < 1:
        raise ValueError("a stage has at least 0 workers and 1 partition")
    if not _fresh(snapshot, policy, state, now):
        return _hold(snapshot, policy, state, Reason.STALE)
    known = _known(snapshot, state)
    if known is None:
        return _hold(snapshot, policy, replace(state, as_of=snapshot.as_of), Reason.MISSING)
    assert snapshot.failure_rate is not None  # _known has looked
    failing = snapshot.failure_rate >= (policy.healed if state.failing else policy.failing)
    if failing:
        # What was learnt and needed before says nothing about the time after.
        unsure = replace(state, as_of=snapshot.as_of, failing=True, needs=(), backlog=known.backlog)
        return _hold(snapshot, policy, unsure, Reason.FAILING)
    return _weigh(snapshot, policy, state, known)


def _fresh(snapshot: MetricsSnapshot, policy: ScalingPolicy, state: ScalingState, now: datetime) -> bool:
    """Neither old nor from the future (a clock that is wrong either way), nor older than what was decided on."""
    if abs((now - snapshot.as_of).total_seconds()) > policy.max_metrics_age_s:
        return False
    return state.as_of is None or snapshot.as_of >= state.as_of


def _known(snapshot: MetricsSnapshot, state: ScalingState) -> _Known | None:
    backlog, age_s, arrivals = snapshot.backlog_events, snapshot.oldest_age_s, snapshot.arrival_rate
    service, failures = snapshot.service_rate, snapshot.failure_rate
    if backlog is None or age_s is None or arrivals is None or failures is None:
        return None
    if service is None:
        # Nobody was busy: what was learnt holds, and where nothing arrives any rate is enough.
        service = state.service_rate or (1.0 if backlog == arrivals == 0 else 0.0)
    elif state.service_rate is not None:
        # The slower the learning, the less one odd interval moves the count.
        service = 0.7 * state.service_rate + 0.3 * service
    # NaN and infinity come from a division by a time of nothing: measured by nobody.
    if not all(math.isfinite(number) and number >= 0 for number in (backlog, age_s, arrivals, service, failures)):
        return None
    if service == 0:
        return None
    return _Known(snapshot.current, backlog, age_s, arrivals, service, failures, snapshot.cpu, snapshot.latency_s)


def _weigh(snapshot: MetricsSnapshot, policy: ScalingPolicy, state: ScalingState, known: _Known) -> ScalingDecision:
    need, reason = _need(policy, state, known)
    enough = max(_workers(_demand(policy, known), known.service, policy.spare), need)
    learnt = state.service_rate if snapshot.service_rate is None else known.service
    needs = _watched((*state.needs, (snapshot.as_of, enough)), _patience(policy, state))
    after = replace(state, as_of=snapshot.as_of, needs=needs, service_rate=learnt, backlog=known.backlog, failing=False)
    if need <= known.current:
        return _shrink(snapshot, policy, after, known)
    fewest, ceiling = _bounds(snapshot, policy)
    if known.current < ceiling and _within(state.raised_at, snapshot.as_of, policy.up_pause_s):
        return _hold(snapshot, policy, after, Reason.COOLING_DOWN)
    most = max(known.current + 1, math.floor(max(known.current, fewest) * policy.growth))
    return _change(snapshot, policy, after, min(need, most), reason)


def _patience(policy: ScalingPolicy, state: ScalingState) -> float:
    return max(policy.calm_s, state.patience_s)


def _watched(needs: tuple[tuple[datetime, int], ...], patience_s: float) -> tuple[tuple[datetime, int], ...]:
    """The needs of the last `patience_s`, and the one before, so that they span it whole."""
    since = needs[-1][0] - timedelta(seconds=patience_s)
    begin = next((place for place in range(len(needs) - 1, -1, -1) if needs[place][0] <= since), 0)
    return needs[begin:]


def _demand(policy: ScalingPolicy, known: _Known) -> float:
    """Attempts per second that must be made: what failed is tried again."""
    return (known.arrivals + known.backlog / policy.drain_s) / max(1 - known.failures, 1 - policy.failing, 0.01)


def _need(policy: ScalingPolicy, state: ScalingState, known: _Known) -> tuple[int, Reason]:
    """The workers that are needed now, and what asks for them."""
    need = _workers(_demand(policy, known), known.service, policy.busy)
    reason = Reason.BACKLOG if known.backlog / policy.drain_s > known.arrivals else Reason.ARRIVALS
    queued = known.backlog >= max(state.backlog, known.arrivals * policy.slo_age_s / 2, 1)
    if known.age_s > policy.slo_age_s and queued and need <= known.current:
        # The equation is content, yet events grow old and no fewer: the rate per worker is less than it looks. A few
        # old ones in a short queue wait on the ladder or for a lock, and no worker helps them.
        need, reason = known.current + 1, Reason.AGE
    if known.cpu is not None and known.cpu >= policy.full and known.backlog > 0 and need <= known.current:
        need, reason = known.current + 1, Reason.CPU
    return need, reason


def _workers(demand: float, service: float, utilisation: float) -> int:
    # A worker too many for 1.0000000001 workers' work would be a flap of the arithmetic.
    return math.ceil(min(demand / (service * utilisation), _ABSURD) - 1e-9)


def _shrink(snapshot: MetricsSnapshot, policy: ScalingPolicy, state: ScalingState, known: _Known) -> ScalingDecision:
    """Fewer, if fewer have been enough for long enough."""
    target = max(need for _, need in state.needs)
    if target >= known.current:
        return _hold(snapshot, policy, state, Reason.STEADY)
    calm = (snapshot.as_of - state.needs[0][0]).total_seconds() >= _patience(policy, state)
    if not calm or _within(state.changed_at, snapshot.as_of, policy.down_pause_s):
        return _hold(snapshot, policy, state, Reason.COOLING_DOWN)
    if known.latency_s is not None and known.latency_s > policy.slow_s:
        return _hold(snapshot, policy, state, Reason.LATENCY)
    step = max(1, math.floor(known.current * policy.shrink))
    if target * _BURST <= known.current:
        # Whoever waited for a burst waited in vain, and waits no longer.
        state = replace(state, eased_at=state.eased_at or state.needs[0][0], patience_s=0.0)
    return _change(snapshot, policy, state, max(target, known.current - step), Reason.SURPLUS)


def _within(moment: datetime | None, now: datetime, seconds: float) -> bool:
    return moment is not None and (now - moment).total_seconds() < seconds


def _bounds(snapshot: MetricsSnapshot, policy: ScalingPolicy) -> tuple[int, int]:
    """Fewest and most workers: more than partitions would find nothing to do."""
    most = min(policy.maximum, snapshot.partitions)
    return min(policy.minimum, most), most


def _hold(snapshot: MetricsSnapshot, policy: ScalingPolicy, state: ScalingState, reason: Reason) -> ScalingDecision:
    return _change(snapshot, policy, state, snapshot.current, reason)


def _change(
    snapshot: MetricsSnapshot, policy: ScalingPolicy, state: ScalingState, wanted: int, reason: Reason
) -> ScalingDecision:
    """The decision for `wanted` workers within the bounds, which hold whatever else is known."""
    fewest, most = _bounds(snapshot, policy)
    current, desired = snapshot.current, min(max(wanted, fewest), most)
    if desired == current:
        return ScalingDecision(Action.NO_ACTION, current, Reason.AT_MAXIMUM if wanted > current else reason, state)
    if desired > wanted:
        reason = Reason.BELOW_MINIMUM
    elif desired < current <= wanted:
        reason = Reason.ABOVE_MAXIMUM
    at = snapshot.as_of
    if desired > current:
        if desired >= _BURST * current:
            state = replace(state, eased_at=None, patience_s=_learnt(policy, state, at))
        return ScalingDecision(Action.SCALE_UP, desired, reason, replace(state, changed_at=at, raised_at=at))
    return ScalingDecision(Action.SCALE_DOWN, desired, reason, replace(state, changed_at=at))


def _learnt(policy: ScalingPolicy, state: ScalingState, now: datetime) -> float:
    """How long to wait for the next burst: so long, and a quarter, as far fewer were enough before this one."""
    if state.eased_at is None:
        return state.patience_s
    gap = (now - state.eased_at).total_seconds()
    return 1.25 * gap if gap <= policy.recall_s else 0.0


# --- traces: docs/traces.md has the format ----------------------------------------------------------

TRACE_VERSION: Final = 1
_MEASURED: Final = (
    "backlog_events",
    "oldest_age_s",
    "arrival_rate",
    "service_rate",
    "failure_rate",
    "latency_s",
    "cpu",
)


def trace_head(stage: str, start: datetime, policy: ScalingPolicy) -> dict[str, Any]:
    """The first line of a trace: whose it is, what its times count from, and the policy that decided."""
    return {"trace": TRACE_VERSION, "stage": stage, "start": start.isoformat(), "policy": asdict(policy)}


def trace_line(snapshot: MetricsSnapshot, now: datetime, decision: ScalingDecision, start: datetime) -> dict[str, Any]:
    """One further line: what was measured, when it was looked at, and what was decided."""
    line: dict[str, Any] = {"t": (snapshot.as_of - start).total_seconds(), "now": (now - start).total_seconds()}
    line |= {"current": snapshot.current, "partitions": snapshot.partitions}
    line |= {name: getattr(snapshot, name) for name in _MEASURED}
    return line | {"action": str(decision.action), "desired": decision.desired, "reason": str(decision.reason)}


def policy_of(head: Mapping[str, Any]) -> ScalingPolicy:
    """The policy in a trace's first line. Raises ValueError for another version, or names that it does not know."""
    if head.get("trace") != TRACE_VERSION:
        raise ValueError(f"this release reads traces of version {TRACE_VERSION}")
    try:
        return ScalingPolicy(**{"recall_s": 0.0} | head["policy"])  # as it was before there was a choice
    except (KeyError, TypeError) as error:
        raise ValueError("the first line of a trace names the policy and nothing else in it") from error


def snapshot_of(head: Mapping[str, Any], line: Mapping[str, Any]) -> tuple[MetricsSnapshot, datetime]:
    """The snapshot of a line and the moment at which it was decided on. Raises ValueError for a line without them."""
    try:
        start = datetime.fromisoformat(head["start"])
        as_of, now = (start + timedelta(seconds=line[name]) for name in ("t", "now"))
        measured = {name: line.get(name) for name in _MEASURED}
        return MetricsSnapshot(head["stage"], as_of, line["current"], line["partitions"], **measured), now
    except (KeyError, TypeError) as error:
        raise ValueError("a line of a trace has t, now, current and partitions") from error
