"""One way in for both doors: parse, validate, isolate, identify, reserve, publish, answer.

Promises: an `Admission` that is not a repeat means that the broker confirmed exactly one message for the
event; everything else is a `Refusal` that names the event once its identity is known. Repeating a
submission with the same identity is always safe. A CloudEvent and an item of a batch are admitted like any other
event. Nothing here authenticates or speaks a transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, Literal

import structlog

from contracts.codec import Entry, carriers, entry_of, state_from_bytes
from contracts.events import Event, body_digest_of, event_id_of, parse_event
from contracts.failures import (
    DomainValidationError,
    IdempotencyConflictError,
    InfrastructureError,
    InvalidMetadataError,
    LimitExceededError,
    MessagingFailureError,
    QueueFullError,
    RiskfleetError,
    TenantIsolationError,
    UndecidedLimitError,
    UnexpectedError,
    fingerprint,
)
from contracts.lifecycle import Status
from contracts.limits import NO_LIMITS, TenantLimits
from contracts.messages import stage_messages
from contracts.outcomes import STATUS_OF, Outcome
from contracts.ports import (
    Clock,
    Confirm,
    DecisionRow,
    Directory,
    Ids,
    Leaving,
    Ledger,
    Publisher,
    Reservation,
    Reserved,
    StateStore,
    Telemetry,
    TenantProfile,
)
from contracts.state import begin
from contracts.telemetry import (
    LIMITER_REFUSALS,
    REQUEST_SECONDS,
    REQUESTS,
    Correlation,
    Measurement,
    bind_correlation,
    current_correlation,
)
from contracts.tenancy import TenantScope
from contracts.topology import RunningLayouts, Stage
from gateway.cloudevents import Envelope, from_headers, from_structured
from gateway.gathering import Gathered
from gateway.parsing import parse_json
from gateway.refusals import RefusalLog

Door = Literal["http", "amqp"]

log = structlog.get_logger(__name__)

MAX_IDENTITY = 256
ITEM_SEPARATOR: Final = "\x1f"
"""Stands between a batch's key and an item's index in the identity of an item that names none.

No key, message id or `id` may hold it, so an item's identity is never that of anything else.
"""

_UNOPENED: Final = Envelope(None)
_ABREAST: Final = 64  # items of one batch under way at once: as many as one reservation takes
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

    `identity_header`: Idempotency-Key or AMQP message_id; not looked at for a CloudEvent, which names itself. Only a
    single HTTP POST may have its identity made.
    `correlation_id` and `traceparent` are the sender's own, or None: then a CloudEvent's, else the bound ones, hold.
    A CloudEvent is either `structured`, or has its `attributes` beside the body (binary mode).
    `fallback_identity` is used when the event names none in any other way.
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
    structured: bool = False
    attributes: Mapping[str, str] | None = None
    fallback_identity: str | None = None


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
class Foreseen:
    """The identity that a submission brings (None: one would be made, if at all) and the digest of its event."""

    identity: str | None
    body_digest: str


@dataclass(frozen=True, slots=True)
class IntakePorts:
    """What an intake needs from outside; `directory` tells the tenants' limits, without it there are none."""

    state_store: StateStore
    publisher: Publisher
    ledger: Ledger
    telemetry: Telemetry
    clock: Clock
    ids: Ids
    directory: Directory | None = None


def correlation_of(correlation_id: str | None, traceparent: str | None, ids: Ids) -> Correlation:
    """What a sender's ids become: each is taken when it is usable, else made.

    Usable: 1–128 printable ASCII characters, and the W3C Trace Context pattern.
    """
    return Correlation(
        correlation_id=_usable(_CORRELATION_ID, correlation_id) or ids.uuid7(),
        traceparent=_usable(_TRACEPARENT, traceparent) or f"00-{ids.token()}-{ids.token()[-16:]}-01",
    )


class Intake:
    """`admit` for both doors."""

    def __init__(self, ports: IntakePorts, refusals: RefusalLog, layouts: RunningLayouts) -> None:
        self._ports = ports
        self._refusals = refusals
        self._layouts = layouts
        # By queue: one that does not answer must not hold up the others.
        self._publishing: dict[str, Gathered[Entry, Confirm]] = {}
        self._reservations: Gathered[Entry, Reservation] = Gathered(self._reserve)
        self._profiles: Sequence[TenantProfile] = ()
        self._limits: dict[TenantScope, TenantLimits] = {}
        self._decisions: Gathered[tuple[TenantScope, str], DecisionRow | None] = Gathered(ports.ledger.decisions)

    async def admit(self, submission: Submission) -> Admission | Refusal:
        """Accept one event durably, or say why not. Raises nothing of ours: a RiskfleetError becomes a Refusal."""
        started = self._ports.clock.monotonic()
        with bind_correlation(self._correlation(submission)):
            verdict = await self._verdict(submission)
        self._measure(submission.source, verdict, self._ports.clock.monotonic() - started)
        return verdict

    async def admit_batch(
        self, items: Sequence[bytes | RiskfleetError], template: Submission
    ) -> list[Admission | Refusal]:
        """Admit each item as `template` with another body; one answer per item, in order, whatever the others' are.

        An item that is an error already is refused with it. The template's identity is the key of the batch: item i
        without an identity of its own gets (key, i), as `item_identity` writes it, so that sending the batch again
        with the same key is a repeat; without a key it is refused. Of two items with one identity the first wins.
        """
        abreast = asyncio.Semaphore(_ABREAST)  # in order: of two items with one identity the first is reserved first

        async def one(index: int, item: bytes | RiskfleetError) -> Admission | Refusal:
            async with abreast:
                try:
                    return await self._item(item, index, template)
                except Exception as error:  # noqa: BLE001 - a defect in one item must not take its neighbours along
                    log.error("admission_defect", exception_class=type(error).__name__, fingerprint=fingerprint(error))
                    return self._refused(template, UnexpectedError())

        return list(await asyncio.gather(*(one(index, item) for index, item in enumerate(items))))

    async def _item(self, item: bytes | RiskfleetError, index: int, template: Submission) -> Admission | Refusal:
        if isinstance(item, RiskfleetError):
            return self._refused(template, item)
        key = template.identity_header
        if key is not None and not _is_key(key):
            return self._refused(template, _unusable_key())
        return await self.admit(
            replace(
                template,
                body=item,
                identity_header=None,
                fallback_identity=None if key is None else item_identity(key, index),
                allow_generated_identity=False,
            )
        )

    def _refused(self, submission: Submission, error: RiskfleetError) -> Refusal:
        """The refusal of what is not admitted at all, counted like any other."""
        self._refusals.note(submission.scope, error, submission.source)
        refusal = Refusal(error)
        self._measure(submission.source, refusal, 0.0)
        return refusal

    async def _reserve(self, entries: Sequence[Entry]) -> Sequence[Reservation]:
        limits = await self._tenant_limits()
        return await self._ports.state_store.reserve(entries, [limits.get(e.header.scope, NO_LIMITS) for e in entries])

    async def _tenant_limits(self) -> Mapping[TenantScope, TenantLimits]:
        """What each tenant may hand in; while the directory does not answer, as it last said."""
        if self._ports.directory is None:
            return {}
        try:
            profiles = await self._ports.directory.tenants()
        except InfrastructureError:
            if not self._profiles:
                raise
            return self._limits
        if profiles is not self._profiles:
            self._profiles = profiles
            self._limits = {profile.scope: profile.limits for profile in profiles}
        return self._limits

    async def _verdict(self, submission: Submission) -> Admission | Refusal:
        envelope = _UNOPENED
        identity: str | None = None
        event_id: str | None = None
        try:
            envelope = _opened(submission)
            event = _event(submission, envelope.event)
            identity = _identity(submission, envelope, event) or self._generated(submission)
            event_id = event_id_of(submission.scope, identity)
            if event.corrects == event_id:
                raise DomainValidationError(
                    "an event cannot correct itself",
                    pointers=(("/corrects", "must be the event_id of an earlier event"),),
                )
            correlation = replace(self._correlation(submission, envelope), event_id=event_id)
            with bind_correlation(correlation):
                return await self._accept(submission, event, identity, event_id, correlation)
        except RiskfleetError as error:
            if error.pointers:
                error.pointers = envelope.placed(error.pointers)
            # At the AMQP door it is no refusal: the delivery waits.
            if submission.source == "http" or not isinstance(error, LimitExceededError):
                self._refusals.note(submission.scope, error, submission.source)
            return Refusal(error, event_id, identity)

    def _generated(self, submission: Submission) -> str:
        if not submission.allow_generated_identity:
            raise DomainValidationError(
                "the submission has no identity",
                pointers=(("/id", "is required unless an Idempotency-Key or a message_id is sent"),),
            )
        return self._ports.ids.uuid7()

    def _correlation(self, submission: Submission, envelope: Envelope = _UNOPENED) -> Correlation:
        bound = current_correlation()
        return replace(
            correlation_of(
                _usable(_CORRELATION_ID, submission.correlation_id, envelope.correlation_id) or bound.correlation_id,
                _usable(_TRACEPARENT, submission.traceparent, envelope.traceparent) or bound.traceparent,
                self._ports.ids,
            ),
            tenant=submission.scope.tenant_id,
        )

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
        admission = Admission(
            event_id,
            identity,
            event.kind,
            Status.RECEIVED,
            state.correlation_id,
            reservation.verdict is not Reserved.NEW,
        )
        if reservation.verdict is Reserved.FULL:
            raise UndecidedLimitError
        if reservation.verdict is Reserved.LIMITED:
            labels = {"limit": "submit", "tenant": submission.scope.tenant_id}
            self._ports.telemetry.record(Measurement(LIMITER_REFUSALS, labels=labels))
            raise LimitExceededError(
                "the tenant hands in new events faster than its rate; repeat after Retry-After with the same identity",
                retry_after_s=reservation.wait_ms / 1000,
            )
        if reservation.verdict is Reserved.CONFLICT:
            # After Redis forgot, another body may have reserved what this one was decided under.
            repeat = await self._repeat(submission.scope, state.body_digest, admission)
            if repeat.decision is None:
                raise IdempotencyConflictError
            return repeat
        if reservation.verdict is Reserved.REPEAT and (reservation.version > 0 or reservation.stored is None):
            return await self._repeat(submission.scope, state.body_digest, admission)
        if reservation.stored is not None and reservation.stored != entry.body:
            # The reservation is version 0: its bytes go out again, not those that this repeat would make.
            entry = entry_of(state_from_bytes(reservation.stored), Stage.RETRIEVAL, submission.reply_to)
        await self._publish(entry.evolve(topology=self._layouts.newest.version))
        return admission

    async def _repeat(self, scope: TenantScope, body_digest: str, admission: Admission) -> Admission:
        row = await self._decisions.one((scope, admission.event_id))
        if row is None:
            return admission
        if row.body_digest != body_digest:  # Redis forgot who owns the identity; PostgreSQL did not
            raise IdempotencyConflictError
        return replace(admission, status=STATUS_OF[Outcome(row.outcome)], decision=row)

    async def _publish(self, entry: Entry) -> None:
        queue = self._layouts.of(entry.header.topology).stage_queue(entry.header.stage, entry.header.scope)
        confirm = await self._publishing.setdefault(queue, Gathered(self._publish_carriers)).one(entry)
        if confirm is not Confirm.CONFIRMED:
            await self._forgo(entry)
            failure = QueueFullError if confirm is Confirm.REFUSED else MessagingFailureError
            raise failure(_NOT_CONFIRMED[confirm])

    async def _publish_carriers(self, entries: Sequence[Entry]) -> list[Confirm]:
        """Entries of one queue, as few messages as they need; each shares its carrier's confirm."""
        confirms = await self._ports.publisher.publish(stage_messages(entries, self._layouts))
        return [confirm for group, confirm in zip(carriers(entries), confirms, strict=True) for _ in group]

    async def _forgo(self, entry: Entry) -> None:
        """What is not known to be accepted takes no room; should it have arrived all the same, its claim counts it."""
        h = entry.header
        with contextlib.suppress(InfrastructureError):
            await self._ports.state_store.release((), [Leaving(h.scope, h.event, h.n, h.body_digest)])

    def _measure(self, door: Door, verdict: Admission | Refusal, seconds: float) -> None:
        self._ports.telemetry.record(Measurement(REQUEST_SECONDS, seconds, {"door": door}))
        if isinstance(verdict, Admission):  # a refusal was counted by its problem
            result = "replayed" if verdict.replayed else "accepted"
            self._ports.telemetry.record(Measurement(REQUESTS, labels={"door": door, "result": result}))


def item_identity(key: str, index: int) -> str:
    """The identity of item `index` (from 0) of a batch sent with this key, when the item names none."""
    return f"{key}{ITEM_SEPARATOR}{index}"


def foresee(submission: Submission) -> Foreseen | None:
    """What `admit` would make of a submission, for a caller who must know it before; None: it would be refused."""
    try:
        envelope = _opened(submission)
        event = _event(submission, envelope.event)
        return Foreseen(_identity(submission, envelope, event), body_digest_of(event.canonical_bytes()))
    except RiskfleetError:
        return None


def _opened(submission: Submission) -> Envelope:
    if submission.attributes is not None:
        return from_headers(submission.attributes, submission.body)
    document = parse_json(submission.body)
    return from_structured(document) if submission.structured else Envelope(document)


def _event(submission: Submission, document: Any) -> Event:
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


def _identity(submission: Submission, envelope: Envelope, event: Event) -> str | None:
    # A CloudEvent names itself. Its message_id or Idempotency-Key is its transport's, and another one at each door.
    header = submission.identity_header if envelope.identity is None else None
    if header is not None and not _is_key(header):
        raise _unusable_key()
    if event.id is not None and header is not None and event.id != header:
        raise DomainValidationError(
            "the submission has two different identities",
            pointers=(("/id", "must equal the Idempotency-Key or message_id when both are sent"),),
        )
    if event.id is not None and ITEM_SEPARATOR in event.id:
        raise DomainValidationError(
            "the event's id cannot be used", pointers=(("/id", "must not hold U+001F, the unit separator"),)
        )
    identity = next((name for name in (event.id, header, envelope.identity) if name is not None), None)
    if identity is None:
        return submission.fallback_identity
    if len(identity) > MAX_IDENTITY:  # a CloudEvent's source and id; the others are as short already
        raise InvalidMetadataError(
            f"a CloudEvent's source and id have at most {MAX_IDENTITY - 1} characters together; give the event an id"
        )
    return identity


def _is_key(name: str) -> bool:
    return 1 <= len(name) <= MAX_IDENTITY and name.isprintable()


def _unusable_key() -> InvalidMetadataError:
    return InvalidMetadataError(f"an identity has 1 to {MAX_IDENTITY} printable characters")


def _usable(pattern: re.Pattern[str], *candidates: str | None) -> str | None:
    return next((one for one in candidates if one is not None and pattern.fullmatch(one)), None)


def rfc3339(moment: datetime) -> str:
    """An aware UTC datetime as RFC 3339 with microseconds and `Z`."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
