"""Labels at the doors: accepted means confirmed, a repeat is the same label, and a bad one is told what is wrong."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.events import canonical_json, event_id_of
from contracts.failures import MessagingFailureError, TenantIsolationError, classify
from contracts.messages import label_from
from contracts.ports import Confirm
from contracts.tenancy import TenantScope
from contracts.topology import LABELS_QUEUE, WORK
from gateway.intake import Refusal
from gateway.labelling import LabelAdmission, LabelDesk
from tests.fakes import DoorParts

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")
LABEL: dict[str, Any] = {
    "event": "order-1",
    "label": "chargeback",
    "source": "card-scheme",
    "effective_at": "2026-02-14T00:00:00Z",
    "amount": {"value": "12.50", "currency": "EUR"},
    "note": "a note",
}


def label_body(**changes: object) -> bytes:
    """A valid label; a change to None leaves the field out."""
    return canonical_json({name: value for name, value in (LABEL | changes).items() if value is not None})


def desk_on(parts: DoorParts) -> LabelDesk:
    return LabelDesk(parts.publisher, parts.telemetry, parts.clock, parts.refusals)


async def accepted(parts: DoorParts, body: bytes, scope: TenantScope = ACME) -> LabelAdmission:
    verdict = await desk_on(parts).accept(scope, body, "http")
    assert isinstance(verdict, LabelAdmission), verdict
    return verdict


async def refused(parts: DoorParts, body: bytes) -> Refusal:
    verdict = await desk_on(parts).accept(ACME, body, "http")
    assert isinstance(verdict, Refusal), verdict
    return verdict


async def test_an_accepted_label_is_one_confirmed_message_with_all_that_was_sent() -> None:
    parts = DoorParts()
    admission = await accepted(parts, label_body())
    (message,) = parts.publisher.messages
    assert (message.exchange, message.routing_key) == (WORK, LABELS_QUEUE)
    assert message.mandatory
    assert message.persistent
    assert message.confirm
    label = label_from(message.body)
    assert (label.scope, label.label, label.source) == (ACME, "chargeback", "card-scheme")
    assert label.received_at == "2026-01-31T12:00:00.000000Z"
    assert json.loads(label.body) == LABEL
    assert (admission.label_id, admission.event_id) == (label.label_id, event_id_of(ACME, "order-1"))
    assert parts.telemetry.count("riskfleet_labels_total", door="http", result="accepted") == 1


async def test_a_label_is_the_same_however_its_event_is_named_and_however_often_it_is_sent() -> None:
    parts = DoorParts()
    first = await accepted(parts, label_body())
    parts.clock.step(60)
    by_number = label_body(event=None, event_id=event_id_of(ACME, "order-1"))
    assert first == await accepted(parts, label_body()) == await accepted(parts, by_number)
    assert len({message.message_id for message in parts.publisher.messages}) == 1
    others = [
        await accepted(parts, label_body(label="cleared")),
        await accepted(parts, label_body(source="other")),
        await accepted(parts, label_body(effective_at="2026-02-15T00:00:00Z")),
        await accepted(parts, label_body(event="order-2")),
        await accepted(parts, label_body(), GLOBEX),
    ]
    assert len({first.label_id, *(other.label_id for other in others)}) == 6


@pytest.mark.parametrize("answer", [Confirm.UNKNOWN, Confirm.REFUSED, Confirm.UNROUTABLE])
async def test_without_a_confirm_nothing_is_accepted_and_the_refusal_names_the_event(answer: Confirm) -> None:
    parts = DoorParts()
    parts.publisher.answers = [answer]
    refusal = await refused(parts, label_body())
    assert isinstance(refusal.error, MessagingFailureError)
    assert classify(refusal.error).status == 503
    assert ("topology apply" in refusal.error.detail) == (answer is Confirm.UNROUTABLE)
    assert refusal.event_id == event_id_of(ACME, "order-1")
    assert parts.telemetry.count("riskfleet_labels_total", door="http", result="unavailable") == 1
    await accepted(parts, label_body())


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b"{", None),
        (b"[]", ""),
        (b"[" + label_body() + b"]", ""),
        (b" " * 70_000, None),
        (label_body(label="fraud"), "/label"),
        (label_body(event=None), ""),
        (label_body(event_id="0" * 32), ""),
        (label_body(event=None, event_id="order-1"), "/event_id"),
        (label_body(source=""), "/source"),
        (label_body(effective_at="yesterday"), "/effective_at"),
        (label_body(surprise=1), "/surprise"),
        (label_body()[:-1] + b',"note":"twice"}', None),
    ],
)
async def test_a_refused_label_is_told_the_field_and_publishes_nothing(body: bytes, pointer: str | None) -> None:
    parts = DoorParts()
    refusal = await refused(parts, body)
    assert classify(refusal.error).status in (400, 413, 422)
    if pointer is not None:
        assert [name for name, _ in refusal.error.pointers] == [pointer]
    assert parts.publisher.messages == []
    assert parts.telemetry.count("riskfleet_labels_total", door="http", result="refused") == 1
    assert parts.telemetry.count("riskfleet_refusals_total", door="http") == 1
    parts.clock.step(1)
    await parts.refusals.flush()
    assert len(parts.publisher.messages) == 1  # its audit record


async def test_nobody_labels_another_tenants_event() -> None:
    parts = DoorParts()
    assert isinstance((await refused(parts, label_body(tenant_id="globex"))).error, TenantIsolationError)
    own = await accepted(parts, label_body(tenant_id="acme"))
    assert own == await accepted(parts, label_body())


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*LABEL, "event_id", "tenant_id", "x"]),
        st.none() | st.text(max_size=4) | st.integers() | st.lists(st.none(), max_size=1),
        max_size=4,
    ).map(lambda changes: json.dumps(LABEL | changes).encode())
    | st.binary(max_size=30)
)
def test_whatever_is_sent_as_a_label_is_accepted_or_refused_with_a_client_error(body: bytes) -> None:
    parts = DoorParts()
    verdict = asyncio.run(desk_on(parts).accept(ACME, body, "amqp"))
    if isinstance(verdict, Refusal):
        assert classify(verdict.error).status < 500
    else:
        (message,) = parts.publisher.messages
        assert label_from(message.body).label_id == verdict.label_id
