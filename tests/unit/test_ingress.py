"""The AMQP door: a delivery is acked only after what it owes is confirmed, and answers only its own tenant."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.codec import Entry, decode_carrier, record_of_entry
from contracts.events import canonical_json, event_id_of
from contracts.failures import DatabaseError
from contracts.lifecycle import Status
from contracts.messages import label_from
from contracts.ports import Confirm, DecisionRow, Delivery, TenantProfile
from contracts.settlement import Ack, Hold, Pause, Settlement, letter_from
from contracts.tenancy import TenantScope
from contracts.topology import DECISIONS, LABELS_QUEUE, REJECTED, WORK, audit_queue, parked_queue, stage_queue
from gateway.ingress import MAX_DELIVERIES, Ingress, delivered_too_often
from gateway.intake import Admission, Submission
from gateway.labelling import LabelDesk
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
    labels = LabelDesk(parts.publisher, parts.telemetry, parts.clock, parts.refusals)
    return Ingress(parts.intake, labels, parts.directory, parts.publisher, parts.refusals, parts.clock, parts.ids)


async def settled(parts: DoorParts, *deliveries: Delivery) -> list[Settlement]:
    """How they end; a refusal is kept until its second has ended and the record of it is confirmed."""
    ingress = ingress_on(parts)
    answers = list(await ingress.handle(deliveries))
    held = [place for place, answer in enumerate(answers) if isinstance(answer, Hold) and "audit" in answer.reason]
    if held:
        parts.clock.step(1)
        assert await parts.refusals.flush() == 0
        again = await ingress.handle([deliveries[place] for place in held])
        for place, answer in zip(held, again, strict=True):
            answers[place] = answer
    return answers


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
        (replace(SENT, routing_key="acme.labels"), "invalid-event"),
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
    (record,) = parts.publisher.to(WORK)
    assert record.routing_key == audit_queue(ACME.partition(4))
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
    assert isinstance(settlement, Hold if answer is Confirm.REFUSED else Pause)
    assert parts.publisher.to(REJECTED) == []
    assert await settled(parts, replace(SENT, redelivered=True)) == [Ack()]
    first, second = parts.publisher.messages
    assert first == second


async def test_a_full_partition_holds_up_its_own_tenants_only() -> None:
    parts = DoorParts()
    other = replace(SENT, routing_key="globex.risk", user_id="up-globex")
    parts.publisher.answers = [Confirm.REFUSED]
    full, went_on = await settled(parts, SENT, other)
    assert isinstance(full, Hold)
    assert went_on == Ack()
    assert await settled(parts, SENT) == [Ack()]


async def test_a_refusal_is_acked_once_its_record_is_confirmed_and_no_earlier() -> None:
    parts = DoorParts()
    ingress = ingress_on(parts)
    bad = [replace(SENT, body=b"{", message_id=f"m-{i}") for i in range(5)]
    held = await ingress.handle(bad)
    assert all(isinstance(answer, Hold) for answer in held)
    assert len(parts.publisher.to(REJECTED)) == 5
    parts.clock.step(0.1)  # the second has not ended
    assert await parts.refusals.flush() == 0
    assert all(isinstance(answer, Hold) for answer in await ingress.handle(bad))
    parts.clock.step(1)
    parts.publisher.answers = [Confirm.UNKNOWN]
    assert await parts.refusals.flush() == 1
    assert all(isinstance(answer, Hold) for answer in await ingress.handle(bad))
    assert await parts.refusals.flush() == 0
    assert await ingress.handle(bad) == [Ack()] * 5
    assert len(parts.publisher.to(REJECTED)) == 5  # answered once each
    assert parts.telemetry.count("riskfleet_refusals_total", door="amqp") == 5
    records = [m for m in parts.publisher.messages if ".audit." in m.routing_key]
    assert len({m.message_id for m in records}) == 1  # one record of five, sent twice with the same bytes
    (entry,) = decode_carrier(records[-1].body)
    assert isinstance(entry, Entry)
    assert json.loads(entry.body)["refusals"]["count"] == 5


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
    parts.publisher.answers = [Confirm.UNKNOWN]  # a refused one goes round the ladder
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
    (record,) = parts.publisher.messages
    assert record.routing_key == audit_queue(0)


# --- CloudEvents ------------------------------------------------------------------------------------

ENVELOPED = {"specversion": "1.0", "id": "A-1", "source": "/tills", "type": "payment.card"}
EVENT = json.loads(event_body(id=None))


def cloudevent(**changes: Any) -> dict[str, Any]:
    return ENVELOPED | {"data": EVENT} | changes


STRUCTURED_SENT = replace(
    SENT, body=json.dumps(cloudevent()).encode(), message_id=None, content_type="application/cloudevents+json"
)


def batch_of(*events: dict[str, Any] | bytes) -> Delivery:
    texts = [event if isinstance(event, bytes) else json.dumps(event).encode() for event in events]
    return replace(
        SENT,
        body=b"[" + b",".join(texts) + b"]",
        message_id="batch-1",
        content_type="application/cloudevents-batch+json; charset=utf-8",
    )


@pytest.mark.parametrize("prefix", ["ce-", "cloudEvents:", "cloudEvents_"])
async def test_a_cloudevent_is_admitted_in_binary_and_structured_mode_as_one_event(prefix: str) -> None:
    parts = DoorParts()
    binary = replace(
        SENT,
        body=event_body(id=None),
        message_id=None,
        headers={f"{prefix}{name}": value for name, value in ENVELOPED.items()},
    )
    assert await settled(parts, binary, STRUCTURED_SENT, replace(binary, content_type=None)) == [Ack()] * 3
    assert parts.publisher.to(REJECTED) == []
    assert parts.store.states.keys() == {(ACME, event_id_of(ACME, "/tills|A-1"))}


async def test_a_cloudevent_is_one_event_whatever_its_transport_names_it_and_whichever_door_it_comes_through() -> None:
    """Clients of AMQP make a new message_id for each send, and HTTP clients a key: source and id stay."""
    parts = DoorParts()
    ingress = ingress_on(parts)
    sends = [replace(STRUCTURED_SENT, message_id=f"send-{number}") for number in range(3)]
    assert await ingress.handle(sends) == [Ack()] * 3
    post = Submission(
        ACME, None, STRUCTURED_SENT.body, "a-key", None, None, "http", structured=True, allow_generated_identity=True
    )
    admission = await parts.intake.admit(post)
    assert isinstance(admission, Admission)
    assert (admission.identity, admission.replayed) == ("/tills|A-1", True)
    assert parts.store.states.keys() == {(ACME, event_id_of(ACME, "/tills|A-1"))}


async def test_the_id_inside_a_cloudevent_is_its_identity_at_both_doors_under_any_message_id() -> None:
    parts = DoorParts()
    body = json.dumps(cloudevent(data=EVENT | {"id": "order-9"})).encode()
    sends = [replace(STRUCTURED_SENT, body=body, message_id=name) for name in ("one", "two", None)]
    assert await settled(parts, *sends) == [Ack()] * 3
    admission = await parts.intake.admit(Submission(ACME, None, body, "key", None, None, "http", structured=True))
    assert isinstance(admission, Admission)
    assert admission.replayed
    assert parts.store.states.keys() == {(ACME, event_id_of(ACME, "order-9"))}
    assert parts.publisher.to(REJECTED) == []


async def test_a_broken_cloudevent_is_answered_with_a_pointer_and_is_never_taken_for_a_plain_event() -> None:
    parts = DoorParts()
    assert await settled(parts, replace(SENT, headers={"ce-specversion": "1.0", "ce-id": "A-1"})) == [Ack()]
    assert [error["pointer"] for error in rejection(parts)["errors"]] == ["/source", "/type"]
    parts = DoorParts()
    conflicting = {"ce-id": "1", "cloudEvents_id": "2"}
    assert await settled(parts, replace(SENT, headers=conflicting)) == [Ack()]
    assert rejection(parts)["type"].endswith(":invalid-metadata")
    parts = DoorParts()
    other = replace(STRUCTURED_SENT, body=json.dumps(cloudevent(data=EVENT | {"subject": 1})).encode())
    assert await settled(parts, other) == [Ack()]
    assert [error["pointer"] for error in rejection(parts)["errors"]] == ["/data/subject"]
    assert parts.store.states == {}


async def test_the_trace_of_a_cloudevent_holds_where_the_message_names_none() -> None:
    parts = DoorParts()
    body = json.dumps(cloudevent(correlationid="flow-1")).encode()
    for correlation_id, taken in ((None, "flow-1"), ("corr-1", "corr-1")):
        await settled(parts, replace(STRUCTURED_SENT, body=body, correlation_id=correlation_id))
        ((_, peek),) = parts.store.states.items()
        assert peek.stored is not None
        assert json.loads(peek.stored)["correlation_id"] == taken
        parts.store.states.clear()


async def test_a_batch_is_acked_when_all_has_settled_and_each_refused_event_is_answered_alone() -> None:
    parts = DoorParts()
    delivery = batch_of(cloudevent(), b"NaN", cloudevent(id="A-2"), cloudevent(id="A-3", data={}), cloudevent(id=""))
    assert await settled(parts, delivery) == [Ack()]
    assert {event_id for _, event_id in parts.store.states} == {
        event_id_of(ACME, "/tills|A-1"),
        event_id_of(ACME, "/tills|A-2"),
    }
    first = parts.publisher.to(REJECTED)
    documents = [json.loads(message.body) for message in first]
    assert [(d["item"], d["message_id"], d["type"].rsplit(":", 1)[-1]) for d in documents] == [
        (1, "batch-1", "malformed-json"),
        (3, "batch-1", "invalid-event"),
        (4, "batch-1", "invalid-event"),
    ]
    assert len({message.message_id for message in first}) == 3
    assert await settled(parts, replace(delivery, redelivered=True)) == [Ack()]
    assert parts.publisher.to(REJECTED) == [*first, *first]
    assert len(parts.store.states) == 2


@pytest.mark.parametrize("body", [b"{}", b"[", b"[]", b"[1,,2]", b"[" + b"0," * 1000 + b"0]", b"[" * 6_000_000])
async def test_a_batch_that_cannot_be_split_is_answered_once(body: bytes) -> None:
    parts = DoorParts()
    assert await settled(parts, replace(batch_of(), body=body)) == [Ack()]
    assert "item" not in rejection(parts)
    assert parts.telemetry.count("riskfleet_refusals_total", door="amqp") == 1


async def test_a_batch_of_which_one_event_is_not_confirmed_is_kept_and_settles_when_it_comes_again() -> None:
    parts = DoorParts()
    delivery = batch_of(cloudevent(), cloudevent(id="A-2"), b"{}")
    parts.publisher.answers = [Confirm.CONFIRMED, Confirm.UNKNOWN]
    assert isinstance((await settled(parts, delivery))[0], Pause)
    assert await settled(parts, replace(delivery, redelivered=True)) == [Ack()]
    assert len(parts.store.states) == 2
    both = batch_of(cloudevent(), b"{}", b"[]")
    parts.publisher.answers = [Confirm.CONFIRMED, Confirm.UNKNOWN, Confirm.CONFIRMED]
    assert isinstance((await settled(parts, both))[0], Pause)  # a rejection that is not confirmed is owed too


async def test_decisions_that_a_repeated_batch_may_have_missed_are_sent_again() -> None:
    parts = DoorParts()
    delivery = batch_of(cloudevent(), cloudevent(id="A-2"), cloudevent())
    await settled(parts, delivery)
    row = parts.decided(event_id_of(ACME, "/tills|A-1"), ACME)
    assert await settled(parts, delivery) == [Ack()]
    assert [message.body for message in parts.publisher.to(DECISIONS)] == [row.decision]


async def test_an_outage_does_not_have_a_batch_parked_for_its_neighbours_defect() -> None:
    parts = DoorParts(ledger=BrokenLedger())
    await settled(parts, batch_of(cloudevent()))
    parts.store.move_on(ACME, event_id_of(ACME, "/tills|A-1"), 1, Status.CREATED, b"")
    both = batch_of(cloudevent(), cloudevent(id="A-2"))
    parts.publisher.answers = [Confirm.UNKNOWN]
    assert isinstance((await settled(parts, both))[0], Pause)
    assert await settled(parts, both) == [Ack()]  # the defect alone: parked as it was sent
    (parked,) = [m for m in parts.publisher.messages if m.routing_key == parked_queue("ingress")]
    assert parked.body == both.body


# --- labels -----------------------------------------------------------------------------------------

LABEL_SENT = replace(
    SENT,
    routing_key="acme.label",
    message_id=None,
    body=canonical_json(
        {"event": "order-1", "label": "cleared", "source": "desk", "effective_at": "2026-02-14T00:00:00Z"}
    ),
)


async def test_a_label_is_accepted_with_one_confirmed_message_and_is_no_event() -> None:
    parts = DoorParts()
    assert await settled(parts, LABEL_SENT) == [Ack()]
    (message,) = parts.publisher.messages
    assert message.routing_key == LABELS_QUEUE
    assert label_from(message.body).event_id == ORDER
    assert parts.store.states == {}
    assert parts.telemetry.count("riskfleet_labels_total", door="amqp", result="accepted") == 1


@pytest.mark.parametrize(
    ("delivery", "problem"),
    [
        (replace(LABEL_SENT, body=b"{"), "malformed-json"),
        (replace(LABEL_SENT, body=event_body()), "invalid-event"),
        (replace(LABEL_SENT, content_type="application/cloudevents+json"), "unsupported-media-type"),
        (replace(LABEL_SENT, content_type="application/cloudevents-batch+json"), "unsupported-media-type"),
        (replace(LABEL_SENT, routing_key="globex.label"), "foreign-tenant"),
        (replace(SENT, body=LABEL_SENT.body), "invalid-event"),
    ],
)
async def test_a_refused_label_is_answered_and_counted_once(delivery: Delivery, problem: str) -> None:
    parts = DoorParts()
    assert await settled(parts, delivery) == [Ack()]
    assert rejection(parts)["type"].endswith(f":{problem}")
    assert parts.telemetry.count("riskfleet_refusals_total", door="amqp", problem=problem) == 1


@pytest.mark.parametrize("answer", [Confirm.UNKNOWN, Confirm.REFUSED, Confirm.UNROUTABLE])
async def test_a_label_that_is_not_confirmed_is_not_lost(answer: Confirm) -> None:
    parts = DoorParts()
    parts.publisher.answers = [answer]
    assert isinstance((await settled(parts, LABEL_SENT))[0], Hold if answer is Confirm.REFUSED else Pause)
    assert await settled(parts, replace(LABEL_SENT, redelivered=True)) == [Ack()]


# --- whatever is sent -------------------------------------------------------------------------------

naughty_headers = st.dictionaries(
    st.sampled_from(
        ["traceparent", "x-delivery-count", "ce-id", "ce-specversion", "cloudEvents:source", "cloudEvents_type", "ce-"]
    ),
    st.none() | st.text(max_size=3) | st.integers() | st.just("1.0") | st.binary(max_size=2),
)


@settings(deadline=None)
@given(
    st.builds(
        Delivery,
        queue=st.just("risk.ingest.acme"),
        body=st.binary(max_size=40)
        | st.sampled_from([event_body(), LABEL_SENT.body, STRUCTURED_SENT.body, b"[" + STRUCTURED_SENT.body + b"]"]),
        routing_key=st.text(max_size=8) | st.sampled_from(["acme.risk", "globex.risk", "acme.", ".risk", "acme.label"]),
        message_id=st.none() | st.text(max_size=5) | st.just("order-1"),
        user_id=st.none() | st.sampled_from(["up-acme", "up-globex", "x"]),
        correlation_id=st.none() | st.text(max_size=5),
        content_type=st.none()
        | st.text(max_size=5)
        | st.sampled_from(["application/json", "application/cloudevents+json", "application/cloudevents-batch+json"]),
        headers=naughty_headers,
        redelivered=st.booleans(),
    )
)
def test_every_delivery_ends_in_an_event_a_document_a_letter_or_a_system_record(delivery: Delivery) -> None:
    parts = DoorParts()
    assert asyncio.run(settled(parts, delivery)) == [Ack()]
    scope = {"up-acme": "acme", "up-globex": "globex"}.get(delivery.user_id or "")
    others = [message for message in parts.publisher.messages if ".audit." not in message.routing_key]
    assert len(others) == (1 if scope or delivered_too_often(delivery) else 0)
    for message in parts.publisher.to(REJECTED):
        assert message.routing_key.startswith(f"{scope}.")


NAUGHTY = (
    Path(os.environ.get("RISKFLEET_SHARED") or Path(__file__).parents[3] / "shared")
    / "corpora"
    / "naughty-strings"
    / "blns.json"
)


@pytest.mark.skipif(
    not NAUGHTY.exists(), reason=f"naughty strings NOT FOUND at {NAUGHTY}: set RISKFLEET_SHARED; fewer bad inputs tried"
)
def test_no_naughty_string_in_any_property_is_more_than_an_event_or_a_rejection() -> None:
    strings = json.loads(NAUGHTY.read_bytes())
    assert len(strings) > 500
    parts = DoorParts()
    deliveries = [
        delivery
        for text in strings
        for delivery in (
            replace(
                SENT, body=event_body(id=None), message_id=text, correlation_id=text, headers={"traceparent": text}
            ),
            replace(SENT, body=text.encode(), routing_key=f"acme.{text}", content_type=text),
            replace(SENT, body=event_body(id=None), headers={f"ce-{name}": text for name in (*ENVELOPED, text)}),
            replace(STRUCTURED_SENT, body=json.dumps(cloudevent(id=text, time=text, source=text)).encode()),
            replace(LABEL_SENT, body=json.dumps({"event": text, "label": text, "source": text, text: text}).encode()),
        )
    ]
    assert asyncio.run(settled(parts, *deliveries)) == [Ack()] * len(deliveries)
    assert not [message for message in parts.publisher.messages if message.routing_key == parked_queue("ingress")]
