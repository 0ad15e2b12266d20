"""What becomes of an entry that failed: the retry ladder or the parked queue.

Pure: the policy is frozen, the time is an argument, and the answer is a value. How long it waits is
`resilience.retry`'s to say. Only an entry's own failure counts as an attempt; failing servers pause
the consumer instead and never come here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from contracts.codec import Entry, encode_carrier
from contracts.events import canonical_json
from contracts.failures import classify, fingerprint
from contracts.ports import DeadLetter
from contracts.state import AuditRecord
from contracts.tenancy import TenantScope
from resilience.retry import RetryPolicy, ladder_wait

__all__ = ["Park", "Retry", "RetryPolicy", "after_failure", "park", "park_bytes", "record_of"]


@dataclass(frozen=True, slots=True)
class Retry:
    """Send this entry to the ladder; its header already counts the failure."""

    entry: Entry
    delay_ms: int


@dataclass(frozen=True, slots=True)
class Park:
    """Send this to the parked queue, with its record for the audit."""

    letter: DeadLetter
    record: AuditRecord


def after_failure(entry: Entry, error: BaseException, policy: RetryPolicy, now: str) -> Retry | Park:
    """RETRY while the error's disposition allows it and waits are left, else PARK."""
    h = entry.header
    delay_ms = ladder_wait(error, h.attempts, policy)
    if delay_ms is None:
        return park(entry, error, now)
    return Retry(entry.evolve(attempts=h.attempts + 1, first_failed_at=h.first_failed_at or now), delay_ms)


def park(entry: Entry, error: BaseException, now: str) -> Park:
    """The dead letter of an entry: why, how often and when; the bytes, but never payload in any field."""
    h, row = entry.header, classify(error)
    letter = DeadLetter(
        letter_id=_id(h.event, h.stage, str(h.n), h.digest, h.body_digest, str(h.attempts), *_again(h.replays)),
        scope=h.scope,
        event_id=h.event,
        stage=h.stage,
        category=str(row.category),
        problem=row.problem,
        exception_class=type(error).__name__,
        fingerprint=fingerprint(error),
        attempts=h.attempts + 1,
        first_failed_at=h.first_failed_at or now,
        last_failed_at=now,
        body=encode_carrier((entry,)),
        replays=h.replays,
    )
    return Park(letter, record_of(letter))


def park_bytes(
    body: bytes,
    stage: str,
    error: BaseException,
    now: str,
    whose: tuple[TenantScope, str] | None = None,
    *,
    replays: int = 0,
) -> Park:
    """The dead letter of bytes that are no entry. It belongs to no tenant and event unless `whose` names them."""
    row = classify(error)
    scope, event_id = whose or (None, "")
    letter = DeadLetter(
        letter_id=_id(stage, hashlib.sha256(body).hexdigest(), *_again(replays)),
        scope=scope,
        event_id=event_id,
        stage=stage,
        category=str(row.category),
        problem=row.problem,
        exception_class=type(error).__name__,
        fingerprint=fingerprint(error),
        attempts=1,
        first_failed_at=now,
        last_failed_at=now,
        body=body,
        replays=replays,
    )
    return Park(letter, record_of(letter))


def record_of(letter: DeadLetter) -> AuditRecord:
    """The audit record of a park: it stands beside an event's trail, under version −1."""
    scope: TenantScope | None = letter.scope
    body = canonical_json(
        {
            "v": 1,
            "record_id": letter.letter_id,
            "tenant": scope.tenant_id if scope else "",
            "event_id": letter.event_id,
            "parked": {
                "stage": letter.stage,
                "category": letter.category,
                "problem": letter.problem,
                "exception_class": letter.exception_class,
                "fingerprint": letter.fingerprint,
                "attempts": letter.attempts,
                "first_failed_at": letter.first_failed_at,
            }
            | ({"replays": letter.replays} if letter.replays else {}),
        }
    )
    return AuditRecord(scope, letter.letter_id, letter.event_id, -1, "", body)


def _again(replays: int) -> tuple[str, ...]:
    """What a replay adds to an id: one that is parked again is another letter."""
    return (f"r{replays}",) if replays else ()


def _id(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]
