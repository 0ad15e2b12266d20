"""JSON as a door accepts it: stricter than RFC 8259, so that every later reader sees the same document.

Promises: whatever `parse_json` returns survives canonical JSON and PostgreSQL unchanged (no duplicate
names, no numbers that a double cannot hold, no lone surrogates, no NUL), and refusing costs time linear
in the body. It knows nothing of events.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from contracts.events import MAX_BODY_BYTES
from contracts.failures import MalformedBodyError, OversizedBodyError

MAX_DEPTH = 32
MAX_INTEGER = 2**53
_MAX_DIGITS = len(str(MAX_INTEGER)) + 1  # and a sign

_MEDIA_TYPE = re.compile(r"application/(?:[!#$&^_.+a-z0-9-]+\+)?json", re.IGNORECASE)
_CHARSET = re.compile(r'charset\s*=\s*"?([^";\s]+)', re.IGNORECASE)

# A string that is never closed matches up to the end of the body: otherwise each of its escaped quotes
# would be tried as another start, which is quadratic.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_OPENING = frozenset(b"[{")


def is_json(content_type: str) -> bool:
    """Whether a content type is JSON in UTF-8: `application/json`, or with the suffix `+json`."""
    name, _, parameters = content_type.partition(";")
    charset = _CHARSET.search(parameters)
    return bool(_MEDIA_TYPE.fullmatch(name.strip())) and (charset is None or charset[1].lower() in ("utf-8", "utf8"))


def parse_json(body: bytes, limit: int = MAX_BODY_BYTES) -> Any:
    """The document in `body`, as dict, list, str, int, float, bool or None.

    Raises OversizedBodyError above `limit` bytes and MalformedBodyError for everything else that is refused.
    """
    if len(body) > limit:
        raise OversizedBodyError(f"the body is larger than {limit:,} bytes")
    if body.startswith(b"\xef\xbb\xbf"):
        raise MalformedBodyError("the body starts with a byte order mark; send plain UTF-8")
    if _deeper_than(body, MAX_DEPTH):
        raise MalformedBodyError(f"the body nests deeper than {MAX_DEPTH} levels")
    try:
        text = body.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise MalformedBodyError(f"the body is not UTF-8 (byte {error.start})") from None
    try:
        document = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedBodyError(f"the body is not JSON (line {error.lineno}, column {error.colno})") from None
    if "\\u" in text:  # the only way in for a lone surrogate or a NUL
        _check_strings(document)
    return document


def _deeper_than(body: bytes, limit: int) -> bool:
    """Whether brackets outside strings nest deeper; before parsing, since the parser is recursive."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    depth = 0
    for byte in _STRINGS.sub(b"", body).translate(None, _NOT_BRACKETS):
        depth += 1 if byte in _OPENING else -1
        if depth > limit:
            return True
    return False


def _check_strings(document: Any) -> None:
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.keys()
            stack += value.values()
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, str):
            _check_string(value)


def _check_string(value: str) -> None:
    if "\0" in value:
        raise MalformedBodyError("a string holds U+0000, which cannot be stored")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise MalformedBodyError("a string holds a lone surrogate, which is not a character") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise MalformedBodyError("an object names a member twice")
    return document


def _integer(digits: str) -> int:
    # The length first: converting thousands of digits is quadratic, and Python refuses above 4,300.
    if len(digits) > _MAX_DIGITS or abs(int(digits)) > MAX_INTEGER:
        raise MalformedBodyError("an integer is beyond ±2^53; send it as a string")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise MalformedBodyError("a number is too large for a double; send it as a string")
    return number


def _constant(name: str) -> NoReturn:
    raise MalformedBodyError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)
