"""What a benchmark reads: progress that is cheap to ask for, and at the end what became of every event.

Read only. Promises that progress costs one count of decisions and one row per tenant; the findings scan everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.lifecycle import VERSION_OF, Status
from contracts.tenancy import TenantScope
from governance.postgres.engine import transaction

_PROGRESS: Final = text(
    """
    SELECT (SELECT count(*) FROM decisions WHERE revision = 1) AS decided,
           (SELECT coalesce(sum(seq), 0) FROM audit_heads) AS records
    """
)
# A second decision by the pipeline, or two digests of one version in the trail: either is an event decided twice. An
# opened approval has a record of its own beside that of its version, the last one.
_FINDINGS: Final = text(
    """
    SELECT (SELECT count(*) FROM (SELECT DISTINCT tenant, event_id FROM decisions) d) AS decided,
           (SELECT count(*) FROM (
               SELECT tenant, event_id FROM decisions WHERE decided_by = 'pipeline'
                GROUP BY tenant, event_id HAVING count(*) > 1
               UNION
               SELECT r.tenant, r.event_id FROM audit_records r JOIN decisions d USING (tenant, event_id)
                WHERE r.digest <> '' AND d.revision = 1 GROUP BY r.tenant, r.event_id, r.n, d.outcome
               HAVING count(DISTINCT r.digest) >
                      CASE WHEN d.outcome = 'REQUIRE_APPROVAL' AND r.n = :last THEN 2 ELSE 1 END) t) AS twice,
           (SELECT count(*) FROM dead_letters WHERE status = 'open') AS letters,
           (SELECT max(recorded_at) FROM audit_records) AS audited_at,
           (SELECT max(decided_at) FROM decisions) AS decided_at
    """
)
_TIMES: Final = text(
    """
    SELECT tenant, event_id, decided_at, state FROM decisions WHERE revision = 1 ORDER BY md5(event_id) LIMIT :limit
    """
)
_BYTES: Final = text(
    """
    SELECT sum(pg_total_relation_size(c::regclass))::bigint FROM unnest(ARRAY['events', 'decisions', 'audit_records',
           'audit_heads', 'approvals']) AS c
    """
)


@dataclass(frozen=True, slots=True)
class BenchProgress:
    """First decisions and audit records of the tenants so far."""

    decided: int
    records: int


@dataclass(frozen=True, slots=True)
class BenchFindings:
    """`twice` counts events with two pipeline decisions or two digests of one version; times are the last ones."""

    decided: int
    twice: int
    letters: int
    audited_at: datetime | None
    decided_at: datetime | None


@dataclass(frozen=True, slots=True)
class DecidedAt:
    """When an event was decided, and the stored state with its trail."""

    tenant: str
    event_id: str
    decided_at: datetime
    state: bytes


async def bench_progress(engine: AsyncEngine, scopes: Sequence[TenantScope]) -> BenchProgress:
    """How far the tenants' events have come."""
    async with transaction(engine, scopes) as connection:
        row = (await connection.execute(_PROGRESS)).one()
    return BenchProgress(int(row.decided), int(row.records))


async def bench_findings(engine: AsyncEngine, scopes: Sequence[TenantScope]) -> BenchFindings:
    """What became of the tenants' events, in one snapshot."""
    async with transaction(engine, scopes) as connection:
        row = (await connection.execute(_FINDINGS, {"last": VERSION_OF[Status.AWAITING_APPROVAL]})).one()
    return BenchFindings(int(row.decided), int(row.twice), int(row.letters), row.audited_at, row.decided_at)


async def bench_times(engine: AsyncEngine, scopes: Sequence[TenantScope], limit: int) -> list[DecidedAt]:
    """The decision times of at most `limit` events, chosen by hash and so without favour."""
    async with transaction(engine, scopes) as connection:
        rows = await connection.execute(_TIMES, {"limit": limit})
        return [DecidedAt(row.tenant, row.event_id, row.decided_at, bytes(row.state)) for row in rows]


async def bench_bytes(engine: AsyncEngine) -> int:
    """Bytes of the tables and indexes that an event grows, of all tenants."""
    async with transaction(engine, ()) as connection:
        return int((await connection.execute(_BYTES)).scalar_one())
