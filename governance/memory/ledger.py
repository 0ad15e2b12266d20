"""Events, decisions and approvals in memory, and the feed that reads them.

The rules are those of `governance.postgres.ledger` and `governance.postgres.feed`, one for one. Transactions run one
after another here, so the order of their numbers is the order in which they commit, and the feed needs no horizon.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal
from typing import Final

from contracts.events import canonical_json
from contracts.failures import InvalidWorkflowStateError
from contracts.outcomes import Outcome
from contracts.ports import DecisionRow, EventRow, FeedPage
from contracts.state import EventState, SubjectHistory
from contracts.tenancy import TenantScope
from governance.approvals import Opening, opening, policy_of
from governance.columns import clean, moment
from governance.feed import START, FeedPosition, check_limit, check_reachable, decode, encode
from governance.memory.database import MemoryDatabase, Table, Transaction
from governance.memory.directory import TENANTS
from governance.memory.records import DEAD_LETTERS, close_letters

EventKey = tuple[TenantScope, str]

_DAY: Final = timedelta(hours=24)
_MONTH: Final = timedelta(hours=720)
_EXACT: Final = Context(prec=200)
"""Sums of amounts are exact on the server: 15 digits before the point and 9 behind it, any number of times."""


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """A row of `events`."""

    tenant: str
    event_id: str
    identity: str | None
    body_digest: str
    kind: str
    type: str
    subject_type: str
    subject_id: str
    amount: Decimal | None
    currency: str | None
    occurred_at: datetime
    received_at: datetime
    correlation_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class StoredDecision:
    """A row of `decisions`; `feed` is the number of the transaction that inserted it."""

    tenant: str
    event_id: str
    revision: int
    outcome: str
    decided_by: str
    body_digest: str
    digest: str
    decision: bytes
    state: bytes
    decided_at: datetime
    feed: int
    corrects: str | None = None
    superseded_by: str | None = None

    @property
    def row(self) -> DecisionRow:
        """What the port answers."""
        return DecisionRow(self.body_digest, self.revision, self.outcome, self.decision, self.state)


@dataclass(frozen=True, slots=True)
class StoredApproval:
    """A row of `approvals`, as far as a ledger opens and closes it."""

    tenant: str
    event_id: str
    revision: int
    opened_at: datetime
    opening: Opening
    status: str = "open"
    closed_at: datetime | None = None
    close_reason: str | None = None


EVENTS: Final[Table[StoredEvent]] = Table(
    "events",
    key=lambda row: (row.tenant, row.event_id),
    tenant=lambda row: row.tenant,
    indexes={"subject": lambda row: (row.tenant, row.subject_type, row.subject_id)},
)
DECISIONS: Final[Table[StoredDecision]] = Table(
    "decisions",
    key=lambda row: (row.tenant, row.event_id, row.revision),
    tenant=lambda row: row.tenant,
    indexes={
        "tenant": lambda row: (row.tenant,),
        "event": lambda row: (row.tenant, row.event_id),
        "corrects": lambda row: None if row.corrects is None else (row.tenant, row.corrects),
    },
)
APPROVALS: Final[Table[StoredApproval]] = Table(
    "approvals",
    key=lambda row: (row.tenant, row.event_id, row.revision),
    tenant=lambda row: row.tenant,
    indexes={"event": lambda row: (row.tenant, row.event_id)},
)


class MemoryLedger:
    """The port Ledger on a database in memory."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    async def record_events(self, states: Sequence[EventState]) -> Sequence[EventRow]:
        """Insert each event unless its identity is owned already, and read back owner and decision, by position."""
        if not states:
            return ()
        rows = [_event(state) for state in states]

        def work(tx: Transaction) -> tuple[EventRow, ...]:
            for row in rows:
                tx.insert(EVENTS, row)
            return tuple(_owner(tx, row.tenant, row.event_id) for row in rows)

        return await self._database.run([state.scope for state in states], work)

    async def decisions(self, keys: Sequence[EventKey]) -> Sequence[DecisionRow | None]:
        """The highest revision of each event's decision, by position."""
        if not keys:
            return ()
        return await self._database.run(
            [scope for scope, _ in keys],
            lambda tx: tuple(_highest(tx, scope.tenant_id, event_id) for scope, event_id in keys),
        )

    async def decide(self, states: Sequence[EventState]) -> Sequence[DecisionRow]:
        """Insert revision 1 of each decided state, open the approvals of those that won, and read back, by position.

        A decision that wins and corrects another event supersedes that event's decisions and its open approvals; a
        decision about an event that was corrected before is inserted as superseded, and opens no approval.
        Raises InvalidWorkflowStateError for a state without a decision.
        """
        if not states:
            return ()
        rows = [_decision(state) for state in states]

        def work(tx: Transaction) -> tuple[DecisionRow, ...]:
            before = [_corrector(tx, row) for row in rows]  # a corrector of the same call is not there yet
            won = [
                state
                for state, row, corrector in zip(states, rows, before, strict=True)
                if tx.insert(DECISIONS, replace(row, feed=tx.number, superseded_by=corrector))
            ]
            won.sort(key=_order)
            for state in won:
                _supersede(tx, state)
            for state in won:
                _open_approval(tx, state)
            close_letters(tx, [_order(state) for state in states])
            found = (_highest(tx, row.tenant, row.event_id) for row in rows)
            return tuple(row for row in found if row is not None)

        return await self._database.run([state.scope for state in states], work)

    async def known(self, keys: Sequence[EventKey]) -> Sequence[bool]:
        """Whether `events` has each event, by position."""
        if not keys:
            return ()
        return await self._database.run(
            [scope for scope, _ in keys],
            lambda tx: tuple(tx.get(EVENTS, scope.tenant_id, event_id) is not None for scope, event_id in keys),
        )

    async def failed(self, keys: Sequence[EventKey]) -> Sequence[bool]:
        """Whether a person discarded the dead letter of each event, by position."""
        if not keys:
            return ()
        return await self._database.run(
            [scope for scope, _ in keys],
            lambda tx: tuple(
                any(letter.failed for letter in tx.find(DEAD_LETTERS, "event", scope.tenant_id, event_id))
                for scope, event_id in keys
            ),
        )

    async def histories(self, states: Sequence[EventState]) -> Sequence[SubjectHistory]:
        """What `events` holds now of each event's subject up to the event's own time, by position.

        Windows are (occurred − 24 h, occurred] and (occurred − 720 h, occurred]; amounts of other currencies are
        not added.
        """
        if not states:
            return ()
        rows = [_event(state) for state in states]
        return await self._database.run(
            [state.scope for state in states],
            lambda tx: tuple(
                _history(row, tx.find(EVENTS, "subject", row.tenant, row.subject_type, row.subject_id)) for row in rows
            ),
        )


class MemoryDecisionFeed:
    """The port DecisionFeed on a database in memory."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    async def page(self, scope: TenantScope, after: str | None, limit: int) -> FeedPage:
        """At most `limit` decisions after a cursor (None: from the beginning), in the order of their commits.

        Raises InvalidMetadataError for a cursor that this feed did not make, one that lies ahead of it, and a limit
        below 1.
        """
        check_limit(limit)
        place = START if after is None else decode(after)

        def work(tx: Transaction) -> FeedPage:
            check_reachable(place, tx.number)
            rows = tx.find(DECISIONS, "tenant", scope.tenant_id)
            placed = sorted(((_position(row), row.decision) for row in rows), key=lambda one: one[0])
            page = [one for one in placed if one[0] > place][:limit]
            return FeedPage(tuple(decision for _, decision in page), encode(page[-1][0]) if page else None)

        return await self._database.run([scope], work)


def _position(row: StoredDecision) -> FeedPosition:
    return FeedPosition(row.feed, row.event_id, row.revision)


def _order(state: EventState) -> tuple[str, str]:
    return (state.scope.tenant_id, state.event_id)


def _event(state: EventState) -> StoredEvent:
    event = state.event
    return StoredEvent(
        tenant=state.scope.tenant_id,
        event_id=state.event_id,
        identity=None if event.id is None else clean(event.id),
        body_digest=state.body_digest,
        kind=state.KIND,
        type=event.type,
        subject_type=clean(event.subject.type),
        subject_id=clean(event.subject.id),
        amount=Decimal(event.amount.value) if event.amount else None,
        currency=event.amount.currency if event.amount else None,
        occurred_at=moment(event.occurred_at),
        received_at=moment(state.received_at),
        correlation_id=clean(state.correlation_id),
        body=event.canonical_bytes(),
    )


def _owner(tx: Transaction, tenant: str, event_id: str) -> EventRow:
    event = tx.get(EVENTS, tenant, event_id)
    assert event is not None  # inserted before, or by somebody earlier
    return EventRow(event.body_digest, _highest(tx, tenant, event_id))


def _highest(tx: Transaction, tenant: str, event_id: str) -> DecisionRow | None:
    rows = tx.find(DECISIONS, "event", tenant, event_id)
    return max(rows, key=lambda row: row.revision).row if rows else None


def _decision(state: EventState) -> StoredDecision:
    if state.decided is None:
        raise InvalidWorkflowStateError("a state without a decision cannot be written to the table of decisions")
    decision = state.decided.decision
    return StoredDecision(
        tenant=state.scope.tenant_id,
        event_id=state.event_id,
        revision=1,
        outcome=decision.outcome.value,
        decided_by=decision.decided_by,
        body_digest=state.body_digest,
        digest=state.digest,
        decision=canonical_json(decision.model_dump(mode="json", exclude_none=True)),
        state=state.to_bytes(),
        decided_at=moment(decision.decided_at),
        feed=0,  # known inside the transaction
        corrects=state.event.corrects,
    )


def _corrector(tx: Transaction, row: StoredDecision) -> str | None:
    """The event that corrects this one and was decided first, if it is there already."""
    found = [one for one in tx.find(DECISIONS, "corrects", row.tenant, row.event_id) if one.revision == 1]
    return min(found, key=_position).event_id if found else None


def _supersede(tx: Transaction, state: EventState) -> None:
    """Mark what a correction replaces: every revision that nothing replaced before, and their open approvals.

    What took this event's own place is left alone: of events that correct each other, one stands.
    """
    corrects = state.event.corrects
    if corrects is None or state.decided is None or corrects in _above(tx, state):
        return
    tenant = state.scope.tenant_id
    marked = [row for row in tx.find(DECISIONS, "event", tenant, corrects) if row.superseded_by is None]
    for row in marked:
        tx.put(DECISIONS, replace(row, superseded_by=state.event_id))
    if not marked:
        return
    reason = f"superseded by {state.event_id}"
    closed_at = moment(state.decided.decision.decided_at)
    for approval in tx.find(APPROVALS, "event", tenant, corrects):
        if approval.status == "open":
            closed = replace(approval, status="superseded", closed_at=closed_at, close_reason=reason)
            tx.put(APPROVALS, closed)


def _above(tx: Transaction, state: EventState) -> set[str]:
    """The event itself and whatever took its place, and the place of that."""
    above: set[str] = set()
    todo: list[str | None] = [state.event_id]
    while todo:
        event_id = todo.pop()
        if event_id is not None and event_id not in above:
            above.add(event_id)
            todo += [row.superseded_by for row in tx.find(DECISIONS, "event", state.scope.tenant_id, event_id)]
    return above


def _open_approval(tx: Transaction, state: EventState) -> None:
    row = tx.get(DECISIONS, *_order(state), 1)
    if row is None or row.superseded_by is not None or row.outcome != Outcome.REQUIRE_APPROVAL or not state.decided:
        return
    tenant = tx.get(TENANTS, row.tenant)
    policy = policy_of(tenant.approval_policy if tenant else None)
    asked = opening(state, state.decided.decision, policy, row.decided_at)
    asked = replace(asked, reasons=tuple(clean(code) for code in asked.reasons))
    tx.insert(APPROVALS, StoredApproval(row.tenant, row.event_id, 1, row.decided_at, asked))


def _history(event: StoredEvent, rows: Iterable[StoredEvent]) -> SubjectHistory:
    earlier = [row for row in rows if row.event_id != event.event_id and row.occurred_at <= event.occurred_at]
    month = [row for row in earlier if event.occurred_at - row.occurred_at < _MONTH]
    total = Decimal(0)
    for row in month:
        if row.amount is not None and row.currency == event.currency:
            total = _EXACT.add(total, row.amount)
    first = min((row.occurred_at for row in earlier), default=None)
    return SubjectHistory(
        events_1d=sum(event.occurred_at - row.occurred_at < _DAY for row in month),
        events_30d=len(month),
        amount_30d=format(total, "f"),
        first_seen_at=None if first is None else first.astimezone(UTC).isoformat().replace("+00:00", "Z"),
    )
