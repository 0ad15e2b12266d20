"""The outbox: messages that a command writes in its own transaction, published afterwards by the relay.

Promises: a message is there if and only if its command committed; it stays until its publish was confirmed, so it may
be sent twice and is never lost. Order is that of writing. Publishes nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import repeat
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.events import canonical_json
from contracts.identity import EVERYWHERE
from contracts.messages import audit_message
from contracts.ports import Message, OutboxRow
from contracts.state import AuditRecord
from contracts.tenancy import TenantScope
from contracts.topology import RunningLayouts
from governance.audit import SYSTEM_CHAIN, chain_of
from governance.postgres.directory import tenant_ids
from governance.postgres.engine import columns, transaction

_COLUMNS: Final = (
    *("tenant", "message_id", "exchange", "routing_key", "headers", "body"),
    *("content_type", "correlation_id", "mandatory", "due_at"),
)
_INSERT: Final = text(
    """
    INSERT INTO outbox (tenant, message_id, exchange, routing_key, headers, body, content_type, correlation_id,
                        mandatory, due_at)
    SELECT k.tenant, k.message_id, k.exchange, k.routing_key, CAST(k.headers AS jsonb), k.body, k.content_type,
           k.correlation_id, k.mandatory, k.due_at
      FROM unnest(CAST(:tenant AS text[]), CAST(:message_id AS text[]), CAST(:exchange AS text[]),
                  CAST(:routing_key AS text[]), CAST(:headers AS text[]), CAST(:body AS bytea[]),
                  CAST(:content_type AS text[]), CAST(:correlation_id AS text[]), CAST(:mandatory AS boolean[]),
                  CAST(:due_at AS timestamptz[]))
           WITH ORDINALITY AS k(tenant, message_id, exchange, routing_key, headers, body, content_type,
                                correlation_id, mandatory, due_at, i)
     ORDER BY k.i
    ON CONFLICT DO NOTHING
    """
)
_WAITING: Final = text(
    """
    SELECT position, tenant, message_id, exchange, routing_key, headers, body, content_type, correlation_id, mandatory
      FROM outbox WHERE due_at IS NULL OR due_at <= now() ORDER BY position LIMIT :limit
    """
)
_DELETE: Final = text("DELETE FROM outbox WHERE position = ANY(CAST(:position AS bigint[]))")


async def enqueue(
    connection: AsyncConnection,
    scope: TenantScope | None,
    messages: Sequence[Message],
    *,
    due: Sequence[datetime] = (),
) -> None:
    """Write messages inside the caller's transaction, which must see this scope (None: the system chain).

    `due`: when each may go out, by the server's clock; without it at once.
    """
    if not messages:
        return
    chain = chain_of(scope)
    rows = [
        (
            *(chain, m.message_id, m.exchange, m.routing_key, canonical_json(dict(m.headers)).decode(), m.body),
            *(m.content_type, m.correlation_id, m.mandatory, at),
        )
        for m, at in zip(messages, due or repeat(None, len(messages)), strict=True)
    ]
    await connection.execute(_INSERT, columns(rows, _COLUMNS))


async def enqueue_records(
    connection: AsyncConnection, scope: TenantScope | None, records: Sequence[AuditRecord], layouts: RunningLayouts
) -> None:
    """Write the audit records of a command (all of one scope) inside its transaction."""
    await enqueue(connection, scope, audit_message(records, layouts))


class PostgresOutbox:
    """The port Outbox over the table `outbox`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def waiting(self, limit: int) -> Sequence[OutboxRow]:
        """The oldest rows of all tenants and of the system chain that are due, in order of writing."""
        async with transaction(self._engine, await self._everybody()) as connection:
            rows = (await connection.execute(_WAITING, {"limit": limit})).all()
        return tuple(
            OutboxRow(
                row.position,
                None if row.tenant in (SYSTEM_CHAIN, EVERYWHERE) else TenantScope(row.tenant),
                Message(
                    exchange=row.exchange,
                    routing_key=row.routing_key,
                    body=bytes(row.body),
                    message_id=row.message_id,
                    headers=row.headers,
                    mandatory=row.mandatory,
                    content_type=row.content_type,
                    correlation_id=row.correlation_id,
                ),
            )
            for row in rows
        )

    async def published(self, rows: Sequence[OutboxRow]) -> None:
        """Remove rows whose messages were confirmed; a row that another relay removed is no error."""
        if rows:
            async with transaction(self._engine, [row.scope for row in rows]) as connection:
                await connection.execute(_DELETE, {"position": [row.position for row in rows]})

    async def _everybody(self) -> Sequence[TenantScope | None]:
        return [*await tenant_ids(self._engine), None]
