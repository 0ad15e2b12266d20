"""What operators and checkers read: one event at a glance, and the counts of some tenants.

Read only; the counts are of one snapshot. Promises nothing about speed: counts scan the tenants' rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import orjson
from pydantic import BaseModel, ConfigDict
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.ports import DecisionRow
from contracts.tenancy import TenantScope
from governance.approvals import ApprovalStatus, Cause, Revision
from governance.deadletters import LetterSummary
from governance.postgres.deadletters import letters_of
from governance.postgres.engine import transaction
from governance.postgres.ledger import read_decision

_EVENT: Final = text(
    """
    SELECT kind, type, body_digest, correlation_id, received_at,
           (SELECT count(*) FROM audit_records r WHERE r.tenant = e.tenant AND r.event_id = e.event_id) AS records
      FROM events e WHERE tenant = :tenant AND event_id = :event_id
    """
)
_REVISIONS: Final = text(
    """
    SELECT revision, outcome, decided_by, decider, decided_at, corrects, superseded_by, decision FROM decisions
     WHERE tenant = :tenant AND event_id = :event_id ORDER BY revision
    """
)
_APPROVALS: Final = text(
    """
    SELECT revision, status, cause, priority, opened_at, opened_by, due_at, expires_at, claimed_by, closed_by,
           closed_at, close_reason FROM approvals
     WHERE tenant = :tenant AND event_id = :event_id ORDER BY revision
    """
)
_FAILED: Final = text(
    "SELECT EXISTS (SELECT 1 FROM dead_letters WHERE tenant = :tenant AND event_id = :event_id AND failed)"
)
# One statement, so one snapshot.
_COUNTS: Final = text(
    """
    SELECT (SELECT count(*) FROM events) AS events,
           (SELECT jsonb_object_agg(outcome, n)
              FROM (SELECT outcome, count(*) AS n FROM decisions WHERE revision = 1 GROUP BY outcome) d) AS outcomes,
           (SELECT count(*) FROM audit_records) AS audit_records,
           (SELECT count(*) FROM dead_letters WHERE status = 'open') AS dead_letters
    """
)


_LATENCIES: Final = text(
    """
    SELECT coalesce(percentile_cont(0.5) WITHIN GROUP (ORDER BY waited), 0) AS p50,
           coalesce(percentile_cont(0.99) WITHIN GROUP (ORDER BY waited), 0) AS p99,
           coalesce(extract(epoch FROM max(decided_at) - min(received_at)), 0) AS span
      FROM (SELECT d.decided_at, e.received_at, extract(epoch FROM d.decided_at - e.received_at) AS waited
              FROM decisions d JOIN events e USING (tenant, event_id)
             WHERE tenant = :tenant AND revision = 1) AS decided
    """
)


@dataclass(frozen=True, slots=True)
class Latencies:
    """From receipt to decision, in seconds; `span_s` from the first receipt to the last decision."""

    p50_s: float
    p99_s: float
    span_s: float


class ApprovalSummary(BaseModel):
    """One approval of an event, without its votes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    revision: int
    status: ApprovalStatus
    cause: Cause
    priority: int
    opened_at: datetime
    opened_by: str | None
    due_at: datetime | None
    expires_at: datetime | None
    claimed_by: str | None
    closed_by: str | None
    closed_at: datetime | None
    close_reason: str | None


@dataclass(frozen=True, slots=True)
class EventSummary:
    """One event as PostgreSQL knows it; fields of the `events` row are None when only dead letters know it.

    `decision` is the highest of `revisions`.
    """

    event_id: str
    kind: str | None
    type: str | None
    body_digest: str | None
    correlation_id: str | None
    received_at: datetime | None
    audit_records: int
    decision: DecisionRow | None
    dead_letters: tuple[LetterSummary, ...]
    revisions: tuple[Revision, ...] = ()
    approvals: tuple[ApprovalSummary, ...] = ()
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of some tenants: decisions are of revision 1, dead letters are open ones."""

    events: int
    decisions: int
    by_outcome: Mapping[str, int]
    audit_records: int
    dead_letters: int


async def event_summary(engine: AsyncEngine, scope: TenantScope, event_id: str) -> EventSummary | None:
    """Everything about one event of a tenant; None when PostgreSQL has never heard of it."""
    key = {"tenant": scope.tenant_id, "event_id": event_id}
    async with transaction(engine, [scope]) as connection:
        event = (await connection.execute(_EVENT, key)).one_or_none()
        letters = await letters_of(connection, scope, event_id)
        decision = await read_decision(connection, scope, event_id)
        revisions = await revisions_of(connection, scope, event_id)
        asked = (await connection.execute(_APPROVALS, key)).mappings()
        approvals = tuple(ApprovalSummary.model_validate(dict(row)) for row in asked)
        failed = bool((await connection.execute(_FAILED, key)).scalar_one())
    if event is None and not letters and decision is None:
        return None
    return EventSummary(
        event_id=event_id,
        kind=event.kind if event else None,
        type=event.type if event else None,
        body_digest=event.body_digest if event else None,
        correlation_id=event.correlation_id if event else None,
        received_at=event.received_at if event else None,
        audit_records=event.records if event else 0,
        decision=decision,
        dead_letters=letters,
        revisions=revisions,
        approvals=approvals,
        failed=failed,
    )


async def revisions_of(connection: AsyncConnection, scope: TenantScope, event_id: str) -> tuple[Revision, ...]:
    """Every revision of an event's decision, inside the caller's transaction."""
    key = {"tenant": scope.tenant_id, "event_id": event_id}
    rows = (await connection.execute(_REVISIONS, key)).mappings()
    return tuple(
        Revision.model_validate(dict(row) | {"decision": orjson.loads(bytes(row["decision"]))}) for row in rows
    )


async def counts(engine: AsyncEngine, scopes: Sequence[TenantScope | None]) -> Counts:
    """Counts over exactly these tenants (None: what belongs to no tenant); row-level security is the filter."""
    async with transaction(engine, scopes) as connection:
        row = (await connection.execute(_COUNTS)).one()
    outcomes = dict(sorted((row.outcomes or {}).items()))
    return Counts(row.events, sum(outcomes.values()), outcomes, row.audit_records, row.dead_letters)


async def latencies(engine: AsyncEngine, scope: TenantScope) -> Latencies:
    """Latency percentiles over a tenant's pipeline decisions; zeros when there are none."""
    async with transaction(engine, [scope]) as connection:
        row = (await connection.execute(_LATENCIES, {"tenant": scope.tenant_id})).one()
    return Latencies(float(row.p50), float(row.p99), float(row.span))
