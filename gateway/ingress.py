"""The AMQP door, without its transport: deliveries of the ingest queues in, settlements out.

Promises: a delivery is acked only after what it owes is confirmed: the event's message, the repeated
decision, the problem document and its audit record, or its dead letter. A queue that is full holds up
only what is for it, and a tenant that has too many events under way waits in its own queue. The tenant is
the one of the broker user that RabbitMQ itself verified (`user_id`), never one that the message names. A
delivery that nothing can process is parked after three tries, so it never blocks the queue. A delivery is an
event, a CloudEvent (binary or structured), a batch of CloudEvents, which is acked when all of it has
settled, or a label. Nothing here connects, consumes or acks.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import Final, Literal

import structlog

from contracts.events import Kind
from contracts.failures import (
    AuthenticationError,
    Category,
    DomainValidationError,
    InfrastructureError,
    LimitExceededError,
    MessagingFailureError,
    QueueFullError,
    RiskfleetError,
    TenantIsolationError,
    UnsupportedMediaTypeError,
    classify,
    fingerprint,
    problem_document,
)
from contracts.messages import arrived, decision_message, delivery_message, parked_message, rejection_message
from contracts.ports import Clock, Confirm, DeadLetter, Delivery, Directory, Ids, Message, Pauses, Publisher
from contracts.settlement import Ack, Hold, Pause, Settlement
from contracts.telemetry import bind_correlation, current_correlation
from contracts.tenancy import TenantScope
from contracts.topology import DECISIONS, REJECTED
from gateway.batch import split_json_array
from gateway.cloudevents import BATCH, STRUCTURED, amqp_attributes
from gateway.intake import Admission, Intake, Refusal, Submission, correlation_of, rfc3339
from gateway.labelling import LabelAdmission, LabelDesk
from gateway.parsing import is_json
from gateway.refusals import RefusalLog

log = structlog.get_logger(__name__)

TRIES = 3
MAX_DELIVERIES = 20  # the same last net as the stage queues have by policy
LABEL: Final = "label"
_DELIVERY_WAIT_MS: Final = 1_000
_LEAST_WAIT_S, _MOST_WAIT_S = 0.05, 5.0  # a queue that waits costs little, and a limit that was raised holds soon
_AUDIT_WAIT_S: Final = 0.5
_FULL_WAIT_S: Final = 2.0
_PAUSED_WAIT_S: Final = 2.0
_MOST_UNAUDITED: Final = 10_000

Verdict = Admission | LabelAdmission | Refusal


class Ingress:
    """`handle` for the consumer of the ingest queues."""

    def __init__(
        self,
        intake: Intake,
        labels: LabelDesk,
        directory: Directory,
        publisher: Publisher,
        refusals: RefusalLog,
        clock: Clock,
        ids: Ids,
        pauses: Pauses | None = None,
    ) -> None:
        self._intake = intake
        self._labels = labels
        self._directory = directory
        self._publisher = publisher
        self._refusals = refusals
        self._clock = clock
        self._ids = ids
        self._pauses = pauses
        self._unaudited: dict[int, tuple[Delivery, datetime]] = {}

    async def handle(self, deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        """One settlement per delivery, in order. Pause means: a server does not answer, nothing was lost.

        Hold means that this delivery alone waits: its tenant is paused, its tenant's partition is full, or its refusal
        is not audited yet.
        """
        try:
            profiles = await self._directory.tenants()
            paused = await self._paused([profile.scope for profile in profiles if profile.broker_user])
        except InfrastructureError as error:
            return [Pause(error.detail)] * len(deliveries)
        users = {profile.broker_user: profile.scope for profile in profiles if profile.broker_user}
        return await asyncio.gather(*(self._settle(delivery, users, paused) for delivery in deliveries))

    async def _paused(self, scopes: Sequence[TenantScope]) -> AbstractSet[TenantScope]:
        if self._pauses is None:
            return frozenset()
        notices = await self._pauses.doors(scopes)
        return {scope for scope, notice in zip(scopes, notices, strict=True) if notice is not None}

    async def _settle(
        self, delivery: Delivery, users: Mapping[str, TenantScope], paused: AbstractSet[TenantScope]
    ) -> Settlement:
        waiting = self._unaudited.get(id(delivery))
        if waiting is not None and waiting[0] is delivery:  # answered already, and given again as the same object
            return self._once_audited(*waiting)
        scope = users.get(delivery.user_id) if delivery.user_id else None
        if scope in paused:  # before anything is looked at: no try is counted
            return Hold("the tenant is paused", _PAUSED_WAIT_S)
        with bind_correlation(correlation_of(delivery.correlation_id, _traceparent(delivery), self._ids)):
            try:
                if delivered_too_often(delivery):
                    return await self._park(delivery, scope, None, rfc3339(self._clock.now()))
                return await self._try(delivery, scope)
            except QueueFullError as error:
                return Hold(error.detail, _FULL_WAIT_S)
            except InfrastructureError as error:
                return Pause(error.detail)
            except Exception as error:  # noqa: BLE001 - not even parking worked: keep the delivery, and its neighbours
                log.error("ingress_defect", exception_class=type(error).__name__, fingerprint=fingerprint(error))
                return Pause("a defect kept a delivery from being parked")

    async def _try(self, delivery: Delivery, scope: TenantScope | None) -> Settlement:
        """Up to three tries at once: what fails three times in a row is a defect, and waiting would block the queue."""
        first_failed_at: str | None = None
        failure: Exception | None = None
        for _ in range(TRIES):
            try:
                return await self._once(delivery, scope)
            except InfrastructureError:
                raise
            except Exception as error:  # noqa: BLE001 - a defect: parked with its class and place below
                failure = error
                first_failed_at = first_failed_at or rfc3339(self._clock.now())
        return await self._park(delivery, scope, failure, first_failed_at or "")

    async def _once(self, delivery: Delivery, scope: TenantScope | None) -> Settlement:
        if scope is None:
            # Nobody to answer: the broker verified no user that belongs to a tenant.
            self._refusals.note(None, AuthenticationError("no broker user of a tenant sent this"), "amqp")
            return self._once_audited(delivery, self._refusals.mark())
        verdicts: Sequence[Verdict]
        numbered = False
        try:
            verdicts = await self._verdicts(delivery, scope, check_envelope(delivery, scope))
            numbered = _media_type(delivery) == BATCH
        except RiskfleetError as error:
            self._refusals.note(scope, error, "amqp")
            verdicts = [Refusal(error)]
        return await self._settled(delivery, scope, verdicts, numbered=numbered)

    async def _verdicts(
        self, delivery: Delivery, scope: TenantScope, subject: Kind | Literal["label"]
    ) -> Sequence[Verdict]:
        """One per event of the delivery, in order. Raises what refuses the delivery as a whole."""
        if subject == LABEL:
            return [await self._labels.accept(scope, delivery.body, "amqp")]
        media_type = _media_type(delivery)
        structured = media_type in (STRUCTURED, BATCH)
        submission = Submission(
            scope=scope,
            kind=subject,
            body=delivery.body,
            identity_header=delivery.message_id,
            correlation_id=delivery.correlation_id,
            traceparent=_traceparent(delivery),
            source="amqp",
            structured=structured,
            attributes=None if structured else amqp_attributes(delivery.headers),
        )
        if media_type == BATCH:
            return await self._intake.admit_batch(split_json_array(delivery.body), submission)
        return [await self._intake.admit(submission)]

    async def _settled(
        self, delivery: Delivery, scope: TenantScope, verdicts: Sequence[Verdict], *, numbered: bool
    ) -> Settlement:
        """Ack once everything that the verdicts owe is confirmed; `numbered`: they are the items of a batch."""
        owed: dict[str, Message] = {}
        undecided: RiskfleetError | None = None
        limit: LimitExceededError | None = None
        for index, verdict in enumerate(verdicts):
            if isinstance(verdict, Refusal):
                if isinstance(verdict.error, LimitExceededError):
                    limit = limit or verdict.error
                    continue
                if classify(verdict.error).status >= 500:
                    # A server that is away comes before a defect: it must not have its neighbours parked.
                    if undecided is None or isinstance(verdict.error, InfrastructureError):
                        undecided = verdict.error
                    continue
                message = _rejection(delivery, scope, verdict, index if numbered else None)
            elif isinstance(verdict, Admission) and verdict.decision is not None:
                # The sender repeats, so it may have missed the answer: the stored bytes again, under the same id.
                message = decision_message(scope, verdict.kind, verdict.decision, verdict.correlation_id)
            else:
                continue
            owed[message.message_id] = message
        await self._publish(*owed.values())
        if undecided is not None:
            # Infrastructure pauses, anything else is tried again and parked. What was answered is answered again then.
            raise undecided
        # Never refused here, only taken later. What else the delivery held is a repeat then, and harmless.
        if limit is not None:
            return Hold(classify(limit).problem, min(max(limit.retry_after_s, _LEAST_WAIT_S), _MOST_WAIT_S))
        if any(isinstance(verdict, Refusal) for verdict in verdicts):
            return self._once_audited(delivery, self._refusals.mark())
        return Ack()

    def _once_audited(self, delivery: Delivery, mark: datetime) -> Settlement:
        """Ack once the record that counts a refusal is confirmed; its second has to end first, and holds up nobody."""
        if self._refusals.audited(mark):
            self._unaudited.pop(id(delivery), None)
            return Ack()
        if len(self._unaudited) >= _MOST_UNAUDITED:  # of lost connections, whose deliveries come as others
            self._unaudited.pop(next(iter(self._unaudited)))
        self._unaudited[id(delivery)] = (delivery, mark)
        return Hold("the refusal is not in the audit yet", _AUDIT_WAIT_S)

    async def _park(
        self, delivery: Delivery, scope: TenantScope | None, failure: Exception | None, first_failed_at: str
    ) -> Settlement:
        """The delivery as it is, with why; `failure` None: the broker delivered it too often to try once more."""
        row = classify(failure) if failure else None
        letter = DeadLetter(
            letter_id=f"ingress:{delivery_digest(delivery, scope)}:{TRIES if failure else MAX_DELIVERIES}",
            scope=scope,
            event_id="",
            stage="ingress",
            category=str(row.category if row else Category.WORKFLOW_ERROR),
            problem=row.problem if row else "delivery-limit",
            exception_class=type(failure).__name__ if failure else "",
            fingerprint=fingerprint(failure) if failure else "delivery-limit",
            attempts=TRIES if failure else MAX_DELIVERIES,
            first_failed_at=first_failed_at,
            last_failed_at=rfc3339(self._clock.now()),
            body=delivery.body,
        )
        log.error(
            "submission_parked",
            queue=delivery.queue,
            problem=letter.problem,
            exception_class=letter.exception_class,
            fingerprint=letter.fingerprint,
        )
        await self._publish(parked_message(letter, "ingress"))
        return Ack()

    async def _publish(self, *messages: Message) -> None:
        """Raises MessagingFailureError unless all are confirmed; unroutable is success where nobody has to listen.

        What a tenant's queue refuses goes round the delivery ladder: it must not pause the door for all others.
        """
        if not messages:
            return
        answers = list(zip(messages, await self._publisher.publish(messages), strict=True))
        refused = [m for m, confirm in answers if confirm is Confirm.REFUSED and m.exchange in (DECISIONS, REJECTED)]
        if not all(arrived(message, confirm) or message in refused for message, confirm in answers):
            raise MessagingFailureError
        rounds = [delivery_message(message, 1, _DELIVERY_WAIT_MS) for message in refused]
        confirms = await self._publisher.publish(rounds) if rounds else ()
        # A ladder that is full refuses too: decisions are in the feed, and a rejection has its audit record.
        full = sum(confirm is Confirm.REFUSED for confirm in confirms)
        if not all(confirm in (Confirm.CONFIRMED, Confirm.REFUSED) for confirm in confirms):
            raise MessagingFailureError
        if full:
            log.warning("submission_answer_left", count=full)


def check_envelope(delivery: Delivery, scope: TenantScope) -> Kind | Literal["label"]:
    """What a delivery's routing key names: a kind of event, or a label.

    Raises TenantIsolationError for another tenant's key, DomainValidationError for another word, and
    UnsupportedMediaTypeError for a content type that is named and is not JSON, or not plain JSON for a label.
    """
    tenant, _, subject = delivery.routing_key.partition(".")
    if tenant != scope.tenant_id:
        raise TenantIsolationError("the routing key names a tenant that is not the broker user's")
    if subject not in (*Kind, LABEL):
        raise DomainValidationError(
            "the routing key names neither a kind of event nor a label",
            pointers=(("/kind", "must be risk or compliance"),),
        )
    if delivery.content_type and not is_json(delivery.content_type):
        raise UnsupportedMediaTypeError
    if subject != LABEL:
        return Kind(subject)
    if _media_type(delivery) in (STRUCTURED, BATCH):
        raise UnsupportedMediaTypeError("a label is not sent as a CloudEvent; send application/json")
    return LABEL


def _media_type(delivery: Delivery) -> str:
    return (delivery.content_type or "").partition(";")[0].strip().lower()


def _traceparent(delivery: Delivery) -> str | None:
    value = delivery.headers.get("traceparent")
    return value if isinstance(value, str) else None


def _rejection(delivery: Delivery, scope: TenantScope, refusal: Refusal, item: int | None) -> Message:
    """The problem document; `item` is the refused event's place (from 0) in a batch."""
    correlation_id = current_correlation().correlation_id
    document = problem_document(
        refusal.error,
        message_id=delivery.message_id,
        item=item,
        event_id=refusal.event_id,
        id=refusal.identity,
        correlation_id=correlation_id,
    )
    words = (classify(refusal.error).problem, *(() if item is None else (str(item),)))
    name = delivery_digest(delivery, scope, *words)
    return rejection_message(scope, document, message_id=f"rejected:{name}", correlation_id=correlation_id)


def delivered_too_often(delivery: Delivery) -> bool:
    """Whether quorum queues counted 20 returns: its holders die, so it is not tried once more.

    Only believed on a redelivery: on the first one the header would be the sender's.
    """
    count = delivery.headers.get("x-delivery-count", 0)
    return delivery.redelivered and isinstance(count, int) and count >= MAX_DELIVERIES


def delivery_digest(delivery: Delivery, scope: TenantScope | None, *words: str) -> str:
    """32 hex digits over tenant, message id and body: the same for every delivery of one message."""
    tenant = scope.tenant_id if scope else ""
    head = "\0".join((tenant, delivery.message_id or "", *words)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(head + b"\0\0" + delivery.body).hexdigest()[:32]
