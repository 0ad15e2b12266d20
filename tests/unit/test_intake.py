"""One way in: what is accepted is published once and confirmed; what is refused says why and names the event."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.codec import CARRIER_HEADER, Entry, decode_carrier, record_of_entry, state_from_bytes
from contracts.events import canonical_json, event_id_of
from contracts.failures import (
    AuthenticationError,
    DatabaseError,
    DomainValidationError,
    IdempotencyConflictError,
    InvalidMetadataError,
    MessagingFailureError,
    OversizedBodyError,
    RiskfleetError,
    StateStoreError,
    TenantIsolationError,
    UnsupportedSchemaVersionError,
)
from contracts.lifecycle import Status
from contracts.ports import Confirm
from contracts.state import AuditRecord
from contracts.tenancy import TenantScope
from contracts.topology import WORK, audit_queue, stage_queue
from gateway.intake import Admission, Refusal, Submission, correlation_of
from gateway.refusals import RefusalCounter, RefusalPolicy
from tests.fakes import CountingIds, DoorParts, SteppingClock, event_body

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")
POST = Submission(
    scope=ACME,
    kind=None,
    body=event_body(),
    identity_header=None,
    correlation_id="corr-1",
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    source="http",
    allow_generated_identity=True,
)
DELIVERY = replace(POST, source="amqp", allow_generated_identity=False)


async def admitted(parts: DoorParts, submission: Submission = POST) -> Admission:
    verdict = await parts.intake.admit(submission)
    assert isinstance(verdict, Admission), verdict
    return verdict


async def refused(parts: DoorParts, submission: Submission) -> Refusal:
    verdict = await parts.intake.admit(submission)
    assert isinstance(verdict, Refusal), verdict
    return verdict


def published_entry(parts: DoorParts, index: int = -1) -> Entry:
    (entry,) = decode_carrier(parts.publisher.messages[index].body)
    assert isinstance(entry, Entry)
    return entry


async def test_an_accepted_event_is_one_confirmed_mandatory_message_to_its_partition() -> None:
    parts = DoorParts()
    admission = await admitted(parts)
    (message,) = parts.publisher.messages
    entry = published_entry(parts)
    assert (message.exchange, message.routing_key) == (WORK, stage_queue("retrieval", ACME.partition(4)))
    assert message.mandatory
    assert message.persistent
    assert message.confirm
    assert message.headers == {CARRIER_HEADER: 1}
    assert message.message_id == entry.message_id
    state = state_from_bytes(entry.body)
    assert (state.n, state.status, state.source, state.correlation_id) == (0, Status.RECEIVED, "http", "corr-1")
    assert state.traceparent == POST.traceparent
    assert admission.event_id == event_id_of(ACME, "order-1") == state.event_id
    assert not admission.replayed
    assert parts.telemetry.count("riskfleet_requests_total", door="http", result="accepted") == 1
    assert parts.telemetry.count("riskfleet_request_seconds", door="http") == 0.0


async def test_a_repeat_publishes_the_stored_bytes_again_not_new_ones() -> None:
    parts = DoorParts()
    first = await admitted(parts)
    parts.clock.step(5)
    again = await admitted(parts, replace(POST, correlation_id="corr-2", source="amqp"))
    assert again.replayed
    assert again.event_id == first.event_id
    assert parts.publisher.messages[0] == parts.publisher.messages[1]


async def test_a_repeat_of_an_event_under_way_publishes_nothing() -> None:
    parts = DoorParts()
    first = await admitted(parts)
    parts.store.move_on(ACME, first.event_id, 2, Status.VALIDATED, b"later")
    again = await admitted(parts)
    assert again.replayed
    assert again.decision is None
    assert len(parts.publisher.messages) == 1


async def test_a_repeat_of_a_decided_event_gets_the_decision() -> None:
    parts = DoorParts()
    first = await admitted(parts)
    row = parts.decided(first.event_id, ACME)
    again = await admitted(parts)
    assert (again.replayed, again.decision, again.status) == (True, row, Status.APPROVED)
    assert len(parts.publisher.messages) == 1


async def test_nobody_gets_the_decision_about_another_body() -> None:
    parts = DoorParts()
    first = await admitted(parts)
    refusal = await refused(parts, replace(POST, body=event_body(amount={"value": "99", "currency": "EUR"})))
    assert isinstance(refusal.error, IdempotencyConflictError)
    assert refusal.event_id == first.event_id
    row = parts.decided(first.event_id, ACME)
    parts.ledger.rows[ACME, first.event_id] = replace(row, body_digest="0" * 64)  # Redis knows less than PostgreSQL
    assert isinstance((await refused(parts, POST)).error, IdempotencyConflictError)


async def test_the_same_identity_of_two_tenants_is_two_events() -> None:
    parts = DoorParts()
    assert (await admitted(parts)).event_id != (await admitted(parts, replace(POST, scope=GLOBEX))).event_id


@pytest.mark.parametrize(
    ("submission", "error", "pointer"),
    [
        (replace(POST, body=b"{"), DomainValidationError, None),
        (replace(POST, body=b"[]"), DomainValidationError, ""),
        (replace(POST, body=b" " * 70_000), OversizedBodyError, None),
        (replace(POST, body=event_body(schema_version="2.0")), UnsupportedSchemaVersionError, "/schema_version"),
        (replace(POST, body=event_body(surprise=1)), DomainValidationError, "/surprise"),
        (replace(POST, kind="compliance"), DomainValidationError, "/kind"),
        (replace(POST, body=event_body(kind=None)), DomainValidationError, "/kind"),
        (replace(POST, body=event_body(tenant_id="globex")), TenantIsolationError, "/tenant_id"),
        (replace(POST, identity_header="order-2"), DomainValidationError, "/id"),
        (replace(POST, identity_header=""), InvalidMetadataError, None),
        (replace(POST, identity_header="x" * 257), InvalidMetadataError, None),
        (replace(POST, identity_header="a\nb"), InvalidMetadataError, None),
        (replace(DELIVERY, body=event_body(id=None)), DomainValidationError, "/id"),
    ],
)
async def test_a_refusal_names_the_field_and_publishes_nothing(
    submission: Submission, error: type[RiskfleetError], pointer: str | None
) -> None:
    parts = DoorParts()
    refusal = await refused(parts, submission)
    assert isinstance(refusal.error, error)
    if pointer is not None:
        assert pointer in [name for name, _ in refusal.error.pointers]
    assert parts.publisher.messages == []
    assert parts.store.states == {}
    assert parts.telemetry.count("riskfleet_requests_total", result="refused") == 1


async def test_the_path_fills_in_a_kind_that_the_body_leaves_out() -> None:
    admission = await admitted(DoorParts(), replace(POST, kind="risk", body=event_body(kind=None)))
    assert admission.kind == "risk"


async def test_equal_identities_in_body_and_header_are_one() -> None:
    parts = DoorParts()
    by_both = await admitted(parts, replace(POST, identity_header="order-1"))
    parts = DoorParts()
    by_header = await admitted(parts, replace(POST, body=event_body(id=None), identity_header="order-1"))
    assert by_both.event_id == by_header.event_id


async def test_only_a_single_http_post_gets_an_identity_and_is_told_it() -> None:
    parts = DoorParts()
    admission = await admitted(parts, replace(POST, body=event_body(id=None)))
    assert admission.event_id == event_id_of(ACME, admission.identity)
    parts.publisher.answers = [Confirm.UNKNOWN]
    refusal = await refused(parts, replace(POST, body=event_body(id=None)))
    assert refusal.identity is not None
    assert refusal.event_id == event_id_of(ACME, refusal.identity)


@pytest.mark.parametrize("answer", [Confirm.UNKNOWN, Confirm.REFUSED, Confirm.UNROUTABLE])
async def test_without_a_confirm_nothing_is_accepted_and_a_repeat_completes_it(answer: Confirm) -> None:
    parts = DoorParts()
    parts.publisher.answers = [answer]
    refusal = await refused(parts, POST)
    assert isinstance(refusal.error, MessagingFailureError)
    assert refusal.event_id == event_id_of(ACME, "order-1")
    assert ("topology apply" in refusal.error.detail) == (answer is Confirm.UNROUTABLE)
    assert parts.telemetry.count("riskfleet_requests_total", result="unavailable") == 1
    assert (await admitted(parts)).replayed
    assert parts.publisher.messages[0] == parts.publisher.messages[1]


async def test_an_unreachable_store_is_a_refusal_that_names_the_event() -> None:
    parts = DoorParts()
    parts.store.down = True
    refusal = await refused(parts, POST)
    assert isinstance(refusal.error, StateStoreError)
    assert refusal.event_id == event_id_of(ACME, "order-1")
    parts.store.down = False
    await admitted(parts)
    parts.store.move_on(ACME, refusal.event_id, 2, Status.VALIDATED, None)
    parts.ledger.down = True
    assert isinstance((await refused(parts, POST)).error, DatabaseError)


@pytest.mark.parametrize(
    ("sent", "taken"),
    [("a", True), ("x" * 128, True), ("x" * 129, False), ("", False), (None, False), ("ü", False), ("a\nb", False)],
)
def test_a_correlation_id_is_taken_when_usable_and_else_made(sent: str | None, taken: bool) -> None:
    made = correlation_of(sent, None, CountingIds()).correlation_id
    assert made
    assert (made == sent) == taken


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", False),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", False),
        ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", False),
        ("00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", False),
        ("nonsense", False),
    ],
)
def test_a_traceparent_is_taken_only_when_it_follows_w3c(sent: str, taken: bool) -> None:
    carried = correlation_of(None, sent, CountingIds()).traceparent
    assert (carried == sent) == taken
    assert carried is not None
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", carried)


async def test_refusals_become_one_audit_record_per_tenant_problem_and_second() -> None:
    parts = DoorParts()
    for _ in range(3):
        await refused(parts, replace(POST, body=b"{"))
    await refused(parts, replace(POST, scope=GLOBEX, body=b"{"))
    parts.refusals.note(None, AuthenticationError(), "http", audited=False)
    assert await parts.refusals.flush() == 0
    assert parts.publisher.messages == []  # the second is still open
    parts.clock.step(1)
    parts.publisher.answers = [Confirm.UNKNOWN, Confirm.CONFIRMED]
    assert await parts.refusals.flush() > 0
    sent = list(parts.publisher.messages)
    assert await parts.refusals.flush() == 0
    assert parts.publisher.messages == [*sent, *sent]  # unconfirmed: the same messages again
    records = [
        record_of_entry(entry) for message in sent for entry in decode_carrier(message.body) if isinstance(entry, Entry)
    ]
    bodies = {record.scope: json.loads(record.body) for record in records}
    assert bodies[ACME]["refusals"] == {
        "problem": "malformed-json",
        "count": 3,
        "second": "2026-01-31T12:00:00Z",
        "door": "http",
    }
    assert bodies[ACME]["tenant"] == "acme"
    assert bodies.keys() == {ACME, GLOBEX}
    assert {m.routing_key for m in sent} == {audit_queue(ACME.partition(4)), audit_queue(GLOBEX.partition(4))}


async def test_stopping_flushes_the_open_second_too() -> None:
    parts = DoorParts()
    stop = asyncio.Event()
    await refused(parts, replace(POST, body=b"{"))
    stop.set()
    await parts.refusals.run(stop)
    assert [m.routing_key for m in parts.publisher.messages] == [audit_queue(ACME.partition(4))]


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.sampled_from(["a", "b"]))), st.integers(1, 4))
def test_no_refusal_is_counted_twice_or_lost_whatever_the_clock_does(
    steps: list[tuple[int, bool, str]], max_open: int
) -> None:
    counter, clock = RefusalCounter(RefusalPolicy("boot", max_open)), SteppingClock()
    records: list[AuditRecord] = []
    for seconds, take, problem in steps:
        clock.moment += timedelta(seconds=seconds)
        counter.note(ACME, problem, "http", clock.now())
        if take:
            records += counter.take(clock.now())
    records += counter.take(clock.now(), final=True)
    assert sum(json.loads(record.body)["refusals"]["count"] for record in records) == len(steps)
    assert len({record.record_id for record in records}) == len(records)
    assert counter.take(clock.now(), final=True) == ()


fields: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=5) | st.integers(-(2**63), 2**63 - 1) | st.none(),
        "kind": st.sampled_from(["risk", "compliance", "label", "", 1]),
        "type": st.sampled_from(["login", "A", 5]),
        "occurred_at": st.sampled_from(["2026-01-31T11:59:59Z", "2026-01-31T11:59:59", "9999-99-99T00:00:00Z", 3]),
        "subject": st.sampled_from([{"type": "c", "id": "1"}, {"type": "c"}, [], None]),
        "attributes": st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.floats() | st.lists(st.none())),
        "regulatory_flags": st.just([]) | st.just([{"code": "x", "level": "high"}]) | st.integers(-(2**63), 2**63 - 1),
        "risk_score": st.floats() | st.integers(-(2**63), 2**63 - 1),
        "amount": st.sampled_from([{"value": "1e5", "currency": "EUR"}, {"value": "1.5", "currency": "EUR"}, 7]),
        "tenant_id": st.sampled_from(["acme", "globex", 7]),
        "metadata": st.just({"a": 1}) | st.text(max_size=3),
        "schema_version": st.sampled_from(["1.0", "2.0", 1, None]),
    },
)


@given(
    fields.map(lambda d: json.dumps(d).encode()) | st.binary(max_size=64) | fields.map(lambda d: event_body(**d)),
    st.none() | st.text(max_size=6),
    st.sampled_from([None, "risk", "compliance"]),
    st.booleans(),
)
def test_whatever_is_sent_is_admitted_or_refused_with_a_client_error(
    body: bytes, header: str | None, kind: str | None, single_post: bool
) -> None:
    parts = DoorParts()
    submission = replace(
        POST, body=body, identity_header=header, kind=kind, allow_generated_identity=single_post, correlation_id=header
    )
    verdict = asyncio.run(parts.intake.admit(submission))
    if isinstance(verdict, Admission):
        assert len(parts.publisher.messages) == 1
        assert canonical_json(json.loads(published_entry(parts).body)) == published_entry(parts).body
    else:
        assert isinstance(verdict.error, DomainValidationError | TenantIsolationError)
        assert parts.publisher.messages == []
