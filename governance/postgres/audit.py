"""The audit log: one hash chain per tenant, appended to under its head's lock, and checked as a whole.

Promises: a record is in its chain once, whatever is repeated; sequence numbers have no gaps, because only a stored
record takes one. The order is that of arrival. `verify` reads page by page: its memory does not grow with the chain.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.codec import state_from_bytes
from contracts.failures import DatabaseError, UndecodableEntryError
from contracts.ports import Clock
from contracts.state import AuditRecord, EventState
from contracts.tenancy import TenantScope
from governance.audit import (
    AuditReport,
    ChainHead,
    ChainReport,
    ChainRow,
    chain_of,
    check_head,
    genesis,
    link,
    start_of,
    trail_gaps,
    verify_chain,
)
from governance.columns import clean, moment
from governance.postgres.engine import columns, transaction

# "C" is the order in which Python sorts; another collation here would let two sinks lock each other out.
_LOCK_HEADS: Final = text(
    """
    SELECT tenant, seq, hash FROM audit_heads WHERE tenant = ANY(CAST(:tenant AS text[]))
     ORDER BY tenant COLLATE "C" FOR UPDATE
    """
)
_MAKE_HEADS: Final = text(
    """
    INSERT INTO audit_heads (tenant, seq, hash)
    SELECT k.tenant, 0, k.hash
      FROM unnest(CAST(:tenant AS text[]), CAST(:hash AS bytea[])) AS k(tenant, hash)
    ON CONFLICT DO NOTHING
    """
)
_PRESENT: Final = text(
    """
    SELECT r.tenant, r.record_id
      FROM unnest(CAST(:tenant AS text[]), CAST(:record_id AS text[])) AS k(tenant, record_id)
      JOIN audit_records r ON r.tenant = k.tenant AND r.record_id = k.record_id
    """
)
_RECORD: Final = ("tenant", "seq", "record_id", "event_id", "n", "digest", "body", "prev_hash", "hash", "recorded_at")
_INSERT: Final = text(
    """
    INSERT INTO audit_records (tenant, seq, record_id, event_id, n, digest, body, prev_hash, hash, recorded_at)
    SELECT * FROM unnest(
        CAST(:tenant AS text[]), CAST(:seq AS bigint[]), CAST(:record_id AS text[]), CAST(:event_id AS text[]),
        CAST(:n AS integer[]), CAST(:digest AS text[]), CAST(:body AS bytea[]), CAST(:prev_hash AS bytea[]),
        CAST(:hash AS bytea[]), CAST(:recorded_at AS timestamptz[]))
    """
)
_MOVE_HEADS: Final = text(
    """
    UPDATE audit_heads h SET seq = k.seq, hash = k.hash
      FROM unnest(CAST(:tenant AS text[]), CAST(:seq AS bigint[]), CAST(:hash AS bytea[])) AS k(tenant, seq, hash)
     WHERE h.tenant = k.tenant
    """
)
# One statement, so one snapshot: a record that is appended a moment later is no contradiction.
_ENDS: Final = text(
    """
    SELECT h.seq, h.hash, r.first, r.last
      FROM (SELECT min(seq) AS first, max(seq) AS last FROM audit_records WHERE tenant = :tenant) r
      LEFT JOIN audit_heads h ON h.tenant = :tenant
    """
)
_PAGE: Final = text(
    """
    SELECT seq, record_id, event_id, body, prev_hash, hash FROM audit_records
     WHERE tenant = :tenant AND seq > :after AND seq <= :upto ORDER BY seq LIMIT :batch
    """
)
_DECIDED: Final = text(
    """
    SELECT event_id, state FROM decisions
     WHERE tenant = :tenant AND event_id IN (
        SELECT event_id FROM decisions
         WHERE tenant = :tenant AND event_id > :after AND (CAST(:before AS timestamptz) IS NULL OR decided_at < :before)
         GROUP BY event_id ORDER BY event_id LIMIT :batch)
     ORDER BY event_id, revision
    """
)
_OF_EVENTS: Final = text(
    """
    SELECT record_id, body FROM audit_records
     WHERE tenant = :tenant AND event_id = ANY(CAST(:event_id AS text[]))
    """
)


_PROBED: Final = text(
    """
    INSERT INTO probes (partition, sent_at, left_at) VALUES (:partition, :sent_at, :left_at)
    ON CONFLICT (partition) DO UPDATE SET sent_at = excluded.sent_at, left_at = excluded.left_at
     WHERE probes.sent_at < excluded.sent_at
    """
)


class PostgresAuditLog:
    """The port AuditLog over the tables `audit_records` and `audit_heads`."""

    def __init__(self, engine: AsyncEngine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._headed: set[str] = set()

    async def probed(self, partition: int, sent_at: str) -> None:
        """Note that a probe sent at that time (RFC 3339) has come through a partition; the latest stays."""
        async with transaction(self._engine, ()) as connection:
            values = {"partition": partition, "sent_at": moment(sent_at), "left_at": self._clock.now()}
            await connection.execute(_PROBED, values)

    async def append(self, records: Sequence[AuditRecord]) -> Sequence[bool]:
        """Append each record once, in one transaction; by position, False = it was already there (or twice here)."""
        if not records:
            return ()
        chains = sorted({chain_of(record.scope) for record in records})
        try:
            async with transaction(self._engine, [record.scope for record in records]) as connection:
                heads = await self._lock_heads(connection, chains)
                fresh = _fresh(records, await _present(connection, records))
                if any(fresh):
                    new = [record for record, is_new in zip(records, fresh, strict=True) if is_new]
                    await _store(connection, new, heads, self._clock.now())
        except DatabaseError:
            self._headed.clear()
            raise
        self._headed.update(chains)
        return tuple(fresh)

    async def _lock_heads(self, connection: AsyncConnection, chains: list[str]) -> dict[str, ChainHead]:
        """Lock the heads in order. Missing ones are made first: made later, they would be out of order."""
        if not self._headed.issuperset(chains):
            rows = [(chain, genesis(chain)) for chain in chains]
            await connection.execute(_MAKE_HEADS, columns(rows, ("tenant", "hash")))
        found = await connection.execute(_LOCK_HEADS, {"tenant": chains})
        heads = {row.tenant: ChainHead(row.seq, bytes(row.hash)) for row in found}
        if len(heads) != len(chains):
            raise DatabaseError("a chain's head that was written cannot be read back")
        return heads

    async def verify(
        self, scope: TenantScope | None, *, batch: int = 1000, decided_before: datetime | None = None
    ) -> AuditReport:
        """Check one chain from its first record to its head, then every decision's trail against it.

        `scope` None is the system's chain. `decided_before` leaves out younger decisions, whose records may still
        be on their way. Records appended while this runs are left to the next run.
        """
        chain = chain_of(scope)
        report = await self._verify_chain(scope, chain, batch)
        decisions = missing = orphans = 0
        problem = report.problem
        if scope is not None:
            async for states, found, unreadable in self._decided(scope, batch, decided_before):
                gaps = trail_gaps(states, found)
                decisions += len(states) + len(unreadable)
                missing += len(gaps.missing)
                orphans += len(gaps.orphans)
                if problem is None and unreadable:
                    problem = f"the state of decision {unreadable[0]} cannot be read"
                if problem is None and gaps.missing:
                    problem = f"record {gaps.missing[0]} of a decision's trail is missing"
        return AuditReport(chain, report.records, decisions, missing, orphans, problem is None, problem)

    async def _verify_chain(self, scope: TenantScope | None, chain: str, batch: int) -> ChainReport:
        async with transaction(self._engine, [scope]) as connection:
            ends = (await connection.execute(_ENDS, {"tenant": chain})).one()
        report = start_of(chain)
        head = report.head if ends.seq is None else ChainHead(ends.seq, bytes(ends.hash))
        if ends.first is not None and (ends.first < 1 or ends.last > head.seq):
            return ChainReport(0, report.head, f"there are records outside 1 to {head.seq}, which the head says")
        while report.problem is None:
            page = {"tenant": chain, "after": report.head.seq, "upto": head.seq, "batch": batch}
            async with transaction(self._engine, [scope]) as connection:
                rows = (await connection.execute(_PAGE, page)).all()
            if not rows:
                break
            report = verify_chain(
                (
                    ChainRow(r.seq, r.record_id, r.event_id, bytes(r.body), bytes(r.prev_hash), bytes(r.hash))
                    for r in rows
                ),
                report,
            )
        return check_head(report, head)

    async def _decided(
        self, scope: TenantScope, batch: int, before: datetime | None
    ) -> AsyncIterator[tuple[list[EventState], dict[str, bytes], list[str]]]:
        """Pages of decided states with every chain record of their events, and the events that cannot be read."""
        after, size = "", min(batch, 200)  # a stored state is some ten kilobytes
        while True:
            page = {"tenant": scope.tenant_id, "after": after, "before": before, "batch": size}
            async with transaction(self._engine, [scope]) as connection:
                rows = (await connection.execute(_DECIDED, page)).all()
                event_ids = sorted({row.event_id for row in rows})
                keys = {"tenant": scope.tenant_id, "event_id": event_ids}
                found = {r.record_id: bytes(r.body) for r in await connection.execute(_OF_EVENTS, keys)}
            if not rows:
                return
            states, unreadable = [], []
            for row in rows:
                try:
                    states.append(state_from_bytes(bytes(row.state)))
                except UndecodableEntryError:
                    unreadable.append(row.event_id)
            yield states, found, unreadable
            after = rows[-1].event_id


def _key(record: AuditRecord) -> tuple[str, str]:
    return (chain_of(record.scope), clean(record.record_id))


async def _present(connection: AsyncConnection, records: Sequence[AuditRecord]) -> set[tuple[str, str]]:
    keys = columns([_key(record) for record in records], ("tenant", "record_id"))
    return {(row.tenant, row.record_id) for row in await connection.execute(_PRESENT, keys)}


def _fresh(records: Sequence[AuditRecord], present: set[tuple[str, str]]) -> list[bool]:
    seen, fresh = set(present), []
    for record in records:
        fresh.append(_key(record) not in seen)
        seen.add(_key(record))
    return fresh


async def _store(
    connection: AsyncConnection, records: Sequence[AuditRecord], heads: dict[str, ChainHead], now: datetime
) -> None:
    rows: list[tuple[Any, ...]] = []
    moved: dict[str, ChainHead] = {}
    for record in records:
        chain, record_id = _key(record)
        head = moved.get(chain, heads[chain])
        seq = head.seq + 1
        digest = link(head.hash, seq, record.body)
        moved[chain] = ChainHead(seq, digest)
        about = (record_id, clean(record.event_id), record.n, clean(record.digest), record.body)
        rows.append((chain, seq, *about, head.hash, digest, now))
    rows.sort(key=lambda row: (row[0], row[1]))
    await connection.execute(_INSERT, columns(rows, _RECORD))
    ends = [(chain, head.seq, head.hash) for chain, head in sorted(moved.items())]
    await connection.execute(_MOVE_HEADS, columns(ends, ("tenant", "seq", "hash")))
