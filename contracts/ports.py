"""The Protocols through which the rooms meet. Every port takes and returns sequences, in order.

Adapters: `resilience.rabbit` (Publisher), `resilience.redis` (StateStore), `governance.postgres`
(Ledger, Registry, AuditLog, DeadLetters, Credentials, Tenants). A port raises an
InfrastructureError when its server does not answer; nothing else of a server leaks through.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from contracts.codec import CARRIER_HEADER, MAX_ENTRIES, Entry
from contracts.events import Event
from contracts.identity import Principal
from contracts.labels import Label
from contracts.limits import NO_LIMITS, TenantLimits
from contracts.outcomes import Decision
from contracts.state import AuditRecord, EventState, Pin, SubjectHistory, Thresholds
from contracts.telemetry import Measurement
from contracts.tenancy import TenantScope
from contracts.velocity import ImportedPart, Mark, Marking, Observation, PastEvent, Sighting


class Clock(Protocol):
    """The time, injected."""

    def now(self) -> datetime:
        """Aware, UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary start, never going back."""
        ...


class Ids(Protocol):
    """Identifiers, injected."""

    def token(self) -> str:
        """32 random hex digits: a lock token."""
        ...

    def uuid7(self) -> str:
        """A time-ordered UUID (RFC 9562, version 7)."""
        ...


# --- broker -----------------------------------------------------------------------------------------


class Confirm(StrEnum):
    """What is known of one published message."""

    CONFIRMED = "confirmed"
    UNROUTABLE = "unroutable"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Message:
    """One AMQP message to publish. `exchange` "" is the default exchange (routing key = queue)."""

    exchange: str
    routing_key: str
    body: bytes
    message_id: str
    headers: Mapping[str, Any] = field(default_factory=dict)
    persistent: bool = True
    mandatory: bool = True
    content_type: str = "application/octet-stream"
    correlation_id: str | None = None
    user_id: str | None = None
    confirm: bool = True


@dataclass(frozen=True, slots=True)
class Delivery:
    """One AMQP message as it was delivered. `seen`: this very process was given it before (its holder is alive)."""

    queue: str
    body: bytes
    routing_key: str
    message_id: str | None = None
    user_id: str | None = None
    correlation_id: str | None = None
    content_type: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)
    redelivered: bool = False
    seen: bool = False

    @property
    def events(self) -> int:
        """How many entries it holds by its header, which is its sender's word: 1 to 64."""
        said = self.headers.get(CARRIER_HEADER)
        return min(max(said, 1), MAX_ENTRIES) if isinstance(said, int) else 1

    @property
    def returns(self) -> int:
        """How often the broker took it back unacked; at least once when it was redelivered."""
        counted = self.headers.get("x-delivery-count")
        return max(counted if isinstance(counted, int) else 0, int(self.redelivered))


class Publisher(Protocol):
    """Publishes messages; all confirms of a call are awaited together."""

    async def publish(self, messages: Sequence[Message]) -> Sequence[Confirm]:
        """One Confirm per message. UNKNOWN means: send the same message again. Never raises for one message."""
        ...


# --- state store ------------------------------------------------------------------------------------


class Reserved(StrEnum):
    """What the door's reservation found."""

    NEW = "new"
    REPEAT = "repeat"
    CONFLICT = "conflict"
    FULL = "full"
    LIMITED = "limited"


@dataclass(frozen=True, slots=True)
class Reservation:
    """The answer to one reservation; `stored` is the version 0 to publish (None once it moved on, and when refused).

    `wait_ms`: when a LIMITED event would be taken if its tenant handed in nothing else; 0 for the others.
    """

    verdict: Reserved
    version: int
    stored: bytes | None
    wait_ms: int = 0


class ClaimVerdict(StrEnum):
    """The rows of the claim table (see docs/protocol.md)."""

    GO = "go"
    TWIN = "twin"
    INSTALLED = "installed"
    ABSENT = "absent"
    DONE = "done"
    LOCKED = "locked"


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """Claim this entry; `install_absent` says that PostgreSQL was asked and holds no decision."""

    entry: Entry
    install_absent: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to one claim.

    `stored`: the bytes to go on with (GO, TWIN, INSTALLED) or the newer version's (DONE; None when only a
    tombstone is left: ask PostgreSQL). `output`: what version DONE owes besides its next entry (the runner's bytes).
    `owes_trail`: every record up to this version joins the output. `lease_ms`: the other holder's (LOCKED).
    """

    verdict: ClaimVerdict
    token: str
    version: int
    stored: bytes | None = None
    output: bytes | None = None
    owes_trail: bool = False
    lease_ms: int = 0
    holder: str = ""


@dataclass(frozen=True, slots=True)
class Advance:
    """Move one claimed event on to the next version. `tombstone` keeps a few bytes instead of the state.

    `status` is what `Peek` answers of a final version, whose number does not tell it; "" for the others.
    `received_ms` as in the entry's header.
    """

    scope: TenantScope
    event_id: str
    token: str
    expected_version: int
    expected_digest: str
    version: int
    digest: str
    body_digest: str
    stored: bytes
    output: bytes
    tombstone: bool = False
    status: str = ""
    received_ms: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """One entry of this process under its lock token."""

    scope: TenantScope
    event_id: str
    token: str


@dataclass(frozen=True, slots=True)
class Leaving:
    """An event that leaves the backlog at this version: parked, decided elsewhere, or not known to be accepted.

    Its state stays; whoever claims it, or submits it once more, puts it back.
    """

    scope: TenantScope
    event_id: str
    n: int
    body_digest: str


@dataclass(frozen=True, slots=True)
class Peek:
    """What the state store knows of an event; `stored` is None once only a tombstone is left."""

    version: int
    status: str
    body_digest: str
    stored: bytes | None
    holder: str = ""


class StateStore(Protocol):
    """The current version, lock and stored output of each event (Redis)."""

    async def reserve(self, entries: Sequence[Entry], limits: Sequence[TenantLimits] = ()) -> Sequence[Reservation]:
        """Store version 0 unless the identity is known: the answer says which.

        `limits`: those of each entry's tenant, one per entry (or none at all). An unknown identity beyond the undecided
        events is FULL, one beyond the rate LIMITED, and nothing is stored. A known one is answered whatever the limits,
        and uses up no rate.
        """
        ...

    async def claim(self, requests: Sequence[ClaimRequest], token: str) -> Sequence[Claim]:
        """Lock each entry for this process under `token` and compare it with what is stored."""
        ...

    async def advance(self, moves: Sequence[Advance]) -> Sequence[bool]:
        """Store the next version and release the lock; False = the lock is no longer mine (claim again)."""
        ...

    async def release(self, held: Sequence[Held], leaving: Sequence[Leaving] = ()) -> None:
        """Give locks back without advancing, and take events off the backlog.

        A lock that is not mine, and an event that is at another version or another body's by now, are left alone.
        """
        ...

    async def peek(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[Peek | None]:
        """Read without claiming."""
        ...

    async def beat(self) -> None:
        """Say that this process is alive (kept for three beats)."""
        ...

    async def alive(self, boots: Sequence[str]) -> Sequence[bool]:
        """Whether each of these processes is alive."""
        ...

    async def begin_alone(self, scope: TenantScope, event_id: str, stage: str) -> int:
        """Note that this process runs a suspect alone; returns how many processes died doing so."""
        ...

    async def end_alone(self, scope: TenantScope, event_id: str, stage: str) -> None:
        """The suspect settled: forget it."""
        ...


@dataclass(frozen=True, slots=True)
class StageBacklog:
    """Undecided, unparked events at a stage, and when the oldest was received (ms since 1970; None: there is none).

    `whole`: since `trust` said so, the state store has forgotten nothing. `claimed` and `advanced` count attempts that
    began and that were won, from an arbitrary start on; they begin anew when the state store forgets.
    """

    events: int
    oldest_ms: int | None
    whole: bool
    claimed: int = 0
    advanced: int = 0


class Backlogs(Protocol):
    """How many events are under way (Redis). Counts are of this moment, exact while nothing was forgotten."""

    async def backlog(self, scopes: Sequence[TenantScope], now: datetime) -> Sequence[StageBacklog]:
        """One per stage, in pipeline order, over all these tenants."""
        ...

    async def undecided(self, scopes: Sequence[TenantScope], now: datetime) -> Sequence[int]:
        """Events of each tenant at any stage."""
        ...

    async def trust(self, stages: Sequence[str]) -> None:
        """Say that everything which waits for these stages is counted now; forgotten with everything else."""
        ...


# --- features ---------------------------------------------------------------------------------------


class FeatureStore(Protocol):
    """What was seen of each subject and counterparty (Redis): a cache of `events` and `labels`.

    Histories are sets of samples by event, so that every call may be repeated, and calls may come in any order.
    """

    async def observe(self, sightings: Sequence[Sighting], *, record: bool = True) -> Sequence[Observation]:
        """What is known of both entities of each event before it, and the event recorded, in one step per tenant.

        A repeat is answered as the first time, with its sequence. `record`: False only looks.
        """
        ...

    async def merge(self, sightings: Sequence[Sighting]) -> None:
        """Add past events, with their verdicts, as known from before the epoch; those that are there stay."""
        ...

    async def mark(self, markings: Sequence[Marking]) -> None:
        """Put labels on samples. One whose event was not observed yet waits for it."""
        ...

    async def marks(self, scopes: Sequence[TenantScope]) -> Sequence[Mark]:
        """The epoch of each tenant; begins one, as incomplete, where the server has none or lost writes."""
        ...

    async def complete(self, marks: Sequence[Mark]) -> Sequence[bool]:
        """Say that everything is merged that happened before each epoch; False: it is another epoch by now."""
        ...


class Past(Protocol):
    """The tables `events` and `labels`, read back as they were accepted (PostgreSQL)."""

    async def events(self, scope: TenantScope, after: str | None, limit: int) -> Sequence[PastEvent]:
        """A tenant's events by id, from behind `after` on."""
        ...

    async def count(self, scope: TenantScope, most: int) -> int:
        """How many events a tenant has; counted no further than `most`."""
        ...

    async def known(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[PastEvent | None]:
        """These events, as far as they were accepted."""
        ...

    async def labels(self, scope: TenantScope, after: str | None, limit: int) -> Sequence[Label]:
        """A tenant's labels by id, from behind `after` on."""
        ...

    async def imported(
        self, scope: TenantScope, after: tuple[str, int] | None, limit: int, source: str | None = None
    ) -> Sequence[ImportedPart]:
        """What was loaded from files (one `source`, or all), in order of (source, part), from behind `after` on."""
        ...

    async def keep(self, parts: Sequence[ImportedPart]) -> None:
        """Keep parts of files, each once, so that a rebuild finds them."""
        ...


# --- database ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DecisionRow:
    """The highest revision of an event's decision: canonical Decision bytes, and the state that it stands on."""

    body_digest: str
    revision: int
    outcome: str
    decision: bytes
    state: bytes


@dataclass(frozen=True, slots=True)
class EventRow:
    """The owner of an identity: body digest of the `events` row, and its decision if there is one."""

    body_digest: str
    decision: DecisionRow | None


class Ledger(Protocol):
    """Events and decisions (PostgreSQL): the arbiter of who owns an identity and of the outcome."""

    async def record_events(self, states: Sequence[EventState]) -> Sequence[EventRow]:
        """Insert `events` rows ON CONFLICT DO NOTHING, then read back the owner and its decision."""
        ...

    async def decisions(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[DecisionRow | None]:
        """The highest revision of each event's decision."""
        ...

    async def decide(self, states: Sequence[EventState]) -> Sequence[DecisionRow]:
        """One transaction: insert revision 1 of each decided state, open approvals of those that won, read back."""
        ...

    async def known(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[bool]:
        """Whether the `events` table has each event."""
        ...

    async def failed(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[bool]:
        """Whether a person discarded the dead letter of each event; a decision that came all the same stands."""
        ...

    async def histories(self, states: Sequence[EventState]) -> Sequence[SubjectHistory]:
        """The subject's earlier events, by `events`; the event itself and later ones are not counted."""
        ...


@dataclass(frozen=True, slots=True)
class ActiveSet:
    """What decides for one tenant now: an approved, active, unexpired version of each kind, or None.

    `halted`: a person stopped automatic decisions for the tenant, for its model, or everywhere. A tenant need not
    screen names, nor have words for reasons beside its model's: `lost` names what of that is chosen and may not be
    used. `trial` decides nothing: another model is tried beside the one that does.
    """

    model: Pin | None
    policy: Pin | None
    guardrail: Pin | None
    thresholds: Thresholds
    halted: bool = False
    lists: Pin | None = None
    reasons: Pin | None = None
    trial: Pin | None = None
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Artifact:
    """The immutable content of a registered version; `content` is parsed JSON whose digest was verified.

    `approved_at` and `valid_until` are RFC 3339 in UTC; None: not known, or for ever.
    """

    kind: str
    pin: Pin
    content: Mapping[str, Any]
    approved_at: str | None = None
    valid_until: str | None = None


class Registry(Protocol):
    """Approved versions of what decides."""

    async def active(self, scopes: Sequence[TenantScope], kind: str, event_types: Sequence[str]) -> Sequence[ActiveSet]:
        """The active versions per tenant for an event kind and type; at most 2 s old."""
        ...

    async def artifacts(self, pins: Sequence[Pin]) -> Sequence[Artifact]:
        """Content by digest, its signature verified.

        Raises InvalidModelStateError on a mismatch, ModelNotApprovedError when absent.
        """
        ...

    async def revoked(self, pins: Sequence[Pin]) -> Sequence[bool]:
        """Whether each pinned version was revoked since; at most 2 s old."""
        ...


@dataclass(frozen=True, slots=True)
class PauseNotice:
    """Why something is paused, and in how many seconds that ends by itself; None: when somebody resumes it."""

    reason: str
    seconds: float | None = None


class Pauses(Protocol):
    """What is paused now: stages of the fleet, and tenants at the doors. At most 2 s old.

    A server that does not answer leaves the last answer in force: it cannot have taken a new command either.
    """

    async def doors(self, scopes: Sequence[TenantScope]) -> Sequence[PauseNotice | None]:
        """Whether each tenant is paused at the doors."""
        ...

    async def stage(self, stage: str) -> PauseNotice | None:
        """Whether a stage is paused."""
        ...


class AuditLog(Protocol):
    """The per-tenant hash chain."""

    async def append(self, records: Sequence[AuditRecord]) -> Sequence[bool]:
        """Append each record once, in one transaction; False = it was already there."""
        ...

    async def probed(self, partition: int, sent_at: str) -> None:
        """Note that a probe sent at that time (RFC 3339) has come through a partition; the latest stays."""
        ...


EventKey = tuple[TenantScope, str]


class Missing(Protocol):
    """What PostgreSQL knows and misses: events without a decision, and decisions without their whole trail."""

    async def undecided(self, since: datetime, before: datetime, limit: int) -> Sequence[EventState]:
        """Version 0 of events received in [since, before) that have neither a decision nor a dead letter."""
        ...

    async def still_undecided(self, keys: Sequence[EventKey]) -> Sequence[EventState]:
        """Those of these events that have neither yet."""
        ...

    async def incomplete(self, since: datetime, before: datetime, limit: int) -> Sequence[EventState]:
        """The decided states of [since, before) of whose trail the chain lacks a record."""
        ...

    async def still_incomplete(self, keys: Sequence[EventKey]) -> Sequence[EventState]:
        """Those of these events of whose trail the chain still lacks a record."""
        ...

    async def probes(self) -> Mapping[int, datetime]:
        """By partition, when the latest probe was sent that has come through."""
        ...


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One parked entry: why, and the bytes to replay. `letter_id` names entry, attempt and replay.

    `replays` counts how often an operator had sent it again before it failed this time.
    """

    letter_id: str
    scope: TenantScope | None
    event_id: str
    stage: str
    category: str
    problem: str
    exception_class: str
    fingerprint: str
    attempts: int
    first_failed_at: str
    last_failed_at: str
    body: bytes
    replays: int = 0


class DeadLetters(Protocol):
    """The table `dead_letters`."""

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """Insert once each, closed when a stage parked it whose event is decided; a repeat changes nothing."""
        ...


@dataclass(frozen=True, slots=True)
class TenantProfile:
    """A tenant as its callers see it."""

    scope: TenantScope
    name: str
    broker_user: str | None
    thresholds: Thresholds
    limits: TenantLimits = NO_LIMITS


class Credentials(Protocol):
    """Who a bearer credential belongs to."""

    async def principal(self, bearer: str) -> Principal | None:
        """The owner of an API key or JWT; None when it is malformed, unknown, expired or revoked (≤ 5 s ago)."""
        ...


class Directory(Protocol):
    """Tenants."""

    async def tenants(self) -> Sequence[TenantProfile]:
        """Every tenant; at most 5 s old."""
        ...


@dataclass(frozen=True, slots=True)
class FeedPage:
    """Decisions (canonical bytes) in commit order, and the cursor after the last; None when the page is empty."""

    decisions: tuple[bytes, ...]
    cursor: str | None


class DecisionFeed(Protocol):
    """Every revision of a tenant's decisions, in an order in which nothing appears behind a cursor later."""

    async def page(self, scope: TenantScope, after: str | None, limit: int) -> FeedPage:
        """The decisions after a cursor. Raises InvalidMetadataError for a cursor that this feed did not make."""
        ...


class LabelBook(Protocol):
    """The table `labels`."""

    async def record(self, labels: Sequence[Label]) -> Sequence[bool]:
        """Insert each once, by position; False = it was already there."""
        ...


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One message that a command wrote in its own transaction; `position` is the order of writing."""

    position: int
    scope: TenantScope | None
    message: Message


class Outbox(Protocol):
    """Messages of committed commands that wait to be published."""

    async def waiting(self, limit: int) -> Sequence[OutboxRow]:
        """The oldest rows of all tenants, in order."""
        ...

    async def published(self, rows: Sequence[OutboxRow]) -> None:
        """Remove rows whose messages were confirmed."""
        ...


class Simulator(Protocol):
    """Decides an event without recording or sending anything."""

    async def simulate(self, scope: TenantScope, event: Event) -> Decision:
        """The decision that the event would get now. Raises LimitExceededError when too many run at once."""
        ...


class Redecider(Protocol):
    """Carries an event on from the version that it has reached, without recording or sending anything."""

    async def redecide(self, state: EventState) -> Decision:
        """The decision that this version would come to now, on its own pins if it has them.

        Raises what its stages would raise, and LimitExceededError when too many run at once.
        """
        ...


class Replies(Protocol):
    """Copies of decisions that callers of this process wait for."""

    @property
    def address(self) -> str:
        """The `reply_to` of entries whose decision somebody waits for here."""
        ...

    def wait(self, event_id: str, timeout_s: float) -> Awaitable[bytes | None]:
        """The decision's bytes, None once `timeout_s` have passed. A lost copy is a None, never an error.

        Whoever calls this is waiting from the call on, before it awaits the answer: call it, publish the entry,
        then await. Cancel the answer, or let it time out, when the publish fails.
        """
        ...


class Telemetry(Protocol):
    """Metrics records: unconfirmed, may be lost, may count duplicates; never hold up an entry."""

    def record(self, *measurements: Measurement) -> None:
        """Queue measurements for the metrics sink."""
        ...
