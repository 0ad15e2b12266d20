"""Everything that can go wrong, in one tree and one table.

The docstring of an error is the sentence that an operator reads. Category, severity, disposition
and HTTP status of each class stand in `FAILURES`; a class that is not listed has its nearest
listed ancestor's row, and an exception from outside the tree is UNEXPECTED_ERROR.
"""

from __future__ import annotations

import hashlib
import math
import traceback
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Category(StrEnum):
    """What kind of failure this is, for counting and for routing to people."""

    VALIDATION_ERROR = "VALIDATION_ERROR"
    POLICY_VIOLATION = "POLICY_VIOLATION"
    HIGH_RISK = "HIGH_RISK"
    WORKFLOW_ERROR = "WORKFLOW_ERROR"
    INFRA_ERROR = "INFRA_ERROR"
    UNEXPECTED_ERROR = "UNEXPECTED_ERROR"


class Severity(StrEnum):
    """How loudly a failure is reported."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


class Disposition(StrEnum):
    """What happens to the entry: refused at a door, retried by the ladder, parked at once, or the consumer pauses."""

    REFUSE = "refuse"
    RETRY = "retry"
    PARK = "park"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True)
class FailureRow:
    """One row of the failure table; `problem` is the last part of the problem type URI."""

    category: Category
    severity: Severity
    disposition: Disposition
    status: int
    problem: str


class RiskfleetError(Exception):
    """Something failed in a way that riskfleet has no more precise name for."""

    def __init__(self, detail: str = "", *, pointers: tuple[tuple[str, str], ...] = ()) -> None:
        """`detail` says what to do about it and never holds payload; `pointers` are (JSON pointer, reason)."""
        super().__init__(detail or (type(self).__doc__ or "").split("\n")[0])
        self.pointers = pointers

    @property
    def detail(self) -> str:
        """The sentence for the sender."""
        return str(self.args[0])


class DomainValidationError(RiskfleetError):
    """The body is JSON, but not an event: each pointer names a field and what is wrong with it."""


class MalformedBodyError(DomainValidationError):
    """The body is not acceptable JSON."""


class OversizedBodyError(DomainValidationError):
    """The body is larger than 64 KiB."""


class UnsupportedMediaTypeError(DomainValidationError):
    """The content type is not one that this door reads; send application/json."""


class UnsupportedSchemaVersionError(DomainValidationError):
    """The event's schema_version is not one that this release reads."""


class InvalidMetadataError(DomainValidationError):
    """A header or metadata field of the submission cannot be used."""


class InvalidRequestError(DomainValidationError):
    """The request's body or parameters cannot be used: each pointer names a field and what is wrong with it."""


class InvalidTenantError(DomainValidationError):
    """The tenant id is not well-formed or not known."""


class IdempotencyConflictError(DomainValidationError):
    """The same identity was already submitted with another body; nobody gets the decision of another body."""


class InvalidStatusTransitionError(RiskfleetError):
    """The lifecycle does not allow this move."""


class InvalidWorkflowStateError(RiskfleetError):
    """An entry does not fit the stage that received it."""


class UndecodableEntryError(InvalidWorkflowStateError):
    """The bytes of a message are not a carrier that this release reads."""


class RiskThresholdViolationError(RiskfleetError):
    """The event's risk is above the tenant's hard limit; a person must decide."""


class PolicyViolationError(RiskfleetError):
    """A policy could not be evaluated or was violated."""


class ModelNotApprovedError(RiskfleetError):
    """No approved, active version of what decides is registered; approve and activate one, then replay."""


class InvalidModelStateError(RiskfleetError):
    """The registered artifact cannot be read or does not match its digest."""


class AuthenticationError(RiskfleetError):
    """The credential is missing, unknown or revoked."""


class AuthorizationError(RiskfleetError):
    """The credential does not permit this call."""


class TenantIsolationError(RiskfleetError):
    """A submission names a tenant that is not the caller's."""


class EncryptionError(RiskfleetError):
    """Key material is missing or does not open the sealed value."""


class NotKnownError(RiskfleetError):
    """No such event is known (yet) to this tenant; repeating a submission with the same identity is safe."""


class ConflictError(RiskfleetError):
    """The thing is not in the state that the command needs: look at it again, then decide."""


class LimitExceededError(RiskfleetError):
    """The tenant's limit is reached; repeat after the time in Retry-After."""

    def __init__(self, detail: str = "", *, retry_after_s: float = 1.0) -> None:
        """`retry_after_s`: seconds after which the same request is worth another try."""
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class UndecidedLimitError(LimitExceededError):
    """The tenant has as many events under way as it may; repeat after Retry-After: decisions make room."""


class TenantPausedError(RiskfleetError):
    """Nothing of this tenant is taken in for now: somebody paused it, or too much of it failed; repeat later."""

    def __init__(self, detail: str = "", *, retry_after_s: int = 30) -> None:
        """`retry_after_s`: when it is worth asking again."""
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class InfrastructureError(RiskfleetError):
    """A server that riskfleet depends on does not answer."""


class DependencyUnavailableError(InfrastructureError):
    """A dependency failed too often and is left alone for a while; the event is tried again later."""


class MessagingFailureError(InfrastructureError):
    """RabbitMQ did not confirm a message in time; whether it arrived is unknown, so the same entry is sent again."""


class QueueFullError(MessagingFailureError):
    """A queue of the fleet takes no more for now; only what is for this queue has to wait."""


class StateStoreError(InfrastructureError):
    """Redis does not answer in time."""


class DatabaseError(InfrastructureError):
    """PostgreSQL does not answer in time."""


class StagePausedError(InfrastructureError):
    """The stage is paused, by a person or by its park breaker; its entries wait."""


class UnexpectedError(RiskfleetError):
    """A defect: an exception that nothing in riskfleet foresaw."""


_C, _S, _D = Category, Severity, Disposition
FAILURES: dict[type[RiskfleetError], FailureRow] = {
    DomainValidationError: FailureRow(_C.VALIDATION_ERROR, _S.INFO, _D.REFUSE, 422, "invalid-event"),
    MalformedBodyError: FailureRow(_C.VALIDATION_ERROR, _S.INFO, _D.REFUSE, 400, "malformed-json"),
    OversizedBodyError: FailureRow(_C.VALIDATION_ERROR, _S.INFO, _D.REFUSE, 413, "body-too-large"),
    UnsupportedMediaTypeError: FailureRow(_C.VALIDATION_ERROR, _S.INFO, _D.REFUSE, 415, "unsupported-media-type"),
    UnsupportedSchemaVersionError: FailureRow(_C.VALIDATION_ERROR, _S.INFO, _D.REFUSE, 422, "unknown-schema-version"),
    InvalidMetadataError: FailureRow(_C.VALIDATION_ERROR, _S.INFO, _D.REFUSE, 422, "invalid-metadata"),
    InvalidRequestError: FailureRow(_C.VALIDATION_ERROR, _S.INFO, _D.REFUSE, 422, "invalid-request"),
    InvalidTenantError: FailureRow(_C.VALIDATION_ERROR, _S.WARNING, _D.REFUSE, 422, "invalid-tenant"),
    IdempotencyConflictError: FailureRow(_C.VALIDATION_ERROR, _S.WARNING, _D.PARK, 422, "idempotency-conflict"),
    InvalidStatusTransitionError: FailureRow(_C.WORKFLOW_ERROR, _S.ERROR, _D.PARK, 409, "invalid-transition"),
    InvalidWorkflowStateError: FailureRow(_C.WORKFLOW_ERROR, _S.ERROR, _D.PARK, 409, "invalid-workflow-state"),
    RiskThresholdViolationError: FailureRow(_C.HIGH_RISK, _S.WARNING, _D.PARK, 422, "risk-threshold"),
    PolicyViolationError: FailureRow(_C.POLICY_VIOLATION, _S.WARNING, _D.PARK, 422, "policy-violation"),
    ModelNotApprovedError: FailureRow(_C.POLICY_VIOLATION, _S.ERROR, _D.RETRY, 409, "model-not-approved"),
    InvalidModelStateError: FailureRow(_C.WORKFLOW_ERROR, _S.ERROR, _D.PARK, 409, "invalid-model-state"),
    AuthenticationError: FailureRow(_C.POLICY_VIOLATION, _S.WARNING, _D.REFUSE, 401, "unauthenticated"),
    AuthorizationError: FailureRow(_C.POLICY_VIOLATION, _S.WARNING, _D.REFUSE, 403, "forbidden"),
    TenantIsolationError: FailureRow(_C.POLICY_VIOLATION, _S.WARNING, _D.REFUSE, 403, "foreign-tenant"),
    EncryptionError: FailureRow(_C.INFRA_ERROR, _S.CRITICAL, _D.PARK, 503, "encryption"),
    NotKnownError: FailureRow(_C.VALIDATION_ERROR, _S.INFO, _D.REFUSE, 404, "not-known"),
    ConflictError: FailureRow(_C.VALIDATION_ERROR, _S.INFO, _D.REFUSE, 409, "conflict"),
    LimitExceededError: FailureRow(_C.POLICY_VIOLATION, _S.INFO, _D.REFUSE, 429, "limit-exceeded"),
    DependencyUnavailableError: FailureRow(_C.INFRA_ERROR, _S.WARNING, _D.RETRY, 503, "dependency-unavailable"),
    UndecidedLimitError: FailureRow(_C.POLICY_VIOLATION, _S.INFO, _D.REFUSE, 429, "too-many-undecided"),
    TenantPausedError: FailureRow(_C.WORKFLOW_ERROR, _S.WARNING, _D.REFUSE, 503, "tenant-paused"),
    InfrastructureError: FailureRow(_C.INFRA_ERROR, _S.ERROR, _D.PAUSE, 503, "not-known-to-be-accepted"),
    UnexpectedError: FailureRow(_C.UNEXPECTED_ERROR, _S.ERROR, _D.RETRY, 500, "unexpected"),
    RiskfleetError: FailureRow(_C.UNEXPECTED_ERROR, _S.ERROR, _D.RETRY, 500, "unexpected"),
}


def classify(error: BaseException) -> FailureRow:
    """The row of the failure table that applies to `error`; unknown exceptions are UNEXPECTED_ERROR."""
    for ancestor in type(error).__mro__:
        row = FAILURES.get(ancestor)
        if row is not None:
            return row
    return FAILURES[UnexpectedError]


def fingerprint(error: BaseException) -> str:
    """16 hex digits for grouping dead letters: exception class and first frame, never its text or payload."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].name}" if frames else "-"
    return hashlib.sha256(f"{type(error).__qualname__}|{place}".encode()).hexdigest()[:16]


def problem_document(error: BaseException, **members: Any) -> dict[str, Any]:
    """An RFC 9457 problem document for `error`; extra members such as `event_id` are added as they are."""
    row = classify(error)
    known = isinstance(error, RiskfleetError)
    document: dict[str, Any] = {
        "type": f"urn:riskfleet:problem:{row.problem}",
        "title": row.problem.replace("-", " ").capitalize(),
        "status": row.status,
        "category": str(row.category),
        "detail": error.detail if isinstance(error, RiskfleetError) else (UnexpectedError.__doc__ or ""),
    }
    if known and isinstance(error, RiskfleetError) and error.pointers:
        document["errors"] = [{"pointer": pointer, "reason": reason} for pointer, reason in error.pointers]
    if isinstance(error, LimitExceededError | TenantPausedError):
        document["retry_after_s"] = max(math.ceil(error.retry_after_s), 1)  # whole seconds, as in Retry-After
    return document | {name: value for name, value in members.items() if value is not None}
