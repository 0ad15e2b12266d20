"""What a model reads of an event: one feature, or the ratio of two, as a number or as one of named categories.

Promises: an absent value is None, and a value that cannot be what the model was made for is refused, never guessed.
Training reads through the same function as scoring does, so that there is one definition of every input.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal, Self, TypeGuard

from pydantic import Field, model_validator

from contracts.events import Event
from contracts.state import SubjectHistory
from contracts.velocity import Velocity
from workers.judgement.content import Content
from workers.judgement.features import Value, feature, is_feature

MAX_CATEGORIES: Final = 1_024
UNKNOWN: Final = -1
"""The category of a name that the model does not know, where the input takes it for missing."""

Code = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Z][A-Z0-9_]*$")]
Text = Annotated[str, Field(min_length=1, max_length=256)]
Path = Annotated[str, Field(max_length=160)]
Category = Annotated[str, Field(max_length=256)]


class UnreadableInputError(ValueError):
    """A value is not what the model was made for."""


class Input(Content):
    """One input of a model; `per` divides the feature by another one.

    `categories` makes it a named value, given by its place in the list; `unknown` says what becomes of another name:
    no score ("refuse"), or the same as an absent value ("missing"). `code` and `text` are the reason that is given
    when the input counts against the event.
    """

    feature: Path
    per: Path | None = None
    categories: Annotated[tuple[Category, ...], Field(min_length=1, max_length=MAX_CATEGORIES)] | None = None
    unknown: Literal["refuse", "missing"] = "refuse"
    code: Code | None = None
    text: Text | None = None

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        for path in (self.feature, self.per):
            if path is not None and not is_feature(path):
                raise ValueError(f"{path!r} is not a feature")
        if self.categories is not None:
            if self.per is not None:
                raise ValueError("a ratio has no categories")
            if len(set(self.categories)) != len(self.categories):
                raise ValueError("names a category twice")
        return self

    @property
    def label(self) -> str:
        """How people read it: the feature, or the ratio."""
        return self.feature if self.per is None else f"{self.feature}/{self.per}"


def read_value(
    path: str, per: str | None, event: Event, history: SubjectHistory, velocity: Velocity | None = None
) -> Value:
    """The feature, or the ratio of two; None when either is absent, text when they cannot be divided.

    Raises InvalidModelStateError for a velocity that is not known as a whole.
    """
    value = feature(path, event, history, velocity)
    return value if per is None else ratio(value, feature(per, event, history, velocity))


def ratio(value: Value, divisor: Value) -> Value:
    """None when either is absent; text, which no bin takes, when they cannot be divided."""
    if value is None or divisor is None:
        return None
    if not is_number(value) or not is_number(divisor) or float(divisor) == 0:
        return "not a ratio"
    return float(value) / float(divisor)


def is_number(value: Value) -> TypeGuard[int | float]:
    """Whether a value is a finite number; a flag is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def name_of(value: Value) -> Value:
    """A flag as the name that categories and named values know it by."""
    return str(value).lower() if isinstance(value, bool) else value
