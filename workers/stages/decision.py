"""Decision: the most restrictive answer of all gates.

    halt switch                                        → REQUIRE_APPROVAL
    policy DENY                                        → REJECTED
    policy FAIL, guardrail not passed, degraded,
    no score, HIGH_RISK, regulatory flag above low     → REQUIRE_APPROVAL
    the tenant's score bands                           → any of the three
    then, with `auto_reject` off: REJECTED             → REQUIRE_APPROVAL

Promises: a gate can only add restriction, so no fault lifts another gate's answer (I12). Low flags
pass the regulatory gate and nothing else. Does not write: the ledger is the arbiter of outcomes.
"""

# ruff: noqa: ARG001 - every stage has the same signature, whatever it needs of it

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from contracts.outcomes import STATUS_OF, Decision, Outcome, PolicyResult, Reason, most_restrictive
from contracts.state import Decided, EventState, Pin
from workers.judgement.checks import HIGH_RISK
from workers.stages.step import StagePorts, Step, Stopwatch, created, processed, validated


@dataclass(frozen=True, slots=True)
class Objection:
    """One gate's answer: an outcome more restrictive than APPROVED, and why."""

    outcome: Outcome
    code: str
    text: str


Gate = Callable[[EventState], Iterator[Objection]]


def halt_gate(state: EventState) -> Iterator[Objection]:
    """The halt switch sends every event to a person."""
    if created(state).pins.halted:
        yield Objection(Outcome.REQUIRE_APPROVAL, "HALTED", "Automatic decisions are halted for this tenant")


def policy_gate(state: EventState) -> Iterator[Objection]:
    """DENY rejects, FAIL asks a person; a result without a rule behind it counts all the same."""
    verdict = validated(state).policy
    outcomes = {PolicyResult.DENY: Outcome.REJECTED, PolicyResult.FAIL: Outcome.REQUIRE_APPROVAL}
    for rule in verdict.rules:
        if rule.result in outcomes:
            text = f"Policy rule {rule.rule} says {rule.result}" + (f" ({rule.code})" if rule.code else "")
            yield Objection(outcomes[rule.result], f"POLICY_{rule.result}:{rule.rule}", text)
    if verdict.result in outcomes and all(rule.result != verdict.result for rule in verdict.rules):
        yield Objection(outcomes[verdict.result], f"POLICY_{verdict.result}", f"The policy set says {verdict.result}")


def guardrail_gate(state: EventState) -> Iterator[Objection]:
    """Whatever is not a pass asks a person: failed, timed out or could not be made."""
    for check in processed(state).checks:
        if check.verdict != "pass":
            code = HIGH_RISK if check.code == HIGH_RISK else f"GUARDRAIL:{check.check}"
            text = f"Guardrail check {check.check}: {check.verdict}" + (f" ({check.code})" if check.code else "")
            yield Objection(Outcome.REQUIRE_APPROVAL, code, text)


def degraded_gate(state: EventState) -> Iterator[Objection]:
    """What was not available cannot have spoken against the event, so a person does."""
    for name in _degraded(state):
        yield Objection(Outcome.REQUIRE_APPROVAL, f"DEGRADED:{name}", f"No {name} was available for this decision")


def regulatory_gate(state: EventState) -> Iterator[Objection]:
    """A regulatory flag above low asks a person."""
    for flag in state.event.regulatory_flags or ():
        if flag.level != "low":
            text = f"Regulatory flag {flag.code} is {flag.level}"
            yield Objection(Outcome.REQUIRE_APPROVAL, f"REGULATORY_FLAG:{flag.code}", text)


def flags_named_gate(state: EventState) -> Iterator[Objection]:
    """A compliance event says which flags it has; one that says nothing goes to a person."""
    if state.event.regulatory_flags is None:
        yield Objection(Outcome.REQUIRE_APPROVAL, "REGULATORY_FLAGS_MISSING", "The event does not name its flags")


def score_gate(state: EventState) -> Iterator[Objection]:
    """The tenant's bands; an event without a score is in none of them and goes to a person."""
    score, limits = validated(state).score, created(state).pins.thresholds
    if score is None:
        yield Objection(Outcome.REQUIRE_APPROVAL, "SCORE_UNAVAILABLE", "No score could be computed")
    elif score >= limits.reject_from:
        text = f"Score {score:.2f} is in the reject band (from {limits.reject_from:g})"
        yield Objection(Outcome.REJECTED, "SCORE_BAND", text)
    elif not score < limits.review_from:  # also true for NaN
        text = f"Score {score:.2f} is in the review band (from {limits.review_from:g})"
        yield Objection(Outcome.REQUIRE_APPROVAL, "SCORE_BAND", text)


RISK_GATES: tuple[Gate, ...] = (halt_gate, policy_gate, guardrail_gate, degraded_gate, regulatory_gate, score_gate)
COMPLIANCE_GATES: tuple[Gate, ...] = (*RISK_GATES, flags_named_gate)


async def gather(states: Sequence[EventState], ports: StagePorts) -> Sequence[None]:
    """Nothing: everything that decides is in the state."""
    return [None] * len(states)


def decide_risk(state: EventState, facts: None, now: str, stopwatch: Stopwatch) -> Step:
    """The decision rule of risk events. `now` becomes `decided_at`."""
    return _decide(state, now, RISK_GATES)


def decide_compliance(state: EventState, facts: None, now: str, stopwatch: Stopwatch) -> Step:
    """The decision rule of compliance events: as for risk, and the flags must be named."""
    return _decide(state, now, COMPLIANCE_GATES)


def _decide(state: EventState, now: str, gates: Sequence[Gate]) -> Step:
    objections = [objection for gate in gates for objection in gate(state)]
    outcome = most_restrictive((Outcome.APPROVED, *(objection.outcome for objection in objections)))
    if outcome is Outcome.REJECTED and not created(state).pins.thresholds.auto_reject:
        outcome = Outcome.REQUIRE_APPROVAL
        objections.append(Objection(outcome, "AUTO_REJECT_OFF", "This tenant rejects nothing without a person"))
    decision = _document(state, now, outcome, objections)
    score = decision.score
    detail: dict[str, str | int] = {
        "outcome": outcome.value,
        "score": "none" if score is None else f"{score:.2f}",
        "policy": decision.policy.result.value,
        "gates": ",".join(dict.fromkeys(objection.code for objection in objections))[:512],
    }
    return Step(STATUS_OF[outcome], Decided(at=now, decision=decision), detail)


def _document(state: EventState, now: str, outcome: Outcome, objections: Sequence[Objection]) -> Decision:
    facts, scored = created(state), validated(state)
    weighted = sorted(scored.reasons, key=lambda reason: (-reason.weight, reason.code))
    gates = (Reason(code=objection.code, text=objection.text, weight=0.0) for objection in objections)
    return Decision(
        event_id=state.event_id,
        tenant_id=state.scope.tenant_id,
        kind=state.event.kind,
        outcome=outcome,
        score=scored.score,
        reasons=(*weighted, *gates),
        policy=scored.policy,
        guardrails=processed(state).checks,
        evidence={
            "history": facts.history.model_dump(mode="json"),
            "body_digest": state.body_digest,
            "pins_now": facts.pins.now,
        },
        versions=_versions(state),
        degraded=_degraded(state) or None,
        decided_at=now,
        correlation_id=state.correlation_id,
    )


def _versions(state: EventState) -> dict[str, Any]:
    pins = created(state).pins
    limits = Pin(name="thresholds", version=pins.thresholds.version, digest=pins.thresholds.digest)
    named = {"model": pins.model, "policy": pins.policy, "guardrail": pins.guardrail, "thresholds": limits}
    versions: dict[str, Any] = {name: None if pin is None else pin.model_dump() for name, pin in named.items()}
    return versions | {"schema": state.event.schema_version}


def _degraded(state: EventState) -> tuple[str, ...]:
    sections = (created(state), validated(state), processed(state))
    return tuple(dict.fromkeys(name for section in sections for name in section.unavailable))
