"""Scoring: the model's score and reasons, then the policy set over the event, its history, velocity and score.

Promises: a model or policy that is absent, unreadable or fails gives no score or a FAIL, and is
named in `unavailable`; never a better verdict. So is `reasons` when something without words raised
the score. A model that is only tried scores the subjects of its trial too, and nothing is made of that. Does not
compare the score with any limit.
"""

# ruff: noqa: ARG001 - every stage has the same signature, whatever it needs of it

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contracts.lifecycle import Status
from contracts.outcomes import PolicyResult, PolicyVerdict, RuleVerdict
from contracts.ports import Artifact
from contracts.state import EventState, Pin, Shadow, Validated
from workers.judgement import UNREADABLE
from workers.judgement.features import HistoryLostError
from workers.judgement.models import Scored, score_event
from workers.judgement.policies import POLICY_ERROR, VELOCITY_UNAVAILABLE, evaluate_policy
from workers.judgement.reasons import Catalogue, load_catalogue
from workers.judgement.rollout import Challenger, Trial, load_trial, shadow_of
from workers.stages.step import StagePorts, Step, Stopwatch, artifacts, content_for, created


@dataclass(frozen=True, slots=True)
class ScoringFacts:
    """The content of the pinned model, policy and catalogue of reasons; None when there is none to be had.

    `challenger`: who is tried.
    """

    model: Artifact | None
    policy: Artifact | None
    reasons: Artifact | None = None
    challenger: Challenger | None = None


async def gather(states: Sequence[EventState], ports: StagePorts) -> Sequence[ScoringFacts]:
    """The pinned model, policy and trial of each event, one registry call for all pins, and one for who is tried."""
    pins = [created(state).pins for state in states]
    wanted = [pin for each in pins for pin in (each.model, each.policy, each.reasons, each.trial)]
    found = await artifacts(ports.registry, wanted)
    trials = _trials([found[each.trial.digest] for each in pins if each.trial and each.trial.digest in found])
    models = await artifacts(ports.registry, [trial.model for trial in trials.values()]) if trials else {}
    return [
        ScoringFacts(
            content_for(each.model, found),
            content_for(each.policy, found),
            content_for(each.reasons, found),
            _challenger(each.trial, trials, models),
        )
        for each in pins
    ]


def _trials(artifacts: Sequence[Artifact]) -> dict[str, Trial]:
    """Trials by digest; one that cannot be read tries nothing, and costs no event its decision."""
    trials = {}
    for artifact in artifacts:
        with contextlib.suppress(*UNREADABLE):
            trials[artifact.pin.digest] = load_trial(artifact)
    return trials


def _challenger(pin: Pin | None, trials: Mapping[str, Trial], models: Mapping[str, Artifact]) -> Challenger | None:
    trial = None if pin is None else trials.get(pin.digest)
    return None if trial is None else Challenger(trial, content_for(trial.model, models))


def decide(state: EventState, facts: ScoringFacts, now: str, stopwatch: Stopwatch) -> Step:
    """Score and policy verdict. The score is 0–100, None when no model could give one."""
    scored, missing = _score(state, facts.model, _catalogue(facts.reasons))
    score = None if scored is None else scored.score
    policy, lacking = _policy(state, facts.policy, score)
    section = Validated(
        at=now,
        policy=policy,
        score=score,
        reasons=() if scored is None else scored.reasons,
        unavailable=tuple(dict.fromkeys(name for name in (missing, lacking) if name)),
        shadow=_shadow(state, facts.challenger, score),
    )
    detail: dict[str, str | int] = {
        "policy": policy.result.value,
        "score": "none" if score is None else f"{score:.2f}",
        "rules": ",".join(verdict.rule for verdict in policy.rules)[:512],
    }
    return Step(Status.VALIDATED, section, detail)


def _shadow(state: EventState, challenger: Challenger | None, score: float | None) -> Shadow | None:
    if challenger is None:
        return None
    known = created(state)
    limits = known.pins.thresholds
    bands = (limits.review_from, limits.reject_from)
    about = (state.event, known.history, known.velocity)
    return shadow_of(challenger, state.scope.tenant_id, *about, champion=score, bands=bands)


def _catalogue(artifact: Artifact | None) -> Catalogue | None:
    """The pinned catalogue; without one the words are the model's, and what has none is named as `reasons`."""
    if artifact is None:
        return None
    try:
        return load_catalogue(artifact)
    except UNREADABLE:
        return None


def _score(state: EventState, model: Artifact | None, catalogue: Catalogue | None) -> tuple[Scored | None, str]:
    """The score, and the name of what was missing for it: nothing if it may be relied on."""
    if model is None:
        return None, "model"
    known = created(state)
    try:
        scored = score_event(model, state.event, known.history, known.velocity, catalogue)
    except HistoryLostError:
        return None, "velocity"
    except UNREADABLE:
        return None, "model"
    # A score that was raised by something without words is one that nobody can explain.
    return scored, "reasons" if scored.uncovered or (known.pins.reasons and catalogue is None) else ""


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
