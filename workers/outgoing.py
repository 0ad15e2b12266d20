"""What one pass of a stage has to send, and its confirmed publish.

Promises: `publish` returns only after the broker has answered for everything that a wave owes; until then nothing
may be acked. A message to upstream that the broker does not take, while it takes all else, goes round the delivery
ladder and holds up no stage: what it says stands in PostgreSQL already, so that even a ladder that is full only leaves
it, counted, to the feed. Copies for waiting callers are sent once and
never counted. Builds no stage's messages and acks nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import structlog

from contracts.codec import Entry
from contracts.failures import MessagingFailureError
from contracts.messages import (
    arrived,
    audit_message,
    decision_message,
    delivery_message,
    reply_message,
    stage_messages,
)
from contracts.ports import Confirm, DecisionRow, Held, Leaving, Message, Publisher, Telemetry
from contracts.state import AuditRecord, EventState
from contracts.telemetry import DELIVERIES, Measurement
from contracts.topology import DECISIONS, REJECTED, RunningLayouts, reply_queue

log = structlog.get_logger("outgoing")

UPSTREAM = (DECISIONS, REJECTED)
"""The exchanges that tenants bind: what is refused there is no stage's affair."""

DELIVERY_WAITS_MS = (1_000, 5_000, 15_000, 30_000)
"""Waits before delivery attempt 1, 2, …; the last one holds for every later attempt."""

_REPLY_PREFIX = reply_queue("")


@dataclass(slots=True)
class Wave:
    """What one pass over some entries has gathered to publish, and the locks that it holds.

    `onward` goes to the next stage, as many entries to a carrier as there are. `replies` are copies for waiting
    callers. `lost` their lock on the way; `waiting` = on the ladder, until another's lock ends. `states` were read
    in this pass already. `leaving` the backlog: parked, or decided without a claim of ours.
    """

    onward: list[Entry] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    records: list[AuditRecord] = field(default_factory=list)
    replies: list[Message] = field(default_factory=list)
    held: dict[tuple[str, str], Held] = field(default_factory=dict)
    lost: list[Entry] = field(default_factory=list)
    waiting: list[Entry] = field(default_factory=list)
    states: dict[tuple[str, str], EventState] = field(default_factory=dict)
    leaving: list[Leaving] = field(default_factory=list)

    def leave(self, entry: Entry) -> None:
        """The entry's event is under way no more: nobody waits for it in its stage."""
        h = entry.header
        self.leaving.append(Leaving(h.scope, h.event, h.n, h.body_digest))

    def let_go(self, held: Held) -> None:
        """The lock was given back, or is another's."""
        self.held.pop((held.scope.tenant_id, held.event_id), None)

    def decided(self, entry: Entry, state: EventState, row: DecisionRow) -> None:
        """Owe the decision as it was read back, and a copy of it to whoever waits for this entry.

        Only our own gateways' queues get copies: an entry that names any other address is answered nowhere.
        """
        message = decision_message(state.scope, state.KIND, row, state.correlation_id, state.traceparent)
        self.messages.append(message)
        reply_to = entry.header.reply_to
        if reply_to is not None and reply_to.startswith(_REPLY_PREFIX):
            self.replies.append(reply_message(reply_to, message))


class Outgoing:
    """Publishes waves."""

    def __init__(self, publisher: Publisher, layouts: RunningLayouts, tries: int, telemetry: Telemetry) -> None:
        """`layouts`: the queues of stages and of the audit; `tries` bounds the sends of a wave."""
        self._publisher = publisher
        self._layouts = layouts
        self._tries = tries
        self._telemetry = telemetry

    async def publish(self, wave: Wave) -> None:
        """Everything answered for, or MessagingFailureError. Unknown means: the same message again."""
        pending = [
            *stage_messages(wave.onward, self._layouts),
            *wave.messages,
            *audit_message(_unique(wave.records), self._layouts),
        ]
        replies, wave.replies = wave.replies, []
        undelivered: list[Message] = []
        for _ in range(self._tries):
            if not pending:
                break
            confirms = await self._publisher.publish([*pending, *replies])
            answers = zip(pending, confirms, strict=False)  # what follows are the replies' answers
            pending, replies = [], []
            for message, confirm in answers:
                # Refused is an answer: the same message again, at once, would be refused again.
                if confirm is Confirm.REFUSED and message.exchange in UPSTREAM:
                    undelivered.append(message)
                elif not arrived(message, confirm):
                    pending.append(message)
        if pending or undelivered:
            await self._divert([*undelivered, *pending])

    async def _divert(self, unconfirmed: Sequence[Message]) -> None:
        """Send messages to upstream round the ladder, if they are all that is left of a wave.

        Every decision has its records beside it: while the broker confirms nothing at all, they are left too.
        """
        if any(message.exchange not in UPSTREAM for message in unconfirmed):
            raise MessagingFailureError(f"{len(unconfirmed)} messages were not confirmed")
        left = await send_round(self._publisher, unconfirmed, self._telemetry)
        if left:
            raise MessagingFailureError("the delivery ladder did not confirm a message to upstream")


async def send_round(publisher: Publisher, messages: Sequence[Message], telemetry: Telemetry) -> list[Message]:
    """Send undelivered messages to the first rung of the delivery ladder; those that it did not answer for.

    A rung that is full refuses: that is an answer, and the message is left to the feed.
    """
    rounds = [delivery_message(message, 1, DELIVERY_WAITS_MS[0]) for message in messages]
    confirms = await publisher.publish(rounds)
    answers = list(zip(messages, rounds, confirms, strict=True))
    refused = sum(confirm is Confirm.REFUSED for confirm in confirms)
    unknown = [m for m, sent, confirm in answers if confirm is not Confirm.REFUSED and not arrived(sent, confirm)]
    for result, count in (("again", len(rounds) - refused - len(unknown)), ("left", refused)):
        if count:
            log.warning("decision.undelivered", count=count, reason=result)
            telemetry.record(Measurement(DELIVERIES, count, {"result": result}))
    return unknown


def _unique(records: Iterable[AuditRecord]) -> list[AuditRecord]:
    return list({record.record_id: record for record in records}.values())
