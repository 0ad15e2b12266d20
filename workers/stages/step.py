"""The shape of a stage: gather the facts for a batch, then decide each event alone.

Promises: `decide` is sync and pure (no await, clock, random or log) and never raises for what an
event contains. It raises InvalidWorkflowStateError for a state that lacks an earlier section, which
is a defect of the caller. Nothing here runs a stage: that is the runner's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from contracts.failures import InvalidModelStateError, InvalidWorkflowStateError, ModelNotApprovedError
from contracts.lifecycle import Status
from contracts.ports import Artifact, FeatureStore, Ledger, Registry
from contracts.state import Created, EventState, Pin, Processed, Section, Validated
from contracts.topology import Stage
from contracts.velocity import VelocityPolicy

Stopwatch = Callable[[], float]
"""Monotonic seconds, injected: the only time that a decision may measure, and only to report it."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a stage decided: arguments for `EventState.transition`. `detail` goes into the audit record."""

    target: Status
    section: Section
    detail: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StagePorts:
    """What a stage may ask. `features`: None where no velocity is kept; `recording`: whether it observes events too."""

    ledger: Ledger
    registry: Registry
    features: FeatureStore | None = None
    velocity: VelocityPolicy = field(default_factory=VelocityPolicy)
    recording: bool = True


@dataclass(frozen=True, slots=True)
class StageFunctions:
    """One stage: `gather(states, ports)` gives one facts value per state, in order, for `decide`."""

    stage: Stage
    gather: Callable[[Sequence[EventState], StagePorts], Awaitable[Sequence[Any]]]
    decide: Callable[[EventState, Any, str, Stopwatch], Step]


def created(state: EventState) -> Created:
    """What retrieval added. Raises InvalidWorkflowStateError when it did not."""
    if state.created is None:
        raise InvalidWorkflowStateError(f"version {state.n} has not been through retrieval")
    return state.created


def validated(state: EventState) -> Validated:
    """What scoring added. Raises InvalidWorkflowStateError when it did not."""
    if state.validated is None:
        raise InvalidWorkflowStateError(f"version {state.n} has not been through scoring")
    return state.validated


def processed(state: EventState) -> Processed:
    """What guardrail added. Raises InvalidWorkflowStateError when it did not."""
    if state.processed is None:
        raise InvalidWorkflowStateError(f"version {state.n} has not been through guardrail")
    return state.processed


async def artifacts(registry: Registry, pins: Sequence[Pin | None]) -> dict[str, Artifact]:
    """The content of each distinct pin, by digest.

    A pin whose content is absent or does not match its digest is left out, so that it degrades its
    own events only; InfrastructureError goes through to the runner.
    """
    wanted = list({pin.digest: pin for pin in pins if pin is not None}.values())
    if not wanted:
        return {}
    try:
        found = list(await registry.artifacts(wanted))
    except (InvalidModelStateError, ModelNotApprovedError):
        found = [artifact for pin in wanted for artifact in await _one(registry, pin)]
    return {artifact.pin.digest: artifact for artifact in found}


async def _one(registry: Registry, pin: Pin) -> Sequence[Artifact]:
    try:
        return await registry.artifacts([pin])
    except (InvalidModelStateError, ModelNotApprovedError):
        return ()


def content_for(pin: Pin | None, found: Mapping[str, Artifact]) -> Artifact | None:
    """The artifact of a pin, None when there is no pin or no content."""
    return None if pin is None else found.get(pin.digest)
