"""One way in for both doors: parse, validate, isolate, identify, reserve, publish, answer.

Promises: an `Admission` that is not a repeat means that the broker confirmed exactly one message for the
event; everything else is a `Refusal` that names the event once its identity is known. Repeating a
submission with the same identity is always safe. Nothing here authenticates or speaks a transport.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from contracts.codec import Entry, entry_of, state_from_bytes
from contracts.events import Event, event_id_of, parse_event
from contracts.failures import (
    DomainValidationError,
    IdempotencyConflictError,
    InvalidMetadataError,
    MessagingFailureError,
    RiskfleetError,
    TenantIsolationError,
)
from contracts.lifecycle import Status
from contracts.messages import stage_message
from contracts.outcomes import STATUS_OF, Outcome
from contracts.ports import (
    Clock,
    Confirm,
    DecisionRow,
    Ids,
    Ledger,
    Publisher,
    Reservation,
    Reserved,
    StateStore,
    Telemetry,
)
from contracts.state import begin
from contracts.telemetry import REQUEST_SECONDS, REQUESTS, Correlation, Measurement, bind_correlation
from contracts.tenancy import TenantScope
from contracts.topology import Stage
from gateway.gathering import Gathered
from gateway.parsing import parse_json
from gateway.refusals import RefusalLog

Door = Literal["http", "amqp"]

MAX_IDENTITY = 256
_CORRELATION_ID = re.compile(r"[\x20-\x7e]{1,128}")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_NOT_CONFIRMED = {
    Confirm.UNKNOWN: "RabbitMQ did not confirm the event in time; repeat with the same identity",
    Confirm.REFUSED: "the queue for this tenant is full; repeat later with the same identity",
    Confirm.UNROUTABLE: "the event's queue does not exist: an operator must run `riskfleet topology apply`",
}


@dataclass(frozen=True, slots=True)
class Submission:
    """One event as a door received it. `scope` comes from the credential; `kind` from the path, if it names one.

    `identity_header`: Idempotency-Key or AMQP message_id. Only a single HTTP POST may have its identity made.
    """

    scope: TenantScope
    kind: str | None
    body: bytes
    identity_header: str | None
    correlation_id: str | None
    traceparent: str | None
    source: Door
    reply_to: str | None = None
    allow_generated_identity: bool = False


@dataclass(frozen=True, slots=True)
class Admission:
    """The event is accepted. `decision` is set on a repeat of an event that is already decided."""

    event_id: str
    identity: str
    kind: str
    status: Status
    correlation_id: str
    replayed: bool = False
    decision: DecisionRow | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The event is not known to be accepted. `event_id` and `identity` are set once they are known."""

    error: RiskfleetError
    event_id: str | None = None
    identity: str | None = None


@dataclass(frozen=True, slots=True)
class IntakePorts:
    """What an intake needs from outside."""

    state_store: StateStore
    publisher: Publisher
    ledger: Ledger
    telemetry: Telemetry
    clock: Clock
    ids: Ids


def correlation_of(correlation_id: str | None, traceparent: str | None, ids: Ids) -> Correlation:
    """What a sender's ids become: each is taken when it is usable, else made.

    Usable: 1–128 printable ASCII characters, and the W3C Trace Context pattern.
    """
    usable = correlation_id is not None and _CORRELATION_ID.fullmatch(correlation_id)
    traced = traceparent is not None and _TRACEPARENT.fullmatch(traceparent)
    return Correlation(
        correlation_id=correlation_id if usable else ids.uuid7(),
        traceparent=traceparent if traced else f"00-{ids.token()}-{ids.token()[-16:]}-01",
    )


class Intake:
    """`admit` for both doors."""

    def __init__(self, ports: IntakePorts, refusals: RefusalLog, partitions: int) -> None:
        self._ports = ports
        self._refusals = refusals
        self._partitions = partitions
        self._reservations: Gathered[Entry, Reservation] = Gathered(ports.state_store.reserve)
        self._decisions: Gathered[tuple[TenantScope, str], DecisionRow | None] = Gathered(ports.ledger.decisions)

    async def admit(self, submission: Submission) -> Admission | Refusal:
        """Accept one event durably, or say why not. Raises nothing of ours: a RiskfleetError becomes a Refusal."""
        started = self._ports.clock.monotonic()
        correlation = replace(
            correlation_of(submission.correlation_id, submission.traceparent, self._ports.ids),
            tenant=submission.scope.tenant_id,
        )
        verdict: Admission | Refusal
        identity: str | None = None
        event_id: str | None = None
        with bind_correlation(correlation):
            try:
                event = self._event(submission)
                identity = self._identity(submission, event)
                event_id = event_id_of(submission.scope, identity)
                with bind_correlation(replace(correlation, event_id=event_id)):
                    verdict = await self._accept(submission, event, identity, event_id, correlation)
            except RiskfleetError as error:
                self._refusals.note(submission.scope, error, submission.source)
                verdict = Refusal(error, event_id, identity)
        self._measure(submission.source, verdict, self._ports.clock.monotonic() - started)
        return verdict

    def _event(self, submission: Submission) -> Event:
        document = parse_json(submission.body)
        if submission.kind is not None and isinstance(document, dict):
            document.setdefault("kind", submission.kind)
        event = parse_event(document)
        if submission.kind is not None and event.kind != submission.kind:
            raise DomainValidationError(
                "the event's kind is not the one that it was sent as",
                pointers=(("/kind", f"must be {submission.kind} here, or left out"),),
            )
        if event.tenant_id is not None and event.tenant_id != submission.scope.tenant_id:
            raise TenantIsolationError(pointers=(("/tenant_id", "must be the caller's own, or left out"),))
        return event

    def _identity(self, submission: Submission, event: Event) -> str:
        header = submission.identity_header
        if header is not None and not (1 <= len(header) <= MAX_IDENTITY and header.isprintable()):
            raise InvalidMetadataError(f"an identity has 1 to {MAX_IDENTITY} printable characters")
        if event.id is not None and header is not None and event.id != header:
            raise DomainValidationError(
                "the submission has two different identities",
                pointers=(("/id", "must equal the Idempotency-Key or message_id when both are sent"),),
            )
        identity = event.id if event.id is not None else header
        if identity is not None:
            return identity
        if not submission.allow_generated_identity:
            raise DomainValidationError(
                "the submission has no identity", pointers=(("/id", "is required unless a message_id is sent"),)
            )
        return self._ports.ids.uuid7()

    async def _accept(
        self, submission: Submission, event: Event, identity: str, event_id: str, correlation: Correlation
    ) -> Admission:
        state = begin(
            submission.scope,
            event_id,
            event,
            received_at=rfc3339(self._ports.clock.now()),
            source=submission.source,
            correlation_id=correlation.correlation_id or "",
            traceparent=correlation.traceparent,
        )
        entry = entry_of(state, Stage.RETRIEVAL, submission.reply_to)
        reservation = await self._reservations.one(entry)
        if reservation.verdict is Reserved.CONFLICT:
            raise IdempotencyConflictError
        admission = Admission(
            event_id,
            identity,
            event.kind,
            Status.RECEIVED,
            state.correlation_id,
            reservation.verdict is Reserved.REPEAT,
        )
        if reservation.verdict is Reserved.REPEAT and (reservation.version > 0 or reservation.stored is None):
            return await self._repeat(submission.scope, state.body_digest, admission)
        if reservation.stored is not None and reservation.stored != entry.body:
            # The reservation is version 0: its bytes go out again, not those that this repeat would make.
            entry = entry_of(state_from_bytes(reservation.stored), Stage.RETRIEVAL, submission.reply_to)
        await self._publish(entry)
        return admission

    async def _repeat(self, scope: TenantScope, body_digest: str, admission: Admission) -> Admission:
        row = await self._decisions.one((scope, admission.event_id))
        if row is None:
            return admission
        if row.body_digest != body_digest:  # Redis forgot who owns the identity; PostgreSQL did not
            raise IdempotencyConflictError
        return replace(admission, status=STATUS_OF[Outcome(row.outcome)], decision=row)

    async def _publish(self, entry: Entry) -> None:
        (confirm,) = await self._ports.publisher.publish((stage_message(entry, self._partitions),))
        if confirm is not Confirm.CONFIRMED:
            raise MessagingFailureError(_NOT_CONFIRMED[confirm])

    def _measure(self, door: Door, verdict: Admission | Refusal, seconds: float) -> None:
        self._ports.telemetry.record(Measurement(REQUEST_SECONDS, seconds, {"door": door}))
        if isinstance(verdict, Admission):  # a refusal was counted by its problem
            result = "replayed" if verdict.replayed else "accepted"
            self._ports.telemetry.record(Measurement(REQUESTS, labels={"door": door, "result": result}))


def rfc3339(moment: datetime) -> str:
    """An aware UTC datetime as RFC 3339 with microseconds and `Z`."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
