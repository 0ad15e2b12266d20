"""From a model's raw sum to a score of 0–100, by numbers that are stored in the model's document.

`platt`: 100 / (1 + exp(−(a·raw + b))), a > 0 (Platt, "Probabilistic Outputs for Support Vector Machines", 1999).
`isotonic`: straight lines between stored points, level beyond the first and the last (Zadrozny and Elkan, 2002).

Promises: a higher raw sum never gives a lower score, whatever the document says. Learns nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from workers.judgement.content import Content

_Coefficient = Annotated[float, Field(ge=-1e6, le=1e6)]


class Platt(Content):
    """A logistic curve."""

    method: Literal["platt"]
    a: Annotated[float, Field(gt=0, le=1e6)]
    b: _Coefficient

    def score(self, raw: float) -> float:
        """0–100."""
        return 100.0 * logistic(self.a * raw + self.b)


class Isotonic(Content):
    """Straight lines between points: `raw` rises, `score` never falls."""

    method: Literal["isotonic"]
    raw: Annotated[tuple[float, ...], Field(min_length=2, max_length=1_024)]
    points: Annotated[tuple[Annotated[float, Field(ge=0, le=100)], ...], Field(min_length=2, max_length=1_024)]

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if len(self.raw) != len(self.points):
            raise ValueError("raw and points are lists of one length")
        if any(after <= before for before, after in zip(self.raw, self.raw[1:], strict=False)):
            raise ValueError("raw must rise")
        if any(after < before for before, after in zip(self.points, self.points[1:], strict=False)):
            raise ValueError("points must not fall")
        return self

    def score(self, raw: float) -> float:
        """0–100."""
        place = bisect_right(self.raw, raw)
        if place == 0:
            return self.points[0]
        if place == len(self.raw):
            return self.points[-1]
        left, right = self.raw[place - 1], self.raw[place]
        low, high = self.points[place - 1], self.points[place]
        return low + (high - low) * ((raw - left) / (right - left))


Calibration = Annotated[Platt | Isotonic, Field(discriminator="method")]


def logistic(x: float) -> float:
    """1 / (1 + exp(−x)), without overflow."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    small = math.exp(x)
    return small / (1.0 + small)
