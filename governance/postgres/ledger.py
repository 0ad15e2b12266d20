"""Events and decisions: who owns an identity, and what was decided, once.

Promises: the first body of an identity owns it, the first decision of a revision stands, everybody reads back the
same bytes, and a correction takes the place of what it corrects whichever of the two is decided first. One statement
per step for any number of rows, always in the order (tenant, event), so that two processes with the same events wait
for each other and never for ever. Computes nothing about a decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.events import canonical_json
from contracts.failures import DatabaseError, InvalidWorkflowStateError
from contracts.outcomes import Outcome
from contracts.ports import DecisionRow, EventRow
from contracts.state import EventState, SubjectHistory
from contracts.tenancy import TenantScope
from contracts.topology import STAGES
from governance.approvals import ApprovalPolicy, Cause, Opening, opening, policy_of
from governance.columns import clean, moment
from governance.postgres.corrections import Correction, Key, lock_events, supersede
from governance.postgres.engine import columns, transaction

_EVENT: Final = (
    *("tenant", "event_id", "identity", "body_digest", "kind", "type", "subject_type", "subject_id"),
    *("amount", "currency", "occurred_at", "received_at", "correlation_id", "body"),
)

# The arrays are sorted by the caller, and unnest keeps their order: no ORDER BY, whose collation may be another.
_INSERT_EVENTS: Final = text(
    """
    INSERT INTO events (tenant, event_id, identity, body_digest, kind, type, subject_type, subject_id, amount,
                        currency, occurred_at, received_at, correlation_id, body)
    SELECT * FROM unnest(
        CAST(:tenant AS text[]), CAST(:event_id AS text[]), CAST(:identity AS text[]), CAST(:body_digest AS text[]),
        CAST(:kind AS text[]), CAST(:type AS text[]), CAST(:subject_type AS text[]), CAST(:subject_id AS text[]),
        CAST(:amount AS numeric[]), CAST(:currency AS text[]), CAST(:occurred_at AS timestamptz[]),
        CAST(:received_at AS timestamptz[]), CAST(:correlation_id AS text[]), CAST(:body AS bytea[]))
    ON CONFLICT DO NOTHING
    """
)

_HIGHEST: Final = """
    LEFT JOIN LATERAL (
        SELECT d.revision, d.outcome, d.body_digest, d.decision, d.state FROM decisions d
         WHERE d.tenant = k.tenant AND d.event_id = k.event_id ORDER BY d.revision DESC LIMIT 1) d ON true
     ORDER BY k.i
"""
_KEYS: Final = "unnest(CAST(:tenant AS text[]), CAST(:event_id AS text[])) WITH ORDINALITY AS k(tenant, event_id, i)"

_READ_EVENTS: Final = text(
    f"""
    SELECT e.body_digest AS owner, d.* FROM {_KEYS}
    LEFT JOIN events e ON e.tenant = k.tenant AND e.event_id = k.event_id
    {_HIGHEST}
    """  # noqa: S608 - put together from the constants above
)
_READ_DECISIONS: Final = text(f"SELECT d.* FROM {_KEYS} {_HIGHEST}")  # noqa: S608 - see above

_KNOWN: Final = text(
    f"""
    SELECT e.event_id IS NOT NULL AS known FROM {_KEYS}
    LEFT JOIN events e ON e.tenant = k.tenant AND e.event_id = k.event_id ORDER BY k.i
    """  # noqa: S608 - see above
)

_FAILED: Final = text(
    f"""
    SELECT EXISTS (SELECT 1 FROM dead_letters l
                    WHERE l.tenant = k.tenant AND l.event_id = k.event_id AND l.failed) AS failed
      FROM {_KEYS} ORDER BY k.i
    """  # noqa: S608 - see above
)

_DECISION: Final = (
    *("tenant", "event_id", "outcome", "decided_by", "body_digest", "digest", "decision", "state", "score"),
    *("decided_at", "corrects"),
)
# A correction that was decided before what it corrects is waiting here for it. The first to be decided counts.
_INSERT_DECISIONS: Final = text(
    """
    INSERT INTO decisions (tenant, event_id, revision, outcome, decided_by, body_digest, digest, decision, state,
                           score, decided_at, corrects, superseded_by)
    SELECT k.tenant, k.event_id, 1, k.outcome, k.decided_by, k.body_digest, k.digest, k.decision, k.state, k.score,
           k.decided_at, k.corrects,
           (SELECT c.event_id FROM decisions c
             WHERE c.tenant = k.tenant AND c.corrects = k.event_id AND c.revision = 1
             ORDER BY c.feed_xid, c.event_id LIMIT 1)
      FROM unnest(
        CAST(:tenant AS text[]), CAST(:event_id AS text[]), CAST(:outcome AS text[]), CAST(:decided_by AS text[]),
        CAST(:body_digest AS text[]), CAST(:digest AS text[]), CAST(:decision AS bytea[]), CAST(:state AS bytea[]),
        CAST(:score AS numeric[]), CAST(:decided_at AS timestamptz[]), CAST(:corrects AS text[]))
        AS k(tenant, event_id, outcome, decided_by, body_digest, digest, decision, state, score, decided_at, corrects)
    ON CONFLICT DO NOTHING
    RETURNING tenant, event_id, superseded_by
    """
)

_APPROVAL: Final = (
    *("tenant", "event_id", "revision", "opened_at", "reasons", "kind", "cause", "opened_by", "open_reason"),
    *("priority", "amount", "currency", "approvers_needed", "due_at", "expires_at", "expiry_outcome"),
)
# An array of arrays must be rectangular, so the reason codes of a row travel as one JSON text.
_OPEN_APPROVALS: Final = text(
    """
    INSERT INTO approvals (tenant, event_id, revision, opened_at, status, reasons, kind, cause, opened_by, open_reason,
                           priority, amount, currency, approvers_needed, due_at, expires_at, expiry_outcome)
    SELECT k.tenant, k.event_id, k.revision, k.opened_at, 'open',
           ARRAY(SELECT jsonb_array_elements_text(CAST(k.reasons AS jsonb))), k.kind, k.cause, k.opened_by,
           k.open_reason, k.priority, k.amount, k.currency, k.approvers_needed, k.due_at, k.expires_at,
           k.expiry_outcome
      FROM unnest(CAST(:tenant AS text[]), CAST(:event_id AS text[]), CAST(:revision AS integer[]),
                  CAST(:opened_at AS timestamptz[]), CAST(:reasons AS text[]), CAST(:kind AS text[]),
                  CAST(:cause AS text[]), CAST(:opened_by AS text[]), CAST(:open_reason AS text[]),
                  CAST(:priority AS integer[]), CAST(:amount AS numeric[]), CAST(:currency AS text[]),
                  CAST(:approvers_needed AS integer[]), CAST(:due_at AS timestamptz[]),
                  CAST(:expires_at AS timestamptz[]), CAST(:expiry_outcome AS text[]))
           AS k(tenant, event_id, revision, opened_at, reasons, kind, cause, opened_by, open_reason, priority, amount,
                currency, approvers_needed, due_at, expires_at, expiry_outcome)
    ON CONFLICT DO NOTHING
    """
)
_POLICIES: Final = text("SELECT tenant_id, approval_policy FROM tenants WHERE tenant_id = ANY(CAST(:tenant AS text[]))")

_CLOSE_LETTERS: Final = text(
    """
    UPDATE dead_letters SET status = 'closed' WHERE letter_id IN (
        SELECT l.letter_id FROM dead_letters l
          JOIN unnest(CAST(:tenant AS text[]), CAST(:event_id AS text[])) AS k(tenant, event_id)
            ON l.tenant = k.tenant AND l.event_id = k.event_id
         WHERE l.status = 'open' AND l.stage = ANY(CAST(:stages AS text[])) ORDER BY l.letter_id FOR UPDATE OF l)
    """
)

# 24 hours, not a day: a day's length follows the session's time zone.
_HISTORIES: Final = text(
    """
    SELECT h.events_1d, h.events_30d, h.amount_30d, f.first_seen_at
      FROM unnest(CAST(:tenant AS text[]), CAST(:event_id AS text[]), CAST(:subject_type AS text[]),
                  CAST(:subject_id AS text[]), CAST(:occurred_at AS timestamptz[]), CAST(:currency AS text[]))
           WITH ORDINALITY AS k(tenant, event_id, subject_type, subject_id, occurred_at, currency, i)
     CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE e.occurred_at > k.occurred_at - interval '24 hours') AS events_1d,
               count(*) AS events_30d,
               coalesce(sum(e.amount) FILTER (WHERE e.currency = k.currency), 0) AS amount_30d
          FROM events e
         WHERE e.tenant = k.tenant AND e.subject_type = k.subject_type AND e.subject_id = k.subject_id
           AND e.occurred_at <= k.occurred_at AND e.occurred_at > k.occurred_at - interval '720 hours'
           AND e.event_id <> k.event_id) h
      LEFT JOIN LATERAL (
        SELECT e.occurred_at AS first_seen_at FROM events e
         WHERE e.tenant = k.tenant AND e.subject_type = k.subject_type AND e.subject_id = k.subject_id
           AND e.occurred_at <= k.occurred_at AND e.event_id <> k.event_id
         ORDER BY e.occurred_at LIMIT 1) f ON true
     ORDER BY k.i
    """
)


class PostgresLedger:
    """The port Ledger over the tables `events`, `decisions` and `approvals`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def record_events(self, states: Sequence[EventState]) -> Sequence[EventRow]:
        """Insert each event unless its identity is owned already, and read back owner and decision, by position."""
        if not states:
            return ()
        ordered = sorted(states, key=_order)  # stable: of two states with one key the first is inserted
        async with transaction(self._engine, [state.scope for state in states]) as connection:
            await connection.execute(_INSERT_EVENTS, columns([_event(state) for state in ordered], _EVENT))
            rows = (await connection.execute(_READ_EVENTS, _keys([(s.scope, s.event_id) for s in states]))).all()
        return tuple(_event_row(row) for row in rows)

    async def decisions(self, keys: Sequence[Key]) -> Sequence[DecisionRow | None]:
        """The highest revision of each event's decision, by position."""
        if not keys:
            return ()
        async with transaction(self._engine, [scope for scope, _ in keys]) as connection:
            return await _read_decisions(connection, keys)

    async def decide(self, states: Sequence[EventState]) -> Sequence[DecisionRow]:
        """Insert revision 1 of each decided state, open the approvals of those that won, and read back, by position.

        A state whose event corrects another takes its place: every revision of the other is marked as superseded and
        its open approval is closed, now or when the other comes to be decided. Raises InvalidWorkflowStateError for
        a state without a decision.
        """
        if not states:
            return ()
        keys = [(state.scope, state.event_id) for state in states]
        ordered = sorted(states, key=_order)
        rows = [_decision(state) for state in ordered]
        async with transaction(self._engine, [state.scope for state in states]) as connection:
            # Before the insert: a correction and what it corrects, decided at once, would not see each other.
            await lock_events(connection, keys, exclusive=_corrected(states))
            inserted = (await connection.execute(_INSERT_DECISIONS, columns(rows, _DECISION))).all()
            won = {(row.tenant, row.event_id): row.superseded_by for row in inserted}
            first = {_order(state): state for state in reversed(ordered)}  # of two with one key the first was inserted
            gone = set(await supersede(connection, _corrections([first[key] for key in sorted(won)], won)))
            standing = [key for key, superseded_by in sorted(won.items()) if superseded_by is None and key not in gone]
            await _open_for(connection, [first[key] for key in standing])
            await connection.execute(_CLOSE_LETTERS, _keys(keys) | {"stages": list(STAGES)})
            found = await _read_decisions(connection, keys)
        decided = tuple(row for row in found if row is not None)
        if len(decided) != len(states):
            raise DatabaseError("a decision that was written cannot be read back")
        return decided

    async def known(self, keys: Sequence[Key]) -> Sequence[bool]:
        """Whether `events` has each event, by position."""
        if not keys:
            return ()
        async with transaction(self._engine, [scope for scope, _ in keys]) as connection:
            rows = (await connection.execute(_KNOWN, _keys(keys))).all()
        return tuple(bool(row.known) for row in rows)

    async def failed(self, keys: Sequence[Key]) -> Sequence[bool]:
        """Whether a person discarded the dead letter of each event, by position."""
        if not keys:
            return ()
        async with transaction(self._engine, [scope for scope, _ in keys]) as connection:
            rows = (await connection.execute(_FAILED, _keys(keys))).all()
        return tuple(bool(row.failed) for row in rows)

    async def histories(self, states: Sequence[EventState]) -> Sequence[SubjectHistory]:
        """What `events` holds now of each event's subject up to the event's own time, by position.

        Windows are (occurred − 24 h, occurred] and (occurred − 720 h, occurred]; amounts of other currencies are
        not added. A subject with very many events in 30 days costs an index scan over all of them.
        """
        if not states:
            return ()
        names = ("tenant", "event_id", "subject_type", "subject_id", "occurred_at", "currency")
        rows = [_subject(state) for state in states]
        async with transaction(self._engine, [state.scope for state in states]) as connection:
            found = (await connection.execute(_HISTORIES, columns(rows, names))).all()
        return tuple(_history(row) for row in found)


@dataclass(frozen=True, slots=True)
class NewApproval:
    """An approval to open about one revision of an event's decision."""

    scope: TenantScope
    event_id: str
    revision: int
    opened_at: datetime
    opening: Opening
    cause: Cause = Cause.DECISION
    opened_by: str | None = None
    open_reason: str | None = None


async def open_approvals(connection: AsyncConnection, approvals: Sequence[NewApproval]) -> None:
    """Open approvals inside the caller's transaction; one that exists already stays as it is."""
    rows = [
        (
            *(new.scope.tenant_id, new.event_id, new.revision, new.opened_at),
            canonical_json([clean(code) for code in new.opening.reasons]).decode(),
            *(new.opening.kind, new.cause.value, new.opened_by, new.open_reason, new.opening.priority),
            *(new.opening.amount, new.opening.currency, new.opening.approvers_needed),
            *(new.opening.due_at, new.opening.expires_at, new.opening.expiry_outcome),
        )
        for new in approvals
    ]
    if rows:
        await connection.execute(_OPEN_APPROVALS, columns(rows, _APPROVAL))


async def approval_policies(
    connection: AsyncConnection, scopes: Sequence[TenantScope]
) -> Mapping[TenantScope, ApprovalPolicy]:
    """The policy of each tenant, the defaults for one without."""
    wanted = {"tenant": sorted({scope.tenant_id for scope in scopes})}
    stored = {row.tenant_id: row.approval_policy for row in await connection.execute(_POLICIES, wanted)}
    return {scope: policy_of(stored.get(scope.tenant_id)) for scope in scopes}


async def _open_for(connection: AsyncConnection, states: Sequence[EventState]) -> None:
    """Open the approvals of decided states that wait for a person."""
    waiting = [
        (state, state.decided.decision)
        for state in states
        if state.decided is not None and state.decided.decision.outcome is Outcome.REQUIRE_APPROVAL
    ]
    if not waiting:
        return
    policies = await approval_policies(connection, [state.scope for state, _ in waiting])
    approvals = []
    for state, decision in waiting:
        at = moment(decision.decided_at)
        asked = opening(state, decision, policies[state.scope], at)
        approvals.append(NewApproval(state.scope, state.event_id, decision.revision, at, asked))
    await open_approvals(connection, approvals)


async def read_decision(connection: AsyncConnection, scope: TenantScope, event_id: str) -> DecisionRow | None:
    """The highest revision of one event's decision, inside the caller's transaction."""
    (row,) = await _read_decisions(connection, [(scope, event_id)])
    return row


async def _read_decisions(connection: AsyncConnection, keys: Sequence[Key]) -> tuple[DecisionRow | None, ...]:
    rows = (await connection.execute(_READ_DECISIONS, _keys(keys))).all()
    return tuple(_decision_row(row) for row in rows)


def _keys(keys: Sequence[Key]) -> dict[str, list[Any]]:
    return columns([(scope.tenant_id, event_id) for scope, event_id in keys], ("tenant", "event_id"))


def _order(state: EventState) -> tuple[str, str]:
    return (state.scope.tenant_id, state.event_id)


def _event(state: EventState) -> tuple[Any, ...]:
    event = state.event
    return (
        state.scope.tenant_id,
        state.event_id,
        None if event.id is None else clean(event.id),
        state.body_digest,
        state.KIND,
        event.type,
        clean(event.subject.type),
        clean(event.subject.id),
        Decimal(event.amount.value) if event.amount else None,
        event.amount.currency if event.amount else None,
        moment(event.occurred_at),
        moment(state.received_at),
        clean(state.correlation_id),
        event.canonical_bytes(),
    )


def _subject(state: EventState) -> tuple[Any, ...]:
    event = state.event
    return (
        state.scope.tenant_id,
        state.event_id,
        clean(event.subject.type),
        clean(event.subject.id),
        moment(event.occurred_at),
        event.amount.currency if event.amount else None,
    )


def _decision(state: EventState) -> tuple[Any, ...]:
    if state.decided is None:
        raise InvalidWorkflowStateError("a state without a decision cannot be written to the table of decisions")
    decision = state.decided.decision
    return (
        state.scope.tenant_id,
        state.event_id,
        decision.outcome.value,
        decision.decided_by,
        state.body_digest,
        state.digest,
        canonical_json(decision.model_dump(mode="json", exclude_none=True)),
        state.to_bytes(),
        None if decision.score is None else Decimal(str(decision.score)),
        moment(decision.decided_at),
        state.event.corrects,
    )


def _corrected(states: Sequence[EventState]) -> list[Key]:
    return [(state.scope, state.event.corrects) for state in states if state.event.corrects is not None]


def _corrections(states: Sequence[EventState], superseded_by: Mapping[tuple[str, str], str | None]) -> list[Correction]:
    return [
        Correction(
            state.scope.tenant_id,
            state.event_id,
            state.event.corrects,
            moment(state.decided.decision.decided_at),
            superseded_by[_order(state)],
        )
        for state in states
        if state.event.corrects is not None and state.decided is not None
    ]


def _event_row(row: Row[Any]) -> EventRow:
    if row.owner is None:
        raise DatabaseError("an event that was written cannot be read back")
    return EventRow(row.owner, _decision_row(row))


def _decision_row(row: Row[Any]) -> DecisionRow | None:
    if row.revision is None:
        return None
    return DecisionRow(row.body_digest, row.revision, row.outcome, bytes(row.decision), bytes(row.state))


def _history(row: Row[Any]) -> SubjectHistory:
    first = row.first_seen_at
    return SubjectHistory(
        events_1d=row.events_1d,
        events_30d=row.events_30d,
        amount_30d=format(row.amount_30d, "f"),
        first_seen_at=None if first is None else first.astimezone(UTC).isoformat().replace("+00:00", "Z"),
    )
