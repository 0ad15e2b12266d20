"""What was accepted, in memory: the rules are those of `governance.postgres.past`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import orjson

from contracts.events import parse_event
from contracts.labels import Label
from contracts.tenancy import TenantScope
from contracts.velocity import ImportedPart, PastEvent
from governance.memory.database import MemoryDatabase, Table, Transaction
from governance.memory.ledger import EVENTS, StoredEvent
from governance.memory.records import LABELS

IMPORTED: Final[Table[ImportedPart]] = Table(
    "imported_history",
    key=lambda row: (row.scope.tenant_id, row.source, row.part),
    tenant=lambda row: row.scope.tenant_id,
)


class MemoryPast:
    """The port Past on a database in memory."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    async def events(self, scope: TenantScope, after: str | None, limit: int) -> Sequence[PastEvent]:
        """A page of a tenant's events; an empty one is the end."""
        rows = await self._database.run([scope], lambda tx: tx.rows(EVENTS))
        behind = sorted((row for row in rows if row.event_id > (after or "")), key=lambda row: row.event_id)
        return [_past(scope, row) for row in behind[:limit]]

    async def count(self, scope: TenantScope, most: int) -> int:
        """How many events a tenant has; counted no further than `most`."""
        return min(len(await self._database.run([scope], lambda tx: tx.rows(EVENTS))), most)

    async def known(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[PastEvent | None]:
        """These events, by position."""
        if not keys:
            return ()
        rows = await self._database.run(
            [scope for scope, _ in keys],
            lambda tx: [tx.get(EVENTS, scope.tenant_id, event_id) for scope, event_id in keys],
        )
        return [None if row is None else _past(scope, row) for (scope, _), row in zip(keys, rows, strict=True)]

    async def labels(self, scope: TenantScope, after: str | None, limit: int) -> Sequence[Label]:
        """A page of a tenant's labels; an empty one is the end."""
        rows = await self._database.run([scope], lambda tx: tx.rows(LABELS))
        behind = sorted((row for row in rows if row.label_id > (after or "")), key=lambda row: row.label_id)
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
            for row in behind[:limit]
        ]

    async def imported(
        self, scope: TenantScope, after: tuple[str, int] | None, limit: int, source: str | None = None
    ) -> Sequence[ImportedPart]:
        """A page of what was loaded from files; an empty one is the end."""
        rows = await self._database.run([scope], lambda tx: tx.rows(IMPORTED))
        wanted = [row for row in rows if (row.source, row.part) > (after or ("", -1)) and source in (None, row.source)]
        return sorted(wanted, key=lambda row: (row.source, row.part))[:limit]

    async def keep(self, parts: Sequence[ImportedPart]) -> None:
        """Insert each part unless it is there."""

        def work(tx: Transaction) -> None:
            for part in parts:
                tx.insert(IMPORTED, part)

        await self._database.run([part.scope for part in parts], work)


def _past(scope: TenantScope, row: StoredEvent) -> PastEvent:
    return PastEvent(scope, row.event_id, parse_event(orjson.loads(row.body)), row.received_at)
