"""Scorecards: points per factor, summed, scaled and clipped to 0–100, where more is riskier.

    score = clip(base + scale × Σ points, 0, 100)

A factor reads one feature (or the ratio of two) and finds its points in numeric `bins` (the first
whose `below` is above the value; the last has none) or in named `values`. A feature that is absent
has the factor's `missing` points; one of the wrong type, or a value that the card does not know, has
the factor's *highest* points, so that nonsense never buys a better score. Method: additive scorecards,
Siddiqi, "Credit Risk Scorecards" (2006). Nothing here learns; nothing here is code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from contracts.events import Event
from contracts.outcomes import Reason
from contracts.ports import Artifact
from contracts.state import SubjectHistory
from workers.judgement.content import CACHED_VERSIONS, Content, ContentKey, key_of, read
from workers.judgement.features import Value, feature, is_feature

Code = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Z][A-Z0-9_]*$")]
Text = Annotated[str, Field(min_length=1, max_length=256)]


class Points(Content):
    """Points, and the reason that is given when they count against the event."""

    points: float
    code: Code | None = None
    text: Text | None = None

    @model_validator(mode="after")
    def _says_why(self) -> Self:
        if self.points > 0 and (self.code is None or self.text is None):
            raise ValueError("points above 0 need a code and a text")
        return self


class Bin(Points):
    """The points of a value below this limit (of any value when there is none)."""

    below: float | None = None


class Factor(Content):
    """One line of the card; `per` divides the feature by another one."""

    feature: Annotated[str, Field(max_length=160)]
    per: Annotated[str, Field(max_length=160)] | None = None
    bins: Annotated[tuple[Bin, ...], Field(max_length=64)] = ()
    values: Annotated[dict[str, Points], Field(max_length=256)] = Field(default_factory=dict)
    missing: Points

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if not all(is_feature(path) for path in (self.feature, self.per) if path is not None):
            raise ValueError("names something that is not a feature")
        if bool(self.bins) == bool(self.values):
            raise ValueError("has either bins or values")
        limits = [each.below for each in self.bins]
        if self.bins and (limits[-1] is not None or None in limits[:-1]):
            raise ValueError("the last bin, and only the last, has no limit")
        known = [limit for limit in limits if limit is not None]
        if known != sorted(set(known)):
            raise ValueError("the limits of bins must rise")
        if self.per is not None and not self.bins:
            raise ValueError("a ratio needs bins")
        return self

    @property
    def highest(self) -> Points:
        """The most points that this factor can give."""
        return max((*self.bins, *self.values.values(), self.missing), key=lambda each: each.points)


class Scorecard(Content):
    """The content of a model of type `scorecard`."""

    type: Literal["scorecard"]
    base: float
    scale: Annotated[float, Field(gt=0)] = 1.0
    factors: Annotated[tuple[Factor, ...], Field(min_length=1, max_length=128)]


@dataclass(frozen=True, slots=True)
class Scored:
    """A score (0–100, two decimals) and what raised it, by weight (score points) descending."""

    score: float
    reasons: tuple[Reason, ...]


def load_model(artifact: Artifact) -> Scorecard:
    """The model of an artifact, kept by digest. Raises InvalidModelStateError when it is not one."""
    return _load(key_of(artifact))


@lru_cache(maxsize=CACHED_VERSIONS)
def _load(key: ContentKey) -> Scorecard:
    return read(Scorecard, key)


def score_event(artifact: Artifact, event: Event, history: SubjectHistory) -> Scored:
    """Score an event. Raises InvalidModelStateError for content that is no model."""
    card = load_model(artifact)
    given = [points_for(factor, event, history) for factor in card.factors]
    total = card.base + card.scale * math.fsum(points.points for points in given)
    reasons = [
        Reason(code=points.code, text=points.text, weight=round(card.scale * points.points, 2))
        for points in given
        if points.points > 0 and points.code is not None and points.text is not None
    ]
    reasons.sort(key=lambda reason: (-reason.weight, reason.code))
    return Scored(round(min(100.0, max(0.0, total)), 2), tuple(reasons))


def points_for(factor: Factor, event: Event, history: SubjectHistory) -> Points:
    """The points of one factor for one event."""
    value = feature(factor.feature, event, history)
    if factor.per is not None:
        value = _ratio(value, feature(factor.per, event, history))
    if value is None:
        return factor.missing
    if factor.values:
        name = str(value).lower() if isinstance(value, bool) else value
        return factor.values.get(name, factor.highest) if isinstance(name, str) else factor.highest
    if not _is_number(value):
        return factor.highest
    return next(each for each in factor.bins if each.below is None or float(value) < each.below)


def _ratio(value: Value, divisor: Value) -> Value:
    """None when either is absent; text, which no bin takes, when they cannot be divided."""
    if value is None or divisor is None:
        return None
    if not _is_number(value) or not _is_number(divisor) or float(divisor) == 0:
        return "not a ratio"
    return float(value) / float(divisor)


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
