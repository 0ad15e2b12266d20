"""Decisions by people as pure functions: what an approval asks for, what a person decides, and how good that is.

Promises: a person's answer is the next revision of the same event's decision and keeps everything that the pipeline
said; four eyes are two people, never two credentials. Knows no table and no clock: the time is an argument.

Revisions of one event are ordered by their number alone. `supersedes` is for corrections, which are other events: a
person's decision keeps the one of the revision that it answers, since what was corrected stays corrected.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from contracts.events import DecimalText
from contracts.failures import ConflictError, InvalidRequestError, InvalidWorkflowStateError
from contracts.outcomes import Decision, Outcome, Reason
from contracts.state import EventState

CLAIM_S: Final = 900
"""How long a claim says that somebody is looking, in seconds."""
MAX_REASON: Final = 2_000
"""Characters of a reason or a note."""
PERSON_APPROVED: Final = "PERSON_APPROVED"
PERSON_REJECTED: Final = "PERSON_REJECTED"
APPROVAL_EXPIRED: Final = "APPROVAL_EXPIRED"

_HIGH_RISK: Final = "HIGH_RISK"
_HOLDS: Final = frozenset({"HALTED", "AUTO_REJECT_OFF"})
"""Reasons of a decision that only a person may lift."""
_YEAR_S: Final = 31_536_000


class Verdict(StrEnum):
    """What a person may answer."""

    APPROVE = "approve"
    REJECT = "reject"


class Cause(StrEnum):
    """Why an approval is open: the pipeline asked, somebody looks again, or somebody contests the decision."""

    DECISION = "decision"
    REOPENED = "reopened"
    CONTESTED = "contested"


OUTCOME_OF: Final[Mapping[Verdict, Outcome]] = {Verdict.APPROVE: Outcome.APPROVED, Verdict.REJECT: Outcome.REJECTED}
_REASON_OF: Final[Mapping[Verdict, str]] = {Verdict.APPROVE: PERSON_APPROVED, Verdict.REJECT: PERSON_REJECTED}


def _not_negative(value: str) -> str:
    if Decimal(value) < 0:
        raise ValueError("must not be negative")
    return value


class ApprovalPolicy(BaseModel):
    """A tenant's rules for approvals; times are seconds from the opening.

    After `sla_s` an approval is overdue; after `expiry_s` (0: never) it is decided as `expiry_outcome`, except that
    nothing is approved so that `for_people_only` leaves to people: that waits for one. Amounts whose size is at or
    above `four_eyes_amount` need two people. It is compared as a number, whatever the currency: a tenant with several
    currencies sets it for the one whose unit is worth most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    sla_s: int = Field(default=14_400, ge=1, le=_YEAR_S)
    expiry_s: int = Field(default=259_200, ge=0, le=_YEAR_S)
    expiry_outcome: Literal["REJECTED", "APPROVED"] = "REJECTED"
    four_eyes_amount: Annotated[DecimalText, AfterValidator(_not_negative)] | None = None


CAUTIOUS: Final = ApprovalPolicy(four_eyes_amount="0")
"""What holds while a stored policy cannot be read: the defaults, and two people for every amount."""


def policy_of(stored: Mapping[str, Any] | None) -> ApprovalPolicy:
    """A tenant's stored policy; the defaults when there is none, `CAUTIOUS` when it cannot be read."""
    try:
        return ApprovalPolicy.model_validate(stored or {})
    except ValidationError:
        return CAUTIOUS


@dataclass(frozen=True, slots=True)
class Opening:
    """What an approval is opened with: everything that a queue sorts and shows. `expires_at` None: never."""

    kind: str
    reasons: tuple[str, ...]
    priority: int
    amount: Decimal | None
    currency: str | None
    due_at: datetime
    expires_at: datetime | None
    expiry_outcome: str
    approvers_needed: int


def opening(state: EventState, decision: Decision, policy: ApprovalPolicy, at: datetime) -> Opening:
    """The approval about a decision, opened at `at` under a tenant's policy."""
    amount = None if state.event.amount is None else Decimal(state.event.amount.value)
    limit = policy.four_eyes_amount
    reasons = tuple(reason.code for reason in decision.reasons)
    needed = 2 if amount is not None and limit is not None and abs(amount) >= Decimal(limit) else 1
    expires = policy.expiry_s and not for_people_only(reasons, policy.expiry_outcome, needed)
    return Opening(
        kind=state.KIND,
        reasons=reasons,
        priority=priority(state, decision),
        amount=amount,
        currency=None if state.event.amount is None else state.event.amount.currency,
        due_at=at + timedelta(seconds=policy.sla_s),
        expires_at=at + timedelta(seconds=policy.expiry_s) if expires else None,
        expiry_outcome=policy.expiry_outcome,
        approvers_needed=needed,
    )


def priority(state: EventState, decision: Decision) -> int:
    """How early somebody should look; higher first.

    The score (0–100, rounded; 50 when there is none), + 200 when the amount is over the tenant's limit, + 400 for a
    regulatory flag that is high, + 800 for HIGH_RISK: each step outweighs everything below it.
    """
    limit = state.created.pins.thresholds.amount_limit if state.created else None
    over = (
        limit is not None and state.event.amount is not None and abs(Decimal(state.event.amount.value)) > _size(limit)
    )
    high_flag = any(flag.level == "high" for flag in state.event.regulatory_flags or ())
    high_risk = any(reason.code == _HIGH_RISK for reason in decision.reasons)
    score = 50.0 if decision.score is None or math.isnan(decision.score) else min(max(decision.score, 0.0), 100.0)
    return math.floor(score + 0.5) + 200 * over + 400 * high_flag + 800 * high_risk


def _size(limit: str) -> Decimal:
    """A limit that is no number is no limit that an amount could stay below."""
    try:
        size = Decimal(limit)
    except ArithmeticError:
        return Decimal(0)
    return size if size.is_finite() else Decimal(0)


def checked_reason(text: str, *, name: str = "reason") -> str:
    """A reason as it is kept. Raises InvalidRequestError for an empty one, a too long one, and NUL."""
    reason = text.strip()
    if not reason:
        raise InvalidRequestError(f"say why: {name} is empty", pointers=((f"/{name}", "must not be empty"),))
    if len(reason) > MAX_REASON:
        limit = f"at most {MAX_REASON:,} characters"
        raise InvalidRequestError(f"{name} is too long: {limit}", pointers=((f"/{name}", limit),))
    if "\0" in reason or any("\ud800" <= character <= "\udfff" for character in reason):
        raise InvalidRequestError(f"{name} is not text", pointers=((f"/{name}", "has NUL or a lone surrogate"),))
    return reason


def resolve(decision: Decision, verdict: Verdict, person: str, reason: str, at: str, revision: int) -> Decision:
    """A person's decision: revision n + 1 of the same event, `at` RFC 3339 in UTC.

    The person's reason stands first and the pipeline's follow; score, policy, guardrails and versions are those that
    the person saw. Raises ConflictError unless `revision`, which the person answers, is the decision's own number.
    """
    check_revision(decision.revision, revision)
    mine = Reason(code=_REASON_OF[verdict], text=reason, weight=0.0)
    return _next(decision, OUTCOME_OF[verdict], "person", mine, at, {"decider": person})


def expire(decision: Decision, outcome: Outcome, at: str) -> Decision:
    """What the tenant's policy says when nobody decided in time: revision n + 1, decided by the pipeline."""
    text = f"Nobody decided in time; this tenant's policy then says {outcome}"
    return _next(decision, outcome, "pipeline", Reason(code=APPROVAL_EXPIRED, text=text, weight=0.0), at, {})


def for_people_only(reasons: Collection[str], outcome: str, approvers_needed: int, *, halted: bool = False) -> bool:
    """Whether time alone may not decide so: nothing approves by itself what a halt, a tenant that rejects nothing
    without a person, or four eyes have held. `halted`: a halt holds now, whatever held at the opening.
    """
    return outcome == Outcome.APPROVED and (halted or approvers_needed > 1 or not _HOLDS.isdisjoint(reasons))


def check_revision(current: int, named: int) -> None:
    """Raise ConflictError when somebody answers another revision than the current one."""
    if current != named:
        raise ConflictError(f"this is about revision {current}, not {named}: load it again, then decide")


def _next(
    decision: Decision,
    outcome: Outcome,
    decided_by: Literal["pipeline", "person"],
    reason: Reason,
    at: str,
    evidence: Mapping[str, Any],
) -> Decision:
    kept = {name: value for name, value in decision.evidence.items() if name != "decider"}
    return decision.model_copy(
        update={
            "revision": decision.revision + 1,
            "outcome": outcome,
            "decided_by": decided_by,
            "reasons": (reason, *decision.reasons),
            "evidence": kept | dict(evidence),
            "decided_at": at,
        }
    )


def parse_decision(stored: bytes) -> Decision:
    """A stored decision; its canonical bytes leave out what is null. Raises InvalidWorkflowStateError."""
    try:
        return Decision.model_validate({"score": None} | orjson.loads(stored))
    except (TypeError, ValueError) as error:
        raise InvalidWorkflowStateError("a stored decision cannot be read by this release") from error


# --- what people read: the documents of the operator API ------------------------------------------------

_DOCUMENT = ConfigDict(frozen=True, extra="forbid")


class ApprovalStatus(StrEnum):
    """Where an approval stands; everything but `open` is final."""

    OPEN = "open"
    APPROVED = "approved"
    REJECTED = "rejected"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"


class Approval(BaseModel):
    """One approval: what is asked about which revision, how urgent it is, and how it ended.

    `claimed_by` is somebody whose claim still holds; it stops nobody. `approved_by` counts the votes to approve.
    """

    model_config = _DOCUMENT
    event_id: str
    revision: int
    kind: str
    status: ApprovalStatus
    cause: Cause
    priority: int
    reasons: tuple[str, ...]
    amount: str | None
    currency: str | None
    approvers_needed: int
    approved_by: int
    opened_at: datetime
    opened_by: str | None
    open_reason: str | None
    due_at: datetime | None
    overdue: bool
    expires_at: datetime | None
    expiry_outcome: str
    claimed_by: str | None
    claimed_at: datetime | None
    note: str | None
    closed_by: str | None
    closed_at: datetime | None
    close_reason: str | None


class Vote(BaseModel):
    """One person's answer."""

    model_config = _DOCUMENT
    person: str
    vote: Verdict
    reason: str
    voted_at: datetime


class Revision(BaseModel):
    """One revision of a decision, with its document: reasons, policy verdicts, checks and versions explain it."""

    model_config = _DOCUMENT
    revision: int
    outcome: Outcome
    decided_by: str
    decider: str | None
    decided_at: datetime
    corrects: str | None
    superseded_by: str | None
    decision: dict[str, Any]


class ApprovalPage(BaseModel):
    """Some approvals, the most urgent first; `next` continues where they end, null at the end."""

    model_config = _DOCUMENT
    approvals: tuple[Approval, ...]
    next: str | None


class ApprovalView(BaseModel):
    """One approval with its votes, and every revision of the decision that it is about."""

    model_config = _DOCUMENT
    approval: Approval
    votes: tuple[Vote, ...]
    decisions: tuple[Revision, ...]


class Answered(BaseModel):
    """What became of a vote. `decision` is null while another person's vote is missing.

    `claimed_by` names somebody else who had said that they are looking.
    """

    model_config = _DOCUMENT
    approval: Approval
    decision: dict[str, Any] | None
    claimed_by: str | None


class ApprovalReport(BaseModel):
    """Approvals of one tenant: what was closed since a moment, how well, and what waits. Times are in seconds."""

    model_config = _DOCUMENT
    since: datetime
    closed: dict[str, int]
    dwell_p50_s: float | None
    dwell_p95_s: float | None
    reviewed: int
    overrides: int
    override_rate: float | None
    second_votes: int
    agreed: int
    agreement: float | None
    open: int
    overdue: int
    oldest_open_s: float | None


# --- how good people's decisions are --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Closing:
    """One approval that people closed: seconds open, the outcomes before and after, and the votes in order."""

    dwell_s: float
    before: Outcome
    after: Outcome
    votes: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Measures:
    """Over some closings. Shares are None when there is nothing to take a share of.

    `overrides`: final answers that people turned into the other one, of `reviewed` that they looked at again.
    `agreed`: second voters who said what the first one had said, of `second_votes`.
    """

    closed: int
    dwell_p50_s: float | None
    dwell_p95_s: float | None
    reviewed: int
    overrides: int
    second_votes: int
    agreed: int

    @property
    def agreement(self) -> float | None:
        """The share of second votes that agreed with the first."""
        return self.agreed / self.second_votes if self.second_votes else None

    @property
    def override_rate(self) -> float | None:
        """The share of reviewed final answers that were turned."""
        return self.overrides / self.reviewed if self.reviewed else None


def measure(closings: Sequence[Closing]) -> Measures:
    """Dwell, overrides and agreement.

    An answer to REQUIRE_APPROVAL overrides nothing: there was no final answer to turn.
    """
    dwell = sorted(closing.dwell_s for closing in closings)
    reviewed = [closing for closing in closings if closing.before is not Outcome.REQUIRE_APPROVAL]
    pairs = [closing.votes[:2] for closing in closings if len(closing.votes) > 1]
    return Measures(
        closed=len(closings),
        dwell_p50_s=quantile(dwell, 0.5),
        dwell_p95_s=quantile(dwell, 0.95),
        reviewed=len(reviewed),
        overrides=sum(closing.before is not closing.after for closing in reviewed),
        second_votes=len(pairs),
        agreed=sum(first is second for first, second in pairs),
    )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed (nearest rank); None without values."""
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else None
