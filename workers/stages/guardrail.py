"""Guardrail: limits, blocked patterns and listed names that hold whatever the model and the policies say.

Promises: every check has a verdict; one that cannot be made has the verdict `error`, which asks a
person. The tenant's own limits are checked even when no guardrail is registered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from contracts.lifecycle import Status
from contracts.ports import Artifact
from contracts.state import EventState, Processed
from workers.judgement import UNREADABLE
from workers.judgement.checks import Guardrail, Subject, load_guardrail, run_checks
from workers.judgement.screening import SanctionsList, load_names
from workers.stages.step import StagePorts, Step, Stopwatch, artifacts, content_for, created, validated


@dataclass(frozen=True, slots=True)
class GuardrailFacts:
    """The content of the pinned guardrail and the model's, and the pinned lists; None when there is none to be had."""

    guardrail: Artifact | None
    model: Artifact | None = None
    names: SanctionsList | None = None


async def gather(states: Sequence[EventState], ports: StagePorts) -> Sequence[GuardrailFacts]:
    """The pinned guardrail, model and lists of each event, one registry call for all distinct pins."""
    pins = [created(state).pins for state in states]
    found = await artifacts(ports.registry, [pin for each in pins for pin in (each.guardrail, each.model, each.lists)])
    names = {
        pin.digest: await _names(found.get(pin.digest)) for pin in {each.lists for each in pins} if pin is not None
    }
    return [
        GuardrailFacts(
            content_for(each.guardrail, found),
            content_for(each.model, found),
            None if each.lists is None else names[each.lists.digest],
        )
        for each in pins
    ]


async def _names(artifact: Artifact | None) -> SanctionsList | None:
    """The lists ready to be asked. Indexing some ten thousand names takes seconds, once, beside the event loop."""
    if artifact is None:
        return None
    try:
        return await asyncio.to_thread(load_names, artifact)
    except UNREADABLE:
        return None


def decide(state: EventState, facts: GuardrailFacts, now: str, stopwatch: Stopwatch) -> Step:
    """Run every check; `stopwatch` measures each (milliseconds in `Check.latency_ms`)."""
    guardrail = _readable(facts.guardrail)
    known, scored = created(state), validated(state)
    lost = ("lists",) if known.pins.lists is not None and facts.names is None else ()
    subject = Subject(
        state.event,
        scored.score,
        known.pins.thresholds,
        now=known.pins.now,
        history=known.history,
        velocity=known.velocity,
        model=facts.model,
        unavailable=(*known.unavailable, *scored.unavailable, *lost),
        lists=known.pins.lists,
        names=facts.names,
    )
    checks = run_checks(guardrail, subject, stopwatch)
    missing = (*(() if guardrail is not None else ("guardrail",)), *lost)
    section = Processed(at=now, checks=checks, unavailable=missing)
    failed = ",".join(f"{check.check}:{check.verdict}" for check in checks if check.verdict != "pass")
    return Step(Status.PROCESSING, section, {"checks": len(checks), "not_passed": failed[:512]})


def _readable(artifact: Artifact | None) -> Guardrail | None:
    if artifact is None:
        return None
    try:
        return load_guardrail(artifact)
    except UNREADABLE:
        return None
