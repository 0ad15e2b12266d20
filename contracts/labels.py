"""Labels: late ground truth about an event (chargeback, default, confirmed fraud, cleared), as upstream sends it.

A label may come before its event. The same label twice is one row; of two labels on one event the one with the
later `effective_at` holds. Nothing here stores or publishes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from contracts.events import Amount, Moment, Token, canonical_json, event_id_of, pointers_of
from contracts.failures import DomainValidationError, TenantIsolationError
from contracts.tenancy import TenantScope

LABELS = ("chargeback", "default", "confirmed_fraud", "cleared")


class LabelBody(BaseModel):
    """One label. The event is named by `event_id`, or by the sender's own `event` id: exactly one of the two."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    event_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")] | None = None
    event: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    label: Literal["chargeback", "default", "confirmed_fraud", "cleared"]
    source: Token
    effective_at: Moment
    amount: Amount | None = None
    note: Annotated[str, StringConstraints(max_length=2048)] | None = None
    tenant_id: Annotated[str, StringConstraints(max_length=63)] | None = None

    @model_validator(mode="after")
    def _names_one_event(self) -> LabelBody:
        if (self.event_id is None) == (self.event is None):
            raise ValueError("name the event once: event_id (32 hex digits), or event (the sender's own id)")
        return self


@dataclass(frozen=True, slots=True)
class Label:
    """A label on its way to the table `labels`; `label_id` is a hash, so a repeat is the same label."""

    scope: TenantScope
    label_id: str
    event_id: str
    label: str
    source: str
    effective_at: str
    received_at: str
    body: bytes


def parse_label(scope: TenantScope, document: Any, received_at: str) -> Label:
    """Validate a parsed JSON document; `received_at` is RFC 3339 in UTC.

    Raises DomainValidationError with a JSON pointer per field, TenantIsolationError for another tenant's label.
    """
    if not isinstance(document, dict):
        raise DomainValidationError("a label is a JSON object", pointers=(("", "must be an object"),))
    try:
        body = LabelBody.model_validate(document)
    except ValidationError as error:
        raise DomainValidationError("the label has invalid fields", pointers=pointers_of(error)) from None
    if body.tenant_id is not None and body.tenant_id != scope.tenant_id:
        raise TenantIsolationError(pointers=(("/tenant_id", "must be the caller's own, or left out"),))
    event_id = body.event_id or event_id_of(scope, body.event or "")
    identity = (scope.tenant_id, event_id, body.label, body.source, body.effective_at)
    label_id = hashlib.sha256("\0".join(("riskfleet.label", *identity)).encode()).hexdigest()[:32]
    stored = canonical_json(body.model_dump(exclude_none=True, exclude={"tenant_id"}))
    return Label(scope, label_id, event_id, body.label, body.source, body.effective_at, received_at, stored)
