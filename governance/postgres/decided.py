"""The states that the pipeline decided, the newest first: what a decision is made again from.

Promises: pages by a cursor in the table's own index, so that a long walk reads each row once and holds no transaction.
Only first revisions: what people decided afterwards stands on the same state.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.tenancy import TenantScope
from contracts.velocity import FRAUD_LABELS
from governance.postgres.engine import transaction

PAGE: Final = 200

_BY_ID: Final = text(
    "SELECT event_id, state FROM decisions"
    " WHERE tenant = :tenant AND revision = 1 AND event_id = ANY(CAST(:ids AS text[]))"
)
_NEWEST: Final = text(
    """
    SELECT event_id, state, decided_at FROM decisions
     WHERE tenant = :tenant AND revision = 1 AND decided_at >= :since AND (decided_at, event_id) < (:at, :event_id)
     ORDER BY decided_at DESC, event_id DESC LIMIT :limit
    """
)


_LABELS: Final = text(
    """
    SELECT DISTINCT ON (event_id) event_id, label FROM labels
     WHERE tenant = :tenant AND event_id = ANY(CAST(:ids AS text[])) ORDER BY event_id, effective_at DESC, label_id
    """
)


async def frauds_of(engine: AsyncEngine, scope: TenantScope, event_ids: Sequence[str]) -> dict[str, bool]:
    """Whether each labelled event was a fraud, by its latest label."""
    async with transaction(engine, [scope]) as connection:
        rows = (await connection.execute(_LABELS, {"tenant": scope.tenant_id, "ids": list(event_ids)})).all()
    return {row.event_id: row.label in FRAUD_LABELS for row in rows}


async def states_of(engine: AsyncEngine, scope: TenantScope, event_ids: Sequence[str]) -> dict[str, bytes]:
    """The stored bytes by event id, of those that were decided."""
    async with transaction(engine, [scope]) as connection:
        rows = (await connection.execute(_BY_ID, {"tenant": scope.tenant_id, "ids": list(event_ids)})).all()
    return {row.event_id: bytes(row.state) for row in rows}


async def newest_states(
    engine: AsyncEngine, scope: TenantScope, most: int, since: datetime, until: datetime
) -> AsyncIterator[list[tuple[str, bytes]]]:
    """Pages of (event id, stored bytes), `most` in all, decided from `since` on and before `until` (both aware)."""
    at, event_id, left = until, "", most
    while left > 0:
        values = {"tenant": scope.tenant_id, "since": since, "at": at, "event_id": event_id, "limit": min(PAGE, left)}
        async with transaction(engine, [scope]) as connection:
            rows = (await connection.execute(_NEWEST, values)).all()
        if not rows:
            return
        yield [(row.event_id, bytes(row.state)) for row in rows]
        at, event_id, left = rows[-1].decided_at, rows[-1].event_id, left - len(rows)
