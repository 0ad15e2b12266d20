"""Cursors of pages that people turn: a place in an order, as one opaque word.

A cursor names a place, never a tenant: it opens nothing that its reader could not list anyway.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from contracts.events import canonical_json
from contracts.failures import InvalidMetadataError
from governance.columns import moment


def encode_cursor(place: Sequence[str | int | datetime]) -> str:
    """The word for a place: URL-safe, without padding."""
    plain = [value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value for value in place]
    return base64.urlsafe_b64encode(canonical_json(plain)).rstrip(b"=").decode()


def decode_cursor(cursor: str, kinds: Sequence[type]) -> list[Any]:
    """The place that a word names; `kinds` are str, int (64 bits) or datetime, one for each value.

    Raises InvalidMetadataError for anything that `encode_cursor` does not make.
    """
    try:
        place = orjson.loads(base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4)))
        if not isinstance(place, list):
            raise TypeError
        return [_value(value, kind) for value, kind in zip(place, kinds, strict=True)]
    except (TypeError, ValueError):
        raise InvalidMetadataError("`after` is not a cursor of this list: take `next` of a page as it is") from None


def _value(value: object, kind: type) -> object:
    if kind is datetime and isinstance(value, str):
        return moment(value)
    if type(value) is not kind or (isinstance(value, str) and "\0" in value):
        raise TypeError
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError
    return value
