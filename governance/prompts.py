"""Prompts: a template with declared variables, and differences between versions of anything registered.

A placeholder is `{{name}}` and nothing else: no expressions, no spaces, no filters. Other braces are text. Promises:
a value is put in once and never read as a template; every value has a type and a length. Knows no language model.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contracts.events import pointers_of
from contracts.failures import InvalidModelStateError, InvalidRequestError
from contracts.ports import Artifact

MAX_TEMPLATE: Final = 32_768
MAX_RENDERED: Final = 131_072
"""Characters of a template, and of what becomes of it."""

_NAME: Final = r"[a-z][a-z0-9_]{0,63}"
_PLACEHOLDER: Final = re.compile(r"\{\{(" + _NAME + r")\}\}")
_STRICT: Final = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_CONTEXT_LINES: Final = 3

Value = str | int | float | bool


class Variable(BaseModel):
    """What may stand in a placeholder. `max_length` counts characters; an absent optional value is empty text."""

    model_config = _STRICT
    type: Literal["string", "integer", "number", "boolean"]
    max_length: Annotated[int, Field(ge=1, le=MAX_TEMPLATE)] = 2_000
    required: bool = True


class Prompt(BaseModel):
    """The content of a prompt. `model` and `parameters` are for whoever sends it; riskfleet does not read them."""

    model_config = _STRICT
    template: Annotated[str, Field(min_length=1, max_length=MAX_TEMPLATE)]
    variables: Annotated[dict[Annotated[str, Field(pattern=f"^{_NAME}$")], Variable], Field(max_length=64)] = Field(
        default_factory=dict
    )
    model: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    parameters: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=64)], str | int | float | bool | None], Field(max_length=64)
    ] = Field(default_factory=dict)


def check_prompt(content: Mapping[str, Any], _: Sequence[Artifact] = (), /) -> Sequence[tuple[str, str]]:
    """(JSON pointer, reason) of everything that keeps this content from being a prompt; empty when it is one."""
    try:
        prompt = Prompt.model_validate(dict(content))
    except ValidationError as error:
        return pointers_of(error)
    return tuple(_findings(prompt))


def _findings(prompt: Prompt) -> Iterator[tuple[str, str]]:
    found = list(_PLACEHOLDER.finditer(prompt.template))
    covered = {place for match in found for place in range(*match.span())}
    stray = next((place for place in _openings(prompt.template) if place not in covered), None)
    if stray is not None:
        yield "/template", f"the braces at character {stray + 1} are no placeholder; write {{{{name}}}}"
    used = {match[1] for match in found}
    for name in sorted(used - prompt.variables.keys()):
        yield "/template", f"{{{{{name}}}}} is used but not declared in variables"
    for name in sorted(prompt.variables.keys() - used):
        yield f"/variables/{name}", "is declared but not used in the template"


def _openings(template: str) -> Iterator[int]:
    place = template.find("{{")
    while place >= 0:
        yield place
        place = template.find("{{", place + 1)


def render(content: Mapping[str, Any], values: Mapping[str, Value]) -> str:
    """The template with its values, each put in as it is.

    Raises InvalidModelStateError for content that is no prompt, and InvalidRequestError with a pointer per value that
    is missing, unknown, of another type or too long, or when the whole becomes longer than MAX_RENDERED characters.
    """
    if check_prompt(content):
        raise InvalidModelStateError("the content is no prompt: submit it to see why")
    prompt = Prompt.model_validate(dict(content))
    wrong = list(_wrong_values(prompt, values))
    if wrong:
        raise InvalidRequestError("the values do not fit the prompt's variables", pointers=tuple(wrong))
    texts = {name: _text(values[name]) if name in values else "" for name in prompt.variables}
    rendered = _PLACEHOLDER.sub(lambda match: texts[match[1]], prompt.template)
    if len(rendered) > MAX_RENDERED:
        raise InvalidRequestError(f"the prompt becomes longer than {MAX_RENDERED:,} characters")
    return rendered


_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


def _wrong_values(prompt: Prompt, values: Mapping[str, Value]) -> Iterator[tuple[str, str]]:
    for name in sorted(values.keys() - prompt.variables.keys()):
        yield f"/{name}", "is not a variable of this prompt"
    for name, variable in prompt.variables.items():
        if name not in values:
            if variable.required:
                yield f"/{name}", "is required"
            continue
        value = values[name]
        is_bool = isinstance(value, bool)  # a bool is an int for Python, and not for anybody else
        finite = not isinstance(value, float) or math.isfinite(value)
        if not isinstance(value, _TYPES[variable.type]) or is_bool != (variable.type == "boolean") or not finite:
            yield f"/{name}", f"must be of type {variable.type}"
        elif len(_text(value)) > variable.max_length:
            yield f"/{name}", f"is longer than {variable.max_length:,} characters"


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def diff(
    before: Mapping[str, Any], after: Mapping[str, Any], names: tuple[str, str] = ("before", "after")
) -> list[str]:
    """A unified diff of two contents, over canonical JSON with one member a line; empty when they are equal.

    A prompt's template is compared line by line, as it is written.
    """
    return list(difflib.unified_diff(_lines(before), _lines(after), *names, n=_CONTEXT_LINES, lineterm=""))


def _lines(content: Mapping[str, Any]) -> list[str]:
    template = content.get("template")
    if not isinstance(template, str):
        return _pretty(content)
    rest = {name: value for name, value in content.items() if name != "template"}
    return ["template:", *(f"| {line}" for line in template.split("\n")), *_pretty(rest)]


def _pretty(value: Mapping[str, Any]) -> list[str]:
    return orjson.dumps(dict(value), option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS).decode().splitlines()
