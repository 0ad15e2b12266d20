"""The AMQP door: a delivery is acked only after what it owes is confirmed, and answers only its own tenant."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.codec import Entry, decode_carrier, record_of_entry
from contracts.events import event_id_of
from contracts.failures import DatabaseError
from contracts.lifecycle import Status
from contracts.ports import Confirm, DecisionRow, Delivery, TenantProfile
from contracts.settlement import Ack, Pause, Settlement, letter_from
from contracts.tenancy import TenantScope
from contracts.topology import DECISIONS, REJECTED, WORK, audit_queue, parked_queue, stage_queue
from gateway.ingress import MAX_DELIVERIES, Ingress, delivered_too_often
from tests.fakes import DoorParts, InMemoryLedger, event_body

ACME = TenantScope("acme")
ORDER = event_id_of(ACME, "order-1")
SENT = Delivery(
    queue="risk.ingest.acme",
    body=event_body(),
    routing_key="acme.risk",
    message_id="order-1",
    user_id="up-acme",
    correlation_id="corr-1",
    content_type="application/json",
)


def ingress_on(parts: DoorParts) -> Ingress:
    return Ingress(parts.intake, parts.directory, parts.publisher, parts.refusals, parts.clock, parts.ids)


async def settled(parts: DoorParts, *deliveries: Delivery) -> list[Settlement]:
    return list(await ingress_on(parts).handle(deliveries))


def rejection(parts: DoorParts) -> dict[str, Any]:
    (message,) = parts.publisher.to(REJECTED)
    document: dict[str, Any] = json.loads(message.body)
    assert message.persistent
    assert message.confirm
    assert not message.mandatory
    assert message.content_type == "application/problem+json"
    assert message.routing_key == f"acme.{document['type'].rsplit(':', 1)[-1]}"
    return document


async def test_a_delivery_is_admitted_like_a_post_and_then_acked() -> None:
    parts = DoorParts()
    assert await settled(parts, SENT) == [Ack()]
    (message,) = parts.publisher.messages
    assert message.routing_key == stage_queue("retrieval", ACME.partition(4))
    assert (ACME, ORDER) in parts.store.states


async def test_settlements_stand_in_the_order_of_the_deliveries() -> None:
    parts = DoorParts()
    bad = replace(SENT, body=b"{", message_id="bad")
    parts.publisher.answers = [Confirm.CONFIRMED]
    assert await settled(parts, bad, SENT, replace(SENT, user_id=None)) == [Ack(), Ack(), Ack()]


@pytest.mark.parametrize("user", [None, "", "nobody"])
async def test_a_message_of_no_known_broker_user_gets_no_document_but_a_record_on_the_system_chain(
    user: str | None,
) -> None:
    parts = DoorParts()
    assert await settled(parts, replace(SENT, user_id=user)) == [Ack()]
    assert parts.publisher.messages == []
    parts.clock.step(1)
    await parts.refusals.flush()
    (message,) = parts.publisher.messages
    assert message.routing_key == audit_queue(0)
    (entry,) = decode_carrier(message.body)
    assert isinstance(entry, Entry)
    assert record_of_entry(entry).scope is None


@pytest.mark.parametrize(
    ("delivery", "problem"),
    [
        (replace(SENT, routing_key="globex.risk"), "foreign-tenant"),
        (replace(SENT, body=event_body(tenant_id="globex")), "foreign-tenant"),
        (replace(SENT, routing_key="acme.compliance"), "invalid-event"),
        (replace(SENT, routing_key="acme.label"), "invalid-event"),
        (replace(SENT, routing_key="acme"), "invalid-event"),
        (replace(SENT, message_id="other"), "invalid-event"),
        (replace(SENT, message_id=None, body=event_body(id=None)), "invalid-event"),
        (replace(SENT, message_id="x" * 300), "invalid-metadata"),
        (replace(SENT, body=b"{"), "malformed-json"),
        (replace(SENT, body=b" " * 70_000), "body-too-large"),
        (replace(SENT, content_type="text/csv"), "unsupported-media-type"),
    ],
)
async def test_a_refusal_is_answered_to_the_authenticated_tenant_only(delivery: Delivery, problem: str) -> None:
    parts = DoorParts()
    assert await settled(parts, delivery) == [Ack()]
    document = rejection(parts)
    assert document["type"] == f"urn:riskfleet:problem:{problem}"
    assert document.get("message_id") == delivery.message_id
    assert document["correlation_id"] == "corr-1"
    assert parts.publisher.to(WORK) == []
    assert parts.telemetry.count("riskfleet_refusals_total", door="amqp", problem=problem) == 1


async def test_another_body_under_a_known_identity_is_rejected_with_the_event_named() -> None:
    parts = DoorParts()
    await settled(parts, SENT)
    await settled(parts, replace(SENT, body=event_body(type="login")))
    document = rejection(parts)
    assert document["type"].endswith(":idempotency-conflict")
    assert document["event_id"] == ORDER


async def test_a_rejection_that_is_not_confirmed_is_sent_again_with_the_same_id_and_bytes() -> None:
    parts = DoorParts()
    bad = replace(SENT, body=b"{")
    parts.publisher.answers = [Confirm.UNKNOWN, Confirm.UNROUTABLE]
    (first,) = await settled(parts, bad)
    assert isinstance(first, Pause)
    assert await settled(parts, replace(bad, redelivered=True)) == [Ack()]
    before, after = parts.publisher.to(REJECTED)
    assert before == after


@pytest.mark.parametrize("answer", [Confirm.UNKNOWN, Confirm.REFUSED, Confirm.UNROUTABLE])
async def test_an_event_that_is_not_confirmed_pauses_and_is_not_lost(answer: Confirm) -> None:
    parts = DoorParts()
    parts.publisher.answers = [answer]
    (settlement,) = await settled(parts, SENT)
    assert isinstance(settlement, Pause)
    assert parts.publisher.to(REJECTED) == []
    assert await settled(parts, replace(SENT, redelivered=True)) == [Ack()]
    first, second = parts.publisher.messages
    assert first == second


async def test_servers_that_are_away_pause_the_consumer() -> None:
    parts = DoorParts()
    parts.store.down = True
    assert all(isinstance(settlement, Pause) for settlement in await settled(parts, SENT, SENT))
    parts.directory.error = DatabaseError()
    assert all(isinstance(settlement, Pause) for settlement in await settled(parts, SENT, SENT))
    assert parts.publisher.messages == []


async def test_a_repeat_of_a_decided_event_gets_the_stored_decision_again() -> None:
    parts = DoorParts()
    await settled(parts, SENT)
    row = parts.decided(ORDER, ACME)
    assert await settled(parts, SENT, SENT) == [Ack(), Ack()]
    first, second = parts.publisher.to(DECISIONS)
    assert first == second
    assert (first.routing_key, first.message_id) == ("acme.risk.APPROVED", f"{ORDER}:1")
    assert first.headers == {"event_id": ORDER, "revision": 1, "outcome": "APPROVED"}
    assert first.body == row.decision
    assert not first.mandatory
    parts.publisher.answers = [Confirm.REFUSED]
    assert isinstance((await settled(parts, SENT))[0], Pause)


async def test_a_repeat_of_an_event_under_way_is_just_acked() -> None:
    parts = DoorParts()
    await settled(parts, SENT)
    parts.store.move_on(ACME, ORDER, 1, Status.CREATED, b"")
    assert await settled(parts, SENT) == [Ack()]
    assert len(parts.publisher.messages) == 1


@dataclass
class BrokenLedger(InMemoryLedger):
    """A ledger with a defect: it raises what no port may raise."""

    calls: int = 0

    async def decisions(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[DecisionRow | None]:
        self.calls += 1
        raise KeyError("payload")


async def test_a_poison_message_is_parked_as_it_is_after_three_tries_and_blocks_nobody() -> None:
    ledger = BrokenLedger()
    parts = DoorParts(ledger=ledger)
    await settled(parts, SENT)
    parts.store.move_on(ACME, ORDER, 1, Status.CREATED, b"")
    other = replace(SENT, body=event_body(id="order-2"), message_id="order-2")
    assert await settled(parts, SENT, other) == [Ack(), Ack()]
    assert ledger.calls == 3
    (parked,) = [m for m in parts.publisher.messages if m.routing_key == parked_queue("ingress")]
    assert parked.body == SENT.body
    assert parked.mandatory
    letter = letter_from(parked.headers, parked.body)
    assert (letter.scope, letter.stage, letter.attempts, letter.exception_class) == (ACME, "ingress", 3, "KeyError")
    assert (letter.category, letter.problem) == ("UNEXPECTED_ERROR", "unexpected")
    assert "payload" not in str(parked.headers)
    parts.publisher.answers = [Confirm.UNKNOWN]
    assert isinstance((await settled(parts, SENT))[0], Pause)
    assert parts.publisher.messages[-1].message_id == parked.message_id


async def test_what_kills_its_holders_is_parked_without_being_read_and_senders_cannot_forge_that() -> None:
    parts = DoorParts()
    deadly = replace(SENT, headers={"x-delivery-count": MAX_DELIVERIES})
    assert await settled(parts, deadly) == [Ack()]
    assert parts.store.states
    assert await settled(parts, replace(deadly, redelivered=True)) == [Ack()]
    parked = parts.publisher.messages[-1]
    assert letter_from(parked.headers, parked.body).problem == "delivery-limit"


async def test_tenants_without_a_broker_user_are_nobody() -> None:
    parts = DoorParts()
    profile = parts.directory.profiles[ACME]
    parts.directory.profiles[ACME] = TenantProfile(ACME, profile.name, None, profile.thresholds)
    assert await settled(parts, replace(SENT, user_id="")) == [Ack()]
    assert parts.publisher.messages == []


@given(
    st.builds(
        Delivery,
        queue=st.just("risk.ingest.acme"),
        body=st.binary(max_size=40) | st.just(event_body()),
        routing_key=st.text(max_size=8) | st.sampled_from(["acme.risk", "globex.risk", "acme.", ".risk"]),
        message_id=st.none() | st.text(max_size=5) | st.just("order-1"),
        user_id=st.none() | st.sampled_from(["up-acme", "up-globex", "x"]),
        correlation_id=st.none() | st.text(max_size=5),
        content_type=st.none() | st.text(max_size=5) | st.just("application/json"),
        headers=st.dictionaries(
            st.sampled_from(["traceparent", "x-delivery-count"]), st.none() | st.text(max_size=3) | st.integers()
        ),
        redelivered=st.booleans(),
    )
)
def test_every_delivery_ends_in_an_event_a_document_a_letter_or_a_system_record(delivery: Delivery) -> None:
    parts = DoorParts()
    assert asyncio.run(settled(parts, delivery)) == [Ack()]
    scope = {"up-acme": "acme", "up-globex": "globex"}.get(delivery.user_id or "")
    assert len(parts.publisher.messages) == (1 if scope or delivered_too_often(delivery) else 0)
    for message in parts.publisher.to(REJECTED):
        assert message.routing_key.startswith(f"{scope}.")
