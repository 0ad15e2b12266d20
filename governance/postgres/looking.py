"""What operators look at: where an event is and what became of it, and an event's audit records.

Read only. Promises: a tenant's reader sees rows of that tenant; payloads and personal fields are in none of it. A
state store that does not answer costs the answer who holds the event, never the rest.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.failures import InfrastructureError, NotKnownError
from contracts.lifecycle import FINAL_VERSION
from contracts.ports import Peek, StateStore
from contracts.tenancy import TenantScope
from contracts.topology import STAGES
from governance.approvals import Revision
from governance.deadletters import LetterSummary
from governance.postgres.engine import transaction
from governance.postgres.reports import ApprovalSummary, EventSummary, event_summary
from governance.trials import Seen, TrialReport, summed

MAX_RECORDS: Final = 500

_RECORDS: Final = text(
    """
    SELECT seq, record_id, n, digest, body, hash, recorded_at FROM audit_records
     WHERE tenant = :tenant AND event_id = :event_id AND seq > :after ORDER BY seq LIMIT :limit
    """
)
_SHADOWS: Final = text(
    """
    SELECT state FROM decisions WHERE tenant = :tenant AND revision = 1 AND decided_at >= :since
     ORDER BY decided_at DESC LIMIT :limit
    """
)
_MOST_DECISIONS: Final = 50_000
_DOCUMENT = ConfigDict(frozen=True, extra="forbid")


class Place(BaseModel):
    """Where an event is. `version` and `holder` are the state store's; `holder` is the boot id of a process."""

    model_config = _DOCUMENT
    where: Literal["stage", "parked", "decided", "failed", "unknown"]
    stage: str | None
    version: int | None
    holder: str | None
    about: str


class EventView(BaseModel):
    """One event: where it is, and everything that PostgreSQL holds of it but its body.

    `attempts` are those that its dead letters counted; attempts under way travel with the message.
    """

    model_config = _DOCUMENT
    event_id: str
    kind: str | None
    type: str | None
    body_digest: str | None
    correlation_id: str | None
    received_at: datetime | None
    place: Place
    attempts: int
    audit_records: int
    decisions: tuple[Revision, ...]
    approvals: tuple[ApprovalSummary, ...]
    dead_letters: tuple[LetterSummary, ...]


class ChainRecord(BaseModel):
    """One record of the tenant's chain; `body` is null when it is not JSON."""

    model_config = _DOCUMENT
    seq: int
    record_id: str
    n: int
    digest: str
    hash: str
    recorded_at: datetime
    body: dict[str, Any] | None


class ChainPage(BaseModel):
    """An event's records in the order of the chain; `next` is the sequence number to go on after."""

    model_config = _DOCUMENT
    event_id: str
    records: tuple[ChainRecord, ...]
    next: int | None


class Looking:
    """Reads for the operator API; without a state store nobody is said to hold an event."""

    def __init__(self, engine: AsyncEngine, state_store: StateStore | None = None) -> None:
        self._engine = engine
        self._state_store = state_store

    async def event(self, scope: TenantScope, event_id: str) -> EventView:
        """Everything about one event. Raises NotKnownError when neither store has heard of it."""
        summary = await event_summary(self._engine, scope, event_id)
        peek, answered = await self._peek(scope, event_id)
        if summary is None and peek is None and answered:
            raise NotKnownError
        found = summary or EventSummary(event_id, None, None, None, None, None, 0, None, ())
        return EventView(
            event_id=event_id,
            kind=found.kind,
            type=found.type,
            body_digest=found.body_digest or (peek.body_digest if peek else None),
            correlation_id=found.correlation_id,
            received_at=found.received_at,
            place=_place(found, peek, answered=answered),
            attempts=max((letter.attempts for letter in found.dead_letters), default=0),
            audit_records=found.audit_records,
            decisions=found.revisions,
            approvals=found.approvals,
            dead_letters=found.dead_letters,
        )

    async def trials(self, scope: TenantScope, since: datetime) -> TrialReport:
        """How the models that are tried did in the tenant's newest decisions since a moment."""
        values = {"tenant": scope.tenant_id, "since": since, "limit": _MOST_DECISIONS}
        seen, looked_at = [], 0
        async with transaction(self._engine, [scope]) as connection:
            async for row in await connection.stream(_SHADOWS, values):
                looked_at += 1
                if b'"shadow"' in bytes(row.state) and (one := _seen(orjson.loads(bytes(row.state)))) is not None:
                    seen.append(one)
        return TrialReport(since=since, looked_at=looked_at, tried=summed(seen))

    async def records(
        self, scope: TenantScope, event_id: str, *, after: int = 0, limit: int = MAX_RECORDS
    ) -> ChainPage:
        """The chain's records of one event after a sequence number; an event without any has an empty page."""
        size = max(1, min(limit, MAX_RECORDS))
        values = {"tenant": scope.tenant_id, "event_id": event_id, "after": after, "limit": size + 1}
        async with transaction(self._engine, [scope]) as connection:
            rows = (await connection.execute(_RECORDS, values)).all()
        records = tuple(
            ChainRecord(
                seq=row.seq,
                record_id=row.record_id,
                n=row.n,
                digest=row.digest,
                hash=bytes(row.hash).hex(),
                recorded_at=row.recorded_at,
                body=_parsed(bytes(row.body)),
            )
            for row in rows[:size]
        )
        return ChainPage(event_id=event_id, records=records, next=records[-1].seq if len(rows) > size else None)

    async def _peek(self, scope: TenantScope, event_id: str) -> tuple[Peek | None, bool]:
        """What the state store holds, and whether it answered."""
        if self._state_store is None:
            return None, True
        try:
            (peek,) = await self._state_store.peek([(scope, event_id)])
        except InfrastructureError:
            return None, False
        return peek, True


def _place(summary: EventSummary, peek: Peek | None, *, answered: bool) -> Place:
    version, holder = (peek.version, peek.holder or None) if peek else (None, None)
    if summary.decision is not None:
        standing = summary.revisions[-1].superseded_by if summary.revisions else None
        about = f"event {standing} corrects it" if standing else f"revision {summary.decision.revision} stands"
        return Place(where="decided", stage=None, version=version, holder=holder, about=about)
    parked = [letter for letter in summary.dead_letters if letter.status == "open"]
    if parked:
        about = f"parked as dead letter {parked[-1].letter_id}"
        return Place(where="parked", stage=parked[-1].stage, version=version, holder=holder, about=about)
    if summary.failed:
        about = "a person discarded its dead letter"
        return Place(where="failed", stage=None, version=version, holder=holder, about=about)
    if peek is not None and peek.version < FINAL_VERSION:
        about = "a process holds it" if holder else "it waits in the queue of its stage, or on the ladder"
        return Place(where="stage", stage=STAGES[peek.version], version=version, holder=holder, about=about)
    about = "the state store does not hold it" if answered else "the state store does not answer: ask again"
    return Place(where="unknown", stage=None, version=version, holder=holder, about=about)


def _parsed(body: bytes) -> dict[str, Any] | None:
    try:
        document = orjson.loads(body)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _seen(state: dict[str, Any]) -> Seen | None:
    scored = state.get("validated") or {}
    shadow = scored.get("shadow")
    if shadow is None:
        return None
    return Seen(shadow["rollout"], shadow["version"], scored["score"], shadow["score"], shadow["flips"])
