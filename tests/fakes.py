"""What tests add to the in-memory twins of the product: their tables at hand, recorders, and builders.

The twins themselves are `governance.memory` and `resilience.memory`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from contracts.codec import Entry, decode_carrier, state_from_bytes
from contracts.events import canonical_json
from contracts.failures import DatabaseError
from contracts.identity import Principal
from contracts.lifecycle import Status
from contracts.limits import TenantLimits
from contracts.outcomes import STATUS_OF, Decision, Outcome, PolicyResult, PolicyVerdict
from contracts.ports import Confirm, DecisionRow, Message, Peek, TenantProfile
from contracts.state import Thresholds
from contracts.telemetry import Measurement
from contracts.tenancy import TenantScope
from contracts.topology import VERSION, Layouts, Stage
from gateway.intake import Intake, IntakePorts
from gateway.refusals import RefusalCounter, RefusalLog, RefusalPolicy
from governance.memory import MemoryDatabase, MemoryDirectory, MemoryLedger, Transaction
from governance.memory.directory import TENANTS, StoredTenant
from governance.memory.ledger import DECISIONS, EVENTS, StoredDecision, StoredEvent
from resilience.memory.state_store import Cell, MemoryRedis, MemoryStateStore
from resilience.memory.time import CountingIds, SteppingClock
from resilience.redis import status_of

__all__ = [
    "CountingIds",
    "DoorParts",
    "InMemoryDirectory",
    "InMemoryLedger",
    "InMemoryStateStore",
    "RecordingPublisher",
    "RecordingTelemetry",
    "SteppingClock",
    "View",
    "event_body",
]

K = TypeVar("K")
V = TypeVar("V")
Key = tuple[TenantScope, str]


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
    """Keeps what was published; `answers` (in order) overrides what is confirmed, `held` queues confirm when set."""

    messages: list[Message] = field(default_factory=list)
    answers: list[Confirm] = field(default_factory=list)
    held: dict[str, asyncio.Event] = field(default_factory=dict)

    async def publish(self, messages: Sequence[Message]) -> Sequence[Confirm]:
        self.messages += messages
        for message in messages:
            if (event := self.held.get(message.routing_key)) is not None:
                await event.wait()
        return [self.answers.pop(0) if self.answers else Confirm.CONFIRMED for _ in messages]

    def to(self, exchange: str) -> list[Message]:
        return [message for message in self.messages if message.exchange == exchange]

    def entries(self, stage: str = Stage.RETRIEVAL) -> list[Entry]:
        """The entries that were published to a stage, whatever carriers they travelled in."""
        carriers = [m for m in self.messages if m.routing_key.startswith(f"risk.{VERSION}.{stage}.")]
        return [entry for m in carriers for entry in decode_carrier(m.body) if isinstance(entry, Entry)]


class View(MutableMapping[K, V]):
    """A table as tests like to write it: a dictionary that reads and writes the twin's rows."""

    def __init__(self, read: Callable[[], dict[K, V]], write: Callable[[K, V | None], None]) -> None:
        self._read, self._write = read, write

    def __getitem__(self, key: K) -> V:
        return self._read()[key]

    def __setitem__(self, key: K, value: V) -> None:
        self._write(key, value)

    def __delitem__(self, key: K) -> None:
        self._write(key, None)

    def __iter__(self) -> Iterator[K]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


class Keys:
    """Lets bearers in: `keys[bearer] = principal`."""

    def __init__(self, directory: MemoryDirectory) -> None:
        self._directory = directory

    def __setitem__(self, bearer: str, principal: Principal) -> None:
        self._directory.admit(bearer, principal)


class InMemoryDirectory(MemoryDirectory):
    """The twin's directory with its tables at hand; `error` is raised instead of an answer."""

    def __init__(self) -> None:
        self.database = MemoryDatabase(SteppingClock())
        super().__init__(self.database)
        self.error: Exception | None = None
        self.keys = Keys(self)

    def add(self, profile: TenantProfile, key: str) -> None:
        self.profiles[profile.scope] = profile
        self.create_api_key(profile.scope, key)

    @property
    def profiles(self) -> View[TenantScope, TenantProfile]:
        def read() -> dict[TenantScope, TenantProfile]:
            rows = [(TenantScope(row.tenant_id), row) for row in self.database.contents(TENANTS)]
            return {s: TenantProfile(s, row.name, row.broker_user, row.thresholds, row.limits) for s, row in rows}

        def write(scope: TenantScope, profile: TenantProfile | None) -> None:
            def work(tx: Transaction) -> None:
                tx.delete(TENANTS, scope.tenant_id)
                if profile is not None:
                    row = StoredTenant(
                        scope.tenant_id,
                        profile.name,
                        profile.broker_user,
                        profile.thresholds,
                        limits=profile.limits,
                    )
                    tx.put(TENANTS, row)

            self.database.apply([scope], work)

        return View(read, write)

    async def principal(self, bearer: str) -> Principal | None:
        if self.error:
            raise self.error
        return await super().principal(bearer)

    async def tenants(self) -> Sequence[TenantProfile]:
        if self.error:
            raise self.error
        return await super().tenants()


@dataclass
class InMemoryLedger(MemoryLedger):
    """The twin's ledger with its tables at hand: `rows` are the highest revisions, `owners` are body digests."""

    down: bool = False

    def __post_init__(self) -> None:
        self.database = MemoryDatabase(SteppingClock(), wire=self._wire)
        super().__init__(self.database)

    async def _wire(self) -> None:
        if self.down:
            raise DatabaseError

    @property
    def rows(self) -> View[Key, DecisionRow]:
        def read() -> dict[Key, DecisionRow]:
            rows = sorted(self.database.contents(DECISIONS), key=lambda row: row.revision)
            return {(TenantScope(row.tenant), row.event_id): row.row for row in rows}

        return View(read, self._write_decision)

    def _write_decision(self, key: Key, decision: DecisionRow | None) -> None:
        scope, event_id = key
        now = self.database.clock.now()

        def work(tx: Transaction) -> None:
            for old in tx.find(DECISIONS, "event", scope.tenant_id, event_id):
                tx.delete(DECISIONS, scope.tenant_id, event_id, old.revision)
            if decision is not None:
                d = decision
                about = (d.revision, d.outcome, "pipeline", d.body_digest, "", d.decision, d.state, now, tx.number)
                tx.put(DECISIONS, StoredDecision(scope.tenant_id, event_id, *about))

        self.database.apply([scope], work)

    @property
    def owners(self) -> View[Key, str]:
        def read() -> dict[Key, str]:
            rows = self.database.contents(EVENTS)
            return {(TenantScope(row.tenant), row.event_id): row.body_digest for row in rows}

        return View(read, self._write_owner)

    def _write_owner(self, key: Key, body_digest: str | None) -> None:
        scope, event_id = key
        now = self.database.clock.now()

        def work(tx: Transaction) -> None:
            tx.delete(EVENTS, scope.tenant_id, event_id)
            if body_digest is not None:
                about = (None, body_digest, "risk", "payment.card", "customer", "c-1", None, None, now, now, "", b"")
                tx.put(EVENTS, StoredEvent(scope.tenant_id, event_id, *about))

        self.database.apply([scope], work)


class InMemoryStateStore(MemoryStateStore):
    """The twin's state store with its states at hand, as the doors see them."""

    def __init__(self) -> None:
        self.clock = SteppingClock()
        super().__init__(MemoryRedis(self.clock), "boot-1")

    @property
    def down(self) -> bool:
        return self.server.down

    @down.setter
    def down(self, down: bool) -> None:
        self.server.down = down

    @property
    def states(self) -> View[Key, Peek]:
        def read() -> dict[Key, Peek]:
            return {
                key: Peek(c.version, status_of(c.version, c.status), c.body_digest, c.stored, c.holder)
                for key, c in self.server.cells.items()
            }

        def write(key: Key, peek: Peek | None) -> None:
            held = self.server.cells.pop(key, None)
            if peek is not None:
                digest = held.digest if held else ""
                cell = Cell(peek.version, digest, peek.body_digest, peek.stored, holder=peek.holder, status=peek.status)
                self.server.put(key, cell)

        return View(read, write)

    def move_on(self, scope: TenantScope, event_id: str, version: int, status: Status, stored: bytes | None) -> None:
        """As if a stage had advanced the event."""
        key = (scope, event_id)
        self.states[key] = replace(self.states[key], version=version, status=status, stored=stored)


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
        self.refusals = RefusalLog(counter, self.publisher, self.telemetry, self.clock, Layouts.first(self.partitions))
        ports = IntakePorts(
            self.store, self.publisher, self.ledger, self.telemetry, self.clock, self.ids, self.directory
        )
        self.intake = Intake(ports, self.refusals, Layouts.first(self.partitions))

    def limit(self, scope: TenantScope, undecided: int | None, rate_per_s: float | None = None, burst: int = 1) -> None:
        """So many events of the tenant may be under way, and so many new ones come at once and per second."""
        limits = TenantLimits(
            undecided_events=undecided, rate_per_s=rate_per_s, burst=None if rate_per_s is None else burst
        )
        self.directory.set_limits(scope, limits)

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
