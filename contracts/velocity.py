"""Velocity: what was seen of an entity, in a bounded form, and what one event saw of it when it was observed.

An entity is a subject or a counterparty of one tenant. Its history is the newest samples by (time, event), 68 bytes
each, so that its state is the same in whatever order they came. The time of a sample is the event's `occurred_at`,
but never later than when it was received: an event that is dated ahead happened, for us, when it came.

Promises: equal samples are equal bytes, in Redis and in memory. Parties and attributes are in them only as digests.
Nothing here computes a feature: see `workers.judgement.features`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from struct import Struct
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from contracts.events import Event, Party
from contracts.labels import Label
from contracts.tenancy import TenantScope

DAY_MS: Final = 86_400_000
ORIGIN_MS: Final = 2_208_988_800_000
"""Sample times are milliseconds since 1900-01-01, the earliest date of an event; this is 1970 on that scale."""

Side = Literal["subject", "counterparty"]
SIDES: Final[tuple[Side, ...]] = ("subject", "counterparty")

Sample = tuple[int, bytes, int, float, bytes, int, int, bytes, bytes]
"""(time, event id, sequence, amount, currency, verdict, known, other party, attribute), as in RECORD."""

RECORD: Final = Struct(">Q16sQd3sBQ8s8s")
"""One sample: time (ms since 1900) · event id · sequence at which it was observed (0: known from before) · amount (NaN
without one) · currency · verdict of its label (0 none, 1 cleared, 2 fraud) · since when that was known (ms since 1900)
· digest of the other party · digest of the configured attribute (zeros: there is none). The first 24 bytes are its
place; the scripts know offsets 0, 8, 24 and 43."""

CLEARED: Final = 1
FRAUD: Final = 2
_NOTHING: Final = bytes(8)
_NO_CURRENCY: Final = bytes(3)
FRAUD_LABELS: Final = frozenset({"chargeback", "default", "confirmed_fraud"})
"""Labels that say that an event was a fraud; every other one clears it."""


@dataclass(frozen=True, slots=True)
class VelocityPolicy:
    """Bounds of a history and of labels; times in ms.

    `keep`: features look at so many of an entity's newest samples at most. `slack`: so many more are stored, so that
    a repeated observation still finds what the first one found. `label_delay_ms`: events younger than this have no
    say in label-derived rates, since their labels had no time to come. `lateness_ms`: how late an event may come and
    still find its whole longest window. `attribute`: whose distinct values are counted.
    """

    keep: int = 256
    slack: int = 64
    label_delay_ms: int = 7 * DAY_MS
    lateness_ms: int = DAY_MS
    attribute: str = "device_id"

    @property
    def stored(self) -> int:
        """Samples of an entity that are stored at most."""
        return self.keep + self.slack

    @property
    def horizon_ms(self) -> int:
        """Samples this much older than the entity's newest are forgotten."""
        return 30 * DAY_MS + self.label_delay_ms + self.lateness_ms

    @property
    def ttl_s(self) -> int:
        """An entity of which nothing was seen for so long (s) is forgotten; longer than any sample counts."""
        return (self.horizon_ms + 7 * DAY_MS) // 1000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an event's label says of it, and since when (ms since 1900) that was known."""

    verdict: int
    known: int

    @property
    def rank(self) -> tuple[int, int]:
        """Of two verdicts the later holds; of two at one moment the worse."""
        return (self.known, self.verdict)


NO_VERDICT: Final = Verdict(0, 0)


@dataclass(frozen=True, slots=True)
class Sighting:
    """One event as its entities' histories hold it. `at`: ms since 1900; parties are digests (32 hex digits)."""

    scope: TenantScope
    event_id: str
    at: int
    subject: str
    counterparty: str | None
    amount: float = math.nan
    currency: bytes = _NO_CURRENCY
    attribute: bytes = _NOTHING
    verdict: Verdict = NO_VERDICT

    def histories(self) -> tuple[str, str | None]:
        """The state keys of its subject and of its counterparty."""
        other = self.counterparty
        return (
            self.scope.velocity_key("subject", self.subject),
            None if other is None else self.scope.velocity_key("counterparty", other),
        )

    def records(self, sequence: int = 0) -> tuple[bytes, bytes]:
        """Its sample in the subject's history, and in the counterparty's (empty when there is none)."""
        other = self.counterparty
        mine = self._record(sequence, _NOTHING if other is None else bytes.fromhex(other[:16]))
        return mine, b"" if other is None else mine[:52] + bytes.fromhex(self.subject[:16]) + mine[60:]

    def _record(self, sequence: int, other: bytes) -> bytes:
        v = self.verdict
        return RECORD.pack(
            self.at,
            bytes.fromhex(self.event_id),
            sequence,
            self.amount,
            self.currency,
            v.verdict,
            v.known,
            other,
            self.attribute,
        )


@dataclass(frozen=True, slots=True)
class Mark:
    """The epoch of a tenant's feature state. `since_ms` (since 1970): when history was lost, None while it is whole."""

    scope: TenantScope
    epoch: str
    since_ms: int | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.since_ms is None


@dataclass(frozen=True, slots=True)
class Observation:
    """What one event saw: samples of its entities, in order, and the tenant's (epoch, sequence) at which it looked.

    Samples may hold later ones too: those observed before have a sequence below this one. `complete` is False when
    history was lost at `since_ms` (ms since 1970) and is not rebuilt yet.
    """

    epoch: str
    sequence: int
    complete: bool
    since_ms: int | None
    subject: tuple[Sample, ...]
    counterparty: tuple[Sample, ...] | None


@dataclass(frozen=True, slots=True)
class Marking:
    """A label on its way into histories; `sighting` is its event, None while that is not known."""

    scope: TenantScope
    event_id: str
    verdict: Verdict
    sighting: Sighting | None = None


@dataclass(frozen=True, slots=True)
class PastEvent:
    """An event that was accepted earlier, as the database holds it; `received_at` aware."""

    scope: TenantScope
    event_id: str
    event: Event
    received_at: datetime


@dataclass(frozen=True, slots=True)
class ImportedPart:
    """Past events that an operator loaded from a file. `source` names the file's content and how it was read."""

    scope: TenantScope
    source: str
    part: int
    packed: bytes

    def sightings(self) -> tuple[Sighting, ...]:
        """What was packed."""
        return tuple(
            Sighting(
                self.scope,
                event.hex(),
                at,
                subject.hex(),
                other.hex() if named else None,
                amount,
                currency,
                attribute,
                Verdict(said, known),
            )
            for event, at, subject, named, other, amount, currency, attribute, said, known in _PACKED.iter_unpack(
                self.packed
            )
        )


_PACKED: Final = Struct(">16sQ16s?16sd3s8sBQ")


def pack(sightings: Sequence[Sighting]) -> bytes:
    """Sightings of one tenant as an ImportedPart holds them: 85 bytes each."""
    return b"".join(
        _PACKED.pack(
            bytes.fromhex(s.event_id),
            s.at,
            bytes.fromhex(s.subject),
            s.counterparty is not None,
            bytes.fromhex(s.counterparty or ""),
            s.amount,
            s.currency,
            s.attribute,
            s.verdict.verdict,
            s.verdict.known,
        )
        for s in sightings
    )


_FROZEN = ConfigDict(frozen=True, extra="forbid")

Row = tuple[int, int, float, float | None, int, int]
"""Of one window: events, amounts in the event's currency, their sum, their maximum, distinct others, attributes."""


class EntityVelocity(BaseModel):
    """One entity's numbers: a row per window, and (events old enough for labels, frauds among them) per window."""

    model_config = _FROZEN
    windows: tuple[Row, ...]
    labels: tuple[tuple[int, int], ...]


class Velocity(BaseModel):
    """The velocity facts of one event: all its features, and when they were observed.

    Without `complete` the numbers are what is left of a lost history: nothing may be decided on them.
    """

    model_config = _FROZEN
    epoch: str
    sequence: int
    complete: bool
    since: str | None = None
    subject: EntityVelocity
    counterparty: EntityVelocity | None = None


def sighting_of(scope: TenantScope, event_id: str, event: Event, received_at: datetime, attribute: str) -> Sighting:
    """What histories keep of an event; `attribute` names the one whose values are counted."""
    amount, value = event.amount, event.attributes.get(attribute)
    return Sighting(
        scope,
        event_id,
        min(since_1900(event.occurred), since_1900(received_at)),
        _party(event.subject),
        None if event.counterparty is None else _party(event.counterparty),
        math.nan if amount is None else float(amount.value),
        _NO_CURRENCY if amount is None else amount.currency.encode(),
        _NOTHING if value is None else hashlib.sha256(f"{type(value).__name__}\0{value}".encode()).digest()[:8],
    )


def verdict_of(label: Label) -> Verdict:
    """What a label says; it counts from its `effective_at`. Raises ValueError for a time that cannot be read."""
    return verdict(label.label, datetime.fromisoformat(label.effective_at))


def verdict(label: str, effective_at: datetime) -> Verdict:
    """The same of a label that is not a value yet."""
    return Verdict(FRAUD if label in FRAUD_LABELS else CLEARED, max(since_1900(effective_at), 1))


_EPOCH_1900: Final = datetime.fromisoformat("1900-01-01T00:00:00+00:00")
_MILLISECOND: Final = timedelta(milliseconds=1)


def since_1900(moment: datetime) -> int:
    """Whole milliseconds since 1900 of an aware time; what lies before is 0."""
    return max((moment - _EPOCH_1900) // _MILLISECOND, 0)


def _party(party: Party) -> str:
    return party_digest(party.type, party.id)


@lru_cache(maxsize=65_536)  # imports meet the same parties again and again
def party_digest(kind: str, name: str) -> str:
    """32 hex digits that stand for a party."""
    return hashlib.sha256(f"{kind}\0{name}".encode()).hexdigest()[:32]


def samples_of(stored: bytes) -> tuple[Sample, ...]:
    """The samples of a stored history."""
    return tuple(RECORD.iter_unpack(stored))


def kept(samples: list[Sample], policy: VelocityPolicy) -> tuple[Sample, ...]:
    """What is stored of samples in order: not too old for the newest, and not too many."""
    oldest = samples[-1][0] - policy.horizon_ms if samples else 0
    return tuple(sample for sample in samples[-policy.stored :] if sample[0] >= oldest)
