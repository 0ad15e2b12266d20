"""Deciding again: a stored decision made once more from its pinned versions and stored facts, and compared.

    stored state ─► as it was after retrieval ─► scoring, guardrail, decision ─► the same bytes, or what differs

Promises: what is compared are whole states, so a score, a reason, a check or a digest that comes out otherwise is
found and named. The times that were measured then (of each check, and of each stage) are taken from the stored state,
since no clock measures the same twice; everything else is computed afresh, by the code of this release. Reads the
registry and nothing else; writes nothing. Does not say which of two different decisions is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final

import orjson

from contracts.codec import state_from_bytes
from contracts.failures import InvalidWorkflowStateError, UndecodableEntryError
from contracts.lifecycle import FINAL_VERSION
from contracts.ports import Ledger, Registry
from contracts.state import EventState
from contracts.topology import STAGES, Stage
from workers.pipeline import stage_of
from workers.stages import StagePorts
from workers.stages.decision import stored_facts
from workers.stages.step import Stopwatch, processed

_AGAIN: Final = STAGES[1:]
"""Retrieval is not run again: what it saw is stored, and was true then."""

_MOST_DIFFERENCES: Final = 64


@dataclass(frozen=True, slots=True)
class Difference:
    """One place of the state (a JSON pointer) with its value then and now; None where there was none."""

    pointer: str
    then: Any
    now: Any


@dataclass(frozen=True, slots=True)
class Redecision:
    """What came of deciding one event again. `problem`: why it could not be decided; then nothing was compared.

    `identical`: the new state is the stored one, byte for byte, and so is the decision in it.
    """

    event_id: str
    outcome_then: str = ""
    outcome_now: str = ""
    differences: tuple[Difference, ...] = ()
    problem: str = ""

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return not self.differences and not self.problem


async def redecide(stored: Sequence[tuple[str, bytes]], registry: Registry, ledger: Ledger) -> list[Redecision]:
    """Decide some events again, by (event id, stored bytes of the decided state); one answer each, in order.

    Raises InfrastructureError when the registry does not answer.
    """
    ports = StagePorts(ledger, registry)
    return [await _one(event_id, data, ports) for event_id, data in stored]


async def _one(event_id: str, data: bytes, ports: StagePorts) -> Redecision:
    try:
        then = state_from_bytes(data)
        if then.decided is None or then.n != FINAL_VERSION:
            return Redecision(event_id, problem="the stored state holds no decision")
        now = await again(then, then.rewound(1), ports)
    except (UndecodableEntryError, InvalidWorkflowStateError) as error:
        return Redecision(event_id, problem=error.detail)
    assert now.decided is not None
    outcomes = then.decided.decision.outcome, now.decided.decision.outcome
    if now.to_bytes() == data:
        return Redecision(event_id, *outcomes)
    found = tuple(_differences("", orjson.loads(data), orjson.loads(now.to_bytes())))[:_MOST_DIFFERENCES]
    # Equal documents in other bytes: what was stored is not what a canonical writer wrote.
    return Redecision(event_id, *outcomes, found or (Difference("", "other bytes", "canonical bytes"),))


async def again(then: EventState, state: EventState, ports: StagePorts) -> EventState:
    """The stages behind retrieval once more on `state`, with the facts and at the times of a decided one."""
    for stage in _AGAIN:
        functions = stage_of(then.KIND, stage)
        if stage is Stage.DECISION:
            assert then.decided is not None
            facts = stored_facts(then.decided.decision)
        else:
            (facts,) = await functions.gather([state], ports)
        at = then.steps[state.n + 1]["at"]
        step = functions.decide(state, facts, at, _stopwatch(then) if stage is Stage.GUARDRAIL else _still)
        state = state.transition(step.target, step.section, stage=stage, detail=step.detail)
    return state


def _still() -> float:
    return 0.0


def _stopwatch(then: EventState) -> Stopwatch:
    """Shows, check by check, what was measured then; a check that time ran out on then has none left now."""
    moments = iter([m for check in processed(then).checks for m in (0.0, check.latency_ms / 1000)])
    return lambda: next(moments, 0.0)


def _differences(pointer: str, then: Any, now: Any) -> Iterator[Difference]:
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted(then.keys() | now.keys()):
            place = name.replace("~", "~0").replace("/", "~1")
            yield from _differences(f"{pointer}/{place}", then.get(name), now.get(name))
    elif isinstance(then, list) and isinstance(now, list):
        for place, (old, new) in enumerate(zip_longest(then, now)):
            yield from _differences(f"{pointer}/{place}", old, new)
    elif then != now:
        yield Difference(pointer, then, now)
