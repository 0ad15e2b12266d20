"""The AMQP door, without its transport: deliveries of the ingest queues in, settlements out.

Promises: a delivery is acked only after what it owes is confirmed: the event's message, the repeated
decision, the problem document, or its dead letter. The tenant is the one of the broker user that RabbitMQ
itself verified (`user_id`), never one that the message names. A delivery that nothing can process is parked
after three tries, so it never blocks the queue. Nothing here connects, consumes or acks.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping, Sequence

import structlog

from contracts.events import Kind
from contracts.failures import (
    AuthenticationError,
    Category,
    DomainValidationError,
    InfrastructureError,
    MessagingFailureError,
    RiskfleetError,
    TenantIsolationError,
    UnsupportedMediaTypeError,
    classify,
    fingerprint,
    problem_document,
)
from contracts.messages import decision_message, parked_message, rejection_message
from contracts.ports import Clock, Confirm, DeadLetter, Delivery, Directory, Ids, Message, Publisher
from contracts.settlement import Ack, Pause, Settlement
from contracts.telemetry import bind_correlation, current_correlation
from contracts.tenancy import TenantScope
from gateway.intake import Admission, Intake, Refusal, Submission, correlation_of, rfc3339
from gateway.refusals import RefusalLog

log = structlog.get_logger(__name__)

TRIES = 3
MAX_DELIVERIES = 20  # the same last net as the stage queues have by policy
_MEDIA_TYPE = re.compile(r"application/(?:[!#$&^_.+a-z0-9-]+\+)?json(?:\s*;.*)?", re.IGNORECASE)


class Ingress:
    """`handle` for the consumer of the ingest queues."""

    def __init__(
        self, intake: Intake, directory: Directory, publisher: Publisher, refusals: RefusalLog, clock: Clock, ids: Ids
    ) -> None:
        self._intake = intake
        self._directory = directory
        self._publisher = publisher
        self._refusals = refusals
        self._clock = clock
        self._ids = ids

    async def handle(self, deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        """One settlement per delivery, in order. Pause means: a server does not answer, nothing was lost."""
        try:
            profiles = await self._directory.tenants()
        except InfrastructureError as error:
            return [Pause(error.detail)] * len(deliveries)
        users = {profile.broker_user: profile.scope for profile in profiles if profile.broker_user}
        return await asyncio.gather(*(self._settle(delivery, users) for delivery in deliveries))

    async def _settle(self, delivery: Delivery, users: Mapping[str, TenantScope]) -> Settlement:
        scope = users.get(delivery.user_id) if delivery.user_id else None
        trace = delivery.headers.get("traceparent")
        correlation = correlation_of(delivery.correlation_id, trace if isinstance(trace, str) else None, self._ids)
        with bind_correlation(correlation):
            try:
                if delivered_too_often(delivery):
                    return await self._park(delivery, scope, None, rfc3339(self._clock.now()))
                return await self._try(delivery, scope)
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
            return Ack()
        try:
            kind = check_envelope(delivery, scope)
        except RiskfleetError as error:
            self._refusals.note(scope, error, "amqp")
            return await self._reject(delivery, scope, Refusal(error))
        correlation = current_correlation()
        verdict = await self._intake.admit(
            Submission(
                scope=scope,
                kind=kind,
                body=delivery.body,
                identity_header=delivery.message_id,
                correlation_id=correlation.correlation_id,
                traceparent=correlation.traceparent,
                source="amqp",
            )
        )
        if isinstance(verdict, Refusal):
            return await self._reject(delivery, scope, verdict)
        return await self._accepted(scope, verdict)

    async def _accepted(self, scope: TenantScope, admission: Admission) -> Settlement:
        if admission.decision is not None:
            # The sender repeats, so it may have missed the answer: the stored bytes again, under the same id.
            await self._publish(decision_message(scope, admission.kind, admission.decision, admission.correlation_id))
        return Ack()

    async def _reject(self, delivery: Delivery, scope: TenantScope, refusal: Refusal) -> Settlement:
        if classify(refusal.error).status >= 500:
            raise refusal.error  # not decided: infrastructure pauses, anything else is tried again and parked
        correlation_id = current_correlation().correlation_id
        document = problem_document(
            refusal.error,
            message_id=delivery.message_id,
            event_id=refusal.event_id,
            id=refusal.identity,
            correlation_id=correlation_id,
        )
        name = delivery_digest(delivery, scope, classify(refusal.error).problem)
        await self._publish(
            rejection_message(scope, document, message_id=f"rejected:{name}", correlation_id=correlation_id)
        )
        return Ack()

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

    async def _publish(self, message: Message) -> None:
        """Raises MessagingFailureError unless confirmed; unroutable is success where nobody has to listen."""
        (confirm,) = await self._publisher.publish((message,))
        if confirm is Confirm.CONFIRMED or (confirm is Confirm.UNROUTABLE and not message.mandatory):
            return
        raise MessagingFailureError


def check_envelope(delivery: Delivery, scope: TenantScope) -> Kind:
    """The kind that a delivery's routing key names.

    Raises TenantIsolationError for another tenant's key, DomainValidationError for another kind, and
    UnsupportedMediaTypeError for a content type that is named and is not JSON.
    """
    tenant, _, kind = delivery.routing_key.partition(".")
    if tenant != scope.tenant_id:
        raise TenantIsolationError("the routing key names a tenant that is not the broker user's")
    if kind not in tuple(Kind):
        raise DomainValidationError(
            "the routing key names no kind of event", pointers=(("/kind", "must be risk or compliance"),)
        )
    if delivery.content_type and not _MEDIA_TYPE.fullmatch(delivery.content_type):
        raise UnsupportedMediaTypeError
    return Kind(kind)


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
