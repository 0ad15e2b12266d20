"""Guardrail: limits and blocked patterns that hold whatever the model and the policies say.

Promises: every check has a verdict; one that cannot be made has the verdict `error`, which asks a
person. The tenant's own limits are checked even when no guardrail is registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from contracts.lifecycle import Status
from contracts.ports import Artifact
from contracts.state import EventState, Processed
from workers.judgement import UNREADABLE
from workers.judgement.checks import Guardrail, Subject, load_guardrail, run_checks
from workers.stages.step import StagePorts, Step, Stopwatch, artifacts, content_for, created, validated


@dataclass(frozen=True, slots=True)
class GuardrailFacts:
    """The content of the pinned guardrail and the model's; None when there is none to be had."""

    guardrail: Artifact | None
    model: Artifact | None = None


async def gather(states: Sequence[EventState], ports: StagePorts) -> Sequence[GuardrailFacts]:
    """The pinned guardrail and model of each event, one registry call for all distinct pins."""
    pins = [created(state).pins for state in states]
    found = await artifacts(ports.registry, [pin for each in pins for pin in (each.guardrail, each.model)])
    return [GuardrailFacts(content_for(each.guardrail, found), content_for(each.model, found)) for each in pins]


def decide(state: EventState, facts: GuardrailFacts, now: str, stopwatch: Stopwatch) -> Step:
    """Run every check; `stopwatch` measures each (milliseconds in `Check.latency_ms`)."""
    guardrail = _readable(facts.guardrail)
    known, scored = created(state), validated(state)
    subject = Subject(
        state.event,
        scored.score,
        known.pins.thresholds,
        now=known.pins.now,
        history=known.history,
        velocity=known.velocity,
        model=facts.model,
        unavailable=(*known.unavailable, *scored.unavailable),
    )
    checks = run_checks(guardrail, subject, stopwatch)
    section = Processed(at=now, checks=checks, unavailable=() if guardrail is not None else ("guardrail",))
    failed = ",".join(f"{check.check}:{check.verdict}" for check in checks if check.verdict != "pass")
    return Step(Status.PROCESSING, section, {"checks": len(checks), "not_passed": failed[:512]})


def _readable(artifact: Artifact | None) -> Guardrail | None:
    if artifact is None:
        return None
    try:
        return load_guardrail(artifact)
    except UNREADABLE:
        return None
