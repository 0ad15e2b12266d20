"""How a model that is only tried did beside the one that decides: counts and shifts over recorded shadows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel, ConfigDict

_OUT = ConfigDict(frozen=True)


@dataclass(frozen=True, slots=True)
class Seen:
    """One recorded shadow with the champion's score beside it (0–100, None when there was none)."""

    rollout: str
    version: str
    champion: float | None
    challenger: float | None
    flips: bool


class Tried(BaseModel):
    """One model of one rollout: events, those it could not score, those in another band than the champion's, and the
    mean and the largest change of the score in points (None when no event has both scores).
    """

    model_config = _OUT
    rollout: str
    version: str
    events: int
    unscored: int
    flips: int
    mean_shift: float | None
    largest_shift: float | None


class TrialReport(BaseModel):
    """What was recorded since a moment, in the newest 50,000 decisions at most; `looked_at`: how many they were."""

    model_config = _OUT
    since: datetime
    looked_at: int
    tried: tuple[Tried, ...]


def summed(seen: Iterable[Seen]) -> tuple[Tried, ...]:
    """Per rollout and version, in their order."""
    groups: dict[tuple[str, str], list[Seen]] = {}
    for one in seen:
        groups.setdefault((one.rollout, one.version), []).append(one)
    return tuple(_tried(*key, groups[key]) for key in sorted(groups))


def _tried(rollout: str, version: str, seen: list[Seen]) -> Tried:
    shifts = [one.challenger - one.champion for one in seen if one.champion is not None and one.challenger is not None]
    return Tried(
        rollout=rollout,
        version=version,
        events=len(seen),
        unscored=sum(one.challenger is None for one in seen),
        flips=sum(one.flips for one in seen),
        mean_shift=round(math.fsum(shifts) / len(shifts), 3) if shifts else None,
        largest_shift=max(shifts, key=abs, default=None),
    )
