"""The lifecycle of an event: one table, and the only place that says which move is legal."""

from __future__ import annotations

from enum import StrEnum

from contracts.failures import InvalidStatusTransitionError


class Status(StrEnum):
    """Where an event stands. *Parked* is a place, not a status."""

    RECEIVED = "received"
    CREATED = "created"
    VALIDATED = "validated"
    PROCESSING = "processing"
    APPROVED = "approved"
    AWAITING_APPROVAL = "awaiting_approval"
    REJECTED = "rejected"
    FAILED = "failed"


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.RECEIVED: frozenset({Status.CREATED, Status.FAILED}),
    Status.CREATED: frozenset({Status.VALIDATED, Status.FAILED}),
    Status.VALIDATED: frozenset({Status.PROCESSING, Status.FAILED}),
    Status.PROCESSING: frozenset({Status.APPROVED, Status.AWAITING_APPROVAL, Status.REJECTED, Status.FAILED}),
    Status.AWAITING_APPROVAL: frozenset({Status.APPROVED, Status.REJECTED}),
    Status.APPROVED: frozenset(),
    Status.REJECTED: frozenset(),
    Status.FAILED: frozenset(),
}

VERSION_OF: dict[Status, int] = {
    Status.RECEIVED: 0,
    Status.CREATED: 1,
    Status.VALIDATED: 2,
    Status.PROCESSING: 3,
    Status.APPROVED: 4,
    Status.AWAITING_APPROVAL: 4,
    Status.REJECTED: 4,
    Status.FAILED: 4,
}

FINAL_VERSION = 4


def check_transition(current: Status, target: Status) -> None:
    """Raise InvalidStatusTransitionError unless the table allows `current` → `target`."""
    if target not in TRANSITIONS[current]:
        allowed = ", ".join(sorted(TRANSITIONS[current])) or "nothing: it is final"
        raise InvalidStatusTransitionError(f"{current} may not become {target}; allowed: {allowed}")
