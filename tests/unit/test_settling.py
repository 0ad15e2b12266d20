"""What becomes of a failed entry: retry while error and ladder allow it, else park; ids name entry and attempt."""

from __future__ import annotations

import hashlib

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.codec import Entry, EntryHeader, decode_carrier
from contracts.failures import (
    FAILURES,
    Disposition,
    IdempotencyConflictError,
    ModelNotApprovedError,
    RiskfleetError,
    UndecodableEntryError,
    UnexpectedError,
)
from contracts.messages import parked_message
from contracts.settlement import letter_from
from contracts.tenancy import TenantScope
from workers.settling import Park, Retry, RetryPolicy, after_failure, park, park_bytes

NOW, LATER = "2026-01-31T12:00:00+00:00", "2026-01-31T12:01:00+00:00"
POLICY = RetryPolicy(waits_ms=(100, 1_000))


def entry(**changes: object) -> Entry:
    header = EntryHeader("acme", "e" * 32, "risk", "scoring", 1, "d" * 64, "b" * 64)
    return Entry(header, b"stored bytes").evolve(**changes)


@pytest.mark.parametrize(("attempts", "delay"), [(0, 100), (1, 1_000)])
def test_an_error_that_may_pass_is_retried_and_counted(attempts: int, delay: int) -> None:
    verdict = after_failure(entry(attempts=attempts), ModelNotApprovedError(), POLICY, NOW)
    assert verdict == Retry(entry(attempts=attempts + 1, first_failed_at=NOW), delay)


def test_the_first_failures_time_is_kept() -> None:
    verdict = after_failure(entry(attempts=1, first_failed_at=NOW), ValueError(), POLICY, LATER)
    assert isinstance(verdict, Retry)
    assert verdict.entry.header.first_failed_at == NOW


@pytest.mark.parametrize("attempts", [2, 3])
def test_after_the_last_wait_it_is_parked(attempts: int) -> None:
    verdict = after_failure(entry(attempts=attempts, first_failed_at=NOW), ValueError("x"), POLICY, LATER)
    assert isinstance(verdict, Park)
    letter = verdict.letter
    assert (letter.attempts, letter.first_failed_at, letter.last_failed_at) == (attempts + 1, NOW, LATER)


@pytest.mark.parametrize("kind", list(FAILURES))
def test_only_the_dispositions_that_say_so_are_retried(kind: type[RiskfleetError]) -> None:
    verdict = after_failure(entry(), kind(), POLICY, NOW)
    assert isinstance(verdict, Retry) == (FAILURES[kind].disposition is Disposition.RETRY)


def test_an_unknown_exception_is_unexpected_and_its_text_goes_nowhere() -> None:
    secret = "4111111111111111"
    verdict = park(entry(attempts=4), ValueError(secret), NOW)
    assert (verdict.letter.problem, verdict.letter.exception_class) == (FAILURES[UnexpectedError].problem, "ValueError")
    assert secret not in repr(verdict)


def test_a_letter_survives_the_parked_queue_and_can_be_replayed() -> None:
    letter = park(entry(attempts=1), IdempotencyConflictError(), NOW).letter
    message = parked_message(letter, "scoring")
    assert letter_from(message.headers, message.body) == letter
    assert decode_carrier(message.body) == (entry(attempts=1),)
    assert message.routing_key == "risk.v1.parked.scoring"


def test_the_record_stands_beside_the_trail() -> None:
    verdict = park(entry(), IdempotencyConflictError(), NOW)
    record = verdict.record
    assert (record.scope, record.event_id, record.n) == (TenantScope("acme"), "e" * 32, -1)
    assert record.record_id == verdict.letter.letter_id
    document = orjson.loads(record.body)
    assert document["parked"]["problem"] == "idempotency-conflict"
    assert document["record_id"] == record.record_id


@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["d", "x"]), st.sampled_from(["d", "x"]))
def test_letter_ids_tell_entries_and_attempts_apart(one: int, two: int, left: str, right: str) -> None:
    first = park(entry(attempts=one, digest=left), ValueError(), NOW).letter.letter_id
    second = park(entry(attempts=two, digest=right), KeyError(), LATER).letter.letter_id
    assert (first == second) == ((one, left) == (two, right))


def test_a_changed_body_has_a_letter_of_its_own() -> None:
    owner = park(entry(), ValueError(), NOW).letter.letter_id
    assert park(entry(body_digest="c" * 64), ValueError(), NOW).letter.letter_id != owner


def test_unreadable_bytes_belong_to_no_tenant_and_are_kept_whole() -> None:
    verdict = park_bytes(b"\xff\x00", "scoring", UndecodableEntryError(), NOW)
    letter = verdict.letter
    assert (letter.scope, letter.event_id, letter.body, letter.attempts) == (None, "", b"\xff\x00", 1)
    assert letter == park_bytes(b"\xff\x00", "scoring", UndecodableEntryError(), NOW).letter
    assert letter.letter_id != park_bytes(b"\xff\x01", "scoring", UndecodableEntryError(), NOW).letter.letter_id
    assert hashlib.sha256(b"\xff\x00").hexdigest() not in letter.letter_id
    assert orjson.loads(verdict.record.body)["tenant"] == ""
