"""CloudEvents 1.0 as another way to send an event: the envelope is read here, the event is its `data`.

Promises: pure; whatever is taken from an envelope is as strictly parsed as a plain body, also inside `data_base64`.
What `data` leaves out of `type` and `occurred_at` is filled in from the envelope; `source` and `id` together are an
identity, since CloudEvents says that they are unique. Every other attribute is ignored. Encodes nothing.

Sources: CloudEvents 1.0.2, its JSON format, its HTTP binding (header values, 3.1.3.2) and its AMQP binding; on
AMQP 0.9.1, which has headers where 1.0 has application properties, the prefix `ce-` is usual too.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import unquote

from contracts.failures import DomainValidationError, InvalidMetadataError, MalformedBodyError
from gateway.parsing import is_json, parse_json

STRUCTURED: Final = "application/cloudevents+json"
BATCH: Final = "application/cloudevents-batch+json"

_REQUIRED: Final = ("specversion", "id", "source", "type")
_READ: Final = frozenset((*_REQUIRED, "time", "datacontenttype", "traceparent", "correlationid"))
_AMQP_PREFIXES: Final = ("ce-", "cloudevents:", "cloudevents_")
_UNFIT: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*+)"')
_ESCAPED: Final = re.compile(r"\\(.)")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Envelope:
    """One event as it was sent: `event` is the parsed document, not yet validated.

    `identity` is used when the event has no id; a CloudEvent's source and id come before any header. `inside` and
    `filled` say where the sender finds what a JSON pointer into `event` names.
    """

    event: Any
    identity: str | None = None
    traceparent: str | None = None
    correlation_id: str | None = None
    inside: str = ""
    filled: Mapping[str, str] = field(default_factory=dict)

    def placed(self, pointers: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        """(pointer, reason) pairs about `event`, as pointers into what was sent."""
        return tuple((self.filled.get(pointer, self.inside + pointer), reason) for pointer, reason in pointers)


def from_structured(document: Any) -> Envelope:
    """The envelope of structured mode, or of one element of batch mode, from its parsed JSON.

    Raises DomainValidationError with a pointer per attribute, MalformedBodyError for what `data_base64` holds.
    """
    if not isinstance(document, dict):
        raise DomainValidationError("a CloudEvent is a JSON object", pointers=(("", "must be an object"),))
    _check(document)
    plain, encoded = document.get("data"), document.get("data_base64")
    if plain is not None and encoded is not None:
        raise DomainValidationError(
            "the CloudEvent has its data twice", pointers=(("/data_base64", "must be left out when data is sent"),)
        )
    if encoded is None:
        return _envelope(document, _data(plain, "/data"), "/data")
    return _envelope(document, _data(parse_json(_decoded(encoded)), "/data_base64"), "")


def from_headers(attributes: Mapping[str, str], body: bytes) -> Envelope:
    """The envelope of binary mode: attributes without prefix, the event as the body.

    Raises DomainValidationError with a pointer per attribute, and what `parse_json` raises.
    """
    _check(attributes)
    return _envelope(attributes, _data(parse_json(body), ""), "")


def http_attributes(headers: Mapping[str, str]) -> dict[str, str] | None:
    """The attributes that are sent as `ce-` headers, unquoted and percent-decoded; None: no binary CloudEvent.

    Raises InvalidMetadataError for an attribute that is sent twice or whose value is no percent-encoded UTF-8.
    """
    found: dict[str, str] = {}
    for name, value in headers.items():
        if name.lower().startswith("ce-"):
            _add(found, name[3:].lower(), value, _header_value)
    return _if_binary(found)


def amqp_attributes(headers: Mapping[str, Any]) -> dict[str, str] | None:
    """The attributes among AMQP headers, prefixed `ce-`, `cloudEvents:` or `cloudEvents_`; None: no binary CloudEvent.

    Native types become their canonical strings (a `time` in whole numbers is milliseconds since 1970, as AMQP 1.0
    sends it); a value that has none is left out. Raises InvalidMetadataError for two values of one attribute.
    """
    found: dict[str, str] = {}
    for name, value in headers.items():
        prefix = next((prefix for prefix in _AMQP_PREFIXES if name.lower().startswith(prefix)), None)
        attribute = name[len(prefix) :].lower() if prefix else ""
        text = _property_value(attribute, value)
        if attribute and text is not None:
            _add(found, attribute, text, str)
    return _if_binary(found)


def _add(found: dict[str, str], attribute: str, value: str, read: Callable[[str], str]) -> None:
    if attribute not in _READ:
        return
    text = read(value)
    if found.setdefault(attribute, text) != text:
        raise InvalidMetadataError(f"the CloudEvents attribute {attribute} is sent with two values")


def _if_binary(found: dict[str, str]) -> dict[str, str] | None:
    # One required attribute is enough: a CloudEvent that lacks the others is refused, not taken for something else.
    return found if any(name in found for name in _REQUIRED) else None


def _header_value(value: str) -> str:
    if not value.isascii():
        raise InvalidMetadataError("a CloudEvents header holds more than ASCII; percent-encode its UTF-8")
    quoted = _QUOTED.fullmatch(value)
    try:
        return unquote(_ESCAPED.sub(r"\1", quoted[1]) if quoted else value, errors="strict")
    except UnicodeDecodeError:
        raise InvalidMetadataError("a CloudEvents header is not percent-encoded UTF-8") from None


def _property_value(attribute: str, value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return _timestamp(value if value.tzinfo else value.replace(tzinfo=UTC))
    if isinstance(value, int):
        try:
            return _timestamp(_EPOCH + timedelta(milliseconds=value)) if attribute == "time" else str(value)
        except OverflowError:
            return str(value)  # no moment that anybody can mean; refused as one
    return None


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _check(attributes: Mapping[str, Any]) -> None:
    """Raise DomainValidationError unless these are the attributes of a CloudEvent 1.0 whose data is JSON."""
    wrong = [
        (f"/{name}", "must be a string without control characters, and not empty")
        for name in _REQUIRED
        if not _is_text(attributes.get(name))
    ]
    wrong += [
        (f"/{name}", "must be a string without control characters, or left out")
        for name in ("time", "datacontenttype")
        if attributes.get(name) is not None and not _is_text(attributes[name])
    ]
    if not wrong and attributes["specversion"] != "1.0":
        wrong.append(("/specversion", 'must be "1.0"'))
    if not wrong and "|" in attributes["source"]:
        wrong.append(("/source", "must be a URI reference, in which | is percent-encoded"))
    if not wrong and not is_json(attributes.get("datacontenttype") or "application/json"):
        wrong.append(("/datacontenttype", "must be application/json, or left out"))
    if wrong:
        raise DomainValidationError("the CloudEvent has invalid attributes", pointers=tuple(wrong))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not _UNFIT.search(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _data(document: Any, pointer: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise DomainValidationError("a CloudEvent's data is the event", pointers=((pointer, "must be a JSON object"),))
    return document


def _decoded(encoded: Any) -> bytes:
    if not isinstance(encoded, str):
        raise DomainValidationError("data_base64 is not text", pointers=(("/data_base64", "must be a string"),))
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedBodyError("data_base64 is not Base64") from None


def _envelope(attributes: Mapping[str, Any], data: dict[str, Any], inside: str) -> Envelope:
    missing = {
        name: attributes[attribute]
        for name, attribute in (("type", "type"), ("occurred_at", "time"))
        if name not in data and attributes.get(attribute) is not None
    }
    return Envelope(
        event=data | missing,
        identity=f"{attributes['source']}|{attributes['id']}",
        traceparent=_text(attributes.get("traceparent")),
        correlation_id=_text(attributes.get("correlationid")),
        inside=inside,
        filled={f"/{name}": "/time" if name == "occurred_at" else f"/{name}" for name in missing},
    )
