"""The four stages: most tests call `decide`. A fault only ever makes an outcome more restrictive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.codec import state_from_bytes
from contracts.events import parse_event
from contracts.failures import InvalidModelStateError, InvalidWorkflowStateError
from contracts.lifecycle import Status
from contracts.outcomes import (
    PRECEDENCE,
    Check,
    Decision,
    Outcome,
    PolicyResult,
    PolicyVerdict,
    Reason,
    RuleVerdict,
    Supersedes,
)
from contracts.ports import ActiveSet, Artifact, DecisionRow, Ledger, Registry
from contracts.state import (
    Created,
    Decided,
    EventState,
    Pin,
    Pins,
    Processed,
    SubjectHistory,
    Thresholds,
    Validated,
    begin,
)
from contracts.tenancy import TenantScope
from contracts.topology import STAGES, Stage
from workers.pipeline import PIPELINE, stage_after, stage_of
from workers.stages import StagePorts, Step, decision, guardrail, retrieval, scoring
from workers.stages.decision import DecisionFacts, stored_facts

NOW = "2026-01-31T12:00:01Z"
MODEL = Pin(name="model", version=1, digest="stages-model")
POLICY = Pin(name="policy", version=2, digest="stages-policy")
GUARDRAIL = Pin(name="guardrail", version=3, digest="stages-guardrail")
CONTENT: dict[str, dict[str, Any]] = {
    MODEL.digest: {
        "type": "scorecard",
        "base": 20,
        "factors": [
            {
                "feature": "attributes.x",
                "bins": [{"below": 1, "points": 0}, {"points": 60, "code": "X", "text": "x"}],
                "missing": {"points": 0},
            }
        ],
    },
    POLICY.digest: {
        "type": "cel",
        "rules": [
            {"id": "deny", "when": "risk.score > 70.0", "result": "DENY", "code": "TOO_RISKY", "text": "too risky"}
        ],
    },
    GUARDRAIL.digest: {"type": "checks", "patterns": [{"id": "bad", "pattern": "bad", "code": "BAD"}]},
}


def new_state(kind: str = "risk", tenant: str = "acme", **fields: Any) -> EventState:
    body: dict[str, Any] = {
        "kind": kind,
        "type": "payment.card",
        "occurred_at": "2026-01-31T12:00:00Z",
        "subject": {"type": "person", "id": "p-1"},
    }
    if kind == "compliance":
        body["regulatory_flags"] = []
    event = parse_event(body | fields)
    return begin(TenantScope(tenant), "e" * 32, event, received_at=NOW, source="http", correlation_id="correlation-1")


def moved(state: EventState, step: Step, stage: str) -> EventState:
    return state.transition(step.target, step.section, stage=stage, detail=step.detail)


def artifact(pin: Pin, kind: str = "any") -> Artifact:
    return Artifact(kind, pin, CONTENT[pin.digest])


def processing(
    state: EventState | None = None,
    *,
    score: float | None = 10,
    policy: PolicyVerdict | None = None,
    checks: tuple[Check, ...] = (),
    unavailable: tuple[str, ...] = (),
    halted: bool = False,
    thresholds: Thresholds | None = None,
) -> EventState:
    """A state that waits for its decision."""
    limits = thresholds or Thresholds()
    pins = Pins(now=NOW, model=MODEL, policy=POLICY, guardrail=GUARDRAIL, thresholds=limits, halted=halted)
    reasons = (Reason(code="SMALL", text="small", weight=1), Reason(code="LARGE", text="large", weight=9))
    verdict = policy or PolicyVerdict(result=PolicyResult.PASS)
    return replace(
        state or new_state(),
        n=3,
        status=Status.PROCESSING,
        created=Created(at=NOW, pins=pins, history=SubjectHistory(events_1d=4)),
        validated=Validated(at=NOW, policy=verdict, score=score, reasons=reasons),
        processed=Processed(at=NOW, checks=checks, unavailable=unavailable),
    )


def decision_of(state: EventState) -> Decision:
    return decided_with(state, DecisionFacts())


def decided_with(state: EventState, facts: DecisionFacts) -> Decision:
    step = stage_of(state.KIND, Stage.DECISION).decide(state, facts, NOW, lambda: 0.0)
    assert isinstance(step.section, Decided)
    return step.section.decision


def verdict(result: str) -> PolicyVerdict:
    rule = RuleVerdict(rule="r", result=PolicyResult(result), code="R")
    return PolicyVerdict(result=PolicyResult(result), rules=() if result == "PASS" else (rule,))


def check(name: str) -> Check:
    return Check(check="c", version="g@1", verdict=cast("Any", name), latency_ms=0.1)


APPROVED, REVIEW, REJECTED = PRECEDENCE


@pytest.mark.parametrize(
    ("faults", "outcome", "code"),
    [
        ({}, APPROVED, None),
        ({"score": 39.99}, APPROVED, None),
        ({"score": 40}, REVIEW, "SCORE_BAND"),
        ({"score": 75}, REJECTED, "SCORE_BAND"),
        ({"score": None}, REVIEW, "SCORE_UNAVAILABLE"),
        ({"score": float("nan")}, REVIEW, "SCORE_BAND"),
        ({"halted": True}, REVIEW, "HALTED"),
        ({"halted": True, "score": 80}, REJECTED, "SCORE_BAND"),
        ({"policy": verdict("FAIL")}, REVIEW, "POLICY_FAIL:r"),
        ({"policy": verdict("DENY")}, REJECTED, "POLICY_DENY:r"),
        ({"policy": PolicyVerdict(result=PolicyResult.FAIL)}, REVIEW, "POLICY_FAIL"),
        ({"policy": verdict("DENY"), "halted": True}, REJECTED, "HALTED"),
        ({"checks": (check("pass"),)}, APPROVED, None),
        ({"checks": (check("fail"),)}, REVIEW, "GUARDRAIL:c"),
        ({"checks": (check("timeout"),)}, REVIEW, "GUARDRAIL:c"),
        ({"checks": (check("error"),)}, REVIEW, "GUARDRAIL:c"),
        ({"unavailable": ("model",)}, REVIEW, "DEGRADED:model"),
    ],
)
def test_the_precedence_of_outcomes(faults: dict[str, Any], outcome: Outcome, code: str | None) -> None:
    decision = decision_of(processing(**faults))
    assert decision.outcome is outcome
    gates = [reason.code for reason in decision.reasons if reason.weight == 0]
    assert code in gates if code else not gates


def test_auto_reject_off_sends_rejections_to_a_person() -> None:
    off = Thresholds(auto_reject=False)
    decision = decision_of(processing(score=99, policy=verdict("DENY"), thresholds=off))
    assert decision.outcome is REVIEW
    assert "AUTO_REJECT_OFF" in [reason.code for reason in decision.reasons]


@pytest.mark.parametrize(
    ("levels", "score", "outcome"),
    [
        ((), 10, APPROVED),
        (("low", "low"), 10, APPROVED),
        (("low",), 50, REVIEW),
        (("low",), 80, REJECTED),
        (("low", "medium"), 10, REVIEW),
        (("high",), 10, REVIEW),
        (("high",), 80, REJECTED),
    ],
)
@pytest.mark.parametrize("kind", ["compliance", "risk"])
def test_low_flags_pass_the_compliance_gate_and_lift_no_other(
    kind: str, levels: Sequence[str], score: float, outcome: Outcome
) -> None:
    flags = [{"code": "AML", "level": level} for level in levels]
    assert decision_of(processing(new_state(kind, regulatory_flags=flags), score=score)).outcome is outcome


def test_a_compliance_event_that_names_no_flags_goes_to_a_person() -> None:
    state = new_state("compliance")
    silent = replace(state, event=state.event.model_copy(update={"regulatory_flags": None}))
    assert decision_of(processing(silent)).outcome is REVIEW


situations = st.fixed_dictionaries(
    {
        "score": st.floats(0, 100),
        "halted": st.booleans(),
        "policy": st.sampled_from(["PASS", "FAIL", "DENY"]).map(verdict),
        "checks": st.lists(st.sampled_from(["pass", "fail", "timeout", "error"]).map(check), max_size=3).map(tuple),
        "unavailable": st.sets(st.sampled_from(["model", "policy", "guardrail"])).map(tuple),
        "thresholds": st.builds(
            Thresholds, review_from=st.floats(0, 100), reject_from=st.floats(0, 100), auto_reject=st.booleans()
        ),
    }
)


@settings(deadline=None)
@given(situation=situations, fault=st.sampled_from(["halt", "check", "unavailable", "fail", "deny", "flag"]))
def test_a_fault_never_makes_an_outcome_more_permissive(situation: dict[str, Any], fault: str) -> None:
    policy: PolicyVerdict = situation["policy"]
    faults: dict[str, dict[str, Any]] = {
        "halt": {"halted": True},
        "check": {"checks": (*situation["checks"], check("error"))},
        "unavailable": {"unavailable": (*situation["unavailable"], "lists")},
        "fail": {} if policy.result is PolicyResult.DENY else {"policy": verdict("FAIL")},
        "deny": {"policy": verdict("DENY")},
        "flag": {},
    }
    worse = situation | faults[fault]
    flags = [{"code": "AML", "level": "high"}] if fault == "flag" else []
    before = decision_of(processing(new_state("compliance"), **situation)).outcome
    after = decision_of(processing(new_state("compliance", regulatory_flags=flags), **worse)).outcome
    assert PRECEDENCE.index(after) >= PRECEDENCE.index(before)
    if not situation["thresholds"].auto_reject:
        assert before is not REJECTED


@settings(deadline=None)
@given(situation=situations)
def test_a_lost_score_never_ends_in_an_approval(situation: dict[str, Any]) -> None:
    assert decision_of(processing(**situation | {"score": None})).outcome is not APPROVED


def test_a_decision_names_its_versions_evidence_and_reasons_by_weight() -> None:
    state = processing(score=50, unavailable=("guardrail",))
    decision = decision_of(state)
    assert [reason.code for reason in decision.reasons] == ["LARGE", "SMALL", "DEGRADED:guardrail", "SCORE_BAND"]
    assert decision.versions["model"] == {"name": "model", "version": 1, "digest": MODEL.digest}
    assert decision.versions["thresholds"]["digest"] == Thresholds().digest
    assert decision.versions["schema"] == "1.0"
    assert decision.evidence["body_digest"] == state.body_digest
    assert decision.evidence["history"]["events_1d"] == 4
    assert decision.evidence["pins_now"] == NOW
    assert (decision.degraded, decision.correlation_id, decision.decided_at) == (("guardrail",), "correlation-1", NOW)


@pytest.mark.parametrize("kind", ["risk", "compliance"])
def test_the_flow_is_the_four_stages_in_order(kind: str) -> None:
    assert tuple(functions.stage for functions in PIPELINE[kind]) == STAGES
    assert [stage_after(kind, stage) for stage in STAGES] == [*STAGES[1:], None]
    with pytest.raises(InvalidWorkflowStateError):
        stage_of("weather", Stage.SCORING)


@pytest.mark.parametrize("stage", [Stage.SCORING, Stage.GUARDRAIL, Stage.DECISION])
def test_a_state_without_its_earlier_sections_does_not_fit_the_stage(stage: Stage) -> None:
    facts: dict[Stage, Any] = {
        Stage.SCORING: scoring.ScoringFacts(artifact(MODEL), artifact(POLICY)),
        Stage.GUARDRAIL: guardrail.GuardrailFacts(artifact(GUARDRAIL)),
        Stage.DECISION: DecisionFacts(),
    }
    with pytest.raises(InvalidWorkflowStateError):
        stage_of("risk", stage).decide(new_state(), facts.get(stage), NOW, lambda: 0.0)


class OneTenant:
    """A ledger and registry of fixed answers that counts what it is asked."""

    def __init__(self, *, broken: str | None = None, active: ActiveSet | None = None) -> None:
        self.broken = broken
        self.set = active or ActiveSet(MODEL, POLICY, GUARDRAIL, Thresholds())
        self.calls: list[tuple[str, int]] = []
        self.gone: set[Pin] = set()
        self.rows: dict[tuple[TenantScope, str], DecisionRow] = {}

    async def decisions(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[DecisionRow | None]:
        self.calls.append(("decisions", len(keys)))
        return [self.rows.get(key) for key in keys]

    async def revoked(self, pins: Sequence[Pin]) -> Sequence[bool]:
        self.calls.append(("revoked", len(pins)))
        return [pin in self.gone for pin in pins]

    async def histories(self, states: Sequence[EventState]) -> Sequence[SubjectHistory]:
        return [SubjectHistory(events_1d=number) for number, _ in enumerate(states)]

    async def active(self, scopes: Sequence[TenantScope], kind: str, event_types: Sequence[str]) -> Sequence[ActiveSet]:
        self.calls.append((kind, len(scopes)))
        model = Pin(name=kind, version=1, digest=MODEL.digest)
        return [replace(self.set, model=model if self.set.model else None) for _ in scopes]

    async def artifacts(self, pins: Sequence[Pin]) -> Sequence[Artifact]:
        self.calls.append(("artifacts", len(pins)))
        if any(pin.digest == self.broken for pin in pins):
            raise InvalidModelStateError
        return [artifact(pin) for pin in pins]


def ports(one: OneTenant) -> StagePorts:
    return StagePorts(cast("Ledger", one), cast("Registry", one))


async def run(state: EventState, one: OneTenant) -> EventState:
    for functions in PIPELINE[state.KIND]:
        facts = await functions.gather([state], ports(one))
        state = moved(state, functions.decide(state, facts[0], NOW, lambda: 1.0), functions.stage)
    return state


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, Status.APPROVED),
        ({"attributes": {"x": 5}}, Status.REJECTED),
        ({"text": "a bad text"}, Status.AWAITING_APPROVAL),
        ({"risk_score": 95.0}, Status.AWAITING_APPROVAL),
    ],
)
@pytest.mark.parametrize("kind", ["risk", "compliance"])
async def test_an_event_goes_through_all_stages(kind: str, fields: dict[str, Any], status: Status) -> None:
    state = await run(new_state(kind, **fields), OneTenant())
    assert (state.n, state.status) == (4, status)
    assert all(isinstance(value, str | int) for entry in state.trail for value in entry.detail.values())
    assert state.trail[4].detail["outcome"] == state.decided.decision.outcome if state.decided else False


@pytest.mark.parametrize("kind", ["risk", "compliance"])
@pytest.mark.parametrize("pin", [MODEL, POLICY, GUARDRAIL])
async def test_an_artifact_that_cannot_be_read_asks_a_person(kind: str, pin: Pin) -> None:
    state = await run(new_state(kind), OneTenant(broken=pin.digest))
    assert state.status is Status.AWAITING_APPROVAL
    assert state.decided is not None
    assert state.decided.decision.degraded == (pin.name,)


def test_a_rule_about_a_velocity_that_is_lost_degrades_the_decision() -> None:
    rule = {"id": "fast", "when": "velocity.subject.count_1h > 5.0", "result": "DENY", "code": "FAST", "text": "fast"}
    policy = Artifact("policy", Pin(name="p", version=1, digest="velocity"), {"type": "cel", "rules": [rule]})
    step = scoring.decide(processing(), scoring.ScoringFacts(artifact(MODEL), policy), NOW, lambda: 0.0)
    assert isinstance(step.section, Validated)
    assert (step.section.policy.result, step.section.unavailable) == (PolicyResult.FAIL, ("velocity",))


@pytest.mark.parametrize("content", [{}, {"type": "cel", "rules": [{"id": "x"}]}, {"type": "checks", "patterns": 3}])
def test_an_artifact_of_the_wrong_content_fails_closed(content: dict[str, Any]) -> None:
    wrong = Artifact("any", Pin(name="w", version=1, digest=f"wrong-{sorted(content)}"), content)
    state = processing()
    step = scoring.decide(state, scoring.ScoringFacts(wrong, wrong), NOW, lambda: 0.0)
    assert isinstance(step.section, Validated)
    assert (step.section.score, step.section.policy.result) == (None, PolicyResult.FAIL)
    assert step.section.unavailable == ("model", "policy")
    checked = guardrail.decide(state, guardrail.GuardrailFacts(wrong), NOW, lambda: 0.0).section
    assert isinstance(checked, Processed)
    assert checked.unavailable == ("guardrail",)


LISTS = Pin(name="sdn", version=1, digest="l" * 64)
CONTENT[LISTS.digest] = {"type": "names", "source": "test", "entries": [["7", "JOHN LISTED", False]]}


async def test_a_listed_name_is_pinned_found_and_asks_a_person() -> None:
    one = OneTenant(active=ActiveSet(MODEL, POLICY, GUARDRAIL, Thresholds(), lists=LISTS))
    listed = await run(new_state(subject={"type": "person", "id": "p-1", "name": "Listed, John"}), one)
    assert listed.created is not None
    assert listed.decided is not None
    decision = listed.decided.decision
    assert (listed.created.pins.lists, decision.versions["lists"]) == (LISTS, LISTS.model_dump())
    assert decision.outcome is REVIEW
    (check,) = [check for check in decision.guardrails if check.check == "screening"]
    assert (check.verdict, check.hit) == ("fail", "entry 7, similarity 1.00")
    other = await run(new_state(subject={"type": "person", "id": "p-1", "name": "Mary Other"}), one)
    assert other.status is Status.APPROVED


@pytest.mark.parametrize("lost", ["unusable", "unreadable"])
async def test_lists_that_cannot_be_had_let_nobody_pass(lost: str) -> None:
    limits = Thresholds()
    chosen = {
        "unusable": ActiveSet(MODEL, POLICY, GUARDRAIL, limits, lost=("lists",)),
        "unreadable": ActiveSet(MODEL, POLICY, GUARDRAIL, limits, lists=LISTS),
    }
    state = await run(new_state(), OneTenant(active=chosen[lost], broken=LISTS.digest))
    assert state.decided is not None
    assert (state.decided.decision.outcome, state.decided.decision.degraded) == (REVIEW, ("lists",))


REASONS = Pin(name="words", version=3, digest="r" * 64)
CONTENT[REASONS.digest] = {
    "type": "catalogue",
    "codes": {"X": {"text": "in the catalogue's words", "adverse_action": "Your x is high."}},
}


async def test_the_words_of_a_decision_are_the_pinned_catalogues() -> None:
    async def made(chosen: ActiveSet, broken: str | None = None) -> Decision:
        state = await run(new_state(attributes={"x": 5}), OneTenant(active=chosen, broken=broken))
        assert state.decided is not None
        return state.decided.decision

    plain = await made(ActiveSet(MODEL, POLICY, GUARDRAIL, Thresholds()))
    assert [(one.code, one.adverse_action) for one in plain.reasons][:1] == [("X", None)]
    assert "adverse_action" not in plain.reasons[0].model_dump()
    assert "reasons" not in plain.versions
    chosen = ActiveSet(MODEL, POLICY, GUARDRAIL, Thresholds(), reasons=REASONS)
    worded = await made(chosen)
    assert (worded.reasons[0].text, worded.reasons[0].adverse_action) == ("in the catalogue's words", "Your x is high.")
    assert worded.versions["reasons"] == REASONS.model_dump()
    # Words that somebody chose and that cannot be had are missing, whatever the model says itself.
    assert (await made(chosen, broken=REASONS.digest)).degraded == ("reasons",)


CHALLENGER = Pin(name="challenger", version=2, digest="c" * 64)
TRIAL = Pin(name="spring", version=1, digest="t" * 64)
UNREADABLE_TRIAL = Pin(name="spring", version=2, digest="u" * 64)
CONTENT[CHALLENGER.digest] = {**CONTENT[MODEL.digest], "base": 99}
CONTENT[TRIAL.digest] = {
    "type": "challenger",
    "rollout": "spring",
    "percent": 100,
    "model": CHALLENGER.model_dump(),
}
CONTENT[UNREADABLE_TRIAL.digest] = {"type": "nothing"}


async def test_a_challenger_is_recorded_and_decides_nothing() -> None:
    async def decided(trial: Pin | None, broken: str | None = None) -> EventState:
        chosen = ActiveSet(MODEL, POLICY, GUARDRAIL, Thresholds(), trial=trial)
        return await run(new_state(), OneTenant(active=chosen, broken=broken))

    plain, tried = await decided(None), await decided(TRIAL)
    assert plain.validated is not None
    assert tried.validated is not None
    assert tried.created is not None
    assert tried.created.pins.trial == TRIAL
    shadow = tried.validated.shadow
    assert shadow is not None
    assert (shadow.rollout, shadow.version, shadow.flips) == ("spring", "challenger@2", True)
    assert shadow.score == 99
    assert tried.validated.score == plain.validated.score
    assert plain.decided is not None
    assert tried.decided is not None
    assert tried.decided.decision == plain.decided.decision
    assert b"shadow" not in plain.to_bytes()
    assert b'"trial"' not in plain.to_bytes()
    # Neither a trial nor a challenger that cannot be read costs the event its decision.
    for trial, broken in ((UNREADABLE_TRIAL, None), (TRIAL, CHALLENGER.digest), (TRIAL, TRIAL.digest)):
        without = await decided(trial, broken)
        assert without.decided is not None
        assert without.decided.decision == plain.decided.decision


async def test_nothing_active_is_named_and_asks_a_person() -> None:
    state = await run(new_state(), OneTenant(active=ActiveSet(None, None, None, Thresholds())))
    assert state.created is not None
    assert state.created.unavailable == ("model", "policy", "guardrail")
    assert state.status is Status.AWAITING_APPROVAL


async def test_retrieval_asks_once_per_kind_and_keeps_the_order() -> None:
    one = OneTenant()
    kinds = ["risk", "compliance", "risk", "compliance", "risk"]
    facts = await retrieval.gather([new_state(kind) for kind in kinds], ports(one))
    assert one.calls == [("risk", 3), ("compliance", 2)]
    assert [fact.active.model.name for fact in facts if fact.active.model] == kinds
    assert [fact.history.events_1d for fact in facts] == [0, 1, 2, 3, 4]


async def test_scoring_asks_once_for_all_distinct_artifacts() -> None:
    one = OneTenant()
    facts = await scoring.gather([processing() for _ in range(64)], ports(one))
    assert len(facts) == 64
    assert one.calls == [("artifacts", 2)]


def test_the_same_state_and_facts_give_the_same_bytes() -> None:
    facts = scoring.ScoringFacts(artifact(MODEL), artifact(POLICY))
    before = replace(processing(), status=Status.CREATED, n=1)
    steps = [scoring.decide(before, facts, NOW, lambda: 0.0) for _ in range(2)]
    assert steps[0] == steps[1]


def test_thresholds_keep_their_digest_across_storage() -> None:
    """The audit record of retrieval and the decision name the same limits, whoever read them from where."""
    assert Thresholds.model_validate_json(Thresholds().model_dump_json()).digest == Thresholds().digest


# --- halts, revocations, corrections ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["risk", "compliance"])
async def test_a_halted_tenants_event_goes_to_a_person(kind: str) -> None:
    halted = ActiveSet(MODEL, POLICY, GUARDRAIL, Thresholds(), halted=True)
    state = await run(new_state(kind), OneTenant(active=halted))
    assert state.status is Status.AWAITING_APPROVAL
    assert state.trail[1].detail["halted"] == 1
    assert "HALTED" in str(state.trail[4].detail["gates"])


@pytest.mark.parametrize("kind", ["risk", "compliance"])
@pytest.mark.parametrize(("name", "pin"), [("policy", POLICY), ("guardrail", GUARDRAIL)])
async def test_a_version_that_was_revoked_on_the_way_sends_its_event_to_a_person(
    kind: str, name: str, pin: Pin
) -> None:
    one = OneTenant()
    one.gone = {pin}
    state = await run(new_state(kind), one)
    assert state.status is Status.AWAITING_APPROVAL
    assert state.decided is not None
    assert f"REVOKED:{name}" in [reason.code for reason in state.decided.decision.reasons]
    assert state.decided.decision.evidence["revoked"] == [name]
    assert state.decided.decision.versions[name]["digest"] == pin.digest  # it finished on its pins all the same


@settings(deadline=None)
@given(situation=situations, kinds=st.sets(st.sampled_from(["model", "policy", "guardrail"]), min_size=1))
def test_a_revocation_never_makes_an_outcome_more_permissive(situation: dict[str, Any], kinds: set[str]) -> None:
    state = processing(**situation)
    before = decided_with(state, DecisionFacts()).outcome
    after = decided_with(state, DecisionFacts(tuple(sorted(kinds)))).outcome
    assert PRECEDENCE.index(after) >= max(PRECEDENCE.index(before), 1)


async def test_the_decision_stage_asks_once_for_all_pins_and_all_corrected_events() -> None:
    one, corrected = OneTenant(), "a" * 32
    one.gone = {GUARDRAIL}
    one.rows[TenantScope("acme"), corrected] = DecisionRow("d", 3, "APPROVED", b"", b"")
    plain, correcting = processing(), processing(new_state(corrects=corrected))
    early = processing(new_state(corrects="b" * 32))
    unpinned = ActiveSet(None, None, None, Thresholds())
    assert plain.created is not None
    nothing = replace(
        plain,
        created=plain.created.model_copy(
            update={"pins": Pins(now=NOW, model=None, policy=None, guardrail=None, thresholds=unpinned.thresholds)}
        ),
    )
    facts = await decision.gather([plain, correcting, early, nothing], ports(one))
    # and once for who is halted now: an event may have waited long since it was pinned
    assert one.calls == [("revoked", 3), ("decisions", 2), ("risk", 4)]
    gone = ("guardrail",)
    assert list(facts) == [DecisionFacts(gone), DecisionFacts(gone, 3), DecisionFacts(gone, 0), DecisionFacts()]


async def test_the_decision_stage_asks_nothing_that_nobody_needs() -> None:
    one = OneTenant()
    await decision.gather([processing()], ports(one))
    assert one.calls == [("revoked", 3), ("risk", 1)]


def test_a_correction_names_what_it_supersedes_and_so_does_its_audit_record() -> None:
    state = processing(new_state(corrects="a" * 32))
    step = stage_of("risk", Stage.DECISION).decide(state, DecisionFacts(corrected_revision=2), NOW, lambda: 0.0)
    assert isinstance(step.section, Decided)
    assert step.section.decision.supersedes == Supersedes(event_id="a" * 32, revision=2)
    assert step.detail["corrects"] == "a" * 32
    assert decision_of(processing()).supersedes is None
    with pytest.raises(ValueError, match="revision"):
        Supersedes(event_id="a" * 32, revision=-1)


@pytest.mark.parametrize("facts", [DecisionFacts(), DecisionFacts(("model", "policy"), 0), DecisionFacts((), 7)])
@pytest.mark.parametrize("corrects", [None, "a" * 32])
def test_the_stored_facts_make_the_same_decision_again(facts: DecisionFacts, corrects: str | None) -> None:
    """What a re-run has is the row: its state, and the decision in it."""
    before = processing(new_state(corrects=corrects) if corrects else new_state())
    first = stage_of("risk", Stage.DECISION).decide(before, facts, NOW, lambda: 0.0)
    stored = moved(before, first, Stage.DECISION).to_bytes()
    row = state_from_bytes(stored)
    assert row.decided is not None
    again = stage_of("risk", Stage.DECISION).decide(before, stored_facts(row.decided.decision), NOW, lambda: 0.0)
    assert moved(before, again, Stage.DECISION).to_bytes() == stored


@pytest.mark.parametrize(
    ("code", "outcome"), [("LIST_DENY", REJECTED), ("DEGRADED_REJECT", REJECTED), ("DEGRADED_ESCALATE", REVIEW)]
)
def test_a_check_rejects_by_its_code_only_when_it_failed(code: str, outcome: Outcome) -> None:
    def made(verdict: str) -> Outcome:
        found = Check(check="c", version="g@1", verdict=cast("Any", verdict), latency_ms=0.0, code=code)
        return decision_of(processing(checks=(found,))).outcome

    assert made("fail") is outcome
    assert made("error") is REVIEW
    assert made("pass") is APPROVED


async def test_a_degraded_event_is_rejected_where_the_guardrail_says_so_and_the_decision_names_it() -> None:
    strict = {"type": "checks", "on_degraded": "reject"}
    state = processing(new_state(), score=None)
    facts = guardrail.GuardrailFacts(Artifact("guardrail", replace_digest(GUARDRAIL), strict))
    degraded = replace(state, n=2, status=Status.VALIDATED, processed=None)
    assert degraded.validated is not None
    lost = degraded.validated.model_copy(update={"unavailable": ("model",)})
    state = moved(
        replace(degraded, validated=lost),
        guardrail.decide(replace(degraded, validated=lost), facts, NOW, lambda: 0.0),
        "guardrail",
    )
    decided = decision_of(state)
    assert decided.outcome is REJECTED
    assert decided.degraded == ("model",)
    assert [found.code for found in decided.guardrails if found.check == "degraded_mode"] == ["DEGRADED_REJECT"]


def replace_digest(pin: Pin) -> Pin:
    return pin.model_copy(update={"digest": "stages-guardrail-strict"})
