"""Traces of a stage's load: the format of docs/traces.md, and synthetic ones from fixed seeds."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

START = datetime(2026, 1, 31, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Load:
    """What comes from outside, from `t` (s) until the next line."""

    t: float
    arrival_rate: float
    service_rate: float
    failure_rate: float = 0.0


@dataclass(frozen=True)
class Trace:
    """One stage's load over time."""

    name: str
    loads: tuple[Load, ...]
    seconds: int
    stage: str = "scoring"
    partitions: int = 32
    start: datetime = START
    _times: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_times", tuple(load.t for load in self.loads))

    def at(self, second: float) -> Load:
        return self.loads[max(bisect_right(self._times, second) - 1, 0)]


Shape = Callable[[int], tuple[float, float]]
"""Arrival rate and failure rate at a second."""


def synthetic(name: str, seed: int, seconds: int, shape: Shape, service_rate: float = 50.0) -> Trace:
    """A shape with the noise of arrivals (Poisson, as a normal) and of service (a few per cent), a line a second."""
    chance = random.Random(seed)
    loads = []
    for t in range(seconds):
        rate, failing = shape(t)
        arrivals = max(chance.gauss(rate, math.sqrt(rate)), 0.0)
        loads.append(Load(t, arrivals, service_rate * chance.uniform(0.95, 1.05), failing))
    return Trace(name, tuple(loads), seconds)


def burst(t: int) -> tuple[float, float]:
    """Quiet, and every ten minutes two minutes of ten times as much."""
    return (1000.0 if 300 <= t % 600 < 420 else 100.0), 0.0


def ramp(t: int) -> tuple[float, float]:
    """From little to much in half an hour, a plateau, and back in half an hour."""
    up, down = t / 1800, (5400 - t) / 1800
    return 50.0 + 950.0 * max(min(up, down, 1.0), 0.0), 0.0


def day(t: int) -> tuple[float, float]:
    """A day of two hours: night, morning, a noon dip, an evening peak."""
    x = 2 * math.pi * t / 7200
    return 60.0 + 440.0 * max(math.sin(x - math.pi / 3) + 0.35 * math.sin(3 * x), 0.0), 0.0


def outage(t: int) -> tuple[float, float]:
    """An even load; for six minutes nearly every attempt fails, for all workers."""
    return 400.0, 0.97 if 1200 <= t < 1560 else 0.0


def poison(t: int) -> tuple[float, float]:
    """An even load; every quarter of an hour a quarter of the attempts fails for three minutes."""
    return 400.0, 0.25 if t % 900 >= 720 else 0.0


TRACES = (
    synthetic("burst", 11, 3600, burst),
    synthetic("ramp", 12, 5400, ramp),
    synthetic("day", 13, 7200, day),
    synthetic("outage", 14, 3600, outage),
    synthetic("poison", 15, 3600, poison),
)


def read_trace(lines: list[dict[str, Any]], name: str = "recorded") -> Trace:
    """The load of a recorded trace: a line tells of the time before it; without a measured rate it was as before."""
    head, *rows = lines
    loads: list[Load] = []
    begin = 0.0
    for row in rows:
        before = loads[-1] if loads else Load(0.0, 0.0, 1.0)
        arrivals, service, failures = (row.get(k) for k in ("arrival_rate", "service_rate", "failure_rate"))
        loads.append(
            Load(
                begin,
                before.arrival_rate if arrivals is None else arrivals,
                before.service_rate if service is None else service,
                before.failure_rate if failures is None else failures,
            )
        )
        begin = row["t"]
    start = datetime.fromisoformat(head["start"])
    return Trace(name, tuple(loads), math.ceil(begin), head["stage"], rows[0]["partitions"], start)
