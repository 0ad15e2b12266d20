"""Labels, the outbox and the rows of dead letters in memory: written once, whatever is repeated.

The rules are those of `governance.postgres.labels` and `.outbox`; who writes letters is in `.letters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import repeat
from typing import Final

import orjson

from contracts.events import canonical_json
from contracts.labels import Label
from contracts.ports import Message, OutboxRow
from contracts.tenancy import TenantScope
from contracts.topology import STAGES
from governance.audit import SYSTEM_CHAIN, chain_of
from governance.columns import label_row
from governance.memory.database import MemoryDatabase, Table, Transaction
from governance.memory.directory import TENANTS


@dataclass(frozen=True, slots=True)
class StoredLetter:
    """A row of `dead_letters`."""

    letter_id: str
    tenant: str
    event_id: str
    stage: str
    category: str
    problem: str
    exception_class: str
    fingerprint: str
    attempts: int
    first_failed_at: datetime
    last_failed_at: datetime
    parked_at: datetime
    body: bytes
    status: str = "open"
    replays: int = 0
    failed: bool = False


@dataclass(frozen=True, slots=True)
class StoredLabel:
    """A row of `labels`."""

    tenant: str
    label_id: str
    event_id: str
    label: str
    source: str
    effective_at: datetime
    received_at: datetime
    body: bytes


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A row of `outbox`."""

    tenant: str
    position: int
    message: Message
    due_at: datetime | None = None


DEAD_LETTERS: Final[Table[StoredLetter]] = Table(
    "dead_letters",
    key=lambda row: (row.letter_id,),
    tenant=lambda row: row.tenant,
    indexes={"event": lambda row: (row.tenant, row.event_id)},
)
LABELS: Final[Table[StoredLabel]] = Table(
    "labels", key=lambda row: (row.tenant, row.label_id), tenant=lambda row: row.tenant
)
OUTBOX: Final[Table[StoredMessage]] = Table(
    "outbox", key=lambda row: (row.tenant, row.message.message_id), tenant=lambda row: row.tenant
)


def close_letters(tx: Transaction, keys: Iterable[tuple[str, str]]) -> None:
    """Close the open letters that stages parked, of settled events, named by (tenant, event)."""
    for key in keys:
        for letter in tx.find(DEAD_LETTERS, "event", *key):
            if letter.status == "open" and letter.stage in STAGES:
                tx.put(DEAD_LETTERS, replace(letter, status="closed"))


class MemoryLabelBook:
    """The port LabelBook on a database in memory."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    async def record(self, labels: Sequence[Label]) -> Sequence[bool]:
        """Insert each label once, in one transaction; by position, False = it was already there (or twice here).

        Raises DomainValidationError, before anything is written, when a time of one of them cannot be read.
        """
        if not labels:
            return ()
        rows = [StoredLabel(*label_row(label)) for label in labels]
        return await self._database.run(
            [label.scope for label in labels], lambda tx: tuple(tx.insert(LABELS, row) for row in rows)
        )


class MemoryOutbox:
    """The port Outbox on a database in memory."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    async def waiting(self, limit: int) -> Sequence[OutboxRow]:
        """The oldest rows of all tenants and of the system chain that are due, in order of writing."""
        tenants = [TenantScope(row.tenant_id) for row in self._database.contents(TENANTS)]

        def work(tx: Transaction) -> tuple[OutboxRow, ...]:
            now = self._database.clock.now()
            due = [row for row in tx.rows(OUTBOX) if row.due_at is None or row.due_at <= now]
            rows = sorted(due, key=lambda row: row.position)[:limit]
            return tuple(OutboxRow(row.position, _scope(row.tenant), row.message) for row in rows)

        return await self._database.run([*tenants, None], work)

    async def published(self, rows: Sequence[OutboxRow]) -> None:
        """Remove rows whose messages were confirmed; a row that another relay removed is no error."""
        if not rows:
            return
        positions = {row.position for row in rows}

        def work(tx: Transaction) -> None:
            for row in tx.rows(OUTBOX):
                if row.position in positions:
                    tx.delete(OUTBOX, row.tenant, row.message.message_id)

        await self._database.run([row.scope for row in rows], work)


def enqueue(
    tx: Transaction, scope: TenantScope | None, messages: Sequence[Message], *, due: Sequence[datetime] = ()
) -> None:
    """Write messages inside the caller's transaction, which must see this scope; one that waits already is kept.

    `due`: when each may go out; without it at once.
    """
    for message, at in zip(messages, due or repeat(None, len(messages)), strict=True):
        # The columns of the table, through JSON as there: what is read back is what was written there, too.
        stored = Message(
            exchange=message.exchange,
            routing_key=message.routing_key,
            body=message.body,
            message_id=message.message_id,
            headers=orjson.loads(canonical_json(dict(message.headers))),
            mandatory=message.mandatory,
            content_type=message.content_type,
            correlation_id=message.correlation_id,
        )
        tx.insert(OUTBOX, StoredMessage(chain_of(scope), tx.next_number("outbox"), stored, at))


def _scope(tenant: str) -> TenantScope | None:
    return None if tenant == SYSTEM_CHAIN else TenantScope(tenant)
