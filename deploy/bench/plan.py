"""What a benchmark does, as a value, and the events it sends: the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from contracts.topology import STAGES, Stage
from deploy.settings import SettingsError

Door = Literal["http", "amqp"]
_CHUNK = 200  # attribute values are short strings, so a payload is many of them


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """One run. `rate` None drains a backlog of `events`; else it is events per second, open loop.

    `skew` is the exponent of a Zipf law over the tenants (0: all alike). `payload` bytes are added to each event.
    `single`: a backlog of one event per message instead of the door's own carriers. `stages`: workers of each stage.
    `wait_s` is how long nothing may move before the run gives up.
    """

    events: int
    rate: float | None
    door: Door = "http"
    tenants: int = 1
    skew: float = 0.0
    payload: int = 0
    single: bool = False
    partitions: int = 4
    seed: int = 1
    stages: Mapping[Stage, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 1))
    wait_s: float = 60.0


def stage_counts(text: str) -> dict[Stage, int]:
    """Workers of each stage: `2` for all alike, or `retrieval=2,decision=3` (others 1). Raises SettingsError."""
    try:
        if text.isdigit():
            counts = dict.fromkeys(STAGES, int(text))
        else:
            pairs = (part.partition("=") for part in text.split(",") if part)
            counts = dict.fromkeys(STAGES, 1) | {Stage(name.strip()): int(number) for name, _, number in pairs}
    except ValueError:
        counts = {}
    if not text or not counts or not all(1 <= count <= 16 for count in counts.values()):
        names = ", ".join(STAGES)
        raise SettingsError(f"--stages {text!r} is neither a number nor STAGE=NUMBER pairs (1 to 16; stages: {names})")
    return counts


def bench_events(plan: BenchPlan) -> Iterator[tuple[int, dict[str, Any]]]:
    """(tenant's number, event) for each event of the run."""
    chance = random.Random(plan.seed)  # noqa: S311 - a seeded run must be the same run again
    weights = list(accumulate(1.0 / (rank + 1) ** plan.skew for rank in range(plan.tenants)))
    padding = {f"padding_{i:03d}": "x" * min(_CHUNK, plan.payload - start) for i, start in _chunks(plan.payload)}
    for number in range(plan.events):
        tenant = chance.choices(range(plan.tenants), cum_weights=weights)[0]
        event: dict[str, Any] = {
            "id": f"bench-{number:07d}",
            "kind": "risk",
            "type": chance.choice(("payment.transfer", "loan.application")),
            "occurred_at": "2026-01-31T12:00:00Z",
            "subject": {"type": "customer", "id": f"customer-{chance.randrange(1_000)}"},
            "amount": {"value": str(chance.choice((5, 120, 4_000, 90_000))), "currency": "EUR"},
            "risk_score": float(chance.randrange(101)),
        }
        if padding:
            event["attributes"] = padding
        yield tenant, event


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    return enumerate(range(0, size, _CHUNK))
