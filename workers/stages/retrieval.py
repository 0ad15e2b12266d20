"""Retrieval: pin the versions that will decide this event, and the history of its subject.

Promises: from here on `Pins.now` is the event's clock, and what has no approved, active version is
named in `unavailable`. Does not read the content of what it pins.
"""

# ruff: noqa: ARG001 - every stage has the same signature, whatever it needs of it

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from contracts.lifecycle import Status
from contracts.ports import ActiveSet
from contracts.state import Created, EventState, Pins, SubjectHistory
from workers.stages.step import StagePorts, Step, Stopwatch


@dataclass(frozen=True, slots=True)
class RetrievalFacts:
    """What is active for the tenant, halt switch included, and what is known of the subject."""

    active: ActiveSet
    history: SubjectHistory


async def gather(states: Sequence[EventState], ports: StagePorts) -> Sequence[RetrievalFacts]:
    """Histories and active sets, one registry call per kind in the batch. InfrastructureError passes through."""
    histories = await ports.ledger.histories(states)
    active: dict[int, ActiveSet] = {}
    for kind in dict.fromkeys(state.KIND for state in states):
        places = [place for place, state in enumerate(states) if kind == state.KIND]
        sets = await ports.registry.active(
            [states[place].scope for place in places], kind, [states[place].event.type for place in places]
        )
        active.update(zip(places, sets, strict=True))
    return [RetrievalFacts(active[place], history) for place, history in enumerate(histories)]


def decide(state: EventState, facts: RetrievalFacts, now: str, stopwatch: Stopwatch) -> Step:
    """Fix the pins. `now` is RFC 3339 in UTC."""
    active = facts.active
    pins = Pins(
        now=now,
        model=active.model,
        policy=active.policy,
        guardrail=active.guardrail,
        thresholds=active.thresholds,
        halted=active.halted,
    )
    named = (("model", pins.model), ("policy", pins.policy), ("guardrail", pins.guardrail))
    unavailable = tuple(name for name, pin in named if pin is None)
    detail: dict[str, str | int] = {
        name: "none" if pin is None else f"{pin.name}@{pin.version}:{pin.digest[:16]}" for name, pin in named
    }
    detail |= {"thresholds": pins.thresholds.digest[:16], "halted": int(pins.halted)}
    section = Created(at=now, pins=pins, history=facts.history, unavailable=unavailable)
    return Step(Status.CREATED, section, detail)
