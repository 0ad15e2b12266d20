"""What was accepted, read back for whoever rebuilds from it: the tables `events`, `labels` and `imported_history`.

Promises pages in the order of ids, each behind the last, so that a reader needs no snapshot: what is written while it
reads is the writer's to bring into what is rebuilt. A body that this release cannot read is left out, and logged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import orjson
import structlog
from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.events import parse_event
from contracts.failures import RiskfleetError
from contracts.labels import Label
from contracts.tenancy import TenantScope
from contracts.velocity import ImportedPart, PastEvent
from governance.postgres.engine import columns, transaction

log = structlog.get_logger("past")

_EVENTS: Final = text(
    """
    SELECT event_id, body, received_at FROM events
     WHERE tenant = :tenant AND event_id > :after ORDER BY event_id LIMIT :limit
    """
)
_KNOWN: Final = text(
    """
    SELECT k.i, e.event_id, e.body, e.received_at
      FROM unnest(CAST(:tenant AS text[]), CAST(:event_id AS text[])) WITH ORDINALITY AS k(tenant, event_id, i)
      JOIN events e ON e.tenant = k.tenant AND e.event_id = k.event_id
    """
)
_LABELS: Final = text(
    """
    SELECT label_id, event_id, label, source, effective_at, received_at, body FROM labels
     WHERE tenant = :tenant AND label_id > :after ORDER BY label_id LIMIT :limit
    """
)
_IMPORTED: Final = text(
    """
    SELECT source, part, packed FROM imported_history
     WHERE tenant = :tenant AND (source, part) > (:source, :part) AND (CAST(:only AS text) IS NULL OR source = :only)
     ORDER BY source, part LIMIT :limit
    """
)
_COUNT: Final = text("SELECT count(*) FROM (SELECT 1 FROM events WHERE tenant = :tenant LIMIT :most) AS counted")
_KEEP: Final = text(
    """
    INSERT INTO imported_history (tenant, source, part, packed)
    SELECT * FROM unnest(CAST(:tenant AS text[]), CAST(:source AS text[]), CAST(:part AS integer[]),
                         CAST(:packed AS bytea[]))
    ON CONFLICT DO NOTHING
    """
)


class PostgresPast:
    """The port Past over the tables `events`, `labels` and `imported_history`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def events(self, scope: TenantScope, after: str | None, limit: int) -> Sequence[PastEvent]:
        """A page of a tenant's events; an empty one is the end."""
        async with transaction(self._engine, [scope]) as connection:
            values = {"tenant": scope.tenant_id, "after": after or "", "limit": limit}
            rows = (await connection.execute(_EVENTS, values)).all()
        return list(_readable((scope, row) for row in rows))

    async def count(self, scope: TenantScope, most: int) -> int:
        """How many events a tenant has; counted no further than `most`."""
        async with transaction(self._engine, [scope]) as connection:
            values = {"tenant": scope.tenant_id, "most": most}
            return int((await connection.execute(_COUNT, values)).scalar_one())

    async def known(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[PastEvent | None]:
        """These events, by position."""
        if not keys:
            return ()
        arrays = {"tenant": [scope.tenant_id for scope, _ in keys], "event_id": [event_id for _, event_id in keys]}
        async with transaction(self._engine, [scope for scope, _ in keys]) as connection:
            rows = (await connection.execute(_KNOWN, arrays)).all()
        places = [(keys[row.i - 1][0], row) for row in rows]
        found = {(past.scope, past.event_id): past for past in _readable(places)}
        return [found.get(key) for key in keys]

    async def labels(self, scope: TenantScope, after: str | None, limit: int) -> Sequence[Label]:
        """A page of a tenant's labels; an empty one is the end."""
        async with transaction(self._engine, [scope]) as connection:
            values = {"tenant": scope.tenant_id, "after": after or "", "limit": limit}
            rows = (await connection.execute(_LABELS, values)).all()
        return [
            Label(
                scope,
                row.label_id,
                row.event_id,
                row.label,
                row.source,
                row.effective_at.isoformat(),
                row.received_at.isoformat(),
                row.body,
            )
            for row in rows
        ]

    async def imported(
        self, scope: TenantScope, after: tuple[str, int] | None, limit: int, source: str | None = None
    ) -> Sequence[ImportedPart]:
        """A page of what was loaded from files; an empty one is the end."""
        behind, part = after or ("", -1)
        values = {"tenant": scope.tenant_id, "source": behind, "part": part, "limit": limit, "only": source}
        async with transaction(self._engine, [scope]) as connection:
            rows = (await connection.execute(_IMPORTED, values)).all()
        return [ImportedPart(scope, row.source, row.part, row.packed) for row in rows]

    async def keep(self, parts: Sequence[ImportedPart]) -> None:
        """Insert each part unless it is there."""
        if parts:
            rows = sorted((p.scope.tenant_id, p.source, p.part, p.packed) for p in parts)
            async with transaction(self._engine, [part.scope for part in parts]) as connection:
                await connection.execute(_KEEP, columns(rows, ("tenant", "source", "part", "packed")))


def _readable(rows: Iterable[tuple[TenantScope, Row[Any]]]) -> Iterable[PastEvent]:
    for scope, row in rows:
        try:
            event = parse_event(orjson.loads(row.body))
        except (RiskfleetError, ValueError) as error:
            log.error("past.unreadable", event_id=row.event_id, exception_class=type(error).__name__)
            continue
        yield PastEvent(scope, row.event_id, event, row.received_at)
