"""Champions and challengers: who is scored by a second model too, and what is written down of it.

A trial is a version of kind `trial`: registered, approved, activated and pinned like everything else. A challenger's
score is a shadow: it is recorded beside the champion's and no outcome is made of it, since nothing here returns a score
that a decision could take. Promises: who belongs to a percentage depends on the rollout's name and the subject alone,
so that a subject keeps its side, and a larger percentage keeps everybody of a smaller one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final, Literal

from pydantic import Field

from contracts.events import Event
from contracts.ports import Artifact
from contracts.state import Pin, Shadow, SubjectHistory
from contracts.velocity import Velocity
from workers.judgement import UNREADABLE
from workers.judgement.content import CACHED_VERSIONS, Content, ContentKey, key_of, read
from workers.judgement.models import score_event

STEPS: Final = 10_000
"""A percentage is exact to a hundredth."""


class Trial(Content):
    """The content of a trial of type `challenger`: the model that is tried, on how many of a rollout's subjects.

    `rollout` names who takes part: the same name and a larger percentage keep everybody of the smaller one.
    """

    type: Literal["challenger"]
    rollout: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    percent: Annotated[float, Field(ge=0, le=100)]
    model: Pin


@dataclass(frozen=True, slots=True)
class Challenger:
    """A trial with its model, None when that cannot be had."""

    trial: Trial
    model: Artifact | None


def load_trial(artifact: Artifact) -> Trial:
    """The trial of an artifact, read once per digest. Raises InvalidModelStateError when it is not one."""
    return _load(key_of(artifact))


@lru_cache(maxsize=CACHED_VERSIONS)
def _load(key: ContentKey) -> Trial:
    return read(Trial, key)


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


def shadow_of(
    challenger: Challenger,
    tenant: str,
    event: Event,
    history: SubjectHistory,
    velocity: Velocity | None,
    *,
    champion: float | None,
    bands: Sequence[float],
) -> Shadow | None:
    """The shadow score of an event, None for a subject that does not take part. `bands`: rising limits.

    Never raises for what the challenger cannot read: its score is None then.
    """
    trial = challenger.trial
    if not is_in(trial.percent, trial.rollout, tenant, f"{event.subject.type}\0{event.subject.id}"):
        return None
    score: float | None = None
    if challenger.model is not None:
        try:
            score = score_event(challenger.model, event, history, velocity).score
        except UNREADABLE:  # a velocity that is lost, too
            score = None
    version = f"{trial.model.name}@{trial.model.version}"
    flips = _band(score, bands) != _band(champion, bands)
    return Shadow(rollout=trial.rollout, version=version, score=score, flips=flips)


def _band(score: float | None, bands: Sequence[float]) -> int | None:
    return None if score is None else sum(score >= limit for limit in bands)
