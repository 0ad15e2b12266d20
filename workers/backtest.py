"""Backtests: decisions made again with other versions than those that they stand on, before anybody approves them.

    stored state ─► as it was after retrieval, with the candidates' pins ─► scoring, guardrail, decision ─► compared

Promises: facts and times are the stored ones, so that what differs is the candidates' doing; a decision that cannot be
made again is counted and never guessed. Writes nothing, and needs no candidate to be registered. What a candidate would
have read that was not gathered then (a velocity of an older state) is missing, as it would be for a new event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from typing import Any, Final

from contracts.codec import state_from_bytes
from contracts.failures import InvalidWorkflowStateError, UndecodableEntryError
from contracts.lifecycle import FINAL_VERSION
from contracts.outcomes import Outcome
from contracts.ports import Artifact, Ledger, Registry
from contracts.state import EventState, Pin
from workers.redecision import again
from workers.stages import StagePorts
from workers.stages.step import created, validated

KINDS: Final = ("model", "policy", "guardrail", "lists", "reasons")
"""What may be tried: the kinds that a decision is pinned to."""


class Candidates:
    """A registry that knows some versions more. Everything else is the registry's own answer."""

    def __init__(self, registry: Registry, candidates: Sequence[Artifact]) -> None:
        self._registry = registry
        self._candidates = {artifact.pin: artifact for artifact in candidates}

    async def artifacts(self, pins: Sequence[Pin]) -> Sequence[Artifact]:
        """Content by position, as the port says."""
        others = iter(await self._registry.artifacts([pin for pin in pins if pin not in self._candidates]))
        return [self._candidates[pin] if pin in self._candidates else next(others) for pin in pins]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)


@dataclass(frozen=True, slots=True)
class Compared:
    """One decision then and with the candidates. `problem`: why there is none; then the rest says nothing."""

    event_id: str
    segment: str = ""
    outcome_then: str = ""
    outcome_now: str = ""
    score_then: float | None = None
    score_now: float | None = None
    rules_then: frozenset[str] = frozenset()
    rules_now: frozenset[str] = frozenset()
    problem: str = ""

    @property
    def flips(self) -> bool:
        """Whether the outcome is another one."""
        return self.outcome_then != self.outcome_now


async def backtest(
    stored: Sequence[tuple[str, bytes]], candidates: Sequence[Artifact], registry: Registry, ledger: Ledger
) -> list[Compared]:
    """Decide some events again with the candidates in the place of what they are pinned to; one answer each, in order.

    `stored`: (event id, stored bytes of the decided state). At most one candidate of a kind. Raises
    InfrastructureError when the registry does not answer.
    """
    known: Any = Candidates(registry, candidates)
    ports = StagePorts(ledger, known)
    pins = {artifact.kind: artifact.pin for artifact in candidates}
    return [await _one(event_id, data, pins, ports) for event_id, data in stored]


async def _one(event_id: str, data: bytes, pins: Mapping[str, Pin], ports: StagePorts) -> Compared:
    try:
        then = state_from_bytes(data)
        if then.decided is None or then.n != FINAL_VERSION:
            return Compared(event_id, problem="the stored state holds no decision")
        start = then.rewound(1)
        known = created(start)
        section = known.model_copy(
            update={
                "pins": known.pins.model_copy(update=dict(pins)),
                "unavailable": tuple(name for name in known.unavailable if name not in pins),
            }
        )
        now = await again(then, replace(start, created=section), ports)
    except (UndecodableEntryError, InvalidWorkflowStateError) as error:
        return Compared(event_id, problem=error.detail)
    return Compared(
        event_id,
        f"{then.KIND}:{then.event.type}",
        _outcome(then),
        _outcome(now),
        validated(then).score,
        validated(now).score,
        _rules(then),
        _rules(now),
    )


def _rules(state: EventState) -> frozenset[str]:
    return frozenset(rule.rule for rule in validated(state).policy.rules)


def _outcome(state: EventState) -> str:
    assert state.decided is not None
    return state.decided.decision.outcome.value


@dataclass(frozen=True, slots=True)
class Quality:
    """How well "not approved" found the labelled frauds: None where there was nothing to divide by."""

    precision: float | None
    recall: float | None


@dataclass(frozen=True, slots=True)
class BacktestReport:
    """What the candidates would change. `outcomes`: (then, now) → events; scores in points, 0–100.

    `rules`: per rule how often it fired then and now. `segments`: per kind and type (events, flips). `labelled`: events
    whose truth is known, over which `before` and `after` are.
    """

    events: int
    problems: int
    flips: int
    outcomes: Mapping[tuple[str, str], int]
    mean_shift: float | None
    largest_shift: float | None
    rules: Mapping[str, tuple[int, int]]
    segments: Mapping[str, tuple[int, int]]
    labelled: int = 0
    before: Quality = field(default_factory=lambda: Quality(None, None))
    after: Quality = field(default_factory=lambda: Quality(None, None))


def summed(compared: Sequence[Compared], truth: Mapping[str, bool]) -> BacktestReport:
    """The report over comparisons. `truth`: event id → whether it was a fraud, for those that are labelled."""
    good = [one for one in compared if not one.problem]
    shifts = [b - a for one in good if (a := one.score_then) is not None and (b := one.score_now) is not None]
    then = Counter(rule for one in good for rule in one.rules_then)
    now = Counter(rule for one in good for rule in one.rules_now)
    segments = Counter(one.segment for one in good)
    flipped = Counter(one.segment for one in good if one.flips)
    known = [(one, truth[one.event_id]) for one in good if one.event_id in truth]
    return BacktestReport(
        events=len(good),
        problems=len(compared) - len(good),
        flips=sum(one.flips for one in good),
        outcomes=Counter((one.outcome_then, one.outcome_now) for one in good),
        mean_shift=round(fsum(shifts) / len(shifts), 3) if shifts else None,
        largest_shift=max(shifts, key=abs, default=None),
        rules={rule: (then[rule], now[rule]) for rule in sorted(then | now)},
        segments={name: (count, flipped[name]) for name, count in sorted(segments.items())},
        labelled=len(known),
        before=_quality((one.outcome_then, fraud) for one, fraud in known),
        after=_quality((one.outcome_now, fraud) for one, fraud in known),
    )


def _quality(pairs: Iterable[tuple[str, bool]]) -> Quality:
    table = Counter((outcome != Outcome.APPROVED.value, fraud) for outcome, fraud in pairs)
    held, frauds = table[True, True] + table[True, False], table[True, True] + table[False, True]
    return Quality(table[True, True] / held if held else None, table[True, True] / frauds if frauds else None)
