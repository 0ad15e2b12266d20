"""Champions and challengers: who is scored by a second model too, and what is written down of it.

A challenger's score is a shadow: it is recorded beside the champion's and no outcome is made of it, since nothing here
returns a score that a decision could take. Promises: who belongs to a percentage depends on the rollout's name and the
subject alone, so that a subject keeps its side, and a larger percentage keeps everybody of a smaller one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from contracts.events import Event
from contracts.ports import Artifact
from contracts.state import SubjectHistory
from workers.judgement import UNREADABLE
from workers.judgement.models import score_event

STEPS: Final = 10_000
"""A percentage is exact to a hundredth."""


@dataclass(frozen=True, slots=True)
class Challenger:
    """A model that is tried on a share of subjects. `percent`: 0–100; `rollout` names the trial."""

    model: Artifact
    rollout: str
    percent: float

    def __post_init__(self) -> None:
        if not (self.rollout and math.isfinite(self.percent) and 0 <= self.percent <= 100):
            raise ValueError("a rollout has a name and a percentage of 0 to 100")


@dataclass(frozen=True, slots=True)
class Shadow:
    """What a challenger said of an event. `score` is None where it could give none; `flips` says whether its score
    lies in another band than the champion's.
    """

    rollout: str
    version: str
    score: float | None
    flips: bool


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """Of many shadows: how many, without a score, in another band, and the mean change of the score in points."""

    events: int
    unscored: int
    flips: int
    mean_shift: float | None


def place_of(rollout: str, tenant: str, subject: str) -> int:
    """The place of a subject in a rollout, 0 to STEPS − 1, evenly spread (SHA-256)."""
    digest = hashlib.sha256(b"riskfleet.rollout")
    for part in (rollout, tenant, subject):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(4, "big"))  # so that no two triples have the same bytes
        digest.update(encoded)
    return int.from_bytes(digest.digest()[:8], "big") * STEPS >> 64


def is_in(percent: float, rollout: str, tenant: str, subject: str) -> bool:
    """Whether a subject belongs to the first `percent` of a rollout."""
    return place_of(rollout, tenant, subject) < round(percent * STEPS / 100)


def shadows(
    challengers: Sequence[Challenger],
    tenant: str,
    event: Event,
    history: SubjectHistory,
    champion: float | None,
    bands: Sequence[float],
) -> tuple[Shadow, ...]:
    """The shadow scores of an event. Never raises for what a challenger cannot read. `bands`: rising limits."""
    subject = f"{event.subject.type}\0{event.subject.id}"
    return tuple(
        _shadow(each, event, history, champion, bands)
        for each in challengers
        if is_in(each.percent, each.rollout, tenant, subject)
    )


def _shadow(
    challenger: Challenger, event: Event, history: SubjectHistory, champion: float | None, bands: Sequence[float]
) -> Shadow:
    pin = challenger.model.pin
    score: float | None
    try:
        score = score_event(challenger.model, event, history).score
    except UNREADABLE:
        score = None
    flips = _band(score, bands) != _band(champion, bands)
    return Shadow(challenger.rollout, f"{pin.name}@{pin.version}", score, flips)


def _band(score: float | None, bands: Sequence[float]) -> int | None:
    return None if score is None else sum(score >= limit for limit in bands)


def report(seen: Sequence[tuple[float | None, Shadow]]) -> Mapping[str, ShadowReport]:
    """Per challenger's version, over (champion's score, shadow)."""
    by_version: dict[str, list[tuple[float | None, Shadow]]] = {}
    for champion, shadow in seen:
        by_version.setdefault(shadow.version, []).append((champion, shadow))
    return {version: _summed(pairs) for version, pairs in by_version.items()}


def _summed(pairs: Sequence[tuple[float | None, Shadow]]) -> ShadowReport:
    shifts = [shadow.score - score for score, shadow in pairs if score is not None and shadow.score is not None]
    return ShadowReport(
        events=len(pairs),
        unscored=sum(shadow.score is None for _, shadow in pairs),
        flips=sum(shadow.flips for _, shadow in pairs),
        mean_shift=math.fsum(shifts) / len(shifts) if shifts else None,
    )
