"""The messages that more than one room publishes, built in one place.

Pure: a Message is a value; ids and bytes depend on the arguments alone, so a message that is built
again after a lost confirm is the same message. Nothing here publishes or waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from contracts.codec import CARRIER_HEADER, Entry, carriers, encode_carrier, entry_of_record
from contracts.events import canonical_json
from contracts.failures import InvalidTenantError, UndecodableEntryError
from contracts.labels import Label
from contracts.ports import Confirm, DeadLetter, DecisionRow, Delivery, Message
from contracts.settlement import failure_headers
from contracts.state import AuditRecord
from contracts.tenancy import TenantScope
from contracts.topology import (
    DECISIONS,
    LABELS_QUEUE,
    REJECTED,
    STAGES,
    VERSION,
    WORK,
    RunningLayouts,
    Stage,
    audit_queue,
    delivery_rung,
    first_rung,
    parked_queue,
    partition_of,
    rung_exchange,
    stage_queue,
    version_of,
)

JSON = "application/json"
PROBLEM_JSON = "application/problem+json"
PROBLEM_URN = "urn:riskfleet:problem:"


def arrived(message: Message, confirm: Confirm) -> bool:
    """Whether the broker has answered for a message: confirmed, or nobody binds what need not be bound."""
    return confirm is Confirm.CONFIRMED or (confirm is Confirm.UNROUTABLE and not message.mandatory)


def stage_message(entry: Entry, layouts: RunningLayouts) -> Message:
    """A carrier of one entry to the queue of its stage and its tenant's partition, on the entry's own version."""
    (message,) = stage_messages((entry,), layouts)
    return message


def stage_messages(entries: Iterable[Entry], layouts: RunningLayouts) -> list[Message]:
    """Carriers to the queues of their stages and partitions: what is ready together travels together.

    Entries of one queue keep their order, and `codec.carriers` says where one carrier ends. The id of a carrier
    depends on what it holds, so the same entries again are the same message. Raises MessagingFailureError for an entry
    of a version that is not known here.
    """
    queues: dict[str, list[Entry]] = {}
    for entry in entries:
        queues.setdefault(_queue_of(entry, layouts), []).append(entry)
    return [
        Message(
            exchange=WORK,
            routing_key=queue,
            body=encode_carrier(group),
            message_id=group[0].message_id if len(group) == 1 else _hash(*(entry.message_id for entry in group)),
            headers={CARRIER_HEADER: len(group)},
        )
        for queue, members in queues.items()
        for group in carriers(members)
    ]


def ladder_message(entry: Entry, delay_ms: int, layouts: RunningLayouts) -> Message:
    """A carrier of one entry that comes back to its stage after at least `delay_ms` (30 s at most)."""
    rung = first_rung(delay_ms)
    return Message(
        exchange=rung_exchange(rung, entry.header.topology),
        routing_key=_queue_of(entry, layouts),
        body=encode_carrier((entry,)),
        message_id=f"{entry.message_id}:{rung}",
        headers={CARRIER_HEADER: 1},
    )


def audit_message(records: Sequence[AuditRecord], layouts: RunningLayouts) -> list[Message]:
    """Carriers of audit records, grouped by partition, in order; records without a tenant go to partition 0.

    Always on the newest version, whichever their entries are on: the chain knows a record by its id, and no order.
    """
    layout, groups = layouts.newest, dict[str, list[Entry]]()
    for record in records:
        groups.setdefault(layout.audit_queue(record.scope), []).append(entry_of_record(record))
    return [
        Message(
            exchange=WORK,
            routing_key=queue,
            body=encode_carrier(group),
            message_id=_hash(*(entry.header.digest for entry in group)),
            headers={CARRIER_HEADER: len(group)},
        )
        for queue, entries in groups.items()
        for group in carriers(entries)
    ]


def decision_message(
    scope: TenantScope, kind: str, row: DecisionRow, correlation_id: str | None, traceparent: str | None = None
) -> Message:
    """The decision as it was read back from PostgreSQL, to whoever binds `<tenant>.<kind>.<outcome>`.

    Not mandatory: a tenant that only speaks HTTP binds no queue, and unroutable is then success.
    """
    event_id = str(orjson.loads(row.decision)["event_id"])
    headers = {"event_id": event_id, "revision": row.revision, "outcome": row.outcome}
    return Message(
        exchange=DECISIONS,
        routing_key=scope.routing_key(kind, row.outcome),
        body=row.decision,
        message_id=f"{event_id}:{row.revision}",
        headers=headers | ({"traceparent": traceparent} if traceparent else {}),
        mandatory=False,
        content_type=JSON,
        correlation_id=correlation_id,
    )


def rejection_message(
    scope: TenantScope, document: Mapping[str, Any], *, message_id: str, correlation_id: str | None
) -> Message:
    """A problem document to `<tenant>.<problem>`: the answer to a submission that becomes no event.

    `scope` is the authenticated tenant, never the one that a submission names. Not mandatory, as decisions.
    """
    problem = str(document["type"]).removeprefix(PROBLEM_URN)
    return Message(
        exchange=REJECTED,
        routing_key=scope.routing_key(problem),
        body=canonical_json(document),
        message_id=message_id,
        headers={"problem": problem},
        mandatory=False,
        content_type=PROBLEM_JSON,
        correlation_id=correlation_id,
    )


def parked_message(letter: DeadLetter, source: str) -> Message:
    """A dead letter on its way to the table; `source` is one of `topology.PARKED_SOURCES`."""
    return Message(
        exchange=WORK,
        routing_key=parked_queue(source),
        body=letter.body,
        message_id=f"parked:{letter.letter_id}",
        headers=failure_headers(letter),
    )


_PROBE_HEADER = "x-riskfleet-probe"


def probe_message(partition: int, sent_at: str, version: str = VERSION) -> Message:
    """A message that holds nothing, and goes through every queue of a partition behind what is there already.

    `sent_at` is the time (RFC 3339) that it is known by once it has come through.
    """
    return _probe(stage_queue(STAGES[0], partition, version), sent_at)


def probe_of(delivery: Delivery) -> str | None:
    """The time at which a probe was sent; None for every other delivery."""
    sent_at = delivery.headers.get(_PROBE_HEADER)
    return sent_at if isinstance(sent_at, str) and not delivery.body else None


def next_probe(stage: Stage, delivery: Delivery, sent_at: str) -> Message:
    """The same probe on its way from a stage to the queue behind it: the next stage's, or the audit's."""
    partition, version = partition_of(delivery.queue), version_of(delivery.queue)
    behind = STAGES[STAGES.index(stage) + 1 :]
    after = stage_queue(behind[0], partition, version) if behind else audit_queue(partition, version)
    return _probe(after, sent_at)


def _probe(queue: str, sent_at: str) -> Message:
    return Message(WORK, queue, b"", f"probe:{queue}:{sent_at}", {_PROBE_HEADER: sent_at, CARRIER_HEADER: 0})


_DELIVERY_HEADER = "x-riskfleet-delivery"


def delivery_message(message: Message, attempt: int, delay_ms: int) -> Message:
    """A decision that was not confirmed, on its way round its own ladder; `undelivered` reads it when it comes back.

    `attempt` counts from 1. The id names the attempt, so that two rounds never look like one message.
    """
    envelope = {
        "exchange": message.exchange,
        "routing_key": message.routing_key,
        "message_id": message.message_id,
        "headers": dict(message.headers),
        "content_type": message.content_type,
        "correlation_id": message.correlation_id,
        "attempt": attempt,
    }
    return Message(
        exchange=WORK,
        routing_key=delivery_rung(delay_ms),
        body=message.body,
        message_id=f"delivery:{message.message_id}:{attempt}",
        headers={_DELIVERY_HEADER: canonical_json(envelope).decode()},
    )


def undelivered(headers: Mapping[str, Any], body: bytes) -> tuple[Message, int]:
    """The message inside a delivery that came back from the ladder, and its attempt.

    Raises UndecodableEntryError when the header is absent or broken.
    """
    try:
        fields = dict(orjson.loads(headers[_DELIVERY_HEADER]))
        attempt = int(fields.pop("attempt"))
        return Message(body=body, mandatory=False, **fields), attempt
    except (KeyError, TypeError, ValueError) as error:
        raise UndecodableEntryError(f"the {_DELIVERY_HEADER} header cannot be read") from error


def reply_message(reply_to: str, message: Message) -> Message:
    """A transient copy of a decision message for the process whose caller waits; nobody answers for its loss."""
    return Message(
        exchange="",
        routing_key=reply_to,
        body=message.body,
        message_id=f"reply:{message.message_id}",
        headers=message.headers,
        persistent=False,
        mandatory=False,
        confirm=False,
        content_type=message.content_type,
        correlation_id=message.correlation_id,
    )


def label_message(label: Label) -> Message:
    """A label on its way to the table `labels`."""
    fields = {
        "tenant": label.scope.tenant_id,
        "label_id": label.label_id,
        "event_id": label.event_id,
        "label": label.label,
        "source": label.source,
        "effective_at": label.effective_at,
        "received_at": label.received_at,
        "body": label.body.decode(),
    }
    return Message(
        exchange=WORK,
        routing_key=LABELS_QUEUE,
        body=canonical_json(fields),
        message_id=f"label:{label.label_id}",
        content_type=JSON,
    )


def label_from(body: bytes) -> Label:
    """The label that a message carries; the inverse of `label_message`. Raises UndecodableEntryError."""
    try:
        fields = dict(orjson.loads(body))
        scope, stored = TenantScope(fields.pop("tenant")), str(fields.pop("body")).encode()
        if not all(isinstance(value, str) for value in fields.values()):
            raise TypeError
        return Label(scope=scope, body=stored, **fields)
    except (KeyError, TypeError, ValueError, InvalidTenantError) as error:
        raise UndecodableEntryError("a label's message cannot be read") from error


def _queue_of(entry: Entry, layouts: RunningLayouts) -> str:
    return layouts.of(entry.header.topology).stage_queue(entry.header.stage, entry.header.scope)


def _hash(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]
