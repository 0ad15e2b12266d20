"""Models: scorecards and trees. A scorecard adds points per factor, clipped to 0–100, where more is riskier.

    score = clip(base + scale × Σ points, 0, 100), or by a stored calibration of base + scale × Σ points

A factor reads one feature (or the ratio of two) and finds its points in numeric `bins` (the first
whose `below` is above the value; the last has none) or in named `values`. A feature that is absent
has the factor's `missing` points; one of the wrong type, or a value that the card does not know, has
the factor's *highest* points, so that nonsense never buys a better score. Method: additive scorecards,
Siddiqi, "Credit Risk Scorecards" (2006). `models_trees` has the trees. Nothing here learns; nothing here is code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from contracts.events import Event
from contracts.failures import InvalidModelStateError
from contracts.outcomes import Reason
from contracts.ports import Artifact
from contracts.state import SubjectHistory
from contracts.velocity import Velocity
from workers.judgement.content import CACHED_VERSIONS, Content, ContentKey, key_of, read
from workers.judgement.features import is_feature
from workers.judgement.models_calibration import Calibration
from workers.judgement.models_inputs import Code, Text, is_number, name_of, read_value
from workers.judgement.models_trees import Forest, Trees
from workers.judgement.reasons import Catalogue, load_catalogue, missing_words, worded
from workers.judgement.reasons import Factor as Raised

__all__ = ["Code", "Factor", "Forest", "Scorecard", "Scored", "Text", "coverage", "load_model", "raw_of", "score_event"]


class Points(Content):
    """Points, and the reason that is given when they count against the event."""

    points: float
    code: Code | None = None
    text: Text | None = None


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
    def label(self) -> str:
        """How people read it: the feature, or the ratio."""
        return self.feature if self.per is None else f"{self.feature}/{self.per}"

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
    calibration: Calibration | None = None


Model = Scorecard | Forest


@dataclass(frozen=True, slots=True)
class Scored:
    """A score (0–100, two decimals) and what raised it, by weight (score points) descending.

    `uncovered`: what raised it too, and has no words.
    """

    score: float
    reasons: tuple[Reason, ...]
    uncovered: tuple[str, ...] = ()


def load_model(artifact: Artifact) -> Model:
    """The model of an artifact, kept by digest. Raises InvalidModelStateError when it is not one."""
    return _load(key_of(artifact))


@lru_cache(maxsize=CACHED_VERSIONS)
def _load(key: ContentKey) -> Model:
    if key.content.get("type") == "trees":
        return Forest(read(Trees, key))
    return read(Scorecard, key)


def coverage(artifact: Artifact, catalogues: Sequence[Artifact] = ()) -> tuple[str, ...]:
    """One sentence per factor that may raise a score without words for it; empty when every reason can be told.

    `catalogues`: artifacts of kind `reasons` whose words count too. Raises InvalidModelStateError for one that is none.
    """
    model = load_model(artifact)
    if isinstance(model, Forest):
        used = {split for tree in model.content.trees for split in tree.split}
        factors = [
            Raised(each.label, each.code, each.text, 1.0)
            for index, each in enumerate(model.content.inputs)
            if index in used
        ]
    else:
        factors = [
            Raised(factor.label, points.code, points.text, points.points)
            for factor in model.factors
            for points in (*factor.bins, *factor.values.values(), factor.missing)
            if points.points > 0
        ]
    return missing_words(factors, [load_catalogue(each) for each in catalogues])


def score_event(
    artifact: Artifact,
    event: Event,
    history: SubjectHistory,
    velocity: Velocity | None = None,
    catalogue: Catalogue | None = None,
) -> Scored:
    """Score an event. Raises InvalidModelStateError for no model, UnreadableInputError for nonsense."""
    model = load_model(artifact)
    total, raised = (
        _by_trees(model, event, history, velocity)
        if isinstance(model, Forest)
        else _by_card(model, event, history, velocity)
    )
    if not math.isfinite(total):
        raise InvalidModelStateError("the score is no finite number")
    told = worded(raised, catalogue)
    return Scored(round(min(100.0, max(0.0, total)), 2), told.reasons, told.uncovered)


def raw_of(model: Model, event: Event, history: SubjectHistory, velocity: Velocity | None = None) -> float:
    """What the calibration is applied to. Raises UnreadableInputError as scoring does."""
    if isinstance(model, Forest):
        return model.raw(model.values(event, history, velocity))
    return model.base + model.scale * math.fsum(
        points_for(each, event, history, velocity).points for each in model.factors
    )


def _by_card(
    card: Scorecard, event: Event, history: SubjectHistory, velocity: Velocity | None = None
) -> tuple[float, list[Raised]]:
    given = [(factor, points_for(factor, event, history, velocity)) for factor in card.factors]
    total = card.base + card.scale * math.fsum(points.points for _, points in given)
    share = 1.0
    if card.calibration is not None:
        before, total, raw = card.calibration.score(card.base), card.calibration.score(total), total
        share = _share(raw - card.base, total - before)
    return total, [
        Raised(factor.label, points.code, points.text, share * card.scale * points.points) for factor, points in given
    ]


def _by_trees(
    model: Forest, event: Event, history: SubjectHistory, velocity: Velocity | None = None
) -> tuple[float, list[Raised]]:
    answer = model.answer(model.values(event, history, velocity))
    score = model.score(answer.raw)
    share = _share(answer.raw - answer.expected, score - model.score(answer.expected))
    return score, [
        Raised(each.label, each.code, each.text, share * gained)
        for each, gained in zip(model.content.inputs, answer.contributions, strict=True)
    ]


def _share(raw: float, points: float) -> float:
    """Score points per unit of the raw sum, so that all weights add up to the score's distance from the expected one.

    Where the calibration is level there, weights are in hundredths of a raw unit: they still have an order.
    """
    return points / raw if raw and points else 0.01


def points_for(factor: Factor, event: Event, history: SubjectHistory, velocity: Velocity | None = None) -> Points:
    """The points of one factor for one event."""
    value = read_value(factor.feature, factor.per, event, history, velocity)
    if value is None:
        return factor.missing
    if factor.values:
        name = name_of(value)
        return factor.values.get(name, factor.highest) if isinstance(name, str) else factor.highest
    if not is_number(value):
        return factor.highest
    return next(each for each in factor.bins if each.below is None or float(value) < each.below)
