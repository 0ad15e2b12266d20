"""Approvals: the queue that people work through, and their decisions, each in one transaction.

Promises: a decision of a person is the next revision of exactly the revision that the person saw, it is there if and
only if its message and its audit record are, and of any number of people, expiries and corrections at once one wins;
the others are told so (ConflictError). A vote is a person's: two credentials of one person are one vote. Sends
nothing: messages go through the outbox. Does not check permissions; the desk does.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import orjson
import structlog
from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.codec import state_from_bytes
from contracts.events import canonical_json
from contracts.failures import (
    AuthorizationError,
    ConflictError,
    InfrastructureError,
    InvalidRequestError,
    InvalidWorkflowStateError,
    NotKnownError,
)
from contracts.identity import Principal
from contracts.messages import decision_message
from contracts.outcomes import Decision, Outcome
from contracts.ports import Clock, DecisionRow, Telemetry
from contracts.telemetry import APPROVAL_SECONDS, APPROVALS_CLOSED, Measurement
from contracts.tenancy import TenantScope
from contracts.topology import RunningLayouts
from governance.approvals import (
    APPROVAL_EXPIRED,
    CLAIM_S,
    OUTCOME_OF,
    Answered,
    Approval,
    ApprovalPage,
    ApprovalReport,
    ApprovalStatus,
    ApprovalView,
    Cause,
    Closing,
    Verdict,
    Vote,
    check_revision,
    checked_reason,
    expire,
    for_people_only,
    measure,
    opening,
    parse_decision,
    resolve,
)
from governance.audit import operator_record
from governance.postgres.corrections import lock_events, try_lock_event
from governance.postgres.cursors import decode_cursor, encode_cursor
from governance.postgres.directory import tenant_ids
from governance.postgres.engine import transaction
from governance.postgres.ledger import NewApproval, approval_policies, open_approvals
from governance.postgres.outbox import enqueue, enqueue_records
from governance.postgres.reports import revisions_of

log = structlog.get_logger(__name__)

MAX_PAGE: Final = 200
MAX_NOTES: Final = 16_384
_MAX_MEASURED: Final = 50_000
_EXPIRY: Final = Principal("system:approval-expiry", "", frozenset())
_CLOSED_STATUS: Final = {Outcome.APPROVED: ApprovalStatus.APPROVED, Outcome.REJECTED: ApprovalStatus.REJECTED}

_APPROVAL: Final = """
    SELECT a.*, (SELECT count(*) FROM approval_votes v
                  WHERE v.tenant = a.tenant AND v.event_id = a.event_id AND v.revision = a.revision
                    AND v.vote = 'approve') AS approved_by
      FROM approvals a
"""
_QUEUE: Final = text(
    f"""
    {_APPROVAL}
     WHERE a.tenant = :tenant AND a.status = :status
       AND (CAST(:priority AS bigint) IS NULL OR a.priority < CAST(:priority AS bigint)
            OR (a.priority = CAST(:priority AS bigint) AND (a.opened_at, a.event_id, a.revision)
                > (CAST(:opened_at AS timestamptz), CAST(:event_id AS text), CAST(:revision AS bigint))))
     ORDER BY a.priority DESC, a.opened_at, a.event_id, a.revision LIMIT :limit
    """
)
_LATEST: Final = f"{_APPROVAL} WHERE a.tenant = :tenant AND a.event_id = :event_id ORDER BY a.revision DESC LIMIT 1"
_READ_LATEST: Final = text(_LATEST)
_HOLD_LATEST: Final = text(f"{_LATEST} FOR UPDATE OF a")
_HOLD_DUE: Final = text(
    f"""
    {_APPROVAL}
     WHERE a.tenant = :tenant AND a.event_id = :event_id AND a.status = 'open' AND a.expires_at <= :now
       FOR UPDATE OF a SKIP LOCKED
    """
)
_DUE: Final = text(
    """
    SELECT tenant, event_id, expires_at FROM approvals
     WHERE status = 'open' AND expires_at <= :now
       AND (CAST(:after AS timestamptz) IS NULL OR (expires_at, tenant, event_id) > (:after, :tenant, :event_id))
     ORDER BY expires_at, tenant, event_id LIMIT :limit
    """
)
_LEAVE_TO_PEOPLE: Final = text(
    "UPDATE approvals SET expires_at = NULL WHERE tenant = :tenant AND event_id = :event_id AND revision = :revision"
)
_HALTED: Final = text(
    "SELECT EXISTS (SELECT FROM halts WHERE tenant = ANY (ARRAY[:tenant, '*']) AND model = ANY (ARRAY['*', :model]))"
)
_VOTES: Final = text(
    """
    SELECT person, vote, reason, voted_at FROM approval_votes
     WHERE tenant = :tenant AND event_id = :event_id AND revision = :revision ORDER BY voted_at, person
    """
)
_CURRENT: Final = text(
    """
    SELECT revision, outcome, body_digest, digest, decision, state, score, corrects, superseded_by FROM decisions
     WHERE tenant = :tenant AND event_id = :event_id ORDER BY revision DESC LIMIT 1
    """
)
_INSERT_VOTE: Final = text(
    """
    INSERT INTO approval_votes (tenant, event_id, revision, person, vote, reason, voted_at)
    VALUES (:tenant, :event_id, :revision, :person, :vote, :reason, :at) ON CONFLICT DO NOTHING RETURNING 1
    """
)
# State, score and digests are copied where they lie: a person changes nothing of what the decision stands on.
_INSERT_REVISION: Final = text(
    """
    INSERT INTO decisions (tenant, event_id, revision, outcome, decided_by, body_digest, digest, decision, state, score,
                           decided_at, corrects, decider)
    SELECT tenant, event_id, revision + 1, :outcome, :decided_by, body_digest, digest, :decision, state, score,
           :at, corrects, CAST(:decider AS text)
      FROM decisions WHERE tenant = :tenant AND event_id = :event_id AND revision = :revision
    ON CONFLICT DO NOTHING RETURNING 1
    """
)
_CLOSE: Final = text(
    """
    UPDATE approvals SET status = :status, closed_by = CAST(:closed_by AS text), closed_at = :at, close_reason = :reason
     WHERE tenant = :tenant AND event_id = :event_id AND revision = :revision
    """
)
_CLAIM: Final = text(
    """
    UPDATE approvals SET claimed_by = CAST(:person AS text), claimed_at = CAST(:at AS timestamptz)
     WHERE tenant = :tenant AND event_id = :event_id AND revision = :revision
    """
)
_NOTE: Final = text(
    """
    UPDATE approvals SET note = :note WHERE tenant = :tenant AND event_id = :event_id AND revision = :revision
    """
)
_COUNT_CLOSED: Final = text(
    """
    SELECT status, count(*) AS n FROM approvals WHERE tenant = :tenant AND status <> 'open' AND closed_at >= :since
     GROUP BY status ORDER BY status
    """
)
_CLOSINGS: Final = text(
    """
    SELECT extract(epoch FROM a.closed_at - a.opened_at) AS dwell_s, b.outcome AS before, n.outcome AS after,
           ARRAY(SELECT v.vote FROM approval_votes v
                  WHERE v.tenant = a.tenant AND v.event_id = a.event_id AND v.revision = a.revision
                  ORDER BY v.voted_at, v.person) AS votes
      FROM approvals a
      JOIN decisions b ON b.tenant = a.tenant AND b.event_id = a.event_id AND b.revision = a.revision
      JOIN decisions n ON n.tenant = a.tenant AND n.event_id = a.event_id AND n.revision = a.revision + 1
     WHERE a.tenant = :tenant AND a.status IN ('approved', 'rejected') AND a.closed_at >= :since
     ORDER BY a.closed_at DESC LIMIT :limit
    """
)
_WAITING: Final = text(
    """
    SELECT tenant, count(*) AS open, count(*) FILTER (WHERE due_at <= :now) AS overdue, min(opened_at) AS oldest
      FROM approvals WHERE status = 'open' GROUP BY tenant ORDER BY tenant
    """
)


@dataclass(frozen=True, slots=True)
class Pending:
    """What waits for people in one tenant; `oldest_s` in seconds since it was opened."""

    scope: TenantScope
    open: int
    overdue: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class _Held:
    """An open approval under the event's lock, with the time at which it is worked on."""

    connection: AsyncConnection
    scope: TenantScope
    row: Row[Any]
    now: datetime

    @property
    def at(self) -> str:
        return stamp(self.now)

    @property
    def key(self) -> dict[str, Any]:
        return {"tenant": self.scope.tenant_id, "event_id": self.row.event_id, "revision": self.row.revision}


class Approvals:
    """The table `approvals` and the decisions that people make in it."""

    def __init__(self, engine: AsyncEngine, clock: Clock, layouts: RunningLayouts, telemetry: Telemetry) -> None:
        """`layouts`: the queues that the audit records of these commands go to."""
        self._engine = engine
        self._clock = clock
        self._layouts = layouts
        self._telemetry = telemetry

    # --- reading ----------------------------------------------------------------------------------------

    async def queue(
        self,
        scope: TenantScope,
        status: ApprovalStatus = ApprovalStatus.OPEN,
        *,
        after: str | None = None,
        limit: int = 50,
    ) -> ApprovalPage:
        """A tenant's approvals, highest priority first, the oldest of equals first; at most `MAX_PAGE` of them.

        Raises InvalidMetadataError for a cursor that this queue did not make.
        """
        size = max(1, min(limit, MAX_PAGE))
        values = {"tenant": scope.tenant_id, "status": status.value, "limit": size + 1} | _place(after)
        async with transaction(self._engine, [scope]) as connection:
            rows = (await connection.execute(_QUEUE, values)).all()
        now = self._clock.now()
        last = rows[size - 1] if len(rows) > size else None
        place = None if last is None else (last.priority, last.opened_at, last.event_id, last.revision)
        return ApprovalPage(
            approvals=tuple(_approval(row, now) for row in rows[:size]), next=place and encode_cursor(place)
        )

    async def show(self, scope: TenantScope, event_id: str) -> ApprovalView:
        """The latest approval of an event, its votes, and all revisions of the decision. Raises NotKnownError."""
        key: dict[str, Any] = {"tenant": scope.tenant_id, "event_id": event_id}
        async with transaction(self._engine, [scope]) as connection:
            row = (await connection.execute(_READ_LATEST, key)).one_or_none()
            if row is None:
                raise NotKnownError(_NO_APPROVAL)
            votes = (await connection.execute(_VOTES, key | {"revision": row.revision})).all()
            revisions = await revisions_of(connection, scope, event_id)
        return ApprovalView(
            approval=_approval(row, self._clock.now()),
            votes=tuple(_vote(vote) for vote in votes),
            decisions=revisions,
        )

    async def report(self, scope: TenantScope, since: datetime) -> ApprovalReport:
        """What was closed since a moment, how well, and what waits now.

        Dwell, overrides and agreement are over what people closed (the newest 50,000); expired and superseded
        approvals are counted only.
        """
        key, now = {"tenant": scope.tenant_id, "since": since}, self._clock.now()
        async with transaction(self._engine, [scope]) as connection:
            closed = {row.status: row.n for row in await connection.execute(_COUNT_CLOSED, key)}
            rows = (await connection.execute(_CLOSINGS, key | {"limit": _MAX_MEASURED})).all()
            waiting = (await connection.execute(_WAITING, {"now": now})).one_or_none()
        measures = measure(
            [
                Closing(float(r.dwell_s), Outcome(r.before), Outcome(r.after), tuple(Verdict(v) for v in r.votes))
                for r in rows
            ]
        )
        return ApprovalReport(
            since=since,
            closed=closed,
            dwell_p50_s=measures.dwell_p50_s,
            dwell_p95_s=measures.dwell_p95_s,
            reviewed=measures.reviewed,
            overrides=measures.overrides,
            override_rate=measures.override_rate,
            second_votes=measures.second_votes,
            agreed=measures.agreed,
            agreement=measures.agreement,
            open=waiting.open if waiting else 0,
            overdue=waiting.overdue if waiting else 0,
            oldest_open_s=_age_s(waiting.oldest, now) if waiting else None,
        )

    async def pending(self) -> Sequence[Pending]:
        """What waits for people in every tenant that has something waiting, for gauges."""
        now = self._clock.now()
        async with transaction(self._engine, await tenant_ids(self._engine)) as connection:
            rows = (await connection.execute(_WAITING, {"now": now})).all()
        return tuple(Pending(TenantScope(r.tenant), r.open, r.overdue, _age_s(r.oldest, now)) for r in rows)

    # --- working on one ---------------------------------------------------------------------------------

    async def claim(self, caller: Principal, scope: TenantScope, event_id: str, *, revision: int) -> Approval:
        """Say that the caller is looking, for 15 minutes. A courtesy: everybody else may still decide.

        Raises ConflictError while somebody else's claim holds.
        """
        person = _person(caller)
        async with self._held(scope, event_id, revision) as held:
            holder = _claimed(held.row, held.now)
            if holder not in (None, person):
                until = stamp(held.row.claimed_at + timedelta(seconds=CLAIM_S))
                raise ConflictError(f"{holder} is looking at it until {until}; you may decide all the same")
            await held.connection.execute(_CLAIM, held.key | {"person": person, "at": held.now})
            await self._record(held, caller, "claimed", {})
            return await _again(held)

    async def release(self, caller: Principal, scope: TenantScope, event_id: str, *, revision: int) -> Approval:
        """Give the caller's own claim back; without one nothing changes."""
        person = _person(caller)
        async with self._held(scope, event_id, revision) as held:
            if held.row.claimed_by == person:
                await held.connection.execute(_CLAIM, held.key | {"person": None, "at": None})
                await self._record(held, caller, "released", {})
            return await _again(held)

    async def note(self, caller: Principal, scope: TenantScope, event_id: str, *, revision: int, note: str) -> Approval:
        """Add a note for whoever decides; notes are never sent to anybody else."""
        person, said = _person(caller), checked_reason(note)
        async with self._held(scope, event_id, revision) as held:
            line = f"{held.at} {person}: {said}"
            notes = line if held.row.note is None else f"{held.row.note}\n{line}"
            if len(notes) > MAX_NOTES:
                raise ConflictError("there is no room for more notes; decide, or leave it to somebody")
            await held.connection.execute(_NOTE, held.key | {"note": notes})
            await self._record(held, caller, "noted", {"note_digest": _digest(said)})
            return await _again(held)

    # --- deciding ---------------------------------------------------------------------------------------

    async def approve(
        self, caller: Principal, scope: TenantScope, event_id: str, *, revision: int, reason: str
    ) -> Answered:
        """Vote to approve; the vote that is the last one needed is the decision.

        Raises InvalidRequestError without a reason, AuthorizationError for a caller who is no person or who asked for
        this approval (or one would turn any decision alone, below the amount of four eyes), NotKnownError, and
        ConflictError when `revision` is not what is open, when it is closed, or when this person voted before.
        """
        return await self._answer(caller, Verdict.APPROVE, scope, event_id, revision, reason)

    async def reject(
        self, caller: Principal, scope: TenantScope, event_id: str, *, revision: int, reason: str
    ) -> Answered:
        """Reject: one person is enough, whoever asked. Raises as `approve` does otherwise."""
        return await self._answer(caller, Verdict.REJECT, scope, event_id, revision, reason)

    async def open(
        self, caller: Principal, scope: TenantScope, event_id: str, *, cause: Cause, reason: str
    ) -> Approval:
        """Ask people about a decided event again: an approval about its highest revision, whatever that said.

        Raises NotKnownError for an event that is not decided, ConflictError when one is open already or when a
        correction took the event's place.
        """
        person, said = _person(caller), checked_reason(reason)
        if cause is Cause.DECISION:
            allowed = f"one of {Cause.REOPENED}, {Cause.CONTESTED}"
            raise InvalidRequestError("people reopen or contest decisions", pointers=(("/cause", allowed),))
        key = {"tenant": scope.tenant_id, "event_id": event_id}
        async with transaction(self._engine, [scope]) as connection:
            await lock_events(connection, (), exclusive=[(scope, event_id)])
            now = self._clock.now()
            current = (await connection.execute(_CURRENT, key)).one_or_none()
            if current is None:
                raise NotKnownError("no decision of this event is known (yet) to this tenant")
            if current.superseded_by is not None:
                raise ConflictError(f"event {current.superseded_by} corrects this one: ask about that")
            latest = (await connection.execute(_READ_LATEST, key)).one_or_none()
            if latest is not None and latest.status == "open":
                raise ConflictError(f"an approval about revision {latest.revision} is open already")
            policy = (await approval_policies(connection, [scope]))[scope]
            state, decision = state_from_bytes(bytes(current.state)), parse_decision(bytes(current.decision))
            asked = opening(state, decision, policy, now)
            new = NewApproval(scope, event_id, current.revision, now, asked, cause, person, said)
            await open_approvals(connection, [new])
            row = (await connection.execute(_READ_LATEST, key)).one()
            held = _Held(connection, scope, row, now)
            await self._record(held, caller, "opened", {"cause": cause.value, "reason_digest": _digest(said)})
            return _approval(row, now)

    async def _answer(
        self, caller: Principal, verdict: Verdict, scope: TenantScope, event_id: str, revision: int, reason: str
    ) -> Answered:
        person, said = _person(caller), checked_reason(reason)
        decision: Decision | None = None
        async with self._held(scope, event_id, revision) as held:
            if verdict is Verdict.APPROVE and held.row.opened_by == person:
                raise AuthorizationError("you asked for this approval, so somebody else approves it; you may reject it")
            vote = held.key | {"person": person, "vote": verdict.value, "reason": said, "at": held.now}
            if (await held.connection.execute(_INSERT_VOTE, vote)).one_or_none() is None:
                raise ConflictError("you have voted on this already; a second vote is another person's")
            holder = _claimed(held.row, held.now)
            last = verdict is Verdict.REJECT or held.row.approved_by + 1 >= held.row.approvers_needed
            if last:
                decision = await self._close(
                    held, lambda current: resolve(current, verdict, person, said, held.at, revision), person, said
                )
                await self._record(held, caller, _CLOSED_STATUS[OUTCOME_OF[verdict]].value, _proof(decision))
            else:
                await self._record(held, caller, "voted", {"vote": verdict.value, "reason_digest": _digest(said)})
            approval = await _again(held)
        if decision is not None:
            self._measure(scope, approval)
        document = None if decision is None else orjson.loads(canonical_bytes(decision))
        return Answered(approval=approval, decision=document, claimed_by=None if holder == person else holder)

    @asynccontextmanager
    async def _held(self, scope: TenantScope, event_id: str, revision: int) -> AsyncIterator[_Held]:
        """The open approval that the caller means, under the event's lock and in one transaction."""
        async with transaction(self._engine, [scope]) as connection:
            await lock_events(connection, (), exclusive=[(scope, event_id)])
            key = {"tenant": scope.tenant_id, "event_id": event_id}
            row = (await connection.execute(_HOLD_LATEST, key)).one_or_none()
            if row is None:
                raise NotKnownError(_NO_APPROVAL)
            check_revision(row.revision, revision)
            if row.status != "open":
                by = f" by {row.closed_by}" if row.closed_by else ""
                raise ConflictError(f"it is closed already: {row.status}{by} at {stamp(row.closed_at)}")
            yield _Held(connection, scope, row, self._clock.now())

    async def _close(
        self, held: _Held, decide: Callable[[Decision], Decision], person: str | None, reason: str
    ) -> Decision:
        """Write revision n + 1 and its message, and close the approval. The caller writes the audit record."""
        connection, scope, row = held.connection, held.scope, held.row
        current = (await connection.execute(_CURRENT, held.key)).one()
        check_revision(current.revision, row.revision)
        if current.superseded_by is not None:
            raise ConflictError(f"event {current.superseded_by} corrects this one: decide about that")
        decision = decide(parse_decision(bytes(current.decision)))
        body = canonical_bytes(decision)
        values = {
            "outcome": decision.outcome.value,
            "decided_by": decision.decided_by,
            "decision": body,
            "at": held.now,
            "decider": person,
        }
        if (await connection.execute(_INSERT_REVISION, held.key | values)).one_or_none() is None:
            raise ConflictError("somebody decided this at the same time: load it again")
        status = ApprovalStatus.EXPIRED if person is None else _CLOSED_STATUS[decision.outcome]
        closing = {"status": status.value, "closed_by": person, "at": held.now, "reason": reason}
        await connection.execute(_CLOSE, held.key | closing)
        stored = bytes(current.state)
        written = DecisionRow(current.body_digest, decision.revision, decision.outcome.value, body, stored)
        message = decision_message(scope, decision.kind, written, decision.correlation_id, _traceparent(stored))
        await enqueue(connection, scope, [message])
        return decision

    async def _record(self, held: _Held, caller: Principal, action: str, detail: dict[str, str | int]) -> None:
        subject: dict[str, str | int] = {"event_id": held.row.event_id, "revision": held.row.revision}
        record = operator_record(
            held.scope, f"approval.{action}", caller, held.at, subject, detail, event_id=held.row.event_id
        )
        await enqueue_records(held.connection, held.scope, [record], self._layouts)

    def _measure(self, scope: TenantScope, approval: Approval) -> None:
        """After the commit: what was rolled back was not closed."""
        labels = {"result": approval.status.value, "tenant": scope.tenant_id}
        dwell = _age_s(approval.opened_at, approval.closed_at or approval.opened_at)
        self._telemetry.record(Measurement(APPROVALS_CLOSED, labels=labels), Measurement(APPROVAL_SECONDS, dwell))

    # --- expiry -----------------------------------------------------------------------------------------

    async def expire_due(self, limit: int = 100) -> int:
        """Decide what nobody decided in time as each tenant's policy said; returns how many were decided.

        Those that are due longest first, `limit` at a time, each in a transaction of its own; what somebody is working
        on at this moment is left to the next round, and what cannot expire keeps none behind it. Until then a person
        may still decide.
        """
        scopes = {scope.tenant_id: scope for scope in await tenant_ids(self._engine)}
        values: dict[str, Any] = {"now": self._clock.now(), "limit": limit, "after": None, "tenant": "", "event_id": ""}
        expired = 0
        while True:
            async with transaction(self._engine, scopes.values()) as connection:
                due = (await connection.execute(_DUE, values)).all()
            expired += await self._expire_all([(scopes[row.tenant], row.event_id) for row in due])
            if len(due) < limit:
                return expired
            values |= {"after": due[-1].expires_at, "tenant": due[-1].tenant, "event_id": due[-1].event_id}

    async def _expire_all(self, due: Sequence[tuple[TenantScope, str]]) -> int:
        expired = 0
        for scope, event_id in due:
            try:
                expired += await self._expire(scope, event_id)
            except (InvalidWorkflowStateError, ConflictError) as error:
                # One that cannot be read must not keep the others open; it stays, and people see it as overdue.
                log.error(
                    "approval_cannot_expire",
                    tenant=scope.tenant_id,
                    event_id=event_id,
                    exception_class=type(error).__name__,
                )
        return expired

    async def _expire(self, scope: TenantScope, event_id: str) -> bool:
        async with transaction(self._engine, [scope]) as connection:
            if not await try_lock_event(connection, (scope, event_id)):
                return False
            now = self._clock.now()
            key = {"tenant": scope.tenant_id, "event_id": event_id, "now": now}
            row = (await connection.execute(_HOLD_DUE, key)).one_or_none()
            if row is None:
                return False
            held = _Held(connection, scope, row, now)
            outcome = Outcome(row.expiry_outcome)
            decided = parse_decision(bytes((await connection.execute(_CURRENT, held.key)).one().decision))
            halted = bool((await connection.execute(_HALTED, key | {"model": _model_name(decided)})).scalar_one())
            if for_people_only(row.reasons, outcome, row.approvers_needed, halted=halted):
                await connection.execute(_LEAVE_TO_PEOPLE, held.key)
                log.warning("approval_left_to_people", tenant=scope.tenant_id, event_id=event_id)
                return False
            decision = await self._close(
                held, lambda current: expire(current, outcome, held.at), None, APPROVAL_EXPIRED
            )
            await self._record(held, _EXPIRY, "expired", _proof(decision))
            approval = await _again(held)
        self._measure(scope, approval)
        return True

    async def run_expiry(
        self, stop: asyncio.Event, *, every_s: float = 1.0, committed: Callable[[], None] | None = None
    ) -> None:
        """Expire what is due every `every_s` seconds until `stop` is set; survives a server that is away.

        `committed` is called after a round that decided something, so that the outbox goes out at once.
        """
        while not stop.is_set():
            try:
                if await self.expire_due() and committed is not None:
                    committed()
            except InfrastructureError as error:
                log.warning("approval_expiry_paused", exception_class=type(error).__name__)
            try:
                async with asyncio.timeout(every_s):
                    await stop.wait()
            except TimeoutError:
                continue


def canonical_bytes(decision: Decision) -> bytes:
    """A decision as it is stored and sent."""
    return canonical_json(decision.model_dump(mode="json", exclude_none=True))


def stamp(at: datetime) -> str:
    """RFC 3339 in UTC."""
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


_NO_APPROVAL: Final = "no approval of this event is known to this tenant"


def _person(caller: Principal) -> str:
    """Who answers for the command. Raises AuthorizationError for a credential that nobody answers for."""
    if not caller.person:
        raise AuthorizationError("approvals are people's: this credential has no person who answers for it")
    return caller.person


async def _again(held: _Held) -> Approval:
    row = (await held.connection.execute(_READ_LATEST, held.key)).one()
    return _approval(row, held.now)


def _claimed(row: Row[Any], now: datetime) -> str | None:
    """Whose claim holds, if any."""
    if row.claimed_by is None or row.claimed_at is None or now - row.claimed_at >= timedelta(seconds=CLAIM_S):
        return None
    return str(row.claimed_by)


def _approval(row: Row[Any], now: datetime) -> Approval:
    holder = _claimed(row, now)
    return Approval(
        event_id=row.event_id,
        revision=row.revision,
        kind=row.kind,
        status=ApprovalStatus(row.status),
        cause=Cause(row.cause),
        priority=row.priority,
        reasons=tuple(row.reasons),
        amount=None if row.amount is None else format(row.amount, "f"),
        currency=row.currency,
        approvers_needed=row.approvers_needed,
        approved_by=row.approved_by,
        opened_at=row.opened_at,
        opened_by=row.opened_by,
        open_reason=row.open_reason,
        due_at=row.due_at,
        overdue=row.status == "open" and row.due_at is not None and row.due_at <= now,
        expires_at=row.expires_at,
        expiry_outcome=row.expiry_outcome,
        claimed_by=holder,
        claimed_at=row.claimed_at if holder else None,
        note=row.note,
        closed_by=row.closed_by,
        closed_at=row.closed_at,
        close_reason=row.close_reason,
    )


def _vote(row: Row[Any]) -> Vote:
    return Vote(person=row.person, vote=Verdict(row.vote), reason=row.reason, voted_at=row.voted_at)


def _digest(said: str) -> str:
    """What the audit holds of a free text: enough to prove it, nothing to leak."""
    return hashlib.sha256(said.encode()).hexdigest()


def _proof(decision: Decision) -> dict[str, str | int]:
    body = canonical_bytes(decision)
    return {
        "outcome": decision.outcome.value,
        "decided_revision": decision.revision,
        "decision_digest": hashlib.sha256(body).hexdigest(),
    }


def _model_name(decision: Decision) -> str:
    model = decision.versions.get("model") or {}
    return str(model.get("name", ""))


def _traceparent(state: bytes) -> str | None:
    value = orjson.loads(state).get("traceparent")
    return value if isinstance(value, str) else None


def _age_s(then: datetime, now: datetime) -> float:
    return max((now - then).total_seconds(), 0.0)


def _place(after: str | None) -> dict[str, Any]:
    """The place of a cursor as values of the query; nulls for the beginning."""
    names = ("priority", "opened_at", "event_id", "revision")
    if after is None:
        return dict.fromkeys(names)
    return dict(zip(names, decode_cursor(after, (int, datetime, str, int)), strict=True))
