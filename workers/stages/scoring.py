"""Scoring: the model's score and reasons, then the policy set over the event, its history and its score.

Promises: a model or policy that is absent, unreadable or fails gives no score or a FAIL, and is
named in `unavailable`; never a better verdict. So is `reasons` when something without words raised
the score. Does not compare the score with any limit.
"""

# ruff: noqa: ARG001 - every stage has the same signature, whatever it needs of it

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from contracts.lifecycle import Status
from contracts.outcomes import PolicyResult, PolicyVerdict, RuleVerdict
from contracts.ports import Artifact
from contracts.state import EventState, Validated
from workers.judgement import UNREADABLE
from workers.judgement.features import HistoryLostError
from workers.judgement.models import Scored, score_event
from workers.judgement.policies import POLICY_ERROR, VELOCITY_UNAVAILABLE, evaluate_policy
from workers.stages.step import StagePorts, Step, Stopwatch, artifacts, content_for, created


@dataclass(frozen=True, slots=True)
class ScoringFacts:
    """The content of the pinned model and policy; None when there is none to be had."""

    model: Artifact | None
    policy: Artifact | None


async def gather(states: Sequence[EventState], ports: StagePorts) -> Sequence[ScoringFacts]:
    """The pinned model and policy of each event, one registry call for all distinct pins."""
    pins = [created(state).pins for state in states]
    found = await artifacts(ports.registry, [pin for each in pins for pin in (each.model, each.policy)])
    return [ScoringFacts(content_for(each.model, found), content_for(each.policy, found)) for each in pins]


def decide(state: EventState, facts: ScoringFacts, now: str, stopwatch: Stopwatch) -> Step:
    """Score and policy verdict. The score is 0–100, None when no model could give one."""
    scored, missing = _score(state, facts.model)
    score = None if scored is None else scored.score
    policy, lacking = _policy(state, facts.policy, score)
    section = Validated(
        at=now,
        policy=policy,
        score=score,
        reasons=() if scored is None else scored.reasons,
        unavailable=tuple(dict.fromkeys(name for name in (missing, lacking) if name)),
    )
    detail: dict[str, str | int] = {
        "policy": policy.result.value,
        "score": "none" if score is None else f"{score:.2f}",
        "rules": ",".join(verdict.rule for verdict in policy.rules)[:512],
    }
    return Step(Status.VALIDATED, section, detail)


def _score(state: EventState, model: Artifact | None) -> tuple[Scored | None, str]:
    """The score, and the name of what was missing for it: nothing if it may be relied on."""
    if model is None:
        return None, "model"
    known = created(state)
    try:
        scored = score_event(model, state.event, known.history, known.velocity)
    except HistoryLostError:
        return None, "velocity"
    except UNREADABLE:
        return None, "model"
    # A score that was raised by something without words is one that nobody can explain.
    return scored, "reasons" if scored.uncovered else ""


def _policy(state: EventState, policy: Artifact | None, score: float | None) -> tuple[PolicyVerdict, str]:
    """The verdict, and the name of what was missing for it."""
    if policy is None:
        return PolicyVerdict(result=PolicyResult.FAIL), "policy"
    known = created(state)
    try:
        verdict = evaluate_policy(policy, state.event, known.history, score, known.velocity)
    except UNREADABLE:
        rule = RuleVerdict(rule="policy", result=PolicyResult.FAIL, code=POLICY_ERROR)
        return PolicyVerdict(result=PolicyResult.FAIL, rules=(rule,)), "policy"
    return verdict, "velocity" if any(rule.code == VELOCITY_UNAVAILABLE for rule in verdict.rules) else ""
