"""Reasons: which factors raised a score, in words of a catalogue that somebody approved.

A catalogue is an artifact of its own: per code a `text` for whoever reads the decision and an `adverse_action`
sentence for the person whom it concerns. A model names codes; where its document has a text too, the catalogue's
comes first. Promises: what raised the score is told by weight, factors of one code together; a factor for which there
are no words is named in `uncovered`, and the stage then asks a person. Finds no factors: models do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final, Literal

from pydantic import Field

from contracts.outcomes import Reason
from contracts.ports import Artifact
from workers.judgement.content import CACHED_VERSIONS, Content, ContentKey, key_of, read
from workers.judgement.models_inputs import Code, Path, Text

MAX_REASONS: Final = 32
"""Of one score; what weighs less is left out."""

MAX_PRINCIPAL: Final = 4
"""How many reasons a notice of adverse action names; more of them explain less (Regulation B, comment 9(b)(2)-1)."""


class ReasonCode(Content):
    """What one code means. `features`: whose code it is when a model is trained and nobody says otherwise."""

    text: Text
    adverse_action: Annotated[str, Field(min_length=1, max_length=512)]
    features: Annotated[tuple[Path, ...], Field(max_length=64)] = ()


class CatalogueContent(Content):
    """The content of an artifact of kind `reasons`."""

    type: Literal["catalogue"]
    codes: Annotated[dict[Code, ReasonCode], Field(min_length=1, max_length=1_024)]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """A catalogue ready to be asked; `version` is name@version."""

    version: str
    codes: Mapping[str, ReasonCode]

    def code_for(self, path: str) -> str | None:
        """The code of a feature, None when no code claims it. The first by name when several do."""
        return next((code for code, each in sorted(self.codes.items()) if path in each.features), None)


@dataclass(frozen=True, slots=True)
class Factor:
    """Something that moved a score by `weight` score points. `label` says what, for whoever has no code for it."""

    label: str
    code: str | None
    text: str | None
    weight: float


@dataclass(frozen=True, slots=True)
class Worded:
    """Reasons by weight descending, and the labels of factors that raised the score and have no words."""

    reasons: tuple[Reason, ...]
    uncovered: tuple[str, ...] = ()


def load_catalogue(artifact: Artifact) -> Catalogue:
    """The catalogue of an artifact, kept by digest. Raises InvalidModelStateError when it is not one."""
    return _load(key_of(artifact))


@lru_cache(maxsize=CACHED_VERSIONS)
def _load(key: ContentKey) -> Catalogue:
    return Catalogue(key.name, read(CatalogueContent, key).codes)


def worded(factors: Iterable[Factor], catalogue: Catalogue | None) -> Worded:
    """The reasons of what raised a score. A code of several factors is given once, with their weights together.

    A factor of document text alone keeps its own line, as old scorecards do whose bins share a code and differ in text.
    """
    known = {} if catalogue is None else catalogue.codes
    weights: dict[tuple[str, str], float] = {}
    uncovered: list[str] = []
    for factor in factors:
        if factor.weight <= 0:
            continue
        listed = known.get(factor.code or "")
        text = factor.text if listed is None else listed.text
        if factor.code is None or text is None:
            uncovered.append(factor.label)
        else:
            weights[factor.code, text] = weights.get((factor.code, text), 0.0) + factor.weight
    ranked = sorted(weights.items(), key=lambda item: (-round(item[1], 2), item[0]))
    reasons = tuple(
        Reason(
            code=code,
            text=text,
            weight=round(weight, 2),
            adverse_action=known[code].adverse_action if code in known else None,
        )
        for (code, text), weight in ranked[:MAX_REASONS]
        if round(weight, 2) > 0
    )
    return Worded(reasons, tuple(dict.fromkeys(uncovered)))


def missing_words(factors: Iterable[Factor], catalogues: Sequence[Catalogue]) -> tuple[str, ...]:
    """One sentence per factor that may raise a score and for which neither document nor catalogues have words."""
    missing = []
    for factor in factors:
        if factor.code is None:
            missing.append(f"{factor.label} has no reason code")
        elif factor.text is None and not any(factor.code in each.codes for each in catalogues):
            missing.append(f"{factor.label}: no catalogue has the code {factor.code}, and the model no text for it")
    return tuple(dict.fromkeys(missing))


def adverse_action(reasons: Sequence[Reason], catalogue: Catalogue, limit: int = MAX_PRINCIPAL) -> tuple[str, ...]:
    """The sentences for a notice of adverse action: those of the heaviest reasons that the catalogue has, in order."""
    ranked = sorted((each for each in reasons if each.weight > 0), key=lambda each: (-each.weight, each.code))
    said = (catalogue.codes[each.code].adverse_action for each in ranked if each.code in catalogue.codes)
    return tuple(dict.fromkeys(said))[:limit]
