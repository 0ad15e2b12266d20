"""The health port of every role: is this process alive, is it ready, and what does it count.

`/health/live` asks nothing but the event loop; `/health/ready` runs the injected check and tells its verdict with every
reason, and so does `/metrics` as a number. No credential is asked for, so nothing here names a tenant. `serve` leaves
signals to the process that calls it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any

import orjson
import structlog
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from contracts.telemetry import HEALTH
from resilience.monitor import Finding, Health, Verdict

__all__ = ["CollectorRegistry", "HealthDoor", "HealthReport", "health_app", "health_routes", "serve"]

log = structlog.get_logger(__name__)

CHECK_SECONDS = 5.0
DRAIN_SECONDS = 10
_LEVELS = {Health.OK: 0, Health.DEGRADED: 1, Health.DOWN: 2}


@dataclass(frozen=True, slots=True)
class HealthReport:
    """Whether the process can do its work now, what stands in the way, and the verdict if there is more to tell."""

    ready: bool
    reasons: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    judged: Health | None = None

    @staticmethod
    def of(verdict: Verdict) -> HealthReport:
        """What a verdict means to whoever asks one process."""
        sentences = tuple(finding.sentence for finding in verdict.reasons)
        return HealthReport(verdict.ready, sentences, verdict.reasons, verdict.health)

    @property
    def health(self) -> Health:
        """The health in one word; a process that is not ready and says no more is down."""
        return self.judged or (Health.OK if self.ready else Health.DOWN)


@dataclass(frozen=True, slots=True)
class HealthDoor:
    """What the health routes show. `check` has 5 s to answer; a check that raises or is late is not ready."""

    environment: str
    version: str
    check: Callable[[], Awaitable[HealthReport]]
    registry: CollectorRegistry


def health_routes(door: HealthDoor) -> list[BaseRoute]:
    """`/health`, `/health/live`, `/health/ready` and `/metrics`."""
    m = HEALTH
    own = CollectorRegistry()
    gauge = Gauge(m.name, m.help, m.labels, registry=own)

    async def health(_: Request) -> Response:
        return _json(200, {"status": "ok", "environment": door.environment, "version": door.version})

    async def live(_: Request) -> Response:
        return _json(200, {"status": "ok"})

    async def ready(_: Request) -> Response:
        report = await _report(door)
        status = 200 if report.ready else 503
        document = {
            "status": "ready" if report.ready else "not ready",
            "health": report.health,
            "reasons": report.reasons,
            "findings": [asdict(finding) for finding in report.findings],
        }
        return _json(status, document)

    async def metrics(_: Request) -> Response:
        gauge.set(_LEVELS[(await _report(door)).health])
        return Response(generate_latest(door.registry) + generate_latest(own), media_type=CONTENT_TYPE_LATEST)

    return [
        Route("/health", health),
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
    ]


def health_app(door: HealthDoor) -> Starlette:
    """The whole application of a role that has no other HTTP door."""
    return Starlette(routes=health_routes(door))


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    stop: asyncio.Event | None = None,
    on_bound: Callable[[int], None] | None = None,
) -> None:
    """Serve `app` until `stop` is set or the task is cancelled; requests in flight have 10 s to end.

    `on_bound` learns the port (0 asks for a free one). Raises OSError when the address cannot be bound;
    uvicorn itself would end the process.
    """
    with _listen(host, port) as listener:
        if on_bound is not None:
            on_bound(listener.getsockname()[1])
        server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                proxy_headers=False,
                ws="none",
                timeout_graceful_shutdown=DRAIN_SECONDS,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopping = asyncio.create_task((stop or asyncio.Event()).wait())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            server.should_exit = True
            await serving


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: a role stops its parts in an order that uvicorn does not know."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


async def _report(door: HealthDoor) -> HealthReport:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await door.check()
    except TimeoutError:
        return HealthReport(ready=False, reasons=("the readiness check did not answer in time",))
    except Exception as error:  # noqa: BLE001 - a broken check means not ready, never a dead health port
        log.error("readiness_check_failed", exception_class=type(error).__name__)
        return HealthReport(ready=False, reasons=("the readiness check failed",))


def _json(status: int, document: dict[str, Any]) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")
