"""One way in: what is accepted is published once and confirmed; what is refused says why and names the event."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
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
    classify,
)
from contracts.lifecycle import Status
from contracts.ports import Confirm, DecisionRow
from contracts.state import AuditRecord
from contracts.telemetry import Correlation, bind_correlation
from contracts.tenancy import TenantScope
from contracts.topology import WORK, audit_queue, stage_queue
from gateway.intake import (
    ITEM_SEPARATOR,
    Admission,
    Foreseen,
    Refusal,
    Submission,
    correlation_of,
    foresee,
    item_identity,
)
from gateway.refusals import RefusalCounter, RefusalPolicy
from tests.fakes import CountingIds, DoorParts, InMemoryLedger, SteppingClock, event_body

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
        (replace(POST, body=event_body(id="a\x1fb")), DomainValidationError, "/id"),
        (replace(POST, body=event_body(corrects=event_id_of(ACME, "order-1"))), DomainValidationError, "/corrects"),
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


async def test_an_event_may_correct_another_one_and_another_tenants_number_is_another_event() -> None:
    for corrected in (event_id_of(ACME, "order-0"), event_id_of(GLOBEX, "order-1")):
        assert (await admitted(DoorParts(), replace(POST, body=event_body(corrects=corrected)))).event_id != corrected


async def test_what_the_sender_names_no_trace_of_has_the_doors_own() -> None:
    unnamed = replace(POST, correlation_id=None, traceparent="nonsense")
    with bind_correlation(Correlation(correlation_id="of-the-request", traceparent=POST.traceparent)):
        assert (await admitted(DoorParts(), unnamed)).correlation_id == "of-the-request"
        assert (await admitted(DoorParts())).correlation_id == "corr-1"
    assert (await admitted(DoorParts(), unnamed)).correlation_id not in ("of-the-request", "corr-1")


@pytest.mark.parametrize(
    "submission",
    [
        POST,
        replace(POST, kind="risk", body=event_body(kind=None)),
        replace(POST, body=event_body(id=None), identity_header="key"),
        replace(POST, body=event_body(id=None), fallback_identity="made"),
    ],
)
async def test_what_is_foreseen_of_a_submission_is_what_it_becomes(submission: Submission) -> None:
    parts = DoorParts()
    foreseen = foresee(submission)
    admission = await admitted(parts, submission)
    state = state_from_bytes(published_entry(parts).body)
    assert foreseen == Foreseen(admission.identity, state.body_digest)
    assert foresee(replace(submission, body=b"{")) is None


def test_an_identity_that_must_be_made_cannot_be_foreseen() -> None:
    foreseen = foresee(replace(POST, body=event_body(id=None)))
    assert foreseen is not None
    assert foreseen.identity is None


# --- batches ----------------------------------------------------------------------------------------


def item(number: int, **changes: object) -> bytes:
    return event_body(id=f"order-{number}", **changes)


async def batch(parts: DoorParts, *items: bytes | RiskfleetError, key: str | None = None) -> list[Admission | Refusal]:
    verdicts = await parts.intake.admit_batch(items, replace(POST, identity_header=key))
    assert len(verdicts) == len(items)
    return verdicts


def results(verdicts: list[Admission | Refusal]) -> list[str]:
    return [
        type(verdict.error).__name__ if isinstance(verdict, Refusal) else "replayed" if verdict.replayed else "new"
        for verdict in verdicts
    ]


async def test_a_bad_item_never_harms_its_neighbours_and_every_one_is_counted() -> None:
    parts = DoorParts()
    unmapped = DomainValidationError("the record has 3 cells")
    verdicts = await batch(
        parts, item(1), b"{", item(2, kind="x"), unmapped, b" " * 70_000, b"NaN", item(3, tenant_id="globex"), item(4)
    )
    assert results(verdicts) == [
        "new",
        "MalformedBodyError",
        "DomainValidationError",
        "DomainValidationError",
        "OversizedBodyError",
        "MalformedBodyError",
        "TenantIsolationError",
        "new",
    ]
    assert len(parts.publisher.entries()) == 2
    assert parts.telemetry.count("riskfleet_requests_total", door="http", result="refused") == 6
    assert parts.telemetry.count("riskfleet_requests_total", door="http", result="accepted") == 2
    parts.clock.step(1)
    assert await parts.refusals.flush() == 0
    records = [m for m in parts.publisher.messages if m.routing_key == audit_queue(ACME.partition(4))]
    assert len(records) == 1  # one carrier


async def test_answers_stand_in_the_order_of_the_items_also_far_beyond_one_group() -> None:
    parts = DoorParts()
    numbers = [number * 7919 % 1000 for number in range(1000)]
    verdicts = await batch(parts, *(item(number) for number in numbers))
    assert [verdict.identity for verdict in verdicts] == [f"order-{number}" for number in numbers]
    assert results(verdicts) == ["new"] * 1000
    assert results(await batch(parts, *(item(number) for number in numbers))) == ["replayed"] * 1000


@pytest.mark.parametrize("apart", [0, 1, 63, 64, 200])
async def test_of_two_items_with_one_identity_the_first_wins(apart: int) -> None:
    parts = DoorParts()
    between = [item(number) for number in range(2, 2 + apart)]
    same, *_, again = await batch(parts, item(1), *between, item(1))
    assert results([same, again]) == ["new", "replayed"]
    assert (same.event_id, same.identity) == (again.event_id, again.identity)
    assert len(parts.store.states) == 1 + apart
    assert len({e.body for e in parts.publisher.entries() if e.header.event == same.event_id}) == 1
    parts = DoorParts()
    first, *_, other = await batch(parts, item(1), *between, item(1, type="login"))
    assert results([first, other]) == ["new", "IdempotencyConflictError"]
    stored = parts.store.states[ACME, event_id_of(ACME, "order-1")].stored
    assert stored is not None
    assert state_from_bytes(stored).event.type == "payment.card"


async def test_items_share_the_confirm_of_their_carrier_and_a_repeat_of_the_batch_is_safe() -> None:
    parts = DoorParts()
    parts.publisher.answers = [Confirm.UNKNOWN]
    first, again, other = await batch(parts, item(1), item(1), item(2))
    assert results([first, again, other]) == ["MessagingFailureError"] * 3
    assert first.event_id == again.event_id
    assert results(await batch(parts, item(1), item(1), item(2))) == ["replayed"] * 3


async def test_what_comes_in_while_a_publish_is_under_way_travels_in_one_carrier() -> None:
    parts = DoorParts()
    assert results(await batch(parts, *(item(number) for number in range(200)))) == ["new"] * 200
    sizes = [m.headers[CARRIER_HEADER] for m in parts.publisher.messages]
    assert sum(sizes) == len(parts.publisher.entries()) == 200
    assert max(sizes) > 32


async def test_a_queue_that_does_not_answer_holds_up_no_other_partition() -> None:
    parts = DoorParts()
    globex = TenantScope("globex")
    assert globex.partition(4) != ACME.partition(4)
    parts.publisher.held[stage_queue("retrieval", ACME.partition(4))] = held = asyncio.Event()
    stuck = asyncio.create_task(parts.intake.admit(POST))
    for _ in range(20):
        assert isinstance(await parts.intake.admit(replace(POST, scope=globex)), Admission)
    assert not stuck.done()
    held.set()
    assert isinstance(await stuck, Admission)


async def test_a_batchs_key_gives_each_item_without_an_id_an_identity_that_a_repeat_has_again() -> None:
    parts = DoorParts()
    nameless = event_body(id=None)
    verdicts = await batch(parts, nameless, item(7), nameless, b"{", key="batch-1")
    assert [verdict.identity for verdict in verdicts] == ["batch-1\x1f0", "order-7", "batch-1\x1f2", None]
    assert len(parts.store.states) == 3
    again = await batch(parts, nameless, item(7), nameless, b"{", key="batch-1")
    assert results(again) == ["replayed", "replayed", "replayed", "MalformedBodyError"]
    assert results(await batch(parts, event_body(id=None, type="login"), key="batch-1")) == ["IdempotencyConflictError"]
    assert results(await batch(parts, nameless, key="batch-2")) == ["new"]


async def test_an_item_without_any_identity_is_refused_even_where_a_single_post_would_get_one() -> None:
    assert POST.allow_generated_identity
    (verdict,) = await batch(DoorParts(), event_body(id=None))
    assert isinstance(verdict, Refusal)
    assert [pointer for pointer, _ in verdict.error.pointers] == ["/id"]


@pytest.mark.parametrize("key", ["", "x" * 257, "a\x1fb", "a\nb"])
async def test_a_batch_with_an_unusable_key_is_refused_item_by_item(key: str) -> None:
    verdicts = await batch(DoorParts(), item(1), event_body(id=None), key=key)
    assert results(verdicts) == ["InvalidMetadataError"] * 2


@settings(deadline=None)
@given(st.text(max_size=8), st.text(max_size=8), st.integers(0, 999), st.integers(0, 999))
def test_an_items_identity_is_never_that_of_another_key_item_or_event(
    key: str, other: str, index: int, other_index: int
) -> None:
    if key.isprintable() and other.isprintable():
        same = item_identity(key, index) == item_identity(other, other_index)
        assert same == ((key, index) == (other, other_index))
    # What names an event in any other way holds no separator: see the refusals above.
    assert not item_identity(key, index).isprintable()
    assert ITEM_SEPARATOR in item_identity(key, index)


async def test_a_defect_in_one_item_is_that_items_alone() -> None:
    parts = DoorParts(ledger=BrokenLedger())
    await batch(parts, item(1))
    parts.store.move_on(ACME, event_id_of(ACME, "order-1"), 1, Status.CREATED, None)  # a repeat asks the ledger
    assert results(await batch(parts, item(1), item(2))) == ["UnexpectedError", "new"]


async def test_while_a_server_is_away_every_item_is_named_and_a_repeat_completes_the_batch() -> None:
    parts = DoorParts()
    parts.store.down = True
    verdicts = await batch(parts, item(1), b"{", item(2))
    assert results(verdicts) == ["StateStoreError", "MalformedBodyError", "StateStoreError"]
    assert verdicts[2].event_id == event_id_of(ACME, "order-2")
    parts.store.down = False
    assert results(await batch(parts, item(1), b"{", item(2))) == ["new", "MalformedBodyError", "new"]


class BrokenLedger(InMemoryLedger):
    """A ledger with a defect: it raises what no port may raise."""

    async def decisions(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[DecisionRow | None]:
        raise KeyError("payload")


# --- without a confirm ------------------------------------------------------------------------------


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


@settings(deadline=None)
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


@settings(deadline=None)
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


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
events = fields.map(lambda d: json.loads(event_body()) | d)
envelopes = st.fixed_dictionaries(
    {"data": events | json_values, "specversion": st.sampled_from(["1.0", "1.0", "0.3", 1])},
    optional={
        "id": st.text(max_size=4) | json_values,
        "source": st.sampled_from(["/s", "a|b", "", 5, "/" + "s" * 300]),
        "type": st.sampled_from(["login", "com.Example", None, 5]),
        "time": st.sampled_from(["2026-01-31T11:59:59Z", "now", 5]),
        "traceparent": st.text(max_size=4) | json_values,
    },
)
bodies = st.binary(max_size=64) | (json_values | events | envelopes).map(lambda d: json.dumps(d).encode())


@settings(deadline=None)
@given(
    st.lists(bodies | st.just(DomainValidationError("no row")), max_size=5),
    st.none() | st.text(max_size=6),
    st.booleans(),
    st.none() | st.dictionaries(st.sampled_from(["id", "source", "type", "specversion", "time"]), st.text(max_size=4)),
)
def test_whatever_a_batch_holds_each_item_is_admitted_or_refused_with_a_client_error(
    items: list[bytes | RiskfleetError], key: str | None, structured: bool, attributes: dict[str, str] | None
) -> None:
    parts = DoorParts()
    template = replace(POST, identity_header=key, structured=structured, attributes=attributes)
    verdicts = asyncio.run(parts.intake.admit_batch(items, template))
    assert len(verdicts) == len(items)
    for verdict in verdicts:
        if isinstance(verdict, Refusal):
            assert classify(verdict.error).status < 500
            assert verdict.error.detail
        else:
            assert verdict.event_id == event_id_of(ACME, verdict.identity)
    admitted_ids = {verdict.event_id for verdict in verdicts if isinstance(verdict, Admission)}
    assert {event_id for _, event_id in parts.store.states} >= admitted_ids


SHARED = Path(os.environ.get("RISKFLEET_SHARED") or Path(__file__).parents[3] / "shared")
NAUGHTY = SHARED / "corpora" / "naughty-strings" / "blns.json"

needs_naughty = pytest.mark.skipif(
    not NAUGHTY.exists(), reason=f"naughty strings NOT FOUND at {NAUGHTY}: set RISKFLEET_SHARED; fewer bad inputs tried"
)

FREE = """id subject.type subject.id subject.name counterparty.type counterparty.id counterparty.name attributes.x text
metadata.x"""
BOUND = "corrects kind type occurred_at amount.value amount.currency risk_score regulatory_flags attributes metadata"


def event_with(places: str, naughty: str) -> dict[str, Any]:
    """An otherwise valid event with the string in some places; validation looks at each of them."""
    document: dict[str, Any] = json.loads(event_body())
    for place in places.split():
        target = document
        *parents, leaf = place.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = naughty
    return document


def naughty_submissions(naughty: str) -> list[Submission]:
    """The string in every field, as the name of a field, in every header, and as the body itself."""
    documents = [event_with(places, naughty) for places in (FREE, BOUND, "tenant_id", "schema_version")]
    documents += [json.loads(event_body()) | {"attributes": {naughty: naughty}, "metadata": {naughty: naughty}}]
    documents += [json.loads(event_body()) | {naughty: naughty}]
    cloudevent = {"specversion": "1.0", "id": naughty, "source": naughty, "type": naughty, "time": naughty}
    wrapped = cloudevent | {"data": json.loads(event_body(id=None)), "traceparent": naughty, naughty: naughty}
    return [
        *(replace(POST, body=json.dumps(document, ensure_ascii=False).encode()) for document in documents),
        replace(POST, body=naughty.encode()),
        replace(POST, body=event_body(id=None), identity_header=naughty, correlation_id=naughty, traceparent=naughty),
        replace(POST, body=json.dumps(wrapped).encode(), structured=True),
        replace(POST, body=event_body(id=None, type=None), attributes=cloudevent | {"specversion": "1.0", "time": ""}),
    ]


@needs_naughty
def test_no_naughty_string_in_any_place_is_more_than_an_event_or_a_client_error() -> None:
    strings = json.loads(NAUGHTY.read_bytes())
    assert len(strings) > 500
    parts = DoorParts()

    async def scenario() -> list[Admission | Refusal]:
        return [
            await parts.intake.admit(submission) for naughty in strings for submission in naughty_submissions(naughty)
        ]

    for verdict in asyncio.run(scenario()):
        if isinstance(verdict, Refusal):
            assert classify(verdict.error).status < 500, verdict
    # What was taken is stored in bytes that the next reader writes in the same way.
    stored = {published_entry(parts, index).body for index in range(len(parts.publisher.messages))}
    assert len(stored) > len(strings)
    assert all(canonical_json(json.loads(body)) == body for body in stored)


def test_a_clock_that_goes_back_keeps_no_refusal_waiting_for_it() -> None:
    """A refused delivery is held until its second is closed; an hour back would hold it for an hour."""
    counter = RefusalCounter(RefusalPolicy(boot="b" * 32))
    noon = SteppingClock().moment
    assert counter.take(noon) == ()
    counter.note(ACME, "invalid-event", "amqp", noon)
    back = noon - timedelta(hours=1)
    records = [record for second in range(3) for record in counter.take(back + timedelta(seconds=second))]
    assert len(records) == 1
    counter.note(ACME, "invalid-event", "amqp", back)
    records += [record for second in range(3) for record in counter.take(back + timedelta(seconds=second))]
    assert len({record.record_id for record in records}) == 2  # no second is closed twice
