"""What the tables say is missing: events without a decision, and decisions without their whole trail.

Promises: reads PostgreSQL only, and answers with states that can be sent again as they are. An event with an open or a
discarded dead letter is not missing: it is known where it stays. Does not judge how long something may be missing: that
is the reconciler's affair. Each window is read by an index that begins with the tenant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import orjson
import structlog
from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.codec import state_from_bytes
from contracts.events import Event
from contracts.failures import UndecodableEntryError
from contracts.ports import EventKey
from contracts.state import EventState, begin
from contracts.tenancy import TenantScope
from governance.postgres.directory import tenant_ids
from governance.postgres.engine import columns, transaction

log = structlog.get_logger("missing")

SOURCE: Final = "reconciler"
"""The source of an event whose first record is not in the audit, so that nobody knows its door any more."""

_UNDECIDED: Final = """
    SELECT e.tenant, e.event_id, e.body_digest, e.received_at, e.correlation_id, e.body,
           (SELECT a.body FROM audit_records a
             WHERE a.tenant = e.tenant AND a.event_id = e.event_id AND a.n = 0 ORDER BY a.seq LIMIT 1) AS record
      FROM {place}
     WHERE {window}
       AND NOT EXISTS (SELECT FROM decisions d WHERE d.tenant = e.tenant AND d.event_id = e.event_id)
       AND NOT EXISTS (SELECT FROM dead_letters l
                        WHERE l.tenant = e.tenant AND l.event_id = e.event_id AND l.status IN ('open', 'discarded'))
     ORDER BY e.received_at LIMIT :limit
"""
# json and not jsonb: the state may hold what no jsonb takes, and only its trail is looked at.
_INCOMPLETE: Final = """
    SELECT d.tenant, d.event_id, d.state
      FROM {place}
     WHERE {window} AND d.revision = 1
       AND EXISTS (SELECT FROM json_array_elements(CAST(convert_from(d.state, 'UTF8') AS json) -> 'trail') AS t(entry)
                    WHERE NOT EXISTS (SELECT FROM audit_records a
                                       WHERE a.tenant = d.tenant AND a.event_id = d.event_id
                                         AND a.digest = t.entry ->> 'digest'))
     ORDER BY d.decided_at LIMIT :limit
"""
_KEYS: Final = "unnest(CAST(:tenant AS text[]), CAST(:event_id AS text[])) AS k(tenant, event_id)"
_BETWEEN: Final = "{0}.tenant = ANY(CAST(:tenants AS text[])) AND {0}.{1} >= :since AND {0}.{1} < :before"

_UNDECIDED_SINCE: Final = text(_UNDECIDED.format(place="events e", window=_BETWEEN.format("e", "received_at")))
_UNDECIDED_OF: Final = text(
    _UNDECIDED.format(place=f"{_KEYS} JOIN events e ON e.tenant = k.tenant AND e.event_id = k.event_id", window="true")
)
_INCOMPLETE_SINCE: Final = text(_INCOMPLETE.format(place="decisions d", window=_BETWEEN.format("d", "decided_at")))
_INCOMPLETE_OF: Final = text(
    _INCOMPLETE.format(
        place=f"{_KEYS} JOIN decisions d ON d.tenant = k.tenant AND d.event_id = k.event_id", window="true"
    )
)
_PROBES: Final = text("SELECT partition, sent_at FROM probes")


class PostgresMissing:
    """The port Missing over `events`, `decisions`, `audit_records` and `probes`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def undecided(self, since: datetime, before: datetime, limit: int) -> Sequence[EventState]:
        """Version 0 of events received in [since, before) that have neither a decision nor a dead letter."""
        rows = await self._between(_UNDECIDED_SINCE, since, before, limit)
        return _readable(rows, _received)

    async def still_undecided(self, keys: Sequence[EventKey]) -> Sequence[EventState]:
        """Those of these events that have neither yet."""
        return _readable(await self._of(_UNDECIDED_OF, keys), _received)

    async def incomplete(self, since: datetime, before: datetime, limit: int) -> Sequence[EventState]:
        """The decided states of [since, before) of whose trail the chain lacks a record."""
        rows = await self._between(_INCOMPLETE_SINCE, since, before, limit)
        return _readable(rows, _decided)

    async def still_incomplete(self, keys: Sequence[EventKey]) -> Sequence[EventState]:
        """Those of these events of whose trail the chain still lacks a record."""
        return _readable(await self._of(_INCOMPLETE_OF, keys), _decided)

    async def probes(self) -> Mapping[int, datetime]:
        """By partition, when the latest probe was sent that has come through."""
        async with transaction(self._engine, ()) as connection:
            return {row.partition: row.sent_at for row in await connection.execute(_PROBES)}

    async def _between(self, query: Any, since: datetime, before: datetime, limit: int) -> Sequence[Row[Any]]:
        scopes = await tenant_ids(self._engine)
        tenants = [scope.tenant_id for scope in scopes]
        async with transaction(self._engine, scopes) as connection:
            values = {"tenants": tenants, "since": since, "before": before, "limit": limit}
            return (await connection.execute(query, values)).all()

    async def _of(self, query: Any, keys: Sequence[EventKey]) -> Sequence[Row[Any]]:
        if not keys:
            return ()
        named = columns([(scope.tenant_id, event_id) for scope, event_id in keys], ("tenant", "event_id"))
        async with transaction(self._engine, [scope for scope, _ in keys]) as connection:
            return (await connection.execute(query, {**named, "limit": len(keys)})).all()


def _readable(rows: Sequence[Row[Any]], read: Any) -> list[EventState]:
    """States of rows; one that cannot be read is logged, and holds up no other."""
    states = []
    for row in rows:
        try:
            states.append(read(row))
        except (UndecodableEntryError, ValueError) as error:
            log.error(
                "missing.unreadable",
                tenant=row.tenant,
                event_id=row.event_id,
                exception_class=type(error).__name__,
            )
    return states


def _received(row: Row[Any]) -> EventState:
    """Version 0 as its door made it: every field of its digest stands in the row, and the door in its first record."""
    event = Event.model_validate_json(bytes(row.body))
    state = begin(
        TenantScope(row.tenant),
        row.event_id,
        event,
        received_at=row.received_at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        source=_door(row.record),
        correlation_id=row.correlation_id,
    )
    if state.body_digest != row.body_digest:
        raise UndecodableEntryError("the stored body of an event is not the one that its digest names")
    return state


def _door(record: bytes | None) -> str:
    if record is None:
        return SOURCE
    try:
        source = orjson.loads(bytes(record))["entry"]["detail"]["source"]
    except (KeyError, TypeError, ValueError):
        return SOURCE
    return source if isinstance(source, str) else SOURCE


def _decided(row: Row[Any]) -> EventState:
    return state_from_bytes(bytes(row.state))
