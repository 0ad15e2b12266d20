"""Metric names, their bounded labels, and the context of a log line: closed sets.

No payload, no identifier of a person and no exception text ever becomes a label or a log field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum


class MetricType(StrEnum):
    """How a metric's values combine."""

    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: full Prometheus name, type, help text, label names."""

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()


_C, _H = MetricType.COUNTER, MetricType.HISTOGRAM

REQUESTS = Metric("riskfleet_requests_total", _C, "Submissions by door and result.", ("door", "result"))
REQUEST_SECONDS = Metric("riskfleet_request_seconds", _H, "Latency of a submission at its door.", ("door",))
REFUSALS = Metric("riskfleet_refusals_total", _C, "Refused submissions by problem.", ("door", "problem"))
EXECUTIONS = Metric("riskfleet_workflow_executions_total", _C, "Entries advanced by stage and kind.", ("stage", "kind"))
DECISIONS = Metric("riskfleet_decisions_total", _C, "Decisions by outcome.", ("kind", "outcome", "tenant"))
APPROVALS_OPENED = Metric("riskfleet_approvals_required_total", _C, "Approvals opened.", ("kind", "tenant"))
STAGE_SECONDS = Metric("riskfleet_stage_seconds", _H, "Time from delivery to settlement.", ("stage",))
END_TO_END_SECONDS = Metric("riskfleet_end_to_end_seconds", _H, "Time from receipt to decision row.", ("kind",))
RETRIES = Metric("riskfleet_retries_total", _C, "Entries sent to the retry ladder.", ("stage", "category"))
PARKED = Metric("riskfleet_parked_total", _C, "Entries parked.", ("stage", "category"))
FAILURES = Metric("riskfleet_failures_total", _C, "Failures by category.", ("stage", "category"))
DUPLICATES = Metric("riskfleet_duplicates_suppressed_total", _C, "Deliveries that were already done.", ("stage",))
STALE_WRITES = Metric("riskfleet_stale_writes_refused_total", _C, "Advances refused by the fence.", ("stage",))
CONFLICTS = Metric("riskfleet_decision_conflicts_total", _C, "Decisions that found another one committed.", ("kind",))
LOCK_WAITS = Metric("riskfleet_lock_waits_total", _C, "Entries that waited on another holder's lease.", ("stage",))
SUSPECTS = Metric("riskfleet_suspects_total", _C, "Entries run alone after their holder died.", ("stage",))
AUDIT_RECORDS = Metric("riskfleet_audit_records_total", _C, "Audit records appended or already present.", ("result",))
LABELS = Metric("riskfleet_labels_total", _C, "Labels by door and result.", ("door", "result"))
DELIVERIES = Metric("riskfleet_decision_deliveries_total", _C, "Decisions sent round the delivery ladder.", ("result",))
RECONCILED = Metric("riskfleet_reconciled_total", _C, "What was lost on its way and sent again.", ("what",))
APPROVALS_CLOSED = Metric("riskfleet_approvals_closed_total", _C, "Approvals closed by result.", ("result", "tenant"))
APPROVAL_SECONDS = Metric("riskfleet_approval_dwell_seconds", _H, "Time from opening to closing an approval.", ())
OUTBOX = Metric("riskfleet_outbox_published_total", _C, "Outbox messages published by result.", ("result",))
TRANSITIONS = Metric("riskfleet_registry_transitions_total", _C, "Registry transitions.", ("kind", "to"))
PARK_BREAKS = Metric("riskfleet_park_breaks_total", _C, "Pauses made by parks: of a stage or a tenant.", ("what",))
LOGINS = Metric("riskfleet_logins_total", _C, "Logins by result.", ("result",))
OPERATOR_CALLS = Metric("riskfleet_operator_calls_total", _C, "Operator API calls.", ("call", "result"))
LIMITER_REFUSALS = Metric("riskfleet_limiter_refusals_total", _C, "Takes above a rate.", ("limit", "tenant"))
BREAKER_CHANGES = Metric("riskfleet_breaker_changes_total", _C, "Changes of a breaker.", ("dependency", "to"))
BREAKER_REFUSALS = Metric("riskfleet_breaker_refusals_total", _C, "Calls that a breaker refused.", ("dependency",))
BULKHEAD_REFUSALS = Metric("riskfleet_bulkhead_refusals_total", _C, "Refused permits.", ("dependency", "reason"))
BULKHEAD_WAIT_SECONDS = Metric("riskfleet_bulkhead_wait_seconds", _H, "Wait for a permit.", ("dependency",))

METRICS: Mapping[str, Metric] = {
    m.name: m
    for m in (
        REQUESTS,
        REQUEST_SECONDS,
        REFUSALS,
        EXECUTIONS,
        DECISIONS,
        APPROVALS_OPENED,
        STAGE_SECONDS,
        END_TO_END_SECONDS,
        RETRIES,
        PARKED,
        FAILURES,
        DUPLICATES,
        STALE_WRITES,
        CONFLICTS,
        LOCK_WAITS,
        SUSPECTS,
        AUDIT_RECORDS,
        LABELS,
        DELIVERIES,
        RECONCILED,
        APPROVALS_CLOSED,
        APPROVAL_SECONDS,
        OUTBOX,
        TRANSITIONS,
        PARK_BREAKS,
        LOGINS,
        OPERATOR_CALLS,
        LIMITER_REFUSALS,
        BREAKER_CHANGES,
        BREAKER_REFUSALS,
        BULKHEAD_REFUSALS,
        BULKHEAD_WAIT_SECONDS,
    )
}

_G = MetricType.GAUGE
BACKLOG_EVENTS = Metric("riskfleet_backlog_events", _G, "Undecided, unparked events at a stage.", ("stage",))
BACKLOG_OLDEST = Metric("riskfleet_backlog_oldest_seconds", _G, "Age of the oldest event at a stage.", ("stage",))
SCALING_CURRENT = Metric("riskfleet_autoscaler_current_workers", _G, "Workers that consume a stage.", ("stage",))
SCALING_DESIRED = Metric("riskfleet_autoscaler_desired_workers", _G, "Workers that a stage should have.", ("stage",))
SCALING_DECISIONS = Metric(
    "riskfleet_autoscaler_decisions_total", _C, "Scaling decisions.", ("stage", "action", "reason")
)
AUTOSCALER_METRICS = (BACKLOG_EVENTS, BACKLOG_OLDEST, SCALING_CURRENT, SCALING_DESIRED, SCALING_DECISIONS)
"""On the autoscaler's own port: what is true now is told by the process that measured it."""
HEALTH = Metric("riskfleet_health", _G, "The role's verdict: 0 ok, 1 degraded, 2 down.", ())
"""On every role's own port, as judged when it is asked."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One value for one metric: an increment of a counter or an observation (seconds) of a histogram."""

    metric: Metric
    value: float = 1.0
    labels: Mapping[str, str] = field(default_factory=dict)


LOG_FIELDS = frozenset(
    [
        "event",
        "level",
        "timestamp",
        "logger",
        "role",
        "tenant",
        "event_id",
        "stage",
        "n",
        "digest",
        "attempts",
        "category",
        "problem",
        "fingerprint",
        "kind",
        "outcome",
        "correlation_id",
        "traceparent",
        "queue",
        "partition",
        "count",
        "seconds",
        "exception_class",
        "reason",
        "server",
        "port",
        "pid",
        "status",
        "version",
        "door",
        "request_id",
        "method",
        "path",
        "boot",
        "suspect",
        "error_detail",
        "actor",
        "action",
    ]
)
"""The fields that a log line may have; everything else is dropped before it is written."""


@dataclass(frozen=True, slots=True)
class Correlation:
    """Whom a piece of work is for: bound once at the door or at a delivery."""

    tenant: str | None = None
    correlation_id: str | None = None
    traceparent: str | None = None
    event_id: str | None = None


_current: ContextVar[Correlation] = ContextVar("riskfleet_correlation", default=Correlation())  # noqa: B039 - frozen


def current_correlation() -> Correlation:
    """The correlation that is bound here; empty outside any piece of work."""
    return _current.get()


@contextmanager
def bind_correlation(correlation: Correlation) -> Iterator[None]:
    """Bind a correlation to every log line and record made inside the block."""
    token = _current.set(correlation)
    try:
        yield
    finally:
        _current.reset(token)
