"""The HTTP door: authenticate, read, admit, answer; and read back what became of an event.

Promises: every error is an RFC 9457 problem document, nothing that a client sends is answered with 500,
every answer carries the correlation id, and a caller sees its own tenant only, since every key is made from
the credential's scope. Nothing is decided here; `Intake` accepts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contracts.codec import state_from_bytes
from contracts.events import MAX_BODY_BYTES, Kind, event_id_of
from contracts.failures import (
    AuthenticationError,
    InvalidMetadataError,
    MalformedBodyError,
    NotKnownError,
    OversizedBodyError,
    RiskfleetError,
    UnsupportedMediaTypeError,
    classify,
    fingerprint,
    problem_document,
)
from contracts.lifecycle import FINAL_VERSION, Status
from contracts.messages import JSON, PROBLEM_JSON, PROBLEM_URN
from contracts.outcomes import STATUS_OF, Outcome
from contracts.ports import DecisionRow, Directory, Ids, Ledger, Peek, StateStore
from contracts.telemetry import bind_correlation, current_correlation
from contracts.tenancy import TenantScope
from contracts.topology import STAGES
from gateway.health import HealthDoor, health_routes
from gateway.intake import MAX_IDENTITY, Admission, Intake, Refusal, Submission, correlation_of
from gateway.refusals import RefusalLog

log = structlog.get_logger(__name__)

_EVENT_ID = re.compile(r"[0-9a-f]{32}")
_MEDIA_TYPE = re.compile(r"application/(?:[!#$&^_.+a-z0-9-]+\+)?json")


@dataclass(frozen=True, slots=True)
class HttpPorts:
    """What the HTTP door needs beside the intake."""

    directory: Directory
    ledger: Ledger
    state_store: StateStore
    ids: Ids


def create_app(
    intake: Intake, ports: HttpPorts, refusals: RefusalLog, health: HealthDoor, *, partitions: int
) -> Starlette:
    """The gateway's ASGI application; nothing is connected or started by building it."""
    door = _Door(intake, ports, refusals, partitions)
    routes: list[BaseRoute] = [
        Route("/v1/risk", door.post_risk, methods=["POST"]),
        Route("/v1/compliance", door.post_compliance, methods=["POST"]),
        Route("/v1/events", door.events, methods=["GET", "POST"]),
        Route("/v1/events/{event_id}", door.get_event, methods=["GET"]),
        Route("/v1/tenant", door.get_tenant, methods=["GET"]),
        *health_routes(health),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(CorrelationMiddleware, ids=ports.ids)],
        exception_handlers={
            RiskfleetError: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
        },
    )
    app.router.redirect_slashes = False  # an unknown path is a 404 document, never a redirect that drops a body
    return app


class CorrelationMiddleware:
    """Binds the correlation of a request once, echoes it, and turns a defect into a problem document.

    Pure ASGI: Starlette's BaseHTTPMiddleware runs the endpoint in another task, where nothing bound here is seen.
    """

    def __init__(self, app: ASGIApp, ids: Ids) -> None:
        self._app = app
        self._ids = ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        correlation = correlation_of(
            request.headers.get("x-correlation-id"), request.headers.get("traceparent"), self._ids
        )
        begun = False

        async def echo(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers["X-Correlation-ID"] = correlation.correlation_id or ""
                if correlation.traceparent:
                    headers["traceparent"] = correlation.traceparent
            await send(message)

        with bind_correlation(correlation):
            try:
                await self._app(scope, receive, echo)
            except Exception as error:
                _log_defect(request, error)
                if begun:
                    raise
                await _problem(request, error)(scope, receive, echo)


class _Door:
    """The endpoints."""

    def __init__(self, intake: Intake, ports: HttpPorts, refusals: RefusalLog, partitions: int) -> None:
        self._intake = intake
        self._ports = ports
        self._refusals = refusals
        self._partitions = partitions

    async def post_risk(self, request: Request) -> Response:
        """POST /v1/risk."""
        return await self._submit(request, Kind.RISK)

    async def post_compliance(self, request: Request) -> Response:
        """POST /v1/compliance."""
        return await self._submit(request, Kind.COMPLIANCE)

    async def events(self, request: Request) -> Response:
        """POST /v1/events (the body names the kind) and GET /v1/events?id= (the sender's own id)."""
        if request.method == "POST":
            return await self._submit(request, None)
        scope = await self._authenticate(request)
        names = request.query_params.getlist("id")
        if len(names) != 1 or not 1 <= len(names[0]) <= MAX_IDENTITY:
            raise InvalidMetadataError(f"name one event: ?id= and 1 to {MAX_IDENTITY} characters")
        return await self._event(scope, event_id_of(scope, names[0]))

    async def get_event(self, request: Request) -> Response:
        """GET /v1/events/{id}."""
        scope = await self._authenticate(request)
        event_id = request.path_params["event_id"]
        if not _EVENT_ID.fullmatch(event_id):
            raise NotKnownError
        return await self._event(scope, event_id)

    async def get_tenant(self, request: Request) -> Response:
        """GET /v1/tenant."""
        scope = await self._authenticate(request)
        profile = next((p for p in await self._ports.directory.tenants() if p.scope == scope), None)
        if profile is None:
            raise NotKnownError("the tenant was only just made or is being removed; repeat in a few seconds")
        return _json(
            200,
            {
                "tenant_id": scope.tenant_id,
                "name": profile.name,
                "partition": scope.partition(self._partitions),
                "partitions": self._partitions,
                "limits": {"max_body_bytes": MAX_BODY_BYTES},
                "thresholds": profile.thresholds.model_dump(mode="json"),
                "ingest_queue": scope.ingest_queue if profile.broker_user else None,
            },
        )

    async def _submit(self, request: Request, kind: Kind | None) -> Response:
        scope: TenantScope | None = None
        try:
            scope = await self._authenticate(request)
            _check_media_type(request)
            identity = _one_header(request, "idempotency-key")
            body = await _read(request)
        except RiskfleetError as error:
            # Before authentication: metric and log only, or strangers could write the audit full.
            self._refusals.note(scope, error, "http", audited=scope is not None)
            raise
        correlation = current_correlation()
        verdict = await self._intake.admit(
            Submission(
                scope=scope,
                kind=kind,
                body=body,
                identity_header=identity,
                correlation_id=correlation.correlation_id,
                traceparent=correlation.traceparent,
                source="http",
                allow_generated_identity=True,
            )
        )
        if isinstance(verdict, Refusal):
            return _problem(request, verdict.error, event_id=verdict.event_id, id=verdict.identity)
        return _admitted(verdict)

    async def _authenticate(self, request: Request) -> TenantScope:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("send `Authorization: Bearer` and an API key")
        principal = await self._ports.directory.principal(key.strip())
        if principal is None:
            raise AuthenticationError("the API key is unknown or revoked")
        return principal.scope

    async def _event(self, scope: TenantScope, event_id: str) -> Response:
        key = ((scope, event_id),)
        (row,) = await self._ports.ledger.decisions(key)
        if row is not None:
            return _json(200, _decided(event_id, row))
        (peek,) = await self._ports.state_store.peek(key)
        if peek is not None:
            return _json(200, _under_way(event_id, peek))
        (known,) = await self._ports.ledger.known(key)
        if not known:
            raise NotKnownError
        return _json(200, {"event_id": event_id, "status": Status.RECEIVED, "version": 0, "stage": STAGES[0]})


def _admitted(admission: Admission) -> Response:
    document: dict[str, Any] = {
        "event_id": admission.event_id,
        "id": admission.identity,
        "kind": admission.kind,
        "status": admission.status,
        "correlation_id": admission.correlation_id,
    }
    headers = {"Location": f"/v1/events/{admission.event_id}"}
    if admission.replayed:
        headers["Idempotency-Replayed"] = "true"
    if admission.decision is None:
        return _json(202, document, headers)
    return _json(200, document | {"decision": orjson.Fragment(admission.decision.decision)}, headers)


def _decided(event_id: str, row: DecisionRow) -> dict[str, Any]:
    state = state_from_bytes(row.state)
    return {
        "event_id": event_id,
        "id": state.event.id,
        "kind": state.KIND,
        "status": STATUS_OF[Outcome(row.outcome)],
        "version": state.n,
        "stage": None,
        "received_at": state.received_at,
        "correlation_id": state.correlation_id,
        "pins": state.created.pins.model_dump(mode="json") if state.created else None,
        "revision": row.revision,
        "decision": orjson.Fragment(row.decision),
        "trail": [entry.model_dump(mode="json") for entry in state.trail],
    }


def _under_way(event_id: str, peek: Peek) -> dict[str, Any]:
    stage = STAGES[peek.version] if peek.version < FINAL_VERSION else None
    document: dict[str, Any] = {
        "event_id": event_id,
        "status": peek.status,
        "version": peek.version,
        "stage": stage,
    }
    if peek.stored is None:
        return document
    state = state_from_bytes(peek.stored)
    return document | {
        "id": state.event.id,
        "kind": state.KIND,
        "received_at": state.received_at,
        "correlation_id": state.correlation_id,
        "pins": state.created.pins.model_dump(mode="json") if state.created else None,
        "trail": [entry.model_dump(mode="json") for entry in state.trail],
    }


def _check_media_type(request: Request) -> None:
    values = request.headers.getlist("content-type")
    media_type, _, parameters = (values[0] if len(values) == 1 else "").partition(";")
    if not _MEDIA_TYPE.fullmatch(media_type.strip().lower()):
        raise UnsupportedMediaTypeError
    charset = re.search(r'charset\s*=\s*"?([^";\s]+)', parameters, re.IGNORECASE)
    if charset and charset[1].lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaTypeError("JSON is UTF-8; send no other charset")


def _one_header(request: Request, name: str) -> str | None:
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise InvalidMetadataError(f"the header {name} is sent more than once")
    return values[0] if values else None


async def _read(request: Request) -> bytes:
    """The body, at most 64 KiB: a larger one is refused without reading the rest."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > MAX_BODY_BYTES:
        raise OversizedBodyError
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise OversizedBodyError
    return bytes(body)


def _json(status: int, document: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(document), status, headers=dict(headers or {}), media_type=JSON)


def _problem(request: Request, error: BaseException, **members: Any) -> Response:
    document = problem_document(
        error, instance=request.scope["path"], correlation_id=current_correlation().correlation_id, **members
    )
    headers: dict[str, str] = {}
    if document["status"] == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if document["status"] == 413:
        headers["Connection"] = "close"  # the rest of the body is not read, so the connection cannot be used again
    if document["status"] == 503:
        headers["Retry-After"] = "1"
    return Response(orjson.dumps(document), document["status"], headers=headers, media_type=PROBLEM_JSON)


def _on_error(request: Request, error: Exception) -> Response:
    if classify(error).status >= 500:
        log.warning(
            "request_failed", problem=classify(error).problem, path=request.scope["path"], method=request.method
        )
    return _problem(request, error)


def _on_http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path (404) and a wrong method (405)."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    problem, detail = (
        ("method-not-allowed", "this path does not answer this method; see the Allow header")
        if status == 405
        else ("no-such-path", "there is no such path")
    )
    document = {
        "type": PROBLEM_URN + problem,
        "title": problem.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
        "instance": request.scope["path"],
        "correlation_id": current_correlation().correlation_id,
    }
    headers = getattr(error, "headers", None)
    return Response(orjson.dumps(document), status, headers=headers, media_type=PROBLEM_JSON)


def _on_disconnect(request: Request, _: Exception) -> Response:
    """The client went away while it sent its body: nobody reads this answer, and it is no defect."""
    return _problem(request, MalformedBodyError("the connection was closed before the body ended"))


def _log_defect(request: Request, error: BaseException) -> None:
    log.error(
        "request_defect",
        exception_class=type(error).__name__,
        fingerprint=fingerprint(error),
        path=request.scope["path"],
        method=request.method,
    )
