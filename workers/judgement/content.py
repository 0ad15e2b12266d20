"""Reading registered content: strict validation, and a cache key that is the digest alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from contracts.failures import InvalidModelStateError
from contracts.ports import Artifact

CACHED_VERSIONS = 256
"""How many versions of each kind a process keeps compiled."""


class Content(BaseModel):
    """The content of an artifact: frozen, nothing unknown, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


ContentT = TypeVar("ContentT", bound=Content)


@dataclass(frozen=True, slots=True)
class ContentKey:
    """A key for `lru_cache`: equal digests are equal content."""

    digest: str
    name: str = field(compare=False)
    content: Mapping[str, Any] = field(compare=False)


def key_of(artifact: Artifact) -> ContentKey:
    """The cache key of an artifact."""
    return ContentKey(artifact.pin.digest, f"{artifact.pin.name}@{artifact.pin.version}", artifact.content)


def read(model: type[ContentT], key: ContentKey) -> ContentT:
    """Validate content. Raises InvalidModelStateError that names the first wrong field and no value."""
    try:
        return model.model_validate(dict(key.content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = "/".join(str(part) for part in first["loc"])
        raise InvalidModelStateError(f"{key.name} cannot be read at /{place}: {first['msg']}") from None
