"""The event as upstream sends it: one frozen pydantic model, used on the wire and inside.

Personal fields (`subject`, `counterparty`, `text`, `attributes`) will be sealed at the door later:
nothing outside `workers/` may look into them.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from datetime import datetime
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from contracts.failures import DomainValidationError, UnsupportedSchemaVersionError
from contracts.tenancy import TenantScope

SCHEMA_VERSIONS = ("1.0",)
MAX_BODY_BYTES = 65_536

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class Kind(StrEnum):
    """The two kinds of event; they differ in policy set and decision rule only."""

    RISK = "risk"
    COMPLIANCE = "compliance"


def _with_offset(value: str) -> str:
    moment: datetime | None = None
    with contextlib.suppress(ValueError):  # reported with the same sentence below
        moment = datetime.fromisoformat(value)
    if moment is None or moment.tzinfo is None or not re.match(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d", value, re.ASCII):
        raise ValueError("must be an RFC 3339 date-time with an offset, such as 2026-01-31T12:00:00Z")
    if not 1900 <= moment.year < 2200:
        raise ValueError("must lie between the years 1900 and 2199")
    return value


def _decimal(value: str) -> str:
    try:
        number = Decimal(value)
    except InvalidOperation:
        raise ValueError('must be a decimal number in a string, such as "12.50"') from None
    if not number.is_finite() or abs(number) >= Decimal(10) ** 15:
        raise ValueError("must be finite and below 10^15")
    return value


Moment = Annotated[
    str,
    StringConstraints(max_length=40),
    AfterValidator(_with_offset),
    Field(json_schema_extra={"format": "date-time"}),
]
DecimalText = Annotated[
    str, StringConstraints(max_length=40, pattern=r"^-?[0-9]{1,15}(\.[0-9]{1,9})?$"), AfterValidator(_decimal)
]
Token = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Scalar = Annotated[str, StringConstraints(max_length=4096)] | bool | int | float | None


class Party(BaseModel):
    """Somebody or something that an event is about."""

    model_config = _STRICT
    type: Token
    id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    name: Annotated[str, StringConstraints(max_length=512)] | None = None


class Amount(BaseModel):
    """Money: a decimal string and an ISO 4217 code."""

    model_config = _STRICT
    value: DecimalText
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]


class RegulatoryFlag(BaseModel):
    """A regulatory concern that the sender already knows of."""

    model_config = _STRICT
    code: Token
    level: Literal["low", "medium", "high"]


class Event(BaseModel):
    """One risk or compliance event. Unknown top-level fields are refused."""

    model_config = _STRICT
    id: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    corrects: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")] | None = None
    kind: Literal["risk", "compliance"]
    type: Annotated[str, StringConstraints(max_length=128, pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$")]
    occurred_at: Moment
    subject: Party
    counterparty: Party | None = None
    amount: Amount | None = None
    attributes: dict[Token, Scalar] = Field(default_factory=dict, max_length=256)
    text: Annotated[str, StringConstraints(max_length=8192)] | None = None
    regulatory_flags: Annotated[list[RegulatoryFlag], Field(max_length=64)] | None = None
    risk_score: Annotated[float, Field(ge=0, le=100)] | None = None
    metadata: dict[Token, Scalar] | None = Field(default=None, max_length=64)
    tenant_id: Annotated[str, StringConstraints(max_length=63)] | None = None
    schema_version: Literal["1.0"] = "1.0"

    @model_validator(mode="after")
    def _compliance_names_its_flags(self) -> Event:
        if self.kind == "compliance" and self.regulatory_flags is None:
            raise ValueError("regulatory_flags is required for compliance events; send [] when there are none")
        return self

    @property
    def occurred(self) -> datetime:
        """`occurred_at` as an aware datetime."""
        return datetime.fromisoformat(self.occurred_at)

    def canonical_bytes(self) -> bytes:
        """The bytes that the body digest is over: sorted keys, absent and null fields left out."""
        return canonical_json(self.model_dump(exclude_none=True, exclude={"tenant_id"}))


def canonical_json(value: Any) -> bytes:
    """Sorted, compact UTF-8 JSON. Equal to RFC 8785 for values without floats and non-ASCII object keys."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def parse_event(document: Any) -> Event:
    """Validate a parsed JSON document.

    Raises DomainValidationError with a JSON pointer per field, or UnsupportedSchemaVersionError.
    """
    if not isinstance(document, dict):
        raise DomainValidationError("an event is a JSON object", pointers=(("", "must be an object"),))
    version = document.get("schema_version", "1.0")
    if isinstance(version, str) and version not in SCHEMA_VERSIONS:
        known = ", ".join(SCHEMA_VERSIONS)
        raise UnsupportedSchemaVersionError(
            f"this release reads schema_version {known}", pointers=(("/schema_version", f"must be one of {known}"),)
        )
    try:
        return Event.model_validate(document)
    except ValidationError as error:
        raise DomainValidationError("the event has invalid fields", pointers=pointers_of(error)) from None


def pointers_of(error: ValidationError) -> tuple[tuple[str, str], ...]:
    """(JSON pointer, reason) per invalid field, 32 at most; never the value that was sent."""
    rows = []
    for item in error.errors(include_url=False, include_context=False, include_input=False)[:32]:
        path = "".join("/" + str(part).replace("~", "~0").replace("/", "~1")[:128] for part in item["loc"])
        rows.append((path, item["msg"]))
    return tuple(rows)


def event_id_of(scope: TenantScope, identity: str) -> str:
    """The 128-bit id, as 32 hex digits, of a tenant's submission with this identity."""
    return hashlib.sha256(f"riskfleet.event\0{scope.tenant_id}\0{identity}".encode("utf-8", "strict")).hexdigest()[:32]


def body_digest_of(canonical: bytes) -> str:
    """SHA-256 (hex) of an event's canonical bytes."""
    return hashlib.sha256(canonical).hexdigest()
