"""One verdict on the fleet from everything that was read: ok, degraded or down, and why, the worst first.

Promises: the same readings and policy give the same verdict; what could not be read is never taken for well; every
reason names its subject and says in one sentence what was seen. Pure: reads nothing, remembers nothing, and does not
say what to do. *Down* means that nothing can be decided: a server does not answer, the process is paused, or a stage
that has work stands still. Everything else is decided late, or with an answer missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from contracts.failures import Severity
from resilience.breaker import Phase


class Health(StrEnum):
    """The whole fleet in one word."""

    OK = "ok"
    DEGRADED = "degraded"
    DOWN = "down"


class Cause(StrEnum):
    """What is wrong, in one word of a closed set; among equally severe reasons the earlier one comes first."""

    UNREACHABLE = "unreachable"
    PAUSED = "paused"
    STUCK = "stuck"
    UNKNOWN = "unknown"
    LATE = "late"
    BREAKER_OPEN = "breaker-open"
    BACKLOG = "backlog"
    SLOW_SERVER = "slow-server"
    SLOW_STAGE = "slow-stage"
    BREAKER_PROBING = "breaker-probing"


SEVERITIES: Final[Mapping[Cause, Severity]] = {
    Cause.UNREACHABLE: Severity.CRITICAL,
    Cause.PAUSED: Severity.CRITICAL,
    Cause.STUCK: Severity.CRITICAL,
    Cause.UNKNOWN: Severity.ERROR,
    Cause.LATE: Severity.ERROR,
    Cause.BREAKER_OPEN: Severity.ERROR,
    Cause.BACKLOG: Severity.WARNING,
    Cause.SLOW_SERVER: Severity.WARNING,
    Cause.SLOW_STAGE: Severity.WARNING,
    Cause.BREAKER_PROBING: Severity.INFO,
}
"""How loud each cause is. Critical means down; everything else means degraded."""

_STOPS: Final = frozenset({Cause.UNREACHABLE, Cause.PAUSED})
_LOUDNESS: Final = (Severity.CRITICAL, Severity.ERROR, Severity.WARNING, Severity.INFO)
_ORDER: Final = tuple(Cause)


@dataclass(frozen=True, slots=True)
class ServerReading:
    """Whether a server answered its round trip (None: nobody asked), and in what time (s)."""

    answered: bool | None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class StageReading:
    """One stage: events not yet through it, age of the oldest (s), median seconds from delivery to settlement.

    None = could not be read; a stage without traffic has no latency, and that is well.
    """

    backlog_events: float | None
    oldest_age_s: float | None
    latency_s: float | None = None


@dataclass(frozen=True, slots=True)
class Readings:
    """Everything that was read at about one moment; stages and breakers by name.

    `paused` is why this process takes nothing now, None while it does.
    """

    database: ServerReading
    redis: ServerReading
    rabbitmq: ServerReading
    stages: Mapping[str, StageReading] = field(default_factory=dict)
    breakers: Mapping[str, Phase] = field(default_factory=dict)
    paused: str | None = None


@dataclass(frozen=True, slots=True)
class MonitorPolicy:
    """From where on a reading is a reason: events, and seconds. Raises ValueError if late comes after stuck."""

    backlog_events: float = 10_000
    late_s: float = 10.0
    stuck_s: float = 300.0
    slow_server_s: float = 0.5
    slow_stage_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.late_s < self.stuck_s:
            raise ValueError("0 < late_s < stuck_s")


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason: how severe, what, of whom, and a sentence for a person."""

    severity: Severity
    cause: Cause
    subject: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The fleet's health, with its reasons in order of severity."""

    health: Health
    reasons: tuple[Finding, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether this process can do its own work, however late the fleet is: its servers answer, it is not paused."""
        return not any(finding.cause in _STOPS for finding in self.reasons)


def judge(readings: Readings, policy: MonitorPolicy) -> Verdict:
    """The verdict on some readings."""
    servers = {"PostgreSQL": readings.database, "Redis": readings.redis, "RabbitMQ": readings.rabbitmq}
    found = [finding for name, server in servers.items() if (finding := _server(name, server, policy))]
    for name, stage in readings.stages.items():
        found += _stage(name, stage, policy)
    found += [finding for name, phase in readings.breakers.items() if (finding := _breaker(name, phase))]
    if readings.paused is not None:
        found.append(_finding(Cause.PAUSED, "consumer", f"paused: {readings.paused}"))
    found.sort(key=lambda one: (_LOUDNESS.index(one.severity), _ORDER.index(one.cause), one.subject))
    if any(finding.severity is Severity.CRITICAL for finding in found):
        return Verdict(Health.DOWN, tuple(found))
    return Verdict(Health.DEGRADED if found else Health.OK, tuple(found))


def _server(name: str, reading: ServerReading, policy: MonitorPolicy) -> Finding | None:
    if reading.answered is None:
        return _finding(Cause.UNKNOWN, name, f"nobody has asked {name} whether it answers")
    if not reading.answered:
        return _finding(Cause.UNREACHABLE, name, f"{name} does not answer")
    if reading.seconds is not None and not reading.seconds < policy.slow_server_s:
        return _finding(Cause.SLOW_SERVER, name, f"{name} took {reading.seconds:.1f} s to answer")
    return None


def _stage(name: str, reading: StageReading, policy: MonitorPolicy) -> list[Finding]:
    backlog, age_s, latency_s = reading.backlog_events, reading.oldest_age_s, reading.latency_s
    if backlog is None or age_s is None or math.isnan(backlog) or math.isnan(age_s):
        return [_finding(Cause.UNKNOWN, name, f"the backlog of {name} could not be read")]
    found = []
    if age_s >= policy.stuck_s:
        found.append(_finding(Cause.STUCK, name, f"an event has waited for {name} for {age_s:.0f} s"))
    elif age_s >= policy.late_s:
        found.append(_finding(Cause.LATE, name, f"an event has waited for {name} for {age_s:.0f} s"))
    if backlog >= policy.backlog_events:
        found.append(_finding(Cause.BACKLOG, name, f"{backlog:.0f} events wait for {name}"))
    if latency_s is not None and not latency_s < policy.slow_stage_s:
        found.append(_finding(Cause.SLOW_STAGE, name, f"{name} takes {latency_s:.1f} s for a delivery"))
    return found


def _breaker(name: str, phase: Phase) -> Finding | None:
    match phase:
        case Phase.OPEN:
            return _finding(Cause.BREAKER_OPEN, name, f"{name} failed too often and is left alone")
        case Phase.HALF_OPEN:
            return _finding(Cause.BREAKER_PROBING, name, f"{name} is being asked again after an outage")
        case Phase.CLOSED:
            return None


def _finding(cause: Cause, subject: str, sentence: str) -> Finding:
    return Finding(SEVERITIES[cause], cause, subject, sentence)
