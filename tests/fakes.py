"""Small real implementations of the ports, in memory, for tests: each can be told to fail as its server would."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from contracts.codec import Entry, state_from_bytes
from contracts.events import canonical_json
from contracts.failures import DatabaseError, StateStoreError
from contracts.identity import Grant, Principal, Role
from contracts.lifecycle import Status
from contracts.outcomes import STATUS_OF, Decision, Outcome, PolicyResult, PolicyVerdict
from contracts.ports import (
    Advance,
    Claim,
    ClaimRequest,
    Confirm,
    DecisionRow,
    EventRow,
    Held,
    Message,
    Peek,
    Reservation,
    Reserved,
    TenantProfile,
)
from contracts.state import EventState, SubjectHistory, Thresholds
from contracts.telemetry import Measurement
from contracts.tenancy import TenantScope
from gateway.intake import Intake, IntakePorts
from gateway.refusals import RefusalCounter, RefusalLog, RefusalPolicy

Key = tuple[TenantScope, str]


@dataclass
class SteppingClock:
    """A clock that moves only when told to."""

    moment: datetime = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
    elapsed: float = 0.0

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return self.elapsed

    def step(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)
        self.elapsed += seconds


class CountingIds:
    """Ids that count: never random, always well-formed."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def token(self) -> str:
        return f"{next(self._numbers):032x}"

    def uuid7(self) -> str:
        return f"01900000-0000-7000-8000-{next(self._numbers):012x}"


@dataclass
class RecordingTelemetry:
    """Keeps every measurement."""

    measurements: list[Measurement] = field(default_factory=list)

    def record(self, *measurements: Measurement) -> None:
        self.measurements += measurements

    def count(self, name: str, **labels: str) -> float:
        return sum(
            m.value for m in self.measurements if m.metric.name == name and labels.items() <= dict(m.labels).items()
        )


@dataclass
class RecordingPublisher:
    """Keeps what was published; `answers` (in order) overrides what is confirmed."""

    messages: list[Message] = field(default_factory=list)
    answers: list[Confirm] = field(default_factory=list)

    async def publish(self, messages: Sequence[Message]) -> Sequence[Confirm]:
        self.messages += messages
        return [self.answers.pop(0) if self.answers else Confirm.CONFIRMED for _ in messages]

    def to(self, exchange: str) -> list[Message]:
        return [message for message in self.messages if message.exchange == exchange]


@dataclass
class InMemoryDirectory:
    """Tenants and their keys; `error` is raised instead of an answer."""

    profiles: dict[TenantScope, TenantProfile] = field(default_factory=dict)
    keys: dict[str, Principal] = field(default_factory=dict)
    error: Exception | None = None

    def add(self, profile: TenantProfile, key: str) -> None:
        self.profiles[profile.scope] = profile
        self.keys[key] = Principal(
            f"key:{key[:8]}", "", frozenset({Grant(profile.scope.tenant_id, Role.SERVICE)}), profile.scope
        )

    async def principal(self, api_key: str) -> Principal | None:
        if self.error:
            raise self.error
        return self.keys.get(api_key)

    async def tenants(self) -> Sequence[TenantProfile]:
        if self.error:
            raise self.error
        return tuple(self.profiles.values())


@dataclass
class InMemoryLedger:
    """Owners of identities and their decisions; the first body and the first decision win."""

    rows: dict[Key, DecisionRow] = field(default_factory=dict)
    owners: dict[Key, str] = field(default_factory=dict)
    down: bool = False

    def _check(self) -> None:
        if self.down:
            raise DatabaseError

    async def record_events(self, states: Sequence[EventState]) -> Sequence[EventRow]:
        self._check()
        answers = []
        for state in states:
            key = (state.scope, state.event_id)
            owner = self.owners.setdefault(key, state.body_digest)
            answers.append(EventRow(owner, self.rows.get(key)))
        return answers

    async def decisions(self, keys: Sequence[Key]) -> Sequence[DecisionRow | None]:
        self._check()
        return [self.rows.get(key) for key in keys]

    async def decide(self, states: Sequence[EventState]) -> Sequence[DecisionRow]:
        self._check()
        answers = []
        for state in states:
            assert state.decided is not None
            decision = state.decided.decision
            row = DecisionRow(
                state.body_digest, 1, decision.outcome, decision.model_dump_json().encode(), state.to_bytes()
            )
            answers.append(self.rows.setdefault((state.scope, state.event_id), row))
        return answers

    async def known(self, keys: Sequence[Key]) -> Sequence[bool]:
        self._check()
        return [key in self.owners for key in keys]

    async def histories(self, states: Sequence[EventState]) -> Sequence[SubjectHistory]:
        self._check()
        return [SubjectHistory() for _ in states]


@dataclass
class InMemoryStateStore:
    """The door's side of the state store: reservations and peeks. Claims belong to the runner's own fake."""

    states: dict[Key, Peek] = field(default_factory=dict)
    down: bool = False

    def _check(self) -> None:
        if self.down:
            raise StateStoreError

    async def reserve(self, entries: Sequence[Entry]) -> Sequence[Reservation]:
        self._check()
        return [self._reserve(entry) for entry in entries]

    def _reserve(self, entry: Entry) -> Reservation:
        key = (entry.header.scope, entry.header.event)
        held = self.states.get(key)
        if held is None:
            self.states[key] = Peek(0, Status.RECEIVED, entry.header.body_digest, entry.body)
            return Reservation(Reserved.NEW, 0, entry.body)
        if held.body_digest != entry.header.body_digest:
            return Reservation(Reserved.CONFLICT, held.version, None)
        return Reservation(Reserved.REPEAT, held.version, held.stored if held.version == 0 else None)

    def move_on(self, scope: TenantScope, event_id: str, version: int, status: Status, stored: bytes | None) -> None:
        """As if a stage had advanced the event."""
        key = (scope, event_id)
        self.states[key] = replace(self.states[key], version=version, status=status, stored=stored)

    async def peek(self, keys: Sequence[Key]) -> Sequence[Peek | None]:
        self._check()
        return [self.states.get(key) for key in keys]

    async def claim(self, requests: Sequence[ClaimRequest], token: str) -> Sequence[Claim]:
        raise NotImplementedError

    async def advance(self, moves: Sequence[Advance]) -> Sequence[bool]:
        raise NotImplementedError

    async def release(self, held: Sequence[Held]) -> None:
        raise NotImplementedError

    async def beat(self) -> None:
        self._check()

    async def alive(self, boots: Sequence[str]) -> Sequence[bool]:
        self._check()
        return [False for _ in boots]

    async def begin_alone(self, scope: TenantScope, event_id: str, stage: str) -> int:
        raise NotImplementedError

    async def end_alone(self, scope: TenantScope, event_id: str, stage: str) -> None:
        raise NotImplementedError


@dataclass
class DoorParts:
    """An intake on fakes, with its parts at hand. Partition count 4, tenants acme and globex."""

    clock: SteppingClock = field(default_factory=SteppingClock)
    ids: CountingIds = field(default_factory=CountingIds)
    telemetry: RecordingTelemetry = field(default_factory=RecordingTelemetry)
    publisher: RecordingPublisher = field(default_factory=RecordingPublisher)
    store: InMemoryStateStore = field(default_factory=InMemoryStateStore)
    ledger: InMemoryLedger = field(default_factory=InMemoryLedger)
    directory: InMemoryDirectory = field(default_factory=InMemoryDirectory)
    partitions: int = 4

    def __post_init__(self) -> None:
        for name in ("acme", "globex"):
            profile = TenantProfile(TenantScope(name), name.title(), f"up-{name}", Thresholds())
            self.directory.add(profile, f"rf_{name}_key")
        counter = RefusalCounter(RefusalPolicy(boot="b" * 32))
        self.refusals = RefusalLog(counter, self.publisher, self.telemetry, self.clock, self.partitions)
        ports = IntakePorts(self.store, self.publisher, self.ledger, self.telemetry, self.clock, self.ids)
        self.intake = Intake(ports, self.refusals, self.partitions)

    def decided(self, event_id: str, scope: TenantScope, outcome: Outcome = Outcome.APPROVED) -> DecisionRow:
        """Decide an admitted event, as the pipeline would."""
        stored = self.store.states[scope, event_id].stored
        assert stored is not None
        state = state_from_bytes(stored)
        decision = Decision(
            event_id=event_id,
            tenant_id=scope.tenant_id,
            kind="risk",
            outcome=outcome,
            score=12.5,
            reasons=(),
            policy=PolicyVerdict(result=PolicyResult.PASS),
            guardrails=(),
            versions={},
            decided_at="2026-01-31T12:00:01Z",
        )
        row = DecisionRow(state.body_digest, 1, outcome, canonical_json(decision.model_dump(mode="json")), stored)
        self.ledger.rows[scope, event_id] = row
        self.store.move_on(scope, event_id, 4, STATUS_OF[outcome], None)
        return row


def event_body(**changes: object) -> bytes:
    """A valid risk event; a change to None leaves the field out."""
    document: dict[str, object] = {
        "id": "order-1",
        "kind": "risk",
        "type": "payment.card",
        "occurred_at": "2026-01-31T11:59:59Z",
        "subject": {"type": "customer", "id": "c-1"},
        "amount": {"value": "12.50", "currency": "EUR"},
    } | changes
    return canonical_json({name: value for name, value in document.items() if value is not None})
