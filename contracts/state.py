"""The state of an event: an immutable value that grows by one version at each stage.

Version n+1 is made from version n by `transition()`. A version is known by (n, digest), where
digest = SHA-256(parent digest, canonical content of this version): a recomputation that differs in
anything is a visible sibling, never a silent overwrite. A trail entry holds every field of its
audit record, so that any later version can re-emit all earlier records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from contracts.events import Event, canonical_json
from contracts.lifecycle import VERSION_OF, Status, check_transition
from contracts.outcomes import Check, Decision, PolicyVerdict, Reason
from contracts.tenancy import TenantScope
from contracts.velocity import Velocity

STATE_SCHEMA = 1

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Pin(BaseModel):
    """One immutable version of something that decides, fixed in retrieval."""

    model_config = _FROZEN
    name: str
    version: int
    digest: str


class Thresholds(BaseModel):
    """A tenant's limits. Scores are 0–100; a score ≥ `review_from` asks a person, ≥ `reject_from` rejects."""

    model_config = _FROZEN
    version: int = 1
    review_from: float = Field(default=40.0, ge=0, le=100)
    reject_from: float = Field(default=75.0, ge=0, le=100)
    hard_limit: float = Field(default=90.0, ge=0, le=100)
    amount_limit: str | None = None
    auto_reject: bool = True

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical values."""
        return hashlib.sha256(canonical_json(self.model_dump())).hexdigest()


class Pins(BaseModel):
    """Everything that the decision stands on, by version; `now` is the event's clock from here on."""

    model_config = _FROZEN
    now: str
    model: Pin | None
    policy: Pin | None
    guardrail: Pin | None
    prompt: Pin | None = None
    lists: Pin | None = None
    reasons: Pin | None = None
    trial: Pin | None = Field(default=None, exclude_if=lambda pin: pin is None)
    thresholds: Thresholds
    halted: bool = False


class SubjectHistory(BaseModel):
    """What PostgreSQL knew of the subject when the event was observed, the event itself not counted."""

    model_config = _FROZEN
    events_1d: int = 0
    events_30d: int = 0
    amount_30d: str = "0"
    first_seen_at: str | None = None


class Created(BaseModel):
    """What retrieval adds: pins and facts."""

    model_config = _FROZEN
    at: str
    pins: Pins
    history: SubjectHistory
    velocity: Velocity | None = None
    unavailable: tuple[str, ...] = ()


class Shadow(BaseModel):
    """What a model that is only tried said of an event; no outcome is made of it.

    `score` is None where it could give none; `flips`: it lies in another band of the tenant's than the score.
    """

    model_config = _FROZEN
    rollout: str
    version: str
    score: float | None
    flips: bool


class Validated(BaseModel):
    """What scoring adds: the policy verdict, the score (0–100, None when unavailable) and its reasons."""

    model_config = _FROZEN
    at: str
    policy: PolicyVerdict
    score: float | None
    reasons: tuple[Reason, ...]
    unavailable: tuple[str, ...] = ()
    shadow: Shadow | None = Field(default=None, exclude_if=lambda shadow: shadow is None)


class Processed(BaseModel):
    """What guardrail adds: its checks."""

    model_config = _FROZEN
    at: str
    checks: tuple[Check, ...]
    unavailable: tuple[str, ...] = ()


class Decided(BaseModel):
    """What decision adds: the proposed decision."""

    model_config = _FROZEN
    at: str
    decision: Decision


class TrailEntry(BaseModel):
    """One step of an event's trail and the whole content of its audit record. No floats."""

    model_config = _FROZEN
    n: int
    step: Literal["version", "approval"]
    status: Status
    stage: str
    digest: str
    parent: str | None
    at: str
    detail: dict[str, str | int] = Field(default_factory=dict)


_TRAIL = TypeAdapter(tuple[TrailEntry, ...])

Section = Created | Validated | Processed | Decided

SECTIONS: dict[str, type[Section]] = {
    "created": Created,
    "validated": Validated,
    "processed": Processed,
    "decided": Decided,
}
"""What the stages add, by the name of its field and in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventState:
    """One version of one event. Use `RiskState` or `ComplianceState`; `begin()` makes version 0."""

    KIND: ClassVar[str] = ""
    scope: TenantScope
    event_id: str
    event: Event
    body_digest: str
    received_at: str
    source: str
    correlation_id: str
    traceparent: str | None
    n: int
    status: Status
    digest: str
    steps: tuple[Mapping[str, Any], ...]
    """The trail as plain JSON, each step a `TrailEntry`: every stage hands it on, and hardly any looks into it."""
    created: Created | None = None
    validated: Validated | None = None
    processed: Processed | None = None
    decided: Decided | None = None
    plain: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The parts as plain JSON, once known, and `bytes`: what was read is written as it was, nothing twice. Only
    `transition` and the codec fill it; `replace` makes a state that knows nothing of it."""

    @property
    def trail(self) -> tuple[TrailEntry, ...]:
        """The steps as values. Raises pydantic's ValidationError when one is no trail entry."""
        return _TRAIL.validate_python(self.steps)

    @property
    def parent(self) -> str | None:
        """The digest of the version before this one."""
        parent: str | None = self.steps[min(self.n, len(self.steps) - 1)]["parent"]
        return parent

    def transition(self, target: Status, section: Section, *, stage: str, detail: Mapping[str, str | int]) -> Self:
        """Version n+1: the move checked against the lifecycle table, the section added, the digest chained.

        Raises InvalidStatusTransitionError for a move that the table does not hold.
        """
        check_transition(self.status, target)
        name = type(section).__name__.lower()
        added = section.model_dump(mode="json")
        content = {"n": self.n + 1, "status": target, name: added}
        digest = _chain(self.digest, content)
        step = _step(self.n + 1, target, stage, digest, self.digest, section.at, detail)
        steps = (*self.steps, step)
        if target is Status.AWAITING_APPROVAL:
            opened = {"step": "approval", "parent": digest, "digest": _chain(digest, {"approval": "opened"})}
            steps = (*steps, step | opened)
        changes: dict[str, Any] = {name: section}
        new = replace(self, n=VERSION_OF[target], status=target, digest=digest, steps=steps, **changes)
        known = {part: self._plain(part) for part in ("event", *SECTIONS) if getattr(self, part) is not None}
        new.plain.update(known | {name: added})
        return new

    def rewound(self, n: int) -> Self:
        """Version n (from 0 to this one's) as it was: later sections and steps left out.

        Raises ValueError when this state is not one that came through version n.
        """
        steps = [step for step in self.steps if step["n"] <= n]
        if not 0 <= n <= self.n or not steps or steps[-1]["n"] != n:
            raise ValueError(f"version {self.n} did not come through version {n}")
        at = next(step for step in steps if step["n"] == n)
        later: dict[str, Any] = {name: None for place, name in enumerate(SECTIONS, 1) if place > n}
        return replace(self, n=n, status=Status(at["status"]), digest=at["digest"], steps=tuple(steps), **later)

    def _plain(self, part: str) -> Any:
        """The event or a section as plain JSON."""
        if part not in self.plain:
            value = getattr(self, part)
            known = value.model_dump(exclude_none=True) if part == "event" else value.model_dump(mode="json")
            self.plain[part] = known
        return self.plain[part]

    def to_bytes(self) -> bytes:
        """The stored bytes of this version (canonical JSON); `state_from_bytes` reads them."""
        if "bytes" not in self.plain:
            self.plain["bytes"] = self._bytes()
        stored: bytes = self.plain["bytes"]
        return stored

    def _bytes(self) -> bytes:
        return canonical_json(
            {
                "schema": STATE_SCHEMA,
                "kind": self.KIND,
                "tenant": self.scope.tenant_id,
                "event_id": self.event_id,
                "event": self._plain("event"),
                "body_digest": self.body_digest,
                "received_at": self.received_at,
                "source": self.source,
                "correlation_id": self.correlation_id,
                "traceparent": self.traceparent,
                "n": self.n,
                "status": self.status,
                "digest": self.digest,
                "trail": self.steps,
            }
            | {name: self._plain(name) for name in SECTIONS if getattr(self, name) is not None}
        )

    def records(self, first: int = 0, last: int | None = None) -> tuple[AuditRecord, ...]:
        """The audit records of versions `first` … `last` (this version when None) of the trail."""
        upto = self.n if last is None else last
        return tuple([self._record(step) for step in self.steps if first <= step["n"] <= upto])

    def _record(self, step: Mapping[str, Any]) -> AuditRecord:
        n, digest = step["n"], step["digest"]
        record_id = hashlib.sha256(f"{self.event_id}|{n}|{step['step']}|{digest}".encode()).hexdigest()[:32]
        body = canonical_json(
            {
                "v": 1,
                "record_id": record_id,
                "tenant": self.scope.tenant_id,
                "event_id": self.event_id,
                "kind": self.KIND,
                "body_digest": self.body_digest,
                "correlation_id": self.correlation_id,
                "entry": step,
            }
        )
        return AuditRecord(self.scope, record_id, self.event_id, n, digest, body)


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskState(EventState):
    """The state of a risk event."""

    KIND: ClassVar[str] = "risk"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComplianceState(EventState):
    """The state of a compliance event."""

    KIND: ClassVar[str] = "compliance"


STATE_TYPES: dict[str, type[EventState]] = {"risk": RiskState, "compliance": ComplianceState}


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One record on its way to the audit: `body` is canonical JSON without floats, `record_id` names its bytes.

    `event_id`, `n` and `digest` are empty for records that belong to no event (refusals).
    """

    scope: TenantScope | None
    record_id: str
    event_id: str
    n: int
    digest: str
    body: bytes


def begin(
    scope: TenantScope,
    event_id: str,
    event: Event,
    *,
    received_at: str,
    source: str,
    correlation_id: str,
    traceparent: str | None = None,
) -> EventState:
    """Version 0 (`received`) of an accepted event; `received_at` is RFC 3339 in UTC."""
    body_digest = hashlib.sha256(event.canonical_bytes()).hexdigest()
    content = {
        "n": 0,
        "tenant": scope.tenant_id,
        "event_id": event_id,
        "body_digest": body_digest,
        "received_at": received_at,
        "source": source,
    }
    digest = _chain("", content)
    detail = {"source": source, "type": event.type}
    return STATE_TYPES[event.kind](
        scope=scope,
        event_id=event_id,
        event=event,
        body_digest=body_digest,
        received_at=received_at,
        source=source,
        correlation_id=correlation_id,
        traceparent=traceparent,
        n=0,
        status=Status.RECEIVED,
        digest=digest,
        steps=(_step(0, Status.RECEIVED, "gateway", digest, None, received_at, detail),),
    )


def _step(
    n: int, status: Status, stage: str, digest: str, parent: str | None, at: str, detail: Mapping[str, str | int]
) -> dict[str, Any]:
    """A `TrailEntry` as plain JSON."""
    return {
        "n": n,
        "step": "version",
        "status": status.value,
        "stage": str(stage),
        "digest": digest,
        "parent": parent,
        "at": at,
        "detail": dict(detail),
    }


def _chain(parent: str, content: Mapping[str, Any]) -> str:
    return hashlib.sha256(parent.encode() + b"\n" + canonical_json(content)).hexdigest()
