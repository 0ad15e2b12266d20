"""The delivery sink: messages to upstream that the broker did not take, published again until it does.

Promises: a message is sent again after 1 s, 5 s, 15 s and then every 30 s, for a day; the ladder confirms each further
round before this one is acked. A decision is sent at the highest revision that PostgreSQL has by then, so that none
follows a newer one. Loses no decision when it gives up, after a day or on a ladder that is full: the row stands in
PostgreSQL and the feed has it.
It has no dead-letter stage of its own: what cannot be read is counted, logged and acked, for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import structlog

from contracts.failures import InfrastructureError, RiskfleetError, UndecodableEntryError
from contracts.messages import arrived, decision_message, delivery_message, undelivered
from contracts.ports import Confirm, Delivery, Ledger, Message, Publisher, Telemetry
from contracts.settlement import Ack, Pause, Settlement
from contracts.telemetry import DELIVERIES, Measurement
from contracts.tenancy import TenantScope
from contracts.topology import DECISIONS
from workers.outgoing import DELIVERY_WAITS_MS, UPSTREAM

log = structlog.get_logger("delivery")

MOST_ATTEMPTS: Final = 2_880
"""About 24 hours of rounds of 30 s."""


class DeliverySink:
    """Publishes what came back from the ladder."""

    def __init__(self, ledger: Ledger, publisher: Publisher, telemetry: Telemetry) -> None:
        """`ledger` says which revision is the highest."""
        self._ledger = ledger
        self._publisher = publisher
        self._telemetry = telemetry

    async def handle(self, deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        """Send each message again; Pause for one that neither upstream's queues nor the ladder answer for."""
        try:
            read = await self._newest([self._read(delivery) for delivery in deliveries])
        except InfrastructureError as error:
            return [Pause(type(error).__name__)] * len(deliveries)
        left = await self._send([item for item in read if item is not None])
        paused = await self._again(left)
        return [Pause("MessagingFailureError") if item is not None and item in paused else Ack() for item in read]

    def _read(self, delivery: Delivery) -> tuple[Message, int] | None:
        try:
            message, attempt = undelivered(delivery.headers, delivery.body)
            if message.exchange not in UPSTREAM or not isinstance(message.headers, dict):
                raise UndecodableEntryError("a delivery is not for upstream")
            if message.exchange == DECISIONS:
                _key(message)
        except RiskfleetError as error:
            log.error("delivery.undecodable", exception_class=type(error).__name__)
            self._measure("undecodable")
            return None
        return message, attempt

    async def _newest(self, read: Sequence[tuple[Message, int] | None]) -> list[tuple[Message, int] | None]:
        """Each decision as it stands now; a person may have decided while it was on its way."""
        keys = [_key(item[0]) for item in read if item is not None and item[0].exchange == DECISIONS]
        rows = iter(await self._ledger.decisions(keys) if keys else ())
        found = list(read)
        for place, item in enumerate(read):
            if item is None or item[0].exchange != DECISIONS:
                continue
            (message, attempt), row = item, next(rows)
            scope, _ = _key(message)
            if row is not None and row.revision > int(message.headers["revision"]):
                kind, traceparent = message.routing_key.split(".")[1], message.headers.get("traceparent")
                found[place] = decision_message(scope, kind, row, message.correlation_id, traceparent), attempt
        return found

    async def _send(self, items: Sequence[tuple[Message, int]]) -> list[tuple[Message, int]]:
        """Publish the messages themselves; what was not answered for is left."""
        if not items:
            return []
        confirms = await self._publisher.publish([message for message, _ in items])
        answers = zip(items, confirms, strict=True)
        left = [item for item, confirm in answers if not arrived(item[0], confirm)]
        self._measure("delivered", len(items) - len(left))
        return left

    async def _again(self, items: Sequence[tuple[Message, int]]) -> list[tuple[Message, int]]:
        """Send one more round each, and give up after the last; what the ladder does not answer for is returned."""
        going, rounds = [], []
        for message, attempt in items:
            if attempt >= MOST_ATTEMPTS:
                log.error("delivery.given_up", attempts=attempt, correlation_id=message.correlation_id)
                self._measure("given_up")
            else:
                going.append((message, attempt))
                wait = DELIVERY_WAITS_MS[min(attempt, len(DELIVERY_WAITS_MS) - 1)]
                rounds.append(delivery_message(message, attempt + 1, wait))
        if not rounds:
            return []
        confirms = await self._publisher.publish(rounds)
        answers = list(zip(going, rounds, confirms, strict=True))
        # A full rung refuses. To wait for it here would keep the other tenants' decisions from their first try.
        refused = sum(confirm is Confirm.REFUSED for confirm in confirms)
        silent = [answer for answer in answers if answer[2] is not Confirm.REFUSED]
        paused = [item for item, sent, confirm in silent if not arrived(sent, confirm)]
        if refused:
            log.error("delivery.left", count=refused)
        self._measure("left", refused)
        self._measure("again", len(going) - len(paused) - refused)
        return paused

    def _measure(self, result: str, count: int = 1) -> None:
        if count:
            self._telemetry.record(Measurement(DELIVERIES, count, {"result": result}))


def _key(message: Message) -> tuple[TenantScope, str]:
    """Whose decision a message is, and of which event. Raises UndecodableEntryError, InvalidTenantError."""
    tenant, _, rest = message.routing_key.partition(".")
    event_id, revision = message.headers.get("event_id"), message.headers.get("revision")
    if not isinstance(event_id, str) or not isinstance(revision, int) or "." not in rest:
        raise UndecodableEntryError("a delivery does not name its decision")
    return TenantScope(tenant), event_id
