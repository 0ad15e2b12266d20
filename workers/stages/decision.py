"""Decision: the most restrictive answer of all gates.

    halt switch (pinned, or set since), a pinned
    version revoked since                              → REQUIRE_APPROVAL
    policy DENY                                        → REJECTED
    policy FAIL, guardrail not passed, degraded,
    no score, HIGH_RISK, regulatory flag above low     → REQUIRE_APPROVAL
    the tenant's score bands                           → any of the three
    then, with `auto_reject` off: REJECTED             → REQUIRE_APPROVAL

Promises: a gate can only add restriction, so no fault lifts another gate's answer (I12). Low flags
pass the regulatory gate and nothing else. What was gathered is stored in the decision itself, so that the same state
with `stored_facts` gives the same bytes again. Does not write: the ledger is the arbiter of outcomes.
"""

# ruff: noqa: ARG001 - every stage has the same signature, whatever it needs of it

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from contracts.outcomes import STATUS_OF, Decision, Outcome, PolicyResult, Reason, Supersedes, most_restrictive
from contracts.state import Decided, EventState, Pin
from workers.judgement.checks import HIGH_RISK, REJECTING
from workers.stages.step import StagePorts, Step, Stopwatch, created, processed, validated

_PINNED = ("model", "policy", "guardrail", "prompt", "lists", "reasons")


@dataclass(frozen=True, slots=True)
class DecisionFacts:
    """What is known only now.

    `revoked`: the kinds of the pins that were revoked since retrieval. `corrected_revision`: the highest revision of
    the event that this one corrects, 0 when none was decided; it means nothing for an event that corrects none.
    `halted`: the tenant is halted now, whatever was pinned.
    """

    revoked: tuple[str, ...] = ()
    corrected_revision: int = 0
    halted: bool = False


@dataclass(frozen=True, slots=True)
class Objection:
    """One gate's answer: an outcome more restrictive than APPROVED, and why."""

    outcome: Outcome
    code: str
    text: str


Gate = Callable[[EventState], Iterator[Objection]]


def halt_gate(state: EventState, *, now: bool = False) -> Iterator[Objection]:
    """The halt switch sends every event to a person; `now`: also one that was pinned before it was set."""
    if created(state).pins.halted or now:
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
    """Whatever is not a pass asks a person: failed, timed out or could not be made. Some codes reject."""
    for check in processed(state).checks:
        if check.verdict != "pass":
            code = HIGH_RISK if check.code == HIGH_RISK else f"GUARDRAIL:{check.check}"
            text = f"Guardrail check {check.check}: {check.verdict}" + (f" ({check.code})" if check.code else "")
            rejects = check.verdict == "fail" and check.code in REJECTING
            yield Objection(Outcome.REJECTED if rejects else Outcome.REQUIRE_APPROVAL, code, text)


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


RISK_GATES: tuple[Gate, ...] = (policy_gate, guardrail_gate, degraded_gate, regulatory_gate, score_gate)
COMPLIANCE_GATES: tuple[Gate, ...] = (*RISK_GATES, flags_named_gate)


def revoked_gate(facts: DecisionFacts) -> Iterator[Objection]:
    """An event finishes on its pins, unless one of them was revoked on its way: then a person looks at it."""
    for kind in facts.revoked:
        text = f"The pinned {kind} was revoked before this decision"
        yield Objection(Outcome.REQUIRE_APPROVAL, f"REVOKED:{kind}", text)


async def gather(states: Sequence[EventState], ports: StagePorts) -> Sequence[DecisionFacts]:
    """Which pins were revoked, who is halted, and what is decided of the corrected events: at most one call each.

    A halt holds for what is under way too: an event may stand on a ladder, or behind an outage, for a long time.
    """
    pins = list(dict.fromkeys(chain.from_iterable(_pinned(state).values() for state in states)))
    answers = await ports.registry.revoked(pins) if pins else ()
    revoked = {pin for pin, gone in zip(pins, answers, strict=True) if gone}
    keys = [(state.scope, state.event.corrects) for state in states if state.event.corrects is not None]
    rows = iter(await ports.ledger.decisions(keys) if keys else ())
    halted = await _halted(states, ports)
    facts = []
    for state, stopped in zip(states, halted, strict=True):
        row = next(rows) if state.event.corrects is not None else None
        kinds = tuple(kind for kind, pin in _pinned(state).items() if pin in revoked)
        facts.append(DecisionFacts(kinds, row.revision if row is not None else 0, stopped))
    return facts


async def _halted(states: Sequence[EventState], ports: StagePorts) -> list[bool]:
    """Whether each event's tenant is halted now, by position; one call per kind."""
    found: dict[int, bool] = {}
    for kind in dict.fromkeys(state.KIND for state in states):
        places = [place for place, state in enumerate(states) if kind == state.KIND]
        sets = await ports.registry.active(
            [states[place].scope for place in places], kind, [states[place].event.type for place in places]
        )
        found.update(zip(places, (one.halted for one in sets), strict=True))
    return [found[place] for place in range(len(states))]


def stored_facts(decision: Decision) -> DecisionFacts:
    """The facts that a decision of this stage was made from; with its state they make the same decision again."""
    revision = decision.supersedes.revision if decision.supersedes is not None else 0
    evidence = decision.evidence
    return DecisionFacts(tuple(evidence.get("revoked", ())), revision, bool(evidence.get("halted", False)))


def _pinned(state: EventState) -> dict[str, Pin]:
    pins = created(state).pins
    named = {kind: getattr(pins, kind) for kind in _PINNED}
    return {kind: pin for kind, pin in named.items() if pin is not None}


def decide_risk(state: EventState, facts: DecisionFacts, now: str, stopwatch: Stopwatch) -> Step:
    """The decision rule of risk events. `now` becomes `decided_at`."""
    return _decide(state, facts, now, RISK_GATES)


def decide_compliance(state: EventState, facts: DecisionFacts, now: str, stopwatch: Stopwatch) -> Step:
    """The decision rule of compliance events: as for risk, and the flags must be named."""
    return _decide(state, facts, now, COMPLIANCE_GATES)


def _decide(state: EventState, facts: DecisionFacts, now: str, gates: Sequence[Gate]) -> Step:
    halts = halt_gate(state, now=facts.halted)
    objections = [*revoked_gate(facts), *halts, *chain.from_iterable(gate(state) for gate in gates)]
    outcome = most_restrictive((Outcome.APPROVED, *(objection.outcome for objection in objections)))
    if outcome is Outcome.REJECTED and not created(state).pins.thresholds.auto_reject:
        outcome = Outcome.REQUIRE_APPROVAL
        objections.append(Objection(outcome, "AUTO_REJECT_OFF", "This tenant rejects nothing without a person"))
    decision = _document(state, facts, now, outcome, objections)
    score = decision.score
    detail: dict[str, str | int] = {
        "outcome": outcome.value,
        "score": "none" if score is None else f"{score:.2f}",
        "policy": decision.policy.result.value,
        "gates": ",".join(dict.fromkeys(objection.code for objection in objections))[:512],
    }
    if decision.supersedes is not None:
        detail["corrects"] = decision.supersedes.event_id
    return Step(STATUS_OF[outcome], Decided(at=now, decision=decision), detail)


def _document(
    state: EventState, facts: DecisionFacts, now: str, outcome: Outcome, objections: Sequence[Objection]
) -> Decision:
    known, scored, corrects = created(state), validated(state), state.event.corrects
    weighted = sorted(scored.reasons, key=lambda reason: (-reason.weight, reason.code))
    gates = (Reason(code=objection.code, text=objection.text, weight=0.0) for objection in objections)
    evidence: dict[str, Any] = {
        "history": known.history.model_dump(mode="json"),
        "body_digest": state.body_digest,
        "pins_now": known.pins.now,
    }
    return Decision(
        event_id=state.event_id,
        tenant_id=state.scope.tenant_id,
        kind=state.event.kind,
        outcome=outcome,
        supersedes=Supersedes(event_id=corrects, revision=facts.corrected_revision) if corrects is not None else None,
        score=scored.score,
        reasons=(*weighted, *gates),
        policy=scored.policy,
        guardrails=processed(state).checks,
        evidence=evidence
        | ({"revoked": list(facts.revoked)} if facts.revoked else {})
        | ({"halted": True} if facts.halted else {}),
        versions=_versions(state),
        degraded=_degraded(state) or None,
        decided_at=now,
        correlation_id=state.correlation_id,
    )


def _versions(state: EventState) -> dict[str, Any]:
    pins = created(state).pins
    limits = Pin(name="thresholds", version=pins.thresholds.version, digest=pins.thresholds.digest)
    named = {"model": pins.model, "policy": pins.policy, "guardrail": pins.guardrail, "lists": pins.lists}
    named |= {"reasons": pins.reasons} if pins.reasons is not None else {}
    named |= {"thresholds": limits}
    versions: dict[str, Any] = {name: None if pin is None else pin.model_dump() for name, pin in named.items()}
    return versions | {"schema": state.event.schema_version}


def _degraded(state: EventState) -> tuple[str, ...]:
    sections = (created(state), validated(state), processed(state))
    return tuple(dict.fromkeys(name for section in sections for name in section.unavailable))
