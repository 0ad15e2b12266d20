"""Approvals as pure functions: what a person's decision keeps, what a queue sorts by, and how good decisions are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import orjson
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from contracts.events import canonical_json, parse_event
from contracts.failures import ConflictError, InvalidRequestError, InvalidWorkflowStateError
from contracts.outcomes import Decision, Outcome, PolicyResult, PolicyVerdict, Reason, Supersedes
from contracts.state import Created, EventState, Pins, SubjectHistory, Thresholds, begin
from contracts.tenancy import TenantScope
from deploy import cli_approvals
from deploy.operator import OperatorClient, OperatorError
from governance.approvals import (
    CAUTIOUS,
    MAX_REASON,
    Approval,
    ApprovalPolicy,
    ApprovalReport,
    Closing,
    Verdict,
    checked_reason,
    expire,
    measure,
    opening,
    parse_decision,
    policy_of,
    priority,
    quantile,
    resolve,
)

AT = "2026-01-31T12:00:00Z"
LATER = "2026-01-31T13:00:00Z"
NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def decision(**fields: Any) -> Decision:
    return Decision(
        **{
            "event_id": "e" * 32,
            "tenant_id": "acme",
            "kind": "risk",
            "outcome": Outcome.REQUIRE_APPROVAL,
            "score": 55.0,
            "reasons": (Reason(code="R1", text="amount", weight=3.5),),
            "policy": PolicyVerdict(result=PolicyResult.PASS),
            "guardrails": (),
            "evidence": {"body_digest": "d"},
            "versions": {"schema": "1.0"},
            "decided_at": AT,
            "correlation_id": "corr",
        }
        | fields
    )


def state(limit: str | None = None, **fields: Any) -> EventState:
    document = {
        "id": "e1",
        "kind": "risk",
        "type": "payment.card",
        "occurred_at": AT,
        "subject": {"type": "customer", "id": "c1"},
        "amount": {"value": "100.00", "currency": "EUR"},
    } | fields
    pins = Pins(now=AT, model=None, policy=None, guardrail=None, thresholds=Thresholds(amount_limit=limit))
    event = parse_event({name: value for name, value in document.items() if value is not None})
    received = begin(TenantScope("acme"), "e" * 32, event, received_at=AT, source="http", correlation_id="corr")
    return replace(received, created=Created(at=AT, pins=pins, history=SubjectHistory()))


# --- a person's decision ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "outcome", "code"),
    [
        (Verdict.APPROVE, Outcome.APPROVED, "PERSON_APPROVED"),
        (Verdict.REJECT, Outcome.REJECTED, "PERSON_REJECTED"),
    ],
)
def test_a_person_decides_the_next_revision_and_keeps_what_the_pipeline_said(
    verdict: Verdict, outcome: Outcome, code: str
) -> None:
    before = decision(revision=3, supersedes=Supersedes(event_id="a" * 32, revision=1))
    after = resolve(before, verdict, "ann", "seen the invoice", LATER, 3)
    assert (after.revision, after.outcome, after.decided_by, after.decided_at) == (4, outcome, "person", LATER)
    assert after.reasons == (Reason(code=code, text="seen the invoice", weight=0.0), *before.reasons)
    assert after.evidence == {"body_digest": "d", "decider": "ann"}
    same = {"revision", "outcome", "decided_by", "decided_at", "reasons", "evidence"}
    assert after.model_dump(exclude=same) == before.model_dump(exclude=same)
    assert after.supersedes == before.supersedes  # what it corrected stays corrected; revisions name no revision


@pytest.mark.parametrize("seen", [0, 2, 4])
def test_a_screen_that_is_out_of_date_decides_nothing(seen: int) -> None:
    with pytest.raises(ConflictError, match=f"revision 3, not {seen}"):
        resolve(decision(revision=3), Verdict.APPROVE, "ann", "fine", LATER, seen)


def test_what_expires_is_the_pipelines_and_names_nobody() -> None:
    person = resolve(decision(), Verdict.APPROVE, "ann", "fine", AT, 1)
    expired = expire(person, Outcome.REJECTED, LATER)
    assert (expired.revision, expired.outcome, expired.decided_by) == (3, Outcome.REJECTED, "pipeline")
    assert [reason.code for reason in expired.reasons] == ["APPROVAL_EXPIRED", "PERSON_APPROVED", "R1"]
    assert "decider" not in expired.evidence


def test_a_stored_decision_without_a_score_can_be_read_and_an_unreadable_one_is_named() -> None:
    plain = decision(score=None)
    assert parse_decision(canonical_json(plain.model_dump(mode="json", exclude_none=True))) == plain
    for broken in (b"", b"[]", b"{}", b'{"event_id": 1}'):
        with pytest.raises(InvalidWorkflowStateError):
            parse_decision(broken)


@pytest.mark.parametrize("reason", ["", "  \n", "x" * (MAX_REASON + 1), "a\0b", "a\ud800b"])
def test_a_reason_is_text_that_says_something(reason: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        checked_reason(reason)
    assert caught.value.pointers[0][0] == "/reason"
    assert checked_reason("  why \n") == "why"


# --- policy and opening -------------------------------------------------------------------------------


def test_a_tenant_without_a_policy_has_the_defaults() -> None:
    assert policy_of({}) == ApprovalPolicy()
    policy = policy_of(None)
    assert (policy.sla_s, policy.expiry_s, policy.expiry_outcome, policy.four_eyes_amount) == (
        14_400,
        259_200,
        "REJECTED",
        None,
    )


@pytest.mark.parametrize(
    "stored",
    [
        {"sla_s": 0},
        {"sla_s": "60"},
        {"expiry_s": -1},
        {"expiry_outcome": "REQUIRE_APPROVAL"},
        {"four_eyes_amount": 100},
        {"four_eyes_amount": "-1"},
        {"four_eyes_amount": "NaN"},
        {"unknown": 1},
    ],
)
def test_a_policy_that_cannot_be_read_is_refused_where_it_is_set_and_cautious_where_it_is_used(
    stored: dict[str, Any],
) -> None:
    with pytest.raises(ValidationError):
        ApprovalPolicy.model_validate(stored)
    assert policy_of(stored) == CAUTIOUS


@pytest.mark.parametrize(
    ("amount", "limit", "needed"),
    [
        ({"value": "99.999", "currency": "EUR"}, "100", 1),
        ({"value": "100", "currency": "EUR"}, "100.00", 2),
        ({"value": "-100", "currency": "EUR"}, "100", 2),  # a refund is as large as a payment
        ({"value": "100", "currency": "JPY"}, "100", 2),  # numbers are compared, whatever the currency
        ({"value": "0", "currency": "EUR"}, "0", 2),
        ({"value": "1000000", "currency": "EUR"}, None, 1),
        (None, "0", 1),
    ],
)
def test_four_eyes_compare_the_number_of_an_amount(
    amount: dict[str, str] | None, limit: str | None, needed: int
) -> None:
    opened = opening(state(amount=amount), decision(), ApprovalPolicy(four_eyes_amount=limit), NOW)
    assert opened.approvers_needed == needed
    assert opened.amount == (None if amount is None else Decimal(amount["value"]))


def test_times_are_counted_from_the_opening_and_zero_never_expires() -> None:
    opened = opening(state(), decision(), ApprovalPolicy(sla_s=60, expiry_s=90, expiry_outcome="APPROVED"), NOW)
    assert (opened.due_at, opened.expires_at) == (NOW + timedelta(seconds=60), NOW + timedelta(seconds=90))
    assert (opened.expiry_outcome, opened.reasons, opened.currency) == ("APPROVED", ("R1",), "EUR")
    assert opening(state(), decision(), ApprovalPolicy(expiry_s=0), NOW).expires_at is None


@pytest.mark.parametrize("code", ["HALTED", "AUTO_REJECT_OFF"])
def test_what_is_held_for_people_never_expires_into_an_approval(code: str) -> None:
    held = decision(reasons=(Reason(code=code, text="held", weight=0),))
    approving, rejecting = ApprovalPolicy(expiry_outcome="APPROVED"), ApprovalPolicy()
    assert opening(state(), held, approving, NOW).expires_at is None
    assert opening(state(), held, rejecting, NOW).expires_at is not None
    assert opening(state(), decision(), approving, NOW).expires_at is not None
    four_eyes = ApprovalPolicy(expiry_outcome="APPROVED", four_eyes_amount="0")
    assert opening(state(), decision(), four_eyes, NOW).expires_at is None


def test_each_step_of_priority_outweighs_everything_below_it() -> None:
    high: dict[str, Any] = {"regulatory_flags": [{"code": "PEP", "level": "high"}]}
    risky = decision(score=0, reasons=(Reason(code="HIGH_RISK", text="prior", weight=0),))
    ladder = [
        priority(state(), decision(score=0)),
        priority(state(), decision(score=None)),
        priority(state(), decision(score=99.5)),
        priority(state(limit="99.99"), decision(score=0)),
        priority(state(limit="99.99"), decision(score=100)),
        priority(state(**high), decision(score=0)),
        priority(state(limit="99.99", **high), decision(score=100)),
        priority(state(), risky),
        priority(state(limit="99.99", **high), risky.model_copy(update={"score": 100})),
    ]
    assert ladder == [0, 50, 100, 200, 300, 400, 700, 800, 1500]
    assert priority(state(limit="100"), decision(score=0)) == 0  # not over the limit
    assert priority(state(limit="nonsense"), decision(score=0)) == 200
    assert priority(state(regulatory_flags=[{"code": "PEP", "level": "medium"}]), decision(score=0)) == 0


@given(st.one_of(st.none(), st.floats()))
def test_priority_takes_every_score(score: float | None) -> None:
    assert 0 <= priority(state(), decision(score=score)) <= 100


# --- measures -----------------------------------------------------------------------------------------


def test_measures_count_what_people_turned_and_whether_they_agreed() -> None:
    yes, no = Verdict.APPROVE, Verdict.REJECT
    closings = [
        Closing(10, Outcome.REQUIRE_APPROVAL, Outcome.REJECTED, (no,)),  # no final answer was turned
        Closing(20, Outcome.REQUIRE_APPROVAL, Outcome.APPROVED, (yes, yes)),
        Closing(30, Outcome.APPROVED, Outcome.REJECTED, (yes, no)),
        Closing(40, Outcome.REJECTED, Outcome.REJECTED, (no,)),
    ]
    found = measure(closings)
    assert (found.closed, found.dwell_p50_s, found.dwell_p95_s) == (4, 20, 40)
    assert (found.reviewed, found.overrides, found.override_rate) == (2, 1, 0.5)
    assert (found.second_votes, found.agreed, found.agreement) == (2, 1, 0.5)


def test_nothing_measured_is_no_share() -> None:
    found = measure([])
    assert (found.closed, found.dwell_p50_s, found.override_rate, found.agreement) == (0, None, None, None)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_the_smallest_value_that_covers_its_share(values: list[float], share: float) -> None:
    ordered = sorted(values)
    found = quantile(ordered, share)
    assert found in ordered
    assert sum(value <= found for value in ordered) >= share * len(ordered) - 1e-9


# --- the command line ---------------------------------------------------------------------------------


def approval(**fields: Any) -> dict[str, Any]:
    """An approval as the operator API writes it."""
    shown: dict[str, Any] = dict.fromkeys(Approval.model_fields)
    shown |= {"event_id": "e" * 32, "revision": 1, "kind": "risk", "status": "open", "cause": "decision"}
    shown |= {"priority": 855, "reasons": ["HIGH_RISK"], "approvers_needed": 2, "approved_by": 1, "overdue": True}
    shown |= {"opened_at": AT, "due_at": LATER, "expiry_outcome": "REJECTED", "amount": "12.50", "currency": "EUR"}
    return Approval.model_validate(shown | fields).model_dump(mode="json")


@dataclass
class Wire:
    """The operator API as far as the wire: answers by method and path, and what was asked."""

    answers: dict[tuple[str, str], tuple[int, Any]]
    asked: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        status, document = self.answers[request.method, request.url.path.removeprefix("/ops/v1/tenants/acme/")]
        return httpx.Response(status, json=document)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Wire]]:
    app = typer.Typer()
    app.add_typer(cli_approvals.approvals_app, name="approvals")

    def run(*words: str, **answers: tuple[int, Any]) -> tuple[Any, Wire]:
        pairs = [(name.split("_", 1), answer) for name, answer in answers.items()]
        wire = Wire({(method, path.replace("__", "/").replace("_", "-")): answer for (method, path), answer in pairs})
        client = OperatorClient("http://control", "token", httpx.MockTransport(wire))
        monkeypatch.setattr(cli_approvals, "_client", lambda: client)
        return CliRunner().invoke(app, [*words, "--tenant", "acme"]), wire

    return run


def test_the_queue_is_a_table_for_people_and_json_for_programs(run: Callable[..., tuple[Any, Wire]]) -> None:
    page = {"approvals": [approval()], "next": "abc"}
    shown, wire = run("approvals", "list", "--limit", "5", GET_approvals=(200, page))
    assert shown.exit_code == 0
    assert dict(wire.asked[0].url.params) == {"status": "open", "limit": "5"}
    for wanted in ("e" * 32, "855", "1/2", "--after abc"):
        assert wanted in shown.output
    printed, _ = run("approvals", "list", "--json", GET_approvals=(200, page))
    assert orjson.loads(printed.output) == page


def test_an_empty_list_says_what_that_means(run: Callable[..., tuple[Any, Wire]]) -> None:
    nothing: tuple[int, Any] = (200, {"approvals": [], "next": None})
    assert "nothing waits for people" in run("approvals", "list", GET_approvals=nothing)[0].output
    assert "in time" in run("approvals", "list", "--status", "expired", GET_approvals=nothing)[0].output


def test_an_answer_names_its_revision_and_a_first_vote_says_that_it_is_one(
    run: Callable[..., tuple[Any, Wire]],
) -> None:
    event = "e" * 32
    first = (200, {"approval": approval(), "decision": None, "claimed_by": "bob"})
    words = ("approvals", "approve", event, "--reason", "fine", "--revision")
    shown, wire = run(*words, "1", **{f"POST_approvals__{event}__approve": first})
    assert orjson.loads(wire.asked[0].content) == {"revision": 1, "reason": "fine"}
    assert "vote 1 of 2" in shown.output
    assert "bob had claimed it" in shown.output.replace("\n", " ")
    decided = (200, {"approval": approval(), "decision": {"outcome": "APPROVED", "revision": 2}, "claimed_by": None})
    shown, _ = run(*words, "1", **{f"POST_approvals__{event}__approve": decided})
    assert f"{event} is APPROVED, revision 2" in shown.output
    for missing in (("--reason", "x"), ("--revision", "1")):
        assert run("approvals", "reject", event, *missing)[0].exit_code == 2
    conflict = (409, {"detail": "this is about revision 2, not 1: load it again, then decide"})
    refused, _ = run(*words, "1", **{f"POST_approvals__{event}__approve": conflict})
    assert isinstance(refused.exception, OperatorError)
    assert "revision 2, not 1" in str(refused.exception)


def test_one_approval_is_shown_with_its_votes_and_its_reasons(run: Callable[..., tuple[Any, Wire]]) -> None:
    stored = decision().model_dump(mode="json", exclude_none=True)
    revision = {"revision": 1, "outcome": "REQUIRE_APPROVAL", "decided_by": "pipeline", "decider": None}
    view = {
        "approval": approval(note="[bold]asked[/]"),
        "votes": [{"person": "ann", "vote": "approve", "reason": "[red]fine", "voted_at": AT}],
        "decisions": [revision | {"decided_at": AT, "corrects": None, "superseded_by": None, "decision": stored}],
    }
    shown, _ = run("approvals", "show", "e" * 32, **{f"GET_approvals__{'e' * 32}": (200, view)})
    assert shown.exit_code == 0
    for wanted in ("[bold]asked[/]", "[red]fine", "REQUIRE_APPROVAL by pipeline", "R1"):
        assert wanted in shown.output


def test_a_claim_reads_the_revision_and_a_report_reads_like_sentences(run: Callable[..., tuple[Any, Wire]]) -> None:
    path = f"approvals__{'e' * 32}"
    answers = {f"GET_{path}": (200, {"approval": approval()}), f"POST_{path}__claim": (200, approval(claimed_by="ann"))}
    shown, wire = run("approvals", "claim", "e" * 32, **answers)
    assert orjson.loads(wire.asked[1].content) == {"revision": 1}
    assert "claimed by ann" in shown.output.replace("\n", " ")
    numbers = dict.fromkeys(ApprovalReport.model_fields) | {"since": AT, "closed": {"approved": 2}, "open": 3}
    numbers |= {"overdue": 1, "oldest_open_s": 61.2, "overrides": 1, "reviewed": 2, "second_votes": 0, "agreed": 0}
    report = ApprovalReport.model_validate(numbers).model_dump(mode="json")
    shown, _ = run("approvals", "report", GET_approvals_report=(200, report))
    for wanted in ("2 approved", "3 (1 overdue)", "61 s", "1 of 2"):
        assert wanted in shown.output
