"""The failure table: every named error has a row, and nothing that is unknown looks harmless."""

from __future__ import annotations

import pytest

from contracts import failures
from contracts.failures import (
    FAILURES,
    Category,
    Disposition,
    RiskfleetError,
    classify,
    fingerprint,
    problem_document,
)

NAMED = {
    "DomainValidationError": 422,
    "MalformedBodyError": 400,
    "OversizedBodyError": 413,
    "UnsupportedMediaTypeError": 415,
    "UnsupportedSchemaVersionError": 422,
    "InvalidMetadataError": 422,
    "InvalidRequestError": 422,
    "InvalidTenantError": 422,
    "IdempotencyConflictError": 422,
    "InvalidStatusTransitionError": 409,
    "InvalidWorkflowStateError": 409,
    "UndecodableEntryError": 409,
    "RiskThresholdViolationError": 422,
    "PolicyViolationError": 422,
    "ModelNotApprovedError": 409,
    "InvalidModelStateError": 409,
    "AuthenticationError": 401,
    "AuthorizationError": 403,
    "TenantIsolationError": 403,
    "EncryptionError": 503,
    "NotKnownError": 404,
    "ConflictError": 409,
    "LimitExceededError": 429,
    "DependencyUnavailableError": 503,
    "UndecidedLimitError": 429,
    "InfrastructureError": 503,
    "MessagingFailureError": 503,
    "QueueFullError": 503,
    "StateStoreError": 503,
    "DatabaseError": 503,
    "UnexpectedError": 500,
}


def error_classes() -> list[type[RiskfleetError]]:
    return [
        value
        for value in vars(failures).values()
        if isinstance(value, type) and issubclass(value, RiskfleetError) and value is not RiskfleetError
    ]


def test_the_named_errors_are_all_there_is() -> None:
    assert {cls.__name__ for cls in error_classes()} == NAMED.keys()


@pytest.mark.parametrize("cls", error_classes())
def test_every_error_has_a_status_and_a_docstring_that_an_operator_can_read(cls: type[RiskfleetError]) -> None:
    assert classify(cls()).status == NAMED[cls.__name__]
    assert cls().detail == (cls.__doc__ or "").split("\n")[0]
    assert len(cls().detail) > 20


def test_every_category_is_used_and_every_row_is_consistent() -> None:
    assert {row.category for row in FAILURES.values()} == set(Category)
    for row in FAILURES.values():
        assert 400 <= row.status <= 503
        assert row.problem.replace("-", "").isalpha()
        if row.category is Category.VALIDATION_ERROR:
            assert row.status < 500
        if row.disposition is Disposition.PAUSE:
            assert row.category is Category.INFRA_ERROR
            assert row.status == 503


def test_one_problem_type_has_one_status() -> None:
    statuses: dict[str, set[int]] = {}
    for row in FAILURES.values():
        statuses.setdefault(row.problem, set()).add(row.status)
    assert all(len(values) == 1 for values in statuses.values())


@pytest.mark.parametrize("error", [KeyError("payload"), ValueError("payload"), KeyboardInterrupt()])
def test_what_nobody_foresaw_is_unexpected_and_its_text_stays_inside(error: BaseException) -> None:
    row = classify(error)
    assert (row.category, row.status, row.disposition) == (Category.UNEXPECTED_ERROR, 500, Disposition.RETRY)
    assert "payload" not in str(problem_document(error))


def test_a_class_without_a_row_has_its_ancestors() -> None:
    class CacheError(failures.StateStoreError):
        """A cache is away."""

    assert classify(CacheError()) is FAILURES[failures.InfrastructureError]


def test_a_problem_document_has_the_members_of_rfc_9457_and_leaves_out_what_is_absent() -> None:
    error = failures.DomainValidationError("wrong", pointers=(("/a", "why"),))
    assert problem_document(error, event_id="e", instance=None) == {
        "type": "urn:riskfleet:problem:invalid-event",
        "title": "Invalid event",
        "status": 422,
        "category": "VALIDATION_ERROR",
        "detail": "wrong",
        "errors": [{"pointer": "/a", "reason": "why"}],
        "event_id": "e",
    }


def test_a_fingerprint_groups_by_class_and_place_never_by_text() -> None:
    def raised(error: Exception) -> str:
        with pytest.raises(type(error)) as caught:
            raise error
        return fingerprint(caught.value)

    assert raised(KeyError("a")) == raised(KeyError("b"))
    assert raised(KeyError("a")) != raised(ValueError("a"))
    assert len(raised(KeyError("a"))) == 16
