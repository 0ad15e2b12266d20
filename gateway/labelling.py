"""One way in for labels at both doors: parse, validate, publish, answer.

Promises: a `LabelAdmission` means that the broker confirmed the label's message; everything else is a `Refusal`.
Repeating a label is always safe: its id is a hash of what it says, and the table keeps it once. Whether its event is
known is not looked at, since a label may precede it. Nothing here authenticates or speaks a transport.
"""

from __future__ import annotations

from dataclasses import dataclass

from contracts.failures import MessagingFailureError, QueueFullError, RiskfleetError, classify
from contracts.labels import Label, parse_label
from contracts.messages import label_message
from contracts.ports import Clock, Confirm, Publisher, Telemetry
from contracts.telemetry import LABELS, Measurement
from contracts.tenancy import TenantScope
from gateway.intake import Door, Refusal, rfc3339
from gateway.parsing import parse_json
from gateway.refusals import RefusalLog

_NOT_CONFIRMED = {
    Confirm.UNKNOWN: "RabbitMQ did not confirm the label in time; send the same label again",
    Confirm.REFUSED: "the queue for labels is full; send the same label again later",
    Confirm.UNROUTABLE: "the queue for labels does not exist: an operator must run `riskfleet topology apply`",
}


@dataclass(frozen=True, slots=True)
class LabelAdmission:
    """The label is accepted; `event_id` is the event that it is about, which need not be known yet."""

    label_id: str
    event_id: str


class LabelDesk:
    """`accept` for both doors."""

    def __init__(self, publisher: Publisher, telemetry: Telemetry, clock: Clock, refusals: RefusalLog) -> None:
        self._publisher = publisher
        self._telemetry = telemetry
        self._clock = clock
        self._refusals = refusals

    async def accept(self, scope: TenantScope, body: bytes, door: Door) -> LabelAdmission | Refusal:
        """Accept one label durably, or say why not. Raises nothing of ours: a RiskfleetError becomes a Refusal."""
        label: Label | None = None
        try:
            label = parse_label(scope, parse_json(body), rfc3339(self._clock.now()))
            (confirm,) = await self._publisher.publish((label_message(label),))
            if confirm is not Confirm.CONFIRMED:
                failure = QueueFullError if confirm is Confirm.REFUSED else MessagingFailureError
                raise failure(_NOT_CONFIRMED[confirm])
        except RiskfleetError as error:
            self._refusals.note(scope, error, door)
            self._measure(door, "refused" if classify(error).status < 500 else "unavailable")
            return Refusal(error, label.event_id if label else None)
        self._measure(door, "accepted")
        return LabelAdmission(label.label_id, label.event_id)

    def _measure(self, door: Door, result: str) -> None:
        self._telemetry.record(Measurement(LABELS, labels={"door": door, "result": result}))
