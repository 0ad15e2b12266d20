"""The audit log in memory: one hash chain per tenant, linked and checked by the functions of `governance.audit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from contracts.codec import state_from_bytes
from contracts.failures import UndecodableEntryError
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
from governance.memory.database import MemoryDatabase, Table, Transaction
from governance.memory.ledger import DECISIONS, StoredDecision


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A row of `audit_records`."""

    tenant: str
    n: int
    digest: str
    recorded_at: datetime
    link: ChainRow


@dataclass(frozen=True, slots=True)
class StoredHead:
    """A row of `audit_heads`."""

    tenant: str
    head: ChainHead


RECORDS: Final[Table[StoredRecord]] = Table(
    "audit_records",
    key=lambda row: (row.tenant, row.link.seq),
    tenant=lambda row: row.tenant,
    unique={"record": lambda row: (row.tenant, row.link.record_id)},
    indexes={
        "chain": lambda row: (row.tenant,),
        "record": lambda row: (row.tenant, row.link.record_id),
        "event": lambda row: (row.tenant, row.link.event_id),
    },
)
HEADS: Final[Table[StoredHead]] = Table("audit_heads", key=lambda row: (row.tenant,), tenant=lambda row: row.tenant)


class MemoryAuditLog:
    """The port AuditLog on a database in memory."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database
        self.probes: dict[int, datetime] = {}

    async def probed(self, partition: int, sent_at: str) -> None:
        """Note that a probe sent at that time (RFC 3339) has come through a partition; the latest stays."""
        at = moment(sent_at)
        self.probes[partition] = max(self.probes.get(partition, at), at)

    async def append(self, records: Sequence[AuditRecord]) -> Sequence[bool]:
        """Append each record once, in one transaction; by position, False = it was already there (or twice here)."""
        if not records:
            return ()
        now = self._database.clock.now()
        return await self._database.run(
            [record.scope for record in records], lambda tx: tuple(_append(tx, record, now) for record in records)
        )

    async def verify(self, scope: TenantScope | None, *, decided_before: datetime | None = None) -> AuditReport:
        """Check one chain from its first record to its head, then every decision's trail against it.

        `scope` None is the system's chain. `decided_before` leaves out events without a decision before that time.
        """
        return await self._database.run([scope], lambda tx: _verify(tx, scope, decided_before))


def _append(tx: Transaction, record: AuditRecord, now: datetime) -> bool:
    chain, record_id = chain_of(record.scope), clean(record.record_id)
    if tx.find(RECORDS, "record", chain, record_id):
        return False
    stored = tx.get(HEADS, chain)
    head = stored.head if stored else ChainHead(0, genesis(chain))
    seq = head.seq + 1
    digest = link(head.hash, seq, record.body)
    row = ChainRow(seq, record_id, clean(record.event_id), record.body, head.hash, digest)
    tx.insert(RECORDS, StoredRecord(chain, record.n, clean(record.digest), now, row))
    tx.put(HEADS, StoredHead(chain, ChainHead(seq, digest)))
    return True


def _verify(tx: Transaction, scope: TenantScope | None, before: datetime | None) -> AuditReport:
    chain = chain_of(scope)
    report = _verify_chain(tx, chain)
    decisions = missing = orphans = 0
    problem = report.problem
    for event_id, rows in _decided(tx, chain, before).items():
        states, unreadable = _states(rows)
        found = {row.link.record_id: row.link.body for row in tx.find(RECORDS, "event", chain, event_id)}
        gaps = trail_gaps(states, found)
        decisions += len(rows)
        missing += len(gaps.missing)
        orphans += len(gaps.orphans)
        if problem is None and unreadable:
            problem = f"the state of decision {event_id} cannot be read"
        if problem is None and gaps.missing:
            problem = f"record {gaps.missing[0]} of a decision's trail is missing"
    return AuditReport(chain, report.records, decisions, missing, orphans, problem is None, problem)


def _verify_chain(tx: Transaction, chain: str) -> ChainReport:
    rows = sorted((row.link for row in tx.find(RECORDS, "chain", chain)), key=lambda row: row.seq)
    report = start_of(chain)
    stored = tx.get(HEADS, chain)
    head = stored.head if stored else report.head
    if rows and (rows[0].seq < 1 or rows[-1].seq > head.seq):
        return ChainReport(0, report.head, f"there are records outside 1 to {head.seq}, which the head says")
    return check_head(verify_chain(rows, report), head)


def _decided(tx: Transaction, chain: str, before: datetime | None) -> dict[str, list[StoredDecision]]:
    """Every revision of the events that have a decision from before that time, in order of event and revision."""
    by_event: dict[str, list[StoredDecision]] = {}
    for row in sorted(tx.find(DECISIONS, "tenant", chain), key=lambda row: (row.event_id, row.revision)):
        by_event.setdefault(row.event_id, []).append(row)
    return {
        event_id: rows
        for event_id, rows in by_event.items()
        if before is None or any(row.decided_at < before for row in rows)
    }


def _states(rows: Sequence[StoredDecision]) -> tuple[list[EventState], bool]:
    states, unreadable = [], False
    for row in rows:
        try:
            states.append(state_from_bytes(row.state))
        except UndecodableEntryError:
            unreadable = True
    return states, unreadable
