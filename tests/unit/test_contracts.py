"""The shared language: stable hashes, bytes that come back as they were, moves and outcomes that the tables allow."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from contracts.codec import (
    CARRIER_HEADER,
    MAX_CARRIER_BYTES,
    MAX_ENTRIES,
    Entry,
    EntryHeader,
    carriers,
    decode_carrier,
    encode_carrier,
    entry_of,
    entry_of_record,
    record_of_entry,
    state_from_bytes,
    upcast,
)
from contracts.events import event_id_of, parse_event
from contracts.failures import (
    InvalidStatusTransitionError,
    InvalidTenantError,
    UndecodableEntryError,
)
from contracts.lifecycle import FINAL_VERSION, TRANSITIONS, VERSION_OF, Status, check_transition
from contracts.messages import (
    audit_message,
    decision_message,
    ladder_message,
    parked_message,
    rejection_message,
    stage_message,
)
from contracts.outcomes import PRECEDENCE, STATUS_OF, Outcome, most_restrictive
from contracts.ports import DeadLetter, DecisionRow
from contracts.settlement import failure_headers, letter_from, undelivered_letters
from contracts.state import AuditRecord, Created, EventState, Pins, SubjectHistory, Thresholds, begin
from contracts.tenancy import VIRTUAL_SLOTS, TenantScope, jump_consistent_hash, virtual_slot
from contracts.topology import (
    DECISIONS,
    PARKED_SOURCES,
    REJECTED,
    RUNGS,
    STAGES,
    WORK,
    Layouts,
    Stage,
    audit_queue,
    first_rung,
    parked_queue,
    rung_exchange,
    stage_queue,
)
from tests.fakes import event_body

ACME = TenantScope("acme")
AT = "2026-01-31T12:00:00Z"


def received(**changes: object) -> EventState:
    event = parse_event(json.loads(event_body(**changes)))
    return begin(ACME, event_id_of(ACME, "order-1"), event, received_at=AT, source="http", correlation_id="c-1")


def created(state: EventState) -> EventState:
    pins = Pins(now=AT, model=None, policy=None, guardrail=None, thresholds=Thresholds())
    section = Created(at=AT, pins=pins, history=SubjectHistory())
    return state.transition(Status.CREATED, section, stage="retrieval", detail={"events_1d": 0})


# --- tenancy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "buckets", "bucket"),
    [
        (0, 1, 0),
        (1, 1, 0),
        (42, 57, 43),
        (0xDEAD10CC, 1, 0),
        (0xDEAD10CC, 666, 361),
        (256, 1024, 520),
        (2**64 - 1, 128, 92),
    ],
)
def test_jump_hash_has_the_vectors_of_its_other_implementations(key: int, buckets: int, bucket: int) -> None:
    assert jump_consistent_hash(key, buckets) == bucket


@given(st.integers(0, 2**64 - 1), st.integers(1, 2000))
def test_growing_by_a_bucket_moves_a_key_only_into_the_new_one(key: int, buckets: int) -> None:
    before, after = jump_consistent_hash(key, buckets), jump_consistent_hash(key, buckets + 1)
    assert 0 <= before < buckets
    assert after in (before, buckets)


def test_growing_moves_the_share_that_the_paper_promises() -> None:
    moved = sum(jump_consistent_hash(k, 8) != jump_consistent_hash(k, 9) for k in range(VIRTUAL_SLOTS))
    assert moved / VIRTUAL_SLOTS == pytest.approx(1 / 9, abs=0.02)


@given(st.integers(max_value=0))
def test_jump_hash_refuses_to_have_no_bucket(buckets: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        jump_consistent_hash(1, buckets)


def test_slots_are_stable_for_ever() -> None:
    """The values come from coreutils: the 14th to 16th hex digit of `printf %s TENANT | sha256sum`."""
    assert {name: virtual_slot(name) for name in ("acme", "globex", "a")} == {"acme": 2208, "globex": 4071, "a": 3530}


@pytest.mark.parametrize(
    "tenant_id",
    ["", "-a", "A", "acme.#", "a_b", "a b", "a\n", "acme\0", "ä", "a" * 64, "*", "a/b", "a:b", "{a}"],
)
def test_a_tenant_id_that_could_collide_is_refused(tenant_id: str) -> None:
    with pytest.raises(InvalidTenantError):
        TenantScope(tenant_id)


@given(st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True), st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True))
def test_no_two_tenants_share_a_key(one: str, other: str) -> None:
    assume(one != other and not other.startswith("-"))
    first, second = TenantScope(one), TenantScope(other)
    assert first.state_key("e") != second.state_key("e")
    assert first.ingest_queue != second.ingest_queue
    assert event_id_of(first, "x") != event_id_of(second, "x")


# --- lifecycle and outcomes -------------------------------------------------------------------------


@pytest.mark.parametrize(("current", "target"), list(itertools.product(Status, Status)))
def test_only_the_moves_of_the_table_are_legal(current: Status, target: Status) -> None:
    if target in TRANSITIONS[current]:
        check_transition(current, target)
        assert VERSION_OF[target] > VERSION_OF[current] or current is Status.AWAITING_APPROVAL
    else:
        with pytest.raises(InvalidStatusTransitionError):
            check_transition(current, target)


def test_every_status_is_in_every_table_and_can_be_reached() -> None:
    assert TRANSITIONS.keys() == VERSION_OF.keys() == set(Status)
    reached = {Status.RECEIVED}
    while more := {t for s in reached for t in TRANSITIONS[s]} - reached:
        reached |= more
    assert reached == set(Status)
    assert max(VERSION_OF.values()) == FINAL_VERSION


def test_a_state_refuses_an_illegal_move() -> None:
    section = created(received()).created
    assert section is not None
    with pytest.raises(InvalidStatusTransitionError):
        created(received()).transition(Status.RECEIVED, section, stage="x", detail={})


@given(st.lists(st.sampled_from(Outcome), min_size=1))
def test_the_most_restrictive_outcome_wins_in_any_order(outcomes: list[Outcome]) -> None:
    winner = most_restrictive(outcomes)
    assert all(PRECEDENCE.index(winner) >= PRECEDENCE.index(outcome) for outcome in outcomes)
    assert winner is most_restrictive(reversed(outcomes))


def test_precedence_is_approve_then_ask_then_reject() -> None:
    assert PRECEDENCE == (Outcome.APPROVED, Outcome.REQUIRE_APPROVAL, Outcome.REJECTED)
    assert STATUS_OF.keys() == set(Outcome)
    with pytest.raises(ValueError, match="empty"):
        most_restrictive([])


# --- codec ------------------------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8"), max_size=8)
headers = st.builds(
    EntryHeader,
    tenant=st.just("acme"),
    event=text,
    kind=text,
    stage=text,
    n=st.integers(0, 9),
    digest=text,
    body_digest=text,
    attempts=st.integers(0, 99),
    first_failed_at=st.none() | text,
    suspect=st.booleans(),
    reply_to=st.none() | text,
)
entries = st.builds(Entry, headers, st.binary(max_size=64))


@given(st.lists(entries, min_size=1, max_size=8))
def test_a_carrier_comes_back_as_it_was(batch: list[Entry]) -> None:
    assert decode_carrier(encode_carrier(batch)) == tuple(batch)


@given(st.lists(entries, min_size=1, max_size=3), st.integers(0, 200), st.binary(max_size=4))
def test_damaged_bytes_are_an_error_of_ours_or_entries_in_place(batch: list[Entry], at: int, junk: bytes) -> None:
    data = encode_carrier(batch)
    try:
        decoded = decode_carrier(data[:at] + junk + data[at + len(junk) :])
    except UndecodableEntryError:
        return
    assert all(isinstance(entry, Entry | UndecodableEntryError) for entry in decoded)


@given(st.lists(entries, min_size=1, max_size=3))
def test_a_truncated_carrier_is_refused_whole(batch: list[Entry]) -> None:
    data = encode_carrier(batch)
    for end in range(0, len(data), 7):
        with pytest.raises(UndecodableEntryError):
            decode_carrier(data[:end])


def test_a_bad_entry_is_an_error_alone() -> None:
    good = entry_of(received(), Stage.RETRIEVAL)
    data = encode_carrier((good, good)).replace(b'{"attempts"', b'["attempts"', 1)
    first, second = decode_carrier(data)
    assert isinstance(first, UndecodableEntryError)
    assert second == good


@pytest.mark.parametrize("count", [0, MAX_ENTRIES + 1])
def test_a_carrier_holds_1_to_64_entries(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        encode_carrier([entry_of(received(), Stage.RETRIEVAL)] * count)


@given(st.lists(st.integers(0, 200_000), max_size=80))
def test_grouping_loses_nothing_and_keeps_order_and_limits(sizes: list[int]) -> None:
    header = entry_of(received(), Stage.RETRIEVAL).header
    batch = [Entry(replace(header, n=n), bytes(size)) for n, size in enumerate(sizes)]
    groups = carriers(batch)
    assert [entry for group in groups for entry in group] == batch
    for group in groups:
        assert 1 <= len(group) <= MAX_ENTRIES
        assert len(group) == 1 or sum(len(entry.body) for entry in group) <= MAX_CARRIER_BYTES


@pytest.mark.parametrize("make", [received, lambda: created(received())])
def test_a_state_comes_back_from_its_bytes_with_the_same_bytes(make: Any) -> None:
    state = make()
    again = state_from_bytes(state.to_bytes())
    assert again == state
    assert again.to_bytes() == state.to_bytes()


@given(st.binary(max_size=60) | st.just(b"[]") | st.just(b'{"schema":1}') | st.just(b'{"schema":1,"kind":"x"}'))
def test_bytes_that_are_no_state_are_undecodable(data: bytes) -> None:
    with pytest.raises(UndecodableEntryError):
        state_from_bytes(data)


def test_upcasters_run_one_after_another_up_to_the_newest_schema() -> None:
    table = {
        1: lambda d: d | {"schema": 2, "b": d["a"]},
        2: lambda d: {k: v for k, v in d.items() if k != "a"} | {"schema": 3},
    }
    assert upcast({"schema": 1, "a": 7}, table) == {"schema": 3, "b": 7}
    assert upcast({"schema": 3, "b": 7}, table) == {"schema": 3, "b": 7}
    for schema in (0, 4, None, "1"):
        with pytest.raises(UndecodableEntryError):
            upcast({"schema": schema}, table)
    with pytest.raises(UndecodableEntryError):
        upcast({}, table)


def test_a_recomputation_that_differs_is_a_sibling_and_never_the_same_version() -> None:
    state = received()
    section = created(state).created
    assert section is not None
    other = section.model_copy(update={"at": "2026-01-31T12:00:09Z"})
    twin = state.transition(Status.CREATED, other, stage="retrieval", detail={"events_1d": 0})
    assert twin.n == created(state).n
    assert twin.digest != created(state).digest
    assert {r.record_id for r in twin.records(1)}.isdisjoint(r.record_id for r in created(state).records(1))


def test_any_later_version_re_emits_the_same_earlier_records() -> None:
    state = received()
    assert created(state).records(0, 0) == state.records()
    assert [record.n for record in created(state).records()] == [0, 1]


def test_an_audit_record_survives_its_entry() -> None:
    for record in (*received().records(), AuditRecord(None, "r" * 32, "", 0, "", b"{}")):
        assert record_of_entry(entry_of_record(record)) == record


# --- messages and settlements -----------------------------------------------------------------------


def test_messages_between_stages_are_mandatory_carriers_with_ids_of_their_own() -> None:
    entry = entry_of(received(), Stage.RETRIEVAL)
    message = stage_message(entry, Layouts.first(4))
    queue = stage_queue("retrieval", ACME.partition(4))
    assert (message.exchange, message.routing_key, message.message_id) == (WORK, queue, entry.message_id)
    assert message.headers == {CARRIER_HEADER: 1}
    waiting = ladder_message(entry, 900, Layouts.first(4))
    assert (waiting.exchange, waiting.routing_key) == (rung_exchange("1s"), queue)
    assert (waiting.mandatory, waiting.persistent, waiting.body) == (True, True, message.body)
    assert waiting.message_id != message.message_id


@pytest.mark.parametrize(
    ("delay", "rung"), [(0, "100ms"), (100, "100ms"), (101, "1s"), (30_000, "30s"), (10**9, "30s")]
)
def test_a_delay_takes_the_first_rung_that_waits_long_enough(delay: int, rung: str) -> None:
    assert first_rung(delay) == rung
    assert rung in dict(RUNGS)


@given(st.lists(st.sampled_from([None, "acme", "globex", "initech"]), max_size=150))
def test_audit_messages_hold_every_record_once_on_its_tenants_partition(tenants: list[str | None]) -> None:
    records = [AuditRecord(TenantScope(t) if t else None, f"{n:032x}", "", 0, "", b"{}") for n, t in enumerate(tenants)]
    messages = audit_message(records, Layouts.first(4))
    found = []
    for message in messages:
        batch = [record_of_entry(e) for e in decode_carrier(message.body) if isinstance(e, Entry)]
        assert message.headers == {CARRIER_HEADER: len(batch)}
        for record in batch:
            assert message.routing_key == audit_queue(record.scope.partition(4) if record.scope else 0)
        found += batch
    assert sorted(found, key=lambda r: r.record_id) == records
    assert len({message.message_id for message in messages}) == len(messages)
    assert messages == audit_message(records, Layouts.first(4))


def test_decisions_and_rejections_need_no_listener() -> None:
    row = DecisionRow("digest", 2, "REJECTED", b'{"event_id":"e1"}', b"")
    message = decision_message(ACME, "risk", row, "c-1")
    assert (message.exchange, message.routing_key, message.message_id) == (DECISIONS, "acme.risk.REJECTED", "e1:2")
    assert message.headers == {"event_id": "e1", "revision": 2, "outcome": "REJECTED"}
    document = {"type": "urn:riskfleet:problem:not-known"}
    rejected = rejection_message(ACME, document, message_id="m", correlation_id=None)
    assert (rejected.exchange, rejected.routing_key) == (REJECTED, "acme.not-known")
    assert not message.mandatory
    assert not rejected.mandatory


letters = st.builds(
    DeadLetter,
    letter_id=text,
    scope=st.none() | st.just(ACME),
    event_id=text,
    stage=st.sampled_from([*STAGES, "ingress"]).map(str),
    category=text,
    problem=text,
    exception_class=text,
    fingerprint=text,
    attempts=st.integers(0, 9),
    first_failed_at=text,
    last_failed_at=text,
    body=st.binary(max_size=9),
)


@given(letters)
def test_a_dead_letter_comes_back_from_its_message(letter: DeadLetter) -> None:
    message = parked_message(letter, "ingress")
    assert message.routing_key == parked_queue("ingress")
    assert "ingress" in PARKED_SOURCES
    assert letter_from(message.headers, message.body) == letter


@pytest.mark.parametrize("raw", [None, 7, "", "{", "[]", "{}", '{"tenant":"A"}', '{"tenant":null,"x":1}'])
def test_a_broken_failure_header_is_undecodable(raw: object) -> None:
    with pytest.raises(UndecodableEntryError):
        letter_from({"x-riskfleet-failure": raw}, b"")


def test_what_the_broker_parked_by_itself_is_one_letter_per_entry() -> None:
    first, second = entry_of(received(), Stage.SCORING), entry_of(created(received()), Stage.SCORING)
    headers = {"x-first-death-queue": "risk.v1.scoring.p00"}
    both = undelivered_letters(headers, encode_carrier((first, second)), AT)
    assert [(letter.scope, letter.stage, letter.problem) for letter in both] == [
        (ACME, "scoring", "delivery-limit")
    ] * 2
    assert [decode_carrier(letter.body) for letter in both] == [(first,), (second,)]
    assert both == undelivered_letters(headers, encode_carrier((first, second)), AT)
    (junk,) = undelivered_letters(headers, b"junk", AT)
    assert (junk.scope, junk.stage, junk.body) == (None, "scoring", b"junk")
    assert failure_headers(junk)
