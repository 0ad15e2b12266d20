"""The flow as data: which stages an event of each kind goes through, in order.

    retrieval ─► scoring ─► guardrail ─► decision

Risk and compliance differ in two things only: the policy set that the registry holds for their
scope, and the decision rule. Nothing here runs anything; the runner does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from contracts.failures import InvalidWorkflowStateError
from contracts.topology import Stage
from workers.stages import StageFunctions, decision, guardrail, retrieval, scoring

_SHARED: tuple[StageFunctions, ...] = (
    StageFunctions(Stage.RETRIEVAL, retrieval.gather, retrieval.decide),
    StageFunctions(Stage.SCORING, scoring.gather, scoring.decide),
    StageFunctions(Stage.GUARDRAIL, guardrail.gather, guardrail.decide),
)

PIPELINE: Mapping[str, tuple[StageFunctions, ...]] = MappingProxyType(
    {
        "risk": (*_SHARED, StageFunctions(Stage.DECISION, decision.gather, decision.decide_risk)),
        "compliance": (*_SHARED, StageFunctions(Stage.DECISION, decision.gather, decision.decide_compliance)),
    }
)


def stage_of(kind: str, stage: Stage) -> StageFunctions:
    """The functions of a stage for an event kind. Raises InvalidWorkflowStateError when the kind has no such stage."""
    for functions in _stages(kind):
        if functions.stage == stage:
            return functions
    raise InvalidWorkflowStateError(f"{kind} events have no stage {stage}")


def stage_after(kind: str, stage: Stage) -> Stage | None:
    """The stage after this one, None after the last. Raises InvalidWorkflowStateError as `stage_of` does."""
    order = [functions.stage for functions in _stages(kind)]
    following = order.index(stage_of(kind, stage).stage) + 1
    return order[following] if following < len(order) else None


def _stages(kind: str) -> tuple[StageFunctions, ...]:
    if kind not in PIPELINE:
        raise InvalidWorkflowStateError(f"there is no pipeline for events of kind {kind!r}")
    return PIPELINE[kind]
