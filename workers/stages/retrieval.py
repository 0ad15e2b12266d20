"""Retrieval: pin the versions that will decide this event, the history of its subject, and its velocity.

Promises: from here on `Pins.now` is the event's clock, and what has no approved, active version is
named in `unavailable`. A velocity whose history was lost and not rebuilt yet is kept as such: what reads it has no
answer then. Does not read the content of what it pins.
"""

# ruff: noqa: ARG001 - every stage has the same signature, whatever it needs of it

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from contracts.lifecycle import Status
from contracts.ports import ActiveSet
from contracts.state import Created, EventState, Pins, SubjectHistory
from contracts.velocity import Velocity, sighting_of
from workers.judgement.features import velocity_of
from workers.stages.step import StagePorts, Step, Stopwatch


@dataclass(frozen=True, slots=True)
class RetrievalFacts:
    """What is active for the tenant, halt switch included, and what is known of the subject and counterparty."""

    active: ActiveSet
    history: SubjectHistory
    velocity: Velocity | None = None


async def gather(states: Sequence[EventState], ports: StagePorts) -> Sequence[RetrievalFacts]:
    """Histories, velocity and active sets, one registry call per kind in the batch. InfrastructureError passes through.

    Velocity is one atomic record-and-read; a repeat of it answers as the first time.
    """
    histories = await ports.ledger.histories(states)
    velocities = await _velocities(states, ports)
    active: dict[int, ActiveSet] = {}
    for kind in dict.fromkeys(state.KIND for state in states):
        places = [place for place, state in enumerate(states) if kind == state.KIND]
        sets = await ports.registry.active(
            [states[place].scope for place in places], kind, [states[place].event.type for place in places]
        )
        active.update(zip(places, sets, strict=True))
    return [RetrievalFacts(active[i], *known) for i, known in enumerate(zip(histories, velocities, strict=True))]


async def _velocities(states: Sequence[EventState], ports: StagePorts) -> Sequence[Velocity | None]:
    if ports.features is None:
        return [None] * len(states)
    policy = ports.velocity
    sightings = [
        sighting_of(s.scope, s.event_id, s.event, datetime.fromisoformat(s.received_at), policy.attribute)
        for s in states
    ]
    seen = await ports.features.observe(sightings, record=ports.recording)
    currencies = [b"" if s.event.amount is None else s.event.amount.currency.encode() for s in states]
    return [
        velocity_of(one, sighting.at, currency, policy)
        for one, sighting, currency in zip(seen, sightings, currencies, strict=True)
    ]


def decide(state: EventState, facts: RetrievalFacts, now: str, stopwatch: Stopwatch) -> Step:
    """Fix the pins. `now` is RFC 3339 in UTC."""
    active = facts.active
    pins = Pins(
        now=now,
        model=active.model,
        policy=active.policy,
        guardrail=active.guardrail,
        lists=active.lists,
        reasons=active.reasons,
        trial=active.trial,
        thresholds=active.thresholds,
        halted=active.halted,
    )
    named = (("model", pins.model), ("policy", pins.policy), ("guardrail", pins.guardrail))
    unavailable = (*(name for name, pin in named if pin is None), *active.lost)
    optional = (("lists", pins.lists), ("reasons", pins.reasons), ("trial", pins.trial))
    velocity = facts.velocity
    detail: dict[str, str | int] = {
        name: "none" if pin is None else f"{pin.name}@{pin.version}:{pin.digest[:16]}"
        for name, pin in (*named, *((name, pin) for name, pin in optional if pin is not None))
    }
    detail |= {"thresholds": pins.thresholds.digest[:16], "halted": int(pins.halted)}
    if velocity is not None:
        detail["observed"] = f"{velocity.epoch}:{velocity.sequence}" + ("" if velocity.complete else ":incomplete")
    section = Created(at=now, pins=pins, history=facts.history, velocity=velocity, unavailable=unavailable)
    return Step(Status.CREATED, section, detail)
