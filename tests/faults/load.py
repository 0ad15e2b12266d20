"""What the clients of a chaos run send, as a pure plan, and the history of what they saw, as JSON lines.

The plan is open-loop: arrivals have times of their own and come in bursts, whatever the fleet answers. An event of the
plan has a subject of its own, so that its outcome depends on nothing but its shape, and a twin can say it; and a canary
in `text` and `metadata` that no other tenant's anything may ever hold. The history holds one line per attempt and
answer, with what a client can know: `ok` is a promise of the fleet, `fail` a definite no, `unknown` is repeated.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import orjson

SHAPES: Final = 240
"""How many different contents there are: each is decided once by the twin."""


class Door(StrEnum):
    """How a submission comes in."""

    HTTP = "http"
    BATCH = "batch"
    AMQP = "amqp"


class Variant(StrEnum):
    """What a submission is to its identity: the body that is meant, another body, or nothing that may be accepted."""

    MEANT = "meant"
    OTHER = "other"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Submission:
    """One submission of an identity by a tenant (by place). `repeat`: the same body was sent before."""

    tenant: int
    identity: str
    variant: Variant
    shape: int
    door: Door
    repeat: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """A submission and its time, in seconds from the beginning."""

    at_s: float
    submission: Submission


@dataclass(frozen=True, slots=True)
class LoadProfile:
    """How much comes: mean events per second over all tenants, in bursts of `burst_s` out of every `period_s` seconds.

    Shares are of events: sent again, sent again with another body, and never valid.
    """

    seconds: float
    rate: float
    tenants: int = 3
    period_s: float = 6.0
    burst_s: float = 2.0
    repeats: float = 0.10
    others: float = 0.02
    invalid: float = 0.01


def arrivals(seed: int, profile: LoadProfile) -> list[Arrival]:
    """The plan: the same for the same seed and profile. Four fifths of the events come in the bursts."""
    chance = random.Random(f"load:{seed}")
    planned: list[Arrival] = []
    number = 0
    for start in _steps(profile.seconds, profile.period_s):
        amount = round(profile.rate * min(profile.period_s, profile.seconds - start))
        # One tenant makes most of a burst, so that carriers fill.
        loud = chance.randrange(profile.tenants)
        for _ in range(amount):
            in_burst = chance.random() < 0.8
            span = profile.burst_s if in_burst else profile.period_s
            at_s = min(start + chance.random() * span, profile.seconds)
            tenant = loud if in_burst and chance.random() < 0.8 else chance.randrange(profile.tenants)
            planned += _event(chance, profile, at_s, tenant, number)
            number += 1
    return sorted(planned, key=lambda arrival: (arrival.at_s, arrival.submission.identity))


def _steps(seconds: float, step: float) -> Iterator[float]:
    start = 0.0
    while start < seconds:
        yield start
        start += step


def _event(chance: random.Random, profile: LoadProfile, at_s: float, tenant: int, number: int) -> list[Arrival]:
    identity, shape = f"e{number:07d}", chance.randrange(SHAPES)
    if chance.random() < profile.invalid:
        return [Arrival(at_s, Submission(tenant, identity, Variant.INVALID, shape, _door(chance)))]
    found = [Arrival(at_s, Submission(tenant, identity, Variant.MEANT, shape, _door(chance)))]
    if chance.random() < profile.repeats:
        again = Submission(tenant, identity, Variant.MEANT, shape, _door(chance), repeat=True)
        found.append(Arrival(min(at_s + chance.random() * 20, profile.seconds), again))
    if chance.random() < profile.others:
        other = Submission(tenant, identity, Variant.OTHER, (shape + 1) % SHAPES, _door(chance))
        found.append(Arrival(min(at_s + 0.5 + chance.random() * 20, profile.seconds), other))
    return found


def _door(chance: random.Random) -> Door:
    return chance.choice((Door.HTTP, Door.BATCH, Door.BATCH, Door.AMQP, Door.AMQP, Door.AMQP))


def canary(tenant_id: str) -> str:
    """A word that is in everything that a tenant sends, and in nothing else."""
    return f"canary-{hashlib.sha256(tenant_id.encode()).hexdigest()[:20]}"


def shape_of(number: int) -> dict[str, Any]:
    """The part of an event that its outcome depends on; every kind of outcome is among the shapes."""
    chance = random.Random(f"shape:{number}")
    event: dict[str, Any] = {
        "kind": chance.choice(("risk", "compliance")),
        "type": chance.choice(("payment.transfer", "loan.application", "payment.card")),
        "occurred_at": "2026-01-31T12:00:00Z",
        "amount": {"value": str(chance.choice((5, 120, 4_000, 90_000, 2_000_000))), "currency": "EUR"},
        "risk_score": float(chance.randrange(101)),
    }
    if event["kind"] == "compliance":
        levels: tuple[str, ...] = chance.choice(((), ("low",), ("high",)))
        event["regulatory_flags"] = [{"code": "SANCTIONS_HIT", "level": level} for level in levels]
    return event


def body_of(submission: Submission, tenant_id: str) -> dict[str, Any]:
    """The event as it is sent."""
    word = canary(tenant_id)
    event = shape_of(submission.shape) | {
        "id": submission.identity,
        "subject": {"type": "customer", "id": f"{submission.identity}-{submission.variant}"},
        "text": f"a note that says {word}",
        "metadata": {"canary": word, "variant": str(submission.variant), "shape": str(submission.shape)},
    }
    if submission.variant is Variant.INVALID:
        wrong: tuple[dict[str, Any], ...] = (
            {"occurred_at": "yesterday"},
            {"risk_score": 1_000.0},
            {"amount": {"value": "many", "currency": "EUR"}},
            {"colour": "red"},
        )
        event |= wrong[submission.shape % len(wrong)]
    return event


class Op(StrEnum):
    """The kinds of line in a history."""

    INVOKE = "invoke"
    OK = "ok"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Line:
    """One line: at `at_s` a tenant's client sent a body under an identity, or was answered.

    `status` is the HTTP status (also of one item of a batch), 0 for a broker's answer or none at all; `shown` are the
    (revision, outcome, digest) of a decision that the answer held.
    """

    at_s: float
    op: Op
    door: Door
    tenant: str
    identity: str
    event_id: str
    variant: Variant
    status: int = 0
    problem: str = ""
    shown: tuple[int, str, str] | None = None


class History:
    """The lines of a run, in memory and in a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._began = time.monotonic()
        self.lines: list[Line] = []

    def now(self) -> float:
        """Seconds since the history began."""
        return time.monotonic() - self._began

    def add(self, line: Line) -> None:
        """Append; buffered."""
        self.lines.append(line)
        self._file.write(orjson.dumps(line) + b"\n")

    def close(self) -> None:
        """Write what is left."""
        self._file.close()


def read_history(path: Path) -> list[Line]:
    """The lines of a file."""
    return [line_of(row) for row in path.read_bytes().splitlines()]


def line_of(raw: bytes) -> Line:
    """One line of a file."""
    row = orjson.loads(raw)
    shown = row.pop("shown")
    row |= {"op": Op(row["op"]), "door": Door(row["door"]), "variant": Variant(row["variant"])}
    return Line(**row, shown=tuple(shown) if shown else None)


def digest_of(document: Any) -> str:
    """A short digest of a decision document, the same over every way it can be read."""
    return hashlib.sha256(orjson.dumps(document, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def shown_in(document: dict[str, Any] | None) -> tuple[int, str, str] | None:
    """What a decision document shows; None without one."""
    return None if not document else (int(document["revision"]), str(document["outcome"]), digest_of(document))


def accepted_events(lines: Sequence[Line]) -> set[tuple[str, str]]:
    """(tenant, event) of everything that some client was promised."""
    return {(line.tenant, line.event_id) for line in lines if line.op is Op.OK}
