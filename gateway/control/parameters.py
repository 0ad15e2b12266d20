"""What approvals and looking read of a request: path, query and body, each checked once, with its documentation.

Promises: whatever cannot be used is a problem document that names the field; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from contracts.events import pointers_of
from contracts.failures import InvalidMetadataError, InvalidRequestError, NotKnownError
from gateway.calls import Parameter
from gateway.web import read_json

M = TypeVar("M", bound=BaseModel)

MAX_COMMAND_BYTES: Final = 16_384
_MAX_WORD: Final = 512
_EVENT_ID: Final = re.compile(r"[0-9a-f]{32}")

TENANT: Final = Parameter("tenant", "path", "The tenant.")
EVENT: Final = Parameter("event_id", "path", "The event.", {"type": "string", "pattern": "^[0-9a-f]{32}$"})
AFTER: Final = Parameter("after", "query", "`next` of the page before.")


def limit_parameter(most: int) -> Parameter:
    """How many a page holds at most."""
    return Parameter("limit", "query", "Size of the page.", {"type": "integer", "minimum": 1, "maximum": most})


def choice_parameter(name: str, about: str, choices: Sequence[str]) -> Parameter:
    """One of some words."""
    return Parameter(name, "query", about, {"type": "string", "enum": [str(choice) for choice in choices]})


def event_of(request: Request) -> str:
    """The event id of the path. Raises NotKnownError for what cannot be one."""
    return event_id(str(request.path_params["event_id"]))


def event_id(value: str) -> str:
    """An event id. Raises NotKnownError for what cannot be one."""
    if not _EVENT_ID.fullmatch(value):
        raise NotKnownError("no such event is known to this tenant")
    return value


def one(request: Request, name: str) -> str | None:
    """A query parameter that may be given once. Raises InvalidMetadataError."""
    values = request.query_params.getlist(name)
    if len(values) > 1 or any(not value or len(value) > _MAX_WORD or "\0" in value for value in values):
        raise InvalidMetadataError(f"give ?{name}= once, with 1 to {_MAX_WORD} characters")
    return values[0] if values else None


def number(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A query parameter that is a whole number. Raises InvalidMetadataError outside its bounds."""
    value = one(request, name)
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) <= 19 and least <= int(value) <= most):
        raise InvalidMetadataError(f"?{name}= is a whole number from {least} to {most}")
    return int(value)


def choice(request: Request, name: str, choices: Sequence[str], default: str) -> str:
    """A query parameter that is one of some words. Raises InvalidMetadataError."""
    value = one(request, name) or default
    if value not in choices:
        raise InvalidMetadataError(f"?{name}= is one of {', '.join(choices)}")
    return value


def moment_of(request: Request, name: str) -> datetime | None:
    """A query parameter that is a moment. Raises InvalidMetadataError."""
    value = one(request, name)
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None or not 1900 <= moment.year < 2200:
        raise InvalidMetadataError(f"?{name}= is a date-time with an offset, such as 2026-01-31T12:00:00Z")
    return moment


async def command(request: Request, model: type[M], most: int = MAX_COMMAND_BYTES) -> M:
    """The body of a command, `most` bytes of it. Raises InvalidRequestError with a pointer per field."""
    document = await read_json(request, most)
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise InvalidRequestError("the command has invalid fields", pointers=pointers_of(error)) from None


def words(kind: type[StrEnum]) -> tuple[str, ...]:
    """The words of an enumeration."""
    return tuple(member.value for member in kind)
