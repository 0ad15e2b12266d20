"""What was decided: outcomes with their precedence, reasons, verdicts, and the Decision on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from contracts.lifecycle import Status


class Outcome(StrEnum):
    """The three answers. The order of `PRECEDENCE` says which of two is more restrictive."""

    APPROVED = "APPROVED"
    REQUIRE_APPROVAL = "REQUIRE_APPROVAL"
    REJECTED = "REJECTED"


PRECEDENCE: tuple[Outcome, ...] = (Outcome.APPROVED, Outcome.REQUIRE_APPROVAL, Outcome.REJECTED)

STATUS_OF: dict[Outcome, Status] = {
    Outcome.APPROVED: Status.APPROVED,
    Outcome.REQUIRE_APPROVAL: Status.AWAITING_APPROVAL,
    Outcome.REJECTED: Status.REJECTED,
}


def most_restrictive(outcomes: Iterable[Outcome]) -> Outcome:
    """The most restrictive of some outcomes. An empty iterable is a defect and raises ValueError."""
    return max(outcomes, key=PRECEDENCE.index)


class PolicyResult(StrEnum):
    """The result of a policy set: DENY rejects, FAIL asks a person."""

    PASS = "PASS"
    FAIL = "FAIL"
    DENY = "DENY"


POLICY_PRECEDENCE: tuple[PolicyResult, ...] = (PolicyResult.PASS, PolicyResult.FAIL, PolicyResult.DENY)

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Reason(BaseModel):
    """Why: a catalogue code, its text, and its weight in score points.

    `adverse_action`: the sentence of the catalogue for the person whom it concerns, if it has one.
    """

    model_config = _FROZEN
    code: str
    text: str
    weight: float
    adverse_action: str | None = Field(default=None, exclude_if=lambda sentence: sentence is None)


class RuleVerdict(BaseModel):
    """One policy rule and what it said."""

    model_config = _FROZEN
    rule: str
    result: PolicyResult
    code: str | None = None


class PolicyVerdict(BaseModel):
    """A policy set's most severe result and every rule that fired."""

    model_config = _FROZEN
    result: PolicyResult
    rules: tuple[RuleVerdict, ...] = ()


class Check(BaseModel):
    """One guardrail check; `latency_ms` is wall time in milliseconds.

    `hit`: what it found, where a person needs more than the code: an entry of a list, and how similar it is.
    """

    model_config = _FROZEN
    check: str
    version: str
    verdict: Literal["pass", "fail", "timeout", "error"]
    latency_ms: float
    code: str | None = None
    hit: str | None = Field(default=None, exclude_if=lambda found: found is None)


class Supersedes(BaseModel):
    """The decision that this one replaces: the highest revision known when it was made, 0 = none was decided yet.

    Whatever revision the corrected event has, or gets later, is superseded all the same.
    """

    model_config = _FROZEN
    event_id: str
    revision: int = Field(ge=0)


class Decision(BaseModel):
    """A decision as upstream, the feed and the auditor read it. At most one exists per (event, revision)."""

    model_config = _FROZEN
    event_id: str
    tenant_id: str
    kind: Literal["risk", "compliance"]
    revision: int = 1
    outcome: Outcome
    decided_by: Literal["pipeline", "person"] = "pipeline"
    supersedes: Supersedes | None = None
    score: float | None
    reasons: tuple[Reason, ...]
    policy: PolicyVerdict
    guardrails: tuple[Check, ...]
    evidence: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, Any]
    degraded: tuple[str, ...] | None = None
    decided_at: str
    correlation_id: str | None = None
