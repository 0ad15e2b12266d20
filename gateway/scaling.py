"""`GET /ops/v1/scaling/{stage}`: how much waits for a stage, and how many workers it should have.

For Kubernetes (KEDA's metrics-api trigger) and the local supervisor, on a private port and without a credential: it
names no tenant. Promises that a number is never older than the answer's `as_of` says; without one it answers 503.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime

import orjson
from prometheus_client import Counter, Gauge
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from contracts.failures import InfrastructureError, NotKnownError, problem_document
from contracts.messages import PROBLEM_JSON
from contracts.telemetry import (
    BACKLOG_EVENTS,
    BACKLOG_OLDEST,
    SCALING_CURRENT,
    SCALING_DECISIONS,
    SCALING_DESIRED,
    Metric,
)
from contracts.topology import STAGES
from gateway.health import CollectorRegistry, HealthDoor, health_routes
from gateway.web import json_answer


@dataclass(frozen=True, slots=True)
class ScalingAnswer:
    """One stage at `as_of`. Rates in events per second, null when they could not be measured.

    `service_rate` is one worker's while it is busy; `estimated`: the state store forgot, messages stand for events.
    """

    backlog_events: int
    backlog_messages: int
    oldest_age_s: float
    arrival_rate: float | None
    service_rate: float | None
    desired: int
    reason: str
    as_of: datetime
    estimated: bool


class ScalingMeter:
    """The autoscaler's metrics, in the registry that its own port shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(metric: Metric) -> Gauge:
            return Gauge(metric.name, metric.help, metric.labels, registry=registry)

        self._events, self._oldest = gauge(BACKLOG_EVENTS), gauge(BACKLOG_OLDEST)
        self._current, self._desired = gauge(SCALING_CURRENT), gauge(SCALING_DESIRED)
        m = SCALING_DECISIONS
        self._decisions = Counter(m.name, m.help, m.labels, registry=registry)

    def show(self, stage: str, answer: ScalingAnswer, workers: int, action: str) -> None:
        """What was seen and decided last; `workers` consume the stage now."""
        self._events.labels(stage).set(answer.backlog_events)
        self._oldest.labels(stage).set(answer.oldest_age_s)
        self._current.labels(stage).set(workers)
        self._desired.labels(stage).set(answer.desired)
        self._decisions.labels(stage, action, answer.reason).inc()


def scaling_app(door: HealthDoor, latest: Callable[[str], ScalingAnswer | None]) -> Starlette:
    """The autoscaler's port: health, metrics and the scaling call; `latest` is None while there is nothing fresh."""

    async def scaling(request: Request) -> Response:
        stage = request.path_params["stage"]
        if stage not in STAGES:
            return _problem(NotKnownError(f"there is no such stage; stages are {', '.join(STAGES)}"))
        answer = latest(stage)
        if answer is None:
            return _problem(InfrastructureError("nothing was measured lately: RabbitMQ or Redis does not answer"))
        return json_answer(200, asdict(answer) | {"as_of": answer.as_of.isoformat()})

    return Starlette(routes=[*health_routes(door), Route("/ops/v1/scaling/{stage}", scaling)])


def _problem(error: NotKnownError | InfrastructureError) -> Response:
    document = problem_document(error)
    headers = {"Retry-After": "5"} if document["status"] == 503 else {}
    return Response(orjson.dumps(document), document["status"], headers, PROBLEM_JSON)
